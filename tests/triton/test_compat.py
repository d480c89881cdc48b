"""What depends on Triton's version."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
import triton

from logitless.kernels.backends.triton import compat


@pytest.mark.parametrize("version", ["3.3.1", "2.3.0"])
def test_an_older_triton_is_refused_with_the_version_that_is_needed(monkeypatch, version):
    monkeypatch.setattr(triton, "__version__", version)
    assert compat.why_no_triton.__wrapped__() == [f"Triton {version} is too old, 3.4 is needed"]


@pytest.mark.parametrize("version", ["3.4.0", "3.9.0", "3.10.0+git1234"])
def test_no_version_from_the_oldest_on_is_a_reason(monkeypatch, version):
    monkeypatch.setattr(triton, "__version__", version)
    assert not [reason for reason in compat.why_no_triton.__wrapped__() if "too old" in reason]


@pytest.mark.parametrize(
    ("version", "block_n", "block_v", "expected"),
    [("3.4.0", 64, 256, 4), ("3.4.0", 128, 256, 8), ("3.4.0", 64, 128, 8), ("3.5.1", 64, 256, 8), ("3.10.0", 64, 256, 8)],
)
def test_triton_3_4_gets_warps_whose_blocks_fit_in_shared_memory(monkeypatch, version, block_n, block_v, expected):
    monkeypatch.setattr(triton, "__version__", version)
    assert compat.gemm_warps(block_n, block_v, 8) == expected


@pytest.mark.parametrize(
    ("version", "interpreted", "expected"), [("3.5.1", True, 16), ("3.6.0", True, 4), ("3.4.0", False, 4), ("3.9.0", False, 4)]
)
def test_descriptors_have_rows_of_16_bytes_but_in_older_interpreters(monkeypatch, version, interpreted, expected):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(compat, "interpreted", lambda: interpreted)
    assert compat.descriptor_step(4) == expected
