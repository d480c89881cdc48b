"""``scripts/setup.sh`` finds torch on any machine and prints its stages: each case on package indexes that the test makes."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "setup.sh"
VERSION = re.search(r"^torch_version=(\S+)$", SCRIPT.read_text(), re.M)[1]
# Not `find_spec("pip")`: setuptools takes that for pip at work, and can no longer be imported in this process.
PIP = next(iter(importlib.metadata.distributions(name="pip")), None)
pytestmark = pytest.mark.skipif(PIP is None, reason="needs pip")

#: A project with the extras of this one, and a build backend of its own: an isolated build needs no index.
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
BACKEND = """
import os, shutil

def build_editable(folder, config_settings=None, metadata_directory=None):
    assert os.environ["LOGITLESS_EXT"] == "none"
    return shutil.copy("project-1.0-py3-none-any.whl", folder) and "project-1.0-py3-none-any.whl"
"""


def write_wheel(
    folder: Path, name: str, version: str, module: str = "", requires: tuple[str, ...] = (), extras: str = ""
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Provides-Extra: {extra}" for extra in extras.split()] + [f"Requires-Dist: {one}" for one in requires]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", module)
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def index(folder: Path, **versions: list[str]) -> str:
    """A simple index with empty packages; a torch that says its version. Returns its address."""
    folder.mkdir(parents=True)
    for name, numbers in versions.items():
        for number in numbers:
            write_wheel(folder / name, name, number, f"__version__ = {number!r}")
        links = "".join(f'<a href="{wheel.name}">{wheel.name}</a>' for wheel in sorted((folder / name).iterdir()))
        (folder / name / "index.html").write_text(links)
    return folder.as_uri()


@dataclass
class Machine:
    """A folder with a project, programs that come first on PATH, and an environment that has pip and nothing else."""

    home: Path

    def set_up(
        self, configured: str, pytorch: str, environment: str = "env", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "LOGITLESS_"))}
        given = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": configured,
            "PIP_NO_CACHE_DIR": "1",
            "LOGITLESS_TORCH_INDEX": pytorch,
            "PYTHON": sys.executable,
            "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}",
        }
        command = ["bash", str(SCRIPT), environment, "bench,test"]
        where = {"cwd": self.home, "env": inherited | given | variables}
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **where)

    def program(self, name: str, text: str) -> None:
        path = self.home / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def installed(self, name: str) -> str:
        code = f"from importlib.metadata import version; print(version({name!r}))"
        return subprocess.run(
            [self.home / "env/bin/python", "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()


@pytest.fixture
def machine(tmp_path) -> Machine:
    (tmp_path / "bin").mkdir()
    machine = Machine(tmp_path)
    machine.program("nvidia-smi", "exit 9")
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "backend.py").write_text(BACKEND)
    needs = ("torch>=2.9", "plots; extra == 'bench'", "checks; extra == 'test'")
    write_wheel(tmp_path, "project", "1.0", requires=needs, extras="bench test")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (site / "pip").symlink_to(PIP.locate_file("pip"))
    return machine


def stages(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What was done, without the seconds; nothing else is printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [re.fullmatch(r"\[ *\d+ s\] (.*)", line) for line in done.stdout.splitlines()]
    return [line[1] for line in lines if line]


OTHERS = {"plots": ["1.0"], "checks": ["1.0"]}
CPU, DEFAULT = f"{VERSION}+cpu", VERSION
NEWER = "99.0"


def test_the_configured_index_is_asked_first_and_each_stage_is_a_line(machine):
    configured = index(machine.home / "configured", torch=[CPU, DEFAULT, NEWER], **OTHERS)
    pytorch = index(machine.home / "pytorch", torch=[CPU])
    done = machine.set_up(configured, pytorch)
    assert stages(done) == [
        f"installing torch=={CPU} from the index that pip is configured with ...",
        "installing the package and its extras bench, test ...",
        "env is set up",
    ]
    assert len(done.stdout.splitlines()) == 3
    assert [machine.installed(name) for name in ("torch", "project", "plots", "checks")] == [CPU, "1.0", "1.0", "1.0"]


def test_the_index_of_cpu_builds_is_asked_next(machine):
    configured = index(machine.home / "configured", torch=[DEFAULT, NEWER], **OTHERS)
    pytorch = index(machine.home / "pytorch", torch=[CPU])
    assert stages(machine.set_up(configured, pytorch))[:3] == [
        f"installing torch=={CPU} from the index that pip is configured with ...",
        f"there is no torch=={CPU}",
        f"installing torch=={CPU} from {pytorch} ...",
    ]
    assert machine.installed("torch") == CPU


def test_the_default_build_comes_last_after_a_sentence_on_its_size(machine):
    configured = index(machine.home / "configured", torch=[DEFAULT, NEWER], **OTHERS)
    pytorch = "http://127.0.0.1:9/simple"  # cannot be reached
    done = machine.set_up(configured, pytorch)
    assert stages(done)[2] == f"installing torch=={CPU} from {pytorch} ..."
    assert machine.installed("torch") == DEFAULT
    before, _, _ = done.stdout.partition(f"installing torch=={DEFAULT} from the index that pip is configured with ...")
    sentence = " ".join(before.rpartition(f"there is no torch=={CPU}\n")[2].rpartition("[")[0].split())
    assert sentence.count(". ") == 0 and "a download of several GB, most of it CUDA libraries; to avoid it" in sentence
    assert "LOGITLESS_TORCH_INDEX" in sentence and "activate" in sentence


def test_where_no_index_has_torch_the_error_says_what_was_tried(machine):
    configured = index(machine.home / "configured", torch=[NEWER], **OTHERS)
    pytorch = index(machine.home / "pytorch", torch=[NEWER + "+cpu"])
    done = machine.set_up(configured, pytorch)
    assert done.returncode == 1
    first, *tried = done.stderr.splitlines()
    assert first.startswith(f"torch {VERSION} was not found for Python {sys.version.split()[0]} on ")
    assert tried[:3] == [
        f"  torch=={CPU} from the index that pip is configured with",
        f"  torch=={CPU} from {pytorch}",
        f"  torch=={DEFAULT} from the index that pip is configured with",
    ]
    assert "install torch >= 2.9" in done.stderr
    assert not (machine.home / "env/bin/pip").exists()


def test_a_failure_that_is_not_a_missing_build_ends_the_set_up_with_the_words_of_pip(machine):
    """Else a full disk or a broken download would fetch the default build."""
    configured = index(machine.home / "configured", torch=[CPU, DEFAULT], **OTHERS)
    (machine.home / "configured/torch" / f"torch-{CPU}-py3-none-any.whl").write_bytes(b"cut off")
    done = machine.set_up(configured, index(machine.home / "pytorch", torch=[CPU]))
    assert done.returncode == 1
    assert "ERROR" in done.stderr and f"torch-{CPU}" in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_a_machine_with_a_gpu_gets_the_default_build(machine):
    machine.program("nvidia-smi", "echo GPU 0")
    configured = index(machine.home / "configured", torch=[DEFAULT, NEWER], **OTHERS)
    done = machine.set_up(configured, index(machine.home / "pytorch", torch=[CPU]))
    assert stages(done)[0] == f"installing torch=={DEFAULT} from the index that pip is configured with ..."
    assert machine.installed("torch") == DEFAULT


def test_a_torch_that_is_there_is_kept(machine):
    (site,) = (machine.home / "env/lib").glob("python*/site-packages")
    write_wheel(machine.home / "there", "torch", "2.9.1", "__version__ = '2.9.1'")
    with zipfile.ZipFile(machine.home / "there/torch-2.9.1-py3-none-any.whl") as wheel:
        wheel.extractall(site)
    configured = index(machine.home / "configured", torch=[CPU, DEFAULT, NEWER], **OTHERS)
    done = machine.set_up(configured, index(machine.home / "pytorch"))
    assert stages(done) == ["installing the package and its extras bench, test ...", "env is set up"]
    assert machine.installed("torch") == "2.9.1"


def test_the_environment_is_made_where_there_is_none(machine):
    """By a Python that is recent enough, which PYTHON names."""
    machine.program(
        "python", f'case "$*" in "-m venv "*) ln -s "{machine.home}/env" "$3";; *) exec "{sys.executable}" "$@";; esac'
    )
    machine.program("old", 'case "$1" in --version) echo Python 3.8.1;; *) exit 1;; esac')
    configured = index(machine.home / "configured", torch=[CPU], **OTHERS)
    python = str(machine.home / "bin/python")
    done = machine.set_up(configured, configured, environment="new", PYTHON=python)
    assert stages(done)[0] == "making the environment in new ..."
    assert stages(done)[-1] == "new is set up"
    done = machine.set_up(configured, configured, environment="other", PYTHON=str(machine.home / "bin/old"))
    assert done.returncode == 1
    assert f"logitless needs Python >= 3.10; {machine.home}/bin/old is Python 3.8.1" in done.stderr
