"""The command line: ``python -m logitless.bench`` and ``logitless bench``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ceilings, compile_report, register_all
from .cases import DTYPES, LOGITS, Case, Shape, parse_shape
from .console import Console, make_console
from .environment import environment
from .figures import can_draw, write_figures
from .registry import PROVIDERS
from .report import document, show, write_json
from .runner import (
    Outcome,
    context_is_lost,
    default_providers,
    estimated_seconds,
    failed_case,
    planned_steps,
    run_case,
    shorten,
)
from .suites import SUITES

DEFAULT_SUITES = ("dpo", "memory")
DEFAULT_OUT = Path("bench/out")
_ROUNDS = {"cpu": (3, 7), "cuda": (10, 30)}


_LOST = (
    "the GPU answers nothing any more in this process: the first provider that failed above is to blame; run again without it "
    "(--providers)"
)


class UsageError(Exception):
    """A wrong argument; the message names what is accepted."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m logitless.bench",
        description="Time, peak memory and error of log-probs, preference and policy losses of a language-model head. Every "
        "result is checked against float64, and a figure is only printed next to the error of the result that it timed.",
    )
    parser.add_argument(
        "--suite", nargs="+", default=[], metavar="NAME", help=f"default: {' '.join(DEFAULT_SUITES)}, run as --quick would"
    )
    parser.add_argument("--shape", default="", metavar="KEY=VALUE,...", help="replaces values of the suites' shapes")
    parser.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="default: those of each suite")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="for JSON and PNG; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller shapes (but for the headline)")
    parser.add_argument("--rounds", type=int, default=None, metavar="N", help="timed steps of each provider")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda; default: %(default)s")
    parser.add_argument(
        "--time-limit", type=float, default=None, metavar="S", help="seconds after which no further case is started"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory processes")
    parser.add_argument(
        "--profile", action="store_true", help="one more step of ours and of the bare GEMMs, after the timed ones, by kernel"
    )
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    return parser


def choose_names(kind: str, given: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names given apart or joined by commas, each once and known."""
    names = list(dict.fromkeys(name for text in given for name in text.split(",") if name))
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"unknown {kind} {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    return names


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}; known: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' is asked for, but torch sees no CUDA device")
    return torch.device(name)


def _list(console: Console, device: torch.device) -> None:
    console.print("[bold]suites[/bold]")
    for suite in SUITES.values():
        console.print(f"  {suite.name:10} {suite.help} ({suite.base})", highlight=False)
    for apart in (compile_report, ceilings):
        console.print(f"  {apart.SUITE:10} {apart.HELP}", highlight=False)
    console.print(f"[bold]providers[/bold] on {device.type}, at the headline shape")
    for name, provider in PROVIDERS.items():
        reasons = provider.why_not(Case("", min(provider.tasks), Shape()), device)
        state = f"unavailable: {'; '.join(reasons)}" if reasons else f"computes {', '.join(sorted(provider.tasks))}"
        console.print(f"  {name:20} {state}", highlight=False)
    console.print("[bold]shape keys[/bold]")
    console.print("  " + ", ".join(Shape.__dataclass_fields__), highlight=False)
    console.print(f"  dtype: {', '.join(DTYPES)}; logits: {', '.join(LOGITS)}", highlight=False)


def _run(
    console: Console,
    plan: Sequence[tuple[Case, list[str]]],
    device: torch.device,
    rounds: int,
    save: Callable[[list[Outcome]], None],
    *,
    memory: bool,
    profile: bool,
    deadline: float | None,
) -> list[Outcome]:
    """``save`` is told of all outcomes so far after each case: a run that is stopped leaves what it has measured."""
    if device.type == "cuda" and plan:
        seconds = estimated_seconds(plan, device, rounds)
        console.print(f"{len(plan)} cases of {rounds} rounds; by their FLOP about {seconds:.0f} s", highlight=False)
    outcomes: list[Outcome] = []
    with console.progress(sum(planned_steps(case, names, device, rounds) for case, names in plan)) as progress:
        for case, names in plan:
            if outcomes and deadline is not None and time.monotonic() > deadline:
                break
            try:
                outcome = run_case(case, names, device, rounds=rounds, memory=memory, profile=profile, progress=progress)
            except Exception as error:  # out of memory for its inputs or its reference: the next case may be smaller
                outcome = failed_case(case, names, error)
            outcomes.append(outcome)
            save(outcomes)
            show(console, outcome)
            if context_is_lost(device):
                console.print(_LOST, highlight=False)
                break
    return outcomes


def _main(arguments: argparse.Namespace, console: Console) -> int:
    register_all()
    start = time.monotonic()
    suites = choose_names("suite", arguments.suite, [*SUITES, compile_report.SUITE, ceilings.SUITE])
    quick = arguments.quick or not suites  # a run that nobody chose must not take an hour
    compiles = compile_report.SUITE in suites
    chosen = choose_names("provider", arguments.providers, PROVIDERS)
    try:
        overrides: dict[str, Any] = parse_shape(arguments.shape)
    except ValueError as error:
        raise UsageError(str(error)) from None
    device = choose_device(arguments.device)
    if arguments.list:
        _list(console, device)
        return 0
    rounds = arguments.rounds if arguments.rounds is not None else _ROUNDS[device.type][0 if quick else 1]
    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {rounds}")
    if arguments.time_limit is not None and not arguments.time_limit > 0:
        raise UsageError(f"--time-limit must be more than 0 seconds, got {arguments.time_limit:g}")
    if compiles and (reason := compile_report.why_not()):
        raise UsageError(f"suite {compile_report.SUITE!r} cannot run: {reason}")
    plan = [
        (case, chosen or default_providers(name, quick))
        for name in suites or DEFAULT_SUITES
        if name in SUITES
        for case in SUITES[name].make(overrides, quick)
    ]
    made_with = environment(device)  # before anything is written into the checkout, which would count as a change
    paths = [compile_report.run(console, arguments.out, made_with, quick)] if compiles else []
    if ceilings.SUITE in suites:
        try:
            paths.append(ceilings.run(console, arguments.out, made_with, device, overrides, quick))
        except Exception as error:  # the cases have their own bare GEMMs
            console.print(f"the ceilings failed: {shorten(error)}", highlight=False)
    names = "-".join(dict.fromkeys(case.suite for case, _ in plan))
    path = arguments.out / f"{device.type}-{names}.json"

    def save(outcomes: list[Outcome]) -> None:
        left_out = [case for case, _ in plan[len(outcomes) :]]
        write_json(path, document(outcomes, made_with, quick=quick, rounds=rounds, left_out=left_out))

    deadline = None if arguments.time_limit is None else start + arguments.time_limit
    options = {"memory": not arguments.no_memory, "profile": arguments.profile, "deadline": deadline}
    outcomes = _run(console, plan, device, rounds, save, **options)
    late = deadline is not None and time.monotonic() > deadline
    for case, _ in plan[len(outcomes) :]:
        console.print(f"left out{f' after {arguments.time_limit:g} s' if late else ''}: {case.title}", highlight=False)
    if outcomes:
        paths += [path, *(write_figures(arguments.out, outcomes, device) if can_draw() else [])]
    for path in paths:
        console.print(f"wrote {path}", highlight=False)
    if not can_draw():
        console.print("no figures: matplotlib is not installed", highlight=False)
    return int(context_is_lost(device))


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        argv: arguments, without the program's name; default those of the process.

    Returns:
        int: 0, 2 for a wrong argument, or 1 where a kernel broke the GPU's context. Otherwise a provider that fails is a row of
        the table, not an exit code.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _main(arguments, make_console())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
