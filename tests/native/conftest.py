"""Fixtures of the tests that run CUDA kernels on a CPU."""

from __future__ import annotations

import shutil

import pytest

from .emulated import COMPILER, Emulated, build


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Emulated:
    """The emulated extension; ``order`` chooses in which order the threads of a block take turns."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"needs a C++ compiler, {COMPILER} is not on PATH")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    build(library)
    return Emulated(library)


@pytest.fixture
def ops(emulated):
    emulated.order(0)
    return emulated.ops
