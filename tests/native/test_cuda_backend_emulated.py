"""The ``cuda`` backend's Python path on the emulator: what the library hands to the operators is what csrc/cuda accepts.

Blocks of logits come from a CPU's GEMMs; everything else is what runs on a GPU, but for branches on ``is_cuda``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import logitless as ll
from logitless.kernels.backends import registry as backends
from logitless.kernels.backends.native import passes as native_scan
from logitless.kernels.core.stats import OUTPUTS

from ..helpers import gradients, make_case, relative_error, run_op, run_reference
from .emulated import BF16, F16, F32, F64, TYPES

HEADS = [ll.HeadSpec(), ll.HeadSpec(1.2, 8.0, 0.6)]
#: Largest error of logps relative to 1 + |logp|, and of gradients, with logits in float32.
LIMITS = {F64: (1e-12, 1e-12), F32: (2e-5, 2e-5), BF16: (2e-5, 2**-7), F16: (2e-5, 2**-9)}
#: What a GPU gets; the others exist on CPUs alone.
CUDA_OPERATORS = ("indexed_dot", "tile_pass", "pair_loss", "scale_scatter", "scaled_convert", "finish_tile")


class Operators:
    """``torch.ops.logitless`` with the emulated operators in place of the CPU's, and a count of their calls."""

    def __init__(self, real, emulated) -> None:
        self.real, self.emulated = real, emulated
        self.calls = dict.fromkeys(CUDA_OPERATORS, 0)

    def __getattr__(self, name: str):
        if name not in CUDA_OPERATORS:
            return getattr(self.real, name)
        self.calls[name] += 1
        return getattr(self.emulated, name)


@pytest.fixture
def on_emulator(emulated, monkeypatch) -> Operators:
    emulated.order(0)
    operators = Operators(torch.ops.logitless, emulated.ops)
    monkeypatch.setattr(torch.ops, "logitless", operators)
    monkeypatch.setattr(native_scan, "_ops", operators)
    here = replace(backends.get_backend("cuda"), why_unavailable=list, why_not=lambda call: [])
    monkeypatch.setitem(backends._registry, "cuda", here)
    with ll.settings(backend="cuda"):
        yield operators


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head", HEADS, ids=["plain", "softcap"])
@pytest.mark.parametrize("train", ["h", "hwb"])
def test_linear_logps(on_emulator, dtype, head, train):
    for peaked, hidden, budget in ((0.0, 16, 1 << 30), (-60.0, 17, 60_000)):
        case = make_case(dtype=dtype, head=head, peaked=peaked, train=train, bias=True, vocab=611, hidden=hidden)
        with ll.settings(precision="float32", memory_budget=budget):
            stats, wide = run_op(case, OUTPUTS), case.double()
            reference, (limit, gradient_limit) = run_reference(wide), LIMITS[dtype]
            for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs"):
                value, expected = getattr(stats, name), getattr(reference, name)
                assert ((value.double() - expected).abs() / (1 + expected.abs())).max() <= 4 * limit, name
            assert torch.equal(stats.is_top1, reference.is_top1)
            leaves = [wide.hidden, wide.weight, wide.bias][: len(train)]
            for entropy in (0.0, 1.0):
                ours = gradients(stats.logps.sum() + entropy * stats.entropy.sum(), case)
                total = reference.logps.sum() + entropy * reference.entropy.sum()
                theirs = torch.autograd.grad(total, leaves, retain_graph=True)
                for a, b in zip(ours, theirs, strict=True):
                    assert relative_error(a, b) <= 4 * gradient_limit
    used = [name for name in ("indexed_dot", "tile_pass") if not on_emulator.calls[name]]
    assert used == [], "operators that nobody called"


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_inputs_of_any_stride(on_emulator, dtype):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 3, 64, generator=g).to(dtype).transpose(0, 1)[..., ::2]
    weight, bias = torch.randn(32, 101, generator=g).to(dtype).t(), torch.randn(101, 3, generator=g).to(dtype)[:, 1]
    labels = torch.randint(101, (3, 7, 2), generator=g)[..., 0]
    found = []
    for backend in ("cuda", "torch"):
        leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
        with ll.settings(backend=backend, precision="float32"):
            stats = ll.linear_logps(leaves[0], leaves[1], labels, leaves[2], outputs=("logps", "entropy"))
            found.append([stats.logps, *torch.autograd.grad((stats.logps + stats.entropy).sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) <= LIMITS[dtype][1]


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_logits_rounded_on_purpose(on_emulator, dtype):
    case = make_case(dtype=dtype, bias=True, vocab=611)
    with ll.settings(precision="match"):
        stats = run_op(case)
        gradients(stats.logps.sum(), case)
        ours = stats.logps
        with ll.settings(backend="torch"):
            theirs = run_op(case).logps
    assert (ours - theirs).abs().max() <= 2e-2


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("train", ["h", "hw"])
@pytest.mark.parametrize(
    "loss", [ll.FusedLinearDPOLoss(), ll.FusedLinearSimPOLoss(), ll.FusedLinearORPOLoss()], ids=["dpo", "simpo", "orpo"]
)
def test_loss_modules(on_emulator, dtype, train, loss):
    case = make_case(dtype=dtype, train=train, vocab=900, hidden=32, tokens=9, scale=0.3, peaked=-40.0)
    kwargs = {"ref_logps": torch.full((4,), -200.0)} if isinstance(loss, ll.FusedLinearDPOLoss) else {}
    wide = case.double()
    with ll.settings(backend="torch"):
        expected = loss(wide.hidden, wide.weight, wide.labels, **kwargs)
    wanted = torch.autograd.grad(expected.loss, [wide.hidden, wide.weight][: len(train)])
    for budget in (1 << 30, 100_000):
        with ll.settings(memory_budget=budget):
            out = loss(case.hidden, case.weight, case.labels, **kwargs)
        assert out.loss.double().item() == pytest.approx(expected.loss.item(), rel=2e-2 if dtype == BF16 else 1e-4)
        for ours, theirs in zip(gradients(out.loss, case), wanted, strict=True):
            assert relative_error(ours, theirs) <= (2e-2 if dtype == BF16 else 8 * LIMITS[dtype][1])
    assert on_emulator.calls["tile_pass"] and on_emulator.calls["scale_scatter"]


def test_every_operator_is_called(on_emulator):
    """By a trainable head in bfloat16, several tiles, and rows whose offset is raised in a late block."""
    case = make_case(dtype=BF16, train="hw", vocab=9001, hidden=16, sequences=12, tokens=12, peaked=-60.0)
    for budget in (1 << 30, 1_500_000):
        with ll.settings(memory_budget=budget):
            out = ll.FusedLinearSimPOLoss()(case.hidden, case.weight, case.labels)
        out.loss.backward()
    assert [name for name, count in on_emulator.calls.items() if not count] == []
