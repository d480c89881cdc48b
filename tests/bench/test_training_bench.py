"""The benchmark of whole training steps: its arms agree with an exact head, and its figures mean what they say."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import logitless as ll
from logitless.bench.training import steps
from logitless.bench.training.arms import ARMS, Arm
from logitless.bench.training.attention import VARLEN
from logitless.bench.training.batches import (
    IGNORE,
    PROFILES,
    concatenated_examples,
    make_batch,
    paired_examples,
    rollout_inputs,
    unpaired_examples,
)
from logitless.bench.training.cases import TrainCase, case_batch
from logitless.bench.training.cli import main
from logitless.bench.training.curves import distance, run_curves
from logitless.bench.training.limits import LimitRow, Trial, estimate, extrapolate, run_limits, search
from logitless.bench.training.methods import METHODS
from logitless.bench.training.models import MODELS, make_config
from logitless.bench.training.predict import decoder_flops, predict
from logitless.bench.training.report import reach, targets, write_figure
from logitless.bench.training.steps import StepOutcome, StepRow, head_flops, run_steps
from logitless.bench.training.suites import HEADLINE, SUITES
from logitless.bench.training.workbench import Workbench
from logitless.kernels.cost_model.gpu_constants import Gpu, constants

pytest.importorskip("trl")
pytest.importorskip("datasets")

CPU = torch.device("cpu")
SMALL = TrainCase("qwen3-0.6b", "dpo", pairs=2, length=32, precision="fp32", tiny=True)
LOSSES = [name for name, arm in ARMS.items() if not arm.floor]


@pytest.mark.parametrize(
    "case",
    [
        *(replace(SMALL, method=method) for method in METHODS),
        replace(SMALL, model="llama-3-8b-lora"),
        replace(SMALL, model="llama-3-8b-lora", method="kto", checkpointing=True),
        replace(SMALL, model="llama-3.2-1b", method="grpo", checkpointing=True),
        replace(SMALL, model="qwen2.5-1.5b", profile="fixed"),
    ],
    ids=lambda case: f"{case.model}-{case.method}",
)
def test_every_arm_computes_the_step_of_an_exact_head(case):
    outcome = run_steps(case, ARMS, CPU, rounds=1)
    for row in outcome.rows:
        assert row.status == "ok", f"{row.name}: {row.message}"
        assert len(row.seconds) == 1 and row.extra_bytes is not None
        if not row.floor:
            assert row.loss_error < 2e-6 and row.gradient_error < 2e-6
    assert outcome.tokens == sum(outcome.lengths) and 0 < outcome.scored_tokens < outcome.tokens


@pytest.mark.parametrize("precision", ["bf16", "bf16-amp", "fp16-amp"])
def test_steps_in_low_precision(precision):
    outcome = run_steps(replace(SMALL, precision=precision), LOSSES, CPU, rounds=1)
    assert [row.status for row in outcome.rows] == ["ok"] * len(LOSSES), [row.message for row in outcome.rows]


def test_a_compiled_decoder_gives_the_same_step(monkeypatch):
    """Without the code generator, which takes most of the time and is not ours."""
    whole = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", whole)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (row,) = run_steps(replace(SMALL, method="simpo", compiled=True), ["logitless"], CPU, rounds=1).rows
    assert row.status == "ok", row.message
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_optimizer_states_are_no_arms_memory(monkeypatch):
    seen = []

    def spy(step, device):
        seen.append(len(bench_of[0].optimizer.state))
        step()
        return 1

    bench_of = []
    made = Workbench.__init__

    def remember(self, *args, **more):
        made(self, *args, **more)
        bench_of.append(self)

    monkeypatch.setattr(Workbench, "__init__", remember)
    monkeypatch.setattr(steps, "peak_bytes", spy)
    run_steps(SMALL, ["trl", "logitless"], CPU, rounds=1)
    assert seen == [len(bench_of[0].parameters)] * 2


def test_a_case_that_cannot_run_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    made = Workbench.__init__

    def fail_once(self, case, *args, **more):
        if case.method == "dpo":
            raise RuntimeError("no such model here")
        made(self, case, *args, **more)

    monkeypatch.setattr(Workbench, "__init__", fail_once)
    options = ["--tiny", "--model", "qwen3-0.6b", "--method", "dpo", "simpo", "--profile", "chat", "--length", "32"]
    assert main([*options, "--rounds", "1", "--arms", "logitless", "--out", str(tmp_path)]) == 1
    assert "RuntimeError: no such model here" in capsys.readouterr().out
    document = json.loads((tmp_path / "cpu-training-steps.json").read_text())
    assert [c["method"] for c in document["cases"]] == ["simpo"]
    assert {c["method"] for c in document["failed_cases"]} == {"dpo"}


def test_an_arm_that_is_wrong_or_fails_earns_no_figure(monkeypatch):
    off = Arm("off", "", lambda bench, data: 1.01 * ARMS["logitless"].loss(bench, data))
    broken = Arm("broken", "", lambda bench, data: 1 / 0)
    for arm in (off, broken):
        monkeypatch.setitem(ARMS, arm.name, arm)
    outcome = run_steps(SMALL, ["off", "broken", "logitless"], CPU, rounds=2)
    status = {row.name: (row.status, row.median is None, row.extra_bytes is None) for row in outcome.rows}
    assert status == {"off": ("wrong", True, True), "broken": ("failed", True, True), "logitless": ("ok", False, False)}
    assert "gradient is off by 0.01" in outcome.row("off").message and "ZeroDivisionError" in outcome.row("broken").message


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["qwen3-0.6b", "llama-3-8b-lora"])
def test_the_floor_of_the_head_is_what_the_modules_need(model, method):
    """Torch counts the step of a loss module above that of the decoders alone: the head's GEMMs, and no other."""
    case = replace(SMALL, model=model, method=method)
    bench = Workbench(case, CPU)
    data = bench.data(case_batch(case, bench.vocab), exact=False)
    counts = {}
    ARMS["body"].loss(bench, data)  # models are tried out the first time that they run
    for name in ("body", "logitless"):
        with ARMS[name].ready(bench), ll.settings(backend="torch", batch_invariant=False):
            counter = FlopCounterMode(display=False)
            with counter:
                bench.backward(ARMS[name].loss(bench, data))
            counts[name] = counter.get_total_flops()
        bench.optimizer.zero_grad()
    assert counts["logitless"] - counts["body"] == head_flops(bench, data)


