"""The tensors of a case: the same for every provider."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..losses import POLICY_LOSSES
from ..losses.inputs import UNUSED, LossInputs
from .cases import IGNORE, Case

#: Log-ratios of the policy to the policy that sampled; clipping ranges end at -0.22, 0.18 and 0.25.
LOG_RATIOS = (0.0, 0.05, -0.05, 0.1, -0.1, 0.5, -0.5)
#: Rows of a weight that are drawn at a time.
_FILL_ROWS = 1024


@dataclass
class Inputs(LossInputs):
    """S sequences of T tokens.

    The reference's log-probabilities are all equal, so they cancel in a pair and can be moved to the KL term in KTO: Liger,
    which takes none, then computes the same loss. Old log-probs are within 0.5 of the policy's: some are beyond the clipping
    range and none is near its ends, because a rounding must not decide whether a token is clipped.

    Attributes:
        hidden: (S, T, H) leaf. weight: (V, H) leaf, with a gradient where the case trains the head.
        labels: (S, T) int64, already shifted, -100 in the prompt.
        sequence_advantages: (S,); in ``dapo`` also those of the tokens.
        rewards, values: (S, T) float32, 0 in the padding; for ``gae``.
        cu_seqlens: (S + 1,) int32, the bounds of the sequences among packed tokens.
        present: (S, T) bool, False in the padding.
        packed: for policy losses and ``gae``: the same inputs packed. hidden (P, H) is a leaf of its own; labels and what is
            shaped like them are (P,).
    """

    hidden: Tensor = UNUSED
    weight: Tensor = UNUSED
    labels: Tensor = UNUSED
    sequence_advantages: Tensor = UNUSED
    rewards: Tensor = UNUSED
    values: Tensor = UNUSED
    cu_seqlens: Tensor = UNUSED
    present: Tensor = UNUSED
    packed: Any = None


def _normal(shape: tuple[int, ...], std: float, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Tensor:
    """Random numbers in ``dtype``, a few rows at a time: a float32 copy of a large weight would distort the memory figures.

    On a CPU all cores draw, each block of rows with a generator of its own: one core takes 8 seconds for a weight of
    152k x 4096. A GPU draws its own.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    parts = out.view(-1, shape[-1]).split(_FILL_ROWS)
    if device.type == "cuda":
        own = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=g)))
        for rows in parts:
            rows.copy_(torch.randn(rows.shape, generator=own, device=device).mul_(std))
        return out
    seeds = torch.randint(2**62, (len(parts),), generator=g).tolist()

    def fill(rows: Tensor, seed: int) -> None:
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).mul_(std))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, parts, seeds))
    return out


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """The tensors of a case; the same on every call and, on CPUs, on every machine."""
    shape = case.shape
    s, t, h, v = len(shape.responses), shape.tokens, shape.hidden, shape.vocab
    g = torch.Generator().manual_seed(shape.seed)
    weight = _normal((v, h), 1 / math.sqrt(h), shape.torch_dtype, device, g)
    hidden = _normal((s, t, h), 1.0, shape.torch_dtype, device, g)
    labels = torch.randint(v, (s, t), generator=g)
    if shape.logits == "peaked":
        lift = torch.rand(s, t, 1, generator=g) * (math.log(v) + 6)
        rows = weight[labels.to(device)].float()
        hidden = (hidden.float() + lift.to(device) * rows / rows.square().sum(-1, keepdim=True)).to(shape.torch_dtype)
    labels[:, : shape.prompt] = IGNORE
    ends = shape.prompt + torch.tensor(shape.responses)
    present = torch.arange(t) < ends[:, None]
    labels[~present] = IGNORE
    upstream = torch.randn(s, t, generator=g)
    scored = labels != IGNORE
    # The log-sum-exp of N(0, 1) logits is log V + 1/2. With it the reference is about as likely as the policy, and no loss
    # of log-ratios is saturated.
    targets = (hidden[scored.to(device)].float() * weight[labels[scored].to(device)].float()).sum(-1)
    targets = shape.head.apply(targets)
    others = torch.full_like(targets, math.log(v) + 0.5)
    constant = (targets - torch.logaddexp(others, targets)).mean().item() * (t - shape.prompt)
    inputs = Inputs(
        scored=scored.to(device),
        hidden=hidden.requires_grad_(case.backward),
        weight=weight.requires_grad_(case.backward and case.train_head),
        labels=labels.to(device),
        ref_logps=torch.full((s,), constant, device=device),
        desirable=(torch.arange(s) % 2 == 0).to(device),
        kl=torch.tensor(0.5, device=device),
        upstream=upstream.to(device),
    )
    if case.task == "gae" or case.task in POLICY_LOSSES:
        _add_rollouts(case, inputs, present, g)
    return inputs


def _add_rollouts(case: Case, inputs: Inputs, present: Tensor, g: torch.Generator) -> None:
    """present (S, T) bool."""
    (s, t), device = present.shape, inputs.hidden.device
    of_sequences, of_tokens = torch.randn(s, generator=g), torch.randn(s, t, generator=g)
    rewards, values = (torch.where(present, torch.randn(s, t, generator=g), 0).to(device) for _ in range(2))
    log_ratios = torch.tensor(LOG_RATIOS)[torch.randint(len(LOG_RATIOS), (s, t), generator=g)].to(device)
    old_logps = torch.zeros((s, t), device=device)
    if case.task != "gae":
        old_logps = torch.where(inputs.scored, _estimated_logps(case, inputs) - log_ratios, 0)
    inputs.present = present = present.to(device)
    inputs.cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long, device=device), present.sum(1)]).cumsum(0).int()
    inputs.sequence_advantages = of_sequences.to(device)
    inputs.advantages = (of_tokens if case.task == "ppo" else of_sequences[:, None].expand(s, t)).to(device)
    inputs.old_logps, inputs.rewards, inputs.values = old_logps, rewards, values
    names = ("labels", "scored", "old_logps", "advantages", "rewards", "values")
    hidden = inputs.hidden.detach()[present].requires_grad_(inputs.hidden.requires_grad)
    inputs.packed = replace(inputs, hidden=hidden, **{name: getattr(inputs, name)[present] for name in names})


@torch.no_grad()
def _estimated_logps(case: Case, inputs: Inputs) -> Tensor:
    """Log-probs (S, T) of the scored tokens, a few at a time: the label's logit in float32, the others in the model's dtype."""
    scored, weight, head = inputs.scored, inputs.weight, case.shape.head
    hidden, labels = inputs.hidden[scored], inputs.labels[scored]
    parts = []
    for x, y in zip(hidden.split(_FILL_ROWS // 8), labels.split(_FILL_ROWS // 8), strict=True):
        others = head.apply((x @ weight.t()).float()).logsumexp(-1)
        parts.append(head.apply((x.float() * weight[y].float()).sum(-1)) - others)
    return torch.zeros(scored.shape, device=hidden.device).masked_scatter(scored, torch.cat(parts))
