"""The command line: ``python -m logitless.bench`` and ``logitless bench``."""

from __future__ import annotations

import argparse
import time

import torch

from . import ceilings, compile_report, providers  # noqa: F401 (registers the providers)
from .core import command
from .core.cases import DTYPES, LOGITS, Case, Shape, parse_shape
from .core.command import UsageError, choose_names
from .core.console import Console
from .core.environment import environment
from .core.figures import can_draw, write_figures
from .core.registry import PROVIDERS
from .core.report import document, show, write_json
from .core.rows import Progress, shorten
from .core.runner import CaseOutcome, estimated_seconds, failed_case, run_case
from .suites import SUITES, default_providers
from .targets import targets

DEFAULT_SUITES = ("dpo", "memory")
_ROUNDS = {"cpu": (3, 7), "cuda": (10, 30)}
_ABOUT = (
    "Time, peak memory and error of log-probs, preference and policy losses of a language-model head. Every result is checked "
    "against float64, and a figure is printed only next to the error of the result that was timed."
)


def _parser() -> argparse.ArgumentParser:
    parser = command.make_parser("python -m logitless.bench", _ABOUT, (*DEFAULT_SUITES, "with --quick"))
    parser.add_argument("--shape", default="", metavar="KEY=VALUE,...", help="replaces values of the suites' shapes")
    parser.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="default: those of each suite")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller shapes (except for the headline)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory processes")
    parser.add_argument("--profile", action="store_true", help="one more step of ours and of the bare GEMMs, by kernel")
    return parser


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
    keys, dtypes, logits = (", ".join(names) for names in (Shape.__dataclass_fields__, DTYPES, LOGITS))
    console.print(f"[bold]shape keys[/bold]\n  {keys}\n  dtype: {dtypes}; logits: {logits}", highlight=False)


def _run(options: argparse.Namespace, console: Console) -> int:
    start = time.monotonic()
    suites = choose_names("suite", options.suite, [*SUITES, compile_report.SUITE, ceilings.SUITE])
    quick = options.quick or not suites  # the default must not take an hour
    chosen = choose_names("provider", options.providers, PROVIDERS)
    try:
        overrides = parse_shape(options.shape)
    except ValueError as error:
        raise UsageError(str(error)) from None
    device = command.choose_device(options.device)
    if options.list:
        _list(console, device)
        return 0
    command.check_positive(options, "rounds", "time_limit")
    rounds = options.rounds or _ROUNDS[device.type][0 if quick else 1]
    if compile_report.SUITE in suites and (reason := compile_report.why_not()):
        raise UsageError(f"suite {compile_report.SUITE!r} cannot run: {reason}")
    plan = [
        (case, chosen or default_providers(name, quick))
        for name in suites or DEFAULT_SUITES
        if name in SUITES
        for case in SUITES[name].make(overrides, quick)
    ]
    made_with = environment(device)  # before anything is written into the checkout, which would count as a change
    paths = [compile_report.run(console, options.out, made_with, quick)] if compile_report.SUITE in suites else []
    if ceilings.SUITE in suites:
        try:
            paths.append(ceilings.run(console, options.out, made_with, device, overrides, quick))
        except Exception as error:  # the cases have their own bare GEMMs
            console.print(f"the ceilings failed: {shorten(error)}", highlight=False)
    path = options.out / f"{device.type}-{'-'.join(dict.fromkeys(case.suite for case, _ in plan))}.json"
    outcomes: list[CaseOutcome] = []

    def add(outcome: CaseOutcome) -> None:
        """Save after each case: a run that is stopped leaves what it has measured."""
        outcomes.append(outcome)
        left_out = [case.title for case, _ in plan[len(outcomes) :]]
        about = {"quick": quick, "rounds": rounds, "environment": made_with, "left_out": left_out}
        write_json(path, document(outcomes, targets, **about))
        show(console, outcome)

    def run(case: Case, names: list[str], progress: Progress) -> None:
        settings = {"rounds": rounds, "memory": not options.no_memory, "profiled": options.profile}
        add(run_case(case, names, device, **settings, progress=lambda text: progress(f"{case.task}: {text}")))

    def failed(case: Case, names: list[str], error: Exception) -> None:
        add(failed_case(case, names, error))  # out of memory for the inputs or the reference: the next case may be smaller

    if device.type == "cuda" and plan:
        seconds = estimated_seconds(plan, device, rounds)
        console.print(f"{len(plan)} cases of {rounds} rounds; by their FLOP about {seconds:.0f} s", highlight=False)
    works = command.run_cases(console, plan, run, failed, device, start, options.time_limit)
    if outcomes:
        paths += [path, *(write_figures(options.out, outcomes, device) if can_draw() else [])]
    command.conclude(console, outcomes, targets, paths)
    return 0 if works else 1


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status.

    It is 1 where a kernel broke the GPU's context, 2 for a wrong argument. A provider that fails becomes a row of its table.
    """
    return command.run_command(_parser(), _run, argv)
