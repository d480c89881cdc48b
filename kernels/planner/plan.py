"""The planner: which schedule a call runs, in which tiles, on which backend, and what that costs. A pure function of shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..core.blocking import MOST_ROWS, PASS_BUFFERS, ROW_ELEMENTS, ROW_MULTIPLE, VOCAB_BLOCK
from ..core.dtypes import gemm_dtype
from ..core.stats import CoreOptions
from ..cost_model.costs import Cost
from ..parallel.vocab_parallel import VocabParallel
from .choice import Served, choose, serve
from .drafts import drafts_for
from .request import Request, checked_request
from .steps import DEFERRED_SCALE, Step

#: Bytes of the statistics of a token and of their sums in the C++ backend: without and with other outputs than logps.
_TOKEN_BYTES = (384, 2048)


@dataclass(frozen=True)
class Plan:
    """What a call would do. ``print(plan)`` says it in words.

    Attributes:
        schedule: the schedule of all steps, or ``"mixed"``.
        steps: what happens in order; see :class:`Step`.
        flops: of all GEMMs, forward and backward.
        passes: ``flops / (N * H * V)``: each GEMM of the head's size counts 2, so 6 is one forward and one backward pass.
        extra_bytes: upper bound on what the call allocates beyond its inputs, gradients included.
        accumulate: whether dW is collected in a float32 buffer of the weight's size.
        options: what backends are told.
        backend: the name of the one that serves the call. Behind ``arbitrary_loss`` on a GPU the forward and the backward
            pass each have their own; where these differ, both, joined by ``" + "``.
        reason: why this schedule; on a GPU also why this backend.
        cost: predicted FLOP, bytes and seconds on the GPU; ``None`` on CPUs and without tokens.
        sent_bytes: what a rank sends where the head is sharded (``parallel``), by the policy's pass: target logits, statistics,
            hidden states and their gradient, over ring collectives. Without the few numbers that ranks agree on first.
        alternatives: predicted seconds on each backend that could serve the call, this one among them.
    """

    schedule: str
    steps: tuple[Step, ...]
    flops: int
    passes: float
    extra_bytes: int
    accumulate: bool
    options: CoreOptions
    backend: str
    reason: str
    cost: Cost | None = None
    alternatives: Mapping[str, float] = field(default_factory=dict, hash=False)
    sent_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.schedule}: {self.passes:.2f}*N*H*V FLOP ({self.flops / 1e9:.3g} GFLOP), "
            f"{len(self.steps)} step(s) on backend {self.backend}, at most {self.extra_bytes / 2**20:.1f} MiB extra; "
            f"{self.reason}"
        )


def plan(
    *,
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    group_sizes: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    train_hidden: bool = True,
    train_weight: bool = True,
    train_bias: bool = False,
    arbitrary_loss: bool = False,
    margin: bool = False,
    memory_budget: int | None = None,
    precision: str | None = None,
    device: str | torch.device = "cpu",
    outputs: str | Iterable[str] = ("logps",),
    token_groups: bool = False,
    entropy_gradient: bool = False,
    architecture: str | None = None,
    lora_rank: int = 0,
    quantized: bool = False,
    parallel: VocabParallel | None = None,
) -> Plan:
    """Choose the schedule with the fewest FLOP that fits the budget; on a GPU, one with more if it should be much faster.

    Args:
        num_tokens: scored tokens, N.
        hidden_size: H.
        vocab_size: V.
        group_sizes: tokens of each group whose loss coefficients depend on each other (a pair for DPO, a sequence for KTO);
            default one group of all tokens. The plan takes the largest groups first; its steps count in that order.
        dtype: of the hidden states (the autocast dtype under autocast).
        weight_dtype: of the head's weight; default ``dtype``.
        train_hidden, train_weight, train_bias: which gradients are wanted.
        arbitrary_loss: an unknown loss follows, as behind ``linear_logps``; its coefficients arrive in the backward pass.
        margin: the loss depends on a pair only through one scalar, so a pair's gradient is known up to that scalar.
        memory_budget, precision: default from :func:`logitless.settings`.
        device: where the tensors live.
        outputs: token statistics wanted.
        token_groups: every token is a group of its own (PPO), so tiles may end anywhere; in place of ``group_sizes``.
        entropy_gradient: the loss depends on each token's entropy too.
        architecture: plan for a GPU that may not be here, such as ``"sm_90"``, as if every backend ran on it; with
            ``device="cuda"``. Default the device's own.
        lora_rank: r of the adapters of a :class:`logitless.LoRAWeight`, together; ``train_weight`` and ``weight_dtype`` are
            then of B, and the weight under the adapter is frozen. 0: no adapter.
        quantized: the weight (under an adapter, if there is one) is quantised.
        parallel: the head is sharded over its vocabulary. ``vocab_size`` is that of the whole head, padding included, which is
            taken as divided evenly. FLOP, passes and bytes are those of one rank.

    Returns:
        Plan: steps, FLOP and bytes; on GPUs also predicted seconds, see ``docs/ARCHITECTURE.md``.

    Raises:
        TypeError, ValueError: naming the argument, when a size is not positive, the groups do not add up to ``num_tokens`` ...

    Example:
        >>> plan(num_tokens=768, hidden_size=1024, vocab_size=65536).schedule
        'gradient_in_forward'
        >>> plan(num_tokens=768, hidden_size=1024, vocab_size=65536, device="cuda", architecture="sm_90").cost.flops
        309237645312
    """
    request = checked_request(
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        group_sizes=group_sizes,
        dtype=dtype,
        weight_dtype=weight_dtype,
        train_hidden=train_hidden,
        train_weight=train_weight,
        train_bias=train_bias,
        arbitrary_loss=arbitrary_loss,
        margin=margin,
        memory_budget=memory_budget,
        precision=precision,
        device=device,
        outputs=outputs,
        token_groups=token_groups,
        entropy_gradient=entropy_gradient,
        architecture=architecture,
        lora_rank=lora_rank,
        quantized=quantized,
        parallel=parallel,
    )
    served, reason = choose([serve(draft, request) for draft in drafts_for(request)])
    draft = served.draft
    names = {s.schedule for s in draft.steps}
    return Plan(
        schedule=names.pop() if len(names) == 1 else "mixed",
        steps=draft.steps,
        flops=round(draft.passes * num_tokens * request.vocab_size * hidden_size),
        passes=draft.passes,
        extra_bytes=_extra_bytes(request, served),
        accumulate=draft.accumulate,
        options=request.options,
        backend=served.name,
        reason=reason,
        cost=served.cost,
        alternatives={name: cost.seconds for name, cost in served.costs.items()},
        sent_bytes=_sent_bytes(request),
    )


def _sent_bytes(r: Request) -> int:
    """What a rank sends of the policy's tokens: an all-reduce of b bytes takes 2 (W - 1) / W * b from each of W ranks, an
    all-gather (W - 1) times its own bytes, a reduce-scatter (W - 1) / W * b."""
    if r.parallel is None:
        return 0
    ranks, columns = r.parallel.ranks, 2 + len(r.wanted) + 2 * ("is_top1" in r.wanted)
    numbers = r.num_tokens * r.acc * (2 / ranks + columns)
    rows = r.num_tokens * r.hidden_size
    if r.parallel.sequence_parallel:
        states = rows / ranks * r.dtype.itemsize * (1 + r.train_hidden)
    else:
        states = 2 * rows / ranks * r.acc * r.train_hidden
    return round((ranks - 1) * (numbers + states))


def _extra_bytes(request: Request, served: Served) -> int:
    """Upper bound on what the call allocates beyond its inputs."""
    r, draft = request, served.draft
    hidden_size, head_elements = r.hidden_size + r.lora_rank, r.head_elements
    token_bytes = hidden_size * (8 if r.acc == 4 else 24) + _TOKEN_BYTES[bool(r.wanted)]
    extra = max(r.budget, draft.tile_bytes + r.overhead) + r.num_tokens * token_bytes
    if gemm_dtype(r.dtype, r.device) != r.dtype:  # operands are widened: the rows at once, the weight block by block
        extra += (r.num_tokens + min(r.vocab_size, VOCAB_BLOCK)) * hidden_size * 4
    if r.quantized or r.lora_rank:  # the block that is read, and the rows of it that are being converted
        extra += min(r.vocab_size, VOCAB_BLOCK) * hidden_size * r.dtype.itemsize + 4 * ROW_ELEMENTS * r.acc
    if r.train_weight:
        extra += head_elements * ((r.acc if draft.accumulate else 0) + r.weight_dtype.itemsize)
        if sum(s.schedule == DEFERRED_SCALE for s in draft.steps) > 1:
            extra += max(0, r.acc * head_elements - r.tile_budget)
    if r.train_bias:
        extra += 3 * r.acc * r.vocab_size
    if r.options.batch_invariant:  # a block of tokens with its padding, and blocks that the budget does not bound
        extra += min(r.num_tokens + ROW_MULTIPLE, MOST_ROWS) * r.hidden_size * r.acc
        extra += ROW_MULTIPLE * min(r.vocab_size, VOCAB_BLOCK) * r.acc
        extra += max(0, r.options.workspace + r.options.cache_elements * PASS_BUFFERS * r.acc - r.budget)
    if r.parallel is not None:  # statistics of all ranks, gathered; hidden states of all ranks, their padding and gradient
        extra += r.parallel.ranks * r.num_tokens * 8 * 2 * r.acc
        if r.parallel.sequence_parallel:
            extra += 4 * r.num_tokens * hidden_size * r.dtype.itemsize
    # blocks of a fixed size that no budget shrinks: rows being widened, and a GEMM's product on its way to float32
    extra += 3 * min(r.num_tokens * hidden_size, ROW_ELEMENTS) * r.acc
    extra += min(r.vocab_size, VOCAB_BLOCK) * hidden_size * r.acc
    return extra + max(b.workspace_bytes(c) for b, c in zip(served.backends, served.calls, strict=True))
