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
from torch.utils.flop_counter import FlopCounterMode

import logitless as ll
from logitless.bench import cli
from logitless.bench.cli import main
from logitless.bench.core import command, environment, report, runner
from logitless.bench.core.cases import Case, Shape
from logitless.bench.core.console import Console
from logitless.bench.core.inputs import make_inputs
from logitless.bench.core.memory import measure
from logitless.bench.core.reference import compute_reference
from logitless.bench.core.registry import PROVIDERS, Result, Work, provider
from logitless.bench.core.report import Target
from logitless.bench.core.rows import FAILED, OK, UNAVAILABLE, WRONG
from logitless.bench.core.runner import CaseOutcome, ProviderRow, estimated_seconds, run_case
from logitless.bench.losses.policy import ENTROPY_COEF, loop_over_tokens
from logitless.bench.suites import GPU_SHAPES, SUITES, default_providers
from logitless.bench.targets import targets

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
    assert printed.count("unavailable: quack (does not compute dpo, only nll)") == 4
    assert printed.count("not stated for this shape: time of plain PyTorch over logitless is ") == 1
    assert printed.rstrip().splitlines()[-2:] == [
        f"wrote {tmp_path / name}" for name in ("cpu-dpo-memory.json", "cpu-memory.png")
    ]
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


def sizes(shape: Shape) -> tuple[int, int, int, float]:
    return shape.scored, shape.hidden, shape.vocab, shape.softcap


def test_every_loss_meets_every_shape_of_an_h100_trained_frozen_and_forward_only():
    assert [sizes(shape) for shape in GPU_SHAPES] == [
        (8192, 4096, 151936, 0),
        (8192, 4096, 128256, 0),
        (16384, 2048, 151936, 0),
        (8192, 1024, 151936, 0),
        (8192, 2304, 256000, 30),
    ]
    for suite, tasks in (("gpu", ["dpo"]), ("gpu-losses", ["simpo", "orpo", "kto"]), ("policy-gpu", ["dapo"])):
        found = [(c.task, sizes(c.shape), c.train_head, c.backward) for c in SUITES[suite].make({}, False)]
        modes = [(True, True), (False, True), (True, False)]
        wanted = {(task, sizes(shape), *mode) for task in tasks for shape in GPU_SHAPES for mode in modes}
        assert wanted <= set(found), suite
        assert found[0] == (tasks[0], sizes(GPU_SHAPES[0]), True, True)
        assert len(set(found)) == len(found) or suite == "policy-gpu"  # which has ragged responses of two kinds


@pytest.mark.usefixtures("registered")
def test_by_their_flop_the_suites_of_a_gpu_end_within_their_time_limit():
    """With every provider, whatever is installed here. Rounds and limit are those of the Makefile."""
    for name, one in PROVIDERS.items():
        PROVIDERS[name] = replace(one, why_not=lambda case, device: [])
    cuda = torch.device("cuda")
    for suite, rounds in (("gpu", 10), ("gpu-losses", 5), ("policy-gpu", 5)):
        plan = [(case, default_providers(suite, False)) for case in SUITES[suite].make({}, False)]
        assert estimated_seconds(plan, cuda, rounds) < 420, suite
        assert max(estimated_seconds([one], cuda, rounds) for one in plan) < 120  # which may start at 420 s


