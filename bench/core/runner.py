"""Runs a case: availability, memory, checks against float64, interleaved timing. A provider that fails becomes a row."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .cases import Case
from .inputs import Inputs, make_inputs
from .memory import measure, peak_bytes
from .profiling import Kernel, profile_step
from .reference import Errors, Reference, check, compute_reference, token_error
from .registry import PROVIDERS, Provider, Result, Work
from .rows import FAILED, OK, WRONG, Outcome, Progress, TimedRow, frozen_heap, release_memory, shorten, timed, turns


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

    def as_dict(self) -> dict[str, Any]:
        ends = {"min_seconds": min(self.seconds, default=None), "max_seconds": max(self.seconds, default=None)}
        return {**super().as_dict(), **ends}


@dataclass
class CaseOutcome(Outcome[ProviderRow]):
    """A case and its rows."""

    def ratio(self, row: ProviderRow) -> float | None:
        """Time over that of the bare GEMMs."""
        roofline = next((r.median for r in self.rows if r.roofline), None)
        return row.median / roofline if row.median is not None and roofline else None

    def derived(self) -> dict[str, Any]:
        return {"scored_tokens": self.case.shape.scored, "gemms": self.case.gemms}

    def derived_of(self, row: ProviderRow) -> dict[str, Any]:
        return {"ratio_to_gemm": self.ratio(row)}


#: Providers whose steps ``--profile`` looks into, by how their names start: ours, and the bare GEMMs.
_PROFILED = ("logitless", "gemm")


@dataclass
class _Entry:
    provider: Provider
    row: ProviderRow
    work: Work | None = None
    last: Result | None = None


#: Assumptions of an estimate for a GPU of the H100's class: FLOP/s of GEMMs in bf16 and float64, and the average time of a
#: provider's step over the bare GEMMs (Liger takes 4 to 5 times as long, ours 1.1).
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
    progress: Progress = lambda text, steps: None,
) -> CaseOutcome:
    """Measure memory, check, and time every provider of a case; errors of providers become rows.

    Args:
        case: what to run.
        names: providers, in the order of the table.
        device: where.
        rounds: timed steps of each provider. They take turns, so that a slow period of the machine affects all of them.
        memory: whether to measure peak memory, on a CPU in processes of their own.
        profile: whether one more step of ours and of the bare GEMMs runs under torch's profiler, after all that is timed.
        progress: receives what happens next and how many planned steps are done with it.
    """
    gc.collect()
    release_memory(device)  # of the case before: the memory processes share the device
    rows, entries = [], []
    for name in names:
        provider = PROVIDERS[name]
        row = ProviderRow(name, roofline=provider.roofline)
        rows.append(row)
        row.refuse(provider.reasons(case, device))
        if row.status == OK:
            entries.append(_Entry(provider, row))
    # On a CPU processes measure memory, before this one holds anything large. A GPU's allocator keeps accounts, so there a
    # step of this process is enough; a process for each provider would take most of the time.
    apart = memory and device.type == "cpu"
    with ThreadPoolExecutor(2) as pool:
        measured = [
            pool.submit(measure, entry.provider, case, device) if apart and not entry.provider.roofline else None
            for entry in entries
        ]
        for entry, pending in zip(entries, measured, strict=True):
            progress(f"{case.task}: memory of {entry.row.name}", 1)
            if pending is not None:
                found = pending.result()
                entry.row.extra_bytes, entry.row.note = found.extra_bytes, found.message
                if found.fatal:
                    entry.row.fail(FAILED, found.message)
    progress(f"{case.task}: float64 reference", 1)
    run = _Run(case, device, make_inputs(case, device))
    with frozen_heap():
        for entry in entries:
            progress(f"{case.task}: check of {entry.row.name}", 1)
            run.guard(entry, lambda e: run.first_step(e, memory and not apart))
        for i, entry in turns(entries, rounds):
            progress(f"{case.task}: round {i + 1} of {rounds}", 1)
            run.guard(entry, run.timed_step)
        for entry in entries:
            run.guard(entry, run.check)
            if profile and entry.row.status == OK and entry.row.name.startswith(_PROFILED):
                run.profile(entry)
            entry.work = entry.last = None
    return CaseOutcome(case, rows)


def failed_case(case: Case, names: Iterable[str], error: Exception) -> CaseOutcome:
    """The outcome of a case whose inputs or reference could not be made: every row has failed."""
    message = f"the case itself: {shorten(error)}"
    return CaseOutcome(case, [ProviderRow(name, FAILED, message, roofline=PROVIDERS[name].roofline) for name in names])


class _Run:
    """The inputs and the reference of a case, and what is done with each provider."""

    def __init__(self, case: Case, device: torch.device, inputs: Inputs) -> None:
        self.case, self.device, self.inputs = case, device, inputs
        self.reference: Reference = compute_reference(case, inputs)

    def guard(self, entry: _Entry, action: Callable[[_Entry], None]) -> None:
        """Run an action unless the row has failed; free what the provider holds if it raises or is wrong."""
        if entry.row.status != OK:
            return
        entry.row.guard(lambda: action(entry))
        if entry.row.status != OK:
            entry.work = entry.last = None
            release_memory(self.device)

    def first_step(self, entry: _Entry, memory: bool) -> None:
        """Build, warm up, check, and measure the memory of one more step."""
        entry.work = entry.provider.build(self.case, self.inputs)
        entry.work.prepare()
        entry.last = last = entry.work.step()
        entry.row.schedule, entry.row.flops, entry.row.predicted_seconds = last.schedule, last.flops, last.predicted
        self.check(entry)
        if entry.row.errors is not None and entry.row.errors.token_logps is None and entry.row.status == OK:
            entry.row.errors.token_logps = token_error(self.case, self.inputs, entry.work, self.reference)
        if memory and not entry.provider.roofline and entry.row.status == OK:
            entry.work.prepare()
            entry.row.extra_bytes = peak_bytes(entry.work.step, self.device)

    def check(self, entry: _Entry) -> None:
        """Compare the last result with the reference."""
        if entry.provider.roofline or entry.last is None:
            return
        errors = check(self.case, self.inputs, entry.last, self.reference)
        entry.row.errors = errors if entry.row.errors is None else entry.row.errors.worst(errors)
        entry.last = None
        if entry.row.errors.failed:
            entry.row.fail(WRONG, "; ".join(entry.row.errors.failed))

    def timed_step(self, entry: _Entry) -> None:
        assert entry.work is not None
        entry.last = None
        gc.collect()
        entry.work.prepare()
        seconds, entry.last = timed(entry.work.step, self.device)
        entry.row.seconds.append(seconds)

    def profile(self, entry: _Entry) -> None:
        """An error here does not affect the step's figures: it becomes a note."""
        assert entry.work is not None
        try:
            entry.work.prepare()
            entry.row.profile = profile_step(entry.work.step, self.device)
        except Exception as error:
            entry.row.note = f"profile: {shorten(error)}"
