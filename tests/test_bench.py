"""The benchmark itself: runs end to end, refuses unknown names, and prints no figure for a result that is wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from logitless.bench import register_all
from logitless.bench.cases import SUITES, Case, Shape, make_inputs
from logitless.bench.cli import main
from logitless.bench.memory import measure
from logitless.bench.reference import compute_reference
from logitless.bench.registry import PROVIDERS, Result, Work, provider
from logitless.bench.report import targets
from logitless.bench.runner import FAILED, OK, UNAVAILABLE, WRONG, run_case

register_all()
CPU = torch.device("cpu")
TINY = "pairs=1,tokens=16,hidden=32,vocab=300"
CASE = Case("dpo", "dpo", Shape(pairs=1, tokens=16, hidden=32, vocab=300))


@pytest.fixture
def registered():
    """Names of providers that a test registers; removed again afterwards."""
    before = dict(PROVIDERS)
    yield
    PROVIDERS.clear()
    PROVIDERS.update(before)


def test_runs_end_to_end_and_writes_json_and_png(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    names = ["gemm", "torch", "logitless", "logitless:op", "quack"]
    options = ["--quick", "--rounds", "2", "--no-memory", "--device", "cpu", "--out", str(tmp_path)]
    code = main(["--suite", "dpo,memory", "--shape", TINY, *options, "--providers", *names])
    assert code == 0
    printed = capsys.readouterr().out
    assert "max logp err" in printed
    assert "target" in printed
    document = json.loads((tmp_path / "cpu-dpo-memory.json").read_text())
    assert "no figures" not in printed
    assert document["environment"]["versions"]["torch"] == torch.__version__
    assert [c["suite"] for c in document["cases"]] == ["dpo", "memory", "memory", "memory"]
    rows = {row["provider"]: row for row in document["cases"][0]["rows"]}
    assert list(rows) == names
    for name in ("torch", "logitless", "logitless:op"):
        row = rows[name]
        assert row["status"] == OK
        assert len(row["seconds"]) == 2
        assert row["ratio_to_gemm"] > 0
        assert row["errors"]["dweight"] < 0.06
        assert row["errors"]["token_logps"] is not None
    assert rows["quack"]["status"] == UNAVAILABLE
    assert "CUDA" in rows["quack"]["message"]
    assert (tmp_path / "cpu-memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_gpu_suite_runs_at_any_shape(tmp_path, capsys):
    """Its targets are those of an H100, its figure bars; at another shape than its own it has three cases."""
    names = ["gemm", "torch", "torch-scored", "logitless", "logitless:op"]
    options = ["--rounds", "2", "--no-memory", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["--suite", "gpu", "--shape", f"{TINY},softcap=5", *options, "--providers", *names]) == 0
    printed = capsys.readouterr().out
    assert "extra GiB of logitless" in printed
    assert "on one H100" in printed
    document = json.loads((tmp_path / "cpu-gpu.json").read_text())
    assert [(c["train_head"], c["backward"], c["gemms"]) for c in document["cases"]] == [
        (True, True, 3),
        (False, True, 2),
        (True, False, 1),
    ]
    assert {row["status"] for case in document["cases"] for row in case["rows"]} == {OK}
    assert [t["bound"] for t in document["cases"][1]["targets"]] == [1.1, 1.2, 1.5, 3.0]


def test_the_gpu_suite_starts_with_its_headline():
    cases = SUITES["gpu"].make({}, False)
    assert [(c.shape.scored, c.shape.hidden, c.shape.vocab) for c in cases[:3]] == [(8192, 4096, 151936)] * 3
    assert [(c.shape.scored, c.shape.hidden, c.shape.vocab, c.shape.softcap, c.gemms) for c in cases[3:7]] == [
        (8192, 4096, 128256, 0, 3),
        (16384, 2048, 151936, 0, 3),
        (8192, 1024, 151936, 0, 3),
        (8192, 2304, 256000, 30, 3),
    ]
    assert len(cases) == 15


def test_no_further_case_is_started_after_the_time_limit(tmp_path, capsys):
    options = ["--rounds", "1", "--no-memory", "--device", "cpu", "--out", str(tmp_path), "--providers", "gemm"]
    assert main(["--suite", "gpu", "--shape", TINY, *options, "--time-limit", "1e-9"]) == 0
    assert capsys.readouterr().out.count("left out after 1e-09 s: gpu: dpo") == 2
    assert len(json.loads((tmp_path / "cpu-gpu.json").read_text())["cases"]) == 1


def test_runs_as_plain_text_without_rich_matplotlib_and_psutil(tmp_path):
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['rich', 'matplotlib', 'psutil']))\n"
        "from logitless.bench.cli import main\n"
        "raise SystemExit(main(sys.argv[1:]))\n"
    )
    options = ["--rounds", "1", "--no-memory", "--device", "cpu", "--out", str(tmp_path), "--providers", "gemm", "logitless"]
    command = [sys.executable, "-c", script, "--suite", "gpu", "--shape", TINY, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ms, median (min..max)  x GEMM" in done.stdout
    assert "[" not in done.stdout
    assert "no figures: matplotlib is not installed" in done.stdout
    assert len(json.loads((tmp_path / "cpu-gpu.json").read_text())["cases"]) == 3


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["--suite", "nope"], "memory"),
        (["--providers", "nope"], "logitless:op"),
        (["--shape", "nope=1"], "vocab"),
        (["--shape", "dtype=int8"], "bf16"),
        (["--shape", "tokens=many"], "int"),
        (["--rounds", "0"], "at least 1"),
        (["--time-limit", "0"], "more than 0"),
        (["--shape", "softcap=-1"], ">= 0"),
        (["--device", "tpu"], "cuda"),
    ],
)
def test_unknown_name_is_an_error_that_lists_the_known_ones(arguments, known, capsys):
    assert main(arguments) == 2
    assert known in capsys.readouterr().err


def test_list_names_every_suite_and_provider(capsys):
    assert main(["--list", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*SUITES, *PROVIDERS])


@pytest.mark.usefixtures("registered")
def test_provider_that_raises_is_a_row_and_the_rest_goes_on():
    @provider("raises", tasks={"dpo"})
    def build(case, inputs):
        raise RuntimeError("no luck\nand a long traceback")

    outcome = run_case(CASE, ["raises", "gemm", "torch"], CPU, rounds=1, memory=False)
    raises, _, torch_row = outcome.rows
    assert (raises.status, raises.message) == (FAILED, "RuntimeError: no luck")
    assert outcome.ratio(raises) is None
    assert torch_row.status == OK


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("late", [False, True], ids=["from_the_start", "in_the_timed_step_only"])
def test_provider_with_wrong_gradients_gets_no_figure(late):
    """Also when only the result that was timed is wrong. It takes the headline's place, so no target may count it."""
    build = PROVIDERS["torch"].build
    del PROVIDERS["logitless"]

    @provider("logitless", tasks={"dpo"})
    def wrong(case, inputs):
        work, calls = build(case, inputs), []

        def step() -> Result:
            calls.append(1)
            result = work.step()
            assert result.dweight is not None
            return replace(result, dweight=result.dweight * (1 if late and len(calls) == 1 else 2))

        return Work(step)

    outcome = run_case(CASE, ["gemm", "torch", "logitless"], CPU, rounds=1, memory=False)
    row = outcome.row("logitless")
    assert row is not None
    assert row.status == WRONG
    assert "dweight is off by 1" in row.message
    assert row.seconds == []
    assert outcome.ratio(row) is None
    assert all(t.value is None for t in targets(outcome))
    assert '"median_seconds": null' in json.dumps(row.as_dict())


