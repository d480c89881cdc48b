"""The table of predicted steps in docs/kernels.md. Usage: predict_step.py [--write]"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from blocks import write_block

from logitless.kernels.backends.interface import Call
from logitless.kernels.backends.registry import get_backend
from logitless.kernels.cost_model.gpu_constants import constants

DOCS = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
TOKENS, HIDDEN, VOCAB = 8192, 4096, 151_936
WORKS = {"trainable head": ("tile", 3), "frozen head": ("frozen", 2), "forward only": ("forward", 1)}
TARGET = 1.10
#: The quarter of the default memory budget that a GPU's blocks of logits get.
WORKSPACE = 128 << 20


def table() -> str:
    """As Markdown, for the H100's constants."""
    gpu = constants()["sm_90"]
    lines = [
        "| | bare GEMMs | triton | cuda | torch | triton's GEMM / cuBLAS's for 1.10 |",
        "|---|---|---|---|---|---|",
    ]
    for name, (work, gemms) in WORKS.items():
        call = Call(
            torch.device("cuda"),
            torch.bfloat16,
            torch.bfloat16,
            num_tokens=TOKENS,
            hidden_size=HIDDEN,
            vocab_size=VOCAB,
            work=work,
            workspace=WORKSPACE,
            architecture="sm_90",
        )
        one = 2 * TOKENS * HIDDEN * VOCAB / gpu.flops(torch.bfloat16)
        bare = gemms * one
        cells = [name, f"{bare * 1e3:.1f} ms"]
        for backend in ("triton", "cuda", "torch"):
            seconds = get_backend(backend).predict(call).seconds
            cells.append(f"{seconds * 1e3:.1f} ms, {seconds / bare:.2f}")
        beside = get_backend("triton").predict(call).seconds - one / gpu.triton_gemm
        cells.append(f"at least {one / (TARGET * bare - beside):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--write" in sys.argv:
        write_block(DOCS, "predictions", table())
    print(table())
