"""The command line: ``logitless env``, ``logitless tune`` and ``logitless bench``."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from logitless.bench.core.console import Console
    from logitless.kernels.backends.triton.tuning.export import Result

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class TuneShape(NamedTuple):
    """What ``--shape`` says; ``softcap``: 1 for a head that has one."""

    tokens: int
    hidden: int
    vocab: int
    softcap: int = 0


def _tune_shape(text: str) -> TuneShape:
    values: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in TuneShape._fields or key in values:
            raise argparse.ArgumentTypeError(f"{text!r} must have each of {', '.join(TuneShape._fields)} once, got {key!r}")
        accepted = value in ("0", "1") if key == "softcap" else value.isdecimal() and int(value) > 0
        if not accepted:
            must = "0 or 1" if key == "softcap" else "a positive integer"
            raise argparse.ArgumentTypeError(f"{key} must be {must}, got {value!r}")
        values[key] = int(value)
    if missing := [f for f in TuneShape._fields if f not in values and f not in TuneShape._field_defaults]:
        raise argparse.ArgumentTypeError(f"{text!r} has no {', '.join(missing)}")
    return TuneShape(**values)


def _environment(device: torch.device) -> str:
    """What was measured with, for the exported table."""
    import torch
    import triton

    from logitless.bench.core.environment import driver_version
    from logitless.kernels.backends.triton.tuning.problem import device_name

    driver = f"driver {driver_version() or 'unknown'}" if device.type == "cuda" else "no driver"
    versions = f"Triton {triton.__version__}, torch {torch.__version__}"
    return f"{device_name(device)}, {driver}, {versions}, {date.today()}"


_COLUMNS = (
    "N x V x H", "group", "warps", "stages", "tma", "flatten", "per SM", "logits", "x mm", "and gradient", "x mm",
)  # fmt: skip


def _show(console: Console, result: Result) -> None:
    """The candidates of a shape, as a table."""
    p, rows = result.problem, []
    for timing in result.timings:
        c = timing.config
        rows.append(
            [
                f"{c.BLOCK_N} x {c.BLOCK_V} x {c.BLOCK_H}",
                *map(str, (c.GROUP, c.num_warps, c.num_stages)),
                *("yes" if flag else "no" for flag in (c.tma, c.flatten)),
                str(c.programs_per_sm),
                *(text for ms in (timing.forward, timing.gradient) for text in (f"{ms:.3f}", f"{ms / result.mm:.3f}")),
            ]
        )
    head = f"{p.num_tokens} tokens, H={p.hidden_size}, V={p.vocab_size}{', soft-cap' if p.softcap else ''}, {p.dtype}"
    title = f"{head}; torch.mm takes {result.mm:.3f} ms, {len(rows)} candidates, the first is taken"
    console.table(title, _COLUMNS, rows, [i > 0 for i in range(len(rows))])
    console.print("milliseconds; x mm: over torch.mm of the shape, which makes the logits and writes them", highlight=False)


def _tune(options: argparse.Namespace) -> int:
    """Measure configurations of the Triton kernels, cache them, and export them; returns the exit status."""
    import torch

    from logitless.bench.core.console import make_console
    from logitless.kernels.backends.interface import Call
    from logitless.kernels.backends.registry import get_backend

    start, console = time.monotonic(), make_console()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype: torch.dtype = getattr(torch, DTYPES[options.dtype])
    backend = get_backend("triton")
    if reasons := backend.why_unavailable() or backend.why_not(Call(device, dtype, dtype)):
        print(f"logitless tune cannot run: {'; '.join(reasons)}", file=sys.stderr)
        return 1
    from logitless.kernels.backends.triton.tuning.export import export, tune
    from logitless.kernels.backends.triton.tuning.problem import Problem, bucket
    from logitless.kernels.backends.triton.tuning.search import compilers

    shapes = list(dict.fromkeys((bucket(s.tokens), s.hidden, s.vocab, bool(s.softcap)) for s in options.shape))
    deadline = None if options.time_limit is None else start + options.time_limit
    environment, notes = _environment(device), []
    results: list[Result] = []
    # the interpreter compiles nothing
    jobs = max(1, min(_MOST_COMPILERS, (os.cpu_count() or 1) - 1))
    with contextlib.nullcontext() if device.type == "cpu" else compilers(jobs) as prepare:
        for shape in shapes:
            what = f"{shape[0]} tokens, H={shape[1]}, V={shape[2]}{', soft-cap' if shape[3] else ''}"
            if results and deadline is not None and time.monotonic() > deadline:
                notes.append(f"left out after {options.time_limit:g} s: {what}")
                continue
            results.append(tune(Problem(device, dtype, *shape), deadline, prepare))
            if deadline is not None and time.monotonic() > deadline:
                notes.append(f"cut short after {options.time_limit:g} s, at {len(results[-1].timings)} candidates: {what}")
            _show(console, results[-1])
            if options.timings is not None:  # after each shape: a run that is stopped leaves what it has measured
                _write(
                    options.timings,
                    json.dumps({"environment": environment, "results": [r.as_dict() for r in results]}, indent=1),
                )
    for note in notes:
        console.print(note, highlight=False)
    if options.timings is not None:
        console.print(f"wrote {options.timings}", highlight=False)
    if options.export is not None:
        _write(options.export, export(results, environment))
        print(f"wrote {options.export}, which can replace kernels/backends/triton/tuning/configs.json")
    return 0


#: Processes that compile for `logitless tune`; each has a context on the GPU.
_MOST_COMPILERS = 8


def _write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text if text.endswith("\n") else text + "\n")
    draft.replace(path)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds > 0, got {text!r}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # it has options of its own, and needs packages that the rest does not
        try:
            from logitless.bench.cli import main as bench
        except ModuleNotFoundError as error:
            print(f"logitless bench needs {error.name}: pip install 'logitless[bench]'", file=sys.stderr)
            return 1
        return bench(arguments[1:])
    parser = argparse.ArgumentParser(prog="logitless", description="Language-model-head kernels without logits.")
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser("env", help="report versions, devices and backends")
    env.add_argument("--json", action="store_true", help="as JSON")
    commands.add_parser("bench", help="compare with plain PyTorch, TRL and Liger (see logitless bench --help)")
    tune = commands.add_parser("tune", help="measure configurations of the Triton kernels for shapes, and cache them")
    tune.add_argument(
        "--shape",
        type=_tune_shape,
        action="append",
        required=True,
        metavar="tokens=N,hidden=H,vocab=V[,softcap=1]",
        help="may be given several times; tokens count as the next power of 2",
    )
    tune.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s; bf16 and fp16 share a table")
    tune.add_argument("--export", type=Path, metavar="FILE", help="write the library's table with the best in it")
    tune.add_argument("--timings", type=Path, metavar="FILE", help="write milliseconds of all candidates, as JSON")
    tune.add_argument(
        "--time-limit",
        type=_seconds,
        metavar="S",
        help="seconds after which no further shape and no further candidate is tried",
    )
    options = parser.parse_args(arguments)
    if options.command == "tune":
        return _tune(options)
    from logitless.env import render, report

    sections = report()
    print(json.dumps(sections, indent=2) if options.json else render(sections))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
