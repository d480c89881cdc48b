"""The scripts that take evidence on a GPU, as far as a CPU can run them: what they hand on, refuse and write."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from logitless.bench.cli import main as bench
from logitless.cli import main as logitless
from logitless.kernels.backends.registry import get_backend
from logitless.kernels.cost_model.gpu_constants import constants, load_constants
from logitless.kernels.operators.loading import has_bf16_gemm

ROOT = Path(__file__).resolve().parents[2]
CONSTANTS = ROOT / "kernels" / "cost_model" / "gpu_constants.json"


def script(name: str):
    """A script of the repository, as a module."""
    spec = spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "scripts"))  # as it is where Python runs the script
        spec.loader.exec_module(module)
    return module


# What the shell scripts hand on


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


#: Answers what the scripts ask of a GPU as if there were one, and is Python otherwise.
PYTHON = f"""
case "$*" in
  *get_device_name*) echo "a-gpu"; exit 0 ;;
  *available_backends*) echo "cuda torch triton"; exit 0 ;;
  *get_device_capability*) echo 90; exit 0 ;;
  *"setup.py"*) exit 0 ;;
  *logitless.bench*|*logitless.cli*) echo "PYTHONPATH=$PYTHONPATH SAFE=$PYTHONSAFEPATH ARGUMENTS=$*"; exit 0 ;;
  *device=\\"cuda\\"*) exit 0 ;;
  *"-m pytest"*) eval "$FAKE_PYTEST"; exit $? ;;
esac
exec {sys.executable} "$@"
"""


@pytest.fixture
def checkout(tmp_path):
    """The Makefile and the scripts in a folder of their own, and a Python that claims a GPU."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "Makefile", tmp_path)
    executable(tmp_path / "python", PYTHON)
    return tmp_path


def run(checkout: Path, *command: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MAKE", "CUDA_HOME"))}
    search = os.pathsep.join(filter(None, [path and str(path), os.environ["PATH"]]))
    variables = {**inherited, "PATH": search, **environment}
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("bench-gpu", ["--suite ceilings gpu ", "--rounds 10", "--profile", "--out bench/results/gpu-a-gpu"]),
        ("bench-gpu-losses", ["--suite gpu-losses ", "--rounds 5"]),
        ("bench-gpu-policy", ["--suite gae policy-gpu ", "--rounds 5"]),
        ("tune-gpu", ["logitless.cli tune", "--timings bench/results/triton-timings.json", "softcap=1"]),
    ],
)
def test_a_target_of_a_gpu_keeps_the_callers_packages_and_has_a_time_limit(checkout, target, words):
    """And installs nothing: there is no network. The checkout comes before what the caller brings."""
    done = run(checkout, "make", target, f"PYTHON={checkout / 'python'}", PYTHONPATH="/of/the/caller")
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()[-1]
    assert f"PYTHONPATH={checkout / 'build' / 'tree'}:/of/the/caller SAFE=1" in printed
    assert all(word in printed for word in ["--time-limit 420", *words])
    assert not (checkout / ".venv").exists() and "pip" not in done.stdout
    assert (checkout / "build" / "tree" / "logitless" / "bench").is_symlink()


def test_results_may_go_elsewhere(checkout):
    done = run(checkout, "make", "bench-gpu", f"PYTHON={checkout / 'python'}", "RESULTS=/else/where")
    assert "--out /else/where/gpu-a-gpu" in done.stdout.splitlines()[-1]


SANITIZER = """
case "$*" in
  *--version*) echo "Version 1"; exit 0 ;;
  *"-c import torch"*) echo "$FAKE_PROBE"; [ -z "$FAKE_PROBE" ]; exit $? ;;
esac
echo "TOOL $2"
while [ $# -gt 0 ] && [ "$1" != -m ]; do last=$1; shift; done
exec "$last" "$@"
"""


