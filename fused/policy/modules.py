"""The policy-loss modules: PPO, the GRPO family, and the base for a loss of your own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from logitless.kernels.core.checks import check_head, check_ignore_index, check_labels, check_spec, check_tensor, compute_dtype
from logitless.kernels.core.dtypes import accumulate_dtype
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.planner.plan import Plan

from ..engine import run
from ..job import Reference
from ..preference.base import check_bool, check_choice, check_layout, check_number, check_reference_states, eagerly
from ..scored_tokens import Entries, make_entries
from .importance import check_clip, importance_sampling_ratio
from .job import PolicyJob, PolicyReport
from .loss import AGGREGATIONS, OPTIONAL_INPUTS, PolicyLoss, PolicyLossResult, Tokens, token_weights
from .losses import grpo as grpo_family
from .losses.ppo import KL_PENALTIES, ppo


@dataclass
class PolicyOutput:
    """What a policy-loss module returns; only ``loss`` carries a gradient.

    Attributes:
        loss: 0-dim, float32 (float64 for float64 input).
        logps: log-probabilities of the labels under the policy, shaped like ``labels``; 0 where nothing is scored.
        entropies: likewise, if the loss or its metrics need them, else ``None``.
        ref_logps: likewise, if the reference was scored here, else ``None``.
        metrics: 0-dim tensors: means over the batch's scored tokens, but for ``clip_ratio/low_min`` and ``/high_max``, over
            sequences.
        plan: what the engine did: schedule, FLOP, bytes.
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
        fn: a function of :class:`logitless.Tokens` that returns one loss a token, or a :class:`logitless.PolicyLossResult`;
            plain differentiable torch on small tensors.
        group: which tokens' coefficients depend on each other: none (``"token"``), those of a ``"sequence"``, or all
            (``"batch"``). A token loss never makes logits twice, whatever the memory budget.
        aggregation: ``"token-mean"`` over all scored tokens, ``"sequence-mean"`` (the mean over sequences of their tokens'
            means), ``"sequence-mean-token-sum"`` (of their sums), ``"fixed-length"`` (of their sums over ``max_length``).
        max_length: for ``"fixed-length"``.
        entropy_coef: weight of the entropy bonus, which is added up as the losses are.
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
    ) -> PolicyOutput:
        """Compute the loss. What stands at positions that are not scored changes nothing.

        Args:
            hidden: hidden states of the policy, float64, float32, bfloat16 or float16; padded ``[S, T, H]``, or packed
                ``[N, H]`` with ``cu_seqlens``.
            weight: the head's weight.
            labels: int32 or int64, already shifted (:func:`logitless.shift`, :func:`logitless.pack`); ``ignore_index`` where
                nothing is scored: prompts, padding, tool output.
            bias: the head's bias.
            head: logit scale, soft-cap, sampling temperature; of the reference's head too.
            advantages: floating point, one of each sequence or of each token.
            old_logps: log-probabilities before this round of updates, as ``linear_logps(...).logps`` or the ``logps`` of an
                earlier output give them. ``None``: those of now, detached (one update a rollout).
            ref_logps: the reference's log-probabilities.
            ref_hidden, ref_weight, ref_bias: or the reference's hidden states and head, scored without gradient in the same
                tiles. Its hidden size may differ.
            cu_seqlens: int32 or int64, where each packed sequence starts and ends.
            num_items_in_batch: what the sum is divided by where this call is one micro-batch of several: the scored tokens of
                all of them for a token mean, else their sequences. Losses of micro-batches then add up to that of one batch.
            sampling_logps: log-probabilities by the engine that sampled, where it is not the trainer.
            importance_sampling_ratio: weights of the tokens' losses, see :func:`logitless.importance_sampling_ratio`.
            entropy_threshold: for GRPO's ``top_entropy_quantile``: the entropy that a token must reach, where it is known
                already (from the entropies of a forward pass, of all processes). Default: the quantile over this call's tokens.

        Returns:
            PolicyOutput: ``loss`` and detached statistics.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        given = {
            "advantages": advantages,
            "old_logps": old_logps,
            "ref_logps": ref_logps,
            "sampling_logps": sampling_logps,
            "importance_sampling_ratio": importance_sampling_ratio,
        }
        batch = _PolicyBatch.check(self, hidden, weight, labels, bias, head, cu_seqlens, given)
        states = self._check_reference(batch, ref_hidden, ref_weight, ref_bias)
        self._check_rollouts(batch.inputs)
        threshold = self._check_threshold(entropy_threshold)
        return eagerly(_PolicyBatch.run)(batch, states, _check_items(num_items_in_batch), threshold)

    def _check_reference(
        self,
        batch: _PolicyBatch,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> Reference | None:
        ref_logps = batch.inputs.get("ref_logps")
        named = {"ref_logps": ref_logps, "ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
        given = [name for name, value in named.items() if value is not None]
        if given and not self.loss.uses_reference:
            raise ValueError(f"{given[0]} is given, but this loss does not use a reference")
        if self.loss.needs_reference and ref_logps is None and ref_hidden is None:
            raise ValueError("this loss needs a reference: pass ref_logps, or ref_hidden and ref_weight")
        if ref_logps is not None and len(given) > 1:
            raise ValueError(f"ref_logps and {given[1]} are given: pass the log-probabilities or the hidden states, not both")
        return check_reference_states(batch.hidden, batch.weight, ref_hidden, ref_weight, ref_bias)

    def _check_rollouts(self, inputs: dict[str, Tensor]) -> None:
        if self.importance_sampling_mode is None:
            for name in OPTIONAL_INPUTS:
                if name in inputs and name not in self.loss.reads:
                    raise ValueError(f"{name} is given, but this loss does not use it")
            return
        if "importance_sampling_ratio" in inputs:
            raise ValueError(
                f"importance_sampling_ratio is given, but importance_sampling_mode={self.importance_sampling_mode!r} makes it "
                "from sampling_logps"
            )
        for name in ("sampling_logps", "old_logps"):
            if name not in inputs:
                raise ValueError(f"{name} is needed by importance_sampling_mode={self.importance_sampling_mode!r}")

    def _bonus_weights(self, weights: Tensor, share: float | Tensor) -> Tensor | None:
        """Of the tokens' entropies, (N,); ``None``: their mean over the loss's ``bonus_mask``. ``share``: of this call."""
        return weights

    def _sequence_metrics(self, report: PolicyReport, entries: Entries) -> dict[str, Tensor]:
        """Metrics that are no means over tokens."""
        return {}

    def _check_threshold(self, threshold: Any) -> Tensor | None:
        """A finite 0-dim tensor, on GPUs unread; only for a loss that waits for the entropies of its batch."""
        if threshold is None:
            return None
        if not self._takes_threshold:
            raise ValueError("entropy_threshold is used with a top_entropy_quantile below 1 only")
        if not isinstance(threshold, Tensor):
            return torch.tensor(check_number("entropy_threshold", threshold), dtype=torch.float64, device="cpu")
        if threshold.numel() != 1 or not threshold.is_floating_point():
            raise ValueError(
                f"entropy_threshold must be one floating point number, got {threshold.dtype} of shape {tuple(threshold.shape)}"
            )
        if threshold.device.type == "cpu":
            check_number("entropy_threshold", threshold.item())
        return threshold.detach().reshape(())

    def extra_repr(self) -> str:
        return f"group={self.loss.group!r}, aggregation={self.aggregation!r}, entropy_coef={self.entropy_coef}"

    #: Whether the loss reads one importance ratio for each sequence, not one for each token; and whole sequences, were the
    #: threshold of the entropies known.
    _reads_sequence_ratios = _reads_sequences = False
    #: Whether its tokens are those of the highest entropy.
    _takes_threshold = False
    #: Where there are as many packed sequences as positions: what ``advantages`` hold one of for each.
    _prefers_sequences = False


class FusedLinearPPOLoss(FusedLinearPolicyLoss):
    """PPO's clipped policy loss, https://huggingface.co/papers/1707.06347, one ratio for each token.

    Its value function is trained with :func:`logitless.value_loss`, on :func:`logitless.gae`'s returns.

    Args:
        clip_low, clip_high: the ratio is clipped to ``[1 - clip_low, 1 + clip_high]``; ``clip_high=None`` for the same.
        dual_clip: for negative advantages, the ratio counts at most this much, https://huggingface.co/papers/1912.09729;
            above ``1 + clip_high``. ``None``: no bound. (verl's ``clip_ratio_c``.)
        kl_coef: weight of the KL penalty in the loss. (In the reward: :func:`logitless.kl_shaped_rewards`.)
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"``, differentiated as they are, or ``"k1+"`` or ``"k3+"``: that value with the
            gradient of ``"k2"``, which on average is the KL divergence's.
        entropy_coef: weight of the entropy bonus.
        aggregation, max_length: as in :class:`FusedLinearPolicyLoss`.
        importance_sampling_mode: corrects for a rollout engine that is not the trainer, from ``sampling_logps``: see
            :func:`logitless.importance_sampling_ratio`. ``None``: no correction.
        importance_sampling_clip_min, importance_sampling_clip_max: the range of its ratios.
        metrics, ignore_index: as in :class:`FusedLinearPolicyLoss`.

    Example:
        >>> loss = FusedLinearPPOLoss(entropy_coef=0.01)
        >>> x, w, y = torch.randn(7, 16), torch.randn(100, 16), torch.randint(100, (7,))
        >>> out = loss(x, w, y, advantages=torch.randn(7), cu_seqlens=torch.tensor([0, 3, 7]))
        >>> out.metrics["ratio"]
        tensor(1.)
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float | None = None,
        dual_clip: float | None = None,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        entropy_coef: float = 0.0,
        aggregation: str = "token-mean",
        max_length: int | None = None,
        importance_sampling_mode: str | None = None,
        importance_sampling_clip_min: float | None = None,
        importance_sampling_clip_max: float | None = 3.0,
        metrics: bool = False,
        ignore_index: int = -100,
    ) -> None:
        nn.Module.__init__(self)
        clip_low = check_number("clip_low", clip_low, 0.0, 1.0)
        clip_high = clip_low if clip_high is None else check_number("clip_high", clip_high, 0.0)
        if dual_clip is not None and check_number("dual_clip", dual_clip) <= 1 + clip_high:
            raise ValueError(f"dual_clip must be above 1 + clip_high = {1 + clip_high}, got {dual_clip}")
        check_choice("kl_estimator", kl_estimator, KL_PENALTIES)
        kl_coef = check_number("kl_coef", kl_coef, 0.0)
        if not kl_coef and kl_estimator != "k3":
            raise ValueError(f"kl_estimator={kl_estimator!r} is used with a kl_coef above 0 only")
        loss = ppo(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_coef=kl_coef, kl_estimator=kl_estimator)
        self._configure(loss, aggregation, max_length, entropy_coef, metrics=metrics, ignore_index=ignore_index)
        self._correct_rollouts(importance_sampling_mode, importance_sampling_clip_min, importance_sampling_clip_max)


