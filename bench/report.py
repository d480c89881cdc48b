"""What is shown of the outcomes: tables, the project's targets, JSON, and figures against sequence length."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .cases import GPU_HEADLINE, HEADLINE, SUITES
from .console import Console
from .runner import OK, Outcome, Row, is_number

#: Raised when a field of the JSON changes its meaning; ``results/README.md`` describes the fields.
SCHEMA = 1
_PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "numpy")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of this machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _cores() -> int | None:
    """Physical ones, where that can be known."""
    try:
        import psutil
    except ImportError:
        return os.cpu_count()
    return psutil.cpu_count(logical=False) or os.cpu_count()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit."""
    import logitless

    status = _git("status", "--porcelain")
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "device": device.type,
        "machine": {
            "cpu": _cpu_model(),
            "cores": _cores(),
            "threads": torch.get_num_threads(),
            "memory_bytes": _memory(),
            "gpu": gpu,
        },
        "versions": {
            "python": platform.python_version(),
            "logitless": logitless.__version__,
            **{name: _installed(name) for name in _PACKAGES},
        },
    }


def _ms(seconds: float) -> str:
    """Four digits, without an exponent."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.4g}"


def _time(row: Row) -> str:
    if row.median is None:
        return "-"
    return f"{_ms(row.median)} ({_ms(min(row.seconds))}..{_ms(max(row.seconds))})"


def _number(value: float | None, form: str = ".1e") -> str:
    return "-" if value is None else format(value, form)


def _notes(row: Row) -> str:
    return row.schedule if row.status == OK and not row.note else f"{row.status}: {row.message or row.note}"


def print_table(console: Console, outcome: Outcome) -> None:
    """One row a provider. A row that is not ``ok`` has no time and no ratio."""
    floor = outcome.case.floor
    what = "max err" if outcome.case.task == "gae" else "max logp err"
    columns = ["provider", "ms, median (min..max)", f"x {floor}", "extra MiB", what, "rel err dX", "rel err dW"]
    rows = []
    for row in outcome.rows:
        errors = row.errors
        rows.append(
            [
                row.provider,
                _time(row),
                _number(outcome.ratio(row), ".2f"),
                "-" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.1f}",
                _number(errors.token_logps if errors else None),
                _number(errors.dhidden if errors else None),
                _number(errors.dweight if errors else None),
                "roofline" if row.roofline and row.status == OK else _notes(row),
            ]
        )
    console.table(outcome.case.title, [*columns, "schedule / why not"], rows, [row.status != OK for row in outcome.rows])


@dataclass(frozen=True)
class Target:
    """A figure that the project set itself, and what came out.

    Attributes:
        what: in words. value: measured, ``None`` where a row that it needs is not there or not right.
        bound: the target. at_least: whether the value must reach the bound or stay below it.
    """

    what: str
    value: float | None
    bound: float
    at_least: bool

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        if self.value is None:
            return f"{self.what}: not measured (target {sign} {self.bound:g})"
        return f"{self.what}: {self.value:.2f} (target {sign} {self.bound:g}: {'met' if self.met else 'missed'})"

    def as_dict(self) -> dict[str, Any]:
        return {"what": self.what, "value": self.value, "bound": self.bound, "at_least": self.at_least, "met": self.met}


def _quotient(above: float | None, below: float | None) -> float | None:
    if above is None or not below or not is_number(above) or not is_number(below):
        return None
    return above / below


def targets(outcome: Outcome) -> list[Target]:
    """The project's targets for DPO with a trained head, forward only, policy losses, and what needs no head; other cases have
    none.
    """
    case = outcome.case

    def time(name: str) -> float | None:
        row = outcome.row(name)
        return None if row is None else row.median

    def error(name: str, kind: str) -> float | None:
        row = outcome.row(name)
        return None if row is None or row.status != OK or row.errors is None else getattr(row.errors, kind)

    if case.suite == "forward":
        ratio = _quotient(time("logitless:op"), time("gemm"))
        return [Target("time of logitless, forward only, over the bare GEMM", ratio, 1.15, False)]
    if case.suite == "tile":
        reached = _quotient(time("copy"), time("pass@cpu"))
        return [Target("share of the copy's bandwidth that the C++ pass reaches", reached, 0.6, True)]
    if case.suite == "gae":
        ours = time("logitless:gae")
        return [
            Target("time of a loop over tokens over logitless", _quotient(time("loop:gae"), ours), 100.0, True),
            Target("time of a loop over padded steps over logitless", _quotient(time("padded:gae"), ours), 1.0, True),
        ]
    if case.suite in ("policy", "policy-gpu"):
        return _policy_targets(outcome, time)
    ours = time("logitless")
    if case.suite == "gpu":
        return _gpu_targets(outcome, time)
    if case.suite != "dpo" or case.task != "dpo":
        return []
    return [
        Target("time of plain PyTorch over logitless", _quotient(time("torch"), ours), 2.5, True),
        Target("time of Liger over logitless", _quotient(time("liger"), ours), 2.0, True),
        Target("time of TRL's function over logitless", _quotient(time("trl"), ours), 6.0, True),
        Target("time of logitless over the bare GEMMs", _quotient(ours, time("gemm")), 1.15, False),
        *(
            Target(f"{what} of {first} over {second}", _quotient(error(a, kind), error(b, kind)), bound, at_least)
            for what, kind, a, b, bound, at_least in (
                ("max logp error", "token_logps", "torch", "logitless", 10.0, True),
                ("dX error", "dhidden", "logitless", "torch", 1.5, False),
                ("dW error", "dweight", "logitless", "torch", 1.5, False),
            )
            for first, second in ((_SPOKEN[a], _SPOKEN[b]),)
        ),
    ]


def _gpu_targets(outcome: Outcome, time: Callable[[str], float | None]) -> list[Target]:
    case, ours, row = outcome.case, time("logitless"), outcome.row("logitless")
    found = [
        Target("time of logitless over the bare GEMMs", _quotient(ours, time("gemm")), 1.10, False),
        Target("time of plain PyTorch over logitless", _quotient(time("torch"), ours), 1.2, True),
    ]
    if case.backward:
        bound = 1.4 if case.train_head else 1.5
        found.append(Target("time of TRL's function over logitless", _quotient(time("trl"), ours), bound, True))
        found.append(Target("time of Liger over logitless", _quotient(time("liger"), ours), 3.0, True))
    if case.train_head and case.backward:
        extra = None if row is None or row.status != OK or row.extra_bytes is None else row.extra_bytes / 2**30
        found.append(Target("extra GiB of logitless", extra, 4.5, False))
    return found


def _policy_targets(outcome: Outcome, time: Callable[[str], float | None]) -> list[Target]:
    case, ours, row = outcome.case, time("logitless:policy"), outcome.row("logitless:policy")
    on_gpu = case.suite == "policy-gpu"
    nhv = case.shape.scored * case.shape.hidden * case.shape.vocab
    flops = None if row is None or row.status != OK else row.flops
    trl = _quotient(time("trl:policy-scored"), ours)
    over_gemms = _quotient(ours, time("gemm:policy"))
    return [
        Target("time of TRL's function on scored tokens and its loss over logitless", trl, 1.4 if on_gpu else 3.0, True),
        Target("time of logitless over the bare GEMMs on scored tokens", over_gemms, 1.10 if on_gpu else 1.15, False),
        Target("FLOP of logitless over N H V", _quotient(flops, nhv), 2 * case.gemms + 0.02, False),
    ]


#: Spread of the bare GEMMs' times from which on the machine counts as busy.
_BUSY = 1.5
_SPOKEN = {"torch": "plain PyTorch", "logitless": "logitless"}


def show(console: Console, outcome: Outcome) -> None:
    """Print the table of a case, and under it the targets where it has some."""
    print_table(console, outcome)
    gemm = next((row for row in outcome.rows if row.roofline and row.median is not None), None)
    if gemm is not None and max(gemm.seconds) > _BUSY * min(gemm.seconds):
        console.print(
            f"  {outcome.case.floor} took {_time(gemm)} ms: the machine is busy, do not trust the times", highlight=False
        )
    found = targets(outcome)
    if outcome.case.task == "tile" and gemm is not None and gemm.median is not None:
        shape = outcome.case.shape
        moved = 2 * shape.scored * shape.vocab * shape.torch_dtype.itemsize
        console.print(f"  copy: {moved / gemm.median / 1e9:.1f} GB/s, read and written", highlight=False)
    for target in found:
        console.print(f"  {target}", highlight=False)
    case, machine = outcome.case, "one H100" if outcome.case.suite in ("gpu", "policy-gpu") else "a 2-core CPU machine"
    stated_for = [GPU_HEADLINE if case.suite == "gpu" else HEADLINE]
    if case.suite in ("policy", "policy-gpu", "gae"):
        stated_for = [own.shape for own in SUITES[case.suite].make({}, False)]
    if found and case.task != "tile" and case.shape not in stated_for:
        console.print(f"  (the targets are stated for {stated_for[0]}, on {machine})", highlight=False)
    console.print()


def write_json(path: Path, outcomes: Sequence[Outcome], device: torch.device, *, quick: bool, rounds: int) -> None:
    """Everything, machine-readable; ``results/README.md`` describes the fields."""
    document = {
        "schema": SCHEMA,
        "command": sys.argv[1:],
        "quick": quick,
        "rounds": rounds,
        "environment": environment(device),
        "cases": [{**o.as_dict(), "targets": [t.as_dict() for t in targets(o)]} for o in outcomes],
    }
    path.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: ``null`` instead (``failed`` says what it was)."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_figure(path: Path, outcomes: Sequence[Outcome], device: torch.device) -> None:
    """Time and peak extra memory against the length of the sequences, one line a provider."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = (
        ("ms a step, median", lambda row: None if row.median is None else row.median * 1e3),
        ("peak extra memory, MiB", lambda row: row.extra_bytes / 2**20 if row.extra_bytes else None),
    )
    lengths = sorted({o.case.shape.tokens for o in outcomes})
    names = list(dict.fromkeys(row.provider for o in outcomes for row in o.rows))
    colors = mpl.colormaps["tab10"]
    for axis, (label, value) in zip(axes, panels):
        for i, name in enumerate(names):
            rows = [(o.case.shape.tokens, o.row(name)) for o in outcomes]
            points = [(n, y) for n, row in rows if row is not None and (y := value(row)) is not None]
            if points:
                ours = name.startswith("logitless")
                style = {"color": colors(i % 10), "linewidth": 2.2 if ours else 1.2}
                axis.plot(*zip(*points), marker="o", markersize=4, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="tokens a sequence", ylabel=label)
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    shape = outcomes[0].case.shape
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    figure.suptitle(
        f"{outcomes[0].case.task}, {shape.pairs} pairs, H={shape.hidden}, V={shape.vocab}, {shape.dtype}, {where}", fontsize=10
    )
    figure.savefig(path, dpi=130)


