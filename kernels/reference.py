"""The reference: float64, every logit materialised. Tests and benchmarks measure all errors against this and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .core.head_spec import HeadSpec
from .core.stats import TokenStats


def reference_logps(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,
    head: HeadSpec | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """All statistics of :func:`logitless.linear_logps` by definition, in float64, differentiable by plain autograd.

    Ignored positions are cut out before anything is computed, so whatever stands there stays without effect.

    Example:
        >>> hidden, weight, labels = torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([3, -100])
        >>> reference_logps(hidden, weight, labels).logps  # -log 8
        tensor([-2.0794,  0.0000], dtype=torch.float64)
    """
    head = HeadSpec() if head is None else head
    scored = labels != ignore_index
    y = labels[scored].long()
    entries = head.entries_of(len(weight))
    raw = hidden[scored].double() @ weight[:entries].double().t()
    if bias is not None:
        raw = raw + bias[:entries].double()
    z = head.apply(raw)
    log_p = F.log_softmax(z, dim=-1)
    p = log_p.exp()
    plogp = torch.where(p > 0, p * log_p.clamp(min=-1e300), torch.zeros_like(p))

    def scatter(values: Tensor) -> Tensor:
        full = torch.zeros(labels.shape, dtype=values.dtype, device=values.device)
        return full.masked_scatter(scored, values)

    return TokenStats(
        logps=scatter(log_p.gather(-1, y[:, None])[:, 0]),
        entropy=scatter(-plogp.sum(-1)),
        mean_logits=scatter(z.mean(-1)),
        is_top1=scatter(z.argmax(-1) == y) if z.shape[0] else scatter(y == -1),
        log_sum_sq_probs=scatter((2 * log_p).logsumexp(-1)),
    )
