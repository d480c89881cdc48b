"""What is benchmarked: shapes, cases, and the tensors of a case. ``suites.py`` groups cases."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from logitless.kernels.core.head_spec import HeadSpec

from .policy_losses import POLICY_LOSSES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOGITS = ("random", "peaked")
IGNORE = -100


@dataclass(frozen=True)
class Shape:
    """Sizes and kind of the inputs.

    Attributes:
        pairs: P; a batch is P chosen sequences followed by P rejected ones.
        tokens: positions of each sequence.
        hidden, vocab: H and V.
        masked: the share of each sequence, from its start, that is prompt and not scored.
        dtype: of hidden states and weight.
        logits: ``random`` (standard deviation 1), or ``peaked``: the target of each token is raised by 0 to ``log V + 6``
            nats, so that probabilities run from near 0 to near 1 as in a trained model.
        softcap: of the logits; 0: none.
        spread: the longest response over the shortest; their lengths are evenly spaced, and the rest is padding.
        seed: of the random numbers.
    """

    pairs: int = 2
    tokens: int = 256
    hidden: int = 1024
    vocab: int = 65536
    masked: float = 0.25
    dtype: str = "bf16"
    logits: str = "random"
    softcap: float = 0.0
    spread: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pairs", "tokens", "hidden", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.masked < 1:
            raise ValueError(f"masked must be in [0, 1), got {self.masked}")
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"softcap must be a number >= 0 (0: none), got {self.softcap}")
        if not 1 <= self.spread < math.inf:
            raise ValueError(f"spread must be a number >= 1 (1: all responses are as long), got {self.spread}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}")
        if self.logits not in LOGITS:
            raise ValueError(f"logits must be one of {list(LOGITS)}, got {self.logits!r}")

    @property
    def sequences(self) -> int:
        return 2 * self.pairs

    @property
    def prompt(self) -> int:
        """Positions of each sequence that are not scored."""
        return int(self.tokens * self.masked)

    @property
    def scored(self) -> int:
        """N: scored tokens of the batch."""
        return sum(self.responses)

    @property
    def responses(self) -> list[int]:
        """Scored tokens of each sequence, which follow its prompt; from the longest to the shortest."""
        longest = self.tokens - self.prompt
        step = (longest - longest / self.spread) / (self.sequences - 1)
        return [max(1, round(longest - i * step)) for i in range(self.sequences)]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def head(self) -> HeadSpec:
        """What is done to the logits."""
        return HeadSpec(softcap=self.softcap or None)

    def __str__(self) -> str:
        softcap = f", softcap {self.softcap:g}" if self.softcap else ""
        spread = f", responses {self.spread:g}:1" if self.spread > 1 else ""
        return (
            f"{self.pairs} pairs x 2 x {self.tokens} tokens ({self.scored} scored), H={self.hidden}, V={self.vocab}, "
            f"{self.dtype}, {self.logits} logits{softcap}{spread}"
        )


def parse_shape(text: str) -> dict[str, Any]:
    """``"tokens=512,vocab=32000"`` as values of :class:`Shape`'s fields.

    Raises:
        ValueError: for an unknown key or a value of the wrong kind; the message lists the known keys.
    """
    kinds = {f.name: type(getattr(Shape, f.name)) for f in fields(Shape)}
    values: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, _, value = part.partition("=")
        if key not in kinds:
            raise ValueError(f"unknown shape key {key!r}; known keys: {', '.join(kinds)}")
        try:
            values[key] = kinds[key](value)
        except ValueError:
            raise ValueError(f"shape key {key!r} takes {kinds[key].__name__}, got {value!r}") from None
    Shape(**values)
    return values


#: Tasks that do not touch the head, and what they do instead.
_WITHOUT_HEAD = {"tile": "logits to gradient", "gae": "rewards and values to advantages"}


@dataclass(frozen=True)
class Case:
    """One table: a task on a shape.

    Attributes:
        suite: the suite that it belongs to.
        task: ``logps`` (log-probs under an arbitrary upstream gradient), ``nll``, a loss of :data:`~.losses.LOSSES` or
            :data:`~.policy_losses.POLICY_LOSSES`, ``tile`` (log-probs and gradient of logits that are there), or
            ``gae`` (advantages from rewards and values).
        train_head: whether the head's weight has a gradient.
        backward: whether there is a backward pass.
    """

    suite: str
    task: str
    shape: Shape
    train_head: bool = True
    backward: bool = True

    @property
    def gemms(self) -> int:
        """GEMMs of ``2*N*H*V`` FLOP that no implementation can do without."""
        return 0 if self.task in _WITHOUT_HEAD else 1 + int(self.backward) + int(self.backward and self.train_head)

    @property
    def floor(self) -> str:
        """What times are multiples of: the provider that is the roofline."""
        return "copy" if self.task in _WITHOUT_HEAD else "GEMM"

    @property
    def kind(self) -> str:
        """What is computed, in words."""
        what = _WITHOUT_HEAD.get(self.task) or ("forward + backward" if self.backward else "forward only")
        return what + ("" if self.train_head else ", frozen head")

    @property
    def title(self) -> str:
        return f"{self.suite}: {self.task} {self.kind}; {self.shape}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Case:
        return cls(**{**values, "shape": Shape(**values["shape"])})


@dataclass
class Rollouts:
    """What a policy update is given besides hidden states and labels; shaped like the labels where no shape is given.

    Attributes:
        old_logps: float32, within 0.5 of the policy's, some of them beyond the clipping range and none near its ends: whether
            a token is clipped must not be decided by a rounding.
        advantages: float32; in ``dapo`` those of the sequences. sequence_advantages: (S,).
        rewards, values: float32, 0 in the padding; for ``gae``.
        cu_seqlens: (S + 1,) int32, where each sequence starts and ends among packed tokens.
        present: (S, T) bool, what is not padding.
        packed: the same inputs packed: hidden (P, H) is a leaf of its own, labels and what is shaped like them (P,).
    """

    old_logps: Tensor
    advantages: Tensor
    sequence_advantages: Tensor
    rewards: Tensor
    values: Tensor
    cu_seqlens: Tensor
    present: Tensor
    packed: Inputs | None = None


@dataclass
class Inputs:
    """The tensors of a case, the same for every provider. S sequences of T tokens.

    Attributes:
        hidden: (S, T, H) leaf. weight: (V, H) leaf, with a gradient where the case trains the head.
        labels: (S, T) int64, already shifted, -100 in the prompt.
        ref_logps: (S,) log-probabilities of the reference. One number for all sequences, so that it cancels in a pair and
            in KTO can be moved to the KL term: that gives Liger, which takes no reference log-probabilities, the same loss.
        desirable: (S,) bool, for KTO. kl: 0-dim, for KTO.
        upstream: (S, T) float32, the gradient of the log-probs in ``logps``.
        rollouts: for the tasks of the suites ``policy`` and ``gae``.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_logps: Tensor
    desirable: Tensor
    kl: Tensor
    upstream: Tensor
    rollouts: Rollouts | None = None

    @property
    def scored(self) -> Tensor:
        return self.labels != IGNORE

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are wanted."""
        return [t for t in (self.hidden, self.weight) if t.requires_grad]


_FILL_ROWS = 1024


def _normal(shape: tuple[int, ...], std: float, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Tensor:
    """Random numbers in ``dtype``, a few rows at a time: a float32 copy of a large weight would blur the memory figures.

    Drawn by all cores, each block of rows by a generator of its own: a weight of 152k x 4096 takes one core 8 seconds. A GPU
    draws its own.
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
    s, t, h, v = shape.sequences, shape.tokens, shape.hidden, shape.vocab
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
    # Of N(0, 1) logits the log-sum-exp is log V + 1/2; with that, the reference lands where the policy is on average, and
    # no loss of log-ratios is saturated.
    targets = (hidden[scored.to(device)].float() * weight[labels[scored].to(device)].float()).sum(-1)
    targets = shape.head.apply(targets)
    others = torch.full_like(targets, math.log(v) + 0.5)
    constant = (targets - torch.logaddexp(others, targets)).mean().item() * (t - shape.prompt)
    inputs = Inputs(
        hidden=hidden.requires_grad_(case.backward),
        weight=weight.requires_grad_(case.backward and case.train_head),
        labels=labels.to(device),
        ref_logps=torch.full((s,), constant, device=device),
        desirable=(torch.arange(s) % 2 == 0).to(device),
        kl=torch.tensor(0.5, device=device),
        upstream=upstream.to(device),
    )
    if case.task in ROLLOUT_TASKS:
        inputs.rollouts = _make_rollouts(case, inputs, present, g)
    return inputs


