"""Weighted sums of objectives over different sequences of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logitless.kernels.core.autograd import eagerly
from logitless.kernels.core.checks import check_ignore_index
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.head_weight import Weight
from logitless.kernels.planner.plan import Plan

from ..call import LossCall
from ..checks import check_number, check_per_sequence
from ..engine import run
from .base import FusedLinearPreferenceLoss, check_token_arguments
from .job import PreferenceJob, Term
from .modules import FusedLinearKTOLoss


@dataclass
class Objective:
    """One objective of :class:`FusedLinearMultiObjectiveLoss`.

    Attributes:
        loss: a loss module of this library.
        sequences: indices of its sequences in the batch; for pair losses the chosen ones, then the rejected ones.
        weight: its factor in the sum.
        ref_logps: (len(sequences),) where the loss has a reference and none is computed from ``ref_hidden``.
        desirable, kl: for KTO.
    """

    loss: FusedLinearPreferenceLoss
    sequences: Sequence[int] | Tensor
    weight: float = 1.0
    ref_logps: Tensor | None = None
    desirable: Tensor | None = None
    kl: Tensor | float | None = None


@dataclass
class MultiObjectiveOutput:
    """What a sum of objectives returns; only ``loss`` carries a gradient.

    Attributes:
        loss: 0-dim, the weighted sum.
        losses: the value of each objective, by name.
        logps: (S,) log-probability of each sequence.
        plan: the plan that was carried out.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    logps: Tensor
    plan: Plan | None = None


class FusedLinearMultiObjectiveLoss(FusedLinearPreferenceLoss):
    """A weighted sum of objectives over different (also overlapping) sequences of one batch, in one pass over each token.

    Example:
        >>> x, w, y = torch.randn(6, 6, 16), torch.randn(100, 16), torch.randint(100, (6, 6))
        >>> helpful = Objective(FusedLinearSimPOLoss(), sequences=[0, 1, 2, 3], weight=0.7)
        >>> safe = Objective(FusedLinearCPOLoss(), sequences=[4, 5], weight=0.3)
        >>> sorted(FusedLinearMultiObjectiveLoss()(x, w, y, {"helpful": helpful, "safe": safe}).losses)
        ['helpful', 'safe']
    """

    def __init__(self, ignore_index: int = -100) -> None:
        nn.Module.__init__(self)
        check_ignore_index(ignore_index)
        self.ignore_index = ignore_index

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        weight: Weight,
        labels: Tensor,
        objectives: Mapping[str, Objective],
        bias: Tensor | None = None,
        head: HeadSpec | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Weight | None = None,
        ref_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_weights: Tensor | None = None,
        nll_labels: Tensor | None = None,
    ) -> MultiObjectiveOutput:
        """Compute the weighted sum; arguments as in :meth:`FusedLinearPreferenceLoss.forward`, and

        Args:
            objectives: by name. Sequences that none of them uses are not scored.
        """
        if not isinstance(objectives, Mapping) or not objectives:
            raise TypeError(f"objectives must be a non-empty mapping of names to Objective, got {type(objectives).__name__}")
        for name, objective in objectives.items():
            self._check_objective(f"objectives[{name!r}]", objective)
        losses = [objective.loss.loss for objective in objectives.values()]
        call = LossCall.check(hidden, weight, labels, bias, head, cu_seqlens, self.ignore_index).with_reference(
            None, ref_hidden, ref_weight, ref_bias, uses=any(loss.uses_reference for loss in losses), needs=False
        )
        check_token_arguments(call, token_weights, nll_labels, uses_nll=any(loss.uses_nll for loss in losses))
        terms = [self._term(f"objectives[{name!r}]", objective, call) for name, objective in objectives.items()]
        total, report = eagerly(run)(PreferenceJob(call, frozenset(), terms, token_weights, nll_labels))
        values = {
            name: result.losses.sum().to(total.dtype) / term.num_units
            for name, result, term in zip(objectives, report.results, terms, strict=True)
        }
        return MultiObjectiveOutput(total, values, report.logps, report.plan)

    def _check_objective(self, where: str, objective: Any) -> None:
        """Its module must be one that can be a part of a sum. ``where``: its name in messages."""
        if not isinstance(objective, Objective):
            raise TypeError(f"{where} must be an Objective, got {type(objective).__name__}")
        module = objective.loss
        if not isinstance(module, FusedLinearPreferenceLoss) or isinstance(module, FusedLinearMultiObjectiveLoss):
            raise TypeError(f"{where}.loss must be a loss module with one loss, got {type(module).__name__}")
        if module.ignore_index != self.ignore_index:
            raise ValueError(f"{where}.loss has ignore_index={module.ignore_index}, the sum has {self.ignore_index}")
        if module.metrics:
            raise ValueError(f"{where}.loss has metrics=True; a sum of objectives computes none")
        if objective.ref_logps is not None and not module.loss.uses_reference:
            raise ValueError(f"{where}.ref_logps is given, but its loss does not use a reference")
        if getattr(module, "ld_alpha", None) is not None:
            raise ValueError(f"{where}.loss uses ld_alpha; pass token_weights instead")

    def _term(self, where: str, objective: Objective, call: LossCall) -> Term:
        """The loss over the objective's sequences; checks what depends on the batch."""
        try:
            indices = torch.as_tensor(objective.sequences, device="cpu").reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{where}.sequences must be integer indices, got {objective.sequences!r}") from error
        if indices.numel() and indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{where}.sequences must be integer indices, got {indices.dtype}")
        sequences = tuple(int(s) for s in indices.tolist())
        module, loss, device = objective.loss, objective.loss.loss, call.hidden.device
        bad = [s for s in sequences if not 0 <= s < call.num_sequences]
        if not sequences or bad or len(set(sequences)) != len(sequences):
            raise ValueError(
                f"{where}.sequences must be distinct indices in [0, {call.num_sequences}), at least one, got {sequences}"
            )
        if loss.group != "sequence" and len(sequences) % 2:
            raise ValueError(f"{where}.sequences must be chosen ones and then as many rejected ones, got {len(sequences)}")
        inputs: dict[str, Tensor] = {}
        if isinstance(module, FusedLinearKTOLoss):
            inputs = module.check_inputs(objective.desirable, objective.kl, len(sequences), device, f"{where}.")
        elif objective.desirable is not None or objective.kl is not None:
            raise ValueError(f"{where}: desirable and kl are used by FusedLinearKTOLoss only")
        ref_logps = objective.ref_logps
        if ref_logps is not None:
            ref_logps = check_per_sequence(f"{where}.ref_logps", ref_logps, len(sequences), device)
        if loss.needs_reference and ref_logps is None and call.reference.states is None:
            raise ValueError(f"{where} needs a reference: set its ref_logps, or pass ref_hidden and ref_weight")
        return Term(loss, sequences, check_number(f"{where}.weight", objective.weight), ref_logps, inputs)
