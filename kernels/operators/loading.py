"""Loads the compiled libraries of ``csrc/``, and says why one cannot be loaded."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
from pathlib import Path

import torch

from .schemas import SCHEMAS


def _torch_version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


_HOW_TO_BUILD = {
    "_cpu": "the extension is not built: `make ext`, or install with a C++ compiler and pip's --no-build-isolation",
    "_cuda": (
        "the CUDA extension is not built: `LOGITLESS_EXT=cpu,cuda make ext`, or install with nvcc on PATH and pip's "
        "--no-build-isolation"
    ),
}


def _path(stem: str) -> Path:
    return Path(__file__).parents[1] / f"{stem}.so"


def _is_whole(path: Path) -> bool:
    """Whether an ELF file reaches to its table of sections, which comes last: loading a cut-off one kills the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64:
        return False
    (offset,) = struct.unpack_from("<Q", header, 0x28)
    size, count = struct.unpack_from("<HH", header, 0x3A)
    return path.stat().st_size >= offset + size * count


_SCHEMAS_DIGEST = hashlib.sha256(repr(SCHEMAS).encode()).hexdigest()[:16]


def _schemas_of(library: ctypes.CDLL) -> str:
    """What it was built for; setup.py computes it as above."""
    function = getattr(library, "logitless_schemas", None)
    if function is None:
        return ""
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


class _Extension:
    """One compiled library, loaded when first asked for."""

    def __init__(self, stem: str) -> None:
        self.library: ctypes.CDLL | None = None
        self.reasons = self._load(stem)

    def _load(self, stem: str) -> list[str]:
        path = _path(stem)
        if not path.exists():
            part, _, version = stem.partition("_torch")
            others = sorted(p.name for p in path.parent.glob(f"{part}_torch*.so")) if version else []
            if others:
                found = ", ".join(others)
                return [f"the extension was built for another torch ({found}); this is {torch.__version__}: `make ext`"]
            return [_HOW_TO_BUILD[part]]
        if not _is_whole(path):
            return [f"{path.name} does not load: the file is cut off; build or install it again"]
        try:
            self.library = ctypes.CDLL(str(path))
            if stem != "_cuda" and _schemas_of(self.library) != _SCHEMAS_DIGEST:
                return [f"{path.name} was built from other sources: `make ext`, or install again"]
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            return [f"{path.name} does not load: {error}"]
        return []


@functools.cache
def _cpu() -> _Extension:
    # it uses more than torch's stable interface, so each minor version has a library of its own
    return _Extension(f"_cpu_torch{_torch_version().replace('.', '_')}")


@functools.cache
def _why_not_wanted() -> list[str]:
    wanted = os.environ.get("LOGITLESS_CPU_ISA")
    if not wanted or cpu_instruction_set() == wanted:
        return []
    return [f"LOGITLESS_CPU_ISA={wanted!r} is not an instruction set of csrc/cpu that this machine has"]


def why_no_cpu_extension() -> list[str]:
    """Every reason why the C++ operators cannot run here."""
    return _cpu().reasons or _why_not_wanted()


@functools.cache
def _cuda() -> _Extension:
    return _Extension("_cuda")


@functools.cache
def _why_no_cuda() -> list[str]:
    if torch.version.cuda is None:
        return [f"torch {torch.__version__} is built without CUDA"]
    return [] if torch.cuda.is_available() else ["there is no CUDA device"]


def why_no_cuda_extension() -> list[str]:
    """Every reason why the CUDA operators cannot run here. Their library is loaded only where they can."""
    reasons = _why_no_cuda()
    if reasons:
        return reasons + ([] if _path("_cuda").exists() else [_HOW_TO_BUILD["_cuda"]])
    return _cuda().reasons


def cpu_instruction_set() -> str:
    """The instruction set that the C++ operators use here: ``avx512_bf16``, ``avx512``, ``avx2`` or ``generic``."""
    library = _cpu().library
    assert library is not None
    library.logitless_cpu_isa.restype = ctypes.c_char_p
    name: bytes = library.logitless_cpu_isa()
    return name.decode()


@functools.cache
def has_bf16_gemm() -> bool:
    """Whether oneDNN multiplies small bfloat16 matrices into float32 here."""
    library = _cpu().library
    return library is not None and bool(library.logitless_cpu_has_bf16_gemm())
