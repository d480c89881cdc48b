"""Frozen quantised heads: the bits of the whole dequantised weight, one block of the vocabulary at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import logitless as ll
from logitless.kernels.core.blocking import VOCAB_BLOCK
from logitless.kernels.core.head_weight import read_weight
from logitless.kernels.core.stats import OUTPUTS
from logitless.kernels.core.weight_rows import _ELEMENTS

from ..helpers import make_case
from .test_cost import flops, peak_bytes
from .test_head_weight import MODULES, adapter

pytestmark = pytest.mark.cpu_only("the weights are quantised on the CPU")


def linear(vocab: int, hidden: int, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(hidden, vocab, bias=False, dtype=dtype)
    nn.init.normal_(layer.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    return layer


def torchao_weight(config: str, vocab: int, hidden: int, dtype: torch.dtype, **options: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(linear(vocab, hidden, dtype))
    quantization.quantize_(model, getattr(quantization, config)(**options))
    return model[0].weight


def bitsandbytes_layer(kind: str, vocab: int, hidden: int, dtype: torch.dtype, **options: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    weight = linear(vocab, hidden, dtype).weight.data
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(hidden, vocab, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False)
    else:
        layer = bnb.nn.Linear4bit(hidden, vocab, bias=False, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, module=layer, **options)
    return layer.to("cpu")


def rearranged(vocab: int, hidden: int, dtype: torch.dtype) -> Any:
    """As ``Linear4bit`` rearranges it on CPUs with AVX512-BF16."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = bitsandbytes_layer("nf4", vocab, hidden, dtype).weight
    data, state = bnb.functional._convert_weight_packed_for_cpu(weight.data.clone(), copy.deepcopy(weight.quant_state))
    return bnb.nn.Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True)


def dequantized(weight: Any) -> Tensor:
    """The whole weight, by the library that quantised it."""
    if type(weight).__name__ not in ("Params4bit", "Int8Params"):
        return weight.dequantize()
    bnb = pytest.importorskip("bitsandbytes")
    if type(weight).__name__ == "Int8Params":
        return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return bnb.functional.dequantize_4bit(weight.data, state)
    plain, restored = bnb.functional._convert_weight_packed_for_cpu_inverse(weight.data, copy.deepcopy(state))
    codes = torch.stack((plain.flatten() >> 4, plain.flatten() & 15), dim=1).view(state.shape)
    scales = state.absmax.t().float().repeat_interleave(restored.blocksize, dim=1)
    return (state.code[codes.int()] * scales).to(torch.bfloat16)


