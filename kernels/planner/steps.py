"""The schedules, and how groups of tokens are divided into the steps of a plan."""

from __future__ import annotations

from dataclasses import dataclass

FORWARD_ONLY = "forward_only"
GRADIENT_IN_FORWARD = "gradient_in_forward"
DEFERRED_SCALE = "deferred_scale"
RECOMPUTE = "recompute"
SCHEDULES = (FORWARD_ONLY, GRADIENT_IN_FORWARD, DEFERRED_SCALE, RECOMPUTE)

#: Tiles of independent tokens are multiples of this where there is room.
_WHOLE_BLOCK = 128


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


def tiles_of(step: Step) -> int:
    """The number of tiles in which a step's gradients are made; a recomputed step counts as one."""
    return -(-step.num_tokens // step.rows) if step.schedule == DEFERRED_SCALE else 1


def token_steps(num_tokens: int, rows: int) -> tuple[tuple[Step, ...], int]:
    """As :func:`loss_steps` for independent tokens: equal tiles, of whole blocks where there is room."""
    rows = max(1, rows)
    tiles = max(1, -(-num_tokens // rows))
    even = -(-num_tokens // tiles)
    whole = -(-even // _WHOLE_BLOCK) * _WHOLE_BLOCK
    even = whole if whole <= rows else even
    starts = range(0, max(1, num_tokens), max(1, even))
    return tuple(Step(GRADIENT_IN_FORWARD, 0, 0, start, min(start + even, num_tokens), rows) for start in starts), 0


def loss_steps(groups: list[int], rows: int, margin: bool, second: bool) -> tuple[tuple[Step, ...], int]:
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
