"""Every header of the kernels includes what it uses: it compiles as the only include of a source."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INCLUDE = HERE.parent.parent / "csrc/include"
COMPILER = os.environ.get("CXX", "g++")
STRICT = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas"]
HEADERS = sorted(str(p.relative_to(INCLUDE)) for p in INCLUDE.rglob("*") if p.is_file())


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler, {COMPILER} is not on PATH")
@pytest.mark.parametrize("header", HEADERS)
def test_a_header_includes_what_it_uses(header):
    command = [COMPILER, "-fsyntax-only", *STRICT, f"-I{INCLUDE}"]
    if "/cpu/" in header:
        command += ["-std=c++20"]
    else:
        command += ["-std=c++17", "-DLOGITLESS_CUDA_EMULATOR", f"-I{HERE}"]  # the emulator in place of nvcc
    source = f'#include "{header}"\n'
    done = subprocess.run([*command, "-x", "c++", "-"], input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
