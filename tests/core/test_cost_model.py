"""The cost model for GPUs: a pure function of shapes and constants. Nothing here needs a GPU, and nothing is measured."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import logitless as ll
from logitless.kernels.backends import registry as backends
from logitless.kernels.backends.interface import Call
from logitless.kernels.backends.registry import choose_backend, rank_backends
from logitless.kernels.core import settings
from logitless.kernels.cost_model.costs import Cost, Part, describe
from logitless.kernels.cost_model.gpu_constants import constants, gpu_of, load_constants

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "kernels" / "cost_model" / "gpu_constants.json"
BACKENDS = ("cuda", "torch", "triton")
WORKS = ("forward", "tile", "frozen", "recompute")
N, H, V = 8192, 4096, 151_936
H100 = constants()["sm_90"]


PREDICTIONS = {name: backends.get_backend(name).predict for name in ("cuda", "torch", "triton")}


def predict(name: str, asked: Call, gpu=None) -> Cost:
    """What the backend of that name should take for a call."""
    return PREDICTIONS[name](asked, gpu)


def call(num_tokens: int = N, hidden_size: int = H, vocab_size: int = V, **changes) -> Call:
    """The shape of the tables, with the workspace of the default budget on a GPU."""
    bf16 = torch.bfloat16
    sizes = {"num_tokens": num_tokens, "hidden_size": hidden_size, "vocab_size": vocab_size}
    return Call(torch.device("cuda"), bf16, bf16, **{"workspace": 128 << 20, "architecture": "sm_90"} | sizes | changes)


def plan(**changes) -> ll.Plan:
    shape = {"num_tokens": N, "hidden_size": H, "vocab_size": V, "device": "cuda", "architecture": "sm_90"}
    return ll.plan(**(shape | changes))


def parts(backend: str, asked: Call, gpu=None) -> dict[str, Part]:
    return {p.name: p for p in predict(backend, asked, gpu).parts}


@pytest.fixture
def gpu_backends(monkeypatch) -> None:
    """Three backends that would serve a GPU, none of which is on this machine."""
    torch_backend = backends.get_backend("torch")
    registry = {
        name: replace(
            torch_backend,
            name=name,
            why_not=lambda call: [],
            why_unavailable=lambda: ["it is not here"],
            predict=functools.partial(predict, name),
        )
        for name in ("triton", "cuda", "torch")
    }
    monkeypatch.setattr(backends, "_registry", registry)


def test_figures_worked_out_by_hand():
    """A trainable head on an H100, whole tile: 2 N H V = 10.196 TFLOP a GEMM, at 700 TFLOP/s."""
    gemm = 2 * N * H * V / 7.0e14
    assert gemm == pytest.approx(14.566e-3, rel=1e-4)
    cuda, triton = parts("cuda", call()), parts("triton", call())
    launch = 2e-6
    for name in ("dX GEMM", "dW GEMM"):
        for found in (cuda, triton):
            assert found[name].seconds == pytest.approx(gemm + launch)
            assert found[name].flops == 2 * N * H * V
    assert triton["logits GEMM"].seconds == pytest.approx(gemm / 0.95 + launch)
    # 128 MiB of float32 logits and room for as many more: 2048 tokens by 8192 entries, so 4 x 19 blocks
    assert cuda["logits GEMM"].seconds == pytest.approx(gemm + 76 * launch)
    assert cuda["pass over the logits"].bytes == 6 * N * V == 7_467_958_272
    assert cuda["pass over the logits"].seconds == pytest.approx(6 * N * V / 3.0e12 + 8 * 76 * launch)
    assert parts("torch", call())["pass over the logits"].bytes == 34 * N * V
    # 16 a clock, 132 SMs, 1.68 GHz
    assert triton["exponentials of the epilogue"].seconds == pytest.approx(N * V / (16 * 132 * 1.68e9))
    assert "pass over the logits" not in triton
    assert triton["partial sums"].bytes == 16 * N * 1187  # two float32 for each of 1187 blocks of 128, written and read
    assert cuda["scaling of dW"].bytes == 4 * V * H  # in place
    assert parts("cuda", call(work="forward"))["pass over the logits"].bytes == 4 * N * V


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("work", "gemms"), [("forward", 1), ("tile", 3), ("frozen", 2), ("recompute", 3)])
def test_each_work_counts_its_gemms(backend, work, gemms):
    cost = predict(backend, call(work=work))
    assert cost.flops == gemms * 2 * N * H * V
    assert cost.bytes == sum(p.bytes for p in cost.parts)
    assert cost.seconds == sum(p.seconds for p in cost.parts)
    assert all(p.seconds >= 0 and p.bytes >= 0 for p in cost.parts)


def test_gradients_that_nobody_wants_cost_nothing():
    only_x = predict("cuda", call(train_weight=False))
    only_w = predict("cuda", call(train_hidden=False))
    assert [p.name for p in only_x.parts if "dW" in p.name] == []
    assert only_x.flops == only_w.flops == 2 / 3 * predict("cuda", call()).flops


def test_small_tiles_read_and_write_dw_once_each():
    """8 V H bytes a tile where dW is collected in float32: far more than the products of 69 rows."""
    tiles = 119
    dw = parts("triton", call(tiles=tiles, accumulate=True))["dW GEMM"]
    assert dw.bytes == 2 * N * V + 2 * N * H + 8 * V * H * tiles
    assert dw.seconds > 10 * 2 * N * H * V / 7.0e14


def test_costs_add_up_by_part():
    both = predict("cuda", call(work="forward")) + predict("cuda", call(work="recompute"))
    assert len({p.name for p in both.parts}) == len(both.parts)
    assert both.flops == 4 * 2 * N * H * V
    (logits,) = (p for p in both.parts if p.name == "logits GEMM")
    assert logits.flops == 2 * 2 * N * H * V


def test_dtypes_have_rates_of_their_own():
    f32, f64 = (predict("cuda", replace(call(), dtype=t, weight_dtype=t)).seconds for t in (torch.float32, torch.float64))
    assert predict("cuda", call()).seconds < f32 <= f64
    assert H100.flops(torch.float16) == H100.flops(torch.bfloat16) > H100.flops(torch.float32)


@given(
    backend=st.sampled_from(BACKENDS),
    work=st.sampled_from(WORKS),
    sizes=st.tuples(st.integers(1, 1 << 16), st.integers(1, 1 << 14), st.integers(1, 1 << 18)),
    more=st.tuples(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 50_000)),
    workspace=st.sampled_from([1 << 20, 32 << 20, 128 << 20]),
    architecture=st.sampled_from(["sm_80", "sm_90", "sm_100", "default"]),
)
def test_a_larger_problem_never_takes_less_time(backend, work, sizes, more, workspace, architecture):
    options = {"work": work, "workspace": workspace, "architecture": architecture}
    small = predict(backend, call(*sizes, **options)).seconds
    large = predict(backend, call(*(a + b for a, b in zip(sizes, more, strict=True)), **options)).seconds
    assert large >= small * (1 - 1e-12)


def faster(asked: Call, gpu=None) -> str:
    return min(("triton", "cuda"), key=lambda backend: predict(backend, asked, gpu).seconds)


def test_the_pass_decides_at_small_hidden_sizes_and_the_gemm_at_large_ones():
    choices = [faster(call(hidden_size=h)) for h in (512, 1024, 2048, 4096, 8192, 16384, 32768)]
    assert choices[0] == "triton"
    assert choices[-1] == "cuda"
    assert choices == sorted(choices, reverse=True)  # it changes once


def test_the_choice_follows_the_constants():
    assert faster(call(), H100) == "triton"
    assert faster(call(), replace(H100, triton_gemm=0.8)) == "cuda"
    assert faster(call(), replace(H100, bandwidth=1e13, launch_seconds=1e-7)) == "cuda"
    assert faster(call(hidden_size=16384), replace(H100, triton_gemm=1.0)) == "triton"


@pytest.mark.parametrize("hidden_size", [1024, 32768])
def test_a_gpu_gets_the_backend_with_the_least_predicted_time(gpu_backends, hidden_size):
    asked = call(hidden_size=hidden_size)
    ranked = rank_backends([asked], "auto")
    assert [b.name for b, _ in ranked] == sorted(BACKENDS, key=lambda name: predict(name, asked).seconds)
    assert choose_backend(asked, "auto") is ranked[0][0] is choose_backend(asked, "auto")
    assert choose_backend(asked, "torch").name == "torch"


def test_without_a_prediction_the_order_of_the_registry_holds(gpu_backends, monkeypatch):
    unknown = replace(backends.get_backend("torch"), name="unknown", predict=None)
    registry = {"unknown": unknown, **backends._registry}
    monkeypatch.setattr(backends, "_registry", registry)
    monkeypatch.setattr(settings, "backend_names", set(registry))
    assert [b.name for b, _ in rank_backends([call()], "auto")] == ["triton", "cuda", "torch", "unknown"]
    without_sizes = Call(torch.device("cuda"), torch.bfloat16, torch.bfloat16, architecture="sm_90")
    assert [b.name for b, _ in rank_backends([without_sizes], "auto")] == list(registry)
    with ll.settings(backend="unknown"):
        known = plan()
    assert (known.backend, known.cost, known.alternatives) == ("unknown", None, {})


def test_a_cpu_gets_the_first_that_can_serve_and_no_prediction():
    here = Call(torch.device("cpu"), torch.float32, torch.float32, num_tokens=5, hidden_size=4, vocab_size=9)
    first = next(name for name, reasons in ll.available_backends().items() if not reasons and name in ("cpu", "torch"))
    assert [(b.name, cost) for b, cost in rank_backends([here], "auto")] == [(first, None)]
    planned = ll.plan(num_tokens=5, hidden_size=4, vocab_size=9)
    assert planned.cost is None
    assert planned.alternatives == {}


def test_what_is_not_available_serves_plans_for_elsewhere_alone(gpu_backends):
    assert len(rank_backends([call()], "auto")) == 3
    with pytest.raises(RuntimeError, match="triton: it is not here; cuda: it is not here"):
        rank_backends([call(architecture=None)], "auto")


def test_a_plan_for_a_gpu_that_is_not_here_says_its_choice_in_words(gpu_backends):
    planned = plan()
    assert planned.backend == "triton"
    assert planned.alternatives == {name: predict(name, call()).seconds for name in ("triton", "cuda", "torch")}
    assert planned.cost == predict("triton", call())
    assert planned.cost.flops == planned.flops
    for words in (
        "on sm_90 (nothing measured) triton should take 46.2 ms: its three GEMMs take 44.5 ms",
        "cuda would take 48.8 ms: 3.7 ms more for its pass over the logits, which moves 7.5 GB more",
        "torch would take 63.0 ms",
    ):
        assert words in planned.reason
        assert words in str(planned)
    large = plan(hidden_size=24576)
    assert large.backend == "cuda"
    assert re.search(r"triton would take \d+\.\d ms: \d+\.\d ms more for its logits GEMM", large.reason)


@pytest.mark.parametrize(
    ("arguments", "flops"),
    [
        ({}, 3),
        ({"train_weight": False}, 2),
        ({"train_weight": False, "train_hidden": False}, 1),
        ({"arbitrary_loss": True}, 4),
        ({"memory_budget": 64 << 20, "num_tokens": 2 * N, "group_sizes": [64] * 256}, 8),
        ({"memory_budget": 256 << 20, "group_sizes": [4096, 2048, 1024, 512, 256, 256]}, None),
    ],
)
def test_the_prediction_counts_the_flop_of_the_plan(gpu_backends, arguments, flops):
    planned = plan(**arguments)
    assert planned.cost.flops == pytest.approx(planned.flops)
    assert flops is None or planned.flops == flops * 2 * N * H * V
    assert min(planned.alternatives, key=planned.alternatives.get) == planned.backend
    assert planned.cost.seconds == planned.alternatives[planned.backend]


def test_many_small_tiles_give_way_to_recompute_where_that_is_faster(gpu_backends):
    """Tiles of 69 rows read the weight and add to dW once each; blocks of 8192 tokens by 8192 entries do not."""
    shape = {"num_tokens": 16384, "group_sizes": [64] * 256}
    small, large = plan(**shape, memory_budget=64 << 20), plan(**shape, memory_budget=512 << 20)
    assert (small.schedule, small.passes, small.accumulate) == ("recompute", 8, False)
    assert small.reason.startswith("256 tiles of at most 69 tokens would take")
    assert "recompute with its extra GEMM" in small.reason
    assert (large.schedule, large.passes, large.accumulate) == ("gradient_in_forward", 6, True)
    assert re.search(r"they would take [\d.]+ ms, recompute [\d.]+ ms", large.reason)
    assert small.extra_bytes < large.extra_bytes


def test_linear_logps_may_be_served_by_two_backends(gpu_backends, monkeypatch):
    """Its passes choose one each; a loss module has one for all."""

    def seconds(name: str, asked: Call) -> Cost:
        slow = (name == "cuda") == (asked.work == "forward")
        return Cost(H100, (Part("logits GEMM", 1, 1, 2.0 if slow else 1.0),))

    registry = {n: replace(b, predict=functools.partial(seconds, n)) for n, b in backends._registry.items() if n != "torch"}
    monkeypatch.setattr(backends, "_registry", registry)
    planned = plan(arbitrary_loss=True)
    assert planned.backend == "triton + cuda"
    assert planned.alternatives == {"triton + cuda": 2.0, "triton": 3.0, "cuda": 3.0}
    assert plan(group_sizes=[N], memory_budget=1 << 20).backend in ("triton", "cuda")


@given(budget=st.integers(1, 1 << 30), groups=st.lists(st.integers(0, 3000), max_size=6), margin=st.booleans())
def test_memory_on_a_gpu_is_bounded_whatever_is_chosen(budget, groups, margin):
    n = sum(groups)
    planned = plan(num_tokens=n, group_sizes=groups, memory_budget=budget, margin=margin)
    tiles = [min(s.rows, s.num_tokens) * 2 * V for s in planned.steps if s.schedule != "recompute"]
    partial_sums = 128 * 8 * 1187  # of a block of tokens, which a workspace may be too small for
    gradients = n * H * 4 + V * H * (6 if planned.accumulate else 2)
    assert planned.extra_bytes >= max(tiles, default=0) + planned.options.workspace + partial_sums + gradients
    blocks = 3 * (1 << 19) * 4 + 8192 * H * 4  # of a fixed size
    assert planned.extra_bytes <= budget + n * (8 * H + 400) + V * H * 6 + blocks + partial_sums + 2 * V


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "default"])
def test_the_constants_say_where_they_come_from(architecture):
    gpu = constants()[architecture]
    assert gpu.architecture == architecture
    assert gpu.measured == ("not measured" not in gpu.source)
    assert len(gpu.source) > 60


def test_an_architecture_without_an_entry_gets_the_default(monkeypatch):
    assert gpu_of(torch.device("cuda"), "sm_42") is constants()["default"]
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert gpu_of(torch.device("cuda", 1)) is H100
    assert gpu_of(torch.device("cuda", 1), "sm_80") is constants()["sm_80"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("bandwidth", -1.0, "sm_90.bandwidth must be a positive number, got -1.0"),
        ("bandwidth", "fast", "sm_90.bandwidth must be a positive number, got 'fast'"),
        ("bandwidth", True, "sm_90.bandwidth must be a positive number, got True"),
        ("bf16_flops", float("inf"), "sm_90.bf16_flops must be a positive number, got inf"),
        ("sm_count", 13.5, "sm_90.sm_count must be a positive integer, got 13.5"),
        ("measured", "yes", "sm_90.measured must be true or false, got 'yes'"),
        ("measured", True, "sm_90.date must be text where measured is true, got None"),
        ("source", "", "sm_90.source must be text, got ''"),
        ("date", 2026, "sm_90.date must be text or null, got 2026"),
        ("l2_bytes", None, "sm_90.l2_bytes must be a positive integer, got None"),
        ("tensor_cores", 4, "sm_90.tensor_cores is unknown; the fields are device, source"),
        ("clock_hz", ..., "sm_90.clock_hz is missing; the fields are device, source"),
    ],
)
def test_a_wrong_field_of_the_constants_is_an_error_that_names_it(field, value, words):
    entries = json.loads(FILE.read_text())
    if value is ...:
        del entries["sm_90"][field]
    else:
        entries["sm_90"][field] = value
    with pytest.raises(ValueError, match=re.escape(words)):
        load_constants(json.dumps(entries))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "gpu_constants.json is not JSON"),
        ("[]", "must be an object with an entry 'default'"),
        ('{"sm_90": {}}', "must be an object with an entry 'default'"),
        ('{"default": 3}', "default must be an object, got 3"),
    ],
)
def test_a_file_of_constants_that_is_none_is_an_error(text, words):
    with pytest.raises(ValueError, match=words):
        load_constants(text)


def test_a_measurement_may_replace_an_entry():
    entries = json.loads(FILE.read_text())
    entries["sm_90"] |= {"measured": True, "date": "2026-01-31", "torch_version": "2.11.0", "source": "copy of 4 GiB, ..."}
    gpu = load_constants(json.dumps(entries))["sm_90"]
    assert gpu.measured
    assert "(measured)" in describe("cuda", {"cuda": predict("cuda", call(), gpu)})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"architecture": "sm_42"}, "architecture must be None or one of sm_80, sm_90, sm_100, default, got 'sm_42'"),
        ({"architecture": 90}, "architecture must be None or one of"),
        ({"device": "cpu"}, "architecture='sm_90' needs device='cuda', got device='cpu'"),
    ],
)
def test_a_bad_architecture_is_an_error_that_names_it(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        plan(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_plan_for_a_gpu_on_a_machine_without_one_names_what_could_run():
    planned = plan(architecture=None)
    assert planned.backend == "torch"
    assert "on an unknown GPU" in planned.reason


def test_the_table_of_the_docs_is_what_the_model_says():
    command = [sys.executable, str(ROOT / "scripts" / "predict_step.py")]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert table in (ROOT / "docs" / "kernels.md").read_text(), "scripts/predict_step.py --write"