def test_what_is_measured_is_written_after_every_case(tmp_path, monkeypatch, capsys):
    """A run that is stopped at its third case leaves two, and says which are missing."""
    run, calls = cli.run_case, []

    def stopped(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    monkeypatch.setattr(cli, "run_case", stopped)
    options = ["--rounds", "1", "--no-memory", "--device", "cpu", "--out", str(tmp_path), "--providers", "gemm", "torch"]
    with pytest.raises(KeyboardInterrupt):
        main(["--suite", "gpu", "--shape", TINY, *options])
    document = json.loads((tmp_path / "cpu-gpu.json").read_text())
    assert [(c["train_head"], c["backward"]) for c in document["cases"]] == [(True, True), (False, True)]
    assert len(document["left_out"]) == 1 and "forward only" in document["left_out"][0]
    assert [p.name for p in tmp_path.iterdir()] == ["cpu-gpu.json"]
    capsys.readouterr()


def test_a_case_without_inputs_is_rows_that_say_so_and_the_next_case_runs(tmp_path, monkeypatch):
    make = runner.make_inputs

    def fails(case, device):
        if not case.train_head:
            raise torch.OutOfMemoryError("too large")
        return make(case, device)

    monkeypatch.setattr(runner, "make_inputs", fails)
    options = ["--rounds", "1", "--no-memory", "--device", "cpu", "--out", str(tmp_path), "--providers", "gemm", "torch"]
    assert main(["--suite", "gpu", "--shape", TINY, *options]) == 0
    cases = json.loads((tmp_path / "cpu-gpu.json").read_text())["cases"]
    assert [{row["status"] for row in case["rows"]} for case in cases] == [{OK}, {FAILED}, {OK}]
    assert cases[1]["rows"][1]["message"] == "the case itself: OutOfMemoryError: too large"


def test_a_run_ends_where_the_gpu_answers_nothing_any_more(tmp_path, monkeypatch, capsys):
    """With what it has, and a status that says so."""
    monkeypatch.setattr(command, "context_is_lost", lambda device: True)
    options = ["--rounds", "1", "--no-memory", "--device", "cpu", "--out", str(tmp_path), "--providers", "gemm"]
    assert main(["--suite", "gpu", "--shape", TINY, *options]) == 1
    printed = capsys.readouterr().out
    assert "run again without it" in printed and printed.count("left out: gpu: dpo") == 2
    document = json.loads((tmp_path / "cpu-gpu.json").read_text())
    assert (len(document["cases"]), len(document["left_out"])) == (1, 2)


def test_a_profile_says_which_operators_ours_and_the_bare_gemms_take(tmp_path, capsys):
    names = ["gemm", "torch", "logitless:op"]
    options = ["--rounds", "1", "--no-memory", "--profile", "--device", "cpu", "--out", str(tmp_path), "--providers", *names]
    assert main(["--suite", "op", "--shape", TINY, *options]) == 0
    assert "profile of gemm" in capsys.readouterr().out
    (case,) = json.loads((tmp_path / "cpu-op.json").read_text())["cases"]
    gemm, plain, ours = case["rows"]
    assert plain["profile"] is None
    assert {kernel["name"]: kernel["calls"] for kernel in gemm["profile"]}["aten::mm"] == 3
    for row in (gemm, ours):
        times = [kernel["microseconds"] for kernel in row["profile"]]
        assert times == sorted(times, reverse=True) and times[-1] >= 0 and len(times) <= 20
    assert ours["predicted_seconds"] is None  # the cost model knows GPUs alone


def test_ceilings_are_measured_at_small_shapes_too(tmp_path, capsys):
    options = ["--device", "cpu", "--out", str(tmp_path), "--shape", "pairs=1,tokens=16,hidden=32,vocab=300,masked=0"]
    assert main(["--suite", "ceilings", *options]) == 0
    assert "copy of 128 MiB" in capsys.readouterr().out
    document = json.loads((tmp_path / "cpu-ceilings.json").read_text())
    rows = document["rows"]
    assert [row["kind"] for row in rows] == ["copy", "launch", *["gemm"] * 5]
    assert [row["dtype"] for row in rows[2:]] == ["bfloat16"] * 3 + ["float32", "float64"]
    assert all(row["flops"] == 2 * 32 * 32 * 300 and row["flops_per_second"] > 0 for row in rows[2:])
    assert rows[0]["bytes_per_second"] == rows[0]["moved"] / rows[0]["seconds"] and rows[0]["moved"] == 2 * 128 << 20
    assert document["clock_hz"] is None and document["environment"]["device"] == "cpu"


def test_the_commit_may_be_told_where_there_is_no_checkout(monkeypatch):
    monkeypatch.delenv("LOGITLESS_COMMIT", raising=False)
    real = environment.environment(CPU)["commit"]
    monkeypatch.setenv("LOGITLESS_COMMIT", "0123abc")
    monkeypatch.setattr(environment, "_git", lambda *arguments: None)
    assert environment.environment(CPU)["commit"] == "0123abc"
    assert real is None or len(real) == 40


@pytest.mark.parametrize(
    ("account", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.2.0\n",
            "535.104.05",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (x)\n", "580.82.07"),
        ("something else\n", None),
    ],
)
def test_the_driver_is_known_without_its_tool(tmp_path, monkeypatch, account, version):
    (tmp_path / "version").write_text(account)
    monkeypatch.setattr(environment, "nvidia_smi", lambda query: None)
    monkeypatch.setattr(environment, "Path", lambda path: tmp_path / "version")
    assert environment.driver_version() == version


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
        (["--rounds", "0"], "more than 0"),
        (["--time-limit", "0"], "more than 0"),
        (["--shape", "softcap=-1"], ">= 0"),
        (["--shape", "spread=0.5"], ">= 1"),
        (["--device", "tpu"], "cuda"),
    ],
)
def test_unknown_name_is_an_error_that_lists_the_known_ones(arguments, known, capsys):
    assert main(arguments) == 2
    assert known in capsys.readouterr().err


