"""Wheel, editable install and tests see the same packages, and the folder ``kernels/`` hides nobody else's."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"logitless": "logitless", "logitless/kernels": "kernels", "logitless/fused": "fused", "logitless/bench": "bench"}


def run(code: str, *flags: str, cwd: Path = ROOT, **variables: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def site_without_kernels(tmp_path_factory) -> Path:
    """The installed packages but for the one called ``kernels``, as a folder of links."""
    farm = tmp_path_factory.mktemp("site")
    spec = importlib.util.find_spec("torch")
    for entry in Path(spec.origin).parent.parent.iterdir():
        if not entry.name.lower().startswith(("kernels", "__editable__", "logitless")):
            (farm / entry.name).symlink_to(entry)
    return farm


IMPORT = "import transformers, trl, sys; import transformers.utils.import_utils as u; print(u.is_kernels_available())"


def test_transformers_and_trl_import_from_the_repository_root_with_the_package_kernels():
    found = run(f"{IMPORT}; import kernels; print(kernels.__file__); print(kernels.get_kernel.__name__)").splitlines()
    assert "site-packages" in found[-2]
    assert found[-1] == "get_kernel"


def test_transformers_and_trl_import_from_the_repository_root_without_the_package_kernels(site_without_kernels):
    assert run(IMPORT, "-S", PYTHONPATH=str(site_without_kernels)).splitlines()[-1] == "False"
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec.origin)"
    assert run(code, "-S", PYTHONPATH=str(site_without_kernels)) == str(ROOT / "kernels" / "__init__.py")


def test_the_folder_is_logitless_kernels_whatever_kernels_is():
    assert run("import logitless.kernels.op as op; print(op.__file__)") == str(ROOT / "kernels" / "op.py")
    assert run("import logitless.kernels.op as op; print(op.__file__)", cwd=Path("/")) == str(ROOT / "kernels" / "op.py")


def test_a_wheel_holds_every_module_and_works(tmp_path, site_without_kernels):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "unpacked")
    for package, folder in PACKAGES.items():
        modules = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*.py") if not p.name.startswith("test_")}
        missing = {str(m) for m in modules if f"{package}/{m}" not in names}
        assert not missing
    assert "logitless/py.typed" in names
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "fused/")) or n.endswith(".so")]
    path = f"{tmp_path / 'unpacked'}:{site_without_kernels}"
    code = "import logitless, logitless.kernels.op as op; print(op.__file__); print(logitless.__version__)"
    where, version = run(code, "-S", cwd=tmp_path, PYTHONPATH=path).splitlines()
    assert where.startswith(str(tmp_path / "unpacked"))
    assert version == importlib.import_module("logitless").__version__


def test_import_needs_torch_alone_and_imports_no_trainer():
    loaded = run("import sys, logitless; print([m for m in ('trl', 'transformers', 'liger_kernel') if m in sys.modules])")
    assert loaded == "[]"


def test_env_reports_even_with_a_broken_package(tmp_path):
    broken = tmp_path / "flash_attn"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    meta = tmp_path / "flash_attn-9.9.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 9.9\n")
    text = run("from logitless.cli import main; main(['env'])", PYTHONPATH=str(tmp_path))
    assert "9.9, broken: OSError: undefined symbol: _ZN3c10" in text
    assert "torch  available" in text
    assert run("from logitless.cli import main; main(['env', '--json'])").startswith("{")


def test_imports_point_one_way():
    """logitless -> fused -> kernels; the benchmark and the tests see all."""
    for folder, forbidden in {"kernels": ("logitless.fused", "logitless.bench"), "fused": ("logitless.bench",)}.items():
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not any(f"from {name}" in text or f"import {name}" in text for name in forbidden), path
            assert "from logitless import" not in text, path
