"""Imports point one way, between folders and between files: read from the import graph of what a wheel would hold."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("grimp")

ROOT = Path(__file__).resolve().parents[2]
#: Each part may import the parts below it. ``bench`` sees all and is imported by the command line only.
LAYERS = [
    ("logitless.bench",),
    ("logitless",),
    ("logitless.fused",),
    ("logitless.kernels",),
]
#: The folders and files of ``kernels/``; those of one line do not import each other.
KERNELS = [
    ("sequence_logps",),
    ("linear_logps",),
    ("logps_operators", "planner"),
    ("backends",),
    ("cost_model", "operators", "tile"),
    ("core",),
]
#: What ``fused/`` may import of ``kernels/backends``; device code is not in it.
NO_DEVICE_CODE = {"logitless.kernels.backends.interface", "logitless.kernels.backends.registry", "logitless.kernels.backends"}
MOST_LINES = 400

_GRAPH = """
import json, grimp
graph = grimp.build_graph("logitless", cache_dir=None)
print(json.dumps({m: sorted(graph.find_modules_directly_imported_by(m)) for m in graph.modules}))
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory) -> dict[str, list[str]]:
    """What each module imports, inside functions and for type checkers too."""
    built = tmp_path_factory.mktemp("layers")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(built / "work"), "--build-lib", str(built / "lib")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "LOGITLESS_EXT": "none"}, check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(built / "lib")}
    run = subprocess.run([sys.executable, "-c", _GRAPH], cwd=built, env=env, check=True, capture_output=True, text=True)
    found = json.loads(run.stdout)
    assert len(found) > 100 and "logitless.kernels.backends.triton.passes" in found
    return found


def layer_of(module: str, layers: list[tuple[str, ...]], prefix: str = "") -> int | None:
    """The place of the longest name that the module is in; ``None``: in no layer."""
    names = [(prefix + name, place) for place, layer in enumerate(layers) for name in layer]
    inside = [(len(name), place) for name, place in names if module == name or module.startswith(name + ".")]
    return max(inside)[1] if inside else None


def test_no_files_import_each_other_in_a_circle(imports):
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_imports_point_from_the_library_to_the_losses_to_the_kernels(imports):
    wrong = [
        f"{module} imports {target}"
        for module, targets in imports.items()
        for target in targets
        if layer_of(target, LAYERS) < layer_of(module, LAYERS) and module != "logitless.cli"
    ]
    assert not wrong


def test_the_folders_of_the_kernels_import_downwards(imports):
    prefix = "logitless.kernels."
    modules = [m for m in imports if m.startswith(prefix)]
    assert {m.split(".")[2] for m in modules if layer_of(m, KERNELS, prefix) is None} <= {"reference"}
    wrong = []
    for module in modules:
        here = layer_of(module, KERNELS, prefix)
        for target in imports[module]:
            there = layer_of(target, KERNELS, prefix)
            if here is None or there is None or module.split(".")[2] == target.split(".")[2]:
                continue
            if there <= here:
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_losses_know_no_device_code(imports):
    devices = ("logitless.kernels.backends", "logitless.kernels.operators")
    wrong = [
        f"{module} imports {target}"
        for module, targets in imports.items()
        if module.startswith("logitless.fused")
        for target in targets
        if target.startswith(devices) and target not in NO_DEVICE_CODE
    ]
    assert not wrong
    for path in (ROOT / "fused").rglob("*.py"):
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not any(name.startswith("torch.ops.") for name in names), path


def test_backends_are_separate_folders(imports):
    """A backend may borrow from ``torch``; none is named outside of its folder."""
    prefix = "logitless.kernels.backends."
    folders = {m.split(".")[3] for m in imports if m.startswith(prefix) and m.count(".") > 3}
    assert folders >= {"torch", "native", "triton"}
    wrong = []
    for module, targets in imports.items():
        mine = module.split(".")[3] if module.startswith(prefix) else ""
        for target in targets:
            theirs = target.split(".")[3] if target.startswith(prefix) else ""
            if theirs in folders and theirs != mine and not (theirs == "torch" and mine in folders):
                wrong.append(f"{module} imports {target}")
    allowed = ("logitless.cli", "logitless.env", "logitless.bench")  # they report on backends by name
    assert not [w for w in wrong if not w.startswith(allowed)]


def test_files_fit_in_a_head():
    long = {
        str(path.relative_to(ROOT)): lines
        for top in ("kernels", "fused", "logitless", "bench", "tests")
        for path in (ROOT / top).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > (600 if top == "tests" or path.name.startswith("test_") else MOST_LINES)
    }
    assert not long
