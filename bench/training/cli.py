"""The command line: ``python -m logitless.bench.training``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..cli import UsageError, choose_device, choose_names
from ..console import Console, make_console
from ..figures import can_draw
from ..registry import not_installed
from ..runner import shorten
from .arms import ARMS
from .batches import PROFILES
from .cases import PRECISIONS, TrainCase
from .curves import planned_curves, run_curves
from .limits import run_limits
from .methods import METHODS
from .models import MODELS
from .report import Outcome, show, write_figure, write_suite
from .steps import planned_steps, run_steps
from .suites import SUITES, Suite, shrink

DEFAULT_SUITES = ("steps",)
DEFAULT_OUT = Path("bench/out")
_PACKAGES = ("trl", "transformers", "datasets", "accelerate", "peft")
_ROUNDS = 5
_CURVE_STEPS = 50
_LIMIT_GB = 80.0
_STEP_SECONDS = 15.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m logitless.bench.training",
        description="Whole training steps of models with random weights: TRL's trainers as they are, on logitless.patch(), and "
        "logitless's modules, each checked against a step with an exact head.",
    )
    parser.add_argument("--suite", nargs="+", default=[], metavar="NAME", help=f"default: {' '.join(DEFAULT_SUITES)}")
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help="only cases of these models")
    parser.add_argument("--method", nargs="+", default=[], metavar="NAME", help="only cases of these methods")
    parser.add_argument("--arms", nargs="+", default=[], metavar="NAME", help="default: those of each suite")
    parser.add_argument("--pairs", type=int, default=None, metavar="P", help="of every batch")
    parser.add_argument("--length", type=int, default=None, metavar="T", help="of the longest sequence of every batch")
    parser.add_argument("--profile", default=None, metavar="NAME", help="lengths of every batch")
    parser.add_argument("--precision", default=None, metavar="NAME", help="of every case")
    parser.add_argument("--attention", default=None, metavar="NAME", help="of sequences in one row, in every case")
    parser.add_argument("--tiny", action="store_true", help="shrink models and batches, as for a CPU")
    parser.add_argument(
        "--rounds", type=int, default=_ROUNDS, metavar="N", help="timed steps of each arm; default: %(default)s"
    )
    parser.add_argument("--steps", type=int, default=_CURVE_STEPS, metavar="N", help="of a curve; default: %(default)s")
    parser.add_argument(
        "--limit-gb", type=float, default=_LIMIT_GB, metavar="GB", help="memory to fit in; default: %(default)s"
    )
    parser.add_argument(
        "--time-limit", type=float, default=None, metavar="S", help="seconds after which no further case is started"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda; default: %(default)s")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="for JSON and PNG; default: %(default)s")
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    return parser


def _list(console: Console) -> None:
    for suite in SUITES.values():
        console.print(f"[bold]{suite.name}[/bold]: {suite.about}", highlight=False)
        for case in suite.cases:
            console.print(f"  {case.title}", highlight=False)
    console.print("[bold]arms[/bold]")
    for arm in ARMS.values():
        console.print(f"  {arm.name:18} {arm.about}", highlight=False)
    console.print(f"models: {', '.join(MODELS)}; methods: {', '.join(METHODS)}", highlight=False)
    console.print(f"profiles: {', '.join(PROFILES)}; precisions: {', '.join(PRECISIONS)}", highlight=False)


def _cases(suite: Suite, options: argparse.Namespace) -> list[TrainCase]:
    """The suite's cases, chosen and changed as the options say."""
    models, methods = choose_names("model", options.model, MODELS), choose_names("method", options.method, METHODS)
    chosen = [
        shrink(case) if options.tiny else case
        for case in suite.cases
        if (not models or case.model in models) and (not methods or case.method in methods)
    ]
    names = ("pairs", "length", "profile", "precision", "attention")
    changes: dict[str, Any] = {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        return list(dict.fromkeys(replace(case, **changes) for case in chosen))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _run(
    case: TrainCase, suite: Suite, arms: Sequence[str], device: torch.device, options: Any, more: dict[str, Any]
) -> Outcome:
    if suite.kind == "steps":
        return run_steps(case, arms, device, rounds=options.rounds, **more)
    if suite.kind == "curves":
        return run_curves(case, arms, device, steps=options.steps, **more)
    limit = int(options.limit_gb * 1e9)
    of = "length" if suite.name == "longest" else "pairs"
    return run_limits(case, of, arms, device, limit_bytes=limit, seconds=_STEP_SECONDS, deadline=options.deadline, **more)


def _planned(suite: Suite, arms: Sequence[str], options: Any) -> int:
    if suite.kind == "steps":
        return planned_steps(arms, options.rounds)
    return planned_curves(arms, options.steps) if suite.kind == "curves" else len(arms)


def _main(options: argparse.Namespace, console: Console) -> int:
    suites = [SUITES[name] for name in choose_names("suite", options.suite, SUITES) or DEFAULT_SUITES]
    chosen = choose_names("arm", options.arms, ARMS)
    if options.list:
        _list(console)
        return 0
    for name in ("rounds", "steps", "limit_gb", "time_limit"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be more than 0, got {value:g}")
    device = choose_device(options.device)
    if device.type == "cpu" and not options.tiny:
        raise UsageError("models at their real sizes need a GPU, and this runs on a CPU: --tiny shrinks them")
    missing = [reason for package in _PACKAGES for reason in not_installed(package)]
    if missing:
        raise UsageError(f"{'; '.join(missing)}: pip install 'logitless[bench]'")
    plan = [(suite, case) for suite in suites for case in _cases(suite, options)]
    if not plan:
        raise UsageError("no case of these suites has such a model and method; --list shows what there is")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub
    # names that the oldest transformers still needs, and the newest warns of at each step
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    start = time.monotonic()
    options.deadline = float("inf") if options.time_limit is None else start + options.time_limit
    done: dict[str, list[Outcome]] = {}
    failed: dict[str, list[tuple[TrainCase, str]]] = {}
    paths: dict[str, Path] = {}
    planned = sum(_planned(suite, chosen or suite.arms, options) for suite, _ in plan)
    with console.progress(planned) as progress:
        for i, (suite, case) in enumerate(plan):
            if i and time.monotonic() > options.deadline:
                for _, left in plan[i:]:
                    console.print(f"left out after {options.time_limit:g} s: {left.title}", highlight=False)
                break
            more = {"progress": lambda text, n, case=case: progress(f"{case.model} {case.method}: {text}", n)}
            try:
                outcome = _run(case, suite, chosen or suite.arms, device, options, more)
                done.setdefault(suite.name, []).append(outcome)
                show(console, outcome)
            except Exception as error:  # of the case itself: no arm is to blame, and the next case may run
                failed.setdefault(suite.name, []).append((case, shorten(error)))
                console.print(f"{case.title}: {shorten(error)}", highlight=False)
            gc.collect()
            if device.type == "cuda":
                with contextlib.suppress(Exception):  # after an illegal access, say, nothing works any more
                    torch.cuda.empty_cache()
            paths[suite.name] = options.out / f"{device.type}-training-{suite.name}.json"
            found = done.get(suite.name, []), failed.get(suite.name, [])
            write_suite(paths[suite.name], suite.name, *found, device, rounds=options.rounds)
    written = list(paths.values())
    if can_draw() and "steps" in done:
        written.append(options.out / f"{device.type}-training-steps.png")
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, shrunk models"
        write_figure(written[-1], [o.as_dict() for o in done["steps"]], where)
    for path in written:
        console.print(f"wrote {path}", highlight=False)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark of training steps.

    Args:
        argv: arguments, without the program's name; default those of the process.

    Returns:
        int: 0; 1 where a case as a whole could not run; 2 for a wrong argument. An arm that fails is a row of the table.
    """
    try:
        return _main(_parser().parse_args(argv), make_console())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
