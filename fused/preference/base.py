"""The base of the preference-loss modules, which is also the module for a user's own loss, and what the modules return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn

from logitless.kernels.core.autograd import eagerly
from logitless.kernels.core.checks import check_ignore_index, check_labels, check_token_weights
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.head_weight import Weight
from logitless.kernels.parallel.vocab_parallel import VocabParallel
from logitless.kernels.planner.plan import Plan

from ..call import LossCall, check_counted_labels
from ..checks import check_bool, check_data
from ..engine import run
from ..num_items import NAME, OF_CALL, NumItems, item_counts, read_num_items
from ..scored_tokens import ScoredTokens
from ..sequence_group import check_position_ids, first_of_group, with_sequence_group
from .job import PreferenceJob, PreferenceReport, Term
from .loss import Margin, PreferenceLoss, PreferenceLossResult
from .metrics import TOKEN_STATS, kto_metrics, pair_metrics


@dataclass
class PreferenceOutput:
    """What a preference-loss module returns; only ``loss`` (and ``aux_loss``) carries a gradient.

    Attributes:
        loss: 0-dim, float32 (float64 for float64 input).
        logps: (S,) log-probability of each sequence: the (weighted) sum over its scored tokens.
        chosen_logps, rejected_logps: (P,) log-probabilities that the loss is a function of: sums over scored tokens, or for
            losses of length-normalised log-probabilities (SimPO, ORPO, CPO ``ipo``) their means. Empty for a sequence loss.
        chosen_rewards, rejected_rewards: (P,) implicit rewards, as TRL logs them.
        ref_logps: (S,) reference log-probabilities, where they were given or computed here.
        metrics: 0-dim tensors under TRL's names; empty unless the module was made with ``metrics=True``. The names do not
            depend on the data; a mean over nothing is 0.
        plan: the plan that was carried out: schedule, FLOP, bytes.
        aux_loss: the load-balancing loss of a model's routers, which only :func:`logitless.model_loss` sets.
    """

    loss: Tensor
    logps: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    ref_logps: Tensor | None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    plan: Plan | None = None
    aux_loss: Tensor | None = None


@dataclass
class KTOOutput:
    """What :class:`FusedLinearKTOLoss` returns; only ``loss`` (and ``aux_loss``) carries a gradient.

    Attributes:
        loss: 0-dim.
        logps: (S,) log-probability of each sequence.
        rewards: (S,) ``beta * (logps - ref_logps)``.
        desirable: (S,) bool, as given.
        ref_logps: (S,).
        metrics: under TRL's names, which do not depend on the data: 0 for a class that is absent.
        plan: the plan that was carried out.
        aux_loss: the load-balancing loss of a model's routers, which only :func:`logitless.model_loss` sets.
    """

    loss: Tensor
    logps: Tensor
    rewards: Tensor
    desirable: Tensor
    ref_logps: Tensor | None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    plan: Plan | None = None
    aux_loss: Tensor | None = None

    @property
    def chosen_logps(self) -> Tensor:
        """Those of the desirable sequences."""
        return self.logps[self.desirable]

    @property
    def rejected_logps(self) -> Tensor:
        """Those of the other sequences."""
        return self.logps[~self.desirable]

    @property
    def chosen_rewards(self) -> Tensor:
        """Those of the desirable sequences."""
        return self.rewards[self.desirable]

    @property
    def rejected_rewards(self) -> Tensor:
        """Those of the other sequences."""
        return self.rewards[~self.desirable]


class FusedLinearPreferenceLoss(nn.Module):
    """Base of all preference-loss modules, and the module for a loss of your own.

    Args:
        fn: a function of :class:`logitless.Pairs` (or :class:`logitless.Sequences` with ``group="sequence"``) that returns one
            loss per group, or a :class:`logitless.PreferenceLossResult`; plain differentiable torch on small tensors.
        group: ``"pair"``, ``"sequence"`` or ``"batch"``: which sequences' coefficients depend on each other.
        margin: see :class:`logitless.PreferenceLoss`.
        needs_reference, uses_nll: see :class:`logitless.PreferenceLoss`.
        metrics: also compute metrics (entropy, mean logits, token accuracy ...) in the same pass.
        ignore_index: the label of positions to leave out.

    Example:
        >>> import torch.nn.functional as F
        >>> def hinge(pairs):
        ...     return F.relu(1 - (pairs.chosen_logps - pairs.rejected_logps))
        >>> loss = FusedLinearPreferenceLoss(hinge, margin="sum")
        >>> x, w = torch.randn(4, 6, 16), torch.randn(100, 16)
        >>> loss(x, w, torch.randint(100, (4, 6))).loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        fn: Callable[..., Tensor | PreferenceLossResult],
        *,
        group: str = "pair",
        margin: Margin | None = None,
        needs_reference: bool = False,
        uses_nll: bool = False,
        metrics: bool = False,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        loss = PreferenceLoss(fn, group, margin, needs_reference, uses_nll, optional_reference=True)  # type: ignore[arg-type]
        self._configure(loss, metrics=metrics, ignore_index=ignore_index)

    def _configure(self, loss: PreferenceLoss, *, metrics: bool, ignore_index: int, mean_logps: bool = False) -> None:
        check_ignore_index(ignore_index)
        self.loss, self.metrics = loss, check_bool("metrics", metrics)
        self.ignore_index, self._mean_logps = ignore_index, mean_logps

    def forward(
        self,
        hidden: Tensor,  # (S, T, H), or packed (N, H)
        weight: Weight,  # (V, H)
        labels: Tensor,  # (S, T), or packed (N,)
        bias: Tensor | None = None,  # (V,)
        head: HeadSpec | None = None,
        ref_logps: Tensor | None = None,  # (S,)
        ref_hidden: Tensor | None = None,  # like hidden, up to its last dimension
        ref_weight: Weight | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (S + 1,)
        token_weights: Tensor | None = None,  # like labels
        nll_labels: Tensor | None = None,  # like labels
        num_items_in_batch: Tensor | Sequence[Tensor | float] | float | None = None,  # 0-dim, or (2,)
        sequence_group: dist.ProcessGroup | None = None,
        position_ids: Tensor | None = None,  # like labels
        parallel: VocabParallel | None = None,
    ) -> PreferenceOutput:
        """Compute the loss. Sequences are stacked: the chosen ones, then the matching rejected ones.

        Args:
            hidden: hidden states of the policy, float64, float32, bfloat16 or float16; padded ``[S, T, H]``, or packed
                ``[N, H]`` with ``cu_seqlens``.
            weight: the head's weight: a tensor, or any other of :func:`logitless.linear_logps`.
            labels: int32 or int64, already shifted (:func:`logitless.shift`); ``ignore_index`` where nothing is scored.
            bias: the head's bias.
            head: logit scale, soft-cap, temperature; of the reference's head too.
            ref_logps: the reference's log-probability of each sequence, weighted like the policy's.
            ref_hidden, ref_weight, ref_bias: or the reference's hidden states and head, scored without gradient in the same
                tiles. Its hidden size may differ.
            cu_seqlens: int32 or int64, where each packed sequence starts and ends.
            token_weights: weight of each token's log-probability in its sequence's sum (step- and token-level DPO).
            nll_labels: labels of the NLL term where they differ from ``labels`` (ORPO scores prompt and response).
            num_items_in_batch: what to divide by if this call is one of several micro-batches: :meth:`count_items`, added over
                all of them. Their losses and gradients then add up to those of one batch. One number is accepted where the loss
                has one count. A count may be 0 if nothing is scored here; the loss is then 0.
            sequence_group: the ranks that share every sequence (context parallelism, Ulysses). ``hidden``, ``labels`` and other
                arguments like ``labels`` are those of this rank's positions; every rank passes all sequences in one order, also
                those of which it has no position. ``ref_logps`` and all results with one value per sequence are of whole
                sequences, metrics are those of one process. ``loss`` and the gradients of the head are this rank's share: their
                sum over the group is that of one process. See ``docs/distributed.md``.
            position_ids: with ``ld_alpha`` and ``sequence_group``, the position of each label in its whole sequence; int32 or
                int64.
            parallel: ``weight``, ``bias``, ``ref_weight`` and ``ref_bias`` are this rank's rows of heads sharded over their
                vocabulary, see :class:`logitless.VocabParallel`. Every rank of its group must make the same calls.

        Returns:
            PreferenceOutput: ``loss`` and detached log-probabilities, rewards and metrics.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        call = LossCall.check(hidden, weight, labels, bias, head, cu_seqlens, self.ignore_index, parallel=parallel)
        call = with_sequence_group(call, sequence_group)
        self._check_pairs(call.num_sequences)
        call = call.with_reference(
            ref_logps, ref_hidden, ref_weight, ref_bias, uses=self.loss.uses_reference, needs=self.loss.needs_reference
        )
        check_token_arguments(call, token_weights, nll_labels, uses_nll=self.loss.uses_nll)
        check_position_ids(call, position_ids, needed=self._reads_ranks and sequence_group is not None)
        num_items = self._num_items(num_items_in_batch)
        term = Term(self.loss, tuple(range(call.num_sequences)), ref_logps=call.reference.logps, num_items=num_items)
        loss, report = eagerly(run)(self._job(call, [term], token_weights, nll_labels, position_ids))
        return self._output(loss, report, term)

    def count_items(
        self,
        labels: Tensor,  # (S, T), or packed (N,)
        cu_seqlens: Tensor | None = None,  # (S + 1,)
        nll_labels: Tensor | None = None,  # like labels
        sequence_group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """What the loss of these sequences divides by: ``(units, tokens)``.

        Add the counts of all micro-batches, data-parallel ranks and ranks of ``sequence_group`` of an optimiser step, and pass
        the sum to each call as ``num_items_in_batch``. No communication.

        Args:
            labels, cu_seqlens, nll_labels, sequence_group: as for the call. The first rank of ``sequence_group`` counts the
                sequences, each rank its own tokens.

        Returns:
            Tensor: (2,) float64, on the device of the labels: the number of pairs (sequences for a loss of single sequences),
            and of tokens of the NLL term; 0 for a count that the loss does not use.

        Raises:
            TypeError, ValueError: naming the argument; for a loss that cannot be divided into micro-batches.

        Example:
            >>> FusedLinearORPOLoss().count_items(torch.tensor([[5, 6, -100], [7, -100, -100]])).tolist()
            [1.0, 2.0]
        """
        counted = self.loss.counted("count_items")
        bounds, count = check_counted_labels(labels, cu_seqlens, nll_labels, uses_nll=self.loss.uses_nll)
        self._check_pairs(count)
        units = count if self.loss.group == "sequence" else count // 2
        tokens: Tensor | int = 0
        if counted.tokens is not None:
            of_nll = labels if nll_labels is None else nll_labels
            tokens = (of_nll[: units if bounds is None else bounds[units]] != self.ignore_index).sum()
        counts_units = counted.units is not None and first_of_group(sequence_group)
        return item_counts(units if counts_units else 0, tokens, labels.device)

    def _num_items(self, given: object) -> NumItems:
        return OF_CALL if given is None else read_num_items(given, self.loss.counted(NAME))

    def _check_pairs(self, num_sequences: int) -> None:
        if self.loss.group != "sequence" and num_sequences % 2:
            raise ValueError(
                f"labels must hold an even number of sequences, chosen first and then rejected, got {num_sequences}"
            )

    #: Whether ``token_weights`` reads the ranks of tokens in their sequences.
    _reads_ranks = False

    def token_weights(self, tokens: ScoredTokens) -> Tensor | None:
        """The weight of each scored token in its sequence's log-probability, (N,); ``None``: 1. LD-DPO overrides this."""
        return tokens.weights

    def _job(
        self,
        call: LossCall,
        terms: list[Term],
        token_weights: Tensor | None,
        nll_labels: Tensor | None,
        position_ids: Tensor | None = None,
    ) -> PreferenceJob:
        outputs = TOKEN_STATS if self.metrics else frozenset()
        return PreferenceJob(call, outputs, terms, token_weights, nll_labels, position_ids, self.token_weights)

    def _output(self, loss: Tensor, report: PreferenceReport, term: Term) -> PreferenceOutput:
        result = report.results[0]
        logps = report.logps / report.lengths.clamp(min=1) if self._mean_logps else report.logps
        acc, empty = logps.dtype, logps.new_zeros(0)
        half = len(logps) // 2
        chosen, rejected = (empty, empty) if self.loss.group == "sequence" else (logps[:half], logps[half:])
        return PreferenceOutput(
            loss=loss,
            logps=report.logps,
            chosen_logps=chosen,
            rejected_logps=rejected,
            chosen_rewards=empty if result.chosen_rewards is None else result.chosen_rewards.to(acc),
            rejected_rewards=empty if result.rejected_rewards is None else result.rejected_rewards.to(acc),
            ref_logps=report.ref_logps if term.ref_logps is None else term.ref_logps,
            metrics=pair_metrics(report, term, chosen, rejected) if self.metrics else {},
            plan=report.plan,
        )


def check_token_arguments(call: LossCall, token_weights: Tensor | None, nll_labels: Tensor | None, *, uses_nll: bool) -> None:
    """Arguments of preference losses with one value per position. ``uses_nll``: whether a loss has an NLL term."""
    check_data("token_weights", token_weights)
    check_data("nll_labels", nll_labels)
    if token_weights is not None:
        check_token_weights(token_weights, call.labels)
        if token_weights.requires_grad:
            raise ValueError("token_weights must not require a gradient: detach it, or use sequence_logps")
    if nll_labels is not None:
        if not uses_nll:
            raise ValueError("nll_labels is given, but this loss has no NLL term")
        check_labels(nll_labels, call.hidden, "nll_labels")


def kto_output(loss: Tensor, report: PreferenceReport, term: Term, *, metrics: bool) -> KTOOutput:
    """The output of KTO, whose only term has the flags ``desirable``."""
    rewards = report.results[0].metrics["rewards"].to(report.logps.dtype)
    return KTOOutput(
        loss,
        report.logps,
        rewards,
        term.inputs["desirable"],
        report.ref_logps if term.ref_logps is None else term.ref_logps,
        kto_metrics(report, term, rewards) if metrics else {},
        report.plan,
    )
