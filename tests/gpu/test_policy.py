"""Policy training on a GPU: advantages of many tokens, and the entropy's gradient from a tile of each backend.

``python -m pytest -m gpu``; ``LOGITLESS_GPU_TEST_DEVICE=cpu`` runs it at small sizes on a CPU.
"""

from __future__ import annotations

import pytest
import torch

import logitless as ll

from ..helpers import relative_error
from .test_limits import BF16, DEVICE, F32, ON_GPU, backend, pytestmark  # noqa: F401

TOKENS = 1 << 20 if ON_GPU else 1 << 12


def segments(count: int) -> torch.Tensor:
    """Bounds of ragged segments, some of them empty."""
    cuts = torch.randint(TOKENS + 1, (count - 1,), generator=torch.Generator().manual_seed(0)).sort().values
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([TOKENS])])


@pytest.mark.parametrize("count", [1, 700])
@pytest.mark.parametrize("holes", [False, True])
def test_advantages_of_a_million_tokens_are_those_of_a_cpu(count, holes):
    g = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, TOKENS, generator=g, dtype=torch.float64)
    mask = torch.rand(TOKENS, generator=g) < 0.7 if holes else None
    bounds = segments(count)
    exact = ll.gae(rewards, values, cu_seqlens=bounds, mask=mask, gamma=0.999, lam=0.97)
    for dtype in (torch.float64, F32):
        given = [rewards.to(DEVICE, dtype), values.to(DEVICE, dtype)]
        where = {"cu_seqlens": bounds.to(DEVICE), "mask": None if mask is None else mask.to(DEVICE)}
        runs = [ll.gae(*given, **where, gamma=0.999, lam=0.97) for _ in range(3)]
        for name in ("advantages", "returns"):
            found = [getattr(run, name) for run in runs]
            assert all(torch.equal(found[0], other) for other in found)
            limit = 1e-12 if dtype == torch.float64 else 2e-6
            assert relative_error(found[0].cpu().double(), getattr(exact, name)) < limit


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_the_entropy_bonus_is_that_of_float64(dtype, train_head, softcap):
    g = torch.Generator().manual_seed(2)
    n, hidden, vocab = (1000, 256, 50_257) if ON_GPU else (50, 32, 501)
    x = torch.randn(n, hidden, generator=g, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
    w = (torch.randn(vocab, hidden, generator=g, dtype=torch.float64) / hidden**0.5).to(DEVICE, dtype)
    w.requires_grad_(train_head)
    labels = torch.randint(vocab, (n,), generator=g).to(DEVICE)
    bounds = torch.tensor([0, n // 3, n], device=DEVICE)
    advantages = torch.randn(n, generator=g).to(DEVICE)
    head = ll.HeadSpec(softcap=softcap, temperature=0.8)
    loss = ll.FusedLinearPPOLoss(entropy_coef=0.3, metrics=True)
    leaves = [x, w] if train_head else [x]
    runs = []
    for _ in range(3):
        out = loss(x, w, labels, head=head, advantages=advantages, cu_seqlens=bounds)
        runs.append(torch.autograd.grad(out.loss, leaves))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    assert out.plan is not None and out.plan.passes == (6 if train_head else 4)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, w)]
    log_probs = head.apply(wide[0] @ wide[1].t()).log_softmax(-1)
    logps, entropies = log_probs.gather(1, labels[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)
    exact = (-advantages * (logps - logps.detach()).exp() - 0.3 * entropies).mean()
    wanted = torch.autograd.grad(exact, [t for t in wide if t.requires_grad])
    for found, true in zip(runs[0], wanted, strict=True):
        assert relative_error(found, true) < (1e-2 if dtype == BF16 else 1e-5)
