"""Tables, targets and a figure of training runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.console import Console
from ..core.report import number, show_table, spread
from ..core.rows import OK
from ..core.targets import Target, quotient
from .curves import CurveOutcome, CurveRow
from .limits import LimitOutcome, LimitRow
from .predict import Prediction, predict
from .steps import StepOutcome, StepRow
from .suites import HEADLINE

Outcome = StepOutcome | LimitOutcome | CurveOutcome
#: Bounds of the targets: DPO's speed-up at the headline, any case's, the longest sequence, a curve's distance over the noise.
SPEEDUP, NEVER_SLOWER, LONGER, NOISE = 1.3, 1.0, 1.5, 2.0
_GIB = 2**30
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
        return [Target(f"{outcome.of} that fits with {best or 'ours'} over TRL's", ratio, LONGER, True)]
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


def prediction(outcome: Outcome) -> Prediction | None:
    """The prediction for a case; ``None`` for shrunk models and for cases that the predictions do not cover."""
    case = outcome.case
    known = isinstance(outcome, StepOutcome) and case.precision == "bf16" and not case.compiled and not case.tiny
    return predict(case) if known else None


def predicted_seconds(outcome: Outcome) -> dict[str, float] | None:
    """By arm."""
    expected = prediction(outcome)
    return None if expected is None else {arm: expected.seconds(arm) for arm in expected.heads}


def _show_steps(console: Console, outcome: StepOutcome) -> None:
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
        "",
    ]

    def cells(row: StepRow) -> list[str]:
        predicted = expected.speedup(row.name) if expected is not None and row.name in expected.heads else None
        return [
            spread(row.median, row.seconds),
            "-" if row.median is None else f"{outcome.tokens / row.median:.0f}",
            number(None if row.floor else outcome.speedup(row), ".2f"),
            number(predicted, ".2f"),
            number(outcome.head_share(row), ".0%"),
            number(row.extra_bytes, ".3f", _GIB),
            number(row.loss_error),
            number(row.gradient_error),
            "no loss" if row.floor else "",
        ]

    title = f"{outcome.case.title}; {outcome.tokens} tokens, {outcome.scored_tokens} scored"
    show_table(console, title, columns, outcome.rows, cells, _step_notes(outcome))


def _step_notes(outcome: StepOutcome) -> Iterator[str]:
    if outcome.held_bytes is not None:
        yield f"held between steps: {outcome.held_bytes / _GIB:.2f} GiB"
    ours = outcome.time("logitless")
    if outcome.body_flops is not None and ours is not None:  # as torch counts them, on the padded batch
        total = outcome.body_flops + outcome.head_flops
        yield (
            f"padded decoders and the fewest FLOP of a head: {total / 1e12:.3g} TFLOP, of which the head has "
            f"{100 * outcome.head_flops / total:.0f} %; logitless runs {total / ours / 1e12:.3g} TFLOP/s of it"
        )


def _show_limits(console: Console, outcome: LimitOutcome) -> None:
    columns = ["arm", f"largest {outcome.of}", "did not fit", "predicted", "peak GiB", "trials", "how it ended"]

    def cells(row: LimitRow) -> list[str]:
        peak = next((t.peak_bytes for t in row.trials if t.size == row.largest), None)
        sizes = [number(n, "d") for n in (row.largest, row.failing, row.predicted)]
        return [*sizes, number(peak, ".2f", _GIB), str(len(row.trials)), row.message]

    title = f"{outcome.case.title}; {outcome.of} within {outcome.limit_bytes / 1e9:.4g} GB"
    show_table(console, title, columns, outcome.rows, cells)


def _show_curves(console: Console, outcome: CurveOutcome) -> None:
    def cells(row: CurveRow) -> list[str]:
        ends = (f"{row.losses[0]:.4f}", f"{row.losses[-1]:.4f}") if row.losses else ("-", "-")
        over = None if row.name == "trl" else outcome.over_noise(row)
        return [str(len(row.losses)), *ends, number(over, ".2f"), "TRL, rounded otherwise" if row.rounding else ""]

    title = f"{outcome.case.title}; learning rate {outcome.learning_rate:g}; noise {number(outcome.noise)}"
    show_table(console, title, ["arm", "steps", "first loss", "last loss", "x noise", ""], outcome.rows, cells)


def show(console: Console, outcome: Outcome) -> None:
    """Print the table of a case."""
    if isinstance(outcome, StepOutcome):
        _show_steps(console, outcome)
    elif isinstance(outcome, LimitOutcome):
        _show_limits(console, outcome)
    else:
        _show_curves(console, outcome)


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
