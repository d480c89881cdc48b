"""The base of the policy-loss modules, which is also the module for a user's own loss, and what the modules return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

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
from ..checks import check_bool, check_choice, check_number
from ..engine import run
from ..num_items import OF_CALL, Counted, NumItems, item_counts, read_num_items
from ..sequence_group import first_of_group, with_sequence_group
from .aggregation import AGGREGATIONS, Aggregation
from .importance import check_clip
from .inputs import InputOptions, PolicyInputs, RolloutCorrection
from .job import BonusWeights, PolicyJob, PolicyReport
from .loss import OPTIONAL_INPUTS, PolicyLoss, PolicyLossResult, Tokens


@dataclass
class PolicyOutput:
    """What a policy-loss module returns; only ``loss`` (and ``aux_loss``) carries a gradient.

    Attributes:
        loss: 0-dim, float32 (float64 for float64 input).
        logps: log-probabilities of the labels under the policy, shaped like ``labels``; 0 where nothing is scored.
        entropies: likewise, if the loss or its metrics need them, else ``None``.
        ref_logps: likewise, if the reference was scored here, else ``None``.
        metrics: 0-dim tensors: means over the batch's scored tokens, except ``clip_ratio/low_min`` and ``/high_max``, which
            are extrema over sequences. The names do not depend on the data; without scored tokens all are 0.
        plan: the plan that was carried out: schedule, FLOP, bytes.
        aux_loss: the load-balancing loss of a model's routers, which only :func:`logitless.model_loss` sets.
    """

    loss: Tensor
    logps: Tensor
    entropies: Tensor | None
    ref_logps: Tensor | None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    plan: Plan | None = None
    aux_loss: Tensor | None = None


class FusedLinearPolicyLoss(nn.Module):
    """Base of the policy losses, and the module for one of your own.

    Args:
        fn: a function of :class:`logitless.Tokens` that returns one loss per token, or a :class:`logitless.PolicyLossResult`;
            plain differentiable torch on small tensors.
        group: which tokens' coefficients depend on each other: none (``"token"``), those of a ``"sequence"``, or all
            (``"batch"``). A token loss computes logits once, whatever the memory budget.
        aggregation: ``"token-mean"`` over all scored tokens, ``"sequence-mean"`` (the mean over sequences of the mean over
            their tokens), ``"sequence-mean-token-sum"`` (of the sum), ``"fixed-length"`` (of the sum over ``max_length``).
        max_length: for ``"fixed-length"``.
        entropy_coef: weight of the entropy bonus, aggregated like the losses.
        uses_reference, needs_reference, uses_entropy, entropy_gradient, reads: see :class:`logitless.PolicyLoss`.
        metrics: also compute the entropy for the metrics, in the same pass.
        ignore_index: the label of positions to leave out.

    Example:
        >>> reinforce = FusedLinearPolicyLoss(lambda tokens: -tokens.advantages * tokens.logps)
        >>> x, w, y = torch.randn(2, 6, 16), torch.randn(100, 16), torch.randint(100, (2, 6))
        >>> reinforce(x, w, y, advantages=torch.tensor([1.0, -1.0])).loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        fn: Callable[[Tokens], Tensor | PolicyLossResult],
        *,
        group: str = "token",
        aggregation: str = "token-mean",
        max_length: int | None = None,
        entropy_coef: float = 0.0,
        uses_reference: bool = False,
        needs_reference: bool = False,
        uses_entropy: bool = False,
        entropy_gradient: bool = False,
        reads: Sequence[str] = (),
        metrics: bool = False,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        loss = PolicyLoss(
            fn,
            group,  # type: ignore[arg-type]
            check_bool("needs_reference", needs_reference),
            check_bool("uses_reference", uses_reference) or needs_reference,
            check_bool("uses_entropy", uses_entropy) or check_bool("entropy_gradient", entropy_gradient),
            entropy_gradient,
            tuple(reads),
        )
        self._configure(loss, aggregation, max_length, entropy_coef, metrics=metrics, ignore_index=ignore_index)

    def _configure(
        self,
        loss: PolicyLoss,
        aggregation: str,
        max_length: int | None,
        entropy_coef: float,
        *,
        metrics: bool,
        ignore_index: int,
        max_length_name: str = "max_length",
    ) -> None:
        check_ignore_index(ignore_index)
        check_choice("aggregation", aggregation, AGGREGATIONS)
        if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int)):
            raise TypeError(f"{max_length_name} must be an int, got {max_length!r}")
        if aggregation == "fixed-length" and (max_length is None or max_length < 1):
            raise ValueError(f"{max_length_name} must be at least 1 for losses divided by a fixed length, got {max_length}")
        if aggregation != "fixed-length" and max_length is not None:
            raise ValueError(f"{max_length_name} is used where losses are divided by a fixed length only; it must be None")
        self.loss, self.aggregation, self.max_length = loss, aggregation, max_length
        self.entropy_coef = check_number("entropy_coef", entropy_coef)
        self.metrics, self.ignore_index = check_bool("metrics", metrics), ignore_index
        self.importance_sampling_mode: str | None = None
        self.importance_sampling_clip: tuple[float | None, float | None] = (None, None)

    def _correct_rollouts(self, mode: str | None, clip_min: float | None, clip_max: float | None) -> None:
        """How ``sampling_logps`` become weights of the tokens' losses."""
        if mode is not None:
            check_clip(clip_min, clip_max, mode, "importance_sampling_")
        elif clip_min is not None or clip_max != 3.0:
            raise ValueError("importance_sampling_clip_min and _max need an importance_sampling_mode")
        self.importance_sampling_mode, self.importance_sampling_clip = mode, (clip_min, clip_max)

    def forward(
        self,
        hidden: Tensor,  # (S, T, H), or packed (N, H)
        weight: Weight,  # (V, H)
        labels: Tensor,  # (S, T), or packed (N,)
        bias: Tensor | None = None,  # (V,)
        head: HeadSpec | None = None,
        *,
        advantages: Tensor,  # (S,), or like labels
        old_logps: Tensor | None = None,  # like labels
        ref_logps: Tensor | None = None,  # like labels
        ref_hidden: Tensor | None = None,  # like hidden, up to its last dimension
        ref_weight: Weight | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (S + 1,)
        num_items_in_batch: Tensor | Sequence[Tensor | float] | float | None = None,  # 0-dim, or (2,)
        sampling_logps: Tensor | None = None,  # like labels
        importance_sampling_ratio: Tensor | None = None,  # (S,), or like labels
        entropy_threshold: Tensor | float | None = None,  # 0-dim
        temperature: Tensor | None = None,  # like labels
        sequence_group: dist.ProcessGroup | None = None,
        parallel: VocabParallel | None = None,
    ) -> PolicyOutput:
        """Compute the loss. Values at positions that are not scored are ignored.

        Args:
            hidden: hidden states of the policy, float64, float32, bfloat16 or float16; padded ``[S, T, H]``, or packed
                ``[N, H]`` with ``cu_seqlens``.
            weight: the head's weight: a tensor, or any other of :func:`logitless.linear_logps`.
            labels: int32 or int64, already shifted (:func:`logitless.shift`, :func:`logitless.pack`); ``ignore_index`` where
                nothing is scored: prompts, padding, tool output.
            bias: the head's bias.
            head: logit scale, soft-cap, sampling temperature; of the reference's head too.
            advantages: floating point, one per sequence or per token.
            old_logps: log-probabilities before this round of updates: ``linear_logps(...).logps``, or the ``logps`` of an
                earlier output. ``None``: the current ones, detached (one update per rollout).
            ref_logps: the reference's log-probabilities.
            ref_hidden, ref_weight, ref_bias: or the reference's hidden states and head, scored without gradient in the same
                tiles. Its hidden size may differ.
            cu_seqlens: int32 or int64, where each packed sequence starts and ends.
            num_items_in_batch: what to divide by if this call is one of several micro-batches: :meth:`count_items`, added over
                all of them. Their losses and gradients then add up to those of one batch. One number is accepted where the loss
                has one count. A count may be 0 if nothing is scored here; the loss is then 0.
            sampling_logps: log-probabilities of the rollout engine, if it is not the trainer.
            importance_sampling_ratio: weights of the tokens' losses, see :func:`logitless.rl.importance_sampling_ratio`.
            entropy_threshold: for GRPO's ``top_entropy_quantile``: the entropy that a token must reach, if it is known
                already (from the entropies of a forward pass, of all processes). Default: the quantile over this call's tokens.
            temperature: sampling temperature of each token, float32 or float64, positive: for samples of one batch that were
                drawn at different temperatures. In place of the head's, for the reference too.
            sequence_group: the ranks that share every sequence (context parallelism, Ulysses). ``hidden``, ``labels`` and other
                arguments like ``labels`` are those of this rank's positions; every rank passes all sequences in one order, also
                those of which it has no position. ``loss`` and gradients are this rank's share: their sum over the group is
                that of one process. Metrics are those of one process. See ``docs/distributed.md``.
            parallel: ``weight``, ``bias``, ``ref_weight`` and ``ref_bias`` are this rank's rows of heads sharded over their
                vocabulary, see :class:`logitless.VocabParallel`. Every rank of its group must make the same calls.

        Returns:
            PolicyOutput: ``loss`` and detached statistics.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        call = LossCall.check(hidden, weight, labels, bias, head, cu_seqlens, self.ignore_index, temperature, parallel)
        call = with_sequence_group(call, sequence_group)
        inputs = PolicyInputs.check(call, advantages, old_logps, sampling_logps, importance_sampling_ratio, entropy_threshold)
        call = call.with_reference(
            ref_logps,
            ref_hidden,
            ref_weight,
            ref_bias,
            uses=self.loss.uses_reference,
            needs=self.loss.needs_reference,
            per_token=True,
        )
        self._check_use(inputs)
        num_items = self._num_items(num_items_in_batch, inputs)
        loss = self.loss
        if inputs.entropy_threshold is not None and self.entropy_coef == 0:  # tokens do not depend on the batch's entropies
            loss = replace(loss, group="sequence" if self._reads_sequences else "token")
        if call.sequence_group is not None and loss.group == "batch":
            other = "pass an entropy_threshold, and no entropy_coef" if self._takes_threshold else "declare group='sequence'"
            raise ValueError(
                f"sequence_group cannot be used with a loss that depends on all tokens of a batch at once: {other}, or give "
                "each rank whole sequences"
            )
        job = PolicyJob(
            call,
            frozenset({"entropy"} if self.metrics else ()),
            loss,
            inputs,
            self._input_options(),
            Aggregation(self.aggregation, self.max_length, num_items),
            self.entropy_coef,
            self._bonus_weights,
        )
        value, report = eagerly(run)(job)
        return self._output(value, report, call)

    def count_items(
        self,
        labels: Tensor,  # (S, T), or packed (N,)
        cu_seqlens: Tensor | None = None,  # (S + 1,)
        nll_labels: None = None,
        sequence_group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """What the loss of these sequences divides by: ``(units, tokens)``.

        Add the counts of all micro-batches, data-parallel ranks and ranks of ``sequence_group`` of an optimiser step, and pass
        the sum to each call as ``num_items_in_batch``. No communication.

        Args:
            labels, cu_seqlens, sequence_group: as for the call. The first rank of ``sequence_group`` counts the sequences, each
                rank its own tokens.
            nll_labels: must be ``None``: policy losses have no NLL term.

        Returns:
            Tensor: (2,) float64, on the device of the labels: the number of sequences, and of scored tokens; 0 for a count that
            the loss does not use.

        Raises:
            TypeError, ValueError: naming the argument; for a loss that cannot be divided into micro-batches.

        Example:
            >>> loss = FusedLinearGRPOLoss("grpo", entropy_coef=0.01)
            >>> loss.count_items(torch.tensor([[5, 6, -100], [7, -100, -100]])).tolist()
            [2.0, 3.0]
        """
        counted = self._counted("count_items")
        _, count = check_counted_labels(labels, cu_seqlens, nll_labels, uses_nll=False)
        tokens = 0 if counted.tokens is None else (labels != self.ignore_index).sum()
        counts_units = counted.units is not None and first_of_group(sequence_group)
        return item_counts(count if counts_units else 0, tokens, labels.device)

    def _counted(self, name: str) -> Counted:
        """What the loss divides by; an error, which says that ``name`` cannot be used, if it cannot be divided."""
        if self._takes_threshold and self.entropy_coef != 0:
            raise ValueError(
                f"{name} cannot be used with entropy_coef and a top_entropy_quantile below 1: the bonus is divided by the "
                "number of tokens above the threshold, which labels do not tell. Set entropy_coef=0, or use one call"
            )
        if self.loss.group == "batch" and not self._takes_threshold:
            raise ValueError(
                f"{name} cannot be used with a loss of group='batch', which depends on all sequences at once: pass all of them "
                "in one call, or declare group='sequence'"
            )
        of_tokens = self.aggregation == "token-mean"
        bonus_of_tokens = self.entropy_coef != 0 and self._bonus_weights == "token-mean"
        return Counted(None if of_tokens else "sequences", "scored tokens" if of_tokens or bonus_of_tokens else None)

    def _num_items(self, given: object, inputs: PolicyInputs) -> NumItems:
        if given is None:
            return OF_CALL
        if self._takes_threshold and inputs.entropy_threshold is None:
            raise ValueError(
                "num_items_in_batch needs an entropy_threshold with a top_entropy_quantile below 1: the quantile of one "
                "micro-batch is not that of all of them"
            )
        return read_num_items(given, self._counted("num_items_in_batch"))

    def _check_use(self, inputs: PolicyInputs) -> None:
        """Arguments that this loss does not use are errors, and so are missing ones that it needs."""
        if inputs.entropy_threshold is not None and not self._takes_threshold:
            raise ValueError("entropy_threshold is used with a top_entropy_quantile below 1 only")
        mode = self.importance_sampling_mode
        if mode is None:
            for name in OPTIONAL_INPUTS:
                if getattr(inputs, name) is not None and name not in self.loss.reads:
                    raise ValueError(f"{name} is given, but this loss does not use it")
            return
        if inputs.importance_sampling_ratio is not None:
            raise ValueError(
                f"importance_sampling_ratio is given, but importance_sampling_mode={mode!r} makes it from sampling_logps"
            )
        for name in ("sampling_logps", "old_logps"):
            if getattr(inputs, name) is None:
                raise ValueError(f"{name} is needed by importance_sampling_mode={mode!r}")

    def _input_options(self) -> InputOptions:
        mode = self.importance_sampling_mode
        return InputOptions(
            correction=None if mode is None else RolloutCorrection(mode, *self.importance_sampling_clip),
            reads_sampling="sampling_logps" in self.loss.reads,
            sequence_ratios=self._reads_sequence_ratios,
            prefers_sequences=self._prefers_sequences,
        )

    def _sequence_metrics(self, report: PolicyReport) -> dict[str, Tensor]:
        """Metrics that are not means over tokens."""
        return {}

    def _output(self, loss: Tensor, report: PolicyReport, call: LossCall) -> PolicyOutput:
        dtype, labels, rows = report.logps.dtype, call.labels, report.tokens.rows

        def like_labels(values: Tensor) -> Tensor:
            out = torch.zeros(labels.numel(), dtype=dtype, device=values.device)
            return out.index_copy_(0, rows, values.to(dtype)).view(labels.shape)

        named = report.metrics if report.entropies is None else report.metrics | {"entropy": report.entropies}
        metrics = report.token_means(named)
        metrics |= self._sequence_metrics(report)
        ref_logps = report.ref_logps if call.reference.logps is None else None  # scored here
        return PolicyOutput(
            loss=loss,
            logps=like_labels(report.logps),
            entropies=None if report.entropies is None else like_labels(report.entropies),
            ref_logps=None if ref_logps is None else like_labels(ref_logps),
            metrics={name: value.to(dtype) for name, value in metrics.items()},
            plan=report.plan,
        )

    def extra_repr(self) -> str:
        return f"group={self.loss.group!r}, aggregation={self.aggregation!r}, entropy_coef={self.entropy_coef}"

    #: Whether the loss reads one importance ratio per sequence, not per token.
    _reads_sequence_ratios = False
    #: Whether the loss of a token depends on its sequence, apart from a threshold of the batch's entropies.
    _reads_sequences = False
    #: Whether its tokens are those of the highest entropy.
    _takes_threshold = False
    #: If there are as many packed sequences as positions, whether ``advantages`` have one value per sequence.
    _prefers_sequences = False
    _bonus_weights: BonusWeights = "losses"
