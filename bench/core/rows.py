"""Rows of a table, and the stages in which they run. A row that fails keeps the reason, and the others go on."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar

import torch

OK, WRONG, FAILED, UNAVAILABLE = "ok", "wrong", "failed", "unavailable"

#: Receives what happens next.
Progress = Callable[[str], None]


def shorten(error: BaseException, limit: int = 160) -> str:
    """The first line of an error with its kind, cut to ``limit`` characters."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def beyond(*errors: tuple[str, float, float]) -> list[str]:
    """Names, errors and tolerances: those beyond it (NaN included), in words."""
    return [f"{name} is off by {error:.2g}, allowed {limit:.2g}" for name, error, limit in errors if not error <= limit]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def release_memory(device: torch.device) -> None:
    """Return cached memory of a GPU to the driver, for the next row or case and for other processes."""
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # after an illegal access every call fails: see context_is_lost
            torch.cuda.empty_cache()


def context_is_lost(device: torch.device) -> bool:
    """Whether every call to the GPU fails in this process, as after a kernel that accessed memory out of bounds."""
    try:
        synchronize(device)
    except Exception:
        return True
    return False


@dataclass
class Row:
    """One line of a table.

    Attributes:
        status: ``ok``, ``wrong`` (the check failed), ``failed`` (it raised or ran out of memory) or ``unavailable``.
        message: why, unless ``ok``.
    """

    name: str
    status: str = OK
    message: str = ""
    #: Key of the name in the JSON.
    KEY: ClassVar[str] = "arm"

    def fail(self, status: str, message: str) -> None:
        self.status, self.message = status, message

    def refuse(self, reasons: Sequence[str], status: str = UNAVAILABLE) -> None:
        """Fail if there is a reason."""
        if reasons:
            self.fail(status, "; ".join(reasons))

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {self.KEY: values.pop("name"), **values}


@dataclass
class TimedRow(Row):
    """A row with times and memory.

    Attributes:
        seconds: one value per round. extra_bytes: peak memory of a step, ``None`` if it was not measured. Both are dropped
            unless the row is ``ok``.
    """

    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None

    @property
    def median(self) -> float | None:
        """Seconds per step; ``None`` unless ``ok``."""
        return statistics.median(self.seconds) if self.status == OK and self.seconds else None

    def fail(self, status: str, message: str) -> None:
        """No figure stands next to a result that is not right."""
        super().fail(status, message)
        self.seconds, self.extra_bytes = [], None

    def as_dict(self) -> dict[str, Any]:
        ends = {"min_seconds": min(self.seconds, default=None), "max_seconds": max(self.seconds, default=None)}
        return {**super().as_dict(), "median_seconds": self.median, **ends}


R = TypeVar("R", bound=Row)


@dataclass
class Outcome(Generic[R]):
    """A case and its rows. Further fields of subclasses go to the JSON as they are."""

    case: Any
    rows: list[R]

    def row(self, name: str) -> R | None:
        return next((r for r in self.rows if r.name == name), None)

    def time(self, name: str) -> float | None:
        """The median of a row, if it has one."""
        return getattr(self.row(name), "median", None)

    @property
    def title(self) -> str:
        """Of the table."""
        return str(self.case.title)

    def cells(self, row: R) -> dict[str, str]:
        """By column, what the table shows of a row after its name."""
        raise NotImplementedError

    def notes(self) -> Iterable[str]:
        """Lines below the table."""
        return ()

    def derived(self) -> dict[str, Any]:
        """Further keys of the case in the JSON."""
        return {}

    def derived_of(self, row: R) -> dict[str, Any]:
        """Further keys of a row in the JSON."""
        return {}

    def as_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("case", "rows")}
        rows = [{**row.as_dict(), **self.derived_of(row)} for row in self.rows]
        return {**asdict(self.case), **own, **self.derived(), "rows": rows}


@dataclass
class Stages(Generic[R]):
    """Runs the rows of an outcome in stages. A row that raises or is wrong takes no further part."""

    rows: list[R]
    device: torch.device
    progress: Progress

    def free(self, row: R) -> None:
        """Free what a row that has failed holds."""

    def guard(self, row: R, action: Callable[[R], object]) -> None:
        """Run an action unless the row has failed already; an exception becomes the row's message."""
        if row.status != OK:
            return
        try:
            action(row)
        except Exception as error:
            row.fail(FAILED, shorten(error))
        if row.status != OK:
            self.free(row)
            release_memory(self.device)

    def each(self, what: str, action: Callable[[R], object]) -> None:
        """One stage."""
        for row in self.rows:
            self.progress(f"{what} of {row.name}")
            self.guard(row, action)

    def turns(self, rounds: int, action: Callable[[R], object]) -> None:
        """Rounds, in which a slow period of the machine affects all rows; each starts with another, to even out neighbours."""
        for i in range(rounds):
            shift = i % max(1, len(self.rows))
            for row in (*self.rows[shift:], *self.rows[:shift]):
                self.progress(f"round {i + 1} of {rounds}")
                self.guard(row, action)


def timed(step: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds and result of a step."""
    synchronize(device)
    start = time.perf_counter()
    result = step()
    synchronize(device)
    return time.perf_counter() - start, result


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Collections skip what exists by now: the one before each timed step would otherwise take as long as the step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
