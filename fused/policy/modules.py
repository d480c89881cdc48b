"""The policy-loss modules: PPO and the GRPO family."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_bool, check_choice, check_number
from .base import FusedLinearPolicyLoss
from .job import PolicyReport
from .losses import grpo as grpo_family
from .losses.ppo import KL_PENALTIES, ppo


class FusedLinearPPOLoss(FusedLinearPolicyLoss):
    """PPO's clipped policy loss, https://huggingface.co/papers/1707.06347, with one ratio per token.

    Train the value function with :func:`logitless.value_loss`, on the returns of :func:`logitless.gae`.

    Args:
        clip_low, clip_high: the ratio is clipped to ``[1 - clip_low, 1 + clip_high]``; ``clip_high=None`` for the same.
        dual_clip: upper bound of the ratio for negative advantages, https://huggingface.co/papers/1912.09729; above
            ``1 + clip_high``. ``None``: no bound. (verl's ``clip_ratio_c``.)
        kl_coef: weight of the KL penalty in the loss. (For a penalty in the reward: :func:`logitless.rl.kl_shaped_rewards`.)
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"``, differentiated as they are, or ``"k1+"`` or ``"k3+"``: that value with the
            gradient of ``"k2"``, which in expectation is the gradient of the KL divergence.
        entropy_coef: weight of the entropy bonus.
        aggregation, max_length: as in :class:`FusedLinearPolicyLoss`.
        importance_sampling_mode: corrects for a rollout engine that is not the trainer, from ``sampling_logps``: see
            :func:`logitless.rl.importance_sampling_ratio`. ``None``: no correction.
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
    """GRPO, https://huggingface.co/papers/2402.03300, and its family, with the conventions of TRL 1.16's ``GRPOTrainer``.

    ==========  ======================================================================  =========================
    loss_type   loss of a token, ratio ``r``, advantage ``A``                           aggregation
    ==========  ======================================================================  =========================
    grpo        ``-min(r A, clip(r) A)``                                                sequence-mean
    bnpo, dapo  the same                                                                token-mean
    dr_grpo     the same                                                                fixed-length
    luspo       the same, https://huggingface.co/papers/2602.05261                      sequence-mean-token-sum
    cispo       ``-min(r, epsilon_high) A logp``, the ratio held constant               token-mean
    sapo        ``-(4 / t) sigmoid(t (r - 1)) A``                                       sequence-mean
    vespo       ``-phi(R) A logp``, R the sequence's ratio, held constant               token-mean
    ==========  ======================================================================  =========================

    RLOO, REINFORCE++ and SPO are advantages for the same losses: :func:`logitless.rl.leave_one_out_advantages`,
    :func:`logitless.rl.reinforce_plus_plus_advantages`, :class:`logitless.rl.ValueTracker`.

    Args:
        loss_type: one of the table.
        epsilon_low, epsilon_high: the ratio is clipped to ``[1 - epsilon_low, 1 + epsilon_high]``. ``epsilon_low`` defaults to
            0.2, ``epsilon_high`` to ``epsilon_low``. ``"cispo"`` bounds the ratio by ``epsilon_high`` itself, which must be
            given (such as 5.0; TRL's 0.2 would scale every update by 0.2), and takes no ``epsilon_low``.
        delta: upper bound of the unclipped ratio (two-sided clipping, https://huggingface.co/papers/2505.07291), above
            ``1 + epsilon_high``. ``None``: no bound.
        beta: weight of the KL penalty (k3); needs a reference unless 0.
        use_bias_correction_kl: multiply it by the ratio, https://huggingface.co/papers/2512.02556.
        importance_sampling_level: ``"token"``, or ``"sequence"`` for one ratio per sequence, the geometric mean over its tokens
            (GSPO, https://huggingface.co/papers/2507.18071).
        max_completion_length: the fixed length of ``"dr_grpo"``.
        sapo_temperature_pos, sapo_temperature_neg: t of ``"sapo"``, https://huggingface.co/papers/2511.20347, for positive and
            for other advantages.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: shape of ``phi(R) = exp(l) R**k exp(-l R)``,
            https://huggingface.co/papers/2602.10693, for advantages that are not negative and for negative ones.
        off_policy_mask_threshold: leave out sequences of negative advantage whose mean ``sampling_logps - logps``
            (``old_logps`` where those are not given) is above it. ``None``: keep all.
        top_entropy_quantile: share of the batch's tokens, those of the highest entropy, whose policy loss (and entropy bonus)
            counts, https://huggingface.co/papers/2506.01939; 1.0 for all. Which tokens count is known only after the whole
            batch was scored: pass an ``entropy_threshold`` to avoid that (without ``entropy_coef``), or to use one threshold
            for several processes.
        entropy_coef: weight of the entropy bonus, which is a mean over tokens for every loss type.
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
        used_by = {
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
        for name, (given, types) in used_by.items():
            if given and loss_type not in types:
                raise ValueError(f"{name} is not used by loss_type={loss_type!r}, but by {', '.join(types)}")
        if loss_type == "cispo" and epsilon_high is None:
            raise ValueError("epsilon_high must be given for loss_type='cispo', whose ratio it bounds: for example 5.0")
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
        self._bonus_weights = "masked-mean" if self._takes_threshold else "token-mean"

    def _sequence_metrics(self, report: PolicyReport) -> dict[str, Tensor]:
        """The smallest and the largest share of clipped tokens that a sequence has, as TRL; 0 without scored tokens."""
        if self.loss_type not in grpo_family.CLIPPED:
            return {}
        low, high = "clip_ratio/low_mean", "clip_ratio/high_mean"
        shares, filled = report.sequence_means({name: report.metrics[name] for name in (low, high)})
        zero = filled.new_zeros(1, dtype=shares[low].dtype)  # of a batch without sequences
        smallest = torch.where(filled, shares[low], 1)  # a share is at most 1
        return {
            "clip_ratio/low_min": torch.cat((smallest, zero + 1)).amin() * filled.any(),
            "clip_ratio/high_max": torch.cat((shares[high], zero)).amax(),
        }
