"""Providers from TRL: its log-prob function as its trainers call it."""

from __future__ import annotations

from torch import Tensor

from ..core.cases import Case
from ..core.inputs import Inputs
from ..core.registry import Work, provider
from ..losses import uses_entropy
from .common import POLICY_TASKS, TOKEN_TASKS, TokenValues, needs, on_positions

#: Vocabulary tile of TRL's ``add_fused_lm_head``.
_TILE = 32768
_NEEDS = needs("trl", "transformers")


def _values(case: Case, outputs: tuple[str, ...] = ()) -> TokenValues:
    from trl.kernels import ChunkedLogProbFunction  # type: ignore[attr-defined,unused-ignore]

    head = (1.0, _TILE, case.shape.head.softcap, 1.0)  # temperature, tile, soft-cap, scale

    def values(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        found = ChunkedLogProbFunction.apply(hidden, weight, None, labels, *head, outputs)
        return found[0], found[1] if outputs else None

    return values


def _positions(inputs: Inputs) -> Tensor | None:
    """Of TRL's trainers: on a CPU every position, elsewhere the scored ones."""
    return inputs.scored if inputs.hidden.device.type in ("cuda", "xpu") else None


@provider("trl", tasks=TOKEN_TASKS, why_not=_NEEDS)
def preference(case: Case, inputs: Inputs) -> Work:
    """TRL's function as its preference trainers call it, and the loss behind it."""
    return on_positions(case, inputs, _values(case), _positions(inputs))


@provider("trl:policy", tasks=POLICY_TASKS, why_not=_NEEDS)
def policy(case: Case, inputs: Inputs) -> Work:
    """As ``GRPOTrainer`` calls it: on the padded batch, with the entropy, which it logs."""
    return on_positions(case, inputs, _values(case, ("entropy",)), _positions(inputs))


@provider("trl:policy-scored", tasks=POLICY_TASKS, why_not=_NEEDS)
def policy_scored(case: Case, inputs: Inputs) -> Work:
    """The best case for TRL's function: response tokens only, and the entropy only where the loss uses it."""
    values = _values(case, ("entropy",) if uses_entropy(case.task) else ())
    return on_positions(case, inputs.packed, values, inputs.packed.scored)
