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
import torch

import logitless as ll
from logitless.kernels.backends.native import cpu

pytest.importorskip("grimp")

ROOT = Path(__file__).resolve().parents[2]
#: Each part may import the parts below it. ``bench`` sees all and is imported by the command line only.
LAYERS = [
    ("logitless.bench",),
    ("logitless",),
    ("logitless.fused",),
    ("logitless.kernels",),
]
#: The folders and files of ``kernels/``. Those of one line do not import each other.
KERNELS = [
    ("sequence_logps",),
    ("linear_logps",),
    ("logps_operators", "planner"),
    ("parallel",),
    ("backends",),
    ("cost_model", "operators", "tile"),
    ("core",),
]
#: What ``fused/`` may import of ``kernels/backends``; device code is not in it.
NO_DEVICE_CODE = {"logitless.kernels.backends.interface", "logitless.kernels.backends.registry", "logitless.kernels.backends"}

_GRAPH = """
import json, grimp
graph = grimp.build_graph("logitless", cache_dir=None)
print(json.dumps({m: sorted(graph.find_modules_directly_imported_by(m)) for m in graph.modules}))
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory) -> dict[str, list[str]]:
    """What each module imports, inside functions and for type checkers too."""
    built = tmp_path_factory.mktemp("layers")
    folders = "--build-base", str(built / "work"), "--build-lib", str(built / "lib")
    command = [sys.executable, "setup.py", "-q", "build", *folders]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "LOGITLESS_EXT": "none"}, check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(built / "lib")}
    run = subprocess.run([sys.executable, "-c", _GRAPH], cwd=built, env=env, check=True, capture_output=True, text=True)
    found = json.loads(run.stdout)
    assert len(found) > 100 and "logitless.kernels.backends.triton.elementwise" in found
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


def limit(path: Path) -> int:
    """Lines that a file may have."""
    return 600 if path.name.startswith("test_") or "tests" in path.relative_to(ROOT).parts else 400


def test_files_fit_in_a_head():
    files = [path for top in ("kernels", "fused", "logitless", "bench", "tests") for path in (ROOT / top).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > limit(ROOT / name)}


class Reached(Exception):
    pass


class Operators:
    """The compiled operators, up to the first call of ``score_block``."""

    def __getattr__(self, name: str):
        if name == "score_block":
            raise Reached
        return lambda *args: None


def test_labels_take_a_short_way_to_the_kernel(monkeypatch):
    """From ``FusedLinearDPOLoss()(...)`` to ``score_block``, with the C++ binding, its dispatch and the kernel."""
    monkeypatch.setattr(cpu, "_ops", Operators())
    monkeypatch.setattr(cpu, "why_no_small_gemm", lambda x, weight: None)
    monkeypatch.setattr(cpu, "target_logits", lambda x, *_: torch.zeros(len(x)))
    ours = tuple(str(ROOT / top) for top in ("logitless", "fused", "kernels"))
    files = set()

    def watch(frame, event, _):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(ours) and "labels" in {*frame.f_locals, *frame.f_code.co_varnames}:
            files.add(name)

    x, weight = torch.randn(4, 5, 16).bfloat16(), torch.randn(20, 16).bfloat16().requires_grad_()
    loss = ll.FusedLinearDPOLoss(reference_free=True)
    labels = torch.randint(20, (4, 5))
    sys.setprofile(watch)
    try:
        with ll.settings(backend="cpu"), pytest.raises(Reached) as caught:
            loss(x, weight, labels)
    finally:
        sys.setprofile(None)
    frames = [entry.path for entry in caught.traceback if str(entry.path).startswith(ours)]
    assert [Path(f).name for f in frames][-1] == "cpu.py"
    in_cpp = 3  # bindings.cpp, dispatch.cpp and score_block.h: see tests/native
    assert len(frames) + in_cpp <= 9, frames
    assert len(files) + in_cpp <= 14, sorted(files)
