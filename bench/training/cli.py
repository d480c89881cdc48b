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

from ..core import command
from ..core.command import UsageError, choose_names
from ..core.console import Console
from ..core.environment import environment
from ..core.figures import can_draw
from ..core.registry import not_installed
from ..core.report import document, show, write_json
from ..core.rows import Progress, shorten
from .arms import ARMS
from .batches import PROFILES
from .cases import PRECISIONS, TrainCase
from .curves import run_curves
from .limits import run_limits
from .methods import METHODS
from .models import MODELS
from .report import Outcome, targets, write_figure
from .steps import run_steps
from .suites import SUITES, TrainSuite

DEFAULT_SUITES = ("steps",)
_ABOUT = (
    "Whole training steps of models with random weights: TRL's trainers as they are, with logitless.patch(), and "
    "logitless's modules, each checked against a step with an exact head."
)
_PACKAGES = ("trl", "transformers", "datasets", "accelerate", "peft")
_STEP_SECONDS = 15.0


def _parser() -> argparse.ArgumentParser:
    parser = command.make_parser("python -m logitless.bench.training", _ABOUT, DEFAULT_SUITES)
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


def _run(options: argparse.Namespace, console: Console) -> int:
    start = time.monotonic()
    suites = [SUITES[name] for name in choose_names("suite", options.suite, SUITES) or DEFAULT_SUITES]
    chosen = choose_names("arm", options.arms, ARMS)
    if options.list:
        _list(console)
        return 0
    command.check_positive(options, "rounds", "steps", "limit_gb", "time_limit")
    device = command.choose_device(options.device)
    if device.type == "cpu" and not options.tiny:
        raise UsageError("models at their real sizes need a GPU, and this runs on a CPU: --tiny shrinks them")
    if missing := not_installed(*_PACKAGES):
        raise UsageError(f"{'; '.join(missing)}: pip install 'logitless[bench]'")
    plan = [(case, suite) for suite in suites for case in _cases(suite, options)]
    if not plan:
        raise UsageError("no case of these suites has such a model and method; --list shows what there is")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub
    # names that the oldest transformers still needs, and the newest warns of at each step
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    made_with = environment(device)
    done: dict[str, list[Outcome]] = {}
    failures: dict[str, list[dict[str, Any]]] = {}
    deadline = start + (options.time_limit or math.inf)
    limits: dict[str, Any] = {"limit_bytes": int(options.limit_gb * 1e9), "seconds": _STEP_SECONDS, "deadline": deadline}

    def path(name: str, ending: str = "json") -> Path:
        return Path(options.out, f"{device.type}-training-{name}.{ending}")

    def save(suite: TrainSuite) -> None:
        """Each suite has a file, which is written after every case."""
        outcomes, about = done.get(suite.name, []), {"suite": suite.name, "failed_cases": failures.get(suite.name, [])}
        value = document(outcomes, targets, **about, rounds=options.rounds, environment=made_with)
        write_json(path(suite.name), value)

    def run(case: TrainCase, suite: TrainSuite, progress: Progress) -> None:
        outcome: Outcome
        arms = chosen or suite.providers
        more: dict[str, Any] = {"progress": lambda text: progress(f"{case.model} {case.method}: {text}")}
        if suite.kind == "steps":
            outcome = run_steps(case, arms, device, rounds=options.rounds, **more)
        elif suite.kind == "curves":
            outcome = run_curves(case, arms, device, steps=options.steps, **more)
        else:
            outcome = run_limits(case, suite.kind, arms, device, **limits, **more)
        done.setdefault(suite.name, []).append(outcome)
        show(console, outcome)
        save(suite)

    def failed(case: TrainCase, suite: TrainSuite, error: Exception) -> None:
        failures.setdefault(suite.name, []).append({**asdict(case), "message": shorten(error)})
        console.print(f"{case.title}: {shorten(error)}", highlight=False)
        save(suite)

    works = command.run_cases(console, plan, run, failed, device, start, options.time_limit)
    paths = [path(suite.name) for suite in suites if suite.name in (*done, *failures)]
    if can_draw() and "steps" in done:
        paths.append(path("steps", "png"))
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, shrunk models"
        write_figure(paths[-1], [o.as_dict() for o in done["steps"]], where)
    command.conclude(console, [o for of_suite in done.values() for o in of_suite], targets, paths)
    return 0 if works and not failures else 1


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark of training steps; returns the exit status.

    It is 1 where a case as a whole could not run, and 2 for a wrong argument. An arm that fails becomes a row of the table.
    """
    return command.run_command(_parser(), _run, argv)
