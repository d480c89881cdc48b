"""The preference-loss modules: DPO, IPO, SimPO, CPO, ORPO and KTO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from logitless.kernels.core.autograd import eagerly
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.head_weight import Weight
from logitless.kernels.parallel.vocab_parallel import VocabParallel

from ..call import LossCall
from ..checks import check_bool, check_choice, check_data, check_number, check_per_sequence
from ..engine import run
from ..scored_tokens import ScoredTokens
from ..sequence_group import with_sequence_group
from .base import FusedLinearPreferenceLoss, KTOOutput, check_token_arguments, kto_output
from .job import Term
from .losses import dpo as dpo_family
from .losses import kto as kto_family
from .losses import simple


class FusedLinearDPOLoss(FusedLinearPreferenceLoss):
    """DPO and its variants on hidden states: https://huggingface.co/papers/2305.18290.

    Conventions and defaults are those of TRL 1.16's ``DPOTrainer``, except that ``label_smoothing`` of ``"sigmoid"`` gives
    cDPO (TRL ignores it there).

    Args:
        beta: weight of the KL regularisation towards the reference; for ``"ipo"`` the paper's tau. Positive.
        loss_type: one of :data:`~logitless.fused.preference.losses.dpo.DPO_LOSSES`, or several.
        loss_weights: weight of each loss type; default 1 each.
        label_smoothing: probability that a label is flipped, for ``sigmoid`` (cDPO), ``robust`` (below 0.5), ``exo_pair``
            (above 0), ``aot`` and ``aot_unpaired``.
        length_normalize: for ``"ipo"``: per-token log-ratios (TRL, the authors' choice) or the paper's sums.
        f_divergence_type: ``reverse_kl``, ``forward_kl``, ``js_divergence`` or ``alpha_divergence``.
        f_alpha_divergence_coef: alpha of the last.
        ld_alpha: LD-DPO's weight of the tokens beyond the shorter response of a pair, in [0, 1]; ``None``: 1.
        use_weighting: WPO's weights.
        discopop_tau: temperature of ``"discopop"``.
        reference_free: run without a reference, as if its log-probabilities were 0.
        metrics: also compute metrics, under TRL's names, in the same pass over the logits.
        ignore_index: the label of positions to leave out.

    Raises:
        TypeError, ValueError: naming the argument; an argument that the loss type does not use is an error.

    Example:
        >>> loss = FusedLinearDPOLoss(beta=0.1)
        >>> x, w, y = torch.randn(4, 6, 16), torch.randn(100, 16), torch.randint(100, (4, 6))
        >>> round(loss(x, w, y, ref_hidden=x, ref_weight=w).loss.item(), 4)
        0.6931
    """

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        length_normalize: bool = True,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = dpo_family.F_ALPHA,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        discopop_tau: float = dpo_family.DISCOPOP_TAU,
        reference_free: bool = False,
        metrics: bool = False,
        ignore_index: int = -100,
    ) -> None:
        nn.Module.__init__(self)
        beta = check_number("beta", beta, 0.0, open_low=True)
        if not isinstance(loss_type, (str, list, tuple)) or not loss_type:
            raise ValueError(f"loss_type must name one loss type or several, got {loss_type!r}")
        types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
        for name in types:
            check_choice("loss_type", name, dpo_family.DPO_LOSSES)
        if loss_weights is not None and not isinstance(loss_weights, (list, tuple)):
            raise TypeError(f"loss_weights must be a list of numbers, one per loss_type, got {loss_weights!r}")
        weights = [1.0] * len(types) if loss_weights is None else [check_number("loss_weights", w) for w in loss_weights]
        check_bool("use_weighting", use_weighting)
        check_bool("reference_free", reference_free)
        check_bool("length_normalize", length_normalize)
        if len(weights) != len(types):
            raise ValueError(f"loss_weights must have {len(types)} values, one per loss_type, got {len(weights)}")
        kinds = set(types)
        label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)
        if label_smoothing and not kinds & dpo_family.SMOOTHED:
            raise ValueError(f"label_smoothing is not used by loss_type={types}; it must be 0, got {label_smoothing}")
        if "robust" in kinds and label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5) for loss_type='robust', got {label_smoothing}")
        if "exo_pair" in kinds and not 0 < label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in (0, 1) for loss_type='exo_pair', got {label_smoothing}")
        if use_weighting and kinds & dpo_family.BATCH_COUPLED:
            raise ValueError(
                f"use_weighting is not defined for loss_type={sorted(kinds & dpo_family.BATCH_COUPLED)}, which sort the pairs"
            )
        check_choice("f_divergence_type", f_divergence_type, dpo_family.F_DIVERGENCES)
        if f_divergence_type != "reverse_kl" and not kinds <= dpo_family.DIVERGENT:
            raise ValueError(
                f"f_divergence_type must be 'reverse_kl' for loss_type={sorted(kinds - dpo_family.DIVERGENT)}, got "
                f"{f_divergence_type!r}"
            )
        f_alpha = check_number("f_alpha_divergence_coef", f_alpha_divergence_coef)
        if f_alpha != dpo_family.F_ALPHA and f_divergence_type != "alpha_divergence":
            raise ValueError("f_alpha_divergence_coef is used by f_divergence_type='alpha_divergence' only")
        if not length_normalize and "ipo" not in kinds:
            raise ValueError("length_normalize is used by loss_type='ipo' only")
        tau = check_number("discopop_tau", discopop_tau, 0.0, open_low=True)
        if tau != dpo_family.DISCOPOP_TAU and "discopop" not in kinds:
            raise ValueError("discopop_tau is used by loss_type='discopop' only")
        self.ld_alpha = None if ld_alpha is None else check_number("ld_alpha", ld_alpha, 0.0, 1.0)
        self.beta, self.loss_type = beta, types
        loss = dpo_family.dpo(
            types,
            weights,
            dpo_family.DPOOptions(beta, label_smoothing, length_normalize, tau),
            f_divergence_type=f_divergence_type,
            f_alpha_divergence_coef=f_alpha,
            use_weighting=use_weighting,
            reference_free=reference_free,
        )
        self._configure(loss, metrics=metrics, ignore_index=ignore_index)

    @property
    def _reads_ranks(self) -> bool:  # type: ignore[override]
        return self.ld_alpha is not None

    def token_weights(self, tokens: ScoredTokens) -> Tensor | None:
        """LD-DPO, https://huggingface.co/papers/2409.06411: ``ld_alpha`` beyond the length that both responses share."""
        if self.ld_alpha is None:
            return tokens.weights
        sizes = tokens.counted_sizes()
        half = len(sizes) // 2
        shorter = [min(sizes[i % half], sizes[i % half + half]) for i in range(len(sizes))]
        shared = torch.tensor(shorter, device=tokens.device)
        within = tokens.ranks < shared[tokens.sequences]
        weights = within.double() + self.ld_alpha * (~within).double()  # torch.where of two numbers would round them to float32
        return weights if tokens.weights is None else tokens.weights * weights


class FusedLinearIPOLoss(FusedLinearDPOLoss):
    """IPO, https://huggingface.co/papers/2310.12036: :class:`FusedLinearDPOLoss` with ``loss_type="ipo"``.

    Args:
        beta: the paper's tau.
        length_normalize: per-token log-ratios, or the paper's sums.
        metrics, ignore_index: as in :class:`FusedLinearDPOLoss`.

    Example:
        >>> x, w, y = torch.randn(4, 6, 16), torch.randn(100, 16), torch.randint(100, (4, 6))
        >>> round(FusedLinearIPOLoss(beta=0.5)(x, w, y, ref_hidden=x, ref_weight=w).loss.item(), 4)  # (0 - 1 / (2 beta))**2
        1.0
    """

    def __init__(
        self, beta: float = 0.1, length_normalize: bool = True, metrics: bool = False, ignore_index: int = -100
    ) -> None:
        super().__init__(beta, "ipo", length_normalize=length_normalize, metrics=metrics, ignore_index=ignore_index)


class FusedLinearSimPOLoss(FusedLinearPreferenceLoss):
    """SimPO, https://huggingface.co/papers/2405.14734: ``-logsig(beta * (mean logp difference) - gamma)``.

    Args:
        beta: reward scale. Positive.
        gamma: target margin, absolute (TRL's ``simpo_gamma``).
        label_smoothing: probability that a label is flipped, in [0, 1].
        alpha: AlphaPO's reward shape, https://huggingface.co/papers/2501.03884; 0 for SimPO.
        metrics, ignore_index: as in :class:`FusedLinearDPOLoss`.

    Example:
        >>> x, w, y = torch.randn(4, 6, 16), torch.randn(100, 16), torch.randint(100, (4, 6))
        >>> FusedLinearSimPOLoss()(x, w, y).chosen_logps.shape
        torch.Size([2])
    """

    def __init__(
        self,
        beta: float = 2.0,
        gamma: float = 1.0,
        label_smoothing: float = 0.0,
        alpha: float = 0.0,
        metrics: bool = False,
        ignore_index: int = -100,
    ) -> None:
        nn.Module.__init__(self)
        loss = simple.simpo(
            beta=check_number("beta", beta, 0.0, open_low=True),
            gamma=check_number("gamma", gamma),
            label_smoothing=check_number("label_smoothing", label_smoothing, 0.0, 1.0),
            alpha=check_number("alpha", alpha),
        )
        self._configure(loss, metrics=metrics, ignore_index=ignore_index, mean_logps=True)


class FusedLinearCPOLoss(FusedLinearPreferenceLoss):
    """CPO, https://huggingface.co/papers/2401.08417: a loss of the log-prob margin plus ``cpo_alpha`` times the chosen NLL.

    Args:
        beta: reward scale. Positive.
        cpo_alpha: weight of the token-mean NLL of the chosen sequences.
        loss_type: ``"sigmoid"``, ``"hinge"`` or ``"ipo"`` (which takes per-token means).
        label_smoothing: for ``"sigmoid"``, in [0, 1].
        alpha: AlphaPO's reward shape; 0 for none.
        metrics, ignore_index: as in :class:`FusedLinearDPOLoss`.

    Example:
        >>> x, w, y = torch.zeros(4, 6, 16), torch.randn(100, 16), torch.randint(100, (4, 6))
        >>> round(FusedLinearCPOLoss(cpo_alpha=0.0)(x, w, y).loss.item(), 4)  # log 2: chosen and rejected are equally likely
        0.6931
    """

    def __init__(
        self,
        beta: float = 0.1,
        cpo_alpha: float = 1.0,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        alpha: float = 0.0,
        metrics: bool = False,
        ignore_index: int = -100,
    ) -> None:
        nn.Module.__init__(self)
        check_choice("loss_type", loss_type, simple.CPO_LOSSES)
        label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)
        if label_smoothing and loss_type != "sigmoid":
            raise ValueError(f"label_smoothing is not used by loss_type={loss_type!r}; it must be 0, got {label_smoothing}")
        loss = simple.cpo(
            beta=check_number("beta", beta, 0.0, open_low=True),
            cpo_alpha=check_number("cpo_alpha", cpo_alpha, 0.0),
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            alpha=check_number("alpha", alpha),
        )
        self._configure(loss, metrics=metrics, ignore_index=ignore_index, mean_logps=loss_type == "ipo")


