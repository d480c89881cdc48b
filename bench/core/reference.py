"""The float64 result of a case, and how far a provider's result is from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

import logitless as ll

from ..losses import loss_of, uses_entropy
from ..losses.policy import loop_over_tokens
from .cases import Case
from .inputs import Inputs
from .registry import Result, Work
from .rows import beyond

#: Elements of one float64 block of logits: 64 MiB, so that its few copies stay well below 1 GiB. On a GPU, whose GEMMs need
#: more rows, 512 MiB; there the float64 weight of 152k x 4096, its gradient and a sum take some 16 GB.
_BLOCK, _GPU_BLOCK = 8 << 20, 64 << 20
#: Elements of one float64 block of a comparison on a CPU: it stays in cache.
_CACHED = 1 << 18


@dataclass
class Reference:
    """Everything in float64. logps (S, T), sequences (S,), gradients like hidden and weight, ``None`` if not asked for."""

    loss: float
    logps: Tensor | None
    sequences: Tensor | None = None
    dhidden: Tensor | None = None
    dweight: Tensor | None = None


def compute_reference(case: Case, inputs: Inputs) -> Reference:
    """Score all tokens block by block, take the loss's gradient at the log-probs, and backpropagate it block by block.

    The library's float64 reference materialises its logits, so each call gets few tokens; autograd accumulates the blocks'
    weight gradients in float64.
    """
    if case.task == "gae":
        return _gae_reference(inputs)
    scored = inputs.scored
    hidden, labels = inputs.hidden.detach()[scored], inputs.labels[scored]
    rows = max(1, (_GPU_BLOCK if hidden.is_cuda else _BLOCK) // len(inputs.weight))
    blocks = [slice(i, i + rows) for i in range(0, len(labels), rows)]
    weight = inputs.weight.detach().double().requires_grad_(inputs.weight.requires_grad)

    def scores(x: Tensor, y: Tensor) -> Tensor:
        """Log-probs and, if the loss has them, entropies. x (N, H), y (N,) -> (1, N) or (2, N)."""
        stats = ll.reference_logps(x, weight, y, head=case.shape.head)
        assert stats.logps is not None and stats.entropy is not None
        return torch.stack([stats.logps, stats.entropy] if uses_entropy(case.task) else [stats.logps])

    with torch.no_grad():
        values = torch.cat([scores(hidden[b].double(), labels[b]) for b in blocks], dim=1)
    tokens = torch.zeros((len(values), *scored.shape), dtype=torch.float64, device=scored.device)
    tokens[:, scored] = values
    logps, *entropies = tokens.requires_grad_()
    loss = loss_of(case.task)(logps, inputs, entropies[0] if entropies else None)
    dhidden = None
    if case.backward:
        (coefficients,) = torch.autograd.grad(loss, tokens)
        parts = []
        for b in blocks:
            x = hidden[b].double().requires_grad_()
            scores(x, labels[b]).backward(coefficients[:, scored][:, b])
            assert x.grad is not None
            parts.append(x.grad)
        dhidden = torch.zeros(inputs.hidden.shape, dtype=torch.float64, device=scored.device)
        dhidden[scored] = torch.cat(parts)
    logps = logps.detach()
    sequences = logps.sum(-1)  # as the loss modules report them
    if case.task in ("simpo", "orpo"):
        sequences = sequences / scored.sum(-1)
    return Reference(loss.item(), logps, sequences, dhidden, weight.grad)


def _gae_reference(inputs: Inputs) -> Reference:
    """Advantages (S, T) in place of log-probs, one token at a time."""
    present, packed = inputs.present, inputs.packed
    rewards = packed.rewards.tolist()
    found = loop_over_tokens(rewards, packed.values.tolist(), packed.cu_seqlens.tolist(), [0.0] * len(rewards))
    advantages = torch.zeros(present.shape, dtype=torch.float64, device=present.device)
    advantages[present] = torch.tensor(found, dtype=torch.float64, device=advantages.device)
    return Reference(0.0, advantages)


#: Errors of log-probs and gradients above these count as wrong: a few times the error of plain PyTorch in that dtype.
TOLERANCES = {"bf16": (0.15, 0.06), "fp16": (0.02, 0.02), "fp32": (1e-4, 1e-3)}


@dataclass
class Errors:
    """Distances from the reference; ``None`` where the provider does not expose the value.

    Attributes:
        loss: absolute.
        token_logps, sequence_logps: the largest absolute error over scored tokens, over sequences.
        dhidden, dweight: Frobenius norm of the difference over that of the reference.
        failed: what exceeds the tolerance, in words; empty when the result is right.
    """

    loss: float | None = None
    token_logps: float | None = None
    sequence_logps: float | None = None
    dhidden: float | None = None
    dweight: float | None = None
    failed: list[str] = field(default_factory=list)

    def record(self, name: str, value: float) -> float:
        """Keep the larger of two runs, or NaN; returns the value."""
        before = getattr(self, name)
        if before is None or not value <= before:
            setattr(self, name, value)
        return value


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, a few rows at a time."""
    if value.shape != reference.shape:
        return math.inf
    squares = torch.zeros(2, dtype=torch.float64, device=value.device)
    rows = max(1, (_CACHED if value.device.type == "cpu" else _BLOCK) // value.shape[-1])
    for a, b in zip(value.flatten(0, -2).split(rows), reference.flatten(0, -2).split(rows), strict=True):
        squares[0] += (a.double() - b).square_().sum()
        squares[1] += b.square().sum()
    above, below = squares.tolist()
    return math.sqrt(above / below) if below else math.sqrt(above)


def token_error(case: Case, inputs: Inputs, work: Work, reference: Reference) -> float | None:
    """The largest error of a token's log-prob, for a provider whose step yields only those of sequences."""
    if work.token_logps is None or reference.logps is None:
        return None
    return (work.token_logps().detach().double() - reference.logps)[inputs.scored].abs().max().item()


def _like(value: Tensor | None, expected: Tensor | None, inputs: Inputs) -> Tensor | None:
    """The expected tensor, packed where the value is. A packed provider has no padding to get wrong."""
    packed = value is not None and expected is not None and value.dim() < expected.dim()
    return expected[inputs.present] if packed and expected is not None else expected


def check(case: Case, inputs: Inputs, result: Result, reference: Reference, errors: Errors | None = None) -> Errors:
    """Compare a result with the reference; ``errors`` of an earlier result are kept where they are larger."""
    of_logps, of_gradients = TOLERANCES[case.shape.dtype]
    errors = errors or Errors()
    logps = _like(result.token_logps, reference.logps, inputs)
    limits: list[tuple[str, float, float]] = []
    if result.loss is not None:
        error = errors.record("loss", abs(result.loss.item() - reference.loss))
        limits.append(("loss", error, of_gradients * max(1.0, abs(reference.loss))))
    if result.token_logps is not None and logps is not None:
        scored = inputs.scored if result.token_logps.dim() == 2 else inputs.packed.scored
        error = (result.token_logps.double() - logps)[scored].abs().max().item()
        limits.append(("logps", errors.record("token_logps", error), of_logps))
    if result.sequence_logps is not None and reference.sequences is not None:
        error = (result.sequence_logps.double() - reference.sequences).abs().max().item()
        # independent roundings of a sequence's tokens add up like a random walk
        limit = of_logps * math.sqrt(case.shape.tokens)
        limits.append(("sequence logps", errors.record("sequence_logps", error), limit))
    for name in ("dhidden", "dweight") if case.backward else ():
        value = getattr(result, name)
        expected = _like(value, getattr(reference, name), inputs)
        if expected is not None and value is None:
            errors.failed.append(f"{name} is missing")
        elif expected is not None:
            limits.append((name, errors.record(name, relative_error(value, expected)), of_gradients))
    errors.failed += beyond(*limits)
    return errors
