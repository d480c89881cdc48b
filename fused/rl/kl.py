"""Estimates of the KL divergence from log-probabilities of sampled tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..bounds import bounded_exponent
from ..checks import check_choice
from .checks import check_float, check_like

#: Below this size of x, ``exp(x) - 1 - x`` is a series: the difference would lose ``2 / |x|`` units of rounding.
_SMALL = 0.25
#: 1/k! from k = 3 to 12. The terms left out are below 8e-17 of the sum.
_TERMS = (1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, 1 / 40320, 1 / 362880, 1 / 3628800, 1 / 39916800, 1 / 479001600)


def _k1(logratios: Tensor) -> Tensor:
    """Unbiased, of either sign."""
    return logratios


def _k2(logratios: Tensor) -> Tensor:
    """Biased, never negative; its gradient is that of the KL divergence."""
    return 0.5 * logratios.square()


def _k3(logratios: Tensor) -> Tensor:
    """Unbiased, never negative: ``exp(x) - 1 - x`` of ``x = min(-logratios, 80)``."""
    x = bounded_exponent(-logratios)
    small = x.abs() < _SMALL
    near = torch.where(small, x, 0)  # an overflow in the branch that is not selected would make the gradient NaN
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
    """Estimate of ``KL(policy || reference)`` at each token sampled from the policy. Differentiable.

    With ``d = logps - ref_logps`` and Schulman's names (http://joschu.net/blog/kl-approx.html), ``"k1"`` is ``d``, ``"k2"`` is
    ``d**2 / 2`` and ``"k3"`` is ``exp(-d) - 1 + d``, computed with full relative precision for small ``d``. As a *loss*, the
    expected gradient of ``k2`` is that of the divergence, that of ``k1`` is 0, and that of ``k3`` is the gradient of
    ``KL(reference || policy)``.

    ``"k3"`` takes ``d`` as at least -80: for a token further below its reference the value stays ``exp(80) - 81`` and the
    gradient is 0, so that it is finite in float32.

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
