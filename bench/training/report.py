"""Tables, targets, JSON and a figure of training runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..console import Console
from ..environment import environment
from ..report import SCHEMA, number, spread, write_json
from ..runner import OK
from ..targets import Target, quotient
from .cases import TrainCase
from .curves import CurveOutcome
from .limits import LimitOutcome, LimitRow
from .predict import Prediction, predict
from .steps import StepOutcome
from .suites import HEADLINE

Outcome = StepOutcome | LimitOutcome | CurveOutcome
#: Bounds of the targets: DPO's speed-up at the headline, any case's, the longest sequence, a curve's distance over the noise.
SPEEDUP, NEVER_SLOWER, LONGER, NOISE = 1.3, 1.0, 1.5, 2.0
_GIB = 2**30


def targets(outcome: Outcome) -> list[Target]:
    """The project's targets, as ratios within one run."""
    if isinstance(outcome, StepOutcome):
        speedups = {row.arm: outcome.speedup(row) for row in outcome.rows if not row.floor and row.arm != "trl"}
        reached = {arm: s for arm, s in speedups.items() if s is not None}
        slowest = min(reached, key=lambda arm: reached[arm], default=None)
        found = []
        if outcome.case == HEADLINE:
            fastest = max(reached, key=lambda arm: reached[arm], default=None)
            found.append(
                Target(f"time of TRL's step over {fastest}", None if fastest is None else reached[fastest], SPEEDUP, True)
            )
        found.append(
            Target(
                f"time of TRL's step over the slowest of ours, {slowest}",
                None if slowest is None else reached[slowest],
                NEVER_SLOWER,
                True,
            )
        )
        return found
    if isinstance(outcome, LimitOutcome):
        trl = outcome.row("trl")
        reached = {row.arm: r for row in outcome.rows if row.arm != "trl" and (r := reach(row)) is not None}
        best = max(reached, key=lambda arm: reached[arm], default=None)
        ratio = quotient(None if best is None else reached[best], None if trl is None else reach(trl))
        return [Target(f"{outcome.of} that fits with {best} over TRL's", ratio, LONGER, True)]
    rows = [row for row in outcome.rows if row.arm != "trl" and not row.rounding and row.status == OK]
    return [
        Target(f"distance of {row.arm}'s curve from TRL's over the noise", outcome.over_noise(row), NOISE, False)
        for row in rows
    ]


def reach(row: LimitRow) -> float | None:
    """What an arm can hold: what ran, or the prediction where the search was cut short with nothing that did not fit."""
    if row.largest is None or row.status != OK:
        return None
    open_ended = row.cut_short and row.failing is None
    return float(max(row.largest, row.predicted or 0) if open_ended else row.largest)


def prediction(outcome: Outcome) -> Prediction | None:
    """What was expected of a case; nothing of shrunk models, and of what the predictions do not know."""
    case = outcome.case
    known = isinstance(outcome, StepOutcome) and case.precision == "bf16" and not case.compiled and not case.tiny
    return predict(case) if known else None


def _note(row: Any) -> str:
    return row.message if row.status == OK else f"{row.status}: {row.message}"


def _step_table(console: Console, outcome: StepOutcome) -> None:
    expected = prediction(outcome)
    columns = [
        "arm",
        "ms, median (min..max)",
        "tokens/s",
        "x TRL",
        "predicted",
        "head",
        "extra GiB",
        "loss err",
        "grad err",
        "why not",
    ]
    rows = []
    for row in outcome.rows:
        median = row.median
        speedup, share = (None if row.floor else outcome.speedup(row)), outcome.head_share(row)
        predicted = expected.speedup(row.arm) if expected is not None and row.arm in expected.heads else None
        rows.append(
            [
                row.arm,
                spread(median, row.seconds),
                "-" if median is None else f"{outcome.tokens / median:.0f}",
                number(speedup, ".2f"),
                number(predicted, ".2f"),
                "-" if share is None else f"{100 * share:.0f} %",
                "-" if row.extra_bytes is None else f"{row.extra_bytes / _GIB:.3f}",
                number(row.loss_error),
                number(row.gradient_error),
                "no loss" if row.floor and row.status == OK else _note(row),
            ]
        )
    title = f"{outcome.case.title}; {outcome.tokens} tokens, {outcome.scored} scored"
    console.table(title, columns, rows, [r.status != OK for r in outcome.rows])
    if outcome.held_bytes is not None:
        console.print(f"  held between steps: {outcome.held_bytes / _GIB:.2f} GiB", highlight=False)
    ours = outcome.time("logitless")
    if outcome.body_flops is not None and ours is not None:  # as torch counts them, on the padded batch
        total = outcome.body_flops + outcome.head_flops
        console.print(
            f"  padded decoders and the least that a head can do: {total / 1e12:.3g} TFLOP, of them "
            f"{100 * outcome.head_flops / total:.0f} % the head's; logitless does {total / ours / 1e12:.3g} TFLOP/s of it",
            highlight=False,
        )