def sanitize(checkout: Path, *arguments: str, pytest_says: str = "echo 'a PASSED'", **environment: str):
    executable(checkout / "bin" / "compute-sanitizer", SANITIZER)
    command = ["make", "-s", "sanitize-gpu", f"PYTHON={checkout / 'python'}", *arguments]
    return run(checkout, *command, path=checkout / "bin", **{"FAKE_PROBE": "", "FAKE_PYTEST": pytest_says, **environment})


@pytest.mark.parametrize(
    ("tool", "runs"), [("memcheck", ["memcheck"]), ("racecheck", ["racecheck"]), ("both", ["memcheck", "racecheck"])]
)
def test_the_tool_of_the_sanitizer_can_be_chosen(checkout, tool, runs):
    done = sanitize(checkout, f"TOOL={tool}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall("TOOL (.*)", done.stdout) == [name for name in runs for _ in range(2)]
    assert f"compute-sanitizer ({' '.join(runs)}) found nothing" in done.stdout


def test_an_unknown_tool_is_an_error_that_lists_the_known_ones(checkout):
    done = sanitize(checkout, "TOOL=synccheck")
    assert done.returncode != 0
    assert "memcheck, racecheck or both, got 'synccheck'" in done.stderr


def test_a_machine_that_does_not_let_the_sanitizer_run_is_told_apart_from_a_failure(checkout):
    done = sanitize(checkout, FAKE_PROBE="========= Error: Device not supported. Please refer to the documentation")
    assert done.returncode != 0
    assert "cannot run on this machine" in done.stderr and "nothing was checked" in done.stderr
    assert "TOOL" not in done.stdout


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("echo 'a PASSED'; echo 'b FAILED'; exit 1", None),
        ("echo 'a SKIPPED'", "nothing ran"),
        ("echo 'a PASSED'; sleep 30", "not done within 3 s; 1 tests passed until then"),
    ],
    ids=["failed", "skipped", "slow"],
)
def test_what_the_sanitizer_did_not_check_is_no_success(checkout, says, words):
    done = sanitize(checkout, "TOOL=memcheck", pytest_says=says, LOGITLESS_SANITIZE_LIMIT="3")
    assert done.returncode != 0
    assert "found nothing" not in done.stdout
    if words is not None:
        assert words in done.stdout


def test_gpu(checkout: Path, pytest_says: str, **environment: str):
    environment = {"LOGITLESS_TEST_JOBS": "4", "FAKE_PYTEST": pytest_says, **environment}
    return run(checkout, "make", "-s", "test-gpu", f"PYTHON={checkout / 'python'}", **environment)


test_gpu.__test__ = False  # type: ignore[attr-defined]


def test_the_tests_of_a_gpu_run_on_every_backend_the_most_telling_first(checkout):
    done = test_gpu(checkout, 'echo "$LOGITLESS_TEST_BACKEND: $*"; echo "7 passed in 1 s"')
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines, _ = done.stdout.splitlines()
    assert first == "backends: triton cuda torch"
    names = [line.split()[0] for line in lines]
    assert names[:5] == [*(f"gpu-every_loss-{b}" for b in ("triton", "cuda", "torch")), "gpu-backends", "gpu-cuda_ops"]
    assert names[7:10] == ["triton-linear_logps", "cuda-linear_logps", "torch-linear_logps"]
    assert len(names) == 3 + 4 + 3 * 6 and all(line.endswith("7 passed in 1 s") for line in lines)
    logs = checkout / "build" / "test-gpu"
    assert (logs / "cuda-loss_modules.log").read_text().startswith("cuda: -m pytest")
    assert "tests/gpu/test_every_loss.py -k triton" in (logs / "gpu-every_loss-triton.log").read_text()
    files = {f"tests/{word}" for log in logs.glob("*.log") for word in re.findall(r"tests/(\S+\.py)", log.read_text())}
    assert files and all(list(ROOT.glob(file)) for file in files)  # the copy has no tests, so patterns stay as they are


