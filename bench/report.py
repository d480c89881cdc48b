"""The table of a case: one row per provider, with notes on the machine, the copy and the profiles."""

from __future__ import annotations

from collections.abc import Iterator

from .core.console import Console
from .core.report import milliseconds, number, show_table, spread
from .core.runner import CaseOutcome, ProviderRow

#: The machine counts as busy from this spread of the bare GEMMs' times on.
_BUSY = 1.5
#: Kernels of a profile that are printed; the JSON has more.
_SHOWN = 5


def show(console: Console, outcome: CaseOutcome) -> None:
    """Print the table of a case."""
    floor, what = outcome.case.floor, "max err" if outcome.case.task == "gae" else "max logp err"
    columns = ["provider", "ms, median (min..max)", f"x {floor}", "extra MiB", what, "rel err dX", "rel err dW", "schedule"]

    def cells(row: ProviderRow) -> list[str]:
        return [
            spread(row.median, row.seconds),
            number(outcome.ratio(row), ".2f"),
            number(row.extra_bytes, ".1f", 2**20),
            *(number(getattr(row.errors, name, None)) for name in ("token_logps", "dhidden", "dweight")),
            row.note or ("roofline" if row.roofline else row.schedule),
        ]

    show_table(console, outcome.case.title, columns, outcome.rows, cells, _notes(outcome))


def _notes(outcome: CaseOutcome) -> Iterator[str]:
    floor = next((row for row in outcome.rows if row.roofline and row.median is not None), None)
    if floor is not None and floor.median is not None:
        if max(floor.seconds) > _BUSY * min(floor.seconds):
            times = spread(floor.median, floor.seconds)
            yield f"{outcome.case.floor} took {times} ms: the machine is busy, do not trust the times"
        if outcome.case.task == "tile":
            shape = outcome.case.shape
            moved = 2 * shape.scored * shape.vocab * shape.torch_dtype.itemsize
            yield f"copy: {moved / floor.median / 1e9:.1f} GB/s, read and written"
    for row in outcome.rows:
        yield from _profile(row)


def _profile(row: ProviderRow) -> Iterator[str]:
    """The longest kernels of a step that was profiled and, on a GPU, what the cost model predicts for its parts."""
    if row.profile is None:
        return
    total = sum(kernel.microseconds for kernel in row.profile)
    yield f"profile of {row.name}: {milliseconds(total / 1e6)} ms in its longest {len(row.profile)} kernels"
    for kernel in row.profile[:_SHOWN]:
        yield f"  {milliseconds(kernel.microseconds / 1e6):>7} ms, {kernel.calls:4} x {kernel.name[:100]}"
    if row.predicted_seconds is not None:
        parts = sorted(row.predicted_seconds.items(), key=lambda part: -part[1])
        expected = ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in parts)
        yield f"  predicted {milliseconds(sum(row.predicted_seconds.values()))} ms: {expected}"
