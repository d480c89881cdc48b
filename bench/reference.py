"""The float64 result of a case, and how far a provider's result is from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.reference import reference_logps

from .cases import Case, Inputs
from .losses import loss_of
from .policy_losses import POLICY_LOSSES, loop_over_tokens, uses_entropy
from .registry import Result, Work

#: Elements of one float64 block of logits: 64 MiB, so that its handful of copies stays well under 1 GiB. On a GPU, whose
#: GEMMs need more rows, 512 MiB; beside some 16 GB for the weight of 152k x 4096 in float64, its gradient and a sum.
_BLOCK, _GPU_BLOCK = 8 << 20, 64 << 20
#: Elements of one float64 block of a comparison on a CPU: it stays in cache.
_CACHED = 1 << 18


@dataclass
class Reference:
    """Everything in float64. logps (S, T), sequences (S,), gradients like hidden and weight, ``None`` if not asked for."""

    loss: float
    logps: Tensor | None
    sequences: Tensor | None
    dhidden: Tensor | None
    dweight: Tensor | None


def sequence_values(task: str, logps: Tensor, scored: Tensor) -> Tensor:
    """Log-probs of sequences as the loss modules report them: sums, and means for SimPO and ORPO. (S, T) -> (S,)."""
    sums = logps.sum(-1)
    return sums / scored.sum(-1) if task in ("simpo", "orpo") else sums


def compute_reference(case: Case, inputs: Inputs) -> Reference:
    """Score all tokens block by block, take the loss's gradient at the log-probs, and push it back block by block.

    The library's float64 reference materialises its logits, so it is given few tokens at a time; autograd adds the
    blocks' weight gradients up in float64.
    """
    if case.task == "gae":
        return _gae_reference(inputs)
    scored = inputs.scored
    hidden, labels = inputs.hidden.detach()[scored], inputs.labels[scored]
    rows = max(1, (_GPU_BLOCK if hidden.is_cuda else _BLOCK) // len(inputs.weight))
    blocks = [slice(i, i + rows) for i in range(0, len(labels), rows)]
    head = case.shape.head
    weight = inputs.weight.detach().double().requires_grad_(inputs.weight.requires_grad)
    entropic = uses_entropy(case.task)
    with torch.no_grad():
        values = torch.cat([_scores(hidden[b].double(), weight, labels[b], head, entropic) for b in blocks], dim=1)
    tokens = torch.zeros((len(values), *scored.shape), dtype=torch.float64, device=scored.device)
    tokens[:, scored] = values
    logps, *entropies = tokens.requires_grad_()
    loss_fn = POLICY_LOSSES.get(case.task) or loss_of(case.task)
    loss = loss_fn(logps, inputs, *entropies)
    dhidden = None
    if case.backward:
        (coefficients,) = torch.autograd.grad(loss, tokens)
        parts = []
        for b in blocks:
            x = hidden[b].double().requires_grad_()
            _scores(x, weight, labels[b], head, entropic).backward(coefficients[:, scored][:, b])
            assert x.grad is not None
            parts.append(x.grad)
        dhidden = torch.zeros(inputs.hidden.shape, dtype=torch.float64, device=scored.device)
        dhidden[scored] = torch.cat(parts)
    logps = logps.detach()
    return Reference(loss.item(), logps, sequence_values(case.task, logps, scored), dhidden, weight.grad)


def _scores(hidden: Tensor, weight: Tensor, labels: Tensor, head: HeadSpec, entropic: bool) -> Tensor:
    """Log-probs and, if asked for, entropies. hidden (N, H), weight (V, H), labels (N,) -> (1, N) or (2, N)."""
    stats = reference_logps(hidden, weight, labels, head=head)
    assert stats.logps is not None and stats.entropy is not None
    return torch.stack([stats.logps, stats.entropy] if entropic else [stats.logps])


def _gae_reference(inputs: Inputs) -> Reference:
    """Advantages (S, T) in place of log-probs, one token at a time."""
    rollouts = inputs.rollouts
    assert rollouts is not None and rollouts.packed is not None and rollouts.packed.rollouts is not None
    packed = rollouts.packed.rollouts
    rewards = packed.rewards.tolist()
    found = loop_over_tokens(rewards, packed.values.tolist(), packed.cu_seqlens.tolist(), [0.0] * len(rewards))
    advantages = torch.zeros(rollouts.present.shape, dtype=torch.float64, device=rollouts.present.device)
    advantages[rollouts.present] = torch.tensor(found, dtype=torch.float64, device=advantages.device)
    return Reference(0.0, advantages, None, None, None)


@dataclass(frozen=True)
class Tolerance:
    """What a result may be off by before it counts as wrong: a few times what plain PyTorch loses in that dtype."""

    logps: float
    gradients: float


TOLERANCES = {"bf16": Tolerance(0.15, 0.06), "fp16": Tolerance(0.02, 0.02), "fp32": Tolerance(1e-4, 1e-3)}


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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def worst(self, other: Errors) -> Errors:
        """The larger of each error of two runs."""
        merged = Errors(failed=[*self.failed, *(f for f in other.failed if f not in self.failed)])
        for name in ("loss", "token_logps", "sequence_logps", "dhidden", "dweight"):
            values = [v for v in (getattr(self, name), getattr(other, name)) if v is not None]
            # max() would hide a NaN that comes second
            setattr(merged, name, (math.nan if any(map(math.isnan, values)) else max(values)) if values else None)
        return merged


def _row_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    step = max(1, (_CACHED if a.device.type == "cpu" else _BLOCK) // a.shape[-1])
    for i in range(0, len(a), step):
        yield a[i : i + step].double(), b[i : i + step].double()


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, a few rows at a time."""
    if value.shape != reference.shape:
        return math.inf
    squares = torch.zeros(2, dtype=torch.float64, device=value.device)
    for a, b in _row_blocks(value, reference):
        squares[0] += (a - b).square_().sum()
        squares[1] += b.square().sum()
    above, below = squares.tolist()
    return math.sqrt(above / below) if below else math.sqrt(above)