@pytest.mark.usefixtures("registered")
def test_nan_gradient_is_wrong():
    build = PROVIDERS["torch"].build

    @provider("nan", tasks={"dpo"})
    def nan(case, inputs):
        work = build(case, inputs)
        return Work(lambda: replace(work.step(), dhidden=torch.full_like(inputs.hidden, math.nan)))

    assert run_case(CASE, ["nan"], CPU, rounds=1, memory=False).rows[0].status == WRONG


def test_memory_process_measures_what_a_step_allocates():
    """Plain PyTorch holds at least its logits, in bf16 and in fp32; logitless does not."""
    case = Case("dpo", "dpo", Shape(pairs=1, tokens=512, hidden=16, vocab=16384))
    tile = 1024 * 16384
    plain = measure(PROVIDERS["torch"], case, CPU)
    fused = measure(PROVIDERS["logitless:small"], case, CPU)
    assert plain.extra_bytes is not None, plain.message
    assert fused.extra_bytes is not None, fused.message
    assert plain.extra_bytes > 6 * tile
    assert fused.extra_bytes < plain.extra_bytes / 2


@pytest.mark.usefixtures("registered")
def test_memory_process_reports_what_went_wrong():
    @provider("only-here", tasks={"dpo"})
    def build(case, inputs):
        return Work(Result)

    answer = measure(replace(PROVIDERS["only-here"], build=_unimportable), CASE, CPU)
    assert answer.extra_bytes is None
    assert "no_such_module" in answer.message


