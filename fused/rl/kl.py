"""Estimates of the KL divergence from log-probabilities of sampled tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_choice
from .gae import check_float, check_like

#: Below it, ``exp(x) - 1 - x`` is summed as a series: the difference would lose ``2 / |x|`` units of rounding.
_SMALL = 0.25
#: 1/k! from k = 3 to 12. What is left out is below 8e-17 of the sum.
_TERMS = (1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, 1 / 40320, 1 / 362880, 1 / 3628800, 1 / 39916800, 1 / 479001600)


def _k1(logratios: Tensor) -> Tensor:
    """Unbiased, of either sign."""
    return logratios


def _k2(logratios: Tensor) -> Tensor:
    """Biased, never negative; its gradient is that of the KL divergence."""
    return 0.5 * logratios.square()


def _k3(logratios: Tensor) -> Tensor:
    """Unbiased, never negative: ``exp(x) - 1 - x`` of ``x = -logratios``."""
    x = -logratios
    small = x.abs() < _SMALL
    near = torch.where(small, x, 0)  # an overflow in a branch that is not taken would make its gradient NaN
    series = torch.full_like(near, _TERMS[-1])
    for term in _TERMS[-2::-1]:
        series = series * near + term
    return torch.where(small, near.square() * (0.5 + near * series), torch.expm1(x) - x)


#: Functions of the log-ratios ``logps - ref_logps``. http://joschu.net/blog/kl-approx.html
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}


def kl_estimate(
    logps: Tensor,
    ref_logps: Tensor,  # like logps
    estimator: str = "k3",
) -> Tensor:
    """Estimate of ``KL(policy || reference)`` at each token that the policy sampled; differentiable.

    With ``d = logps - ref_logps``, Schulman's http://joschu.net/blog/kl-approx.html names: ``"k1"`` is ``d``, ``"k2"`` is
    ``d**2 / 2`` and ``"k3"`` is ``exp(-d) - 1 + d``, here with full relative precision however small ``d`` is. As a *loss*,
    the gradient of ``k2`` is on average that of the divergence, the one of ``k1`` is 0, and the one of ``k3`` is that of
    ``KL(reference || policy)``.

    Args:
        logps: log-probabilities under the policy, floating point, any shape.
        ref_logps: log-probabilities under the reference, of the same shape.
        estimator: one of :data:`KL_ESTIMATORS`.

    Returns:
        Tensor: shaped like ``logps``, in their dtype, at least float32.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> kl_estimate(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]), "k2")
        tensor([0.1250, 0.0000])
    """
    check_float("logps", logps)
    check_like("ref_logps", ref_logps, logps, "logps")
    check_choice("estimator", estimator, KL_ESTIMATORS)
    wide = torch.promote_types(torch.promote_types(logps.dtype, ref_logps.dtype), torch.float32)
    return KL_ESTIMATORS[estimator](logps.to(wide) - ref_logps.to(wide))
