#!/usr/bin/env python3
"""Compiles the CUDA kernels for every supported architecture, without a GPU, and holds them to their budget of resources.

    python scripts/check_cuda.py [--update] [--jobs 2] [--out build/cuda]

Registers and shared memory decide how many threads an SM holds, and a spilled register is a trip to memory. The budget,
``csrc/cuda/budget.json``, has an entry for each kernel and architecture. It fails (exit 1), naming the kernel, when one uses
more registers or shared memory than its entry, spills, or has no entry, and when an entry has no kernel. Warnings of the
compiler, of its host compiler and of the assembler are errors. ``--update`` writes what was found as the new budget.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
BUDGET = SOURCES / "budget.json"
ARCHITECTURES = ("80", "90", "100")
#: Registers are handed out in steps of this many per thread, so a budget between two steps would promise nothing.
REGISTER_STEP = 8
REGISTERS_PER_SM = 65536
THREADS_PER_SM = 2048


@dataclass(frozen=True)
class Usage:
    """What the assembler reports of one kernel."""

    registers: int
    shared: int
    spilled: int  # bytes stored and loaded

    def threads_per_sm(self) -> int:
        """As registers allow, in whole warps."""
        step = math.ceil(self.registers / REGISTER_STEP) * REGISTER_STEP
        return min(THREADS_PER_SM, REGISTERS_PER_SM // (step * 32) * 32)


def flags() -> list[str]:
    """What every kernel is compiled with: all warnings are errors, and code for later devices is included as PTX."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    codes.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-fPIC", "-Xptxas", "-v,-warn-spills"]
    return ["-std=c++17", "-O3", *strict, f"-I{ROOT / 'csrc/include'}", *codes]


def compile_source(source: Path, out: Path) -> tuple[str, float]:
    """Returns the compiler's messages and the seconds it took."""
    start = time.perf_counter()
    command = ["nvcc", *flags(), "-c", str(source), "-o", str(out / f"{source.stem}.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{source.relative_to(ROOT)} does not compile:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr, time.perf_counter() - start


def demangle(names: list[str]) -> list[str]:
    """Kernels by the name a reader knows: ``tile_pass_kernel<float, 1>``."""
    if not names:
        return []
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [readable(name) for name in done.stdout.splitlines()]


def readable(name: str) -> str:
    name = name.removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):  # up to the parameter list, which is the first parenthesis outside of <>
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\([\w:]+\)", "", name).replace("logitless::cuda::", "").replace("logitless::", "")


def parse(report: str) -> dict[tuple[str, str], Usage]:
    """Usage by mangled name and architecture, from what ``ptxas -v`` says."""
    usage = {}
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for m in pattern.finditer(report):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        spilled = int(m["stores"]) + int(m["loads"])
        usage[m["name"], f"sm_{m['arch']}"] = Usage(int(m["registers"]), int(shared[1]) if shared else 0, spilled)
    return usage


def collect(out: Path, jobs: int) -> tuple[dict[str, dict[str, Usage]], dict[str, float]]:
    """Compiles everything. Returns usage by kernel and architecture, and seconds by source."""
    out.mkdir(parents=True, exist_ok=True)
    # the largest source first, so that it does not run alone at the end
    sources = sorted(SOURCES.glob("*.cu"), key=lambda s: s.stem != "tile_pass")
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda source: compile_source(source, out), sources))
    found: dict[str, dict[str, Usage]] = {}
    for report, _ in results:
        usage = parse(report)
        for (_, arch), name, value in zip(usage, demangle([name for name, _ in usage]), usage.values(), strict=True):
            found.setdefault(name, {})[arch] = value
    seconds = {source.name: took for source, (_, took) in zip(sources, results, strict=True)}
    return dict(sorted(found.items())), seconds


def problems(found: dict[str, dict[str, Usage]], budget: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """One sentence for each way in which the kernels and the budget disagree."""
    complaints = []
    for name, by_arch in found.items():
        for arch, usage in by_arch.items():
            if usage.spilled:
                complaints.append(f"{name} on {arch} spills {usage.spilled} bytes of registers")
            allowed = budget.get(name, {}).get(arch)
            if allowed is None:
                complaints.append(f"{name} on {arch} is not in the budget")
                continue
            for what in ("registers", "shared"):
                if getattr(usage, what) > allowed[what]:
                    complaints.append(f"{name} on {arch} uses {getattr(usage, what)} {what}, its budget is {allowed[what]}")
    for name, by_arch in budget.items():
        for arch in by_arch:
            if arch not in found.get(name, {}):
                complaints.append(f"{name} on {arch} is in the budget, but there is no such kernel")
    return complaints


def as_budget(found: dict[str, dict[str, Usage]]) -> dict[str, dict[str, dict[str, int]]]:
    def allow(usage: Usage) -> dict[str, int]:
        return {"registers": math.ceil(usage.registers / REGISTER_STEP) * REGISTER_STEP, "shared": usage.shared}

    return {name: {arch: allow(usage) for arch, usage in by_arch.items()} for name, by_arch in found.items()}


def print_table(found: dict[str, dict[str, Usage]]) -> None:
    width = max(map(len, found), default=0)
    print(f"{'kernel':{width}}  arch    registers  shared  spilled  threads/SM by registers")
    for name, by_arch in found.items():
        for arch, usage in by_arch.items():
            numbers = f"{usage.registers:9}  {usage.shared:6}  {usage.spilled:7}  {usage.threads_per_sm():5}"
            print(f"{name:{width}}  {arch:6}  {numbers}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write what is found as the new budget")
    parser.add_argument("--jobs", type=int, default=2, help="compilers that run at a time (default: 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "cuda", help="folder of the object files")
    options = parser.parse_args(arguments)
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc is not on PATH")
    start = time.perf_counter()
    found, seconds = collect(options.out, options.jobs)
    print_table(found)
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"{len(found)} kernels, {time.perf_counter() - start:.0f} s ({took})")
    if options.update:
        BUDGET.write_text(json.dumps(as_budget(found), indent=2) + "\n")
        print(f"wrote {BUDGET.relative_to(ROOT)}")
    complaints = problems(found, json.loads(BUDGET.read_text()) if BUDGET.exists() else {})
    for complaint in complaints:
        print(f"over budget: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
