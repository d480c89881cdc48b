"""The CPU kernels without PyTorch: under sanitizers on every instruction set that this machine has, and compiled for others.

``cpu_sanitized.cpp`` calls every kernel on heap arrays of exact size and compares with double precision.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CPU = ROOT / "csrc/cpu"
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
KERNELS = [CPU / f"{isa}.cpp" for isa in ISAS]
DRIVER = [CPU / "pair_loss.cpp", HERE / "cpu_sanitized.cpp"]
FLAGS = ["-std=c++20", "-g1", "-ffp-contract=off", f"-I{ROOT / 'csrc/include'}"]
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]

pytestmark = pytest.mark.slow


def needs_compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")


def compiled(folder: Path, sources: list[Path], *flags: str) -> Path:
    """A program; one source after the other, so that the tests leave a core to others."""
    objects = []
    for source in sources:
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run(["g++", "-O1", *FLAGS, *flags, "-c", str(source), "-o", objects[-1]], check=True)
    program = folder / "program"
    subprocess.run(["g++", *flags, *objects, "-o", str(program), "-lpthread"], check=True)
    return program


def needs_sanitizer(folder: Path, *flags: str) -> None:
    """Skips where the compiler has no such sanitizer, or the machine does not let it run."""
    needs_compiler()
    (folder / "empty.cpp").write_text("int main() {}\n")
    command = ["g++", *flags, str(folder / "empty.cpp"), "-o", str(folder / "empty")]
    for step in (command, [str(folder / "empty")]):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no {flags[0]} here: {(done.stderr.strip().splitlines() or ['it fails without a word'])[-1]}")


def assert_runs(program: Path, *arguments: str, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[:6000]
    return done.stdout


@pytest.fixture(scope="module")
def memory_sanitized(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    needs_sanitizer(folder, *MEMORY)
    return compiled(folder, [*KERNELS, CPU / "dispatch.cpp", *DRIVER], *MEMORY)


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_stay_in_bounds_and_defined(memory_sanitized, isa):
    if assert_runs(memory_sanitized, "name", LOGITLESS_CPU_ISA=isa).strip() != isa:
        pytest.skip(f"this machine has no {isa}")
    assert f"{isa}: " in assert_runs(memory_sanitized, LOGITLESS_CPU_ISA=isa)


def test_tasks_of_a_kernel_share_nothing_that_one_of_them_writes(tmp_path):
    needs_sanitizer(tmp_path, *THREADS)
    # how work is split is the same source for every instruction set
    program = compiled(tmp_path, [CPU / "generic.cpp", *DRIVER], *THREADS, "-DLOGITLESS_GENERIC_ONLY")
    assert_runs(program, "few")


def zig() -> list[str]:
    if found := shutil.which("zig"):
        return [found]
    return [sys.executable, "-m", "ziglang"] if importlib.util.find_spec("ziglang") else []


def compile_all(command: list[str], folder: Path) -> None:
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    if "g++" not in command[0]:
        warnings.append("-Wno-unknown-warning-option")  # clang's word on the one before
    for source in (*KERNELS, CPU / "dispatch.cpp", CPU / "pair_loss.cpp"):
        subprocess.run([*command, "-O3", *FLAGS, *warnings, "-c", str(source), "-o", str(folder / "out.o")], check=True)


def test_kernels_compile_for_arm64(tmp_path):
    if shutil.which("aarch64-linux-gnu-g++"):
        compile_all(["aarch64-linux-gnu-g++"], tmp_path)
    elif zig():
        compile_all([*zig(), "c++", "-target", "aarch64-linux-gnu"], tmp_path)
    else:
        pytest.skip("needs a compiler for arm64: aarch64-linux-gnu-g++, or zig (pip install ziglang)")


def test_kernels_compile_with_clang(tmp_path):
    if shutil.which("clang++"):
        compile_all(["clang++", "--target=x86_64-linux-gnu"], tmp_path)
    elif zig():
        compile_all([*zig(), "c++", "-target", "x86_64-linux-gnu"], tmp_path)
    else:
        pytest.skip("needs clang++, or zig (pip install ziglang)")
