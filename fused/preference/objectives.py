"""Weighted sums of objectives over different sequences of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from logitless.kernels.core.autograd import eagerly
from logitless.kernels.core.checks import check_ignore_index
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.head_weight import Weight
from logitless.kernels.parallel.vocab_parallel import VocabParallel
from logitless.kernels.planner.plan import Plan

from ..call import LossCall, check_counted_labels
from ..checks import check_number, check_per_sequence
from ..engine import run
from ..num_items import NAME, OF_CALL, item_counts, over, read_num_items
from ..scored_tokens import sequence_of_position
from ..sequence_group import first_of_group, num_ranks, with_sequence_group
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
        num_items_in_batch: what the loss divides by if the call is one of several micro-batches, see
            :meth:`FusedLinearMultiObjectiveLoss.count_items`. ``sequences`` may then be empty.
    """

    loss: FusedLinearPreferenceLoss
    sequences: Sequence[int] | Tensor
    weight: float = 1.0
    ref_logps: Tensor | None = None
    desirable: Tensor | None = None
    kl: Tensor | float | None = None
    num_items_in_batch: Tensor | Sequence[Tensor | float] | float | None = None


@dataclass
class MultiObjectiveOutput:
    """What a sum of objectives returns; only ``loss`` (and ``aux_loss``) carries a gradient.

    Attributes:
        loss: 0-dim, the weighted sum.
        losses: the value of each objective, by name; ``loss`` is their weighted sum.
        logps: (S,) log-probability of each sequence.
        plan: the plan that was carried out.
        aux_loss: the load-balancing loss of a model's routers, which only :func:`logitless.model_loss` sets.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    logps: Tensor
    plan: Plan | None = None
    aux_loss: Tensor | None = None


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
        num_items_in_batch: None = None,
        sequence_group: dist.ProcessGroup | None = None,
        parallel: VocabParallel | None = None,
    ) -> MultiObjectiveOutput:
        """Compute the weighted sum; arguments as in :meth:`FusedLinearPreferenceLoss.forward`, and

        Args:
            objectives: by name. Sequences that none of them uses are not scored.
            num_items_in_batch: must be ``None``: each objective has its own.
        """
        if num_items_in_batch is not None:
            raise ValueError(
                "num_items_in_batch cannot be one for all objectives, each of which divides by its own counts: set "
                "Objective(num_items_in_batch=...) of each"
            )
        self._check_objectives(objectives)
        losses = [objective.loss.loss for objective in objectives.values()]
        call = LossCall.check(hidden, weight, labels, bias, head, cu_seqlens, self.ignore_index, parallel=parallel)
        call = call.with_reference(
            None, ref_hidden, ref_weight, ref_bias, uses=any(loss.uses_reference for loss in losses), needs=False
        )
        call = with_sequence_group(call, sequence_group)
        check_token_arguments(call, token_weights, nll_labels, uses_nll=any(loss.uses_nll for loss in losses))
        terms = [self._term(f"objectives[{name!r}]", objective, call) for name, objective in objectives.items()]
        total, report = eagerly(run)(PreferenceJob(call, frozenset(), terms, token_weights, nll_labels))
        values = {
            name: over(result.losses.sum().to(total.dtype), totals.num_groups) / num_ranks(report.group)
            for name, result, totals in zip(objectives, report.results, report.totals, strict=True)
        }
        return MultiObjectiveOutput(total, values, report.logps, report.plan)

    def count_items(  # type: ignore[override]
        self,
        labels: Tensor,  # (S, T), or packed (N,)
        objectives: Mapping[str, Objective],
        cu_seqlens: Tensor | None = None,  # (S + 1,)
        nll_labels: Tensor | None = None,  # like labels
        sequence_group: dist.ProcessGroup | None = None,
    ) -> dict[str, Tensor]:
        """What each objective divides by, ``(units, tokens)`` by name; see :meth:`FusedLinearPreferenceLoss.count_items`.

        Args:
            labels, objectives, cu_seqlens, nll_labels, sequence_group: as for the call. An objective may have no sequences.

        Raises:
            TypeError, ValueError: naming the argument; for an objective that cannot be divided into micro-batches.

        Example:
            >>> labels = torch.tensor([[5, 6], [7, -100], [8, 9]])
            >>> pairs = Objective(FusedLinearORPOLoss(), sequences=[0, 1])
            >>> {k: v.tolist() for k, v in FusedLinearMultiObjectiveLoss().count_items(labels, {"pairs": pairs}).items()}
            {'pairs': [1.0, 2.0]}
        """
        self._check_objectives(objectives)
        uses_nll = any(objective.loss.loss.uses_nll for objective in objectives.values())
        bounds, count = check_counted_labels(labels, cu_seqlens, nll_labels, uses_nll=uses_nll)
        where, _ = sequence_of_position(labels, bounds)
        of_nll = labels if nll_labels is None else nll_labels
        sizes = torch.bincount(where[of_nll.reshape(-1) != self.ignore_index], minlength=count)
        found = {}
        for name, objective in objectives.items():
            loss, place = objective.loss.loss, f"objectives[{name!r}]"
            counted = loss.counted(f"count_items of {place}")
            term = Term(loss, self._sequences(place, objective, count, may_be_empty=True))
            chosen = torch.tensor(term.nll_sequences, dtype=torch.long, device=sizes.device)
            tokens = 0 if counted.tokens is None else sizes[chosen].sum()
            counts_units = counted.units is not None and first_of_group(sequence_group)
            found[name] = item_counts(term.num_units if counts_units else 0, tokens, labels.device)
        return found

    def _check_objectives(self, objectives: Any) -> None:
        if not isinstance(objectives, Mapping) or not objectives:
            raise TypeError(f"objectives must be a non-empty mapping of names to Objective, got {type(objectives).__name__}")
        for name, objective in objectives.items():
            self._check_objective(f"objectives[{name!r}]", objective)

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

    def _sequences(self, where: str, objective: Objective, count: int, *, may_be_empty: bool) -> tuple[int, ...]:
        """The checked indices of an objective's sequences, of ``count`` in the batch."""
        try:
            indices = torch.as_tensor(objective.sequences, device="cpu").reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{where}.sequences must be integer indices, got {objective.sequences!r}") from error
        if indices.numel() and indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{where}.sequences must be integer indices, got {indices.dtype}")
        sequences = tuple(int(s) for s in indices.tolist())
        bad = [s for s in sequences if not 0 <= s < count]
        if not (sequences or may_be_empty) or bad or len(set(sequences)) != len(sequences):
            least = "" if may_be_empty else ", at least one (or none, with num_items_in_batch)"
            raise ValueError(f"{where}.sequences must be distinct indices in [0, {count}){least}, got {sequences}")
        if objective.loss.loss.group != "sequence" and len(sequences) % 2:
            raise ValueError(f"{where}.sequences must be chosen ones and then as many rejected ones, got {len(sequences)}")
        return sequences

    def _term(self, where: str, objective: Objective, call: LossCall) -> Term:
        """The loss over the objective's sequences; checks what depends on the batch."""
        module, loss, device = objective.loss, objective.loss.loss, call.hidden.device
        given, name = objective.num_items_in_batch, f"{where}.{NAME}"
        sequences = self._sequences(where, objective, call.num_sequences, may_be_empty=given is not None)
        num_items = OF_CALL if given is None else read_num_items(given, loss.counted(name), name)
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
        factor = check_number(f"{where}.weight", objective.weight)
        return Term(loss, sequences, factor, ref_logps, inputs, num_items, name)