class FusedLinearGRPOLoss(FusedLinearPolicyLoss):
    """GRPO, https://huggingface.co/papers/2402.03300, and its family; conventions and defaults of TRL 1.16's ``GRPOTrainer``.

    ==========  ======================================================================  =========================
    loss_type   loss of a token, ratio ``r``, advantage ``A``                           added up as
    ==========  ======================================================================  =========================
    grpo        ``-min(r A, clip(r) A)``                                                sequence-mean
    bnpo, dapo  the same                                                                token-mean
    dr_grpo     the same                                                                fixed-length
    luspo       the same, https://huggingface.co/papers/2602.05261                      sequence-mean-token-sum
    cispo       ``-min(r, epsilon_high) A logp``, the ratio held constant               token-mean
    sapo        ``-(4 / t) sigmoid(t (r - 1)) A``                                       sequence-mean
    vespo       ``-phi(R) A logp``, R the sequence's ratio, held constant               token-mean
    ==========  ======================================================================  =========================

    RLOO, REINFORCE++ and SPO are advantages over the same losses: :func:`logitless.leave_one_out_advantages`,
    :func:`logitless.reinforce_plus_plus_advantages`, :class:`logitless.ValueTracker`.

    Args:
        loss_type: one of :data:`logitless.GRPO_LOSSES`.
        epsilon_low, epsilon_high: the ratio is clipped to ``[1 - epsilon_low, 1 + epsilon_high]``; ``None``: 0.2 for the one,
            the same for the other. ``"cispo"`` bounds the ratio by ``epsilon_high`` itself, which must be given (5.0, say:
            TRL's 0.2 would scale every update by 0.2), and takes no ``epsilon_low``.
        delta: upper bound of the unclipped ratio (two-sided clipping, https://huggingface.co/papers/2505.07291), above
            ``1 + epsilon_high``. ``None``: no bound.
        beta: weight of the KL penalty (k3); needs a reference unless 0.
        use_bias_correction_kl: multiply it by the ratio, https://huggingface.co/papers/2512.02556.
        importance_sampling_level: ``"token"``, or ``"sequence"`` for one ratio a sequence, the geometric mean of its tokens'
            (GSPO, https://huggingface.co/papers/2507.18071).
        max_completion_length: the fixed length of ``"dr_grpo"``.
        sapo_temperature_pos, sapo_temperature_neg: t of ``"sapo"``, https://huggingface.co/papers/2511.20347, for positive and
            for other advantages.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: shape of ``phi(R) = exp(l) R**k exp(-l R)``,
            https://huggingface.co/papers/2602.10693, for advantages that are not negative and for negative ones.
        off_policy_mask_threshold: leave out sequences of negative advantage whose mean ``sampling_logps - logps``
            (``old_logps`` where those are not given) is above it. ``None``: keep all.
        top_entropy_quantile: share of the batch's tokens, those of the highest entropy, whose policy loss (and entropy bonus)
            counts, https://huggingface.co/papers/2506.01939; 1.0 for all. The tokens then wait for each other: pass an
            ``entropy_threshold`` to avoid that (without ``entropy_coef``), or to take it over several processes.
        entropy_coef: weight of the entropy bonus: the mean over tokens, whatever the loss type.
        importance_sampling_mode, importance_sampling_clip_min, importance_sampling_clip_max: as in
            :class:`FusedLinearPPOLoss`; TRL's ``vllm_importance_sampling_...``, which it sets to ``"sequence_mask"`` with vLLM.
        metrics, ignore_index: as in :class:`FusedLinearPolicyLoss`.

    Raises:
        TypeError, ValueError: naming the argument; an argument that the loss type does not use is an error.

    Example:
        >>> loss = FusedLinearGRPOLoss(loss_type="dapo", epsilon_high=0.28)
        >>> x, w, y = torch.randn(4, 6, 16), torch.randn(100, 16), torch.randint(100, (4, 6))
        >>> loss(x, w, y, advantages=torch.tensor([1.0, -1.0, 0.5, -0.5])).loss.shape
        torch.Size([])
    """

    _prefers_sequences = True

    def __init__(
        self,
        loss_type: str = "dapo",
        epsilon_low: float | None = None,
        epsilon_high: float | None = None,
        beta: float = 0.0,
        importance_sampling_level: str = "token",
        delta: float | None = None,
        use_bias_correction_kl: bool = True,
        max_completion_length: int | None = None,
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        off_policy_mask_threshold: float | None = None,
        top_entropy_quantile: float = 1.0,
        entropy_coef: float = 0.0,
        importance_sampling_mode: str | None = None,
        importance_sampling_clip_min: float | None = None,
        importance_sampling_clip_max: float | None = 3.0,
        metrics: bool = False,
        ignore_index: int = -100,
    ) -> None:
        nn.Module.__init__(self)
        check_choice("loss_type", loss_type, grpo_family.GRPO_LOSSES)
        check_choice("importance_sampling_level", importance_sampling_level, grpo_family.LEVELS)
        only = {
            "epsilon_low": (epsilon_low is not None, grpo_family.CLIPPED),
            "epsilon_high": (epsilon_high is not None, (*grpo_family.CLIPPED, "cispo")),
            "delta": (delta is not None, grpo_family.CLIPPED),
            "importance_sampling_level": (importance_sampling_level != "token", (*grpo_family.CLIPPED, "cispo", "sapo")),
            "sapo_temperature_pos": (sapo_temperature_pos != 1.0, ("sapo",)),
            "sapo_temperature_neg": (sapo_temperature_neg != 1.05, ("sapo",)),
            "vespo_k_pos": (vespo_k_pos != 2.0, ("vespo",)),
            "vespo_lambda_pos": (vespo_lambda_pos != 3.0, ("vespo",)),
            "vespo_k_neg": (vespo_k_neg != 3.0, ("vespo",)),
            "vespo_lambda_neg": (vespo_lambda_neg != 2.0, ("vespo",)),
            "max_completion_length": (max_completion_length is not None, ("dr_grpo",)),
        }
        for name, (given, types) in only.items():
            if given and loss_type not in types:
                raise ValueError(f"{name} is not used by loss_type={loss_type!r}, but by {', '.join(types)}")
        if loss_type == "cispo" and epsilon_high is None:
            raise ValueError("epsilon_high must be given for loss_type='cispo', whose ratio it bounds: 5.0, say")
        low = 0.2 if epsilon_low is None else check_number("epsilon_low", epsilon_low, 0.0, 1.0)
        high = check_number("epsilon_high", low if epsilon_high is None else epsilon_high, 0.0)
        if delta is not None and check_number("delta", delta) <= 1 + high:
            raise ValueError(f"delta must be above 1 + epsilon_high = {1 + high}, got {delta}")
        if off_policy_mask_threshold is not None:
            check_number("off_policy_mask_threshold", off_policy_mask_threshold, 0.0)
        beta = check_number("beta", beta, 0.0)
        if not check_bool("use_bias_correction_kl", use_bias_correction_kl) and not beta:
            raise ValueError("use_bias_correction_kl=False is used with a beta above 0 only")
        options = grpo_family.GRPOOptions(
            loss_type=loss_type,
            beta=beta,
            epsilon_low=low,
            epsilon_high=high,
            delta=delta,
            importance_sampling_level=importance_sampling_level,
            use_bias_correction_kl=use_bias_correction_kl,
            sapo_temperature_pos=check_number("sapo_temperature_pos", sapo_temperature_pos, 0.0, open_low=True),
            sapo_temperature_neg=check_number("sapo_temperature_neg", sapo_temperature_neg, 0.0, open_low=True),
            vespo_k_pos=check_number("vespo_k_pos", vespo_k_pos, 0.0),
            vespo_lambda_pos=check_number("vespo_lambda_pos", vespo_lambda_pos, 0.0),
            vespo_k_neg=check_number("vespo_k_neg", vespo_k_neg, 0.0),
            vespo_lambda_neg=check_number("vespo_lambda_neg", vespo_lambda_neg, 0.0),
            off_policy_mask_threshold=off_policy_mask_threshold,
            top_entropy_quantile=check_number("top_entropy_quantile", top_entropy_quantile, 0.0, 1.0, open_low=True),
        )
        self.loss_type, self.options = loss_type, options
        self._configure(
            grpo_family.grpo(options),
            grpo_family.AGGREGATION_OF[loss_type],
            max_completion_length,
            entropy_coef,
            metrics=metrics,
            ignore_index=ignore_index,
            max_length_name="max_completion_length",
        )
        self._correct_rollouts(importance_sampling_mode, importance_sampling_clip_min, importance_sampling_clip_max)
        self._reads_sequence_ratios = loss_type == "vespo"
        self._takes_threshold = options.top_entropy_quantile < 1
        self._reads_sequences = grpo_family.reads_sequences(options)

    def _bonus_weights(self, weights: Tensor, share: float | Tensor) -> Tensor | None:
        if self.options.top_entropy_quantile < 1:
            return None
        return torch.full_like(weights, 1 / max(1, len(weights))) * share

    def _sequence_metrics(self, report: PolicyReport, entries: Entries) -> dict[str, Tensor]:
        """As TRL: the smallest and the largest share of clipped tokens that a sequence has."""
        found = {}
        sizes = torch.tensor(entries.sequence_sizes, device=entries.sequences.device)
        for name, source in (("clip_ratio/low_min", "clip_ratio/low_mean"), ("clip_ratio/high_max", "clip_ratio/high_mean")):
            if source not in report.metrics or not len(entries.rows):
                continue
            values = report.metrics[source]
            sums = values.new_zeros(len(sizes)).index_add_(0, entries.sequences, values)
            shares = (sums / sizes)[sizes > 0]
            found[name] = shares.amin() if name.endswith("min") else shares.amax()
        return found


