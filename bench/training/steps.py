"""A case's arms checked against an exact head, then timed in turns. An arm that fails becomes a row that says so."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..core.memory import peak_bytes
from ..core.rows import OK, WRONG, Outcome, Progress, TimedRow, frozen_heap, release_memory, timed, turns
from .arms import ARMS, Arm
from .attention import PADDED
from .batches import Data
from .cases import TrainCase, case_batch
from .workbench import Workbench

#: Largest errors of a step against one with an exact head on the same decoder: a few times TRL's. Its fused head rounds
#: logits to the model's dtype (2e-4 in bfloat16), its CPO trainer also log-probs of sequences (1e-2). Of the loss relative to
#: the larger of 1 and its size, of gradients the norm of all of them.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "bf16-amp": 0.05, "fp16-amp": 0.05}
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "bf16-amp": 0.1, "fp16-amp": 0.1}


@dataclass
class StepRow(TimedRow):
    """One arm on one case; ``extra_bytes`` are above those that exist between steps (weights, reference, optimizer states).

    Attributes:
        loss_error, gradient_error: from the exact head's, see :data:`LOSS_TOLERANCE`; ``None`` for a floor.
        floor: see :class:`~.arms.Arm`.
    """

    loss: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    floor: bool = False


@dataclass
class StepOutcome(Outcome[StepRow]):
    """A case and its rows.

    Attributes:
        lengths: tokens of each sequence. tokens, scored_tokens: of the batch, without padding.
        held_bytes: between steps, on a GPU.
        body_flops: of all decoder passes of a padded step; ``None`` if it could not run.
        head_flops: the fewest for a head: on scored tokens, one GEMM for each forward pass and one for each gradient.
    """

    lengths: list[int]
    tokens: int
    scored_tokens: int
    head_flops: int
    body_flops: int | None = None
    held_bytes: int | None = None

    def speedup(self, row: StepRow) -> float | None:
        """TRL's time over the arm's."""
        trl = self.time("trl")
        return trl / row.median if trl is not None and row.median is not None else None

    def head_share(self, row: StepRow) -> float | None:
        """The share of the step above the time of the decoders alone, in the same layout."""
        body = self.time("body:packed" if ARMS[row.name].packed else "body")
        return 1 - body / row.median if body is not None and row.median is not None and not row.floor else None

    def derived_of(self, row: StepRow) -> dict[str, Any]:
        return {
            "tokens_per_second": None if row.median is None else self.tokens / row.median,
            "speedup_over_trl": self.speedup(row),
            "head_share": self.head_share(row),
        }


def head_flops(bench: Workbench, data: Data) -> int:
    """Of the fewest GEMMs of a head."""
    weight = bench.base.get_output_embeddings().weight
    scored = read = int(data.scored.sum())
    if bench.method.every_token:
        half = len(data.batch) // 2
        read = int(data.present[:half].sum() + data.scored[half:].sum())
    trained = read * (3 if weight.requires_grad else 2)
    return 2 * weight.numel() * (trained + scored * (bench.method.reference + 2 * bench.method.kl))


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of the difference of all gradients over that of the expected ones; infinite where one is missing."""
    if found.keys() != expected.keys():
        return math.inf
    off = sum(float((found[n].double() - g.double()).square().sum()) for n, g in expected.items())
    return math.sqrt(off / sum(float(g.double().square().sum()) for g in expected.values()))


def step(bench: Workbench, arm: Arm, data: Data) -> Tensor:
    """Loss, gradients and update, within ``arm.ready(bench)``; returns the loss, detached."""
    with bench.autocast():
        loss = arm.loss(bench, data)
    bench.backward(loss)
    bench.update()
    return loss.detach()