def test_a_failure_on_one_backend_is_one_of_the_run_and_named(checkout):
    says = 'echo "FAILED tests/a.py::b"; echo "1 failed in 1 s"; exit 1'
    done = test_gpu(checkout, f'case "$LOGITLESS_TEST_BACKEND $*" in cuda*head_spec*) {says} ;; esac; echo ok')
    assert done.returncode != 0
    assert re.findall(r"(\S+) +1 failed in 1 s\nFAILED tests/a.py::b", done.stdout) == ["cuda-compile"]


def test_tests_of_a_gpu_that_take_too_long_are_interrupted_and_named(checkout):
    """By the signal on which pytest says what it has; what did not start is named too."""
    waits = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('interrupted')"
    done = test_gpu(checkout, f'exec {sys.executable} -c "{waits}"', LOGITLESS_TEST_LIMIT="5")
    assert done.returncode != 0
    assert done.stdout.count("interrupted") == 4 and done.stdout.count("not started within 5 s") == 21


# Constants from measurements

GIB = 1 << 30


def example() -> dict:
    """What an H100 might say."""
    gemm = {"kind": "gemm", "what": "logits = X W^T", "moved": 1, "min_seconds": 1.0, "tokens": 8192, "hidden": 4096}
    return {
        "schema": 1,
        "clock_hz": 1.7e9,
        "environment": {
            "time": "2026-01-31T00:00:00+00:00",
            "commit": "0123456789abcdef",
            "versions": {"torch": "2.11.0"},
            "machine": {
                "gpu": {
                    "name": "NVIDIA H100 80GB HBM3",
                    "architecture": "sm_90",
                    "sm_count": 132,
                    "l2_bytes": 52428800,
                    "driver": "580.1",
                }
            },
        },
        "rows": [
            {"kind": "copy", "what": "copy of 2048 MiB", "dtype": "", "seconds": 1.5e-3, "moved": 4 * GIB, "flops": 0},
            {"kind": "launch", "what": "one short kernel", "dtype": "", "seconds": 1.9e-6, "moved": 0, "flops": 0},
            {**gemm, "dtype": "bfloat16", "vocab": 151936, "flops": 10e12, "seconds": 0.015},
            {**gemm, "dtype": "bfloat16", "vocab": 151936, "flops": 10e12, "seconds": 0.017},
            {**gemm, "dtype": "float32", "vocab": 16384, "flops": 1e12, "seconds": 0.02},
            {**gemm, "dtype": "float64", "vocab": 16384, "flops": 1e12, "seconds": 0.025},
        ],
    }


def written(tmp_path, ceilings: dict, *arguments: str, tuning: dict | None = None) -> Path:
    """A copy of the library's file, after the script ran on it."""
    file, measured = tmp_path / "constants.json", tmp_path / "ceilings.json"
    shutil.copy(CONSTANTS, file)
    measured.write_text(json.dumps(ceilings))
    given = [str(measured)]
    if tuning is not None:
        (tmp_path / "timings.json").write_text(json.dumps(tuning))
        given.append(str(tmp_path / "timings.json"))
    assert script("gpu_constants").main([*given, "--file", str(file), *arguments]) == 0
    return file


def test_constants_are_those_of_the_measurement(tmp_path, capsys):
    gpu = load_constants(written(tmp_path, example(), "--write").read_text())["sm_90"]
    assert gpu.measured and (gpu.date, gpu.torch_version, gpu.device) == ("2026-01-31", "2.11.0", "NVIDIA H100 80GB HBM3")
    assert gpu.bandwidth == pytest.approx(4 * GIB / 1.5e-3, rel=1e-3)
    assert gpu.bf16_flops == pytest.approx(20e12 / 0.032, rel=1e-3)
    assert (gpu.fp32_flops, gpu.fp64_flops, gpu.launch_seconds) == (5e13, 4e13, 1.9e-6)
    assert (gpu.sm_count, gpu.clock_hz, gpu.l2_bytes) == (132, 1.7e9, 52428800)
    assert gpu.triton_gemm == constants()["sm_90"].triton_gemm
    assert "Triton's relative speed is the former entry's, not measured" in gpu.source
    assert "driver 580.1" in gpu.source and "8192 x 4096 x 151936" in gpu.source
    assert "bf16_flops: 7e+14 -> 6.25e+14, 0.89 times as much" in capsys.readouterr().err


