"""The base of the policy-loss modules, which is also the module for a user's own loss, and what the modules return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from logitless.kernels.core.checks import check_ignore_index
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.planner.plan import Plan

from ..call import LossCall
from ..checks import check_bool, check_choice, check_number
from ..engine import eagerly, run
from ..results import mean_or_zero
from .aggregation import AGGREGATIONS, Aggregation
from .importance import check_clip
from .inputs import InputOptions, PolicyInputs, RolloutCorrection
from .job import BonusWeights, PolicyJob, PolicyReport
from .loss import OPTIONAL_INPUTS, PolicyLoss, PolicyLossResult, Tokens


@dataclass
class PolicyOutput:
    """What a policy-loss module returns; only ``loss`` carries a gradient.

    Attributes:
        loss: 0-dim, float32 (float64 for float64 input).
        logps: log-probabilities of the labels under the policy, shaped like ``labels``; 0 where nothing is scored.
        entropies: likewise, if the loss or its metrics need them, else ``None``.
        ref_logps: likewise, if the reference was scored here, else ``None``.
        metrics: 0-dim tensors: means over the batch's scored tokens, except ``clip_ratio/low_min`` and ``/high_max``, which
            are extrema over sequences. The names do not depend on the data; without scored tokens all are 0.
        plan: the plan that was carried out: schedule, FLOP, bytes.
    """

    loss: Tensor
    logps: Tensor
    entropies: Tensor | None
    ref_logps: Tensor | None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    plan: Plan | None = None


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
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (S, T), or packed (N,)
        bias: Tensor | None = None,  # (V,)
        head: HeadSpec | None = None,
        *,
        advantages: Tensor,  # (S,), or like labels
        old_logps: Tensor | None = None,  # like labels
        ref_logps: Tensor | None = None,  # like labels
        ref_hidden: Tensor | None = None,  # like hidden, up to its last dimension
        ref_weight: Tensor | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (S + 1,)
        num_items_in_batch: Tensor | float | None = None,
        sampling_logps: Tensor | None = None,  # like labels
        importance_sampling_ratio: Tensor | None = None,  # (S,), or like labels
        entropy_threshold: Tensor | float | None = None,  # 0-dim
        temperature: Tensor | None = None,  # like labels
    ) -> PolicyOutput:
        """Compute the loss. Values at positions that are not scored are ignored.

        Args:
            hidden: hidden states of the policy, float64, float32, bfloat16 or float16; padded ``[S, T, H]``, or packed
                ``[N, H]`` with ``cu_seqlens``.
            weight: the head's weight.
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
            num_items_in_batch: what the sum is divided by if this call is one of several micro-batches: the scored tokens of
                all of them for a token mean, else their sequences. Losses of micro-batches then add up to that of one batch.
                0 is accepted if nothing is scored; the loss is then 0.
            sampling_logps: log-probabilities of the rollout engine, if it is not the trainer.
            importance_sampling_ratio: weights of the tokens' losses, see :func:`logitless.rl.importance_sampling_ratio`.
            entropy_threshold: for GRPO's ``top_entropy_quantile``: the entropy that a token must reach, if it is known
                already (from the entropies of a forward pass, of all processes). Default: the quantile over this call's tokens.
            temperature: sampling temperature of each token, float32 or float64, positive: for samples of one batch that were
                drawn at different temperatures. In place of the head's, for the reference too.

        Returns:
            PolicyOutput: ``loss`` and detached statistics.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        call = LossCall.check(hidden, weight, labels, bias, head, cu_seqlens, self.ignore_index, temperature)
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
        loss = self.loss
        if inputs.entropy_threshold is not None and self.entropy_coef == 0:  # tokens do not depend on the batch's entropies
            loss = replace(loss, group="sequence" if self._reads_sequences else "token")
        job = PolicyJob(
            call,
            frozenset({"entropy"} if self.metrics else ()),
            loss,
            inputs,
            self._input_options(),
            Aggregation(self.aggregation, self.max_length, num_items_in_batch),
            self.entropy_coef,
            self._bonus_weights,
        )
        value, report = eagerly(run)(job)
        return self._output(value, report, call)

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

        metrics = {name: mean_or_zero(values) for name, values in report.metrics.items()}
        if report.entropies is not None:
            metrics["entropy"] = mean_or_zero(report.entropies)
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