def _limit_table(console: Console, outcome: LimitOutcome) -> None:
    columns = ["arm", f"largest {outcome.of}", "did not fit", "predicted", "peak GiB", "trials", "how it ended"]
    rows = []
    for row in outcome.rows:
        peak = next((t.peak_bytes for t in row.trials if t.size == row.largest), None)
        rows.append(
            [
                row.arm,
                *("-" if n is None else str(n) for n in (row.largest, row.failing, row.predicted)),
                "-" if peak is None else f"{peak / _GIB:.2f}",
                str(len(row.trials)),
                _note(row),
            ]
        )
    title = f"{outcome.case.title}; {outcome.of} within {outcome.limit_bytes / 1e9:.4g} GB"
    console.table(title, columns, rows, [r.status != OK for r in outcome.rows])


def _curve_table(console: Console, outcome: CurveOutcome) -> None:
    columns = ["arm", "steps", "first loss", "last loss", "x noise", "why not"]
    rows = []
    for row in outcome.rows:
        ends = (f"{row.losses[0]:.4f}", f"{row.losses[-1]:.4f}") if row.losses else ("-", "-")
        over = None if row.arm == "trl" else outcome.over_noise(row)
        rows.append([row.arm, str(len(row.losses)), *ends, number(over, ".2f"), _note(row)])
    title = f"{outcome.case.title}; learning rate {outcome.learning_rate:g}; noise {number(outcome.noise)}"
    console.table(title, columns, rows, [r.status != OK for r in outcome.rows])


def show(console: Console, outcome: Outcome) -> None:
    """Print the table of a case and its targets."""
    if isinstance(outcome, StepOutcome):
        _step_table(console, outcome)
    elif isinstance(outcome, LimitOutcome):
        _limit_table(console, outcome)
    else:
        _curve_table(console, outcome)
    for target in targets(outcome):
        console.print(f"  {target}", highlight=False)
    if outcome.case.tiny:
        console.print("  (the targets are stated for models at their real sizes, on one H100)", highlight=False)
    console.print()


def _predicted(outcome: Outcome) -> dict[str, float] | None:
    expected = prediction(outcome)
    return None if expected is None else {arm: expected.seconds(arm) for arm in expected.heads}


def write_suite(
    path: Path,
    suite: str,
    outcomes: Sequence[Outcome],
    failed: Sequence[tuple[TrainCase, str]],
    device: torch.device,
    *,
    rounds: int,
) -> None:
    """All of a suite so far, and the cases that could not run, with the reason."""
    value = {
        "schema": SCHEMA,
        "suite": suite,
        "command": sys.argv[1:],
        "rounds": rounds,
        "failed_cases": [{**case.as_dict(), "message": message} for case, message in failed],
        "environment": environment(device),
        "cases": [
            {**o.as_dict(), "predicted_seconds": _predicted(o), "targets": [t.as_dict() for t in targets(o)]} for o in outcomes
        ],
    }
    write_json(path, value)


def write_figure(path: Path, cases: Iterable[dict[str, Any]], where: str) -> None:
    """Of the cases in the JSON of a suite of steps: each arm's speed over TRL's, and the head's share of a step."""
    from matplotlib.figure import Figure

    cases = list(cases)
    arms = [arm for arm in dict.fromkeys(r["arm"] for c in cases for r in c["rows"]) if not arm.startswith("body")]
    figure = Figure(figsize=(11, 1.2 + 0.55 * len(cases)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    width = 0.8 / max(1, len(arms))
    for i, arm in enumerate(arms):
        for axis, key in ((left, "speedup_over_trl"), (right, "head_share")):
            points = [(n, r[key]) for n, c in enumerate(cases) for r in c["rows"] if r["arm"] == arm and r[key] is not None]
            if points:
                places, values = zip(*points, strict=True)
                axis.barh([p + i * width - 0.4 for p in places], values, width, label=arm, color=f"C{i}")
    left.axvline(1.0, color="black", linewidth=0.8)
    labels = [f"{c['model']} {c['method']}\n{c['pairs']} x 2 x {c['length']}, {c['profile']}" for c in cases]
    left.set_yticks(range(len(cases)), labels, fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("speed over TRL's step")
    right.set_xlabel("share of the step above the decoders alone")
    handles = {label: h for axis in (left, right) for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(f"whole training steps, {where}", fontsize=10)
    figure.savefig(path, dpi=130)