#: Distances of the policy from the one that sampled: the clipping ranges end at -0.22, 0.18 and 0.25.
_LOG_RATIOS = (0.0, 0.05, -0.05, 0.1, -0.1, 0.5, -0.5)


def _make_rollouts(case: Case, inputs: Inputs, present: Tensor, g: torch.Generator) -> Rollouts:
    """present (S, T) bool."""
    (s, t), device = present.shape, inputs.hidden.device
    of_sequences = torch.randn(s, generator=g)
    of_tokens = torch.randn(s, t, generator=g)
    rewards, values = (torch.where(present, torch.randn(s, t, generator=g), 0).to(device) for _ in range(2))
    log_ratios = torch.tensor(_LOG_RATIOS)[torch.randint(len(_LOG_RATIOS), (s, t), generator=g)].to(device)
    advantages = (of_tokens if case.task == "ppo" else of_sequences[:, None].expand(s, t)).to(device)
    old_logps = torch.zeros((s, t), device=device)
    if case.task != "gae":
        old_logps = torch.where(inputs.scored, _estimated_logps(case, inputs) - log_ratios, 0)
    present = present.to(device)
    lengths = torch.cat([torch.zeros(1, dtype=torch.long, device=device), present.sum(1)])
    cu_seqlens = lengths.cumsum(0).int()
    found = Rollouts(old_logps, advantages, of_sequences.to(device), rewards, values, cu_seqlens, present)
    like_labels = {name: getattr(found, name)[present] for name in ("old_logps", "advantages", "rewards", "values")}
    hidden = inputs.hidden.detach()[present].requires_grad_(inputs.hidden.requires_grad)
    found.packed = replace(inputs, hidden=hidden, labels=inputs.labels[present], rollouts=replace(found, **like_labels))
    return found


@torch.no_grad()
def _estimated_logps(case: Case, inputs: Inputs) -> Tensor:
    """Log-probs (S, T) of the scored tokens, a few at a time, from logits in the model's dtype but for the label's."""
    scored, weight, head = inputs.scored, inputs.weight, case.shape.head
    hidden, labels = inputs.hidden[scored], inputs.labels[scored]
    parts = []
    for x, y in zip(hidden.split(_FILL_ROWS // 8), labels.split(_FILL_ROWS // 8), strict=True):
        others = head.apply((x @ weight.t()).float()).logsumexp(-1)
        parts.append(head.apply((x.float() * weight[y].float()).sum(-1)) - others)
    return torch.zeros(scored.shape, device=hidden.device).masked_scatter(scored, torch.cat(parts))


#: Tasks whose inputs hold rollouts.
ROLLOUT_TASKS = frozenset({"gae", *POLICY_LOSSES})
