"""The CUDA extension compiles and links without a GPU, within its budget of resources and on the stable ABI alone."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]

#: What the extension may ask of others: LibTorch's stable ABI, the CUDA runtime, and the C and C++ runtimes.
ALLOWED = ("aoti_torch_", "torch_", "cuda", "__cuda")


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, str(ROOT / "scripts/check_cuda.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def check_cuda():
    spec = importlib.util.spec_from_file_location("check_cuda", ROOT / "scripts/check_cuda.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_cuda"] = module  # where its dataclass looks for its own names
    spec.loader.exec_module(module)
    return module


def test_kernels_compile_for_every_architecture_within_their_budget(objects):
    assert {p.stem for p in objects.glob("*.o")} == {p.stem for p in (ROOT / "csrc/cuda").glob("*.cu")}


def test_the_library_needs_nothing_but_the_stable_abi_and_the_cuda_runtime(objects):
    bindings, library = objects / "bindings.o", objects / "_cuda.so"
    # nvcc hands a .cpp to its host compiler, and knows where the runtime's headers are
    compile_it = ["nvcc", "-std=c++17", "-O2", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror"]
    compile_it += [f"-I{ROOT / 'csrc/include'}", "-isystem", str(Path(torch.__file__).parent / "include")]
    compile_it += ["-c", str(ROOT / "csrc/cuda/bindings.cpp"), "-o", str(bindings)]
    subprocess.run(compile_it, check=True)
    subprocess.run(["g++", "-shared", *map(str, objects.glob("*.o")), "-o", str(library)], check=True)
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    wanted = [line.split()[-1] for line in listing.stdout.splitlines()]
    known = {name for name in wanted if "@" in name}  # of the C and C++ runtimes: they carry a version
    weak = {line.split()[-1] for line in listing.stdout.splitlines() if line.split()[-2] == "w"}
    foreign = [name for name in wanted if name not in known | weak and not name.startswith(ALLOWED)]
    assert foreign == []
    names = subprocess.run(["c++filt"], input="\n".join(wanted), capture_output=True, text=True, check=True).stdout
    assert "c10::" not in names and "at::" not in names.replace("std::at", "")
    assert any(name.startswith("aoti_torch_get_current_cuda_stream") for name in wanted)


def test_the_budget_check_can_fail(check_cuda):
    usage = {"kernel<float>": {"sm_90": check_cuda.Usage(registers=65, shared=128, spilled=0)}}
    allowed = {"kernel<float>": {"sm_90": {"registers": 72, "shared": 128}}}
    assert check_cuda.problems(usage, allowed) == []
    assert check_cuda.problems(usage, check_cuda.as_budget(usage)) == []
    tight = {"kernel<float>": {"sm_90": {"registers": 64, "shared": 64}}}
    assert len(check_cuda.problems(usage, tight)) == 2
    assert "is not in the budget" in check_cuda.problems(usage, {})[0]
    assert "there is no such kernel" in check_cuda.problems({}, allowed)[0]
    spilled = {"kernel<float>": {"sm_90": check_cuda.Usage(registers=64, shared=0, spilled=8)}}
    assert "kernel<float> on sm_90 spills 8 bytes" in check_cuda.problems(spilled, allowed)[0]


def test_reports_of_the_assembler_are_read(check_cuda):
    report = """
ptxas info    : Compiling entry function '_Z1kIfEvPT_' for 'sm_90'
ptxas info    : Function properties for _Z1kIfEvPT_
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 54 registers, used 1 barriers, 264 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1kIdEvPT_' for 'sm_100'
ptxas info    : Function properties for _Z1kIdEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers
"""
    usage = check_cuda.parse(report)
    assert usage == {
        ("_Z1kIfEvPT_", "sm_90"): check_cuda.Usage(54, 264, 12),
        ("_Z1kIdEvPT_", "sm_100"): check_cuda.Usage(12, 0, 0),
    }
    assert check_cuda.demangle([name for name, _ in usage]) == ["k<float>", "k<double>"]
    assert check_cuda.Usage(65, 0, 0).threads_per_sm() == 896
