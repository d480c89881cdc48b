"""Inputs and measures that the tests share. The reference is the library's own float64 one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import logitless as ll

#: Reasons of the marker ``cpu_only``.
ENDS_THE_PROCESS = "on a GPU a failed assertion ends the process; tests/gpu/test_limits.py checks one in a child process"
NAMES_THE_CPU = "names the CPU"


@dataclass
class Case:
    """Inputs of one call. hidden (S, T, H), weight (V, H), bias (V,) or None, labels (S, T)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    head: ll.HeadSpec

    def double(self) -> Case:
        """The same numbers as float64 leaves."""

        def d(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().double().requires_grad_()

        return Case(d(self.hidden), d(self.weight), d(self.bias), self.labels, self.head)

    def to(self, device: str) -> Case:
        """The same as leaves on a device."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(device).requires_grad_(t.requires_grad)

        return Case(move(self.hidden), move(self.weight), move(self.bias), self.labels.to(device), self.head)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None and t.requires_grad]


def make_case(
    *,
    sequences: int = 4,
    tokens: int = 7,
    hidden: int = 16,
    vocab: int = 101,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    head: ll.HeadSpec | None = None,
    peaked: float = 0.0,
    masked: float = 0.3,
    seed: int = 0,
    scale: float = 1.0,
    train: str = "hwb",
    exact: bool = False,
) -> Case:
    """Random inputs; the weight's entries have standard deviation ``scale``.

    ``peaked`` adds that many nats to the target's logit, as a trained model does; negative: rules it out.
    ``exact``: multiples of 1/8. float32 holds every partial sum of a raw logit, so any order of summation gives the same bits;
    other inputs may get other bits where a BLAS sums in another order: for another number of rows, or in another place.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, tokens, hidden, generator=g, dtype=torch.float64)
    w = torch.randn(vocab, hidden, generator=g, dtype=torch.float64) * scale
    labels = torch.randint(vocab, (sequences, tokens), generator=g)
    if peaked:
        rows = w[labels]
        x = x + peaked * rows / rows.square().sum(-1, keepdim=True)
    labels = labels.masked_fill(torch.rand(sequences, tokens, generator=g) < masked, -100)
    b = torch.randn(vocab, generator=g, dtype=torch.float64) if bias else None
    if exact:
        x, w, b = (t if t is None else (8 * t).round() / 8 for t in (x, w, b))
    return Case(
        x.to(dtype).requires_grad_("h" in train),
        w.to(dtype).requires_grad_("w" in train),
        None if b is None else b.to(dtype).requires_grad_("b" in train),
        labels,
        ll.HeadSpec() if head is None else head,
    )


def run_op(case: Case, outputs=("logps",)) -> ll.TokenStats:
    return ll.linear_logps(case.hidden, case.weight, case.labels, case.bias, case.head, outputs)


def run_reference(case: Case) -> ll.TokenStats:
    return ll.reference_logps(case.hidden, case.weight, case.labels, case.bias, case.head)


def plain_logps(case: Case) -> Tensor:
    """What plain PyTorch does in the inputs' dtype: logits, float32 log-softmax, gather."""
    scored = case.labels != -100
    logits = torch.nn.functional.linear(case.hidden[scored], case.weight, case.bias)
    logits = case.head.apply(logits)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp = torch.log_softmax(logits.to(wide), dim=-1).gather(-1, case.labels[scored][:, None])[:, 0]
    return torch.zeros(case.labels.shape, dtype=wide).masked_scatter(scored, logp)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    value, reference = value.detach().double(), reference.detach().double()
    scale = reference.norm().item()
    return (value - reference).norm().item() / scale if scale else (value - reference).norm().item()


def gradients(loss: Tensor, case: Case) -> list[Tensor]:
    return list(torch.autograd.grad(loss, case.leaves, retain_graph=True))