def token_error(case: Case, inputs: Inputs, work: Work, reference: Reference) -> float | None:
    """The largest error of a token's log-prob, for a provider whose step yields only those of sequences."""
    if work.token_logps is None or reference.logps is None:
        return None
    return (work.token_logps().detach().double() - reference.logps)[inputs.scored].abs().max().item()


def _present(inputs: Inputs) -> Tensor:
    assert inputs.rollouts is not None
    return inputs.rollouts.present


def _laid_out_like(result: Result, reference: Reference, inputs: Inputs) -> Reference:
    """The reference with packed values, where the result has such. A packed provider has no padding to get wrong."""
    logps, dhidden = reference.logps, reference.dhidden
    if result.token_logps is not None and result.token_logps.dim() == 1 and logps is not None:
        logps = logps[_present(inputs)]
    if inputs.rollouts is not None and result.dhidden is not None and result.dhidden.dim() == 2 and dhidden is not None:
        dhidden = dhidden[_present(inputs)]
    return replace(reference, logps=logps, dhidden=dhidden)


def check(case: Case, inputs: Inputs, result: Result, reference: Reference) -> Errors:
    """Compare a result with the reference."""
    tolerance = TOLERANCES[case.shape.dtype]
    errors = Errors()
    reference = _laid_out_like(result, reference, inputs)
    limits: list[tuple[str, float | None, float]] = []
    if result.loss is not None:
        errors.loss = abs(result.loss.item() - reference.loss)
        limits.append(("loss", errors.loss, tolerance.gradients * max(1.0, abs(reference.loss))))
    if result.token_logps is not None and reference.logps is not None:
        scored = inputs.scored if result.token_logps.dim() == 2 else inputs.scored[_present(inputs)]
        errors.token_logps = (result.token_logps.double() - reference.logps)[scored].abs().max().item()
    limits.append(("logps", errors.token_logps, tolerance.logps))
    if result.sequence_logps is not None and reference.sequences is not None:
        errors.sequence_logps = (result.sequence_logps.double() - reference.sequences).abs().max().item()
        # independent roundings of a sequence's tokens add up like a random walk
        limits.append(("sequence logps", errors.sequence_logps, tolerance.logps * math.sqrt(case.shape.tokens)))
    if case.backward:
        for name in ("dhidden", "dweight"):
            value, expected = getattr(result, name), getattr(reference, name)
            if expected is None:
                continue
            if value is None:
                errors.failed.append(f"{name} is missing")
                continue
            setattr(errors, name, relative_error(value, expected))
            limits.append((name, getattr(errors, name), tolerance.gradients))
    errors.failed += [
        f"{name} is off by {error:.2g}, allowed {limit:.2g}"
        for name, error, limit in limits
        if error is not None and not error <= limit
    ]
    return errors