def test_without_write_the_file_stays(tmp_path, capsys):
    file = written(tmp_path, example())
    assert file.read_text() == CONSTANTS.read_text()
    assert '"measured": true' in capsys.readouterr().out


def test_other_architectures_stay_to_the_letter_and_a_new_one_is_added(tmp_path):
    ceilings = example()
    ceilings["environment"]["machine"]["gpu"]["architecture"] = "sm_120"
    ceilings["clock_hz"] = None
    text = written(tmp_path, ceilings, "--write").read_text()
    new, old = load_constants(text), CONSTANTS.read_text()
    assert new["sm_120"].clock_hz == new["default"].clock_hz and "not measured" in new["sm_120"].source
    added = re.search(r'  "sm_120": \{.*?\n  \},\n', text, re.S)
    assert added is not None
    assert text.replace(added[0], "") == old


def test_the_speed_of_triton_is_what_the_model_needs_to_predict_the_measured_pass(tmp_path):
    """The pass is made up by the model itself, with Triton's GEMM at 0.8 of cuBLAS's."""
    module, ceilings = script("gpu_constants"), example()
    base = module.measured(ceilings, None, constants())
    results = []
    for tokens, hidden, vocab in ((8192, 4096, 151936), (16384, 2048, 151936), (8192, 1024, 151936)):
        mm = 2 * tokens * hidden * vocab / base.bf16_flops
        call = module.Call(
            module.torch.device("cuda"),
            module.torch.bfloat16,
            module.torch.bfloat16,
            num_tokens=tokens,
            hidden_size=hidden,
            vocab_size=vocab,
            work="forward",
            workspace=1 << 40,
            architecture="sm_90",
        )
        parts = {part.name: part.seconds for part in get_backend("triton").predict(call, base).parts}
        forward = mm / 0.8 + parts["exponentials of the epilogue"] + parts["partial sums"]
        problem = {
            "architecture": "sm_90",
            "dtype": "bfloat16",
            "num_tokens": tokens,
            "hidden_size": hidden,
            "vocab_size": vocab,
        }
        results.append({"problem": problem, "mm_milliseconds": mm * 1e3, "timings": [{"forward": forward * 1e3}]})
    tuning = {"environment": "a GPU", "results": results}
    gpu = load_constants(written(tmp_path, ceilings, "--write", tuning=tuning).read_text())["sm_90"]
    assert gpu.triton_gemm == pytest.approx(0.8, rel=1e-3)
    results[0]["problem"]["architecture"] = "sm_80"
    with pytest.raises(SystemExit, match="the timings are of sm_80, the ceilings of sm_90"):
        module.measured(ceilings, tuning, constants())


def test_ceilings_of_a_cpu_are_no_constants_of_a_gpu(tmp_path, capsys):
    """What the suite really writes; with a GPU's description in place of none it is all that the script needs."""
    options = ["--device", "cpu", "--out", str(tmp_path), "--shape", "pairs=1,tokens=16,hidden=32,vocab=300"]
    assert bench(["--suite", "ceilings", *options]) == 0
    ceilings = json.loads((tmp_path / "cpu-ceilings.json").read_text())
    with pytest.raises(SystemExit, match="measured on a CPU"):
        script("gpu_constants").measured(ceilings, None, constants())
    ceilings["environment"]["machine"]["gpu"] = example()["environment"]["machine"]["gpu"]
    gpu = load_constants(written(tmp_path, ceilings, "--write").read_text())["sm_90"]
    assert gpu.measured and gpu.clock_hz == constants()["sm_90"].clock_hz
    capsys.readouterr()


# README's block


