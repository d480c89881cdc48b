"""What is benchmarked: shapes, the tensors of a shape, cases, and the suites that group them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from logitless.kernels.spec import HeadSpec

from .losses import LOSSES
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
            :data:`~.policy_losses.POLICY_LOSSES`, ``tile`` (log-probs and gradient of logits that are there), ``gae``
            (advantages from rewards and values), or ``train`` (a whole trainer step).
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

    Drawn by all cores, each block of rows by a generator of its own: a weight of 152k x 4096 takes one core 8 seconds.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    parts = out.view(-1, shape[-1]).split(_FILL_ROWS)
    seeds = torch.randint(2**62, (len(parts),), generator=g).tolist()

    def fill(rows: Tensor, seed: int) -> None:
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).mul_(std))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, parts, seeds))
    return out


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """The tensors of a case; the same on every call, machine and device."""
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


@dataclass(frozen=True)
class Suite:
    """A named group of cases.

    Attributes:
        cases: the cases for a base shape; the flag says whether ``--quick`` was given.
        base, quick: the base shape, and what ``--quick`` changes in it.
        providers: names that run by default; empty: all that could.
        quick_providers: those of ``--quick``, where they are fewer.
    """

    name: str
    help: str
    cases: Callable[[Shape, bool], list[Case]]
    base: Shape
    quick: Mapping[str, Any]
    providers: tuple[str, ...] = ()
    quick_providers: tuple[str, ...] = ()

    def make(self, overrides: Mapping[str, Any], quick: bool) -> list[Case]:
        """Its cases, with some values of the shape replaced."""
        return self.cases(replace(self.base, **{**(self.quick if quick else {}), **overrides}), quick)


#: The shape that the project's speed and precision targets are stated for.
HEADLINE = Shape()
#: The same for one H100: every position is scored, so N is 8192.
GPU_HEADLINE = Shape(pairs=4, tokens=1024, hidden=4096, vocab=151936, masked=0.0)
_GPU_OTHERS = (
    replace(GPU_HEADLINE, vocab=128256),
    replace(GPU_HEADLINE, pairs=8, hidden=2048),
    replace(GPU_HEADLINE, hidden=1024),
    replace(GPU_HEADLINE, hidden=2304, vocab=256000, softcap=30.0),
)
_SMALL = Shape(hidden=512, vocab=32768)
_TINY = {"tokens": 64, "hidden": 256, "vocab": 8192}
_ON_GPUS = ("logitless@torch", "logitless@cuda", "logitless@triton")
_SWEEP = ("gemm", "torch", "trl", "liger", "logitless", "logitless:op", "logitless:small")


def _single(suite: str, task: str, **options: bool) -> Callable[[Shape, bool], list[Case]]:
    return lambda shape, quick: [Case(suite, task, shape, **options)]


def _sweep(suite: str) -> Callable[[Shape, bool], list[Case]]:
    """DPO on sequences of ``tokens``, and of half, a quarter ... as many."""

    def cases(shape: Shape, quick: bool) -> list[Case]:
        lengths = sorted({max(2, shape.tokens >> i) for i in range(3 if quick else 4)})
        return [Case(suite, "dpo", replace(shape, tokens=n)) for n in lengths]

    return cases


def _headline(shape: Shape, quick: bool) -> list[Case]:
    return [Case("dpo", task, shape) for task in (("dpo",) if quick else ("dpo", "nll"))]


def _losses(shape: Shape, quick: bool) -> list[Case]:
    return [Case("losses", task, shape) for task in LOSSES]


def _gpu(shape: Shape, quick: bool) -> list[Case]:
    """DPO trained, frozen and forward only: the headline first, so that a time limit leaves it in; another shape alone."""

    def three(one: Shape) -> list[Case]:
        case = Case("gpu", "dpo", one)
        return [case, replace(case, train_head=False), replace(case, backward=False)]

    if shape != GPU_HEADLINE:
        return three(shape)
    others = [] if quick else [three(one) for one in _GPU_OTHERS]
    return three(shape) + [case for kind in zip(*others) for case in kind]  # first all that are trained


#: Ragged responses with as many scored tokens as the headline.
POLICY = Shape(pairs=4, tokens=170, spread=2.0)
_RAGGED = 10.0
_FOR_POLICY = (
    "gemm:policy",
    "torch:policy",
    "torch:padded",
    "verl-style:policy",
    "trl:policy",
    "trl:policy-scored",
    "liger:policy",
    "logitless:policy",
    "logitless:policy-op",
)


def _policy(suite: str) -> Callable[[Shape, bool], list[Case]]:
    """The losses, a frozen head, an entropy bonus, and about as many tokens in responses of lengths 10:1."""

    def cases(shape: Shape, quick: bool) -> list[Case]:
        dapo = Case(suite, "dapo", shape)
        # N is a multiple of 64 at the suites' own shapes: 766 tokens took the bare GEMMs a quarter longer than 768 (seen)
        longer = replace(shape, tokens=math.ceil(1.25 * shape.tokens), spread=_RAGGED)
        return [
            dapo,
            replace(dapo, train_head=False),
            replace(dapo, task="dapo-entropy", shape=replace(shape, logits="peaked")),
            replace(dapo, shape=longer),
            replace(dapo, task="ppo"),
        ]

    return cases


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "dpo",
            "the headline: DPO with a trained head at the shape of the targets",
            _headline,
            HEADLINE,
            {},
            quick_providers=("gemm", "torch", "torch-compile", "trl", "liger", "logitless"),
        ),
        Suite("op", "log-probs under an arbitrary upstream gradient", _single("op", "logps"), _SMALL, _TINY),
        Suite("losses", "NLL and every preference loss", _losses, replace(_SMALL, tokens=128), _TINY),
        Suite("forward", "forward only", _single("forward", "logps", backward=False), HEADLINE, _TINY),
        Suite(
            "tile",
            "the element-wise pass alone, against a copy of the tile",
            _single("tile", "tile", backward=False),
            replace(HEADLINE, hidden=64),
            {"tokens": 64},
        ),
        Suite(
            "gpu",
            "DPO at the sizes of one H100: trained head, frozen head, forward only",
            _gpu,
            GPU_HEADLINE,
            {},
            ("gemm", "torch", "torch-compile", "trl", "liger", "cce", "logitless", *_ON_GPUS),
        ),
        Suite("frozen", "DPO with a frozen head", _single("frozen", "dpo", train_head=False), _SMALL, _TINY),
        Suite(
            "long",
            "DPO on long sequences, against their length",
            _sweep("long"),
            Shape(pairs=1, tokens=8192, hidden=256, vocab=32768),
            {"tokens": 1024, "vocab": 8192},
            _SWEEP,
        ),
        Suite(
            "vocab",
            "DPO with a vocabulary of 2^18",
            _single("vocab", "dpo"),
            Shape(tokens=128, hidden=512, vocab=262144),
            {"tokens": 32, "hidden": 128},
            _SWEEP,
        ),
        Suite(
            "masked",
            "DPO where nine tenths of each sequence is prompt",
            _single("masked", "dpo"),
            replace(_SMALL, tokens=512, masked=0.9),
            {**_TINY, "tokens": 128},
        ),
        Suite(
            "memory",
            "DPO: time and peak memory against sequence length",
            _sweep("memory"),
            Shape(tokens=1024, hidden=256, vocab=32768),
            {"tokens": 512, "vocab": 16384},
            _SWEEP,
            ("gemm", "torch", "trl", "liger", "logitless"),  # each of them is a process of its own at each length
        ),
        Suite(
            "train",
            "a whole step of TRL's DPOTrainer on a small transformer with random weights",
            _single("train", "train"),
            Shape(tokens=128, hidden=256, vocab=32768),
            {"tokens": 32, "hidden": 64, "vocab": 4096},
        ),
        Suite(
            "policy",
            "one update of policy training: GRPO's and PPO's losses on packed responses of different lengths",
            _policy("policy"),
            POLICY,
            _TINY,
            _FOR_POLICY,
        ),
        Suite(
            "policy-gpu",
            "the same at the size of one H100",
            _policy("policy-gpu"),
            replace(GPU_HEADLINE, pairs=8, masked=0.25, spread=3.0),
            {},
            (*_FOR_POLICY, *(f"logitless:policy{op}@{name}" for op in ("", "-op") for name in ("torch", "cuda", "triton"))),
        ),
        Suite(
            "gae",
            "generalized advantage estimation of 1M packed tokens",
            _single("gae", "gae", backward=False),
            Shape(pairs=512, tokens=1862, hidden=1, vocab=2, masked=0.0, dtype="fp32", spread=_RAGGED),
            {"pairs": 64},
        ),
    )
}
