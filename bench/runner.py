"""Runs a case: availability, memory, checks against float64, interleaved timing. A provider that fails becomes a row."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from .cases import Case, Inputs, make_inputs
from .memory import Memory, measure, measure_work
from .policy_losses import POLICY_LOSSES
from .profiling import Kernel, profile_step
from .reference import Errors, Reference, check, compute_reference, token_error
from .registry import PROVIDERS, Provider, Result, Work
from .suites import SUITES

OK, WRONG, FAILED, UNAVAILABLE = "ok", "wrong", "failed", "unavailable"


def shorten(error: BaseException, limit: int = 160) -> str:
    """The first line of an error with its kind, cut to ``limit`` characters."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass
class Row:
    """One provider on one case.

    Attributes:
        status: ``ok``, ``wrong`` (the check failed), ``failed`` (it raised or ran out of memory) or ``unavailable``.
        message: why, unless ``ok``.
        seconds: one value a round; dropped unless ``ok``, as is ``extra_bytes``.
        errors: the larger ones of the first and the last step.
        flops: of the GEMMs of a step, where the provider says.
        extra_bytes: peak memory above the inputs, ``None`` if it was not measured.
        note: why it was not.
        predicted: seconds of each part of the step, by logitless's cost model.
        profile: the kernels of one more step, where that was asked for.
    """

    provider: str
    status: str = OK
    message: str = ""
    schedule: str = ""
    seconds: list[float] = field(default_factory=list)
    errors: Errors | None = None
    flops: int | None = None
    extra_bytes: int | None = None
    note: str = ""
    roofline: bool = False
    predicted: dict[str, float] | None = None
    profile: list[Kernel] | None = None

    @property
    def median(self) -> float | None:
        """Seconds a step; ``None`` for a row that earned no figure."""
        return statistics.median(self.seconds) if self.status == OK and self.seconds else None

    def fail(self, status: str, message: str) -> None:
        """Turn into a row that says so. Its figures go: none stands next to a result that is not right."""
        self.status, self.message, self.seconds, self.extra_bytes, self.profile = status, message, [], None, None

    def as_dict(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "status": self.status,
            "message": self.message,
            "schedule": self.schedule,
            "seconds": self.seconds,
            "median_seconds": self.median,
            "min_seconds": min(self.seconds, default=None),
            "max_seconds": max(self.seconds, default=None),
            "flops": self.flops,
            "extra_bytes": self.extra_bytes,
            "note": self.note,
            "errors": None if self.errors is None else self.errors.as_dict(),
            "roofline": self.roofline,
            "predicted_seconds": self.predicted,
            "profile": None if self.profile is None else [kernel.as_dict() for kernel in self.profile],
        }


@dataclass
class Outcome:
    """A case and its rows."""

    case: Case
    rows: list[Row]

    def ratio(self, row: Row) -> float | None:
        """Time over that of the bare GEMMs."""
        roofline = next((r.median for r in self.rows if r.roofline), None)
        return row.median / roofline if row.median is not None and roofline else None

    def row(self, provider: str) -> Row | None:
        return next((r for r in self.rows if r.provider == provider), None)

    def as_dict(self) -> dict[str, Any]:
        rows = [{**row.as_dict(), "ratio_to_gemm": self.ratio(row)} for row in self.rows]
        return {**self.case.as_dict(), "scored_tokens": self.case.shape.scored, "gemms": self.case.gemms, "rows": rows}


#: Tasks of suites whose providers never meet those of the others in one table.
_APART: dict[str, frozenset[str]] = {
    "policy": frozenset(POLICY_LOSSES),
    "policy-gpu": frozenset(POLICY_LOSSES),
    "gae": frozenset({"gae"}),
}
#: Providers whose steps ``--profile`` looks into, by how their names start: ours, and the bare GEMMs.
_PROFILED = ("logitless", "gemm")


def _belongs(provider: Provider, suite: str) -> bool:
    if suite in _APART:
        return bool(provider.tasks & _APART[suite])
    return bool(provider.tasks - frozenset().union(*_APART.values()))


def default_providers(suite: str, quick: bool) -> list[str]:
    """The providers of a suite, in the order of the registry."""
    chosen = (quick and SUITES[suite].quick_providers) or SUITES[suite].providers
    return [
        name
        for name, provider in PROVIDERS.items()
        if (name in chosen if chosen else provider.quick or not quick) and _belongs(provider, suite)
    ]


@dataclass
class _Entry:
    provider: Provider
    row: Row
    work: Work | None = None
    last: Result | None = None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


#: What an estimate assumes of a GPU of the H100's class: FLOP/s of GEMMs in bf16 and float64, and a provider's step over the
#: bare GEMMs, on average (Liger takes 4 to 5 times as long, we 1.1). Assumed.
_GEMM_RATE, _DOUBLE_RATE, _STEP = 5e14, 3e13, 2.2
#: Seconds for a case, for a provider in it (checks, memory), for its first case (imports, kernels to compile), and for one
#: that compiles for each case. Assumed.
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


def planned_steps(case: Case, names: Iterable[str], device: torch.device, rounds: int) -> int:
    """How often :func:`run_case` will report progress."""
    return 1 + len([n for n in names if not PROVIDERS[n].reasons(case, device)]) * (rounds + 2)


