"""Runs a case: availability, memory, checks against float64, interleaved timing. A provider that fails becomes a row."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.profiler import ProfilerActivity, profile

from .cases import Case
from .console import milliseconds, number, spread
from .inputs import Inputs, make_inputs
from .memory import measure, peak_bytes
from .reference import Errors, Reference, check, compute_reference, token_error
from .registry import PROVIDERS, Result, Work
from .rows import FAILED, OK, WRONG, Outcome, Progress, Stages, TimedRow, frozen_heap, release_memory, shorten, timed

#: Kernels of a profile that are kept, those that are printed, and characters of a name: C++ templates have names of pages.
KEPT, _SHOWN, _NAME = 20, 5, 160
#: The machine counts as busy from this spread of the bare GEMMs' times on.
_BUSY = 1.5


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a step (on a CPU: all calls of an operator, without what it calls)."""

    name: str
    calls: int
    microseconds: float


def profile_step(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """The kernels of a step that take longest, longest first; the profiler's own cost is not included."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as run:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    found = []
    for event in run.key_averages():
        if on_gpu and (event.device_type.name != "CUDA" or getattr(event, "is_user_annotation", False)):
            continue  # CPU work, and annotations that contain other kernels
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append(Kernel(event.key[:_NAME], event.count, float(time)))
    return sorted(found, key=lambda kernel: -kernel.microseconds)[:KEPT]


@dataclass
class ProviderRow(TimedRow):
    """One provider on one case.

    Attributes:
        schedule: the schedule that logitless chose.
        flops: of the GEMMs of a step, where the provider reports them.
        note: why there is no memory or profile.
        errors: the larger ones of the first and the last step.
        predicted_seconds: of each part of the step, by logitless's cost model.
        profile: the kernels of one more step, where that was asked for.
    """

    schedule: str = ""
    flops: int | None = None
    note: str = ""
    errors: Errors | None = None
    roofline: bool = False
    predicted_seconds: dict[str, float] | None = None
    profile: list[Kernel] | None = None
    KEY: ClassVar[str] = "provider"

    def fail(self, status: str, message: str) -> None:
        super().fail(status, message)
        self.profile = None

    def profile_lines(self) -> Iterator[str]:
        """The longest kernels of the profile and, on a GPU, what the cost model predicts for the parts of a step."""
        if self.profile is None:
            return
        total = sum(kernel.microseconds for kernel in self.profile)
        yield f"profile of {self.name}: {milliseconds(total / 1e6)} ms in its longest {len(self.profile)} kernels"
        for kernel in self.profile[:_SHOWN]:
            yield f"  {milliseconds(kernel.microseconds / 1e6):>7} ms, {kernel.calls:4} x {kernel.name[:100]}"
        if self.predicted_seconds is not None:
            parts = sorted(self.predicted_seconds.items(), key=lambda part: -part[1])
            expected = ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in parts)
            yield f"  predicted {milliseconds(sum(self.predicted_seconds.values()))} ms: {expected}"


@dataclass
class CaseOutcome(Outcome[ProviderRow]):
    """A case and its rows."""

    def ratio(self, row: ProviderRow) -> float | None:
        """Time over that of the bare GEMMs."""
        roofline = next((r.median for r in self.rows if r.roofline), None)
        return row.median / roofline if row.median is not None and roofline else None

    def cells(self, row: ProviderRow) -> dict[str, str]:
        errors = [number(getattr(row.errors, name, None)) for name in ("token_logps", "dhidden", "dweight")]
        names = ("max err" if self.case.task == "gae" else "max logp err", "rel err dX", "rel err dW")
        return {
            "ms, median (min..max)": spread(row.median, row.seconds),
            f"x {self.case.floor}": number(self.ratio(row), ".2f"),
            "extra MiB": number(row.extra_bytes, ".1f", 2**20),
            **dict(zip(names, errors, strict=True)),
            "schedule": row.note or ("roofline" if row.roofline else row.schedule),
        }

    def notes(self) -> Iterator[str]:
        floor = next((row for row in self.rows if row.roofline and row.median is not None), None)
        if floor is not None and max(floor.seconds) > _BUSY * min(floor.seconds):
            times = spread(floor.median, floor.seconds)
            yield f"{self.case.floor} took {times} ms: the machine is busy, do not trust the times"
        if floor is not None and floor.median is not None and self.case.task == "tile":
            shape = self.case.shape
            moved = 2 * shape.scored * shape.vocab * shape.torch_dtype.itemsize
            yield f"copy: {moved / floor.median / 1e9:.1f} GB/s, read and written"
        for row in self.rows:
            yield from row.profile_lines()

    def derived(self) -> dict[str, Any]:
        return {"scored_tokens": self.case.shape.scored, "gemms": self.case.gemms}

    def derived_of(self, row: ProviderRow) -> dict[str, Any]:
        return {"ratio_to_gemm": self.ratio(row)}


#: Providers whose steps ``--profile`` looks into, by how their names start: ours, and the bare GEMMs.
_PROFILED = ("logitless", "gemm")
#: Assumed of a GPU of the H100's class: FLOP/s of GEMMs in bf16 and float64, and the average time of a provider's step over
#: the bare GEMMs (Liger takes 4 to 5 times as long, ours 1.1).
_GEMM_RATE, _DOUBLE_RATE, _STEP = 5e14, 3e13, 2.2
#: Assumed seconds for a case, for a provider in it (checks, memory), for its first case (imports, kernels to compile), and for
#: one that compiles for each case.
_CASE_SECONDS, _PROVIDER_SECONDS, _FIRST_SECONDS, _WARM_UP_SECONDS = 1.0, 0.3, 6.0, 8.0


def estimated_seconds(plan: Iterable[tuple[Case, Iterable[str]]], device: torch.device, rounds: int) -> float:
    """About how long :func:`run_case` takes on a GPU for all cases of a plan, from the FLOP of their GEMMs."""
    seconds = 0.0
    started: set[str] = set()
    for case, names in plan:
        gemm = 2.0 * case.shape.scored * case.shape.hidden * case.shape.vocab
        able = [name for name in names if not PROVIDERS[name].reasons(case, device)]
        steps = len(able) * (rounds + 3) * _STEP * max(1, case.gemms) * gemm / _GEMM_RATE
        reference = (1 + 3 * case.backward) * gemm / _DOUBLE_RATE
        seconds += _CASE_SECONDS + len(able) * _PROVIDER_SECONDS + steps + reference
        seconds += _WARM_UP_SECONDS * sum(PROVIDERS[name].warm_up for name in able)
        seconds += _FIRST_SECONDS * len(set(able) - started)
        started |= set(able)
    return seconds


def run_case(
    case: Case,
    names: Iterable[str],
    device: torch.device,
    *,
    rounds: int,
    memory: bool = True,
    profiled: bool = False,
    progress: Progress = lambda text: None,
) -> CaseOutcome:
    """Measure memory, check, and time every provider of a case; errors of providers become rows.

    Args:
        names: providers, in the order of the table.
        rounds: timed steps of each provider.
        memory: whether to measure peak memory, on a CPU in processes of their own.
        profiled: whether one more step of ours and of the bare GEMMs runs under torch's profiler, after all that is timed.
    """
    gc.collect()
    release_memory(device)  # of the case before: the memory processes share the device
    rows = [ProviderRow(name, roofline=PROVIDERS[name].roofline) for name in names]
    for row in rows:
        row.refuse(PROVIDERS[row.name].reasons(case, device))
    # On a CPU processes measure memory, before this one holds anything large. A GPU's allocator keeps accounts, so there a
    # step of this process is enough; a process for each provider would take most of the time.
    apart = memory and device.type == "cpu"
    able = [row for row in rows if row.status == OK]
    if apart:
        _measure_apart(case, [row for row in able if not row.roofline], device, progress)
    progress("float64 reference")
    inputs = make_inputs(case, device)
    stages = _CaseStages(able, device, progress, case, inputs, compute_reference(case, inputs), memory and not apart)
    with frozen_heap():
        stages.each("check", stages.first_step)
        stages.turns(rounds, stages.timed_step)
        for row in able:
            stages.guard(row, stages.check)
            if profiled and row.name.startswith(_PROFILED):
                stages.guard(row, stages.profile)
            stages.free(row)
    return CaseOutcome(case, rows)


def _measure_apart(case: Case, rows: list[ProviderRow], device: torch.device, progress: Progress) -> None:
    """Memory by processes of their own, two at a time."""
    progress("memory")
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda row: measure(PROVIDERS[row.name], case, device), rows)
        for row, found in zip(rows, results, strict=True):
            row.extra_bytes, row.note = found.extra_bytes, found.message
            if found.fatal:
                row.fail(FAILED, found.message)


def failed_case(case: Case, names: Iterable[str], error: Exception) -> CaseOutcome:
    """The outcome of a case whose inputs or reference could not be made: every row has failed."""
    message = f"the case itself: {shorten(error)}"
    return CaseOutcome(case, [ProviderRow(name, FAILED, message, roofline=PROVIDERS[name].roofline) for name in names])


@dataclass
class _CaseStages(Stages[ProviderRow]):
    """The providers of a case, its inputs and its reference. ``memory``: whether a step in this process measures it."""

    case: Case
    inputs: Inputs
    reference: Reference
    memory: bool
    work: dict[str, Work] = field(default_factory=dict)
    last: dict[str, Result] = field(default_factory=dict)

    def free(self, row: ProviderRow) -> None:
        self.work.pop(row.name, None)
        self.last.pop(row.name, None)

    def first_step(self, row: ProviderRow) -> None:
        """Build, warm up, check, and measure the memory of one more step."""
        work = self.work[row.name] = PROVIDERS[row.name].build(self.case, self.inputs)
        work.prepare()
        last = self.last[row.name] = work.step()
        row.schedule, row.flops, row.predicted_seconds = last.schedule, last.flops, last.predicted
        del last  # the check drops the result, which would count as memory
        self.check(row)
        if row.errors is not None and row.errors.token_logps is None and row.status == OK:
            row.errors.token_logps = token_error(self.case, self.inputs, work, self.reference)
        if self.memory and not row.roofline and row.status == OK:
            work.prepare()
            row.extra_bytes = peak_bytes(work.step, self.device)

    def check(self, row: ProviderRow) -> None:
        """Compare the last result with the reference."""
        last = self.last.pop(row.name, None)
        if row.roofline or last is None:
            return
        row.errors = check(self.case, self.inputs, last, self.reference, row.errors)
        row.refuse(row.errors.failed, WRONG)

    def timed_step(self, row: ProviderRow) -> None:
        self.last.pop(row.name, None)
        gc.collect()
        self.work[row.name].prepare()
        seconds, self.last[row.name] = timed(self.work[row.name].step, self.device)
        row.seconds.append(seconds)

    def profile(self, row: ProviderRow) -> None:
        """An error here does not affect the step's figures: it becomes a note."""
        try:
            self.work[row.name].prepare()
            row.profile = profile_step(self.work[row.name].step, self.device)
        except Exception as error:
            row.note = f"profile: {shorten(error)}"
