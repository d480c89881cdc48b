"""The planner: which schedule a call runs, in which tiles, on which backend, and what that costs. A pure function of shapes."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..core.checks import DTYPES, check_outputs
from ..core.dtypes import accumulate_dtype, gemm_dtype, logits_gemm_dtype, tile_dtype
from ..core.settings import current_settings
from ..core.stats import CoreOptions

if TYPE_CHECKING:
    from ..backends.registry import Call, Work
    from .cost import Cost

log = logging.getLogger("logitless")

#: Vocabulary entries per block of logits: a block of 768 tokens fits a 32 MiB L3, and the GEMM runs at full speed.
VOCAB_BLOCK = 8192
_MIN_BLOCK = 256
_CACHE_ELEMENTS = 1 << 20
_ROW_ELEMENTS = 1 << 19
_WORKSPACE = 32 << 20
#: float32 buffers of the element-wise pass, in elements of its cache block: the block, a second one, the soft-cap's square.
_PASS_BUFFERS = 3

#: Statistics of a token, and what the C++ backend adds up for it: without and with other outputs than logps.
_TOKEN_BYTES = (384, 2048)
#: What each of its threads works in, whatever the shape, and 4 bytes a token.
_THREAD_BYTES = 3 << 20
#: The triton backend's partial sums: tokens and vocabulary entries of a block, and its rows for each output besides two.
_PARTIAL_BLOCK = 128
_PARTIAL_ROWS = {"entropy": 1, "mean_logits": 1, "is_top1": 3, "log_sum_sq_probs": 1}
#: A schedule with more FLOP is taken on a GPU if its predicted time is less than this part of the other's: predictions err.
_WORTH_MORE_FLOP = 0.9

FORWARD_ONLY = "forward_only"
GRADIENT_IN_FORWARD = "gradient_in_forward"
DEFERRED_SCALE = "deferred_scale"
RECOMPUTE = "recompute"
SCHEDULES = (FORWARD_ONLY, GRADIENT_IN_FORWARD, DEFERRED_SCALE, RECOMPUTE)


def block_shape(num_tokens: int, vocab_size: int, bytes_per_element: int, workspace: int) -> tuple[int, int]:
    """Rows and columns of a block of logits that fits ``workspace`` bytes; columns shrink before rows fall below 256."""
    width = min(vocab_size, VOCAB_BLOCK)
    rows = max(1, workspace // (width * bytes_per_element))
    if rows < min(num_tokens, 256):
        width = min(width, max(_MIN_BLOCK, workspace // (min(num_tokens, 256) * bytes_per_element)))
        rows = max(1, workspace // (width * bytes_per_element))
    return min(rows, max(1, num_tokens)), width


def partial_sum_bytes(vocab_size: int, outputs: Iterable[str] = ()) -> int:
    """A token's sums over each block of the vocabulary, which the triton backend keeps until they are added up."""
    rows = 2 + sum(_PARTIAL_ROWS.get(name, 0) for name in outputs)
    return 4 * rows * -(-vocab_size // _PARTIAL_BLOCK)


@dataclass(frozen=True)
class Step:
    """Groups ``first_group:last_group`` and their tokens ``start:stop``, done by one schedule in tiles of ``rows`` tokens."""

    schedule: str
    first_group: int
    last_group: int
    start: int
    stop: int
    rows: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


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

    def __str__(self) -> str:
        return (
            f"{self.schedule}: {self.passes:.2f}*N*H*V FLOP ({self.flops / 1e9:.3g} GFLOP), "
            f"{len(self.steps)} step(s) on backend {self.backend}, at most {self.extra_bytes / 2**20:.1f} MiB extra; "
            f"{self.reason}"
        )


def core_options(
    memory_budget: int,
    outputs: frozenset[str],
    precision: str,
    itemsize: int,
    device: torch.device,
    grad_filter: float = 0.0,
) -> CoreOptions:
    """Split the budget: a quarter at most for the cache blocks of the element-wise pass, and for blocks of logits what an L3
    holds on a CPU, or another quarter on a GPU, whose GEMMs want more rows."""
    cache = min(_CACHE_ELEMENTS, max(256, memory_budget // (4 * _PASS_BUFFERS * itemsize)))
    most = max(_WORKSPACE, memory_budget // 4) if device.type == "cuda" else _WORKSPACE
    workspace = min(most, max(1, memory_budget - cache * _PASS_BUFFERS * itemsize))
    return CoreOptions(outputs, precision, workspace, cache, grad_filter)


class _Draft(NamedTuple):
    """What a plan may do, before it is known who does it."""

    steps: tuple[Step, ...]
    passes: float
    reason: str
    accumulate: bool = False
    tile_bytes: int = 0


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < (0 if name == "num_tokens" else 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


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
    from ..backends.registry import Call  # which needs this module

    _check_positive(num_tokens=num_tokens, hidden_size=hidden_size, vocab_size=vocab_size)
    current = current_settings().updated(memory_budget=memory_budget, precision=precision)
    budget, precision = current.memory_budget, current.precision
    device = torch.device(device)
    _check_architecture(architecture, device)
    for name, value in (("dtype", dtype), ("weight_dtype", dtype if weight_dtype is None else weight_dtype)):
        if value not in DTYPES:
            raise TypeError(f"{name} must be one of {DTYPES}, got {value!r}")
    wanted = check_outputs(outputs) - {"logps"}
    if entropy_gradient:
        wanted |= {"entropy"}
    if token_groups and (group_sizes is not None or arbitrary_loss):
        raise ValueError("token_groups goes without group_sizes and arbitrary_loss")
    groups = [num_tokens] if group_sizes is None else list(group_sizes)
    if any(isinstance(g, bool) or not isinstance(g, int) for g in groups):
        raise TypeError(f"group_sizes must be integers, got {group_sizes!r}")
    groups.sort(reverse=True)
    if sum(groups) != num_tokens or (groups and groups[-1] < 0):
        raise ValueError(f"group_sizes must be >= 0 and add up to num_tokens={num_tokens}, got a sum of {sum(groups)}")
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    acc = accumulate_dtype(dtype).itemsize
    options = core_options(budget, wanted, precision, acc, device, current.grad_filter)
    options = replace(options, slopes_later=entropy_gradient)
    needs_head = train_weight or train_bias
    vh = vocab_size * hidden_size
    row_bytes = vocab_size * tile_dtype(dtype, device).itemsize
    overhead = options.cache_elements * _PASS_BUFFERS * acc
    if device.type == "cuda" or logits_gemm_dtype(dtype, device, precision) != tile_dtype(dtype, device):
        overhead += options.workspace  # the logits need a block of their own beside the tile
    tile_budget = max(0, budget - overhead)

    whole = (Step(RECOMPUTE, 0, len(groups), 0, num_tokens, num_tokens),)
    recompute = _Draft(whole, 4.0 + 2 * (train_hidden + train_weight), "")
    drafts: list[_Draft]  # the second, if any, has more FLOP
    if not (train_hidden or needs_head):
        drafts = [_Draft(tuple(replace(s, schedule=FORWARD_ONLY) for s in whole), 2.0, "no gradient is needed")]
    elif not needs_head and not entropy_gradient:
        reason = "the head is frozen: dX is known up to one factor a row, so no tile is kept"
        drafts = [_Draft(tuple(replace(s, schedule=DEFERRED_SCALE) for s in whole), 4.0, reason)]
    elif arbitrary_loss:
        reason = "an arbitrary loss follows and the head is trained: the backward pass makes the logits again"
        drafts = [recompute._replace(reason=reason)]
    else:
        # Several tiles need a float32 accumulator for dW; one tile that is no larger than it saves both.
        spare = acc * vh if train_weight else 0
        rows = num_tokens if num_tokens * row_bytes <= tile_budget + spare else max(1, tile_budget // row_bytes)
        second = margin and spare <= tile_budget // 2
        if second and sum(g > rows for g in groups) > 1:  # pairs wait for their margins in an accumulator of their own
            rows = max(1, (tile_budget - spare) // row_bytes)
        steps, again = _token_steps(num_tokens, rows) if token_groups else _loss_steps(groups, rows, margin, second)
        tiles = sum(_tiles(s) for s in steps)
        if token_groups:
            reason = (
                f"no token waits for another: the gradients are made in the forward pass, in {tiles} tile(s) of up to {rows}"
            )
        elif again:
            reason = f"{again} tokens are in groups of more than the {rows} that a tile holds; their logits are made twice"
        elif steps[0].schedule == DEFERRED_SCALE:
            reason = f"a pair exceeds a tile of {rows} tokens; its gradient is scaled once its margin is known"
        else:
            reason = f"every group fits a tile of {rows} tokens, so the gradients are made in the forward pass"
        largest = max((min(rows, s.num_tokens) for s in steps if s.schedule != RECOMPUTE), default=0)
        passes = 2.0 + 2 * (train_hidden + train_weight) + 2 * again / max(1, num_tokens)
        drafts = [_Draft(steps, passes, reason, tiles > 1 and needs_head, largest * row_bytes)]
        if tiles > 1 and device.type == "cuda":
            reason = f"{tiles} tiles of at most {rows} tokens"
            drafts.append(recompute._replace(reason=reason))
    if weight_dtype == torch.float16:  # unscaled fp16 gradients would underflow before the loss scale arrives
        drafts = [d._replace(accumulate=d.accumulate or needs_head) for d in drafts]
    call = Call(
        device,
        dtype,
        weight_dtype,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        workspace=options.workspace,
        train_hidden=train_hidden,
        train_weight=train_weight,
        architecture=architecture,
        grad_filter=options.grad_filter,
    )
    served, reason = _choose([_served(d, call, needs_head, separately=arbitrary_loss) for d in drafts])
    steps, passes, _, accumulate, tile_bytes = served.draft
    names = {s.schedule for s in steps}
    token_bytes = hidden_size * (8 if acc == 4 else 24) + _TOKEN_BYTES[bool(wanted)]
    extra = max(budget, tile_bytes + overhead) + num_tokens * token_bytes
    if gemm_dtype(dtype, device) != dtype:  # operands are widened: the rows at once, the weight block by block
        extra += (num_tokens + min(vocab_size, VOCAB_BLOCK)) * hidden_size * 4
    if train_weight:
        extra += vh * ((acc if accumulate else 0) + weight_dtype.itemsize)
        if sum(s.schedule == DEFERRED_SCALE for s in steps) > 1:
            extra += max(0, acc * vh - tile_budget)
    # blocks of a fixed size that no budget shrinks: rows being widened, and a GEMM's product on its way to float32
    extra += 3 * min(num_tokens * hidden_size, _ROW_ELEMENTS) * acc + min(vocab_size, VOCAB_BLOCK) * hidden_size * acc
    if device.type == "cpu":
        extra += torch.get_num_threads() * (_THREAD_BYTES + 4 * num_tokens)
    if device.type == "cuda":  # the least that the triton backend keeps of partial sums, however small the workspace
        extra += _PARTIAL_BLOCK * partial_sum_bytes(vocab_size, wanted)
    if train_bias:
        extra += 3 * acc * vocab_size
    return Plan(
        schedule=names.pop() if len(names) == 1 else "mixed",
        steps=steps,
        flops=round(passes * num_tokens * vh),
        passes=passes,
        extra_bytes=extra,
        accumulate=accumulate,
        options=options,
        backend=served.backend,
        reason=reason,
        cost=served.cost,
        alternatives={name: cost.seconds for name, cost in served.costs.items()},
    )


def _check_architecture(architecture: str | None, device: torch.device) -> None:
    from .gpu_constants import constants

    if architecture is None:
        return
    if not isinstance(architecture, str) or architecture not in constants():
        raise ValueError(f"architecture must be None or one of {', '.join(constants())}, got {architecture!r}")
    if device.type != "cuda":
        raise ValueError(f"architecture={architecture!r} needs device='cuda', got device={str(device)!r}")


def _tiles(step: Step) -> int:
    """In which a step's gradients are made; what is recomputed counts as one."""
    return -(-step.num_tokens // step.rows) if step.schedule == DEFERRED_SCALE else 1


def _calls(draft: _Draft, call: Call, needs_head: bool) -> list[Call]:
    """What a backend is asked for: ``call`` with the tokens of each kind of step. Never empty."""
    tokens: dict[Work, int] = {}
    tiles = 0
    for step in draft.steps:
        works: tuple[Work, ...] = ("tile",)
        if step.schedule in (FORWARD_ONLY, RECOMPUTE):
            works = ("forward",) if step.schedule == FORWARD_ONLY else ("forward", "recompute")
        elif step.schedule == DEFERRED_SCALE and not needs_head:
            works = ("frozen",)
        else:
            tiles += _tiles(step)
        for work in works:
            tokens[work] = tokens.get(work, 0) + step.num_tokens
    return [
        replace(call, work=work, num_tokens=n, tiles=tiles if work == "tile" else 1, accumulate=draft.accumulate)
        for work, n in tokens.items()
    ]


class _Served(NamedTuple):
    """A draft and who does it."""

    draft: _Draft
    backend: str
    cost: Cost | None
    costs: dict[str, Cost]  # of every backend that could


def _served(draft: _Draft, call: Call, needs_head: bool, separately: bool) -> _Served:
    """The backends that are best for a draft: one for all of it, or one for each of its calls."""
    from ..backends.registry import rank_backends

    calls = _calls(draft, call, needs_head)
    ranks = [rank_backends(part) for part in ([[c] for c in calls] if separately else [calls])]
    names = " + ".join(dict.fromkeys(rank[0][0].name for rank in ranks))
    log.debug("backend %s serves %s", names, calls)
    totals: dict[str, Cost] = {}
    for name in (names, *(backend.name for backend, _ in ranks[0])):
        found = [next((c for b, c in rank if name in (names, b.name)), None) for rank in ranks]
        known = [c for c in found if c is not None]
        if len(known) == len(ranks):
            totals[name] = functools.reduce(operator.add, known)
    return _Served(draft, names, totals.get(names), totals)


def _choose(served: list[_Served]) -> tuple[_Served, str]:
    """One of the drafts, the first of which has the fewest FLOP, and why."""
    from .cost import describe, milliseconds

    best, *others = served
    reason = best.draft.reason
    for other in others:
        if best.cost is None or other.cost is None:
            continue
        times = milliseconds(best.cost.seconds), milliseconds(other.cost.seconds)
        if other.cost.seconds < _WORTH_MORE_FLOP * best.cost.seconds:
            reason = f"{other.draft.reason} would take {times[0]}, recompute with its extra GEMM {times[1]}"
            best = other
        else:
            reason += f"; they would take {times[0]}, recompute {times[1]}"
    if best.cost is not None:
        reason += "; " + describe(best.backend, best.costs)
    return best, reason


def _token_steps(num_tokens: int, rows: int) -> tuple[tuple[Step, ...], int]:
    """As ``_loss_steps`` for tokens that do not wait for each other: equal tiles, of whole blocks where there is room."""
    rows = max(1, rows)
    tiles = max(1, -(-num_tokens // rows))
    even = -(-num_tokens // tiles)
    whole = -(-even // _PARTIAL_BLOCK) * _PARTIAL_BLOCK
    even = whole if whole <= rows else even
    starts = range(0, max(1, num_tokens), max(1, even))
    return tuple(Step(GRADIENT_IN_FORWARD, 0, 0, start, min(start + even, num_tokens), rows) for start in starts), 0


def _loss_steps(groups: list[int], rows: int, margin: bool, second: bool) -> tuple[tuple[Step, ...], int]:
    """Bin groups (largest first) into tiles. Returns the steps and the tokens whose logits are made twice.

    A group larger than a tile is deferred when its loss has a margin: the first one into the main accumulator, before
    anything else is there, the others into a second one if that fits. What is left is recomputed, all together.
    """
    big = sum(g > rows for g in groups)
    deferred = (big if second else min(big, 1)) if margin else 0
    steps = []
    start = 0
    for i in range(deferred):
        steps.append(Step(DEFERRED_SCALE, i, i + 1, start, start + groups[i], rows))
        start += groups[i]
    again = sum(groups[deferred:big])
    if again:
        steps.append(Step(RECOMPUTE, deferred, big, start, start + again, rows))
        start += again
    first = big
    while first < len(groups):
        last, stop = first, start
        while last < len(groups) and stop + groups[last] - start <= rows:
            stop += groups[last]
            last += 1
        steps.append(Step(GRADIENT_IN_FORWARD, first, last, start, stop, rows))
        first, start = last, stop
    return tuple(steps or [Step(GRADIENT_IN_FORWARD, 0, 0, 0, 0, rows)]), again
