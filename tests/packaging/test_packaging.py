"""Wheel, editable install and tests see the same packages, and the folder ``kernels/`` hides nobody else's."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
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
    where = "import logitless.kernels.linear_logps as module; print(module.__file__)"
    for folder in (ROOT, Path("/")):
        assert run(where, cwd=folder) == str(ROOT / "kernels" / "linear_logps.py")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What a checkout holds, and a library that somebody has built in place: builds leave no trace in the repository."""
    copy = tmp_path_factory.mktemp("source") / "logitless"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "out")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    (copy / "kernels" / "_cpu_torch0_1.so").write_bytes(b"not a library")
    return copy


def build(source: Path, out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "build", *(arguments or ["--wheel", "--no-isolation"]), "--outdir", str(out), str(source)]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOGITLESS_EXT", "LOGITLESS_WERROR", "CXX")}
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)
    shutil.rmtree(source / "build", ignore_errors=True)
    return done


def words(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stdout + done.stderr).split())


def only_wheel(done: subprocess.CompletedProcess[str], folder: Path) -> tuple[Path, set[str]]:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel, set(archive.namelist())


@pytest.fixture(scope="module")
def pure(source, tmp_path_factory) -> Path:
    """A wheel without compiled kernels, unpacked."""
    folder = tmp_path_factory.mktemp("pure")
    wheel, names = only_wheel(build(source, folder, LOGITLESS_EXT="none"), folder)
    assert wheel.name.endswith("-py3-none-any.whl")
    for package, at in PACKAGES.items():
        modules = {p.relative_to(ROOT / at) for p in (ROOT / at).rglob("*.py") if not p.name.startswith("test_")}
        missing = {str(m) for m in modules if f"{package}/{m}" not in names}
        assert not missing
    assert {"logitless/py.typed", "logitless/kernels/cost_model/gpu_constants.json"} <= names
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "fused/")) or n.endswith(".so")]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_a_wheel_without_kernels_holds_every_module_and_works(pure, tmp_path, site_without_kernels):
    code = "import logitless, logitless.kernels.linear_logps as op; print(op.__file__); print(logitless.__version__)"
    where, version = run(code, "-S", cwd=tmp_path, PYTHONPATH=f"{pure}:{site_without_kernels}").splitlines()
    assert where.startswith(str(pure))
    assert version == importlib.import_module("logitless").__version__


#: A loss, forward and backward, and the backend that has served it.
LOSS = """
import logging, sys, torch
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
import logitless as ll
hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (8, 33))
loss = ll.FusedLinearSimPOLoss()(hidden.view(2, 4, 16), weight, torch.randint(33, (2, 4))).loss
loss.backward()
print(ll.available_backends())
print("finite", bool(loss.isfinite() & weight.grad.isfinite().all()))
"""
ENV = "from logitless.cli import main; main(['env'])"
HAS_COMPILER = shutil.which((os.environ.get("CXX") or "c++").split()[0]) is not None


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_an_installed_wheel_runs_its_own_kernels(source, tmp_path, site_without_kernels):
    done = build(source, tmp_path, LOGITLESS_EXT="cpu")
    wheel, names = only_wheel(done, tmp_path)
    assert re.search(r"building the C\+\+ kernels \.\.\. .*building the C\+\+ kernels: done after \d+ s", words(done))
    version = "_".join(torch.__version__.split(".")[:2])
    assert [n for n in names if n.endswith(".so")] == [f"logitless/kernels/_cpu_torch{version}.so"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{site_without_kernels}\n")  # the torch of these tests, and what it needs
    install = ["install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LOGITLESS_TEST_BACKEND")}

    def say(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert re.search(r"^  cpu +available", say(str(tmp_path / "venv/bin/logitless"), "env"), re.M)
    said = say(str(python), "-c", LOSS)
    assert "backend cpu serves" in said
    assert "finite True" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/nonexistent", "there is no C++ compiler (/nonexistent; CXX names another)"), ("/bin/false", "the compiler failed (")],
)
def test_without_a_compiler_that_works_the_wheel_does_and_one_paragraph_says_why(
    source, tmp_path, site_without_kernels, compiler, reason
):
    done = build(source, tmp_path, CXX=compiler, CUDA_HOME="/nonexistent")
    wheel, names = only_wheel(done, tmp_path)
    assert not [n for n in names if n.endswith(".so")]
    assert words(done).count(f"kernels of csrc are not built: {reason}") == 1
    if torch.version.cuda is None:  # else the CUDA kernels may have a reason of their own
        assert words(done).count("logitless: the ") == 1
    assert "LOGITLESS_EXT=none silences it" in words(done)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    said = run(LOSS, "-S", cwd=tmp_path, PYTHONPATH=f"{tmp_path / 'unpacked'}:{site_without_kernels}")
    assert "backend torch serves" in said
    assert "finite True" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "compiler", "reason"),
    [
        ("cpu", "/nonexistent", "LOGITLESS_EXT asks for the cpu kernels, which cannot be built: there is no C++ compiler"),
        ("cpu", "/bin/false", "LOGITLESS_EXT asks for the cpu kernels, which cannot be built: the compiler failed ("),
        ("cpu,nonsense", "c++", "LOGITLESS_EXT must be 'auto', 'none' or a list of cpu, cuda; got 'nonsense'"),
    ],
)
def test_kernels_that_were_asked_for_are_built_or_the_build_fails_and_says_why(source, tmp_path, value, compiler, reason):
    done = build(source, tmp_path, LOGITLESS_EXT=value, CXX=compiler)
    assert done.returncode != 0
    assert reason in words(done)
    assert not list(tmp_path.glob("*.whl"))


