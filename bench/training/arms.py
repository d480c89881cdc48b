"""Arms: ways to compute the loss of a step. Everything else of a step, and all state between steps, is the same for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import logitless as ll

from .attention import PADDED
from .batches import Data
from .workbench import Workbench


@dataclass(frozen=True)
class Arm:
    """One way to compute the loss.

    Attributes:
        loss: 0-dim, with the graph of a backward pass.
        around: a context for the step, the backward pass included.
        packed: whether the sequences lie in one row.
        floor: it computes no loss, only the decoders, forward and backward: a lower bound for any head.
        why_not: every reason why it cannot run.
    """

    name: str
    about: str
    loss: Callable[[Workbench, Data], Tensor]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    packed: bool = False
    floor: bool = False
    why_not: Callable[[Workbench], list[str]] = lambda bench: []

    @contextmanager
    def ready(self, bench: Workbench) -> Iterator[None]:
        """The model as the arm needs it; this is not timed."""
        bench.use_attention(bench.packed_attention if self.packed else PADDED)
        bench.in_one_row = self.packed
        with self.around():
            yield


def _trl(bench: Workbench, data: Data) -> Any:
    return bench.trainer.compute_loss(bench.model, data.trl)


def _logitless(bench: Workbench, data: Data) -> Any:
    arguments = bench.module_arguments(data)
    return ll.model_loss(bench.model, bench.module, data.packed, padding_free=bench.in_one_row, **arguments).loss


def _body(bench: Workbench, data: Data) -> Tensor:
    """All forward passes of a step up to the head, and a loss of hidden states that costs next to nothing."""

    def run(model: Any, packed: ll.PackedSequences) -> Tensor:
        return ll.at_head(model, packed, lambda at: at.hidden.float().square().mean(), padding_free=bench.in_one_row)

    method = bench.method
    with torch.no_grad():
        if method.kl:
            run(bench.model, data.packed_kl)
        if method.reference:
            with bench.as_reference() as model:
                run(model, data.packed)
                if method.kl:
                    run(model, data.packed_kl)
    return run(bench.model, data.packed)


def _not_in_one_row(bench: Workbench) -> list[str]:
    bench.use_attention(bench.packed_attention)
    with bench.autocast():
        return ll.models.why_not_padding_free(bench.model)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("body", "the decoders without any head", _body, floor=True),
        Arm("body:packed", "the same, sequences in one row", _body, packed=True, floor=True, why_not=_not_in_one_row),
        Arm("trl", "TRL's trainer as it is", _trl),
        Arm("trl+patch", "TRL's trainer on logitless", _trl, around=ll.integrations.trl.patch),
        Arm("logitless", "loss module on the padded batch", _logitless),
        Arm("logitless:packed", "loss module, sequences in one row", _logitless, packed=True, why_not=_not_in_one_row),
    )
}
