"""A case's arms checked against an exact head, then timed in turns. An arm that fails becomes a row that says so."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..memory import measure_work
from ..registry import Result, Work
from ..runner import FAILED, OK, UNAVAILABLE, WRONG, shorten, synchronize
from .arms import ARMS, Arm
from .attention import PADDED
from .batches import Batch, make_batch
from .cases import TrainCase
from .workbench import Data, Workbench

#: What a step may be off by from one with an exact head on the same decoder: a few times what TRL's is. Its fused head rounds
#: logits to the model's dtype (2e-4 in bfloat16), its CPO trainer log-probs of sequences too (1e-2). Of the loss relative to
#: the larger of 1 and its size, of gradients the norm of all of them.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "bf16-amp": 0.05, "fp16-amp": 0.05}
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "bf16-amp": 0.1, "fp16-amp": 0.1}


@dataclass
class StepRow:
    """One arm on one case.

    Attributes:
        status, message: as in :class:`~..runner.Row`.
        seconds: of each round.
        extra_bytes: at the peak of a step above what is held between steps (weights, reference, optimizer states).
        loss_error, gradient_error: from the exact head's, see :data:`LOSS_TOLERANCE`; ``None`` for a floor.
        floor: see :class:`~.arms.Arm`.
    """

    arm: str
    status: str = OK
    message: str = ""
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    loss: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    floor: bool = False

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.status == OK and self.seconds else None

    def fail(self, status: str, message: str) -> None:
        """Turn into a row that says so, without figures."""
        self.status, self.message, self.seconds, self.extra_bytes = status, message, [], None


@dataclass
class StepOutcome:
    """A case and its rows.

    Attributes:
        lengths: tokens of each sequence. tokens, scored: of the batch, padding left out.
        held_bytes: between steps, on a GPU.
        body_flops: of all decoder passes of a padded step; ``None`` if it could not run.
        head_flops: the fewest that a head can do: on scored tokens, one GEMM for each forward pass and one for each gradient.
    """

    case: TrainCase
    rows: list[StepRow]
    lengths: list[int]
    tokens: int
    scored: int
    head_flops: int
    body_flops: int | None = None
    held_bytes: int | None = None

    def row(self, arm: str) -> StepRow | None:
        return next((r for r in self.rows if r.arm == arm), None)

    def time(self, arm: str) -> float | None:
        row = self.row(arm)
        return None if row is None else row.median

    def speedup(self, row: StepRow) -> float | None:
        """TRL's time over the arm's."""
        trl = self.time("trl")
        return trl / row.median if trl is not None and row.median is not None else None

    def head_share(self, row: StepRow) -> float | None:
        """The part of the step that the decoders alone, laid out alike, do not take."""
        body = self.time("body:packed" if ARMS[row.arm].packed else "body")
        return 1 - body / row.median if body is not None and row.median is not None and not row.floor else None

    def as_dict(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            median = row.median
            derived = {
                "median_seconds": median,
                "tokens_per_second": None if median is None else self.tokens / median,
                "speedup_over_trl": self.speedup(row),
                "head_share": self.head_share(row),
            }
            rows.append({**asdict(row), **derived})
        about = {"lengths": self.lengths, "tokens": self.tokens, "scored_tokens": self.scored}
        costs = {"head_flops": self.head_flops, "body_flops": self.body_flops, "held_bytes": self.held_bytes}
        return {**self.case.as_dict(), **about, **costs, "rows": rows}


def head_flops(bench: Workbench, data: Data) -> int:
    """Of the GEMMs that no head can do without."""
    weight = bench.base.get_output_embeddings().weight
    one = 2 * weight.numel()
    scored = int(data.scored.sum())
    read = scored
    if bench.method.every_token:
        half = len(data.batch) // 2
        read = int(data.present[:half].sum() + data.scored[half:].sum())
    trained = read * (3 if weight.requires_grad else 2)
    return one * (trained + scored * (bench.method.reference + 2 * bench.method.kl))


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of the difference of all gradients over that of the expected ones; infinite where one is missing."""
    if found.keys() != expected.keys():
        return math.inf
    off = sum(float((found[n].double() - g.double()).square().sum()) for n, g in expected.items())
    return math.sqrt(off / sum(float(g.double().square().sum()) for g in expected.values()))


def step(bench: Workbench, arm: Arm, data: Data) -> Tensor:
    """Loss, gradients and update; returns the loss, detached. To be called where ``arm.ready(bench)`` holds."""
    with bench.autocast():
        loss = arm.loss(bench, data)
    bench.backward(loss)
    bench.update()
    return loss.detach()


