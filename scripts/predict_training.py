"""The table of predicted training steps in docs/training.md. Usage: predict_training.py [--write]"""

from __future__ import annotations

import sys
from pathlib import Path

from blocks import write_block

from logitless.bench.training.predict import predict
from logitless.bench.training.suites import SUITES

DOCS = Path(__file__).resolve().parent.parent / "docs" / "training.md"
SPEEDUPS = ("trl+patch", "logitless", "logitless:packed")
_COLUMNS = (
    "model, method, batch",
    "TRL's step",
    "its head",
    "our head",
    "`patch()`",
    "loss module",
    "padding-free",
    "head's GiB, TRL",
    "ours",
)


def table() -> str:
    """As Markdown, for the cases of the suites ``steps`` and ``grid`` on an H100."""
    lines = [
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
    ]
    for case in dict.fromkeys(case for name in ("steps", "grid") for case in SUITES[name].make({}, False)):
        found = predict(case)
        speedups = [f"{found.speedup(arm):.2f}x" if arm in found.heads else "-" for arm in SPEEDUPS]
        sizes = [f"{found.head_bytes[arm] / 2**30:.1f}" if arm in found.head_bytes else "-" for arm in ("trl", "logitless")]
        cells = [
            f"{case.model} {case.method}, {case.pairs} x 2 x {case.length} ({case.profile})",
            f"{found.seconds('trl') * 1e3:.0f} ms",
            *(f"{found.head_share(arm):.0%}" for arm in ("trl", "logitless")),
            *speedups,
            *sizes,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--write" in sys.argv:
        write_block(DOCS, "predictions", table())
    print(table())