@pytest.fixture
def readme(tmp_path):
    """A folder like the repository's, with a README of two blocks."""
    for folder in ("docs", "bench/results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        "before\n<!-- headline -->\nkept\n<!-- /headline -->\n<!-- gpu -->\n<!-- /gpu -->\nafter\n"
    )
    return tmp_path / "README.md"


def test_without_a_measurement_readme_says_so_in_one_line(readme):
    before = readme.read_text()
    for _ in range(2):
        script("readme_figures").main([], readme.parent)
        lines = readme.read_text().splitlines()
        inside = lines[lines.index("<!-- gpu -->") + 1 : lines.index("<!-- /gpu -->")]
        assert len(inside) == 1 and "nothing has been measured" in inside[0]
    assert readme.read_text().replace(inside[0] + "\n", "") == before
    assert not list(readme.parent.glob("docs/*"))


def test_readme_has_the_block_that_the_script_writes():
    """And what it says is what there is to say: `python scripts/readme_figures.py`."""
    module, text = script("readme_figures"), (ROOT / "README.md").read_text()
    inside = text.split("<!-- gpu -->\n")[1].split("\n<!-- /gpu -->")[0]
    folders = [path.parent for path in ROOT.glob("bench/results/gpu-*/cuda-gpu.json")]
    assert inside == (module.gpu_table(max(folders), "docs/gpu.png") if folders else module.NOTHING)


def test_readme_shows_each_shape_and_mode_of_a_measurement(readme, capsys):
    """What the suite really writes, at a small shape on a CPU; here only the file's name says that it was a GPU."""
    pytest.importorskip("matplotlib")
    folder = readme.parent / "bench" / "results" / "gpu-some"
    options = ["--rounds", "1", "--no-memory", "--device", "cpu", "--out", str(folder)]
    shape = "pairs=1,tokens=16,hidden=32,vocab=300,masked=0,softcap=30"
    assert bench(["--suite", "gpu", "--shape", shape, *options, "--providers", "gemm", "torch", "logitless"]) == 0
    (folder / "cpu-gpu.json").rename(folder / "cuda-gpu.json")
    module = script("readme_figures")
    module.main([], readme.parent)
    text = readme.read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| 32, 32, 300, soft-cap 30")]
    assert [row[1] for row in rows] == ["trained", "frozen", "forward only"]
    run = json.loads((folder / "cuda-gpu.json").read_text())
    for case, row in zip(run["cases"], rows, strict=True):
        by_name = {one["provider"]: one for one in case["rows"]}
        assert row[3] == f"{by_name['logitless']['ratio_to_gemm']:.2f}"
        assert row[4:7] == ["-", "-", "-"]  # TRL, Liger and Cut Cross-Entropy took no part
        assert row[7] == f"{by_name['torch']['median_seconds'] / by_name['logitless']['median_seconds']:.2f}"
        ours, plain = (by_name[name]["errors"]["token_logps"] for name in ("logitless", "torch"))
        assert row[9] == "-" and row[10] == f"{ours:.1e} |"
        assert ours < (1e-4 if has_bf16_gemm() else 2 * plain)  # without that GEMM a CPU rounds bf16 logits, as plain PyTorch
    assert f"commit {(run['environment']['commit'] or 'unknown')[:10]}" in text
    assert "of 6 targets are met" in text  # trained 2, frozen 2, forward only 2: the others need TRL, Liger, memory
    assert text.startswith("before\n<!-- headline -->\nkept\n") and text.endswith("<!-- /gpu -->\nafter\n")
    assert (readme.parent / "docs" / "gpu.png").read_bytes().startswith(b"\x89PNG")
    module.main(["--gpu", str(folder)], readme.parent)
    assert readme.read_text() == text
    capsys.readouterr()


