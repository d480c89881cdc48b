"""The command line: ``python -m logitless.bench.training``."""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..core.command import (
    Job,
    UsageError,
    check_positive,
    choose_device,
    choose_names,
    conclude,
    make_parser,
    run_command,
    run_jobs,
)
from ..core.console import Console
from ..core.environment import environment
from ..core.figures import can_draw
from ..core.registry import not_installed
from ..core.report import document, write_json
from ..core.rows import Progress, shorten
from .arms import ARMS
from .batches import PROFILES
from .cases import PRECISIONS, TrainCase
from .curves import planned_curves, run_curves
from .limits import run_limits
from .methods import METHODS
from .models import MODELS
from .report import Outcome, predicted_seconds, show, targets, write_figure
from .steps import planned_steps, run_steps
from .suites import SUITES, TrainSuite

DEFAULT_SUITES = ("steps",)
_ABOUT = (
    "Whole training steps of models with random weights: TRL's trainers as they are, with logitless.patch(), and "
    "logitless's modules, each checked against a step with an exact head."
)
_PACKAGES = ("trl", "transformers", "datasets", "accelerate", "peft")
_STEP_SECONDS = 15.0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m logitless.bench.training", _ABOUT, DEFAULT_SUITES)
    parser.set_defaults(rounds=5)
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help="only cases of these models")
    parser.add_argument("--method", nargs="+", default=[], metavar="NAME", help="only cases of these methods")
    parser.add_argument("--arms", nargs="+", default=[], metavar="NAME", help="default: those of each suite")
    parser.add_argument("--pairs", type=int, default=None, metavar="P", help="of every batch")
    parser.add_argument("--length", type=int, default=None, metavar="T", help="of the longest sequence of every batch")
    parser.add_argument("--profile", default=None, metavar="NAME", help="lengths of every batch")
    parser.add_argument("--precision", default=None, metavar="NAME", help="of every case")
    parser.add_argument("--attention", default=None, metavar="NAME", help="of sequences in one row, in every case")
    parser.add_argument("--tiny", action="store_true", help="shrink models and batches, as for a CPU")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of a curve; default: %(default)s")
    parser.add_argument("--limit-gb", type=float, default=80.0, metavar="GB", help="memory to fit in; default: %(default)s")
    return parser


def _list(console: Console) -> None:
    for suite in SUITES.values():
        console.print(f"[bold]{suite.name}[/bold]: {suite.help}", highlight=False)
        for case in suite.make({}, False):
            console.print(f"  {case.title}", highlight=False)
    console.print("[bold]arms[/bold]")
    for arm in ARMS.values():
        console.print(f"  {arm.name:18} {arm.about}", highlight=False)
    console.print(f"models: {', '.join(MODELS)}; methods: {', '.join(METHODS)}", highlight=False)
    console.print(f"profiles: {', '.join(PROFILES)}; precisions: {', '.join(PRECISIONS)}", highlight=False)