def run_case(
    case: Case,
    names: Iterable[str],
    device: torch.device,
    *,
    rounds: int,
    memory: bool = True,
    profile: bool = False,
    progress: Callable[[str, int], None] = lambda text, steps: None,
) -> Outcome:
    """Measure memory, check, and time every provider of a case; errors of providers become rows.

    Args:
        case: what to run.
        names: providers, in the order of the table.
        device: where.
        rounds: timed steps of each provider. They take turns, so that a slow spell of the machine falls on all of them.
        memory: whether to measure peak memory, on a CPU in processes of their own.
        profile: whether one more step of ours and of the bare GEMMs runs under torch's profiler, after all that is timed.
        progress: told what happens next and how many planned steps are done with it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the case before, which the memory processes would have to share the device with
    entries, rows = [], []
    for name in names:
        provider = PROVIDERS[name]
        row = Row(name, roofline=provider.roofline)
        rows.append(row)
        reasons = provider.reasons(case, device)
        if reasons:
            row.fail(UNAVAILABLE, "; ".join(reasons))
        else:
            entries.append(_Entry(provider, row))
    # Before anything large is held here, and to learn who would not fit. A GPU's allocator keeps accounts, so there a step
    # of this process tells; a process for each provider would take most of the time.
    apart = memory and device.type == "cpu"
    with ThreadPoolExecutor(2) as pool:
        measured = [
            pool.submit(measure, entry.provider, case, device) if apart and not entry.provider.roofline else None
            for entry in entries
        ]
        for entry, result in zip(entries, measured, strict=True):
            progress(f"{case.task}: memory of {entry.row.provider}", 1)
            if result is not None:
                _apply_memory(entry.row, result.result())
    progress(f"{case.task}: float64 reference", 1)
    inputs = make_inputs(case, device)
    reference = compute_reference(case, inputs)
    gc.collect()
    gc.freeze()  # what is imported by now: the collection before each step need not look at it
    for entry in entries:
        progress(f"{case.task}: check of {entry.row.provider}", 1)
        if entry.row.status == OK:
            _guard(entry, lambda e: _first_step(e, case, inputs, reference, memory and not apart))
    for i in range(rounds):
        shift = i % max(1, len(entries))
        for entry in entries[shift:] + entries[:shift]:  # nobody always follows the same neighbour
            progress(f"{case.task}: round {i + 1} of {rounds}", 1)
            if entry.row.status == OK:
                _guard(entry, lambda e: _timed_step(e, device))
    for entry in entries:
        if entry.row.status == OK:
            _guard(entry, lambda e: _check(e, case, inputs, reference))
        if profile and entry.row.status == OK and entry.row.provider.startswith(_PROFILED):
            _profile(entry, device)
        entry.work = entry.last = None
    gc.unfreeze()
    return Outcome(case, rows)


def context_is_lost(device: torch.device) -> bool:
    """Whether the GPU answers nothing any more in this process, as after a kernel that accessed memory it does not have."""
    try:
        synchronize(device)
    except Exception:
        return True
    return False


def failed_case(case: Case, names: Iterable[str], error: Exception) -> Outcome:
    """What to show of a case whose inputs or reference could not be made: no provider is to blame, and none has a figure."""
    rows = [Row(name, roofline=PROVIDERS[name].roofline) for name in names]
    for row in rows:
        row.fail(FAILED, f"the case itself: {shorten(error)}")
    gc.unfreeze()
    return Outcome(case, rows)


def _apply_memory(row: Row, memory: Memory) -> None:
    row.extra_bytes, row.note = memory.extra_bytes, memory.message
    if memory.fatal:
        row.fail(FAILED, memory.message)


def _guard(entry: _Entry, action: Callable[[_Entry], None]) -> None:
    """Whatever a provider raises is its row's business."""
    try:
        action(entry)
    except Exception as error:
        entry.row.fail(FAILED, shorten(error))
    if entry.row.status != OK:
        entry.work = entry.last = None
        if torch.cuda.is_available():
            with contextlib.suppress(Exception):  # after an illegal access, say, nothing works any more: see context_is_lost
                torch.cuda.empty_cache()  # what it held in pieces may be in the way of the next


def _first_step(entry: _Entry, case: Case, inputs: Inputs, reference: Reference, memory: bool) -> None:
    """Build, warm up, let nobody pass whose result is wrong, and measure the memory of one step more."""
    entry.work = entry.provider.build(case, inputs)
    entry.work.prepare()
    entry.last = entry.work.step()
    last = entry.last
    entry.row.schedule, entry.row.flops, entry.row.predicted = last.schedule, last.flops, last.predicted
    _check(entry, case, inputs, reference)
    if entry.row.errors is not None and entry.row.errors.token_logps is None and entry.row.status == OK:
        entry.row.errors.token_logps = token_error(case, inputs, entry.work, reference)
    if memory and not entry.provider.roofline and entry.row.status == OK:
        entry.work.prepare()
        entry.row.extra_bytes = measure_work(entry.work, inputs.hidden.device)


def _check(entry: _Entry, case: Case, inputs: Inputs, reference: Reference) -> None:
    if entry.provider.roofline or entry.last is None:
        return
    errors = check(case, inputs, entry.last, reference)
    entry.row.errors = errors if entry.row.errors is None else entry.row.errors.worst(errors)
    entry.last = None
    if entry.row.errors.failed:
        entry.row.fail(WRONG, "; ".join(entry.row.errors.failed))


def _timed_step(entry: _Entry, device: torch.device) -> None:
    assert entry.work is not None
    entry.last = None
    gc.collect()
    entry.work.prepare()
    synchronize(device)
    start = time.perf_counter()
    result = entry.work.step()
    synchronize(device)
    entry.row.seconds.append(time.perf_counter() - start)
    entry.last = result


def _profile(entry: _Entry, device: torch.device) -> None:
    """What goes wrong here says nothing about the step, which has its figures: it becomes a note."""
    assert entry.work is not None
    try:
        entry.work.prepare()
        entry.row.profile = profile_step(entry.work.step, device)
    except Exception as error:
        entry.row.note = f"profile: {shorten(error)}"


def is_number(value: float | None) -> bool:
    """Whether there is a value that can be printed and compared."""
    return value is not None and math.isfinite(value)
