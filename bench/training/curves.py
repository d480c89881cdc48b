"""Loss curves: the same model and batches under each arm, and how far rounding alone moves TRL's own curve.

TRL's head rounds logits to bfloat16. Other tiles of the vocabulary change the order in which exponentials are added, which
is far less than that rounding; so TRL's function in float32 is one of the roundings that its curve is compared with.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..runner import FAILED, OK, UNAVAILABLE, shorten
from .arms import ARMS, Arm
from .cases import TrainCase
from .models import make_config
from .steps import case_batch, step
from .workbench import Workbench

#: TRL again, with a part of the vocabulary as its tile.
_PARTS = (5, 11)
LEARNING_RATE = 1e-5


@dataclass
class CurveRow:
    """The losses of an arm. rounding: another rounding of TRL's own function."""

    arm: str
    status: str = OK
    message: str = ""
    losses: list[float] = field(default_factory=list)
    rounding: bool = False


@dataclass
class CurveOutcome:
    """A case and its rows; the first is TRL's."""

    case: TrainCase
    learning_rate: float
    rows: list[CurveRow]

    def row(self, arm: str) -> CurveRow | None:
        return next((r for r in self.rows if r.arm == arm and r.status == OK), None)

    @property
    def noise(self) -> float | None:
        """How far the farthest of TRL's own roundings is from its curve."""
        trl = self.row("trl")
        others = [r.losses for r in self.rows if r.rounding and r.status == OK]
        return max(distance(trl.losses, losses) for losses in others) if trl is not None and others else None

    def over_noise(self, row: CurveRow) -> float | None:
        """Mean distance of a curve from TRL's, over the noise."""
        trl, noise = self.row("trl"), self.noise
        return distance(row.losses, trl.losses) / noise if trl is not None and noise and row.status == OK else None

    def as_dict(self) -> dict[str, Any]:
        rows = [{**asdict(r), "distance_over_noise": None if r.arm == "trl" else self.over_noise(r)} for r in self.rows]
        return {**self.case.as_dict(), "learning_rate": self.learning_rate, "noise": self.noise, "rows": rows}


def distance(a: list[float], b: list[float]) -> float:
    """Mean over steps of how far two curves are apart."""
    return statistics.mean(abs(x - y) for x, y in zip(a, b, strict=True))


@contextmanager
def _replaced(name: str, value: Any) -> Iterator[None]:
    """TRL's fused head with another value of a global that it reads."""
    from trl.trainer import utils

    before = getattr(utils, name)
    setattr(utils, name, value)
    try:
        yield
    finally:
        setattr(utils, name, before)


class _InFloat32:
    """TRL's function on operands in float32, as its trainers' ``cast_lm_head_to_fp32`` runs it."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
        from trl.kernels import ChunkedLogProbFunction  # type: ignore[attr-defined,unused-ignore]

        return ChunkedLogProbFunction.apply(hidden.float(), weight.float(), *rest)


def _roundings(vocab: int) -> dict[str, Arm]:
    """Arms that compute what TRL's does, rounded elsewhere."""
    found: list[tuple[str, str, tuple[str, Any]]] = [
        ("trl:float32-head", "its head in float32", ("_ChunkedLogProbFunction", _InFloat32))
    ]
    for part in _PARTS:
        size = max(1, vocab // part)
        found.append((f"trl:tiles-{size}", "its head in other tiles", ("_CHUNKED_LOGPROB_CHUNK_SIZE", size)))
    loss = ARMS["trl"].loss
    return {
        name: Arm(name, f"TRL's trainer, {about}", loss, around=functools.partial(_replaced, *what))
        for name, about, what in found
    }


def planned_curves(names: Iterable[str], steps: int) -> int:
    """How often :func:`run_curves` reports progress."""
    return (len(list(names)) + 1 + len(_PARTS)) * steps


def run_curves(
    case: TrainCase,
    names: Iterable[str],
    device: torch.device,
    *,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    progress: Callable[[str, int], None] = lambda text, steps: None,
) -> CurveOutcome:
    """Train from one initialisation on one sequence of batches, once for each arm."""
    outcome = CurveOutcome(case, learning_rate, [])
    vocab = make_config(case.model, tiny=case.tiny).vocab_size
    arms = {name: ARMS[name] for name in names}
    more = _roundings(vocab) if "trl" in arms else {}
    for name, arm in {**arms, **more}.items():
        row = CurveRow(name, rounding=name in more)
        outcome.rows.append(row)
        bench = Workbench(case, device, learning_rate=learning_rate)
        try:
            reasons = arm.why_not(bench)
            if row.rounding and not bench.method.fused:
                reasons = [f"TRL's {type(bench.trainer).__name__} has no fused head that could round elsewhere"]
            if reasons:
                row.status, row.message = UNAVAILABLE, "; ".join(reasons)
                progress(name, steps)
                continue
            for i in range(steps):
                progress(f"step {i + 1} of {name}", 1)
                data = bench.data(case_batch(case, vocab, seed=i), exact=False)
                with arm.ready(bench):
                    row.losses.append(step(bench, arm, data).item())
        except Exception as error:
            row.status, row.message, row.losses = FAILED, shorten(error), []
        del bench  # whose trainer holds itself in circles
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return outcome
