"""The suite ``ceilings``: what bounds a step on a device: copies, GEMMs of the head's shapes, and launches.

It has no providers and checks nothing: each row is one operation of torch, timed alone. ``scripts/gpu_constants.py`` computes
the cost model's constants from its JSON.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .core.cases import Shape
from .core.console import Console, milliseconds
from .core.environment import nvidia_smi
from .core.report import print_table, write_json
from .suites import SUITES

SUITE = "ceilings"
HELP = "bandwidth of a copy, GEMMs of the head's shapes, and the time of a short kernel"
SCHEMA = 1

#: Bytes that are copied, by device: far more than any cache.
_COPY_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}
#: Short kernels in one queue, which holds about a thousand; cycles (some 25 ms) of the kernel behind which they wait.
_LAUNCHES, _WAIT = 500, 50_000_000
#: Vocabulary entries of the GEMMs in float32 and float64, which would take seconds with the whole weight.
_WIDE_VOCAB = 16384
#: Seconds for which each operation is repeated, and the fewest and most runs.
_REPEAT_SECONDS, _FEWEST, _MOST = 0.3, 3, 40
#: Seconds of GEMMs in the queue while the driver's tool reads the clock.
_LOAD_SECONDS = 3.0


@dataclass(frozen=True)
class Ceiling:
    """One operation.

    Attributes:
        kind: ``copy``, ``gemm`` or ``launch``. what: which one, for the table.
        seconds, min_seconds: median and least of one operation.
        moved: bytes read and written. flops: of a GEMM; 0 otherwise.
        dtype, tokens, hidden, vocab: of a GEMM: N, H, V.
    """

    kind: str
    what: str
    seconds: float
    min_seconds: float
    moved: int
    flops: int = 0
    dtype: str = ""
    tokens: int = 0
    hidden: int = 0
    vocab: int = 0

    def cells(self) -> dict[str, str]:
        """By column of the table."""
        return {
            "operation": self.what,
            "ms, median": milliseconds(self.seconds),
            "min": milliseconds(self.min_seconds),
            "GB/s": f"{self.moved / self.seconds / 1e9:.0f}" if self.moved else "-",
            "TFLOP/s": f"{self.flops / self.seconds / 1e12:.4g}" if self.flops else "-",
            "what": f"N={self.tokens} H={self.hidden} V={self.vocab} {self.dtype}" if self.kind == "gemm" else "",
        }

    def as_dict(self) -> dict[str, Any]:
        rates = {f"{key}_per_second": n / self.seconds or None for key, n in (("bytes", self.moved), ("flops", self.flops))}
        return {**asdict(self), **rates}


def _once(run: Callable[[], object], device: torch.device, wait: int = 0) -> float:
    """Seconds of one run, on the device's own clock where it has one; there it may first wait, so that the queue fills."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if wait:
        torch.cuda._sleep(wait)
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def time_of(run: Callable[[], object], device: torch.device, wait: int = 0) -> tuple[float, float]:
    """Median and least seconds of some runs, after one that is not counted."""
    run()
    first = _once(run, device, wait)
    count = min(_MOST, max(_FEWEST, int(_REPEAT_SECONDS / max(first, 1e-9))))
    seconds = [_once(run, device, wait) for _ in range(_FEWEST if wait else count)]
    return statistics.median(seconds), min(seconds)


def copy(device: torch.device) -> Ceiling:
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    found = time_of(lambda: destination.copy_(source), device)
    return Ceiling("copy", f"copy of {len(source) >> 20} MiB", *found, moved=2 * len(source))


def launch(device: torch.device) -> Ceiling:
    """One short kernel in a full queue; on a CPU one call of a short operator."""
    x = torch.zeros(1, device=device)
    wait = _WAIT if device.type == "cuda" else 0
    median, least = time_of(lambda: [x.add_(1.0) for _ in range(_LAUNCHES)], device, wait)
    return Ceiling("launch", "one short kernel", median / _LAUNCHES, least / _LAUNCHES, moved=0)