class _Run:
    """The rows of a case, and what may fail in them."""

    def __init__(self, bench: Workbench, data: Data, rows: dict[str, StepRow]) -> None:
        self.bench, self.data, self.rows = bench, data, rows

    def guard(self, row: StepRow, action: Callable[[StepRow], None]) -> None:
        """Whatever an arm raises is its row's business."""
        if row.status != OK:
            return
        try:
            action(row)
        except Exception as error:
            row.fail(FAILED, shorten(error))
        if row.status != OK:
            self.bench.optimizer.zero_grad()
            if self.bench.device.type == "cuda":
                with contextlib.suppress(Exception):  # after an illegal access, say, nothing works any more
                    torch.cuda.empty_cache()

    def check(self, row: StepRow, loss: float, gradients: dict[str, Tensor]) -> None:
        bench, arm = self.bench, ARMS[row.arm]
        with arm.ready(bench):
            with bench.autocast():
                found = arm.loss(bench, self.data)
            bench.backward(found)
        if arm.floor:
            bench.optimizer.zero_grad()
            return
        row.loss = found.item()
        row.loss_error = abs(row.loss - loss) / max(1.0, abs(loss))
        row.gradient_error = gradient_error(bench.gradients(), gradients)
        precision = bench.case.precision
        limits = (
            ("loss", row.loss_error, LOSS_TOLERANCE[precision]),
            ("gradient", row.gradient_error, GRADIENT_TOLERANCE[precision]),
        )
        wrong = [f"{name} is off by {e:.2g}, allowed {limit:.2g}" for name, e, limit in limits if not e <= limit]
        if wrong:
            row.fail(WRONG, "; ".join(wrong))

    def measure(self, row: StepRow) -> None:
        arm = ARMS[row.arm]

        def work() -> Result:
            return Result(loss=step(self.bench, arm, self.data))

        with arm.ready(self.bench):
            row.extra_bytes = measure_work(Work(work), self.bench.device)

    def time(self, row: StepRow) -> None:
        arm, device = ARMS[row.arm], self.bench.device
        gc.collect()
        with arm.ready(self.bench):
            synchronize(device)
            start = time.perf_counter()
            step(self.bench, arm, self.data)
            synchronize(device)
            row.seconds.append(time.perf_counter() - start)


def case_batch(case: TrainCase, vocab: int, *, pairs: int | None = None, length: int | None = None, seed: int = 0) -> Batch:
    """The batch of a case, or one of another size."""
    sizes = {"pairs": pairs or case.pairs, "length": length or case.length}
    return make_batch(case.profile, **sizes, vocab=vocab, seed=case.seed + seed)


def run_steps(
    case: TrainCase,
    names: Iterable[str],
    device: torch.device,
    *,
    rounds: int,
    progress: Callable[[str, int], None] = lambda text, steps: None,
) -> StepOutcome:
    """Check, measure and time every arm of a case.

    Args:
        names: of :data:`~.arms.ARMS`, in the order of the table.
        rounds: timed steps of each arm, which take turns.
        progress: told what happens next and how many planned steps are done with it; ``planned_steps`` in all.
    """
    progress("models and trainer", 1)
    bench = Workbench(case, device)
    gc.collect()
    gc.freeze()  # what stands by now: the collection before each step, which would take as long as the step, skips it
    try:
        return _run_steps(bench, names, rounds, progress)
    finally:
        gc.unfreeze()


def _run_steps(bench: Workbench, names: Iterable[str], rounds: int, progress: Callable[[str, int], None]) -> StepOutcome:
    case, device = bench.case, bench.device
    data = bench.data(case_batch(case, bench.vocab), exact=True)
    rows = {name: StepRow(name, floor=ARMS[name].floor) for name in names}
    batch = data.batch
    outcome = StepOutcome(case, list(rows.values()), data.lengths, batch.tokens, batch.scored, head_flops(bench, data))
    run = _Run(bench, data, rows)
    for row in rows.values():
        run.guard(row, lambda r: _refuse(r, ARMS[r.arm].why_not(bench)))
    progress("exact head", 1)
    bench.use_attention(PADDED)
    loss = bench.exact_loss(data)
    bench.backward(loss)
    exact, gradients = loss.item(), bench.gradients()
    del loss
    for row in rows.values():
        progress(f"check of {row.arm}", 1)
        run.guard(row, lambda r: run.check(r, exact, gradients))
    gradients.clear()
    _make_optimizer_states(bench)
    outcome.body_flops = _body_flops(run)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for row in rows.values():
        progress(f"memory of {row.arm}", 1)
        run.guard(row, run.measure)
    if device.type == "cuda":
        outcome.held_bytes = torch.cuda.memory_allocated()
    order = list(rows.values())
    for i in range(rounds):
        shift = i % max(1, len(order))
        for row in order[shift:] + order[:shift]:  # nobody always follows the same neighbour
            progress(f"round {i + 1} of {rounds}", 1)
            run.guard(row, run.time)
    return outcome


def _make_optimizer_states(bench: Workbench) -> None:
    """They are held between steps: the first arm that makes a step must not be charged with them."""
    for parameter in bench.parameters:
        parameter.grad = torch.zeros_like(parameter)
    bench.optimizer.step()
    bench.optimizer.zero_grad()


def planned_steps(names: Iterable[str], rounds: int) -> int:
    """How often :func:`run_steps` reports progress."""
    return 2 + len(list(names)) * (2 + rounds)


def _refuse(row: StepRow, reasons: list[str]) -> None:
    if reasons:
        row.fail(UNAVAILABLE, "; ".join(reasons))


def _body_flops(run: _Run) -> int | None:
    """Counted by torch in a step of the decoders alone."""
    row = run.rows.get("body")
    if row is None or row.status != OK:
        return None
    bench, arm = run.bench, ARMS["body"]
    with arm.ready(bench), FlopCounterMode(display=False) as counter:
        with bench.autocast():
            loss = arm.loss(bench, run.data)
        bench.backward(loss)
    bench.optimizer.zero_grad()
    return int(counter.get_total_flops())