def _cases(suite: TrainSuite, options: argparse.Namespace) -> list[TrainCase]:
    """The suite's cases, chosen and changed by the options."""
    models, methods = choose_names("model", options.model, MODELS), choose_names("method", options.method, METHODS)
    names = ("pairs", "length", "profile", "precision", "attention")
    changes: dict[str, Any] = {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        cases = suite.make(changes, options.tiny)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return [case for case in cases if (not models or case.model in models) and (not methods or case.method in methods)]


class _Session:
    """What the jobs share; each suite has a file, which is written after every case."""

    def __init__(self, console: Console, options: argparse.Namespace, device: torch.device, deadline: float) -> None:
        self.console, self.options, self.device, self.deadline = console, options, device, deadline
        self.environment = environment(device)
        self.done: dict[str, list[Outcome]] = {}
        self.failed: dict[str, list[tuple[TrainCase, str]]] = {}

    def job(self, suite: TrainSuite, case: TrainCase, arms: list[str]) -> Job:
        """A case of a suite."""

        def run(progress: Progress) -> None:
            outcome = self.measure(suite, case, arms, lambda text, n: progress(f"{case.model} {case.method}: {text}", n))
            self.done.setdefault(suite.name, []).append(outcome)
            show(self.console, outcome)
            self.save(suite)

        def failed(error: Exception) -> None:
            self.failed.setdefault(suite.name, []).append((case, shorten(error)))
            self.console.print(f"{case.title}: {shorten(error)}", highlight=False)
            self.save(suite)

        planned = {"steps": planned_steps(arms, self.options.rounds), "curves": planned_curves(arms, self.options.steps)}
        return Job(case.title, planned.get(suite.kind, len(arms)), run, failed)

    def measure(self, suite: TrainSuite, case: TrainCase, arms: list[str], progress: Progress) -> Outcome:
        options, device = self.options, self.device
        if suite.kind == "steps":
            return run_steps(case, arms, device, rounds=options.rounds, progress=progress)
        if suite.kind == "curves":
            return run_curves(case, arms, device, steps=options.steps, progress=progress)
        limits: dict[str, Any] = {"limit_bytes": int(options.limit_gb * 1e9), "seconds": _STEP_SECONDS}
        return run_limits(case, suite.kind, arms, device, **limits, deadline=self.deadline, progress=progress)

    def path(self, name: str, ending: str) -> Path:
        path: Path = self.options.out / f"{self.device.type}-training-{name}.{ending}"
        return path

    def save(self, suite: TrainSuite) -> None:
        outcomes = self.done.get(suite.name, [])
        failed = [{**asdict(case), "message": message} for case, message in self.failed.get(suite.name, [])]
        about = {"suite": suite.name, "rounds": self.options.rounds, "failed_cases": failed, "environment": self.environment}
        value = document(outcomes, targets, **about)
        for case, outcome in zip(value["cases"], outcomes, strict=True):
            case["predicted_seconds"] = predicted_seconds(outcome)
        write_json(self.path(suite.name, "json"), value)


def _run(options: argparse.Namespace, console: Console) -> int:
    start = time.monotonic()
    suites = [SUITES[name] for name in choose_names("suite", options.suite, SUITES) or DEFAULT_SUITES]
    chosen = choose_names("arm", options.arms, ARMS)
    if options.list:
        _list(console)
        return 0
    check_positive(options, "rounds", "steps", "limit_gb", "time_limit")
    device = choose_device(options.device)
    if device.type == "cpu" and not options.tiny:
        raise UsageError("models at their real sizes need a GPU, and this runs on a CPU: --tiny shrinks them")
    if missing := not_installed(*_PACKAGES):
        raise UsageError(f"{'; '.join(missing)}: pip install 'logitless[bench]'")
    plan = [(suite, case) for suite in suites for case in _cases(suite, options)]
    if not plan:
        raise UsageError("no case of these suites has such a model and method; --list shows what there is")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub
    # names that the oldest transformers still needs, and the newest warns of at each step
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    session = _Session(console, options, device, start + (options.time_limit or math.inf))
    jobs = [session.job(suite, case, chosen or list(suite.providers)) for suite, case in plan]
    works = run_jobs(console, jobs, device, start, options.time_limit)
    paths = [session.path(name, "json") for name in SUITES if name in session.done or name in session.failed]
    if can_draw() and "steps" in session.done:
        paths.append(session.path("steps", "png"))
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, shrunk models"
        write_figure(paths[-1], [o.as_dict() for o in session.done["steps"]], where)
    conclude(console, [o for of_suite in session.done.values() for o in of_suite], targets, paths)
    return 0 if works and not session.failed else 1


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark of training steps.

    Args:
        argv: arguments, without the program's name; default those of the process.

    Returns:
        int: 0; 1 where a case as a whole could not run; 2 for a wrong argument. An arm that fails becomes a row of the table.
    """
    return run_command(_parser(), _run, argv)
