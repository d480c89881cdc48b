"""Loss curves: the same model and batches under each arm, and how far rounding alone moves TRL's own curve.

TRL's head rounds logits to bfloat16. Other tiles of the vocabulary only change the order in which exponentials are added,
which matters far less; so the roundings that TRL's curve is compared with include its function in float32.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..core.console import number
from ..core.rows import OK, Outcome, Progress, Row, Stages, release_memory
from .arms import ARMS, Arm
from .cases import TrainCase, case_batch
from .models import make_config
from .steps import step
from .workbench import Workbench

#: TRL again, with a part of the vocabulary as its tile.
_PARTS = (5, 11)
LEARNING_RATE = 1e-5


@dataclass
class CurveRow(Row):
    """The losses of an arm. rounding: whether it is another rounding of TRL's own function."""

    losses: list[float] = field(default_factory=list)
    rounding: bool = False

    def fail(self, status: str, message: str) -> None:
        super().fail(status, message)
        self.losses = []


@dataclass
class CurveOutcome(Outcome[CurveRow]):
    """A case and its rows; the first is TRL's."""

    learning_rate: float

    @property
    def noise(self) -> float | None:
        """The largest distance of another rounding of TRL's function from TRL's curve."""
        trl = self.row("trl")
        others = [r.losses for r in self.rows if r.rounding and r.status == OK]
        return max(distance(trl.losses, losses) for losses in others) if trl is not None and trl.losses and others else None

    def over_noise(self, row: CurveRow) -> float | None:
        """Mean distance of a curve from TRL's, over the noise."""
        trl, noise = self.row("trl"), self.noise
        return distance(row.losses, trl.losses) / noise if trl is not None and noise and row.status == OK else None

    @property
    def title(self) -> str:
        return f"{self.case.title}; learning rate {self.learning_rate:g}; noise {number(self.noise)}"

    def cells(self, row: CurveRow) -> dict[str, str]:
        return {
            "steps": str(len(row.losses)),
            "first loss": f"{row.losses[0]:.4f}",
            "last loss": f"{row.losses[-1]:.4f}",
            "x noise": number(None if row.name == "trl" else self.over_noise(row), ".2f"),
            "note": "TRL, rounded otherwise" if row.rounding else "",
        }

    def derived(self) -> dict[str, Any]:
        return {"noise": self.noise}

    def derived_of(self, row: CurveRow) -> dict[str, Any]:
        return {"distance_over_noise": None if row.name == "trl" else self.over_noise(row)}


def distance(a: list[float], b: list[float]) -> float:
    """Mean over steps of the absolute difference of two curves."""
    return statistics.mean(abs(x - y) for x, y in zip(a, b, strict=True))


class _InFloat32:
    """TRL's function on operands in float32, as its trainers' ``cast_lm_head_to_fp32`` runs it."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
        from trl.kernels import ChunkedLogProbFunction  # type: ignore[attr-defined,unused-ignore]

        return ChunkedLogProbFunction.apply(hidden.float(), weight.float(), *rest)


def _roundings(vocab: int) -> dict[str, Arm]:
    """Arms that compute the same as TRL's with other roundings: its head in float32, or in other tiles."""
    sizes = [max(1, vocab // part) for part in _PARTS]
    found: dict[str, tuple[str, Any]] = {
        "trl:float32-head": ("_ChunkedLogProbFunction", _InFloat32),
        **{f"trl:tiles-{size}": ("_CHUNKED_LOGPROB_CHUNK_SIZE", size) for size in sizes},
    }
    return {
        name: Arm(name, "", ARMS["trl"].loss, around=functools.partial(mock.patch, f"trl.trainer.utils.{of}", value))
        for name, (of, value) in found.items()
    }


def run_curves(
    case: TrainCase,
    names: Iterable[str],
    device: torch.device,
    *,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    progress: Progress = lambda text: None,
) -> CurveOutcome:
    """Train from one initialisation on one sequence of batches, once for each arm."""
    vocab = make_config(case.model, tiny=case.tiny).vocab_size
    arms = {name: ARMS[name] for name in names}
    more = _roundings(vocab) if "trl" in arms else {}
    rows = [CurveRow(name, rounding=name in more) for name in (*arms, *more)]

    def train(row: CurveRow) -> None:
        gc.collect()  # the trainer of the row before contains reference cycles
        release_memory(device)
        bench, arm = Workbench(case, device, learning_rate=learning_rate), {**arms, **more}[row.name]
        row.refuse(arm.why_not(bench))
        if row.rounding and not bench.method.fused:
            row.refuse([f"TRL's {type(bench.trainer).__name__} has no fused head with other roundings"])
        for i in range(steps if row.status == OK else 0):
            progress(f"step {i + 1} of {row.name}")
            data = bench.data(case_batch(case, vocab, seed=i), exact=False)
            with arm.ready(bench):
                row.losses.append(step(bench, arm, data).item())

    Stages(rows, device, progress).each("training", train)
    return CurveOutcome(case, rows, learning_rate)
