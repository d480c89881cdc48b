"""Losses without a reference model: SimPO (AlphaPO), CPO and ORPO."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bounds import bounded_power, bounded_square
from ..loss import ClosedForm, Margin, Pairs, PreferenceLoss, PreferenceLossResult
from .dpo import CLOSED_FORMS, _smoothed


def alpha_reward(logps: Tensor, alpha: float) -> Tensor:
    """AlphaPO's reward ``(1 - p^-alpha) / alpha``, https://huggingface.co/papers/2501.03884; ``log p`` at alpha = 0.

    The exponent ``-alpha * log p`` is bounded at 80: beyond it the reward is constant and has gradient 0.
    """
    return logps if alpha == 0 else bounded_power(logps, -alpha)


# Losses bind their parameters by ``partial`` because modules are pickled, and closures cannot be.


def _simpo(pairs: Pairs, beta: float, gamma: float, label_smoothing: float, alpha: float) -> PreferenceLossResult:
    chosen, rejected = pairs.split(beta * alpha_reward(pairs.mean_logps, alpha))
    return PreferenceLossResult(_smoothed(chosen - rejected - gamma, label_smoothing), chosen, rejected)


def simpo(*, beta: float, gamma: float, label_smoothing: float, alpha: float) -> PreferenceLoss:
    """SimPO, https://huggingface.co/papers/2405.14734 eq. 6: ``-logsig(beta * (mean logp difference) - gamma)``."""
    fn = partial(_simpo, beta=beta, gamma=gamma, label_smoothing=label_smoothing, alpha=alpha)
    if alpha != 0:
        return PreferenceLoss(fn)
    return PreferenceLoss(fn, margin="mean", closed_form=ClosedForm(fn, "mean", "log_sigmoid", beta, gamma, label_smoothing))


def _cpo_sigmoid(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """CPO, https://huggingface.co/papers/2401.08417 eq. 3."""
    return _smoothed(beta * margin, label_smoothing)


def _cpo_hinge(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    return torch.relu(1 - beta * margin)


def _cpo_ipo(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """IPO's square; the margin is bounded at plus and minus ``exp(40)``."""
    return bounded_square(margin, 1 / (2 * beta))


#: Functions of the margin (p,), beta and label smoothing.
CPO_LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid": _cpo_sigmoid,
    "hinge": _cpo_hinge,
    "ipo": _cpo_ipo,
}


def _cpo(
    pairs: Pairs, beta: float, cpo_alpha: float, loss_type: str, label_smoothing: float, alpha: float
) -> PreferenceLossResult:
    chosen, rejected = pairs.split(alpha_reward(pairs.mean_logps if loss_type == "ipo" else pairs.logps, alpha))
    losses = CPO_LOSSES[loss_type](chosen - rejected, beta, label_smoothing)
    metrics = {}
    if cpo_alpha != 0:
        metrics["nll_loss"] = pairs.chosen_nll_of_call()
        losses = losses + cpo_alpha * pairs.chosen_nll()
    return PreferenceLossResult(losses, beta * chosen, beta * rejected, metrics)


def cpo(*, beta: float, cpo_alpha: float, loss_type: str, label_smoothing: float, alpha: float) -> PreferenceLoss:
    """CPO: a loss of the log-prob margin (per-token means for ``ipo``) plus ``cpo_alpha`` times the chosen NLL."""
    fn = partial(_cpo, beta=beta, cpo_alpha=cpo_alpha, loss_type=loss_type, label_smoothing=label_smoothing, alpha=alpha)
    if cpo_alpha != 0 or alpha != 0:
        return PreferenceLoss(fn, uses_nll=cpo_alpha != 0)
    margin: Margin = "mean" if loss_type == "ipo" else "sum"
    form = ClosedForm(fn, margin, CLOSED_FORMS[loss_type], beta, label_smoothing=label_smoothing)
    return PreferenceLoss(fn, margin=margin, closed_form=form)


#: The mean log-probability at which ORPO's odds saturate: p = 1 would have infinite odds.
_NEARLY_ZERO = -1e-12


def log_odds(mean_logps: Tensor) -> Tensor:
    """``log(p / (1 - p))`` from ``log p`` (s,), by ``log1mexp``; finite, with gradient 0, at p = 1."""
    x = mean_logps.clamp(max=_NEARLY_ZERO)
    near = x > -math.log(2)
    # a branch that is not selected is evaluated at -1, where its derivative is finite
    by_expm1, by_exp = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return x - torch.where(near, torch.log(-torch.expm1(by_expm1)), torch.log1p(-torch.exp(by_exp)))


def _orpo(pairs: Pairs, beta: float) -> PreferenceLossResult:
    chosen, rejected = pairs.split(pairs.mean_logps)
    difference = log_odds(chosen) - log_odds(rejected)
    ratio = F.logsigmoid(difference)
    metrics = {"nll_loss": pairs.chosen_nll_of_call(), "log_odds_ratio": ratio, "log_odds_chosen": difference}
    return PreferenceLossResult(pairs.chosen_nll() - beta * ratio, beta * chosen, beta * rejected, metrics)


def orpo(*, beta: float) -> PreferenceLoss:
    """ORPO, https://huggingface.co/papers/2403.07691 eqs. 6 and 7: NLL of the chosen minus ``beta * logsig(log-odds)``."""
    return PreferenceLoss(partial(_orpo, beta=beta), uses_nll=True)
