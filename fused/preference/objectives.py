"""Weighted sums of objectives over different sequences of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from logitless.kernels.core.checks import check_ignore_index
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.planner.plan import Plan

from ..job import Term
from .base import FusedLinearLoss, _Batch, check_number, check_per_sequence
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

    loss: FusedLinearLoss
    sequences: Sequence[int] | Tensor
    weight: float = 1.0
    ref_logps: Tensor | None = None
    desirable: Tensor | None = None
    kl: Tensor | float | None = None


@dataclass
class MultiObjectiveOutput:
    """The weighted sum (differentiable), the value of each objective, and (S,) log-probabilities; detached but for ``loss``."""

    loss: Tensor
    losses: dict[str, Tensor]
    logps: Tensor
    plan: Plan | None = None


class FusedLinearMultiObjectiveLoss(FusedLinearLoss):
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
        weight: Tensor,
        labels: Tensor,
        objectives: Mapping[str, Objective],
        bias: Tensor | None = None,
        head: HeadSpec | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_weights: Tensor | None = None,
        nll_labels: Tensor | None = None,
    ) -> MultiObjectiveOutput:
        """Compute the weighted sum; arguments as in :meth:`FusedLinearLoss.forward`, and

        Args:
            objectives: by name. Sequences that none of them uses are not scored.
        """
        if not isinstance(objectives, Mapping) or not objectives:
            raise TypeError(f"objectives must be a non-empty mapping of names to Objective, got {type(objectives).__name__}")
        for name, objective in objectives.items():
            where = f"objectives[{name!r}]"
            if not isinstance(objective, Objective):
                raise TypeError(f"{where} must be an Objective, got {type(objective).__name__}")
            module = objective.loss
            if not isinstance(module, FusedLinearLoss) or isinstance(module, FusedLinearMultiObjectiveLoss):
                raise TypeError(f"{where}.loss must be a loss module with one loss, got {type(module).__name__}")
            if module.ignore_index != self.ignore_index:
                raise ValueError(f"{where}.loss has ignore_index={module.ignore_index}, the sum has {self.ignore_index}")
            if module.metrics:
                raise ValueError(f"{where}.loss has metrics=True; a sum of objectives computes none")
            if objective.ref_logps is not None and not (module.loss.needs_reference or module.loss.optional_reference):
                raise ValueError(f"{where}.ref_logps is given, but its loss does not use a reference")
            if getattr(objective.loss, "ld_alpha", None) is not None:
                raise ValueError(f"objectives[{name!r}].loss uses ld_alpha; pass token_weights instead")
        losses = [o.loss.loss for o in objectives.values()]
        batch = _Batch.check(self, hidden, weight, labels, bias, head, cu_seqlens, token_weights, nll_labels, any_loss=losses)
        device, terms = hidden.device, []
        states = None
        if ref_hidden is not None or ref_weight is not None or ref_bias is not None:
            asking = next((loss for loss in losses if loss.needs_reference), losses[0])
            states = batch.reference(asking, None, ref_hidden, ref_weight, ref_bias).states
        for name, objective in objectives.items():
            where = f"objectives[{name!r}]"
            try:
                indices = torch.as_tensor(objective.sequences, device="cpu").reshape(-1)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"{where}.sequences must be integer indices, got {objective.sequences!r}") from error
            if indices.numel() and indices.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{where}.sequences must be integer indices, got {indices.dtype}")
            sequences = tuple(int(s) for s in indices.tolist())
            loss = objective.loss.loss
            bad = [s for s in sequences if not 0 <= s < batch.num_sequences]
            if not sequences or bad or len(set(sequences)) != len(sequences):
                raise ValueError(
                    f"{where}.sequences must be distinct indices in [0, {batch.num_sequences}), at least one, got {sequences}"
                )
            if loss.group != "sequence" and len(sequences) % 2:
                raise ValueError(f"{where}.sequences must be chosen ones and then as many rejected ones, got {len(sequences)}")
            inputs: dict[str, Tensor] = {}
            if isinstance(objective.loss, FusedLinearKTOLoss):
                inputs = objective.loss.inputs(objective.desirable, objective.kl, len(sequences), device, f"{where}.")
            elif objective.desirable is not None or objective.kl is not None:
                raise ValueError(f"{where}: desirable and kl are used by FusedLinearKTOLoss only")
            if objective.ref_logps is not None:
                inputs["ref_logps"] = check_per_sequence(f"{where}.ref_logps", objective.ref_logps, len(sequences), device)
            if loss.needs_reference and objective.ref_logps is None and states is None:
                raise ValueError(f"{where} needs a reference: set its ref_logps, or pass ref_hidden and ref_weight")
            terms.append(Term(loss, sequences, check_number(f"{where}.weight", objective.weight), inputs))
        total, report, _ = batch.run(terms, states, False)
        values = {
            name: result.losses.sum().to(total.dtype) / term.num_units
            for name, result, term in zip(objectives, report.results, terms, strict=True)
        }
        return MultiObjectiveOutput(total, values, report.logps, report.plan)
