"""Write README's headline table and picture from the files of a ``make bench`` run. Usage: readme_figures.py bench/out"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "gemm": "the three GEMMs alone, on scored tokens",
    "torch": "plain PyTorch",
    "torch-scored": "plain PyTorch on scored tokens",
    "torch-compile": "the same under torch.compile, on scored tokens",
    "trl": "TRL's fused head + its loss",
    "liger": "Liger `chunked_loss`",
    "logitless": "**logitless**, loss module",
    "logitless:op": "logitless, `linear_logps` + loss",
}


def table(run: dict) -> str:
    """The headline case as Markdown."""
    (case,) = (c for c in run["cases"] if c["suite"] == "dpo" and c["task"] == "dpo")
    rows = {row["provider"]: row for row in case["rows"] if row["status"] == "ok"}
    shape, versions, machine = case["shape"], run["environment"]["versions"], run["environment"]["machine"]
    lines = [
        f"DPO forward + backward, trained head, {shape['dtype']}, H={shape['hidden']}, V={shape['vocab']}, "
        f"{case['scored_tokens']} scored of {2 * shape['pairs'] * shape['tokens']} tokens, {machine['cores']} cores "
        f"({machine['cpu']}), torch {versions['torch'].split('+')[0]}, TRL {versions['trl']}, "
        f"Liger {versions['liger-kernel']}, one interleaved run:",
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


def main(folder: Path) -> None:
    run = json.loads((folder / "cpu-dpo-memory.json").read_text())
    readme = ROOT / "README.md"
    block = f"<!-- headline -->\n{table(run)}\n<!-- /headline -->"
    readme.write_text(re.sub(r"<!-- headline -->.*<!-- /headline -->", lambda _: block, readme.read_text(), flags=re.S))
    shutil.copy(folder / "cpu-memory.png", ROOT / "docs" / "memory.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