def test_rows_without_figures_are_one_line_below_the_table(capsys):
    rows = [
        ProviderRow("gemm", seconds=[1.0, 3.0], roofline=True),
        ProviderRow("cce", UNAVAILABLE, "needs a CUDA device; package cut_cross_entropy is not installed"),
        ProviderRow("quack", UNAVAILABLE, "needs a CUDA device"),
        ProviderRow("torch", FAILED, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.3 GiB"),
        ProviderRow("trl", FAILED, "RuntimeError: no luck"),
        ProviderRow("liger", WRONG, "dweight is off by 1, allowed 0.06"),
    ]
    report.show(Console(), CaseOutcome(CASE, rows))
    title, _, _, gemm, *below = capsys.readouterr().out.splitlines()
    assert title == CASE.title and gemm.startswith("gemm ")
    assert below == [
        "  unavailable: cce, quack (needs a CUDA device); torch (out of memory)",
        "  failed: trl (RuntimeError: no luck)",
        "  wrong: liger (dweight is off by 1, allowed 0.06)",
        "  GEMM took 2000 (1000..3000) ms: the machine is busy, do not trust the times",
        "",
    ]


def test_each_target_is_one_sentence_with_its_number(capsys):
    met, missed = Target("speed", 3.0, 2.5, True), Target("speed", 2.0, 2.5, True)
    assert str(met) == "met: speed is 3.00 (target: at least 2.5)"
    assert str(missed) == "missed: speed is 2.00 (target: at least 2.5)"
    assert (
        str(replace(missed, at_least=False, stated=False)) == "not stated for this shape: speed is 2.00 (target: at most 2.5)"
    )
    assert str(replace(met, value=None)) == "not measured: speed (target: at least 2.5)"
    elsewhere = replace(missed, stated=False, stated_for="one H100")
    report.show_targets(Console(), [CaseOutcome(CASE, [])], lambda outcome: [met, elsewhere])
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"targets of {CASE.title}", f"  {met}", f"  {elsewhere}", "  (targets are stated for one H100)"]


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


RAGGED = Shape(pairs=2, tokens=16, hidden=32, vocab=300, spread=3.0)


def test_responses_run_evenly_from_the_longest_to_the_shortest():
    assert Shape(pairs=2, tokens=16, masked=0.25, spread=3.0).responses == [12, 9, 7, 4]
    assert Shape(pairs=2, tokens=16, masked=0.25).responses == [12] * 4
    assert Shape(pairs=1, tokens=2, masked=0.0, spread=100.0).responses == [2, 1]


