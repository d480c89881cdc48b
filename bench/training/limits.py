"""The largest batch and the longest sequence that fit in a GPU's memory, for each arm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..memory import measure_work
from ..registry import Result, Work
from ..runner import FAILED, OK, UNAVAILABLE, shorten
from .arms import ARMS, Arm
from .cases import TrainCase
from .steps import case_batch, step
from .workbench import Workbench

#: What a size is of (pairs of a batch, or tokens of the longest sequence), what sizes are multiples of, and the power of the
#: size with which a step's time grows at most.
GRANULES = {"pairs": 1, "length": 64}
_GROWTH = {"pairs": 1, "length": 2}
#: Share of a prediction that is tried: above it the next trial would often fail.
_CAUTION = 0.97
_TRIALS = 7


@dataclass
class Trial:
    """One size that was run: bytes at the peak, ``None`` where it ran out of memory, and seconds of the step."""

    size: int
    peak_bytes: int | None
    seconds: float


@dataclass
class LimitRow:
    """What an arm can hold.

    Attributes:
        largest: the largest size that ran within the limit, ``None`` if none did.
        failing: the smallest size that did not fit, if any was tried.
        predicted: where the straight line through the peaks of the two largest sizes that ran reaches the limit.
        cut_short: whether more would have been tried with more time. message: why the search ended, or why there is nothing.
    """

    arm: str
    status: str = OK
    message: str = ""
    largest: int | None = None
    failing: int | None = None
    predicted: int | None = None
    cut_short: bool = False
    trials: list[Trial] = field(default_factory=list)


@dataclass
class LimitOutcome:
    """A case, what was made larger, the limit in bytes, and the rows."""

    case: TrainCase
    of: str
    limit_bytes: int
    rows: list[LimitRow]

    def row(self, arm: str) -> LimitRow | None:
        return next((r for r in self.rows if r.arm == arm), None)

    def as_dict(self) -> dict[str, Any]:
        return {**self.case.as_dict(), "of": self.of, "limit_bytes": self.limit_bytes, "rows": [asdict(r) for r in self.rows]}


def extrapolate(trials: Iterable[Trial], limit: int) -> int | None:
    """Memory grows in proportion to tokens: the size at which the line through the two largest trials reaches the limit."""
    fitting = sorted((t for t in trials if t.peak_bytes is not None), key=lambda t: t.size)
    if len(fitting) < 2:
        return None
    a, b = fitting[-2:]
    assert a.peak_bytes is not None and b.peak_bytes is not None
    slope = (b.peak_bytes - a.peak_bytes) / (b.size - a.size)
    return b.size + int((limit - b.peak_bytes) / slope) if slope > 0 else None


def estimate(trials: Iterable[Trial], size: int, growth: int) -> float:
    """Seconds of a step of a size, from the two largest that ran: for a growth of 2, ``a * size + b * size**2``."""
    ran = sorted((t for t in trials if t.peak_bytes is not None), key=lambda t: t.size)
    last = ran[-1]
    steepest = last.seconds * (size / last.size) ** growth
    if growth != 2 or len(ran) < 2:
        return steepest
    before = ran[-2]
    b = (last.seconds / last.size - before.seconds / before.size) / (last.size - before.size)
    a = last.seconds / last.size - b * last.size
    if b <= 0:
        return last.seconds * size / last.size
    return steepest if a < 0 else a * size + b * size**2


def search(
    row: LimitRow,
    attempt: Callable[[int], Trial],
    limit: int,
    *,
    start: int,
    granule: int,
    seconds: float,
    growth: int = 1,
    deadline: float = math.inf,
) -> None:
    """Fill in a row: double once, then go where the line says, from below, until nothing is left between what fits and what
    does not, or a step would take more than ``seconds``, growing with that power of the size.
    """
    size = max(granule, start // granule * granule)
    while True:
        trial = attempt(size)
        row.trials.append(trial)
        fits = trial.peak_bytes is not None and trial.peak_bytes <= limit
        if fits:
            row.largest = max(size, row.largest or 0)
        else:
            row.failing = min(size, row.failing or size)
        row.predicted = extrapolate([t for t in row.trials if t.peak_bytes is not None and t.peak_bytes <= limit], limit)
        low, high = row.largest, row.failing
        if low is None:
            if size == granule:
                row.message = "not even the smallest size fits"
                return
            size = max(granule, size // 2 // granule * granule)
            continue
        if high is not None and high - low <= granule:
            row.message = "found"
            return
        if len(row.trials) >= _TRIALS or time.monotonic() > deadline:
            row.cut_short, row.message = True, f"ended after {len(row.trials)} trials"
            return
        following = 2 * low if row.predicted is None else int(_CAUTION * row.predicted)
        if high is not None and not low < following < high:
            following = (low + high) // 2
        size = max(low + granule, following // granule * granule)
        if high is not None:
            size = min(size, high - granule)
        if high is None and row.predicted is not None and size <= low + max(granule, low // 50):
            row.message = "within 3 % of the prediction"
            return
        wanted = size
        while estimate(row.trials, size, growth) > seconds and size > low:
            size -= granule
        if size <= low:
            row.cut_short = True
            row.message = f"a step of {wanted} might take more than {seconds:g} s: the limit is a prediction"
            return


def run_limits(
    case: TrainCase,
    of: str,
    names: Iterable[str],
    device: torch.device,
    *,
    limit_bytes: int,
    seconds: float,
    deadline: float,
    progress: Callable[[str, int], None] = lambda text, steps: None,
) -> LimitOutcome:
    """Find each arm's limit, starting from the size of the case.

    Args:
        of: ``pairs`` or ``length``.
        limit_bytes: of torch's allocator on a GPU, which then refuses to hold more; on a CPU of what a step takes beside what
            is held between steps.
        seconds: that a step may take.
        deadline: of ``time.monotonic()``, after which nothing further is tried.
    """
    rows = [LimitRow(name) for name in names]
    outcome = LimitOutcome(case, of, limit_bytes, rows)
    bench = Workbench(case, device)
    warm = bench.data(case_batch(case, bench.vocab, pairs=1, length=64), exact=False)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
    try:
        for row in rows:
            progress(f"{of} of {row.arm}", 1)
            arm = ARMS[row.arm]
            if time.monotonic() > deadline:
                row.status, row.message = UNAVAILABLE, "left out: the time limit was reached"
                continue
            try:
                if reasons := arm.why_not(bench):
                    row.status, row.message = UNAVAILABLE, "; ".join(reasons)
                    continue
                with arm.ready(bench):
                    step(bench, arm, warm)  # optimizer states
                _attempt(bench, arm, of, getattr(case, of))  # what compiles at the first size, which is not its time
                search(
                    row,
                    lambda size, arm=arm: _attempt(bench, arm, of, size),  # type: ignore[misc]
                    limit_bytes,
                    start=getattr(case, of),
                    granule=GRANULES[of],
                    seconds=seconds,
                    growth=_GROWTH[of],
                    deadline=deadline,
                )
            except Exception as error:
                row.status, row.message = FAILED, shorten(error)
                bench.optimizer.zero_grad()
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    return outcome


def _attempt(bench: Workbench, arm: Arm, of: str, size: int) -> Trial:
    case = replace(bench.case, **{of: size})  # type: ignore[arg-type]
    on_gpu = bench.device.type == "cuda"
    start = time.perf_counter()
    try:
        data = bench.data(case_batch(case, bench.vocab), exact=False)
        with arm.ready(bench):
            start = time.perf_counter()
            peak = measure_work(Work(lambda: Result(loss=step(bench, arm, data))), bench.device)
            if on_gpu:
                peak = torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        peak = None
    if peak is None:
        bench.optimizer.zero_grad()
    seconds = time.perf_counter() - start
    if on_gpu:
        torch.cuda.empty_cache()
    return Trial(size, peak, seconds)