def write_bars(path: Path, outcomes: Sequence[Outcome], device: torch.device) -> None:
    """Time over that of the bare GEMMs, one group of bars a case, one bar a provider."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = list(
        dict.fromkeys(row.provider for o in outcomes for row in o.rows if o.ratio(row) is not None and not row.roofline)
    )
    figure = Figure(figsize=(11, 1 + 0.17 * len(outcomes) * (len(names) + 1)), layout="constrained")
    axis = figure.subplots()
    colors, height = mpl.colormaps["tab10"], 1 / (len(names) + 1)
    for i, name in enumerate(names):
        rows = [(j, o.row(name), o) for j, o in enumerate(outcomes)]
        bars = [(j + i * height, ratio) for j, row, o in rows if row is not None and (ratio := o.ratio(row)) is not None]
        placed = axis.barh([y for y, _ in bars], [x for _, x in bars], 0.9 * height, color=colors(i % 10), label=name)
        axis.bar_label(placed, fmt="%.2f", fontsize=7, padding=2)
    axis.axvline(1, color="black", linewidth=0.8)
    several = len({o.case.task for o in outcomes}) > 1
    labels = [
        f"N={o.case.shape.scored}, H={o.case.shape.hidden}, V={o.case.shape.vocab}\n"
        + (f"{o.case.task}, " if several else "")
        + o.case.kind
        + (f", softcap {o.case.shape.softcap:g}" if o.case.shape.softcap else "")
        + (f", responses {o.case.shape.spread:g}:1" if o.case.shape.spread > 1 else "")
        for o in outcomes
    ]
    axis.set_yticks([j + (len(names) - 1) * height / 2 for j in range(len(outcomes))], labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("time over the bare GEMMs")
    if names:
        figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = outcomes[0].case.suite if several else outcomes[0].case.task
    figure.suptitle(f"{title}, {outcomes[0].case.shape.dtype}, {where}", fontsize=10)
    figure.savefig(path, dpi=130)


#: Suites whose cases are no sweep over sequence lengths.
_BARS = ("gpu", "policy", "policy-gpu")


def write_files(out: Path, outcomes: Sequence[Outcome], device: torch.device, *, quick: bool, rounds: int) -> list[Path]:
    """JSON of the run; if matplotlib is there, a figure for each suite that has several sequence lengths, and for those whose
    cases differ in more.
    """
    out.mkdir(parents=True, exist_ok=True)
    suites = list(dict.fromkeys(o.case.suite for o in outcomes))
    paths = [out / f"{device.type}-{'-'.join(suites)}.json"]
    write_json(paths[0], outcomes, device, quick=quick, rounds=rounds)
    if not can_draw():
        return paths
    for suite in suites:
        group = [o for o in outcomes if o.case.suite == suite]
        lengths = {o.case.shape.tokens for o in group}
        draw = write_bars if suite in _BARS else write_figure if len(lengths) > 1 else None
        if draw is not None:
            paths.append(out / f"{device.type}-{suite}.png")
            draw(paths[-1], group, device)
    return paths


def can_draw() -> bool:
    """Whether figures can be written."""
    return importlib.util.find_spec("matplotlib") is not None
