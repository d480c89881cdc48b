"""The suite ``compile``: GPU resources of the Triton kernels, which are compiled ahead of time and need no GPU.

It times nothing and has no providers: each row is a kernel with a shipped configuration, on an architecture.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.console import Console
from .core.report import print_table, write_json

if TYPE_CHECKING:  # Triton may not be installed
    from logitless.kernels.backends.triton.aot.compilation import Compilation

SUITE = "compile"
HELP = "registers, spills and shared memory of each Triton kernel on sm_80, sm_90 and sm_100; needs no GPU"
_KIB = 1024
#: Shared memory of a multiprocessor, of which a program may have all but the last KiB, and each takes a KiB for the driver.
_SHARED_BYTES = {80: 164 * _KIB, 90: 228 * _KIB, 100: 228 * _KIB}
_REGISTERS, _REGISTER_STEP = 65536, 8
_WARPS, _PROGRAMS = {80: 64, 90: 64, 100: 64}, 32
_TMEM_BYTES = 256 * _KIB


@dataclass(frozen=True)
class Usage:
    """One program of a compiled kernel, and how many of them fit on a multiprocessor."""

    kernel: str
    architecture: int
    configuration: str
    num_warps: int
    #: Programs per multiprocessor that the configuration assumes; 1 where it assumes none.
    programs_wanted: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tmem_bytes: int
    instructions: list[str]

    @property
    def by_registers(self) -> int:
        step = math.ceil(self.registers / _REGISTER_STEP) * _REGISTER_STEP
        return min(_REGISTERS // (step * 32 * self.num_warps), _WARPS[self.architecture] // self.num_warps, _PROGRAMS)

    @property
    def by_memory(self) -> int:
        """As many as shared memory allows, and tensor memory where the kernel uses it."""
        programs = min(_SHARED_BYTES[self.architecture] // (self.shared_bytes + _KIB), _PROGRAMS)
        return min(programs, _TMEM_BYTES // self.tmem_bytes) if self.tmem_bytes else programs

    def cells(self) -> dict[str, str]:
        """By column of the table."""
        return {
            "kernel": self.kernel,
            "arch": f"sm_{self.architecture}",
            "configuration": self.configuration,
            "registers": str(self.registers),
            "spill bytes": str(self.spill_bytes),
            "shared KiB": f"{self.shared_bytes / _KIB:.1f}",
            "tmem KiB": f"{self.tmem_bytes / _KIB:.0f}" if self.tmem_bytes else "-",
            "programs/SM": f"{self.by_registers} by registers, {self.by_memory} by memory",
            "instructions": " ".join(self.instructions) or "-",
        }


def shared_limit(architecture: int) -> int:
    """The most bytes for one program."""
    return _SHARED_BYTES[architecture] - _KIB


def why_not() -> str | None:
    """Why nothing can be compiled in this process."""
    try:
        import triton
    except ImportError as error:
        return f"Triton does not import: {error}"
    from logitless.kernels.backends.triton.compat import interpreted

    if interpreted():
        return "TRITON_INTERPRET is set, with which Triton compiles nothing: unset it"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= (3, 4) else f"Triton {triton.__version__} is too old, 3.4 is needed"


def targets(quick: bool) -> dict[tuple[str, int], Compilation]:
    """What is compiled, by name and architecture. ``quick``: a few of every kernel."""
    from logitless.kernels.backends.triton.aot.shipped import all_compilations, is_representative

    chosen = (c for c in all_compilations() if not quick or is_representative(c))
    return {(c.name, architecture): c for c in chosen for architecture in c.architectures}


def _configuration(compilation: Compilation) -> tuple[str, int]:
    """In words, and the programs per multiprocessor that it assumes."""
    from logitless.kernels.backends.triton.aot.shipped import GemmCompilation

    words, programs = [f"{compilation.num_warps} warps"], 1
    if isinstance(compilation, GemmCompilation) and compilation.config is not None:
        constants, programs = compilation.constexprs, compilation.config.programs_per_sm
        words += [f"{compilation.num_stages} stages", f"part {constants['PART']}"]
        words += [name.lower() for name in ("TMA", "FLATTEN") if constants[name]]
    return ", ".join(words), programs


def compile_one(target: tuple[str, int]) -> Usage:
    """Compile one of :func:`targets`."""
    from logitless.kernels.backends.triton.aot.ahead import compile_ahead

    compilation, architecture = targets(quick=False)[target], target[1]
    configuration, programs = _configuration(compilation)
    try:
        found = compile_ahead(compilation, architecture)
    except Exception as error:  # the compiler's message does not name the kernel
        raise RuntimeError(f"{compilation.name} does not compile for sm_{architecture}: {error}") from error
    measured = {name: getattr(found, name) for name in ("registers", "spill_bytes", "shared_bytes", "tmem_bytes")}
    more: dict[str, Any] = {"num_warps": compilation.num_warps, "programs_wanted": programs, **measured}
    return Usage(found.name, architecture, configuration, instructions=sorted(found.instructions), **more)


def compile_all(chosen: Sequence[tuple[str, int]], jobs: int | None = None) -> Iterator[Usage]:
    """In the order given, each as soon as it and those before it are done. ``jobs``: processes; default one per core."""
    # a forked process would inherit torch's threads in an undefined state
    with ProcessPoolExecutor(jobs or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_one, chosen)


def markdown(found: Iterable[Usage]) -> str:
    """The table for the documentation."""
    rows = [usage.cells() for usage in found]
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)]) + "\n"


def run(console: Console, out: Path, environment: dict[str, Any], quick: bool) -> Path:
    """Compile, print the table, and write it as JSON."""
    chosen = list(targets(quick))
    found: list[Usage] = []
    with console.progress(len(chosen)) as progress:
        for (name, architecture), usage in zip(chosen, compile_all(chosen)):
            found.append(usage)
            progress(f"{name} on sm_{architecture}", 1)
    print_table(console, f"{SUITE}: one program of each Triton kernel", [usage.cells() for usage in found])
    kernels = [as_dict(usage) for usage in found]
    return write_json(out / f"{SUITE}.json", {"quick": quick, "environment": environment, "kernels": kernels})


def as_dict(usage: Usage) -> dict[str, Any]:
    return {**asdict(usage), "programs_by_registers": usage.by_registers, "programs_by_memory": usage.by_memory}
