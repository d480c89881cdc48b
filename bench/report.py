"""What is shown of the outcomes: tables, the project's targets, profiles; and the JSON."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import Case
from .console import Console
from .runner import OK, Outcome, Row
from .targets import ON_GPU, stated_for, targets

#: Raised when a field of the JSON changes its meaning; ``results/README.md`` describes the fields.
SCHEMA = 1


def milliseconds(seconds: float) -> str:
    """Four digits, without an exponent."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.4g}"


def spread(median: float | None, seconds: Sequence[float]) -> str:
    """Milliseconds: the median, and from least to most. A dash where there is no median."""
    if median is None:
        return "-"
    return f"{milliseconds(median)} ({milliseconds(min(seconds))}..{milliseconds(max(seconds))})"


def number(value: float | None, form: str = ".1e") -> str:
    return "-" if value is None else format(value, form)


def _notes(row: Row) -> str:
    return row.schedule if row.status == OK and not row.note else f"{row.status}: {row.message or row.note}"


def print_table(console: Console, outcome: Outcome) -> None:
    """One row a provider. A row that is not ``ok`` has no time and no ratio."""
    floor = outcome.case.floor
    what = "max err" if outcome.case.task == "gae" else "max logp err"
    columns = ["provider", "ms, median (min..max)", f"x {floor}", "extra MiB", what, "rel err dX", "rel err dW"]
    rows = []
    for row in outcome.rows:
        errors = row.errors
        rows.append(
            [
                row.provider,
                spread(row.median, row.seconds),
                number(outcome.ratio(row), ".2f"),
                "-" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.1f}",
                number(errors.token_logps if errors else None),
                number(errors.dhidden if errors else None),
                number(errors.dweight if errors else None),
                "roofline" if row.roofline and row.status == OK else _notes(row),
            ]
        )
    console.table(outcome.case.title, [*columns, "schedule / why not"], rows, [row.status != OK for row in outcome.rows])


#: Spread of the bare GEMMs' times from which on the machine counts as busy.
_BUSY = 1.5


def show(console: Console, outcome: Outcome) -> None:
    """Print the table of a case, and under it the targets where it has some."""
    print_table(console, outcome)
    gemm = next((row for row in outcome.rows if row.roofline and row.median is not None), None)
    if gemm is not None and max(gemm.seconds) > _BUSY * min(gemm.seconds):
        console.print(
            f"  {outcome.case.floor} took {spread(gemm.median, gemm.seconds)} ms: the machine is busy, do not trust the times",
            highlight=False,
        )
    found = targets(outcome)
    if outcome.case.task == "tile" and gemm is not None and gemm.median is not None:
        shape = outcome.case.shape
        moved = 2 * shape.scored * shape.vocab * shape.torch_dtype.itemsize
        console.print(f"  copy: {moved / gemm.median / 1e9:.1f} GB/s, read and written", highlight=False)
    for target in found:
        console.print(f"  {target}", highlight=False)
    show_profiles(console, outcome)
    case, shapes = outcome.case, stated_for(outcome.case)
    if found and case.task != "tile" and case.shape not in shapes:
        machine = "one H100" if case.suite in ON_GPU else "a 2-core CPU machine"
        console.print(f"  (the targets are stated for {shapes[0]}, on {machine})", highlight=False)
    console.print()


#: Kernels of a profile that are printed; the JSON has more.
_SHOWN = 5


def show_profiles(console: Console, outcome: Outcome) -> None:
    """The longest kernels of each provider that was profiled and, on a GPU, what the cost model expects of its parts."""
    for row in outcome.rows:
        if row.profile is None:
            continue
        total = sum(kernel.microseconds for kernel in row.profile)
        console.print(
            f"  profile of {row.provider}: {milliseconds(total / 1e6)} ms in its longest {len(row.profile)} kernels",
            highlight=False,
        )
        for kernel in row.profile[:_SHOWN]:
            console.print(
                f"    {milliseconds(kernel.microseconds / 1e6):>7} ms, {kernel.calls:4} x {kernel.name[:100]}", highlight=False
            )
        if row.predicted is not None:
            parts = sorted(row.predicted.items(), key=lambda part: -part[1])
            expected = ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in parts)
            console.print(f"    predicted {milliseconds(sum(row.predicted.values()))} ms: {expected}", highlight=False)


def document(
    outcomes: Sequence[Outcome], environment: Mapping[str, Any], *, quick: bool, rounds: int, left_out: Sequence[Case] = ()
) -> dict[str, Any]:
    """Everything of a run so far; ``results/README.md`` describes the fields."""
    return {
        "schema": SCHEMA,
        "command": sys.argv[1:],
        "quick": quick,
        "rounds": rounds,
        "environment": dict(environment),
        "cases": [{**o.as_dict(), "targets": [t.as_dict() for t in targets(o)]} for o in outcomes],
        "left_out": [case.title for case in left_out],
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The whole file or none of it: a run that is stopped while writing leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(_finite(dict(value)), indent=1, allow_nan=False) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: ``null`` instead (``failed`` says what it was)."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
