"""What a plan may do, before it is known which backend does it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from ..backends.interface import Call, Work
from .request import Request
from .steps import DEFERRED_SCALE, FORWARD_ONLY, RECOMPUTE, Step, loss_steps, tiles_of, token_steps


class Draft(NamedTuple):
    """Steps, and what follows from them on any backend.

    Attributes:
        steps: in order.
        passes: FLOP / (N * H * V).
        reason: why these steps.
        accumulate: whether dW is collected in float32.
        tile_bytes: of the largest tile.
    """

    steps: tuple[Step, ...]
    passes: float
    reason: str
    accumulate: bool = False
    tile_bytes: int = 0


def drafts_for(request: Request) -> list[Draft]:
    """The draft with the fewest FLOP that fits the budget; on a GPU perhaps a second one with more FLOP."""
    r = request
    whole = (Step(RECOMPUTE, 0, len(r.groups), 0, r.num_tokens, r.num_tokens),)
    recompute = Draft(whole, 2 * r.head_pass + r.gradient_passes, "")
    if not (r.train_hidden or r.needs_head):
        drafts = [Draft(tuple(replace(s, schedule=FORWARD_ONLY) for s in whole), r.head_pass, "no gradient is needed")]
    elif not r.needs_head and not r.entropy_gradient:
        reason = "the head is frozen: dX is known up to one factor per row, so no tile is kept"
        drafts = [Draft(tuple(replace(s, schedule=DEFERRED_SCALE) for s in whole), 2 * r.head_pass, reason)]
    elif r.arbitrary_loss:
        reason = "an arbitrary loss follows and the head is trained: the backward pass makes the logits again"
        drafts = [recompute._replace(reason=reason)]
    else:
        drafts = _in_tiles(r, recompute)
    if r.weight_dtype == torch.float16:  # unscaled fp16 gradients would underflow before the loss scale arrives
        drafts = [d._replace(accumulate=d.accumulate or r.needs_head) for d in drafts]
    return drafts


def _in_tiles(r: Request, recompute: Draft) -> list[Draft]:
    """Gradients from finished tiles, each made while the logits of its groups are there."""
    # Several tiles need a float32 accumulator for dW; one tile that is no larger than the accumulator replaces it.
    spare = r.acc * r.head_elements if r.train_weight else 0
    fits = r.num_tokens * r.row_bytes <= r.tile_budget + spare
    rows = r.num_tokens if fits else max(1, r.tile_budget // r.row_bytes)
    second = r.margin and spare <= r.tile_budget // 2
    if second and sum(g > rows for g in r.groups) > 1:  # pairs wait for their margins in an accumulator of their own
        rows = max(1, (r.tile_budget - spare) // r.row_bytes)
    steps, again = token_steps(r.num_tokens, rows) if r.token_groups else loss_steps(r.groups, rows, r.margin, second)
    tiles = sum(tiles_of(s) for s in steps)
    if r.token_groups:
        reason = f"tokens are independent: the gradients are made in the forward pass, in {tiles} tile(s) of up to {rows}"
    elif again:
        reason = f"{again} tokens are in groups of more than the {rows} that a tile holds; their logits are made twice"
    elif steps[0].schedule == DEFERRED_SCALE:
        reason = f"a pair exceeds a tile of {rows} tokens; its gradient is scaled once its margin is known"
    else:
        reason = f"every group fits a tile of {rows} tokens, so the gradients are made in the forward pass"
    largest = max((min(rows, s.num_tokens) for s in steps if s.schedule != RECOMPUTE), default=0)
    passes = r.head_pass * (1 + again / max(1, r.num_tokens)) + r.gradient_passes
    drafts = [Draft(steps, passes, reason, tiles > 1 and r.needs_head, largest * r.row_bytes)]
    if tiles > 1 and r.device.type == "cuda":
        drafts.append(recompute._replace(reason=f"{tiles} tiles of at most {rows} tokens"))
    return drafts


def calls_of(draft: Draft, request: Request) -> list[Call]:
    """What a backend is asked for: one call for each kind of work. Never empty."""
    call = Call(
        request.device,
        request.dtype,
        request.weight_dtype,
        hidden_size=request.hidden_size + request.lora_rank,
        vocab_size=request.vocab_size,
        outputs=request.wanted,
        accumulate=draft.accumulate,
        workspace=request.options.workspace,
        train_hidden=request.train_hidden,
        train_weight=request.train_weight and not request.lora_rank,  # B's gradient costs next to nothing
        architecture=request.architecture,
        grad_filter=request.options.grad_filter,
        by_rows=request.quantized or request.lora_rank > 0,
        batch_invariant=request.options.batch_invariant,
        sharded=request.parallel is not None,
    )
    tokens: dict[Work, int] = {}
    tiles = 0
    for step in draft.steps:
        works: tuple[Work, ...] = ("tile",)
        if step.schedule in (FORWARD_ONLY, RECOMPUTE):
            works = ("forward",) if step.schedule == FORWARD_ONLY else ("forward", "recompute")
        elif step.schedule == DEFERRED_SCALE and not request.needs_head:
            works = ("frozen",)
        else:
            tiles += tiles_of(step)
        for work in works:
            tokens[work] = tokens.get(work, 0) + step.num_tokens
    return [replace(call, work=work, num_tokens=n, tiles=tiles if work == "tile" else 1) for work, n in tokens.items()]