def test_steps_leave_the_weights_as_they_are():
    case = replace(SMALL, precision="bf16")
    bench = Workbench(case, CPU)
    before = [p.clone() for p in bench.parameters]
    data = bench.data(case_batch(case, bench.vocab), exact=False)
    with ARMS["logitless"].ready(bench):
        bench.backward(ARMS["logitless"].loss(bench, data))
        bench.update()
    assert all(torch.equal(a, b) for a, b in zip(before, bench.parameters, strict=True))


@pytest.mark.parametrize("profile", PROFILES)
def test_batches_have_the_lengths_of_their_profile(profile):
    batch = make_batch(profile, pairs=6, length=200, vocab=509, seed=3)
    assert len(batch) == 12 and batch.longest == 200
    assert batch.prompts[:6] == batch.prompts[6:]
    assert all(len(c) >= 1 for c in batch.completions)
    assert all(3 <= t < 509 for s in batch.sequences for t in s)
    assert batch.tokens == sum(len(s) for s in batch.sequences)
    if profile == "fixed":
        assert {len(s) for s in batch.sequences} == {200}
    assert make_batch(profile, pairs=6, length=200, vocab=509, seed=3) == batch
    assert make_batch(profile, pairs=6, length=200, vocab=509, seed=4) != batch


def test_the_forms_of_a_batch_hold_the_same_tokens():
    batch = make_batch("chat", pairs=3, length=40, vocab=509, seed=0)
    ids, mask, labels = batch.padded(CPU)
    for i, (sequence, start) in enumerate(zip(batch.sequences, batch.prompt_lengths, strict=True)):
        assert ids[i][mask[i] == 1].tolist() == sequence
        assert labels[i][labels[i] != IGNORE].tolist() == sequence[start:]
        pair, unpaired = paired_examples(batch)[i % 3], unpaired_examples(batch)[i]
        side = "chosen" if i < 3 else "rejected"
        assert pair["prompt_ids"] + pair[f"{side}_ids"] == sequence
        assert unpaired["prompt_ids"] + unpaired["completion_ids"] == sequence and unpaired["label"] == (i < 3)
        assert unpaired["KL_completion_ids"] == batch.completions[i - 1]
        features = concatenated_examples(batch)[i % 3]
        assert features[f"{side}_input_ids"] == sequence
        assert features[f"{side}_labels"] == [IGNORE] * start + sequence[start:]
    rollouts = rollout_inputs(batch, CPU)
    assert (rollouts["prompt_mask"][:, -1] == 1).all() and (rollouts["completion_mask"][:, 0] == 1).all()
    joined = torch.cat([rollouts["prompt_ids"], rollouts["completion_ids"]], 1)
    present = torch.cat([rollouts["prompt_mask"], rollouts["completion_mask"]], 1) == 1
    assert [row[m].tolist() for row, m in zip(joined, present, strict=True)] == batch.sequences