def _check_items(num_items: Any) -> Tensor | float | None:
    """At least 1: where nothing is scored in all of the batch, there is nothing to divide."""
    if not isinstance(num_items, Tensor):
        return None if num_items is None else max(1.0, check_number("num_items_in_batch", num_items, 0, open_low=True))
    if num_items.numel() != 1 or num_items.dtype == torch.bool or num_items.is_complex():
        raise ValueError(f"num_items_in_batch must be one number, got {num_items.dtype} of shape {tuple(num_items.shape)}")
    number = num_items.detach().reshape(())
    if number.device.type == "cpu":
        check_number("num_items_in_batch", number.item(), 0, open_low=True)
    elif number.is_cuda:
        torch._assert_async((number > 0) & number.isfinite(), "num_items_in_batch must be a finite number above 0")
    return number.clamp(min=1)


#: Inputs with one value a position or one a sequence.
_MAY_BE_OF_SEQUENCES = ("advantages", "importance_sampling_ratio")


@dataclass
class _PolicyBatch:
    """The checked tensors of a call."""

    module: FusedLinearPolicyLoss
    hidden: Tensor  # as given
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    head: HeadSpec
    bounds: list[int] | None
    num_sequences: int
    inputs: dict[str, Tensor]  # by name, like labels or (S,)

    @classmethod
    def check(
        cls,
        module: FusedLinearPolicyLoss,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadSpec | None,
        cu_seqlens: Tensor | None,
        given: dict[str, Tensor | None],
    ) -> _PolicyBatch:
        head = check_spec(head)
        check_head(hidden, weight, bias)
        check_labels(labels, hidden)
        bounds, count = check_layout(labels, cu_seqlens)
        inputs = {}
        for name, value in given.items():
            if value is not None or name == "advantages":
                inputs[name] = _check_values(name, value, labels, count if name in _MAY_BE_OF_SEQUENCES else None)
        return cls(module, hidden, weight, labels, bias, head, bounds, count, inputs)

    def run(
        self,
        states: Reference | None,
        num_items: Tensor | float | None,
        entropy_threshold: Tensor | None,  # 0-dim
    ) -> PolicyOutput:
        """Hand the call to the engine."""
        module, loss = self.module, self.module.loss
        if entropy_threshold is not None and module.entropy_coef == 0:  # no token waits for the others to know if it counts
            loss = replace(loss, group="sequence" if module._reads_sequences else "token")
        groups = [[s] for s in range(self.num_sequences)]
        if loss.group == "batch":
            groups = [[s for group in groups for s in group]]
        entries = make_entries(self.labels, self.bounds, groups, len(self.weight), module.ignore_index)
        inputs, of_sequences = self._gather(entries)
        if entropy_threshold is not None:
            device, wide = entries.rows.device, torch.float32 if entries.rows.device.type == "mps" else torch.float64
            inputs["entropy_threshold"] = entropy_threshold.to(device, wide).expand(len(entries.rows))
        sizes = entries.sequence_sizes
        weights = token_weights(module.aggregation, entries.sequences, sizes, num_items, module.max_length)
        share: float | Tensor = 1.0
        if num_items is not None:
            count = len(weights) if module.aggregation == "token-mean" else self.num_sequences
            share = count / (num_items.to(weights) if isinstance(num_items, Tensor) else num_items)
        job = PolicyJob(
            entries,
            self.head,
            states,
            frozenset({"entropy"} if module.metrics else ()),
            loss,
            weights,
            inputs,
            of_sequences,
            module.entropy_coef,
            module._bonus_weights(weights, share),
            share,
        )
        x = self.hidden.to(compute_dtype(self.hidden)).reshape(-1, self.hidden.shape[-1])
        value, report = run(job, x, self.weight, self.bias)
        return self._output(value, report, entries, accumulate_dtype(x.dtype))

    def _gather(self, entries: Entries) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The inputs of the scored tokens, in the order of the entries, and those of the sequences."""
        module, flat = self.module, {}
        given = dict(self.inputs)
        if module.importance_sampling_mode is not None:
            low, high = module.importance_sampling_clip
            bounds = self.bounds
            offsets = None if bounds is None else torch.tensor(bounds, device=self.labels.device)
            given["importance_sampling_ratio"] = importance_sampling_ratio(
                given["old_logps"],
                given["sampling_logps"].to(given["old_logps"].dtype),
                cu_seqlens=offsets,
                mask=self.labels != module.ignore_index,
                mode=module.importance_sampling_mode,
                clip_min=low,
                clip_max=high,
            )
        if "sampling_logps" not in module.loss.reads:
            given.pop("sampling_logps", None)
        of_sequences = {}
        for name, value in given.items():
            by_sequence = value.shape != self.labels.shape
            if name == "importance_sampling_ratio" and module.importance_sampling_mode is not None:
                by_sequence = module.importance_sampling_mode.startswith("sequence_")
            elif name in _MAY_BE_OF_SEQUENCES and value.shape == self.labels.shape == (self.num_sequences,):
                by_sequence = module._prefers_sequences  # packed, as many sequences as positions: both are possible
            if not by_sequence:
                flat[name] = value.reshape(-1)[entries.rows]
            elif name == "importance_sampling_ratio" and module._reads_sequence_ratios:
                of_sequences["sequence_importance_sampling_ratio"] = value
            else:
                flat[name] = value[entries.sequences]
        return flat, of_sequences

    def _output(self, loss: Tensor, report: PolicyReport, entries: Entries, dtype: torch.dtype) -> PolicyOutput:
        def spread(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            out = torch.zeros(self.labels.numel(), dtype=dtype, device=values.device)
            return out.index_copy_(0, entries.rows, values.to(dtype)).view(self.labels.shape)

        metrics = {name: _mean(values) for name, values in report.metrics.items()}
        if report.entropies is not None:
            metrics["entropy"] = _mean(report.entropies)
        metrics |= self.module._sequence_metrics(report, entries)
        logps = spread(report.logps)
        assert logps is not None
        return PolicyOutput(
            loss=loss,
            logps=logps,
            entropies=spread(report.entropies),
            ref_logps=spread(report.ref_logps) if "ref_logps" not in self.inputs else None,
            metrics={name: value.to(dtype) for name, value in metrics.items()},
            plan=report.plan,
        )


def _mean(values: Tensor) -> Tensor:
    """The mean; 0 of nothing."""
    return values.sum() / max(1, len(values))


def _check_values(name: str, value: Any, labels: Tensor, num_sequences: int | None) -> Tensor:
    """Floating point and shaped like labels, or, unless ``num_sequences`` is None, with one value a sequence; detached."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    wanted = [tuple(labels.shape)]
    if num_sequences is not None:
        wanted.append((num_sequences,))
    if tuple(value.shape) not in wanted:
        accepted = " or ".join(map(str, wanted))
        what = "like labels" + (", or one value a sequence" if len(wanted) > 1 else "")
        raise ValueError(f"{name} must have shape {accepted} ({what}), got {tuple(value.shape)}")
    if value.device != labels.device:
        raise ValueError(f"{name} is on {value.device} but labels is on {labels.device}: move one of them")
    detached: Tensor = value.detach()
    return detached