def test_the_policy_suites_have_the_sizes_of_the_headlines():
    for suite, headline in (("policy", "dpo"), ("policy-gpu", "gpu")):
        cases, like = SUITES[suite].make({}, False)[:5], SUITES[headline].base
        assert {(c.shape.hidden, c.shape.vocab, c.shape.dtype) for c in cases} == {(like.hidden, like.vocab, like.dtype)}
        assert cases[0].shape.scored == like.scored
        assert all(c.shape.scored % 64 == 0 and abs(c.shape.scored / like.scored - 1) < 0.1 for c in cases)
        assert [c.gemms for c in cases] == [3, 2, 3, 3, 3]
        assert max(c.shape.responses[0] / c.shape.responses[-1] for c in cases) == 10


def test_packed_inputs_are_the_padded_ones_without_padding():
    inputs = make_inputs(Case("policy", "ppo", RAGGED), CPU)
    present, packed = inputs.present, inputs.packed
    assert packed is not None
    assert present.sum(1).tolist() == [4 + n for n in RAGGED.responses]
    assert packed.cu_seqlens.diff().tolist() == present.sum(1).tolist()
    assert int(packed.scored.sum()) == int(inputs.scored.sum()) == RAGGED.scored
    assert not inputs.scored[~present].any()
    assert packed.hidden.is_leaf and packed.hidden.requires_grad and packed.weight is inputs.weight
    torch.testing.assert_close(packed.hidden.detach(), inputs.hidden.detach()[present], rtol=0, atol=0)
    torch.testing.assert_close(packed.old_logps, inputs.old_logps[present], rtol=0, atol=0)


@pytest.mark.parametrize("logits", ["random", "peaked"])
def test_no_token_is_near_the_end_of_a_clipping_range(logits):
    """Else a rounding of its log-prob would decide whether it has a gradient. Some are beyond, on either side."""
    case = Case("policy", "dapo", replace(RAGGED, tokens=64, logits=logits))
    inputs = make_inputs(case, CPU)
    logps = compute_reference(case, inputs).logps
    assert logps is not None
    ratios = (logps - inputs.old_logps)[inputs.scored].exp()
    for end in (0.8, 1.2, 1.28):
        assert (ratios / end).log().abs().min() > 0.05
    assert (ratios < 0.8).any() and (ratios > 1.28).any()


def test_reference_of_a_policy_loss_is_plain_autograd_in_float64():
    case = Case("policy", "dapo-entropy", replace(RAGGED, logits="peaked"))
    inputs = make_inputs(case, CPU)
    x, w = (t.detach().double().requires_grad_() for t in (inputs.hidden, inputs.weight))
    scored = inputs.scored
    log_p = torch.log_softmax(x[scored] @ w.t(), -1)
    logps = log_p.gather(-1, inputs.labels[scored][:, None])[:, 0]
    ratios = (logps - inputs.old_logps[scored]).exp()
    a = inputs.advantages[scored]
    loss = -torch.minimum(ratios * a, ratios.clamp(0.8, 1.28) * a).mean()
    loss = loss + ENTROPY_COEF * (log_p.exp() * log_p).sum(-1).mean()
    loss.backward()
    reference = compute_reference(case, inputs)
    assert reference.dhidden is not None and reference.dweight is not None
    torch.testing.assert_close(reference.dhidden, x.grad)
    torch.testing.assert_close(reference.dweight, w.grad)
    assert reference.loss == pytest.approx(loss.item())


def test_the_policy_suite_runs_end_to_end(tmp_path, capsys):
    """Every provider on every loss, packed or padded, is right or says why not."""
    options = ["--quick", "--rounds", "1", "--no-memory", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["--suite", "policy", "--shape", "pairs=2,tokens=16,hidden=32,vocab=300", *options]) == 0
    printed = capsys.readouterr().out
    assert "met: FLOP of logitless over N H V is 6.00 (target: at most 6.02)" in printed
    assert "met: FLOP of logitless over N H V is 4.00 (target: at most 4.02)" in printed
    document = json.loads((tmp_path / "cpu-policy.json").read_text())
    assert [c["task"] for c in document["cases"]] == ["dapo", "dapo", "dapo-entropy", "dapo", "ppo"]
    for case in document["cases"]:
        rows = {row["provider"]: row for row in case["rows"]}
        assert list(rows) == default_providers("policy", True)
        missing = {name for name, row in rows.items() if row["status"] == UNAVAILABLE}
        assert {row["status"] for name, row in rows.items() if name not in missing} == {OK}
        assert not any(name.startswith(("logitless", "torch", "gemm", "verl")) for name in missing)
        assert "does not compute" in rows["liger:policy"]["message"] or case["task"] == "dapo"
        assert all(row["errors"]["token_logps"] is not None for row in rows.values() if row["errors"] is not None)
        assert rows["logitless:policy"]["schedule"] in ("gradient_in_forward", "deferred_scale")