def _found(peak, *, limit=1000, start=8, granule=1, seconds=60.0, cost=0.0):
    row = LimitRow("arm")

    def attempt(size: int) -> Trial:
        bytes_ = peak(size)
        return Trial(size, None if bytes_ > 2 * limit else bytes_, cost * size)

    search(row, attempt, limit, start=start, granule=granule, seconds=seconds)
    return row


@pytest.mark.parametrize("slope", [1, 3, 7.3, 20, 110, 400])
@pytest.mark.parametrize("base", [0, 300, 590])
def test_the_search_for_a_limit_ends_at_it(slope, base):
    row = _found(lambda size: int(base + slope * size))
    true = int((1000 - base) / slope)
    assert row.largest is not None and row.largest <= true and (row.failing is None or row.failing > true)
    assert row.largest >= 0.93 * true - 1, row
    assert len({t.size for t in row.trials}) == len(row.trials) <= 7


def test_the_search_says_when_nothing_fits_and_when_time_would_run_out():
    row = _found(lambda size: 5000)
    assert row.largest is None and row.failing == 1 and "smallest" in row.message and reach(row) is None
    row = _found(lambda size: size, seconds=40.0, cost=1.0)
    assert row.largest == 40 and row.failing is None and "prediction" in row.message
    assert max(t.seconds for t in row.trials) <= 40
    assert row.predicted == 1000 and reach(row) == 1000.0  # what would fit, as far as memory goes
    row = _found(lambda size: 100 + size)
    assert "within 3 %" in row.message and reach(row) == row.largest < 900
    assert extrapolate([Trial(1, 10, 0.0), Trial(2, None, 0.0)], 100) is None


def test_seconds_of_a_step_are_estimated_by_its_two_largest_trials():
    trials = [Trial(n, 1, 2e-3 * n + 1e-5 * n * n) for n in (100, 200)]
    assert estimate(trials, 1000, 2) == pytest.approx(12.0)
    assert estimate([*trials, Trial(400, None, 0.0)], 1000, 1) == pytest.approx(trials[1].seconds * 5)
    assert estimate([Trial(100, 1, 1.0), Trial(200, 1, 1.5)], 400, 2) == 3.0  # a fixed cost: no worse than proportional
    assert estimate([Trial(100, 1, 0.1), Trial(200, 1, 1.0)], 400, 2) == 4.0  # steeper than any: the square alone


def test_a_limit_is_between_what_ran_and_what_did_not():
    case = replace(SMALL, precision="bf16", pairs=2, length=64, profile="fixed", checkpointing=True)
    outcome = run_limits(case, "length", ["trl", "logitless"], CPU, limit_bytes=12_000_000, seconds=30.0, deadline=float("inf"))
    for row in outcome.rows:
        assert row.status == "ok", row.message
        assert row.largest and row.largest % 64 == 0
        for trial in row.trials:
            assert (trial.peak_bytes <= outcome.limit_bytes) == (trial.size <= row.largest or trial.size < (row.failing or 0))
    late = run_limits(case, "pairs", ["trl"], CPU, limit_bytes=12_000_000, seconds=30.0, deadline=0.0)
    assert late.rows[0].status == "unavailable" and "time limit" in late.rows[0].message


def test_curves_of_exact_arithmetic_are_one_curve():
    outcome = run_curves(SMALL, LOSSES, CPU, steps=3, learning_rate=1e-3)
    trl = outcome.row("trl")
    assert len(outcome.rows) == len(LOSSES) + 3 and all(len(r.losses) == 3 for r in outcome.rows)
    assert all(distance(r.losses, trl.losses) < 1e-5 for r in outcome.rows)
    assert abs(trl.losses[2] - trl.losses[0]) > 1e-3  # something is learnt
    with pytest.raises(ValueError):
        distance([1.0], [1.0, 2.0])


def test_a_curve_is_as_near_to_trls_as_its_head_in_float32_is():
    """Other tiles of the vocabulary do not change the rounding of the logits, a float32 head does."""
    outcome = run_curves(replace(SMALL, precision="bf16"), ["trl", "trl+patch", "logitless"], CPU, steps=6)
    assert outcome.noise is not None and outcome.noise > 0
    assert all(outcome.over_noise(outcome.row(name)) < 3 for name in ("trl+patch", "logitless"))
    as_float32 = outcome.row("trl:float32-head").losses
    assert distance(outcome.row("trl+patch").losses[:1], as_float32[:1]) < 0.1 * distance(
        outcome.row("trl").losses[:1], as_float32[:1]
    )
    assert len(targets(outcome)) == 2


