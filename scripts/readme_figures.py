"""Write the tables and pictures of README.md from measurement files.

    python scripts/readme_figures.py [bench/out] [--gpu bench/results/gpu-DEVICE]

The positional argument is the output folder of ``make bench``; without it the headline table is left unchanged. The GPU block
is always rewritten, from ``cuda-gpu.json`` in the folder that ``--gpu`` names (default: the last of bench/results/gpu-*).
Without such a file the block states that nothing has been measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blocks import write_block

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "gemm": "the three bare GEMMs, scored tokens only",
    "torch": "plain PyTorch",
    "torch-scored": "plain PyTorch, scored tokens only",
    "torch-compile": "plain PyTorch under torch.compile, scored tokens only",
    "trl": "TRL's fused head + its loss",
    "liger": "Liger `chunked_loss`",
    "logitless": "**logitless**, loss module",
    "logitless:op": "logitless, `linear_logps` + loss",
}
#: Columns of the GPU table: time of each provider over the time of logitless.
PEERS = {"trl": "TRL", "liger": "Liger", "cce": "CCE", "torch": "torch", "torch-compile": "torch.compile"}
NOTHING = (
    "On GPUs, nothing has been measured yet. [bench/results/PENDING.md](bench/results/PENDING.md) lists the commands to run."
)


def _rows(case: dict[str, Any]) -> dict[str, Any]:
    """Rows that were measured, by provider."""
    return {row["provider"]: row for row in case["rows"] if row["status"] == "ok"}


def table(run: dict[str, Any]) -> str:
    """The headline table as Markdown."""
    (case,) = (c for c in run["cases"] if c["suite"] == "dpo" and c["task"] == "dpo")
    rows = _rows(case)
    shape, versions, machine = case["shape"], run["environment"]["versions"], run["environment"]["machine"]
    lines = [
        f"DPO, forward and backward, trainable head, {shape['dtype']}, H={shape['hidden']}, V={shape['vocab']}, "
        f"{case['scored_tokens']} of {2 * shape['pairs'] * shape['tokens']} tokens scored, on {machine['cores']} cores "
        f"({machine['cpu']}), torch {versions['torch'].split('+')[0]}, TRL {versions['trl']}, "
        f"Liger {versions['liger-kernel']}, all in one interleaved run:",
        "",
        "| | ms, median | x GEMMs | extra MiB | max logp error | dX error | dW error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, text in NAMES.items():
        if (row := rows.get(name)) is None:
            continue
        cells = [text, f"{row['median_seconds'] * 1e3:.0f}", f"{row['ratio_to_gemm']:.2f}"]
        if row["roofline"]:
            cells += ["-"] * 4
        else:
            errors = row["errors"]
            cells += [f"{row['extra_bytes'] / 2**20:.0f}"]
            cells += [f"{errors[key]:.1e}" for key in ("token_logps", "dhidden", "dweight")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shape(case: dict[str, Any]) -> str:
    shape = case["shape"]
    softcap = f", soft-cap {shape['softcap']:g}" if shape["softcap"] else ""
    return f"{case['scored_tokens']}, {shape['hidden']}, {shape['vocab']}{softcap}"


def _mode(case: dict[str, Any]) -> str:
    return "forward only" if not case["backward"] else "trained" if case["train_head"] else "frozen"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def gpu_table(folder: Path, picture: str) -> str:
    """The results of suite ``gpu`` as Markdown, and how many targets of all suites in the folder are met."""
    run = json.loads((folder / "cuda-gpu.json").read_text())
    environment = run["environment"]
    versions, gpu = (
        environment["versions"],
        environment["machine"]["gpu"] or {"name": environment["machine"]["cpu"], "driver": None},
    )
    used = ", ".join(
        f"{name} {version}" for name, version in versions.items() if version and name not in ("python", "numpy", "logitless")
    )
    met = [
        t["met"]
        for path in sorted(folder.glob("cuda-*.json"))
        for c in json.loads(path.read_text()).get("cases", ())
        for t in c["targets"]
    ]
    lines = [
        f"DPO on one {gpu['name']}, {run['cases'][0]['shape']['dtype']}, driver {gpu['driver'] or 'unknown'}, {used}, "
        f"commit {(environment['commit'] or 'unknown')[:10]}, {environment['time'][:10]}; each row is one interleaved run. "
        '"x GEMMs" is the time of logitless divided by the time of the bare GEMMs. "x TRL" and the columns after it are the '
        "time of that implementation divided by the time of logitless. "
        f"Over all suites, {met.count(True)} of {len(met) - met.count(None)} targets are met.",
        "",
        f"![time over the bare GEMMs]({picture})",
        "",
        "| N, H, V | head | ms | x GEMMs | "
        + " | ".join(f"x {name}" for name in PEERS.values())
        + " | extra GiB | max logp error |",
        "|---" * (6 + len(PEERS)) + "|",
    ]
    for case in run["cases"]:
        rows = _rows(case)
        if (ours := rows.get("logitless")) is None:
            lines.append(f"| {_shape(case)} | {_mode(case)} |" + " - |" * (4 + len(PEERS)))
            continue
        median, extra = ours["median_seconds"], ours["extra_bytes"]
        cells = [_shape(case), _mode(case), f"{median * 1e3:.1f}", _cell(ours["ratio_to_gemm"], ".2f")]
        cells += [_cell(rows[name]["median_seconds"] / median if name in rows else None, ".2f") for name in PEERS]
        cells += [_cell(None if extra is None else extra / 2**30, ".2f"), _cell(ours["errors"]["token_logps"], ".1e")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Raw results, including the other losses: [bench/results/{folder.name}](bench/results/{folder.name})."]
    return "\n".join(lines)


def gpu_picture(run: dict[str, Any], path: Path) -> None:
    """Time over the bare GEMMs: one panel per mode, one group of bars per shape."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names, modes = ["logitless", *PEERS], list(dict.fromkeys(map(_mode, run["cases"])))
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axis, mode in zip(axes, modes):
        cases = [case for case in run["cases"] if _mode(case) == mode]
        for i, name in enumerate(names):
            ratios = [_rows(case).get(name, {}).get("ratio_to_gemm") for case in cases]
            bars = [(j + i / (len(names) + 1), ratio) for j, ratio in enumerate(ratios) if ratio is not None]
            axis.barh(
                [y for y, _ in bars], [x for _, x in bars], 0.9 / (len(names) + 1), color=mpl.colormaps["tab10"](i), label=name
            )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks([j + 0.4 for j in range(len(cases))], [_shape(case) for case in cases], fontsize=8)
        axis.set(title=mode, xlabel="time over the bare GEMMs")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description="Write the tables and pictures of README.md from measurement files.")
    parser.add_argument("folder", type=Path, nargs="?", help="output folder of make bench")
    parser.add_argument("--gpu", type=Path, help="folder with cuda-gpu.json; default: the last of bench/results/gpu-*")
    options = parser.parse_args(argv)
    readme, folder = root / "README.md", options.gpu
    if options.folder is not None:
        write_block(readme, "headline", table(json.loads((options.folder / "cpu-dpo-memory.json").read_text())))
        shutil.copy(options.folder / "cpu-memory.png", root / "docs" / "memory.png")
    if folder is None:
        folder = max((path.parent for path in root.glob("bench/results/gpu-*/cuda-gpu.json")), default=None)
    if folder is None:
        write_block(readme, "gpu", NOTHING)
        return
    gpu_picture(json.loads((folder / "cuda-gpu.json").read_text()), root / "docs" / "gpu.png")
    write_block(readme, "gpu", gpu_table(folder, "docs/gpu.png"))


if __name__ == "__main__":
    main()
