"""Measured configurations as rows of ``configs.json``: what ``logitless tune`` does."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..gemm.config import GemmConfig
from .cache import store
from .configs import TABLE, dumps, operand_bits, parse
from .problem import Problem, Timing, device_name
from .search import Prepare, search
from .workload import Workload


@dataclass(frozen=True)
class Result:
    """What was measured for a problem: timings as from :func:`search`, and milliseconds of the vendor's GEMM."""

    problem: Problem
    timings: list[Timing]
    mm: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sizes, and milliseconds of all candidates, the chosen one first."""
        problem = {field.name: getattr(self.problem, field.name) for field in fields(self.problem)}
        problem |= {"device": device_name(self.problem.device), "dtype": str(self.problem.dtype).removeprefix("torch.")}
        problem["architecture"] = self.problem.architecture
        return {"problem": problem, "mm_milliseconds": self.mm, "timings": [asdict(timing) for timing in self.timings]}


def tune(problem: Problem, deadline: float | None = None, prepare: Prepare | None = None) -> Result:
    """Measure now, whatever is cached, and cache the result; ``deadline`` and ``prepare`` as for :func:`search`."""
    workload = Workload(problem)
    result = Result(problem, search(workload, deadline, prepare), workload.mm_milliseconds())
    store(problem.path(), problem, result.timings[0], overwrite=True)
    return result


def compromise(results: Sequence[Result]) -> GemmConfig:
    """The configuration that loses least on all shapes, of the table's and those that are best for one shape."""
    winners = [result.timings[0] for result in results]
    if len(results) == 1:
        return winners[0].config
    losses = dict.fromkeys([*results[0].problem.starts()[:1], *(w.config for w in winners)], 0.0)
    for result, winner in zip(results, winners, strict=True):
        workload, known = Workload(result.problem), {t.config: t for t in result.timings}
        for config in list(losses):
            timing = known.get(config) or workload.measure(config)
            if timing is None or not workload.serves(config):
                del losses[config]
            else:
                losses[config] += math.log(timing.total / winner.total)
        del workload  # frees its weight before the next workload is made
    if not losses:
        raise RuntimeError(f"no configuration runs for all of {[result.problem for result in results]}")
    return min(losses, key=lambda config: losses[config])


def export(results: Sequence[Result], environment: str) -> str:
    """The table with rows for the measured shapes, as text of configs.json. Shapes with the same number of tokens share a row.

    Rows for fewer tokens than were measured stay, as do all other architectures and operands.

    Args:
        results: of one device and dtype.
        environment: the machine and versions, for ``source``.
    """
    by_tokens: dict[int, list[Result]] = {}
    for result in results:
        by_tokens.setdefault(result.problem.num_tokens, []).append(result)
    rows = [asdict(replace(compromise(by_tokens[n]), max_tokens=n)) for n in sorted(by_tokens)]
    rows[-1]["max_tokens"] = None
    problem = results[0].problem
    bits = operand_bits(problem.dtype)
    entries: dict[str, Any] = json.loads(TABLE.read_text())
    entry = entries[problem.architecture]
    least = min(by_tokens)
    kept = [row for row in entry[bits] if row["max_tokens"] is not None and row["max_tokens"] < least]
    shapes = ", ".join(_shape(result.problem) for result in results)
    entry["source"] = f"{bits} bits, {len(rows)} last rows: timed on {environment}, {shapes}; others: {entry['source']}"
    entry[bits] = kept + rows
    parse(entries)
    return dumps(entries)


def _shape(problem: Problem) -> str:
    softcap = " with soft-cap" if problem.softcap else ""
    return f"N={problem.num_tokens} H={problem.hidden_size} V={problem.vocab_size}{softcap}"
