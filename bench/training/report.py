"""Targets and a figure of training runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.figures import grouped_bars
from ..core.report import Target, quotient
from ..core.rows import OK
from .curves import CurveOutcome
from .limits import LimitOutcome, LimitRow
from .steps import StepOutcome
from .suites import HEADLINE

Outcome = StepOutcome | LimitOutcome | CurveOutcome
#: Bounds of the targets: DPO's speed-up at the headline, any case's, the longest sequence, a curve's distance over the noise.
SPEEDUP, NEVER_SLOWER, LONGER, NOISE = 1.3, 1.0, 1.5, 2.0
_STATED_FOR = "models at their real sizes, on one H100"


def targets(outcome: Outcome) -> list[Target]:
    """The project's targets, as ratios within one run."""
    return [replace(t, stated=not outcome.case.tiny, stated_for=_STATED_FOR) for t in _targets(outcome)]


def _targets(outcome: Outcome) -> list[Target]:
    if isinstance(outcome, StepOutcome):
        speedups = {row.name: outcome.speedup(row) for row in outcome.rows if not row.floor and row.name != "trl"}
        reached = {arm: s for arm, s in speedups.items() if s is not None}
        fastest, slowest = (choose(reached, key=lambda arm: reached[arm], default="") for choose in (max, min))
        headline = Target(f"time of TRL's step over {fastest or 'ours'}", reached.get(fastest), SPEEDUP, True)
        others = Target(f"time of TRL's step over the slowest of ours, {slowest}", reached.get(slowest), NEVER_SLOWER, True)
        return [headline, others] if outcome.case == HEADLINE else [others]
    if isinstance(outcome, LimitOutcome):
        trl = outcome.row("trl")
        reached = {row.name: r for row in outcome.rows if row.name != "trl" and (r := reach(row)) is not None}
        best = max(reached, key=lambda arm: reached[arm], default="")
        ratio = quotient(reached.get(best), None if trl is None else reach(trl))
        return [Target(f"the largest {outcome.of} with {best or 'ours'} over TRL's", ratio, LONGER, True)]
    rows = [row for row in outcome.rows if row.name != "trl" and not row.rounding and row.status == OK]
    return [
        Target(f"distance of {row.name}'s curve from TRL's over the noise", outcome.over_noise(row), NOISE, False)
        for row in rows
    ]


def reach(row: LimitRow) -> float | None:
    """The largest size of an arm: what ran, or the prediction where time ended the search before a size did not fit."""
    if row.largest is None or row.status != OK:
        return None
    open_ended = row.cut_short and row.failing is None
    return float(max(row.largest, row.predicted or 0) if open_ended else row.largest)


def write_figure(path: Path, cases: Iterable[dict[str, Any]], where: str) -> None:
    """Of the cases in the JSON of a suite of steps: each arm's speed over TRL's, and the head's share of a step."""
    from matplotlib.figure import Figure

    cases = list(cases)
    arms = [arm for arm in dict.fromkeys(r["arm"] for c in cases for r in c["rows"]) if not arm.startswith("body")]
    figure = Figure(figsize=(11, 1.2 + 0.55 * len(cases)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [f"{c['model']} {c['method']}\n{c['pairs']} x 2 x {c['length']}, {c['profile']}" for c in cases]
    rows = [{row["arm"]: row for row in c["rows"]} for c in cases]
    for axis, key in ((left, "speedup_over_trl"), (right, "head_share")):
        grouped_bars(axis, {arm: [of_case.get(arm, {}).get(key) for of_case in rows] for arm in arms}, labels)
    left.axvline(1, color="black", linewidth=0.8)
    left.invert_yaxis()
    left.set_xlabel("speed over TRL's step")
    right.set_xlabel("share of the step above the decoders alone")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(f"whole training steps, {where}", fontsize=10)
    figure.savefig(path, dpi=130)
