"""The cost model's constants of the GPU at hand, from measurements: an entry of kernels/cost_model/gpu_constants.json.

    python scripts/gpu_constants.py bench/results/gpu-DEVICE/cuda-ceilings.json [bench/results/triton-timings.json] [--write]

The first file is of ``logitless bench --suite ceilings``, the second of ``logitless tune --timings``; without it
``triton_gemm`` stays what it was, and ``source`` says so. ``--write`` replaces the architecture's entry (or adds one); without
it the entry is printed. ``scripts/predict_step.py --write`` brings the table of docs/kernels.md up to date afterwards.

Which number comes from what:

bandwidth               bytes read and written of the copy, over its median time
bf16_flops              FLOP of the three GEMMs of all shapes over the sum of their median times: large ones count more
fp32_flops, fp64_flops  the GEMM of the logits in that dtype
launch_seconds          one short kernel in a full queue
clock_hz                of the multiprocessors under a load of GEMMs; where the driver did not say, the former entry's
sm_count, l2_bytes      the device's properties
triton_gemm             see :func:`triton_gemm`
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from logitless.kernels.backends.interface import Call
from logitless.kernels.backends.registry import get_backend
from logitless.kernels.cost_model.gpu_constants import Gpu, load_constants

FILE = Path(__file__).resolve().parent.parent / "kernels" / "cost_model" / "gpu_constants.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _rows(ceilings: dict[str, Any], kind: str, dtype: str = "") -> list[dict[str, Any]]:
    found = [row for row in ceilings["rows"] if row["kind"] == kind and row["dtype"] == dtype]
    if not found:
        raise SystemExit(f"the ceilings have no {kind} {dtype}".rstrip())
    return found


def _flops(rows: Sequence[dict[str, Any]]) -> float:
    return sum(row["flops"] for row in rows) / sum(row["seconds"] for row in rows)


def triton_gemm(tuning: dict[str, Any], gpu: Gpu) -> float:
    """Speed of Triton's GEMM without its epilogue, relative to cuBLAS: the median over the shapes.

    What was timed is a forward pass: the GEMM, the exponentials after its products, and the partial sums. The cost model adds
    the latter two itself, so what it predicts for them is taken off; the rest is compared with ``torch.mm`` of the same shape,
    timed right after it. The candidate is the best for its shape.
    """
    ratios = []
    for result in tuning["results"]:
        p, best = result["problem"], result["timings"][0]
        if p["architecture"] != gpu.architecture:
            raise SystemExit(f"the timings are of {p['architecture']}, the ceilings of {gpu.architecture}")
        dtype = DTYPES[p["dtype"]]
        call = Call(
            torch.device("cuda"),
            dtype,
            dtype,
            num_tokens=p["num_tokens"],
            hidden_size=p["hidden_size"],
            vocab_size=p["vocab_size"],
            work="forward",
            workspace=1 << 40,  # the tokens were not divided
            architecture=gpu.architecture,
        )
        parts = {part.name: part.seconds for part in get_backend("triton").predict(call, gpu).parts}
        beside = parts["exponentials of the epilogue"] + parts["partial sums"]
        alone = best["forward"] / 1e3 - beside
        if alone <= 0:
            raise SystemExit(f"a forward pass of {best['forward']} ms is shorter than what the model adds to its GEMM: {p}")
        ratios.append(result["mm_milliseconds"] / 1e3 / alone)
    return statistics.median(ratios)


def measured(ceilings: dict[str, Any], tuning: dict[str, Any] | None, known: dict[str, Gpu]) -> Gpu:
    """The entry of the architecture that was measured; what was not measured is that of ``known``."""
    environment = ceilings["environment"]
    device = environment["machine"]["gpu"]
    if device is None:
        raise SystemExit("the ceilings were measured on a CPU: `make bench-gpu` measures those of a GPU")
    former = known.get(device["architecture"], known["default"])
    copy, launch = _rows(ceilings, "copy")[0], _rows(ceilings, "launch")[0]
    gemms = _rows(ceilings, "gemm", "bfloat16")
    shapes = dict.fromkeys((row["tokens"], row["hidden"], row["vocab"]) for row in gemms)
    clock = ceilings["clock_hz"]
    notes = [
        f"measured on {device['name']}, driver {device['driver'] or 'unknown'}, torch {environment['versions']['torch']}, "
        f"commit {(environment['commit'] or 'unknown')[:10]}: {copy['what']}",
        f"bf16: logits, dX and dW at N, H, V = {', '.join(' x '.join(map(str, shape)) for shape in shapes)}",
        "fp32 and fp64: logits of "
        + " and ".join(
            f"{r['tokens']} x {r['hidden']} x {r['vocab']}" for d in ("float32", "float64") for r in _rows(ceilings, "gemm", d)
        ),
        "clock under a load of GEMMs" if clock else "the clock is the former entry's, not measured",
        "launch: a short kernel in a full queue",
    ]
    gpu = Gpu(
        architecture=device["architecture"],
        device=device["name"],
        source="",
        measured=True,
        date=environment["time"][:10],
        torch_version=environment["versions"]["torch"],
        bandwidth=copy["moved"] / copy["seconds"],
        bf16_flops=_flops(gemms),
        fp32_flops=_flops(_rows(ceilings, "gemm", "float32")),
        fp64_flops=_flops(_rows(ceilings, "gemm", "float64")),
        triton_gemm=former.triton_gemm,
        sm_count=device["sm_count"],
        clock_hz=clock or former.clock_hz,
        l2_bytes=device["l2_bytes"] or former.l2_bytes,
        launch_seconds=launch["seconds"],
    )
    if tuning is None:
        notes.append("Triton's relative speed is the former entry's, not measured")
    else:
        gpu = replace(gpu, triton_gemm=triton_gemm(tuning, gpu))
        notes.append(
            f"Triton's relative speed: torch.mm over the forward pass less its epilogue and sums, {tuning['environment']}"
        )
    return replace(gpu, source="; ".join(notes) + ".")


def _number(value: float) -> str:
    """Four digits, as the file has them: 3.0e12 and 0.95."""
    if 1e-3 <= value < 1e6:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa)}e{int(exponent)}"


def as_text(gpu: Gpu) -> str:
    """The entry, as it stands in the file."""
    lines = []
    for key, value in asdict(gpu).items():
        if key != "architecture":
            text = _number(value) if isinstance(value, float) else json.dumps(value)
            lines.append(f'    "{key}": {text}')
    return f'  "{gpu.architecture}": {{\n' + ",\n".join(lines) + "\n  }"


def replaced(text: str, gpu: Gpu) -> str:
    """The file with the entry in it; the others stay as they are, to the letter."""
    pattern = re.compile(rf'  "{gpu.architecture}": \{{.*?\n  \}}', re.S)
    if pattern.search(text):
        new = pattern.sub(lambda _: as_text(gpu), text, count=1)
    else:
        new = text.replace('  "default": {', as_text(gpu) + ',\n  "default": {', 1)
    load_constants(new)  # which says what is wrong with it
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the entry; returns the exit status."""
    parser = argparse.ArgumentParser(description="Constants of the cost model from measurements.")
    parser.add_argument("ceilings", type=Path, help="JSON of the benchmark's suite ceilings")
    parser.add_argument("tuning", type=Path, nargs="?", help="JSON of logitless tune --timings")
    parser.add_argument("--file", type=Path, default=FILE, help="default: the library's")
    parser.add_argument("--write", action="store_true", help="replace the entry in the file")
    options = parser.parse_args(argv)
    text = options.file.read_text()
    tuning = None if options.tuning is None else json.loads(options.tuning.read_text())
    known = load_constants(text)
    gpu = measured(json.loads(options.ceilings.read_text()), tuning, known)
    new = replaced(text, gpu)
    print(as_text(gpu))
    before = asdict(known.get(gpu.architecture, known["default"]))
    for key, value in asdict(gpu).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            print(f"{key}: {before[key]:.4g} -> {value:.4g}, {value / before[key]:.2f} times as much", file=sys.stderr)
    if options.write:
        options.file.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
