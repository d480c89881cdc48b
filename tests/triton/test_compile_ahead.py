"""The Triton kernels compile for every architecture without a GPU and within their budget: no spills, tensor core instructions.

The slow tests compile a few for every kernel and configuration, and all of them with ``LOGITLESS_COMPILE_ALL=1``, as
``scripts/check_triton.py`` does.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("psutil")

from logitless.bench import cli, compile_report
from logitless.bench.compile_report import Usage

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "scripts" / "check_triton.py"
#: Parts of about the same duration, for pytest's workers.
PARTS = 6
#: Kernels of a few lines, which only the full check compiles.
SIMPLE = {"segment", "scatter", "scaled", "column"}


def compiling(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """Runs Python without Triton's interpreter, which cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment, **options)


@pytest.fixture(scope="module")
def check_triton():
    spec = importlib.util.spec_from_file_location("check_triton", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def declarations() -> dict:
    done = compiling(Path(__file__).with_name("declarations.py"))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def checked(tmp_path: Path, *arguments: str) -> list[str]:
    """The problems that the script finds."""
    found = tmp_path / "found.json"
    done = compiling(SCRIPT, "--json", found, *arguments)
    assert found.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    complaints = json.loads(found.read_text())["problems"]
    assert done.returncode == (1 if complaints else 0)
    return complaints


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_compile_within_their_budget(part, tmp_path):
    assert checked(tmp_path, "--quick", "--jobs", "1", "--part", f"{part}/{PARTS}") == []


@pytest.mark.slow
def test_copies_of_rows_access_16_bytes_at_a_time():
    """All but the row's index and factor, which a program loads once."""
    code = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from logitless.bench.compile_report import targets
known = targets(quick=False)
for name in ("scatter_rows_bf16", "scatter_rows_base_fp32", "scaled_to_dtype_bf16", "scaled_to_dtype_fp32"):
    c = known[name, 90]
    source = ASTSource(c.kernel, signature=c.signature, constexprs=c.constexprs, attrs=dict(c.attrs))
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": c.num_warps}).asm["ptx"]
    print(name, *re.findall(r"(?:ld|st)\\.global\\.\\S+", ptx))
"""
    done = compiling("-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for name, *accesses in lines:
        single = [access for access in accesses if ".v4.b32" not in access]
        assert len(accesses) > len(single)
        assert sorted(single) == ["ld.global.b32", "ld.global.b64"][: 2 if name.startswith("scatter") else 1]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("LOGITLESS_COMPILE_ALL") != "1", reason="20 minutes: LOGITLESS_COMPILE_ALL=1 asks for it")
def test_every_kernel_compiles_within_its_budget(tmp_path):
    assert checked(tmp_path) == []


def test_what_is_compiled_ahead_is_what_is_launched(declarations):
    """The same types, constants, hints and options as Triton derives from a launch on tensors."""
    assert declarations["drift"] == {}


def test_the_budget_is_of_the_kernels_that_there_are(check_triton, declarations):
    budget = json.loads(check_triton.BUDGET.read_text())
    assert check_triton.strangers(budget, {(name, arch) for name, arch in declarations["all"]}) == []
    gemms = [
        (name, arch, entry["instructions"])
        for name, archs in budget["kernels"].items()
        for arch, entry in archs.items()
        if name.startswith(("score_", "recompute_")) and ("_bf16_" in name or "_fp16_" in name) and name.count("x") >= 2
    ]
    assert len(gemms) > 30
    unit = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
    assert [g for g in gemms if unit[g[1]] not in g[2] or "wgmma-serialized" in g[2]] == []
    assert [g for g in gemms if ("tma" in g[2]) != (g[1] != "sm_80" and not g[0].endswith("_unaligned"))] == []


def test_nothing_follows_a_conditional_return_in_a_device_function():
    """Triton compiles what follows an ``if`` of a constant, even when it returned: the rest must be in its ``else``."""
    wrong = []
    for path in sorted((ROOT / "kernels" / "backends" / "triton").rglob("*.py")):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            if not any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list):
                continue
            for statement in function.body[:-1]:
                if any(isinstance(node, ast.Return) for node in ast.walk(statement)):
                    wrong.append(f"{path.name}:{statement.lineno} {function.name}")
    assert wrong == []


def test_the_few_stand_for_every_configuration(declarations):
    """Every kernel, block size and architecture has a representative."""

    def kinds(targets: list) -> set:
        parts = ((name.split("_"), arch) for name, arch in targets if name.startswith(("score_", "filtered_")))
        return {(words[0], blocks, arch) for words, arch in parts for blocks in words if re.fullmatch(r"\d+(x\d+)+", blocks)}

    few = declarations["quick"]
    assert kinds([t for t in declarations["all"] if t[0].startswith("score")]) == kinds(
        [t for t in few if t[0].startswith("score")]
    )
    assert {name.split("_")[0] for name, _ in declarations["all"]} - {name.split("_")[0] for name, _ in few} <= SIMPLE


USAGE = Usage("score_logps_bf16_64x128x64", 90, "4 warps, 3 stages, part 32, tma", 4, 2, 100, 0, 50000, 0, ["tma", "wgmma"])


def test_the_budget_check_can_fail(check_triton):
    budget = check_triton.as_budget([USAGE])
    assert check_triton.problems([USAGE], budget) == []
    assert check_triton.problems([replace(USAGE, registers=104)], budget) == []
    for wrong, words in (
        ({"registers": 105}, "uses 105 registers"),
        ({"shared_bytes": 50001}, "uses 50001 shared"),
        ({"spill_bytes": 4}, "spills 4 bytes"),
        ({"tmem_bytes": 2**19}, "tensor memory"),
        ({"instructions": ["wgmma"]}, "lacks tma"),
        ({"instructions": ["tma", "mma"]}, "lacks wgmma"),
        ({"instructions": ["tma", "wgmma", "wgmma-serialized"]}, "waits for every wgmma"),
        ({"kernel": "score_all"}, "not in the budget"),
        ({"programs_wanted": 5}, "memory 4"),
        ({"num_warps": 32}, "registers allow 0"),
    ):
        assert any(words in text for text in check_triton.problems([replace(USAGE, **wrong)], budget)), words
    too_much = replace(USAGE, shared_bytes=228 << 10)
    assert "more than there are" in check_triton.problems([too_much], check_triton.as_budget([too_much]))[0]


def test_another_triton_is_held_to_its_instructions_alone(check_triton):
    budget = check_triton.as_budget([USAGE])
    assert check_triton.same_triton(budget)
    assert not check_triton.same_triton({"triton": "3.4.0"})
    assert check_triton.problems([replace(USAGE, registers=255, spill_bytes=8)], budget, numbers=False) == []
    assert check_triton.problems([replace(USAGE, instructions=["mma"])], budget, numbers=False)


def test_no_entry_of_the_budget_allows_a_spill(check_triton):
    usage = replace(USAGE, spill_bytes=8)
    for name in (USAGE.kernel, f"{USAGE.kernel}_unaligned"):
        spilling = replace(usage, kernel=name, instructions=["mma", "tma", "wgmma"])
        assert check_triton.problems([spilling], check_triton.as_budget([spilling])) == [
            f"{name} on sm_90 spills 8 bytes of registers"
        ]


def test_the_suite_prints_a_table_and_writes_json(tmp_path):
    """Of one kernel, beside a suite that measures."""
    code = """
import sys
from logitless.bench import cli, compile_report
targets = compile_report.targets
compile_report.targets = lambda quick: {k: v for k, v in targets(quick).items() if k == ("segment_sum_fp32", 90)}
shape = "pairs=1,tokens=8,hidden=16,vocab=64"
arguments = ["--suite", "compile,dpo", "--shape", shape, "--providers", "torch", "--rounds", "1", "--no-memory"]
if __name__ == "__main__":
    sys.exit(cli.main([*arguments, "--device", "cpu", "--out", sys.argv[1]]))
"""
    script = tmp_path / "suite.py"
    script.write_text(code)
    done = compiling(script, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "segment_sum_fp32" in done.stdout and "by registers" in done.stdout and "dpo forward + backward" in done.stdout
    (kernel,) = json.loads((tmp_path / "compile.json").read_text())["kernels"]
    assert (kernel["kernel"], kernel["architecture"], kernel["spill_bytes"]) == ("segment_sum_fp32", 90, 0)
    assert kernel["registers"] > 0 and kernel["programs_by_registers"] >= 4
    assert (tmp_path / "cpu-dpo.json").exists()


@pytest.mark.parametrize("reason", ["TRITON_INTERPRET is set", "Triton does not import"])
def test_the_suite_refuses_where_nothing_can_be_compiled(reason, monkeypatch, capsys, tmp_path):
    if reason.startswith("Triton does"):
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    assert reason in (compile_report.why_not() or "")
    assert cli.main(["--suite", "compile", "--out", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_list_of_suites_names_it(capsys):
    assert cli.main(["--list", "--device", "cpu"]) == 0
    assert compile_report.HELP in capsys.readouterr().out
