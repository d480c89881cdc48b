"""Figures of a run, by matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .environment import where
from .runner import CaseOutcome

#: Suites whose cases are not a sweep over sequence lengths.
_BARS = ("gpu", "policy", "policy-gpu")


def can_draw() -> bool:
    """Whether figures can be written."""
    return importlib.util.find_spec("matplotlib") is not None


def grouped_bars(axis: Any, values: Mapping[str, Sequence[float | None]], labels: Sequence[str]) -> None:
    """One group of horizontal bars per label, from the bottom up, and in it one bar per name that has a value."""
    import matplotlib as mpl

    height = 1 / (len(values) + 1)
    for i, (name, of_name) in enumerate(values.items()):
        bars = [(j + i * height, value) for j, value in enumerate(of_name) if value is not None]
        color = mpl.colormaps["tab10"](i % 10)
        placed = axis.barh([y for y, _ in bars], [x for _, x in bars], 0.9 * height, color=color, label=name)
        axis.bar_label(placed, fmt="%.2f", fontsize=7, padding=2)
    axis.set_yticks([j + (len(values) - 1) * height / 2 for j in range(len(labels))], labels, fontsize=8)


def write_lines(path: Path, outcomes: Sequence[CaseOutcome], device: torch.device) -> None:
    """Time and peak extra memory against the length of the sequences, one line per provider."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = (
        ("ms per step, median", lambda row: None if row.median is None else row.median * 1e3),
        ("peak extra memory, MiB", lambda row: row.extra_bytes / 2**20 if row.extra_bytes else None),
    )
    lengths = sorted({o.case.shape.tokens for o in outcomes})
    names = list(dict.fromkeys(row.name for o in outcomes for row in o.rows))
    for axis, (label, value) in zip(axes, panels):
        for i, name in enumerate(names):
            rows = [(o.case.shape.tokens, o.row(name)) for o in outcomes]
            points = [(n, y) for n, row in rows if row is not None and (y := value(row)) is not None]
            if points:
                style = {"color": mpl.colormaps["tab10"](i % 10), "linewidth": 2.2 if name.startswith("logitless") else 1.2}
                axis.plot(*zip(*points), marker="o", markersize=4, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="tokens per sequence", ylabel=label)
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    task, shape = outcomes[0].case.task, outcomes[0].case.shape
    sizes = f"{shape.pairs} pairs, H={shape.hidden}, V={shape.vocab}, {shape.dtype}"
    figure.suptitle(f"{task}, {sizes}, {where(device)}", fontsize=10)
    figure.savefig(path, dpi=130)


def write_bars(path: Path, outcomes: Sequence[CaseOutcome], device: torch.device) -> None:
    """Time over that of the bare GEMMs, one group of bars per case, one bar per provider."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r.name for o in outcomes for r in o.rows if o.ratio(r) is not None and not r.roofline))
    figure = Figure(figsize=(11, 1 + 0.17 * len(outcomes) * (len(names) + 1)), layout="constrained")
    axis = figure.subplots()
    cases = [o.case for o in outcomes]
    several = len({case.task for case in cases}) > 1
    labels = [
        f"N={case.shape.scored}, H={case.shape.hidden}, V={case.shape.vocab}\n"
        f"{f'{case.task}, ' if several else ''}{case.kind}{case.shape.options}"
        for case in cases
    ]
    ratios = {name: [None if (row := o.row(name)) is None else o.ratio(row) for o in outcomes] for name in names}
    grouped_bars(axis, ratios, labels)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("time over the bare GEMMs")
    if names:
        figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    title = cases[0].suite if several else cases[0].task
    figure.suptitle(f"{title}, {cases[0].shape.dtype}, {where(device)}", fontsize=10)
    figure.savefig(path, dpi=130)


def write_figures(out: Path, outcomes: Sequence[CaseOutcome], device: torch.device) -> list[Path]:
    """A figure for each suite that has several sequence lengths, and for those whose cases differ in more."""
    paths = []
    for suite in dict.fromkeys(o.case.suite for o in outcomes):
        group = [o for o in outcomes if o.case.suite == suite]
        lengths = {o.case.shape.tokens for o in group}
        draw = write_bars if suite in _BARS else write_lines if len(lengths) > 1 else None
        if draw is not None:
            paths.append(out / f"{device.type}-{suite}.png")
            draw(paths[-1], group, device)
    return paths
