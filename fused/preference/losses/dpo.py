"""The DPO family: fifteen loss types over chosen and rejected log-ratios, four f-divergences, weighted mixes, WPO."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bounds import bounded_exponent, bounded_power, bounded_square
from ..loss import ClosedForm, Margin, Pairs, PreferenceLoss, PreferenceLossResult

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
DISCOPOP_TAU = 0.05
F_ALPHA = 0.5


@dataclass(frozen=True)
class DPOOptions:
    """Parameters of a DPO loss; see :class:`logitless.FusedLinearDPOLoss`."""

    beta: float
    label_smoothing: float = 0.0
    length_normalize: bool = True
    discopop_tau: float = DISCOPOP_TAU


class Scores(NamedTuple):
    """Arguments of the loss types: log-ratios and scores, each (p,), and the pairs that they come from."""

    chosen_logratios: Tensor
    rejected_logratios: Tensor
    chosen: Tensor  # the log-ratios, seen through the f-divergence
    rejected: Tensor
    pairs: Pairs

    @property
    def delta(self) -> Tensor:
        return self.chosen - self.rejected

    @property
    def mean_delta(self) -> Tensor:
        pairs = self.pairs
        return self.chosen / pairs.chosen_lengths.clamp(min=1) - self.rejected / pairs.rejected_lengths.clamp(min=1)


def _smoothed(h: Tensor, epsilon: float) -> Tensor:
    if epsilon == 0:
        return -F.logsigmoid(h)
    return -(1 - epsilon) * F.logsigmoid(h) - epsilon * F.logsigmoid(-h)


def sigmoid(s: Scores, o: DPOOptions) -> Tensor:
    """DPO, https://huggingface.co/papers/2305.18290 eq. 7; with label smoothing cDPO."""
    return _smoothed(o.beta * s.delta, o.label_smoothing)


def robust(s: Scores, o: DPOOptions) -> Tensor:
    """Robust DPO, https://huggingface.co/papers/2403.00409: unbiased under a label flip rate of ``label_smoothing``."""
    h, e = o.beta * s.delta, o.label_smoothing
    return (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)


def hinge(s: Scores, o: DPOOptions) -> Tensor:
    """SLiC hinge, https://huggingface.co/papers/2305.10425, on the log-ratio margin."""
    return torch.relu(1 - o.beta * s.delta)


def ipo(s: Scores, o: DPOOptions) -> Tensor:
    """IPO, https://huggingface.co/papers/2310.12036 eq. 17; per scored token unless ``length_normalize=False``.

    The margin is bounded at plus and minus ``exp(40)`` (:mod:`logitless.fused.bounds`).
    """
    return bounded_square(s.mean_delta if o.length_normalize else s.delta, 1 / (2 * o.beta))


def exo_pair(s: Scores, o: DPOOptions) -> Tensor:
    """EXO-pref, https://huggingface.co/papers/2402.00856 eq. 16: KL of the model's preference from a smoothed label."""
    h = o.beta * s.delta
    log_qw, log_ql = F.logsigmoid(h), F.logsigmoid(-h)
    return log_qw.exp() * (log_qw - math.log1p(-o.label_smoothing)) + log_ql.exp() * (log_ql - math.log(o.label_smoothing))


def nca_pair(s: Scores, o: DPOOptions) -> Tensor:
    """NCA, https://huggingface.co/papers/2402.05369."""
    chosen, rejected = o.beta * s.chosen_logratios, o.beta * s.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(s: Scores, o: DPOOptions) -> Tensor:
    """BCO on pairs, https://huggingface.co/papers/2404.04656, as TRL's DPOTrainer has it (no running reward shift)."""
    return -F.logsigmoid(o.beta * s.chosen_logratios) - F.logsigmoid(-o.beta * s.rejected_logratios)


def sppo_hard(s: Scores, o: DPOOptions) -> Tensor:
    """SPPO with hard labels, https://huggingface.co/papers/2405.00675 eq. 4.7."""
    return (s.chosen_logratios - 0.5 / o.beta) ** 2 + (s.rejected_logratios + 0.5 / o.beta) ** 2


def aot(s: Scores, o: DPOOptions) -> Tensor:
    """AOT, https://huggingface.co/papers/2406.05882: margins compared after sorting policy and reference over the batch."""
    p = s.pairs
    margins = (p.chosen_logps - p.rejected_logps).sort(dim=0).values
    ref_margins = (p.ref_chosen_logps - p.ref_rejected_logps).sort(dim=0).values
    return _smoothed(o.beta * (margins - ref_margins), o.label_smoothing)


def aot_unpaired(s: Scores, o: DPOOptions) -> Tensor:
    """Unpaired AOT: chosen and rejected log-ratios sorted over the batch, then compared."""
    delta = s.chosen_logratios.sort(dim=0).values - s.rejected_logratios.sort(dim=0).values
    return _smoothed(o.beta * delta, o.label_smoothing)


def apo_zero(s: Scores, o: DPOOptions) -> Tensor:
    """APO-zero, https://huggingface.co/papers/2408.06266 eq. 7: chosen up, rejected down."""
    return torch.sigmoid(-o.beta * s.chosen_logratios) + torch.sigmoid(o.beta * s.rejected_logratios)


def apo_down(s: Scores, o: DPOOptions) -> Tensor:
    """APO-down, https://huggingface.co/papers/2408.06266 eq. 8: both down, rejected more."""
    return torch.sigmoid(o.beta * s.chosen_logratios) + torch.sigmoid(-o.beta * (s.chosen_logratios - s.rejected_logratios))