class FusedLinearORPOLoss(FusedLinearPreferenceLoss):
    """ORPO, https://huggingface.co/papers/2403.07691: token-mean NLL of the chosen minus ``beta * logsig(log-odds ratio)``.

    Pass ``nll_labels`` to take the NLL over prompt and response, as TRL does.

    Args:
        beta: weight of the odds-ratio term (the paper's lambda).
        metrics, ignore_index: as in :class:`FusedLinearDPOLoss`.

    Example:
        >>> x, w, y = torch.zeros(4, 6, 16), torch.randn(100, 16), torch.randint(100, (4, 6))
        >>> round(FusedLinearORPOLoss(beta=0.1)(x, w, y).loss.item(), 4)  # log 100 + 0.1 log 2
        4.6745
    """

    def __init__(self, beta: float = 0.1, metrics: bool = False, ignore_index: int = -100) -> None:
        nn.Module.__init__(self)
        loss = simple.orpo(beta=check_number("beta", beta, 0.0))
        self._configure(loss, metrics=metrics, ignore_index=ignore_index, mean_logps=True)


class FusedLinearKTOLoss(FusedLinearPreferenceLoss):
    """KTO, https://huggingface.co/papers/2402.01306, on single sequences that are desirable or not.

    Args:
        beta: reward scale. Positive.
        desirable_weight, undesirable_weight: the paper's lambda_D and lambda_U; at least 0.
        loss_type: ``"kto"`` or ``"apo_zero_unpaired"``.
        metrics, ignore_index: as in :class:`FusedLinearDPOLoss`.

    Example:
        >>> x, w, y = torch.randn(3, 6, 16), torch.randn(100, 16), torch.randint(100, (3, 6))
        >>> loss = FusedLinearKTOLoss()
        >>> flags = torch.tensor([True, False, True])
        >>> round(loss(x, w, y, desirable=flags, ref_hidden=x, ref_weight=w, kl=0.0).loss.item(), 4)
        0.5
    """

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss_type: str = "kto",
        metrics: bool = False,
        ignore_index: int = -100,
    ) -> None:
        nn.Module.__init__(self)
        self.loss_type = check_choice("loss_type", loss_type, kto_family.KTO_LOSSES)
        loss = kto_family.kto(
            beta=check_number("beta", beta, 0.0, open_low=True),
            desirable_weight=check_number("desirable_weight", desirable_weight, 0.0),
            undesirable_weight=check_number("undesirable_weight", undesirable_weight, 0.0),
            loss_type=loss_type,
        )
        self._configure(loss, metrics=metrics, ignore_index=ignore_index)

    def check_inputs(self, desirable: Any, kl: Any, count: int, device: torch.device, prefix: str = "") -> dict[str, Tensor]:
        """The checked ``desirable`` and ``kl`` by name; errors name them with the prefix."""
        inputs = {"desirable": check_per_sequence(prefix + "desirable", desirable, count, device, boolean=True)}
        name = prefix + "kl"
        check_data(name, kl)
        if self.loss_type != "kto":
            if kl is not None:
                raise ValueError(f"{name} is not used by loss_type={self.loss_type!r}; it must be None")
            return inputs
        if kl is None:
            raise ValueError(f"{name} is needed by loss_type='kto': the mean KL-pair log-ratio, or 0.0 to leave it out")
        wide = torch.float32 if device.type == "mps" else torch.float64
        value = kl.detach() if isinstance(kl, Tensor) else torch.full((), check_number(name, kl), dtype=wide, device=device)
        if value.numel() != 1 or not (value.is_floating_point() or value.dtype in (torch.int32, torch.int64)):
            raise ValueError(f"{name} must be one number, got {value.dtype} of shape {tuple(value.shape)}")
        inputs["kl"] = value.reshape(()).to(device, wide if value.dtype == torch.float64 else torch.float32)
        return inputs

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,  # (S, T, H), or packed (N, H)
        weight: Weight,  # (V, H)
        labels: Tensor,  # (S, T), or packed (N,)
        desirable: Tensor,  # (S,) bool
        bias: Tensor | None = None,
        head: HeadSpec | None = None,
        ref_logps: Tensor | None = None,  # (S,)
        kl: Tensor | float | None = None,  # 0-dim
        ref_hidden: Tensor | None = None,
        ref_weight: Weight | None = None,
        ref_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items_in_batch: Tensor | Sequence[Tensor | float] | float | None = None,  # 0-dim, or (2,)
        sequence_group: dist.ProcessGroup | None = None,
        parallel: VocabParallel | None = None,
    ) -> KTOOutput:
        """Compute the loss; arguments as in :meth:`FusedLinearPreferenceLoss.forward`, and

        Args:
            desirable: whether each sequence is desirable. Bool.
            kl: mean log-ratio of the KL pairs; detached, and clamped at 0 from below, here. For ``"kto"`` only. A Python number
                must be finite. The value of a tensor is not checked, which would synchronise: if it is NaN, so is the loss.
                With ``num_items_in_batch``, pass the mean over the whole optimiser step to each call; with
                ``sequence_group``, that of whole sequences.
        """
        call = LossCall.check(hidden, weight, labels, bias, head, cu_seqlens, self.ignore_index, parallel=parallel)
        call = call.with_reference(ref_logps, ref_hidden, ref_weight, ref_bias, uses=True, needs=True)
        call = with_sequence_group(call, sequence_group)
        check_token_arguments(call, token_weights, None, uses_nll=False)
        inputs = self.check_inputs(desirable, kl, call.num_sequences, hidden.device)
        sequences, num_items = tuple(range(call.num_sequences)), self._num_items(num_items_in_batch)
        term = Term(self.loss, sequences, ref_logps=call.reference.logps, inputs=inputs, num_items=num_items)
        loss, report = eagerly(run)(self._job(call, [term], token_weights, None))
        return kto_output(loss, report, term, metrics=self.metrics)
