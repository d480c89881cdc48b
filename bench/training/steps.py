"""A case's arms checked against an exact head, then timed in turns. An arm that fails becomes a row that says so."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..core.console import number, spread
from ..core.memory import peak_bytes
from ..core.rows import OK, WRONG, Outcome, Progress, Stages, TimedRow, beyond, frozen_heap, release_memory, timed
from .arms import ARMS, Arm
from .attention import PADDED
from .batches import Data
from .cases import TrainCase, case_batch
from .predict import Prediction, predict
from .workbench import Workbench

#: Largest errors of a step against one with an exact head on the same decoder: a few times TRL's. Its fused head rounds
#: logits to the model's dtype (2e-4 in bfloat16), its CPO trainer also log-probs of sequences (1e-2). Of the loss relative to
#: the larger of 1 and its size, of gradients the norm of all of them.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (0.05, 0.1), "bf16-amp": (0.05, 0.1), "fp16-amp": (0.05, 0.1)}


@dataclass
class StepRow(TimedRow):
    """One arm on one case; ``extra_bytes`` are above those that exist between steps (weights, reference, optimizer states).

    Attributes:
        loss_error, gradient_error: from the exact head's, see :data:`TOLERANCES`; ``None`` for a floor.
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

    @functools.cached_property
    def prediction(self) -> Prediction | None:
        """``None`` for shrunk models and for cases that the predictions do not cover."""
        case = self.case
        return predict(case) if case.precision == "bf16" and not case.compiled and not case.tiny else None

    @property
    def title(self) -> str:
        return f"{self.case.title}; {self.tokens} tokens, {self.scored_tokens} scored"

    def cells(self, row: StepRow) -> dict[str, str]:
        expected = self.prediction
        predicted = expected.speedup(row.name) if expected is not None and row.name in expected.heads else None
        return {
            "ms, median (min..max)": spread(row.median, row.seconds),
            "tokens/s": "-" if row.median is None else f"{self.tokens / row.median:.0f}",
            "x TRL": number(None if row.floor else self.speedup(row), ".2f"),
            "predicted": number(predicted, ".2f"),
            "head": number(self.head_share(row), ".0%"),
            "extra GiB": number(row.extra_bytes, ".3f", 2**30),
            "loss err": number(row.loss_error),
            "grad err": number(row.gradient_error),
            "note": "no loss" if row.floor else "",
        }

    def notes(self) -> Iterator[str]:
        if self.held_bytes is not None:
            yield f"held between steps: {self.held_bytes / 2**30:.2f} GiB"
        ours = self.time("logitless")
        if self.body_flops is not None and ours is not None:  # as torch counts them, on the padded batch
            total = self.body_flops + self.head_flops
            yield (
                f"padded decoders and the fewest FLOP of a head: {total / 1e12:.3g} TFLOP, of which the head has "
                f"{100 * self.head_flops / total:.0f} %; logitless runs {total / ours / 1e12:.3g} TFLOP/s of it"
            )

    def derived(self) -> dict[str, Any]:
        expected = self.prediction
        return {"predicted_seconds": None if expected is None else {arm: expected.seconds(arm) for arm in expected.heads}}

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


@dataclass
class _StepStages(Stages[StepRow]):
    """The arms of a case on a batch."""

    bench: Workbench
    data: Data

    def free(self, row: StepRow) -> None:
        self.bench.optimizer.zero_grad()

    def backward(self, arm: Arm) -> Tensor:
        """Loss and gradients."""
        with self.bench.autocast():
            loss = arm.loss(self.bench, self.data)
        self.bench.backward(loss)
        return loss

    def check(self, row: StepRow, loss: float, gradients: dict[str, Tensor]) -> None:
        """Compare loss and gradients with those of the exact head."""
        bench, arm = self.bench, ARMS[row.name]
        with arm.ready(bench):
            found = self.backward(arm)
        if arm.floor:
            bench.optimizer.zero_grad()
            return
        row.loss = found.item()
        row.loss_error = abs(row.loss - loss) / max(1.0, abs(loss))
        row.gradient_error = gradient_error(bench.gradients(), gradients)
        limits = TOLERANCES[bench.case.precision]
        row.refuse(beyond(("loss", row.loss_error, limits[0]), ("gradient", row.gradient_error, limits[1])), WRONG)

    def memory(self, row: StepRow) -> None:
        with ARMS[row.name].ready(self.bench):
            row.extra_bytes = peak_bytes(lambda: step(self.bench, ARMS[row.name], self.data), self.device)

    def time(self, row: StepRow) -> None:
        gc.collect()
        with ARMS[row.name].ready(self.bench):
            row.seconds.append(timed(lambda: step(self.bench, ARMS[row.name], self.data), self.device)[0])

    def body_flops(self, row: StepRow | None) -> int | None:
        """Counted by torch in a step of the decoders alone, if these can run."""
        if row is None or row.status != OK:
            return None
        with ARMS[row.name].ready(self.bench), FlopCounterMode(display=False) as counter:
            self.backward(ARMS[row.name])
        self.bench.optimizer.zero_grad()
        return int(counter.get_total_flops())


def run_steps(
    case: TrainCase, names: Iterable[str], device: torch.device, *, rounds: int, progress: Progress = lambda text: None
) -> StepOutcome:
    """Check, measure and time arms of a case, in the order of ``names``; each has ``rounds`` timed steps."""
    progress("models and trainer")
    bench = Workbench(case, device)
    rows = [StepRow(name, floor=ARMS[name].floor) for name in names]
    with frozen_heap():
        data = bench.data(case_batch(case, bench.vocab), exact=True)
        outcome = StepOutcome(case, rows, data.batch.lengths, data.batch.tokens, data.batch.scored, head_flops(bench, data))
        stages = _StepStages(rows, device, progress, bench, data)
        stages.each("attention", lambda row: row.refuse(ARMS[row.name].why_not(bench)))
        progress("exact head")
        bench.use_attention(PADDED)
        loss = bench.exact_loss(data)
        bench.backward(loss)
        exact, gradients = loss.item(), bench.gradients()
        del loss
        stages.each("check", lambda row: stages.check(row, exact, gradients))
        gradients.clear()
        for parameter in bench.parameters:  # optimizer states exist between steps: they are no memory of the first arm's step
            parameter.grad = torch.zeros_like(parameter)
        bench.optimizer.step()
        bench.optimizer.zero_grad()
        outcome.body_flops = stages.body_flops(outcome.row("body"))
        release_memory(device)
        stages.each("memory", stages.memory)
        if device.type == "cuda":
            outcome.held_bytes = torch.cuda.memory_allocated()
        stages.turns(rounds, stages.time)
    return outcome