def discopop(s: Scores, o: DPOOptions) -> Tensor:
    """DiscoPOP's log-ratio modulated loss, https://huggingface.co/papers/2406.08414 eq. 5; exponents are bounded at 80."""
    h = o.beta * s.delta
    # exp(-h) overflows where its weight vanishes, so their logarithms are added
    weighted = torch.exp(bounded_exponent(F.logsigmoid(h / o.discopop_tau) - h))
    return -F.logsigmoid(h) * torch.sigmoid(-h / o.discopop_tau) + weighted


def sft(s: Scores, o: DPOOptions) -> Tensor:
    """Token-mean NLL of the chosen sequences (RPO's term)."""
    return s.pairs.chosen_nll()


def sigmoid_norm(s: Scores, o: DPOOptions) -> Tensor:
    """DPO on length-normalised log-ratios, https://huggingface.co/papers/2411.15124."""
    return -F.logsigmoid(o.beta * s.mean_delta)


#: Add a loss type here: a function of :class:`Scores` and :class:`DPOOptions` that returns one loss a pair.
DPO_LOSSES: dict[str, Callable[[Scores, DPOOptions], Tensor]] = {
    f.__name__: f
    for f in (
        sigmoid,
        hinge,
        ipo,
        exo_pair,
        nca_pair,
        robust,
        bco_pair,
        sppo_hard,
        aot,
        aot_unpaired,
        apo_zero,
        apo_down,
        discopop,
        sft,
        sigmoid_norm,
    )
}
#: Loss types that use ``label_smoothing``, that are defined for every f-divergence, and that couple the pairs of a batch.
SMOOTHED = {"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"}
DIVERGENT = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
BATCH_COUPLED = {"aot", "aot_unpaired"}
#: The functions of the margin that a backend may compute in closed form, by loss type.
CLOSED_FORMS = {"sigmoid": "log_sigmoid", "hinge": "hinge", "ipo": "square"}
_SUM_MARGIN = {"sigmoid", "hinge", "robust", "exo_pair", "discopop"}


def f_divergence_score(logratios: Tensor, kind: str, alpha: float) -> Tensor:
    """``f'(pi / pi_ref)`` up to a constant, https://huggingface.co/papers/2309.16240 table 1. logratios (p,) -> (p,).

    The exponent of ``forward_kl`` (``-logratios``) and of ``alpha_divergence`` (``(alpha - 1) * logratios``) is bounded at 80,
    as TRL bounds the latter in float32: beyond it the score is constant and has gradient 0. For an alpha within 0.05 of 1, see
    :func:`logitless.fused.bounds.bounded_power`.
    """
    if kind == "forward_kl":
        return -torch.expm1(bounded_exponent(-logratios))
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return bounded_power(logratios, alpha - 1)
    return logratios


def _dpo(
    pairs: Pairs,
    loss_types: tuple[str, ...],
    loss_weights: tuple[float, ...],
    options: DPOOptions,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
    use_weighting: bool,
) -> PreferenceLossResult:
    chosen = pairs.chosen_logps - pairs.ref_chosen_logps
    rejected = pairs.rejected_logps - pairs.ref_rejected_logps
    seen = [f_divergence_score(r, f_divergence_type, f_alpha_divergence_coef) for r in (chosen, rejected)]
    scores = Scores(chosen, rejected, seen[0], seen[1], pairs)
    weights: Tensor | float = 1.0
    if use_weighting:  # WPO, https://huggingface.co/papers/2406.11827 eq. 2
        assert pairs.confidence is not None
        chosen_confidence, rejected_confidence = pairs.split(pairs.confidence)
        weights = torch.exp(chosen_confidence) * torch.exp(rejected_confidence)
    losses = torch.zeros_like(chosen)
    for name, weight in zip(loss_types, loss_weights, strict=True):
        each = DPO_LOSSES[name](scores, options)
        if name == "sft" and use_weighting:
            each = each.mean().expand_as(each)  # TRL weights the batch's NLL by each pair's weight
        losses = losses + weight * (each * weights)
    metrics = {"nll_loss": pairs.chosen_nll_of_call()} if "sft" in loss_types else {}
    return PreferenceLossResult(losses, options.beta * chosen, options.beta * rejected, metrics)


def dpo(
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    options: DPOOptions,
    *,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = F_ALPHA,
    use_weighting: bool = False,
    reference_free: bool = False,
) -> PreferenceLoss:
    """The weighted sum of DPO loss types; arguments as in :class:`logitless.FusedLinearDPOLoss`."""

    fn = partial(  # not a closure: modules can be pickled
        _dpo,
        loss_types=tuple(loss_types),
        loss_weights=tuple(loss_weights),
        options=options,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        use_weighting=use_weighting,
    )
    kinds = set(loss_types)
    margin: Margin | None = None
    if f_divergence_type == "reverse_kl":
        mean_margin = {"sigmoid_norm"} | ({"ipo"} if options.length_normalize else set())
        if kinds <= mean_margin:
            margin = "mean"
        elif kinds <= _SUM_MARGIN | {"ipo"} - mean_margin:
            margin = "sum"
    form = None
    if margin == "sum" and len(loss_types) == 1 and loss_weights[0] == 1 and not use_weighting and kinds <= CLOSED_FORMS.keys():
        function = CLOSED_FORMS[loss_types[0]]
        form = ClosedForm(fn, margin, function, options.beta, label_smoothing=options.label_smoothing)
    coupled = bool(kinds & BATCH_COUPLED) or (use_weighting and "sft" in kinds)
    return PreferenceLoss(
        fn,
        group="batch" if coupled else "pair",
        margin=None if coupled else margin,
        needs_reference=not reference_free and kinds != {"sft"},
        uses_nll="sft" in kinds,
        uses_confidence=use_weighting,
        closed_form=form,
        nll_only=kinds == {"sft"},
    )
