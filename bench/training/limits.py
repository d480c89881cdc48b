"""The largest batch and the longest sequence that fit in a GPU's memory, for each arm."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch

from ..core.console import number
from ..core.memory import peak_bytes
from ..core.rows import OK, Outcome, Progress, Row, Stages, release_memory
from .arms import ARMS, Arm
from .cases import TrainCase, case_batch
from .steps import step
from .workbench import Workbench

#: By what grows (pairs of a batch, tokens of the longest sequence): what sizes are multiples of, and the power of the size
#: with which a step's time grows at most.
_SIZES = {"pairs": {"granule": 1, "growth": 1}, "length": {"granule": 64, "growth": 2}}
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
class LimitRow(Row):
    """The largest size of an arm.

    Attributes:
        largest: the largest size that ran within the limit, ``None`` if none did.
        failing: the smallest size that did not fit, if any was tried.
        predicted: where the straight line through the peaks of the two largest sizes that ran reaches the limit.
        cut_short: whether more would have been tried with more time; ``message`` says why the search ended.
    """

    largest: int | None = None
    failing: int | None = None
    predicted: int | None = None
    cut_short: bool = False
    trials: list[Trial] = field(default_factory=list)


@dataclass
class LimitOutcome(Outcome[LimitRow]):
    """A case and its rows: what was made larger, and the limit in bytes."""

    of: str
    limit_bytes: int

    @property
    def title(self) -> str:
        return f"{self.case.title}; {self.of} within {self.limit_bytes / 1e9:.4g} GB"

    def cells(self, row: LimitRow) -> dict[str, str]:
        return {
            f"largest {self.of}": number(row.largest, ".0f"),
            "did not fit": number(row.failing, ".0f"),
            "predicted": number(row.predicted, ".0f"),
            "peak GiB": number(next((t.peak_bytes for t in row.trials if t.size == row.largest), None), ".2f", 2**30),
            "trials": str(len(row.trials)),
            "how it ended": row.message,
        }


def extrapolate(trials: Iterable[Trial], limit: int) -> int | None:
    """The size at which the line through the two largest trials reaches the limit, as memory is linear in the tokens."""
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
    """Fill in a row: double once, then try sizes slightly below the prediction.

    It ends when nothing is left between what fits and what does not, or when a step would take more than ``seconds``; its time
    grows with the power ``growth`` of the size.
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
        if low is None and size == granule:
            row.message = "not even the smallest size fits"
            return
        if low is None:
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
    progress: Progress = lambda text: None,
) -> LimitOutcome:
    """Find each arm's limit, starting from the size of the case.

    Args:
        of: ``pairs`` or ``length``. seconds: the longest step.
        limit_bytes: of torch's allocator on a GPU; on a CPU of a step's memory above that between steps.
        deadline: of ``time.monotonic()``, after which nothing further is tried.
    """
    rows = [LimitRow(name) for name in names]
    bench = Workbench(case, device)
    warm = bench.data(case_batch(case, bench.vocab, pairs=1, length=64), exact=False)
    start = getattr(case, of)

    def find(row: LimitRow) -> None:
        arm = ARMS[row.name]
        late = time.monotonic() > deadline
        row.refuse(["left out: the time limit was reached"] if late else arm.why_not(bench))
        if row.status != OK:
            return
        with arm.ready(bench):
            step(bench, arm, warm)  # optimizer states
        _attempt(bench, arm, of, start)  # compilation at the first size must not count as time of a step
        attempt = functools.partial(_attempt, bench, arm, of)
        search(row, attempt, limit_bytes, start=start, **_SIZES[of], seconds=seconds, deadline=deadline)

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
    try:
        Stages(rows, device, progress).each(of, find)
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    return LimitOutcome(case, rows, of, limit_bytes)


def _attempt(bench: Workbench, arm: Arm, of: str, size: int) -> Trial:
    """One step of a size, from gradients that are cleared."""
    bench.optimizer.zero_grad()
    peak, start = None, time.perf_counter()
    with contextlib.suppress(torch.OutOfMemoryError):
        data = bench.data(case_batch(replace(bench.case, **{of: size}), bench.vocab), exact=False)  # type: ignore[arg-type]
        with arm.ready(bench):
            start = time.perf_counter()
            peak = peak_bytes(lambda: step(bench, arm, data), bench.device)
            if bench.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated()
    seconds = time.perf_counter() - start
    release_memory(bench.device)
    return Trial(size, peak, seconds)
