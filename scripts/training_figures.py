"""Write the training-step tables of README.md and docs/training.png from the output of `make bench-gpu-train`.

Usage: training_figures.py [FOLDER]; the default is the folder of bench/results whose name starts with gpu-.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from blocks import write_block

ROOT = Path(__file__).resolve().parent.parent
NOTHING = "Training steps have not been measured on a GPU yet; `make bench-gpu-train` measures them."
ARMS = {"trl+patch": "`patch()`", "logitless": "loss module", "logitless:packed": "loss module, padding-free"}


def _rows(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in case["rows"] if row["status"] == "ok"}


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit


def step_lines(document: dict[str, Any]) -> list[str]:
    """One table row per case: TRL's speed, our speed relative to it, and the share and memory of the head for both."""
    heads = [*ARMS.values(), "head, TRL", "head, ours", "GiB of a step, TRL", "ours"]
    lines = [f"| model, method, batch | TRL, tokens/s | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for case in document["cases"]:
        rows = _rows(case)
        trl, ours = rows.get("trl", {}), rows.get("trl+patch") or rows.get("logitless") or {}
        extra = [None if (n := row.get("extra_bytes")) is None else n / 2**30 for row in (trl, ours)]
        name = f"{case['model']} {case['method']}, {case['pairs']} x 2 x {case['length']} ({case['profile']})"
        options = [key for key in ("checkpointing", "compiled") if case[key]]
        options += [case["precision"]] if case["precision"] != "bf16" else []
        cells = [
            ", ".join([name, *options]),
            _figure(trl.get("tokens_per_second"), ".0f"),
            *(_figure(rows.get(arm, {}).get("speedup_over_trl"), ".2f", "x") for arm in ARMS),
            *(_figure(row.get("head_share"), ".0%") for row in (trl, ours)),
            *(_figure(value, ".2f") for value in extra),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def limit_lines(document: dict[str, Any]) -> list[str]:
    """One sentence per case."""
    lines = []
    for case in document["cases"]:
        rows = _rows(case)
        found = [
            f"{arm} {row['largest']} ({row['predicted']} by extrapolating its memory)"
            if row["cut_short"] and row["predicted"]
            else f"{arm} {row['largest']}"
            for arm, row in rows.items()
            if row["largest"] is not None
        ]
        what = "tokens of the longest sequence (one pair)" if case["of"] == "length" else f"pairs of {case['length']} tokens"
        ratio = case["targets"][0]["value"]
        lines.append(
            f"{case['model']} {case['method']} with gradient checkpointing in {case['limit_bytes'] / 1e9:g} GB, {what}: "
            f"{', '.join(found)}; our best over TRL's: {_figure(ratio, '.2f', 'x')}."
        )
    return lines


def curve_lines(document: dict[str, Any]) -> list[str]:
    """One sentence per case."""
    lines = []
    for case in document["cases"]:
        rows = {arm: row for arm, row in _rows(case).items() if row["distance_over_noise"] is not None and not row["rounding"]}
        steps = max((len(row["losses"]) for row in rows.values()), default=0)
        found = ", ".join(f"{arm} {row['distance_over_noise']:.2f}" for arm, row in rows.items())
        lines.append(
            f"Losses of {steps} steps of {case['model']} {case['method']}: mean distance from TRL's losses, divided by the "
            f"change that another rounding of TRL's own head causes: {found}."
        )
    return lines


def block(folder: Path | None) -> str:
    """The training block of README.md."""
    documents = {}
    for path in sorted(folder.glob("*-training-*.json")) if folder is not None else ():
        document = json.loads(path.read_text())
        documents[document["suite"]] = document
    if not documents:
        return NOTHING
    environment = next(iter(documents.values()))["environment"]
    machine, versions = environment["machine"], environment["versions"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"CPU ({machine['cpu']}), shrunk models"
    parts = [
        f"Whole training steps, {where}, torch {versions['torch']}, TRL {versions['trl']}, transformers "
        f"{versions['transformers']}, commit {(environment['commit'] or 'unknown')[:10]}; each table is one interleaved run:"
    ]
    for suite in ("steps", "grid", "options"):
        if suite in documents:
            parts.append("\n".join(step_lines(documents[suite])))
    for suite, lines in (("longest", limit_lines), ("largest", limit_lines), ("curves", curve_lines)):
        if suite in documents:
            parts.append("\n\n".join(lines(documents[suite])))
    return "\n\n".join(parts)


def write(folder: Path | None, readme: Path, picture: Path) -> None:
    """Write the block of the README, and draw the picture if training steps were measured."""
    made = block(folder)
    steps = next(iter(sorted(folder.glob("*-training-steps.json"))), None) if folder is not None else None
    if steps is not None:
        from logitless.bench.training.report import write_figure

        document = json.loads(steps.read_text())
        gpu = document["environment"]["machine"]["gpu"]
        write_figure(picture, document["cases"], gpu["name"] if gpu else "CPU, shrunk models")
        made += f"\n\n![speed of training steps over TRL's, and the head's share]({picture.parent.name}/{picture.name})"
    write_block(readme, "training", made)


def main(arguments: list[str]) -> None:
    found = [Path(arguments[0])] if arguments else sorted((ROOT / "bench" / "results").glob("gpu-*"))
    folder = next((f for f in found if any(f.glob("*-training-*.json"))), None)
    if arguments and folder is None:
        raise SystemExit(f"{arguments[0]} has no file named *-training-*.json")
    write(folder, ROOT / "README.md", ROOT / "docs" / "training.png")


if __name__ == "__main__":
    main(sys.argv[1:])
