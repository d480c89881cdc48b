"""What is printed and written of outcomes: tables, rows without figures, targets; and the JSON."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .console import Console
from .rows import FAILED, OK, UNAVAILABLE, Outcome, R
from .targets import Target

#: Raised when a field of the JSON changes its meaning; ``results/README.md`` describes the fields.
SCHEMA = 1

Targets = Callable[[Any], list[Target]]
_NO_MEMORY = re.compile(r"out ?of ?memory|MemoryError|can't allocate memory|not enough memory", re.IGNORECASE)


def milliseconds(seconds: float) -> str:
    """Four digits, without an exponent."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.4g}"


def spread(median: float | None, seconds: Sequence[float]) -> str:
    """Milliseconds: the median, and from least to most. A dash where there is no median."""
    if median is None:
        return "-"
    return f"{milliseconds(median)} ({milliseconds(min(seconds))}..{milliseconds(max(seconds))})"


def number(value: float | None, form: str = ".1e", unit: float = 1.0) -> str:
    """The value in units, or a dash."""
    return "-" if value is None else format(value / unit, form)


def without_figures(rows: Iterable[R]) -> list[str]:
    """One line for all rows that could not take part, one for those that failed otherwise, one for those that are wrong."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        kind, reason = row.status, row.message
        if row.status == FAILED and _NO_MEMORY.search(row.message):
            kind, reason = UNAVAILABLE, "out of memory"
        elif row.status == UNAVAILABLE:
            reason = row.message.split("; ")[0]
        if kind != OK:
            found.setdefault(kind, {}).setdefault(reason, []).append(row.name)
    return [
        f"{kind}: " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        for kind, reasons in found.items()
    ]


def show_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[R],
    cells: Callable[[R], Sequence[str]],
    notes: Iterable[str] = (),
) -> None:
    """Print the rows that have figures as a table, and below it a line for those that have none, and the notes.

    ``cells``: the cells of a row between its name and the rest of its line.
    """
    able = [row for row in rows if row.status == OK]
    if able:
        console.table(title, columns, [[row.name, *cells(row)] for row in able], [False] * len(able))
    else:
        console.print(title, highlight=False)
    for line in (*without_figures(rows), *notes):
        console.print(f"  {line}", highlight=False)
    console.print()


def show_targets(console: Console, outcomes: Sequence[Outcome[Any]], targets: Targets) -> None:
    """One sentence per target of all cases that have some."""
    found = [(outcome.case.title, targets(outcome)) for outcome in outcomes]
    for title, of_case in found:
        if of_case:
            console.print(f"targets of {title}", highlight=False)
        for target in of_case:
            console.print(f"  {target}", highlight=False)
    for text in dict.fromkeys(t.stated_for for _, of_case in found for t in of_case if not t.stated):
        console.print(f"  (targets are stated for {text})", highlight=False)


def document(outcomes: Sequence[Outcome[Any]], targets: Targets, **more: Any) -> dict[str, Any]:
    """Everything of a run so far; ``results/README.md`` describes the fields."""
    cases = [{**o.as_dict(), "targets": [t.as_dict() for t in targets(o)]} for o in outcomes]
    return {"schema": SCHEMA, "command": sys.argv[1:], **more, "cases": cases}


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    """The whole file or none of it: a run that is stopped while writing leaves the file as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(_finite(dict(value)), indent=1, allow_nan=False) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: ``null`` instead (``failed`` has the number in words)."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