def _outcome(case: TrainCase, **seconds: float) -> StepOutcome:
    rows = [StepRow(name.replace("__", ":"), seconds=[s], floor=name.startswith("body")) for name, s in seconds.items()]
    return StepOutcome(case, rows, [10, 20], 30, 15, 1000)


def test_what_is_derived_from_times():
    outcome = _outcome(HEADLINE, body=0.5, trl=1.0, logitless=0.625, logitless__packed=2.0)
    assert outcome.speedup(outcome.row("logitless")) == 1.6
    assert outcome.head_share(outcome.row("trl")) == 0.5
    assert outcome.head_share(outcome.row("logitless")) == pytest.approx(0.2)
    assert outcome.head_share(outcome.row("logitless:packed")) is None  # there is no body laid out alike
    first, second = targets(outcome)
    assert first.met and first.value == 1.6 and "logitless" in first.what
    assert second.met is False and second.value == 0.5 and "logitless:packed" in second.what
    assert outcome.as_dict()["rows"][1]["tokens_per_second"] == 30
    assert [t.met for t in targets(_outcome(HEADLINE, body=0.5))] == [None, None]


def test_predictions_are_the_documented_ones():
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "scripts" / "predict_training.py")]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert table in (root / "docs" / "training.md").read_text(), "scripts/predict_training.py --write"


def test_predictions_know_the_flop_of_a_decoder():
    from transformers import AutoModelForCausalLM

    for name in MODELS:
        config, length = make_config(name, tiny=True), 24
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        linear, attention = decoder_flops(config, [length, length])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.model(torch.zeros(2, length, dtype=torch.int64))
        assert counter.get_total_flops() == linear + 2 * attention  # torch counts what is masked, too


def test_predictions_say_what_can_be_gained():
    found = predict(HEADLINE)
    assert found.speedup("trl") == 1.0 and found.speedup("logitless:packed") > found.speedup("logitless") > 1.0
    assert found.seconds("trl") == pytest.approx(found.decoders["padded"] + found.heads["trl"] + found.optimizer)
    same = predict(replace(HEADLINE, profile="fixed"))
    assert same.seconds("logitless:packed") == same.seconds("logitless")
    assert predict(replace(HEADLINE, method="orpo")).speedup("trl+patch") > 1.05 > predict(HEADLINE).speedup("trl+patch")
    frozen, trained = predict(replace(HEADLINE, model="llama-3-8b-lora")), predict(replace(HEADLINE, model="llama-3.2-1b"))
    assert frozen.optimizer == 0 < trained.optimizer
    twice = Gpu(**{**asdict(constants()["sm_90"]), "bf16_flops": 1.4e15})
    assert predict(HEADLINE, twice).decoders["padded"] == pytest.approx(found.decoders["padded"] / 2)


def test_models_have_the_sizes_that_their_names_say():
    """Parameters, to the digits of the names; on no device, so nothing is allocated."""
    from transformers import AutoModelForCausalLM

    expected = {"qwen3-0.6b": 0.596e9, "llama-3.2-1b": 1.236e9, "qwen2.5-1.5b": 1.544e9, "llama-3-8b-lora": 8.03e9}
    assert set(expected) == set(MODELS)
    for name, count in expected.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(make_config(name, tiny=False))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=2e-3)


def test_the_command_writes_what_it_measured(tmp_path, capsys):
    arguments = ["--tiny", "--suite", "steps", "largest", "--model", "qwen3-0.6b", "--method", "dpo", "--rounds", "1"]
    more = ["--pairs", "2", "--length", "32", "--profile", "chat", "--limit-gb", "0.012", "--out", str(tmp_path)]
    assert main([*arguments, *more, "--arms", "trl", "logitless"]) == 0
    said = capsys.readouterr().out
    assert "trl" in said and "target" in said
    steps = json.loads((tmp_path / "cpu-training-steps.json").read_text())
    assert [c["method"] for c in steps["cases"]] == ["dpo"]  # the same case but once
    rows = {r["arm"]: r for r in steps["cases"][0]["rows"]}
    assert rows["logitless"]["speedup_over_trl"] == rows["trl"]["median_seconds"] / rows["logitless"]["median_seconds"]
    assert steps["environment"]["versions"]["trl"] and steps["cases"][0]["targets"]
    largest = json.loads((tmp_path / "cpu-training-largest.json").read_text())
    assert largest["cases"][0]["of"] == "pairs" and largest["cases"][0]["limit_bytes"] == 12_000_000
    pytest.importorskip("matplotlib")
    assert (tmp_path / "cpu-training-steps.png").stat().st_size > 5000
    write_figure(tmp_path / "again.png", steps["cases"], "here")
    assert (tmp_path / "again.png").exists()