def test_a_measurement_in_which_a_provider_failed_has_no_figure_for_it(readme):
    """A row that is not ok is as if it were not there; one of ours leaves a row of dashes."""
    shape = {"dtype": "bf16", "hidden": 4, "vocab": 9, "softcap": 0.0}
    case = {"shape": shape, "scored_tokens": 2, "train_head": True, "backward": True, "targets": []}
    rows = [{"provider": "logitless", "status": "failed"}, {"provider": "torch", "status": "ok"}]
    environment = {"time": "2026-01-31", "commit": None, "versions": {}, "machine": {"gpu": {"name": "G", "driver": "1"}}}
    folder = readme.parent / "bench" / "results" / "gpu-some"
    folder.mkdir()
    (folder / "cuda-gpu.json").write_text(json.dumps({"environment": environment, "cases": [{**case, "rows": rows}]}))
    assert "\n| 2, 4, 9 | trained | - | - | - | - | - | - | - | - | - |\n" in script("readme_figures").gpu_table(
        folder, "x.png"
    )


# What `make tune-gpu` runs, in Triton's interpreter


@pytest.fixture
def search(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from logitless.kernels.backends.triton.tuning import lookup, search

    monkeypatch.setattr(lookup, "_known", {})
    monkeypatch.setenv("LOGITLESS_CACHE_DIR", str(tmp_path / "cache"))
    return search


def test_tuning_ends_at_its_time_limit_with_what_it_has(search, tmp_path, capsys):
    """One shape with one candidate at least; the others are named. The constants' script reads what it writes."""
    shapes = ["tokens=16,hidden=16,vocab=40", "tokens=32,hidden=16,vocab=40,softcap=1"]
    table, timings = tmp_path / "out" / "configs.json", tmp_path / "out" / "timings.json"
    command = ["tune", "--dtype", "fp32", "--time-limit", "1e-9", "--export", str(table), "--timings", str(timings)]
    assert logitless([*command, *(word for shape in shapes for word in ("--shape", shape))]) == 0
    printed = capsys.readouterr().out
    assert "cut short after 1e-09 s, at 1 candidates: 16 tokens, H=16, V=40" in printed
    assert "left out after 1e-09 s: 32 tokens, H=16, V=40, soft-cap" in printed
    (result,) = json.loads(timings.read_text())["results"]
    assert result["problem"]["num_tokens"] == 16 and result["problem"]["dtype"] == "float32"
    assert result["mm_milliseconds"] > 0 and len(result["timings"]) == 1 and result["timings"][0]["forward"] > 0
    assert "N=16 H=16 V=40" in table.read_text()


@pytest.mark.parametrize("limit", ["0", "-1", "soon", "inf"])
def test_a_wrong_time_limit_of_the_tuning_is_an_error(limit, capsys):
    with pytest.raises(SystemExit, match="2"):
        logitless(["tune", "--shape", "tokens=8,hidden=16,vocab=40", f"--time-limit={limit}"])
    assert f"must be a number of seconds > 0, got '{limit}'" in capsys.readouterr().err


def a_problem(search):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return search.Problem(torch.empty(0, device=device).device, torch.float32, 16, 16, 40, False)


def test_candidates_are_prepared_before_they_are_measured(search, monkeypatch):
    """Each once, and those of a better configuration's neighbourhood when it is found."""
    prepared, measured = [], []

    def measure(self, config):
        assert config in prepared
        measured.append(config)
        return search.Timing(config, 1 / len(measured), 1.0 / len(measured))  # each is better than the one before

    monkeypatch.setattr(search, "LIMIT", 6)
    monkeypatch.setattr(search.Workload, "measure", measure)
    monkeypatch.setattr(search.Workload, "serves", lambda self, config: True)
    best = search.search(search.Workload(a_problem(search)), None, lambda problem, configs: prepared.extend(configs))[0]
    assert best.config == measured[-1] and len(measured) == 6
    assert len(set(prepared)) == len(prepared) > 6


def test_processes_that_compile_get_what_they_need(search):
    problem = a_problem(search)
    search.compile_for(problem, problem.starts()[0])
    with search.compilers(1) as prepare:
        prepare(problem, problem.starts()[:1])
