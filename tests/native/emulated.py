"""Builds and loads the CUDA extension with ``cuda_emulator.h`` in place of CUDA, under operators of its own."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
from pathlib import Path

import torch

from logitless.kernels.operators.schemas import SCHEMAS

from .operators import Tile, accumulate, new_sums

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILER = os.environ.get("CXX", "g++")
#: Set by the test that runs the emulated tests again with sanitizers.
SANITIZED = "LOGITLESS_EMULATOR_SANITIZED" in os.environ
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPES = [F32, BF16, F16, F64]


class Emulated:
    """The operators of the emulated extension, and the order in which its threads take turns."""

    def __init__(self, library: Path) -> None:
        self.schemas = torch.library.Library("logitless_emulated", "DEF")
        for name, schema in SCHEMAS.items():
            self.schemas.define(name + schema)
        torch.ops.load_library(str(library))
        self.order = ctypes.CDLL(str(library)).logitless_emulator_order
        self.ops = torch.ops.logitless_emulated


def build(library: Path) -> None:
    """Compiles bindings, launch code and kernels as they are. Raises with the compiler's messages."""
    torch_root = Path(torch.__file__).parent
    command = [COMPILER, "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command += ["-ffp-contract=off", *(SANITIZERS if SANITIZED else [])]
    command += ["-DLOGITLESS_CUDA_EMULATOR"]
    command += [f"-I{ROOT / folder}" for folder in ("", "csrc/include", "tests/native")]
    command += ["-isystem", str(torch_root / "include"), str(ROOT / "tests/native/cuda_emulator.cpp"), "-o", str(library)]
    command += [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
    # the compiler need not run under the sanitizer
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def matrix(rows: int, columns: int, dtype: torch.dtype, *, pad: int = 0, skip: int = 0, values=None) -> torch.Tensor:
    """A matrix whose rows lie ``columns + pad`` apart, from element ``skip`` of its memory on. What is beside it is NaN."""
    stride = columns + pad
    buffer = torch.full((skip + max(1, rows * stride),), math.nan, dtype=dtype)
    view = buffer.as_strided((rows, columns), (stride, 1), skip)
    if values is not None:
        view.copy_(values)
    return view


def beside_is_untouched(view: torch.Tensor) -> bool:
    whole = view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0).clone()
    inside = torch.zeros(whole.shape, dtype=torch.bool)
    if view.numel():
        inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return bool(whole[~inside].isnan().all())


def make_tile(
    n: int,
    width: int,
    source: torch.dtype = F32,
    destination: torch.dtype | None = BF16,
    *,
    bias: torch.dtype | None = None,
    sums: bool = True,
    pad: int = 0,
    skip: int = 0,
    seed: int = 0,
    spread: float = 3.0,
    **options,
) -> Tile:
    g = torch.Generator().manual_seed(1000 * seed + width)
    acc = accumulate(source)
    logits = torch.randn(n, width, generator=g) * spread
    labels = torch.randint(0, width, (n,), generator=g)
    tile = Tile(
        matrix(n, width, source, pad=pad, skip=skip, values=logits),
        None if destination is None else matrix(n, width, destination, pad=pad, skip=skip),
        labels,
        (torch.randn(n, generator=g) + 2).to(acc),
        bias=None if bias is None else torch.randn(options.get("first", 0) + width, generator=g).to(bias),
        sums=new_sums(n) if sums else None,
        at_target=torch.randn(n, generator=g).to(acc),
        **options,
    )
    if not sums:
        tile.mix = torch.randn(2, n, generator=g).to(acc)
    return tile