@pytest.mark.parametrize("train_head", [True, False])
def test_the_flop_of_a_policy_step_are_those_that_torch_counts(train_head):
    case = Case("policy", "dapo-entropy" if train_head else "dapo", RAGGED, train_head=train_head)
    inputs = make_inputs(case, CPU)
    claimed = PROVIDERS["logitless:policy"].build(case, inputs).step().flops
    packed = inputs.packed
    assert packed is not None
    module = ll.FusedLinearGRPOLoss(epsilon_high=0.28, entropy_coef=ENTROPY_COEF if train_head else 0.0)
    arguments = {"advantages": packed.advantages, "cu_seqlens": packed.cu_seqlens}
    with ll.settings(batch_invariant=False), FlopCounterMode(display=False) as counter:
        module(packed.hidden, packed.weight, packed.labels, **arguments).loss.backward()
    assert counter.get_total_flops() == claimed == 2 * case.gemms * RAGGED.scored * 32 * 300


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("task", ["dapo", "dapo-entropy", "ppo"])
def test_a_wrong_packed_gradient_gets_no_figure(task):
    """One that forgets the entropy bonus, the clipping, or a sequence's rows."""
    case = Case("policy", task, replace(RAGGED, tokens=64, logits="peaked"))
    build = PROVIDERS["torch:policy"].build

    @provider("wrong", tasks={task})
    def wrong(case, inputs):
        if task == "dapo-entropy":
            return build(replace(case, task="dapo"), inputs)
        work = build(case, inputs)

        def step() -> Result:
            result = work.step()
            assert result.dhidden is not None
            return replace(result, dhidden=result.dhidden.roll(1, 0))

        return Work(step)

    right, row = run_case(case, ["torch:policy", "wrong"], CPU, rounds=1, memory=False).rows
    assert right.status == OK, right.message
    assert row.status == WRONG
    assert "dhidden" in row.message
    assert row.seconds == []


def test_suites_apart_share_no_provider():
    names = {suite: set(default_providers(suite, False)) for suite in ("op", "policy", "gae")}
    assert all(names[a].isdisjoint(names[b]) for a in names for b in names if a < b)
    assert "gemm:policy" in names["policy"] and "gemm" in names["op"]


def test_the_gae_suite_compares_with_a_loop_over_tokens(tmp_path, capsys):
    options = ["--rounds", "1", "--no-memory", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["--suite", "gae", "--shape", "pairs=3,tokens=40", *options]) == 0
    assert "max err" in capsys.readouterr().out
    (case,) = json.loads((tmp_path / "cpu-gae.json").read_text())["cases"]
    assert {row["status"] for row in case["rows"]} == {OK}
    assert [row["provider"] for row in case["rows"]] == ["copy:gae", "loop:gae", "floats:gae", "padded:gae", "logitless:gae"]
    assert all(row["errors"]["token_logps"] < 1e-4 for row in case["rows"][1:])


def test_the_loop_over_tokens_by_hand():
    """gamma is 1 and lambda 0.95; the second segment is empty."""
    found = loop_over_tokens([0.0, 1.0, 2.0], [0.5, 0.25, 1.0], [0, 2, 2, 3], [0.0] * 3)
    assert found == pytest.approx([-0.25 + 0.95 * 0.75, 0.75, 1.0])