#: Blocks of scales that end within a row (50 and 96 are no multiples of 64), scales that are quantised themselves.
KINDS: dict[str, Callable[[int, int, torch.dtype], Any]] = {
    "torchao int8": lambda *s: torchao_weight("Int8WeightOnlyConfig", *s),
    "torchao float8": lambda *s: torchao_weight("Float8WeightOnlyConfig", *s),
    "nf4": lambda *s: bitsandbytes_layer("nf4", *s, compress_statistics=False).weight,
    "nf4 nested": lambda *s: bitsandbytes_layer("nf4", *s).weight,
    "fp4 in blocks of 128": lambda *s: bitsandbytes_layer("fp4", *s, blocksize=128).weight,
    "nf4 stored as bfloat16": lambda *s: bitsandbytes_layer("nf4", *s, quant_storage=torch.bfloat16).weight,
    "bitsandbytes int8": lambda *s: bitsandbytes_layer("int8", *s).weight,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_backend = pytest.mark.parametrize("name", [n for n in ("cpu", "torch") if not ll.available_backends()[n]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("vocab", "hidden"), [(320, 64), (320, 96), (202, 50)])
@every_kind
def test_blocks_and_rows_have_the_bits_of_the_whole(kind, vocab, hidden, dtype):
    weight = KINDS[kind](vocab, hidden, dtype)
    assert_bits(weight, dequantized(weight))


def test_a_weight_that_bitsandbytes_rearranged():
    weight = rearranged(320, 128, torch.bfloat16)
    assert_bits(weight, dequantized(weight))


def assert_bits(weight: Any, whole: Tensor) -> None:
    rows, vocab = read_weight("weight", weight), len(whole)
    assert rows.shape == whole.shape and rows.dtype == whole.dtype
    for v0, v1 in ((0, vocab), (0, 1), (3, 77), (64, 96), (vocab - 5, vocab), (31, vocab - 1)):
        assert torch.equal(rows.block(v0, v1, whole.dtype), whole[v0:v1])
    index = torch.tensor([0, 5, vocab - 1, 5, 33, 64, 17, 16, 31])
    assert torch.equal(rows.index_select(0, index), whole[index])
    assert torch.equal(rows[:77].block(60, 77, whole.dtype), whole[60:77])


@every_backend
@every_kind
def test_results_are_those_of_the_dequantised_weight(kind, name):
    """In float64 and whole; gradients of hidden states and bias too."""
    case = make_case(hidden=50, vocab=202, dtype=torch.float32, bias=True)
    weight = KINDS[kind](202, 50, torch.float32)
    whole = dequantized(weight)
    with ll.settings(backend=name):
        got = ll.linear_logps(case.hidden, weight, case.labels, case.bias, outputs=OUTPUTS)
    wanted = ll.reference_logps(case.hidden, whole, case.labels, case.bias)
    for output in OUTPUTS:
        torch.testing.assert_close(getattr(got, output).double(), getattr(wanted, output).double(), rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad((s.logps + s.entropy).sum(), [case.hidden, case.bias]) for s in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    sums = [ll.sequence_logps(case.hidden, w, case.labels, case.bias) for w in (weight, whole)]
    torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_every_loss_module_and_reference(name):
    loss, given = MODULES[name]
    case, weight = make_case(hidden=50, vocab=202), KINDS["nf4 nested"](202, 50, torch.float32)
    whole = dequantized(weight)
    states = {"ref_hidden": case.hidden.detach()} if "ref_logps" in given else {}
    rest = {k: v for k, v in given.items() if k != "ref_logps"}
    outs = [
        loss(case.hidden, w, case.labels, **(rest | states | {"ref_weight": w} if states else given)) for w in (weight, whole)
    ]
    torch.testing.assert_close(outs[0].loss, outs[1].loss, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(out.loss, case.hidden)[0] for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * float(grads[1].abs().max()))
    assert outs[0].plan.backend == outs[1].plan.backend


@every_kind
def test_an_adapter_over_a_quantised_weight(kind):
    case, (A, B) = make_case(hidden=50, vocab=202), adapter(202, 50)
    weight = KINDS[kind](202, 50, torch.float32)
    got = ll.linear_logps(case.hidden, ll.LoRAWeight(weight, A, B, 2.0), case.labels).logps
    wanted = ll.reference_logps(case.hidden, dequantized(weight).double() + 2 * B.double() @ A.double(), case.labels).logps
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-5)
    grads = [torch.autograd.grad(v.sum(), [case.hidden, A, B]) for v in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["torchao int8", "nf4 nested"])
def test_one_block_is_dequantised_at_a_time(kind):
    """Bytes: those of a plain frozen weight and one block. FLOP: 4 N H V, 2 without gradient."""
    vocab, hidden = 32_000, 64
    case = make_case(hidden=hidden, vocab=vocab, tokens=3, dtype=torch.bfloat16)
    weight, plans = KINDS[kind](vocab, hidden, torch.bfloat16), []

    def module(w: Any = weight) -> None:
        out = ll.FusedLinearSimPOLoss()(case.hidden, w, case.labels)
        plans.append(out.plan)
        out.loss.backward()

    def operator(w: Any = weight) -> None:
        ll.linear_logps(case.hidden, w, case.labels).logps.sum().backward()

    plain = case.weight.detach()
    block, converted = VOCAB_BLOCK * hidden * 2, 4 * _ELEMENTS * 4
    with ll.settings(memory_budget=1 << 20):
        for step in (module, operator):
            assert peak_bytes(step) <= peak_bytes(lambda step=step: step(plain)) + block + converted < vocab * hidden * 2
        assert peak_bytes(module) <= plans[-1].extra_bytes
    unit = int((case.labels != -100).sum()) * vocab * hidden
    assert flops(module) == flops(operator) == 4 * unit
    with torch.no_grad():
        assert flops(lambda: ll.linear_logps(case.hidden, weight, case.labels)) == 2 * unit


def test_other_quantised_weights_are_named():
    case = make_case(hidden=64, vocab=320)
    bnb = pytest.importorskip("bitsandbytes")

    def call(weight: Any) -> None:
        ll.linear_logps(case.hidden, weight, case.labels)

    with pytest.raises(TypeError, match=r"weight quantises or scales activations too \(.*Int8Tensor.act_quant_kwargs"):
        call(torchao_weight("Int8DynamicActivationInt8WeightConfig", 320, 64, torch.float32))
    with pytest.raises(TypeError, match=r"weight is a torchao.*IntxUnpackedToInt8Tensor, which is not accepted"):
        call(torchao_weight("IntxWeightOnlyConfig", 320, 64, torch.float32))
    trained = torchao_weight("Int8WeightOnlyConfig", 320, 64, torch.float32).requires_grad_()
    with pytest.raises(ValueError, match=r"weight is a .*Int8Tensor that requires a gradient: quantised weights are frozen"):
        call(trained)
    with pytest.raises(ValueError, match=r"ref_weight is a .* that requires a gradient"):
        ll.FusedLinearDPOLoss()(case.hidden, case.weight, case.labels, ref_hidden=case.hidden, ref_weight=trained)
    with pytest.raises(ValueError, match="weight is a Params4bit that is not quantised yet"):
        call(bnb.nn.Params4bit(torch.ones(320, 64)))
    with pytest.raises(ValueError, match=r"weight is an Int8Params with torch\.float32 data, not quantised"):
        call(bnb.nn.Int8Params(torch.ones(320, 64), requires_grad=False))
    taken = bitsandbytes_layer("int8", 320, 64, torch.float32)
    taken.eval()(torch.ones(1, 64))
    with pytest.raises(ValueError, match=r"without SCB.*set weight\.SCB = module\.state\.SCB"):
        call(taken.weight)
    taken.weight.SCB = taken.state.SCB
    call(taken.weight)
    with pytest.raises(ValueError, match=r"hidden must have shape \[\.\.\., 96\] to match weight \(320, 96\)"):
        call(bitsandbytes_layer("nf4", 320, 96, torch.float32).weight)


def test_a_tensor_subclass_that_is_unknown_is_named():
    two = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    foreign = type("Scaled", (two,), {"__module__": "somewhere.else"})
    case = make_case()
    with pytest.raises(TypeError, match=r"weight is a somewhere\.else\.Scaled, a tensor subclass that is not accepted"):
        ll.linear_logps(case.hidden, foreign(torch.ones(101, 16), torch.ones(101, 16)), case.labels)
