"""What is printed and written of outcomes: tables, rows without figures, and targets; and the JSON."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .console import Console
from .rows import FAILED, OK, UNAVAILABLE, Outcome, R

#: Raised when a field of the JSON changes its meaning; ``results/README.md`` describes the fields.
SCHEMA = 1

_NO_MEMORY = re.compile(r"out ?of ?memory|MemoryError|can't allocate memory|not enough memory", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """A target and what was measured.

    Attributes:
        what: in words. value: measured, ``None`` where a row that it needs is missing or not right.
        bound: the target. at_least: whether the value must reach the bound or stay below it.
        stated: whether the target is stated for the case's shape. stated_for: the shape and machine that it is stated for.
    """

    what: str
    value: float | None
    bound: float
    at_least: bool
    stated: bool = True
    stated_for: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value is within the bound, whatever the shape; ``None`` if there is no value."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        bound = f"at {'least' if self.at_least else 'most'} {self.bound:g}"
        if self.value is None:
            return f"not measured: {self.what} (target: {bound})"
        verdict = ("met" if self.met else "missed") if self.stated else "not stated for this shape"
        return f"{verdict}: {self.what} is {self.value:.2f} (target: {bound})"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def quotient(above: float | None, below: float | None) -> float | None:
    """``above / below``, ``None`` unless both are finite numbers and ``below`` is not 0."""
    if above is None or not below or not math.isfinite(above) or not math.isfinite(below):
        return None
    return above / below


Targets = Callable[[Any], list[Target]]


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


def print_table(console: Console, title: str, rows: Sequence[dict[str, str]]) -> None:
    """Cells by column; the title alone if there are no rows."""
    if rows:
        console.table(title, list(rows[0]), [list(row.values()) for row in rows], [False] * len(rows))
    else:
        console.print(title, highlight=False)


def show(console: Console, outcome: Outcome[Any]) -> None:
    """Print the rows that have figures as a table, and below it lines for those that have none, and the notes."""
    able = [row for row in outcome.rows if row.status == OK]
    print_table(console, outcome.title, [{row.KEY: row.name, **outcome.cells(row)} for row in able])
    for line in (*without_figures(outcome.rows), *outcome.notes()):
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
