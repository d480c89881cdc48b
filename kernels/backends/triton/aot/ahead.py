"""Ahead-of-time compilation for NVIDIA GPUs, and the resources that the compiled kernels take.

It needs no GPU: Triton's wheel contains the assembler and ``cuobjdump``. The code works with Triton 3.4 to 3.9. Registers and
spills are read from the machine code itself, so they do not depend on a version's assembler options or compilation cache.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .. import compat
from ..launch import OPTIONS
from .compilation import Compilation

#: What to look for in the PTX. ``cp.async`` is Ampere's 16-byte copy, ``tma`` a copy of a descriptor's box.
_INSTRUCTIONS = {
    "mma": "mma.sync.aligned",
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "cp.async": "cp.async.cg.shared",
    "tma": "cp.async.bulk.tensor",
    "setmaxnreg": "setmaxnreg",  # the kernel is specialised by warps
}

_TMEM_COLUMN_BYTES = 128 * 4  # tensor memory is allocated by columns, of 128 lanes of 32 bits


@dataclass(frozen=True)
class Resources:
    """The resources of one program of a compiled kernel."""

    name: str
    architecture: int
    #: Per thread, at the kernel's entry.
    registers: int
    #: Bytes that a thread's instructions store to local memory, each instruction counted once: the "spill stores" of ptxas.
    spill_bytes: int
    #: Dynamic shared memory requested by a launch, without the KiB that the driver reserves from sm_90 on.
    shared_bytes: int
    #: Of 256 KiB, from sm_100 on.
    tmem_bytes: int
    #: The keys of ``_INSTRUCTIONS`` that occur, and "wgmma-serialized" where ptxas gave up on overlapping them.
    instructions: frozenset[str]


def compile_ahead(compilation: Compilation, architecture: int) -> Resources:
    """Compile for ``architecture`` (80, 90, 100, ...).

    Raises:
        RuntimeError: in a process that interprets Triton, whose language is decorated for that at its import.
        Exception: whatever Triton raises when a kernel does not compile.
    """
    if compat.interpreted():
        raise RuntimeError("nothing can be compiled in a process with TRITON_INTERPRET=1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = {"signature": compilation.signature, "constexprs": compilation.constexprs, "attrs": dict(compilation.attrs)}
    source = ASTSource(compilation.kernel, **given)
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages, **OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx: str = compiled.asm["ptx"]
    usage, sass = _disassembly(compiled.asm["cubin"])
    instructions = {name for name, mnemonic in _INSTRUCTIONS.items() if mnemonic in ptx}
    if _serialized(ptx, sass):
        instructions.add("wgmma-serialized")
    return Resources(
        name=compilation.name,
        architecture=architecture,
        registers=max(int(count) for count in re.findall(r"\bREG:(\d+)", usage)),
        spill_bytes=spill_bytes(sass),
        shared_bytes=int(compiled.metadata.shared),
        tmem_bytes=int(compiled.metadata.tmem_size) * _TMEM_COLUMN_BYTES,
        instructions=frozenset(instructions),
    )


def spill_bytes(sass: str) -> int:
    """Bytes of the stores to local memory in machine code: ``STL`` is 4 bytes, ``STL.64`` 8, ``STL.U8`` 1 ...

    This equals the "bytes spill stores" of ``ptxas -v``, since no Triton kernel has arrays in local memory. The STACK field of
    ``cuobjdump -res-usage`` is the frame instead: slots that several values share, rounded up. Its LOCAL field is 0 for spills.
    """
    return sum(_width(modifiers) for modifiers in re.findall(r"\bSTL((?:\.\w+)*)\s", sass))


def _width(modifiers: str) -> int:
    bits = re.search(r"\.[US]?(8|16|64|128)\b", modifiers)
    return int(bits[1]) // 8 if bits else 4


def _serialized(ptx: str, sass: str) -> bool:
    """Whether ptxas put a wait around every wgmma (its remarks C7510 to C7516), which costs most of their speed.

    Then each one has its own ``ARRIVE``, while the PTX has one per step of the reduction.
    """
    arrivals = sass.count("WARPGROUP.ARRIVE")
    return arrivals > ptx.count("wgmma.fence.sync") and arrivals >= sass.count("HGMMA")


def _disassembly(cubin: bytes) -> tuple[str, str]:
    """The resource report of ``cuobjdump``, and the machine code."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([knobs.nvidia.cuobjdump.path, flag, path], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return usage, sass
