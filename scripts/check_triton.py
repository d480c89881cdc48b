#!/usr/bin/env python3
"""Compiles the Triton kernels ahead of time, without a GPU, and checks their resources against a budget.

    python scripts/check_triton.py [--quick] [--update] [--docs] [--jobs 2] [--part I/N] [--json FILE]

Registers and shared memory limit how many programs a multiprocessor holds, and each spilled register costs memory accesses.
The budget, ``tests/triton/budget.json``, has an entry for each kernel and architecture: registers, shared memory, and the
instructions that it must contain. The check fails (exit status 1), naming the kernel, when a kernel exceeds its entry, lacks an
instruction, spills or has no entry, and when an entry has no kernel.

Registers and spills are checked only with the Triton version with which the budget was written (its ``triton`` entry). With
other versions the check is that the kernels compile and contain their instructions.

All kernels take about 20 minutes on two cores; ``--quick`` compiles a few per kernel and configuration. ``--update`` writes
the result as the new budget, ``--docs`` as the table of ``docs/triton-resources.md``; both compile all kernels.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from logitless.bench.compile_report import Usage, as_dict, compile_all, markdown, shared_limit, targets, why_not

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "tests" / "triton" / "budget.json"
DOCS = ROOT / "docs" / "triton-resources.md"
#: Registers are handed out in steps of this many per thread, so a budget between two steps would promise nothing.
REGISTER_STEP = 8
TMEM_BYTES = 256 << 10

Budget = dict[str, dict[str, dict[str, Any]]]


def same_triton(budget: dict[str, Any]) -> bool:
    """Whether this Triton's registers and spills can be compared with the budget's."""
    return triton.__version__.split(".")[:2] == budget["triton"].split(".")[:2]


def as_budget(found: Sequence[Usage]) -> dict[str, Any]:
    kernels: Budget = {}
    for usage in found:
        kernels.setdefault(usage.kernel, {})[f"sm_{usage.architecture}"] = {
            "registers": math.ceil(usage.registers / REGISTER_STEP) * REGISTER_STEP,
            "shared": usage.shared_bytes,
            "instructions": usage.instructions,
        }
    return {"triton": triton.__version__, "kernels": kernels}


def needs(usage: Usage) -> list[str]:
    """Instructions that a GEMM of the logits must contain, in addition to those of the budget."""
    if not usage.kernel.startswith(("score_", "recompute_")) or "stages" not in usage.configuration:
        return []
    wanted = [{80: "mma", 90: "wgmma", 100: "tcgen05"}[usage.architecture]]
    if "tma" in usage.configuration.split(", "):
        wanted.append("tma")
    return wanted


def problems(found: Sequence[Usage], budget: dict[str, Any], numbers: bool = True) -> list[str]:
    """One sentence for each disagreement of kernels and budget. ``numbers``: check registers, shared memory and spills too."""
    complaints = []
    for usage in found:
        name = f"{usage.kernel} on sm_{usage.architecture}"
        allowed = budget["kernels"].get(usage.kernel, {}).get(f"sm_{usage.architecture}")
        if allowed is None:
            complaints.append(f"{name} is not in the budget")
            continue
        required = {*needs(usage), *allowed["instructions"]} - {"wgmma-serialized"}
        complaints += [f"{name} lacks {what}" for what in sorted(required.difference(usage.instructions))]
        if usage.shared_bytes > shared_limit(usage.architecture):
            complaints.append(f"{name} takes {usage.shared_bytes} bytes of shared memory, more than there are")
        if usage.tmem_bytes > TMEM_BYTES:
            complaints.append(f"{name} takes {usage.tmem_bytes} bytes of tensor memory, more than there are")
        if not numbers:
            continue
        if "wgmma-serialized" in usage.instructions:
            complaints.append(f"{name} waits for every wgmma by itself")
        if usage.spill_bytes:
            complaints.append(f"{name} spills {usage.spill_bytes} bytes of registers")
        for what, used in (("registers", usage.registers), ("shared", usage.shared_bytes)):
            if used > allowed[what]:
                complaints.append(f"{name} uses {used} {what}, its budget is {allowed[what]}")
        if min(usage.by_registers, usage.by_memory) < usage.programs_wanted:
            complaints.append(
                f"{name} is launched as if {usage.programs_wanted} programs ran on a multiprocessor; registers allow "
                f"{usage.by_registers}, memory {usage.by_memory}"
            )
    return complaints


def strangers(budget: dict[str, Any], known: set[tuple[str, int]]) -> list[str]:
    """Entries without a kernel, and kernels without an entry; compiles nothing."""
    entries = {(name, int(arch[3:])) for name, archs in budget["kernels"].items() for arch in archs}
    complaints = [
        f"{name} on sm_{arch} is in the budget, but there is no such kernel" for name, arch in sorted(entries - known)
    ]
    return complaints + [f"{name} on sm_{arch} is not in the budget" for name, arch in sorted(known - entries)]


def write_docs(found: Sequence[Usage]) -> None:
    DOCS.write_text(
        "# Resources of the Triton kernels\n\n"
        f"One program of each kernel, compiled ahead of time with Triton {triton.__version__} by\n"
        "`python scripts/check_triton.py --docs`. `logitless bench --suite compile` prints the same table for the installed\n"
        "version. A name consists of kernel, variant, operand dtypes and block size (tokens x vocabulary entries x hidden\n"
        "dimensions). `unaligned` operands have rows that do not start at multiples of 16 bytes. Spill bytes are the\n"
        "bytes of a thread's spill stores, as `ptxas -v` counts them. `tma`, `wgmma` and `tcgen05` are units of Hopper and\n"
        "Blackwell; the column is read from the PTX.\n\n" + markdown(found)
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of every kernel and configuration")
    parser.add_argument("--update", action="store_true", help="write what is found as the new budget")
    parser.add_argument("--docs", action="store_true", help=f"write {DOCS.relative_to(ROOT)}")
    parser.add_argument("--jobs", type=int, default=2, help="compilations that run at a time (default: 2)")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every Nth of them, from the Ith on")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write what is found and what is wrong")
    options = parser.parse_args(arguments)
    if reason := why_not():
        raise SystemExit(reason)
    first, _, step = options.part.partition("/")
    chosen = list(targets(options.quick))[int(first) :: int(step)]
    part = options.quick or int(step) > 1
    if part and (options.update or options.docs):
        raise SystemExit("--update and --docs take all kernels: leave out --quick and --part")
    start, found = time.perf_counter(), []
    for usage in compile_all(chosen, options.jobs):
        found.append(usage)
        print(f"[{len(found)}/{len(chosen)}]", "; ".join(usage.cells().values()), flush=True)
    print(f"{len(found)} compilations, {time.perf_counter() - start:.0f} s")
    if options.update:
        BUDGET.write_text(json.dumps(as_budget(found), indent=1) + "\n")
        print(f"wrote {BUDGET.relative_to(ROOT)}")
    if options.docs:
        write_docs(found)
        print(f"wrote {DOCS.relative_to(ROOT)}")
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {"triton": triton.__version__, "kernels": {}}
    complaints = problems(found, budget, same_triton(budget))
    if not part:
        complaints += strangers(budget, set(chosen))
    if options.json is not None:
        document = {"kernels": [as_dict(usage) for usage in found], "problems": complaints}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    for complaint in complaints:
        print(f"over budget: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