def broken_library(kernels: Path, how: str) -> str:
    """Puts a library that cannot serve beside the package; returns what must be said of it."""
    name = f"_cpu_torch{'_'.join(torch.__version__.split('.')[:2])}.so"
    if how == "another torch":
        (kernels / "_cpu_torch1_99.so").write_bytes(b"")
        return f"the extension was built for another torch (_cpu_torch1_99.so); this is {torch.__version__}"
    if how in ("cut to its header", "cut in half"):
        # any library will do: the one that loads it sees the end of the file before it sees what is in it
        whole = (Path(torch.__file__).parent / "lib/libc10.so").read_bytes()
        (kernels / name).write_bytes(whole[: 100 if how == "cut to its header" else len(whole) // 2])
        return f"{name} does not load: "
    return "the extension is not built: `make ext`"


@pytest.mark.parametrize("how", ["another torch", "cut to its header", "cut in half", "missing"])
def test_a_library_that_cannot_serve_is_reported_and_torch_serves(pure, tmp_path, site_without_kernels, how):
    shutil.copytree(pure, tmp_path / "package")
    reason = broken_library(tmp_path / "package/logitless/kernels", how)
    path = f"{tmp_path / 'package'}:{site_without_kernels}"
    said = run(LOSS + ENV, "-S", cwd=tmp_path, PYTHONPATH=path)
    backends, env = said.split("finite True")
    assert reason in backends  # available_backends()
    assert f"unavailable: {reason}" in env
    assert "backend torch serves" in said
    assert "backend cpu serves" not in said


def test_no_compiled_file_is_tracked_or_packed(source, tmp_path):
    compiled = (".so", ".o", ".a", ".pyc", ".cubin", ".dylib", ".dll")
    done = build(source, tmp_path, "--sdist", "--no-isolation")
    assert done.returncode == 0, done.stderr[-2000:]
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [n for n in names if n.endswith(compiled)]
    sources = {str(p.relative_to(source)) for p in (source / "csrc").rglob("*") if p.is_file()}
    assert sources <= names  # it can be built from
    if (ROOT / ".git").exists():
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        assert tracked
        assert not [n for n in tracked if n.endswith(compiled)]


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
    assert re.search(r"torch +available", text)
    assert run("from logitless.cli import main; main(['env', '--json'])").startswith("{")


def test_imports_point_one_way():
    """logitless -> fused -> kernels; the benchmark and the tests see all."""
    for folder, forbidden in {"kernels": ("logitless.fused", "logitless.bench"), "fused": ("logitless.bench",)}.items():
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not any(f"from {name}" in text or f"import {name}" in text for name in forbidden), path
            assert "from logitless import" not in text, path