class _Run:
    """The rows of a case, and what is done with each."""

    def __init__(self, bench: Workbench, data: Data) -> None:
        self.bench, self.data = bench, data

    def guard(self, row: StepRow, action: Callable[[StepRow], None]) -> None:
        """Run an action unless the row has failed; clean up if it raises or is wrong."""
        if row.status != OK:
            return
        row.guard(lambda: action(row))
        if row.status != OK:
            self.bench.optimizer.zero_grad()
            release_memory(self.bench.device)

    def backward(self, arm: Arm) -> Tensor:
        """Loss and gradients."""
        with self.bench.autocast():
            loss = arm.loss(self.bench, self.data)
        self.bench.backward(loss)
        return loss

    def check(self, row: StepRow, loss: float, gradients: dict[str, Tensor]) -> None:
        bench, arm = self.bench, ARMS[row.name]
        with arm.ready(bench):
            found = self.backward(arm)
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
        with ARMS[row.name].ready(self.bench):
            row.extra_bytes = peak_bytes(lambda: step(self.bench, ARMS[row.name], self.data), self.bench.device)

    def time(self, row: StepRow) -> None:
        gc.collect()
        with ARMS[row.name].ready(self.bench):
            row.seconds.append(timed(lambda: step(self.bench, ARMS[row.name], self.data), self.bench.device)[0])

    def body_flops(self) -> int:
        """Counted by torch in a step of the decoders alone."""
        arm = ARMS["body"]
        with arm.ready(self.bench), FlopCounterMode(display=False) as counter:
            self.backward(arm)
        self.bench.optimizer.zero_grad()
        return int(counter.get_total_flops())


def run_steps(
    case: TrainCase,
    names: Iterable[str],
    device: torch.device,
    *,
    rounds: int,
    progress: Progress = lambda text, steps: None,
) -> StepOutcome:
    """Check, measure and time every arm of a case.

    Args:
        names: of :data:`~.arms.ARMS`, in the order of the table.
        rounds: timed steps of each arm, which take turns.
        progress: receives what happens next and how many planned steps are done with it; ``planned_steps`` in all.
    """
    progress("models and trainer", 1)
    bench = Workbench(case, device)
    with frozen_heap():
        return _run_steps(bench, names, rounds, progress)


def _run_steps(bench: Workbench, names: Iterable[str], rounds: int, progress: Progress) -> StepOutcome:
    case, device = bench.case, bench.device
    data = bench.data(case_batch(case, bench.vocab), exact=True)
    rows = [StepRow(name, floor=ARMS[name].floor) for name in names]
    outcome = StepOutcome(case, rows, data.lengths, data.batch.tokens, data.batch.scored, head_flops(bench, data))
    run = _Run(bench, data)
    for row in rows:
        run.guard(row, lambda r: r.refuse(ARMS[r.name].why_not(bench)))
    progress("exact head", 1)
    bench.use_attention(PADDED)
    loss = bench.exact_loss(data)
    bench.backward(loss)
    exact, gradients = loss.item(), bench.gradients()
    del loss
    for row in rows:
        progress(f"check of {row.name}", 1)
        run.guard(row, lambda r: run.check(r, exact, gradients))
    gradients.clear()
    _make_optimizer_states(bench)
    body = outcome.row("body")
    if body is not None and body.status == OK:
        outcome.body_flops = run.body_flops()
    release_memory(device)
    for row in rows:
        progress(f"memory of {row.name}", 1)
        run.guard(row, run.measure)
    if device.type == "cuda":
        outcome.held_bytes = torch.cuda.memory_allocated()
    for i, row in turns(rows, rounds):
        progress(f"round {i + 1} of {rounds}", 1)
        run.guard(row, run.time)
    return outcome


def _make_optimizer_states(bench: Workbench) -> None:
    """They exist between steps, so they must not count as memory of the first arm that makes a step."""
    for parameter in bench.parameters:
        parameter.grad = torch.zeros_like(parameter)
    bench.optimizer.step()
    bench.optimizer.zero_grad()


def planned_steps(names: Iterable[str], rounds: int) -> int:
    """How often :func:`run_steps` reports progress."""
    return 2 + len(list(names)) * (2 + rounds)