def _unimportable(case, inputs):
    raise NotImplementedError


_unimportable.__module__ = "no_such_module"


def test_reference_is_plain_autograd_in_float64():
    """Blocks and the two-step backward change nothing."""
    case = Case("op", "logps", Shape(pairs=1, tokens=9, hidden=8, vocab=50, logits="peaked"))
    inputs = make_inputs(case, CPU)
    x, w = (t.detach().double().requires_grad_() for t in (inputs.hidden, inputs.weight))
    logps = torch.log_softmax(x @ w.t(), -1).gather(-1, inputs.labels.clamp(min=0)[..., None])[..., 0]
    loss: Tensor = (torch.where(inputs.scored, logps, 0) * inputs.upstream).sum()
    loss.backward()
    reference = compute_reference(case, inputs)
    assert reference.dhidden is not None and reference.dweight is not None
    torch.testing.assert_close(reference.dhidden, x.grad)
    torch.testing.assert_close(reference.dweight, w.grad)
    assert reference.loss == pytest.approx(loss.item())


@pytest.mark.parametrize("name", ["torch", "torch-scored", "trl", "logitless", "logitless:op", "pass@torch"])
def test_a_soft_cap_is_applied(name):
    """Logits of standard deviation 6 under a cap of 4: nobody who forgets it is within the tolerance."""
    task = "tile" if name.startswith("pass@") else "dpo"
    case = Case("gpu", task, replace(CASE.shape, softcap=4.0, logits="peaked", hidden=64), backward=task == "dpo")
    if reasons := PROVIDERS[name].reasons(case, CPU):
        pytest.skip("; ".join(reasons))
    assert run_case(case, [name], CPU, rounds=1, memory=False).rows[0].status == OK
    inputs = make_inputs(case, CPU)
    capped, plain = (compute_reference(c, inputs).logps for c in (case, replace(case, shape=replace(case.shape, softcap=0.0))))
    assert (capped - plain).abs().max() > 1


@pytest.mark.parametrize("name", ["liger", "quack", "torch-lce"])
def test_who_has_no_soft_cap_says_so(name):
    case = Case("gpu", min(PROVIDERS[name].tasks), replace(CASE.shape, softcap=4.0))
    assert "soft-cap" in "; ".join(PROVIDERS[name].reasons(case, CPU)) or "has no torch.nn" in "; ".join(
        PROVIDERS[name].reasons(case, CPU)
    )