def test_readme_gets_the_figures_of_a_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import training_figures

    readme, picture = tmp_path / "README.md", tmp_path / "docs" / "training.png"
    readme.write_text("before\n<!-- training -->\nold\n<!-- /training -->\nafter\n")
    picture.parent.mkdir()
    training_figures.write(None, readme, picture)
    assert training_figures.NOTHING in readme.read_text() and "old" not in readme.read_text()
    results = tmp_path / "results"
    options = ["--length", "32", "--rounds", "1", "--steps", "2", "--limit-gb", "0.012", "--out", str(results)]
    suites = ["steps", "longest", "curves"]
    arms = ["--arms", "body", "trl", "logitless"]
    assert main(["--tiny", "--suite", *suites, "--model", "qwen3-0.6b", "--method", "dpo", *arms, *options]) == 0
    for _ in range(2):  # the second time changes nothing
        training_figures.write(results, readme, picture)
        text = readme.read_text()
        assert text.startswith("before\n<!-- training -->\n") and text.endswith("<!-- /training -->\nafter\n")
        assert text.count("qwen3-0.6b dpo, 2 x 2 x 32") >= 1 and "| - |" in text  # no arm of patch()
        assert "tokens of the longest sequence (one pair): " in text and "Losses of 2 steps of qwen3-0.6b dpo" in text
    assert text.count("docs/training.png") == (1 if picture.exists() else 0)


def test_a_time_limit_leaves_the_rest_out_and_keeps_what_there_is(tmp_path, capsys):
    arguments = ["--tiny", "--model", "qwen3-0.6b", "--rounds", "1", "--length", "32", "--time-limit", "1e-3"]
    assert main([*arguments, "--arms", "logitless", "--out", str(tmp_path)]) == 0
    assert "left out after 0.001 s: qwen3-0.6b kto" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "cpu-training-steps.json").read_text())["cases"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "nope"], "unknown suite 'nope'; known: steps"),
        (["--arms", "nope"], "unknown arm 'nope'"),
        (["--model", "nope", "--tiny"], "unknown model 'nope'"),
        (["--tiny", "--suite", "curves", "--method", "orpo"], "no case of these suites"),
        (["--tiny", "--rounds", "0"], "--rounds must be more than 0"),
        (["--tiny", "--limit-gb", "-1"], "--limit-gb must be more than 0"),
        (["--tiny", "--length", "3"], "length must be at least 16, got 3"),
        (["--tiny", "--profile", "nope"], "profile must be one of fixed"),
        (["--device", "cpu"], "--tiny"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_wrong_arguments_are_errors_that_say_what_is_accepted(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_the_list_names_every_suite_and_arm(capsys):
    assert main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*SUITES, *ARMS, *MODELS, *METHODS, *PROFILES))


@pytest.mark.parametrize("precision", ["fp32", "bf16-amp"])
def test_sequences_in_one_row_by_torchs_variable_length_attention(precision, monkeypatch):
    """Its kernels are for GPUs; what is done for a sequence stands in for them, so the way there and back is what runs."""
    from torch.nn.attention import varlen

    called = []

    def by_sequence(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        assert q.shape == k.shape == v.shape and cu_q is cu_k and max_q == max_k == int(cu_q.diff().max())
        assert q.dtype == k.dtype == v.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
        assert window_size == (-1, 0) and int(cu_q[-1]) == len(q) and cu_q.dtype == torch.int32
        called.append(len(cu_q) - 1)
        bounds = itertools.pairwise(cu_q.tolist())
        parts = [[t[a:b].transpose(0, 1) for t in (q, k, v)] for a, b in bounds]
        attend = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([attend(*part, is_causal=True, scale=scale).transpose(0, 1) for part in parts])

    monkeypatch.setattr(varlen, "varlen_attn", by_sequence)
    case = replace(SMALL, attention=VARLEN, precision=precision)
    outcome = run_steps(case, ["logitless", "logitless:packed", "body:packed"], CPU, rounds=1)
    assert [row.status for row in outcome.rows] == ["ok"] * 3, [row.message for row in outcome.rows]
    assert outcome.row("logitless:packed").gradient_error < (1e-5 if precision == "fp32" else 0.02)
    assert max(called) == 4  # all sequences of the batch in one call
