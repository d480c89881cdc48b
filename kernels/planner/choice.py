"""Which backend serves a draft, and which draft is taken."""

from __future__ import annotations

import functools
import logging
import operator
from typing import NamedTuple

from ..backends.interface import Backend, Call
from ..backends.registry import rank_backends
from ..cost_model.costs import Cost, describe, milliseconds
from .drafts import Draft, calls_of
from .request import Request

log = logging.getLogger("logitless")

#: A schedule with more FLOP is taken on a GPU if its predicted time is less than this part of the other's: predictions err.
_WORTH_MORE_FLOP = 0.9


class Served(NamedTuple):
    """A draft and the backends that serve it.

    Attributes:
        name: of the backend; behind ``arbitrary_loss`` those of all calls, joined by ``" + "`` where they differ.
        calls: what each backend is asked.
        backends: one for each call.
        cost: predicted; ``None`` where unknown.
        costs: of every backend that could serve the draft, by name.
    """

    draft: Draft
    name: str
    calls: list[Call]
    backends: list[Backend]
    cost: Cost | None
    costs: dict[str, Cost]


def serve(draft: Draft, request: Request) -> Served:
    """Choose the best backend for a draft: one for all of it, or behind ``arbitrary_loss`` one for each of its calls."""
    calls = calls_of(draft, request)
    ranks = [rank_backends(part) for part in ([[c] for c in calls] if request.arbitrary_loss else [calls])]
    name = " + ".join(dict.fromkeys(rank[0][0].name for rank in ranks))
    log.debug("backend %s serves %s", name, calls)
    totals: dict[str, Cost] = {}
    for candidate in (name, *(backend.name for backend, _ in ranks[0])):
        found = [next((c for b, c in rank if candidate in (name, b.name)), None) for rank in ranks]
        known = [c for c in found if c is not None]
        if len(known) == len(ranks):
            totals[candidate] = functools.reduce(operator.add, known)
    chosen = [rank[0][0] for rank in ranks]
    backends = chosen if len(chosen) == len(calls) else chosen * len(calls)
    return Served(draft, name, calls, backends, totals.get(name), totals)


def choose(served: list[Served]) -> tuple[Served, str]:
    """One of the drafts, the first of which has the fewest FLOP, and why."""
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
        reason += "; " + describe(best.name, best.costs)
    return best, reason