def _operands(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """X (N, H), W (V, H) and a block for logits (N, V)."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn((n, h), generator=g, dtype=dtype, device=device)
    w = torch.empty((v, h), dtype=dtype, device=device).normal_(std=h**-0.5, generator=g)
    return x, w, torch.empty((n, v), dtype=dtype, device=device)


def gemms(shape: Shape, dtype: torch.dtype, device: torch.device, vocab: int | None = None) -> list[Ceiling]:
    """The three of a step, each alone: logits, dX, dW."""
    n, h, v = shape.scored, shape.hidden, vocab or shape.vocab
    x, w, tile = _operands(n, h, v, dtype, device)
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    moved = (x.numel() + w.numel() + tile.numel()) * dtype.itemsize
    sizes: dict[str, Any] = {"tokens": n, "hidden": h, "vocab": v, "dtype": str(dtype).removeprefix("torch.")}
    runs: dict[str, Callable[[], object]] = {
        "logits = X W^T": lambda: torch.mm(x, w.t(), out=tile),
        "dX = G W": lambda: torch.mm(tile, w, out=dx),
        "dW = G^T X": lambda: torch.mm(tile.t(), x, out=dw),
    }
    found = []
    for what, run in runs.items():
        found.append(Ceiling("gemm", what, *time_of(run, device), moved=moved, flops=2 * n * h * v, **sizes))
        if len(found) == 1:
            tile.mul_(1e-3)  # about the size of gradients: power, and so the clock, depends on the numbers
    return found


def clock_under_load(shape: Shape, device: torch.device, seconds: float) -> float | None:
    """Hertz of the multiprocessors while the GEMM of the logits, which takes ``seconds``, runs all the time.

    ``None`` where the driver's tool reports none, or where the queue was empty before it did.
    """
    if device.type == "cpu":
        return None
    x, w, tile = _operands(shape.scored, shape.hidden, shape.vocab, shape.torch_dtype, device)
    for _ in range(max(1, min(500, int(_LOAD_SECONDS / seconds)))):
        torch.mm(x, w.t(), out=tile)
    end = torch.cuda.Event()
    end.record()
    megahertz = nvidia_smi("clocks.sm")
    still_busy = not end.query()
    end.synchronize()
    return float(megahertz) * 1e6 if megahertz is not None and still_busy else None


def measure(device: torch.device, shapes: list[Shape], progress: Any) -> tuple[float | None, list[Ceiling]]:
    """The clock under load, and all rows."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # torch's default for float32
    try:
        progress("copy and launch", 1)
        rows = [copy(device), launch(device)]
        for shape in shapes:
            progress(f"GEMMs of {shape}", 1)
            rows += gemms(shape, shape.torch_dtype, device)
        progress("clock under load", 1)
        clock = clock_under_load(shapes[0], device, rows[2].seconds)
        for dtype in (torch.float32, torch.float64):
            progress(f"GEMM in {dtype}", 1)
            rows += gemms(shapes[0], dtype, device, min(shapes[0].vocab, _WIDE_VOCAB))[:1]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return clock, rows


def run(
    console: Console, out: Path, environment: Mapping[str, Any], device: torch.device, overrides: Mapping[str, Any], quick: bool
) -> Path:
    """Measure at the shapes of the suite with the device's headline, print the table, and write it as JSON."""
    suite = SUITES["gpu" if device.type == "cuda" else "dpo"]
    shapes = list(dict.fromkeys(case.shape for case in suite.make(overrides, quick)))
    with console.progress(len(shapes) + 4) as progress:
        clock, rows = measure(device, shapes, progress)
    print_table(console, f"{SUITE}: operations of torch alone", [row.cells() for row in rows])
    if clock is not None:
        console.print(f"  {clock / 1e6:.0f} MHz under a load of GEMMs", highlight=False)
    console.print()
    value = {"schema": SCHEMA, "quick": quick, "environment": environment}
    value |= {"clock_hz": clock, "rows": [row.as_dict() for row in rows]}
    return write_json(out / f"{device.type}-{SUITE}.json", value)
