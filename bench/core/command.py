"""What the two command lines share: options, checks of arguments, and running cases one after the other."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .console import Console, make_console
from .figures import can_draw
from .report import Targets, show_targets
from .rows import Outcome, Progress, context_is_lost, release_memory

_LOST = "the GPU's context is lost; the first row that failed above is the cause: run again without it (--providers, --arms)"


class UsageError(Exception):
    """A wrong argument; the message names what is accepted."""


def make_parser(prog: str, description: str, default_suites: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--suite", nargs="+", default=[], metavar="NAME", help=f"default: {' '.join(default_suites)}")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), metavar="DIR", help="for JSON and PNG (%(default)s)")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed steps of each row of a table")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda; default: %(default)s")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds after which no further case is started")
    parser.add_argument("--list", action="store_true", help="list what is available, and stop")
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


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Refuse options that are given and not more than 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be more than 0, got {value:g}")


def run_cases(
    console: Console,
    plan: Sequence[tuple[Any, Any]],
    run: Callable[[Any, Any, Progress], None],
    failed: Callable[[Any, Any, Exception], None],
    device: torch.device,
    start: float,
    time_limit: float | None,
) -> bool:
    """Run cases until ``time_limit`` seconds after ``start``, at least the first, and print which are left out.

    ``plan``: cases, each with what else ``run`` needs, which measures, prints and saves. ``failed`` receives an error of the
    case itself, which no row caused. Returns whether the GPU still works; a run ends where it does not.
    """
    done, works = 0, True
    with console.progress(len(plan)) as progress:
        for case, more in plan:
            if done and time_limit is not None and time.monotonic() > start + time_limit:
                break
            try:
                run(case, more, lambda text: progress(text, 0))
            except Exception as error:
                failed(case, more, error)
            done += 1
            progress("", 1)
            gc.collect()
            release_memory(device)
            works = not context_is_lost(device)
            if not works:
                console.print(_LOST, highlight=False)
                break
    for case, _ in plan[done:]:
        console.print(f"left out{f' after {time_limit:g} s' if works else ''}: {case.title}", highlight=False)
    return works


def conclude(console: Console, outcomes: Sequence[Outcome[Any]], targets: Targets, paths: Iterable[Path]) -> None:
    """The end of a run: one sentence per target, and the files."""
    show_targets(console, outcomes, targets)
    for path in paths:
        console.print(f"wrote {path}", highlight=False)
    if not can_draw():
        console.print("no figures: matplotlib is not installed", highlight=False)


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace, Console], int], argv: Sequence[str] | None
) -> int:
    """Parse, run, and turn a :class:`UsageError` into exit status 2."""
    try:
        return run(parser.parse_args(argv), make_console())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
