"""Adapters on a model's head, and quantised heads: the values and gradients of the model's own logits, or a named reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import logitless as ll

from ..helpers import relative_error
from .tiny import assert_like_plain, gradients, make_ids, make_model, plain_logps

peft = pytest.importorskip("peft")

#: Mixes the adapter of the head with one inside of the model.
TARGETS = ["q_proj", "lm_head"]


def with_lora(model: Any, **options: Any) -> Any:
    """Adapters with random A and B."""
    config = peft.LoraConfig(**{"r": 3, "target_modules": TARGETS, "init_lora_weights": False, **options})
    return peft.get_peft_model(model, config)


def assert_served(model: Any, padding_free: bool | None = None) -> None:
    ids = make_ids()
    assert_like_plain(model, ids, lambda: ll.model_logps(model, ids, padding_free=padding_free).logps)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "phi"])
def test_lora_on_the_head(kind, padding_free):
    """Soft-cap, logit scale and bias of the head apply to the sum of the base's and the adapter's logits."""
    assert_served(with_lora(make_model(kind)), padding_free)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"lora_bias": True}, {"lora_alpha": 1, "r": 8}], ids=str)
def test_options_of_lora(options):
    assert_served(with_lora(make_model("phi" if "lora_bias" in options else "llama"), **options))


def test_several_active_adapters():
    model = with_lora(make_model("llama"))
    model.add_adapter("second", peft.LoraConfig(r=5, lora_alpha=3, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_served(model)
    model.set_adapter("second")
    assert_like_plain_where_trained(model)


def assert_like_plain_where_trained(model: Any) -> None:
    """The active adapter is on the head alone, so parameters inside of the model have no gradient."""
    ids, weights = make_ids(), torch.randn(sum(map(len, make_ids())), generator=torch.Generator().manual_seed(1))
    expected, found = (gradients(model, f(model, ids), weights) for f in (plain_logps, own_logps))
    assert expected.keys() == found.keys() != set()
    assert max(relative_error(found[name], value) for name, value in expected.items()) < 1e-5


def own_logps(model: Any, ids: list[Tensor]) -> Tensor:
    logps = ll.model_logps(model, ids).logps
    assert logps is not None
    return logps


def test_an_adapter_on_the_head_alone():
    """No parameter before the head is trained: hidden states need no gradient."""
    assert_served(with_lora(make_model("llama"), target_modules=["lm_head"]))


def test_merged_and_disabled_adapters():
    model, ids = with_lora(make_model("llama")).eval(), make_ids()
    unmerged = plain_logps(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(own_logps(model, ids), unmerged, rtol=0, atol=1e-5)
        model.merge_adapter()
        torch.testing.assert_close(own_logps(model, ids), unmerged, rtol=0, atol=2e-5)
        with model.disable_adapter():  # PEFT unmerges
            base = own_logps(model, ids)
            torch.testing.assert_close(base, plain_logps(model, ids), rtol=0, atol=1e-5)
        torch.testing.assert_close(base, plain_logps(make_model("llama"), ids), rtol=0, atol=1e-4)
        torch.testing.assert_close(own_logps(model, ids), unmerged, rtol=0, atol=1e-5)


def test_equal_to_the_merged_weight():
    """In float64 to 1e-6, and far below."""
    model, ids = with_lora(make_model("llama").double()).double(), make_ids()
    head = model.get_output_embeddings()
    adapted = own_logps(model, ids)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    torch.testing.assert_close(adapted, own_logps(merged, ids), rtol=0, atol=1e-12)
    assert head.lora_A["default"].weight.dtype == torch.float64


def test_dropout_is_that_of_the_layer():
    model, ids = with_lora(make_model("llama"), target_modules=["lm_head"], lora_dropout=0.5), [make_ids()[0]]
    model.train()
    scored = [ids[0][:, None].flatten()]

    def seeded(f: Any) -> Tensor:
        torch.manual_seed(3)
        return f(model, scored)

    # one right-padded row without padding: the layer sees the same positions, so the same generator drops the same entries
    torch.testing.assert_close(seeded(own_logps), seeded(plain_logps), rtol=0, atol=1e-5)
    assert not torch.equal(own_logps(model, scored), own_logps(model, scored))
    model.eval()
    assert torch.equal(own_logps(model, scored), own_logps(model, scored))


@pytest.mark.parametrize("loss", [ll.FusedLinearDPOLoss(), ll.FusedLinearORPOLoss(), ll.FusedLinearGRPOLoss(entropy_coef=0.1)])
def test_model_loss(loss):
    """The gradient of A, B and every other parameter, by the loss of the model's own logits."""
    model, ids = with_lora(make_model("llama")), make_ids([6, 5, 7, 4])
    packed = ll.pack(ids, prompt_lengths=[2, 2, 3, 1])
    policy = isinstance(loss, ll.FusedLinearPolicyLoss)
    inputs = {"advantages": torch.tensor([1.0, -1.0, 0.5, 2.0])} if policy else {}
    if isinstance(loss, ll.FusedLinearDPOLoss):
        inputs["ref_logps"] = torch.tensor([-9.0, -8.0, -7.0, -6.0])

    def merged_weight(at: Any) -> Any:
        (adapter,) = at.weight.adapters
        weight = at.weight.base + adapter.scaling * adapter.lora_B @ adapter.lora_A
        return loss(at.hidden, weight, at.labels, bias=at.bias, head=at.head, cu_seqlens=at.cu_seqlens, **inputs).loss

    wanted = gradients(model, ll.at_head(model, packed, merged_weight), torch.ones(()))
    out = ll.model_loss(model, loss, packed, **inputs)
    found = gradients(model, out.loss, torch.ones(()))
    assert found.keys() == wanted.keys() and any("lm_head.lora_A" in name for name in found)
    for name, value in wanted.items():
        assert relative_error(found[name], value) < 2e-5, name


def quantise_head(model: Any, kind: str) -> Any:
    """Quantise the head alone; transformers leaves it out unless asked."""
    head = model.lm_head
    if kind.startswith("torchao"):
        quantization = pytest.importorskip("torchao.quantization")
        config = {"torchao int8": "Int8WeightOnlyConfig", "torchao float8": "Float8WeightOnlyConfig"}[kind]
        quantization.quantize_(model, getattr(quantization, config)(), lambda module, name: module is head)
        return model
    bnb = pytest.importorskip("bitsandbytes")
    shape, weight = (head.in_features, head.out_features), head.weight.data
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False)
    else:
        new = bnb.nn.Linear4bit(*shape, bias=False, quant_type=kind, compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, module=new)
    model.lm_head = new.to("cpu")
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "with LoRA"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8", "torchao float8"])
def test_a_quantised_head(kind, lora):
    """LLM.int8 rounds its input too, except in training on a CPU: there the layer multiplies the dequantised weight."""
    model = quantise_head(make_model("llama"), kind)
    model = with_lora(model) if lora else model
    model.train()
    assert_served(model)
    model.eval()
    with torch.no_grad():  # after a forward pass, which moves the scales of Int8Params and may rearrange Params4bit
        first, second = (own_logps(model, make_ids()) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    packed = ll.pack(make_ids([6, 5]))
    assert ll.at_head(model, packed, lambda at: tuple(at.weight.shape)) == (61, 16)
    assert ll.model_loss(model, ll.FusedLinearSimPOLoss(), packed).loss.requires_grad


def test_heads_that_are_not_served_are_named():
    ids = make_ids()

    def refused(model: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ll.model_logps(model, ids)

    refused(with_lora(make_model("llama"), use_dora=True), "head has the adapter 'default' with DoRA, which scales each row")
    ia3 = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    refused(peft.get_peft_model(make_model("llama"), ia3), r"got peft\.tuners\.ia3\.layer\.Linear; an adapter other than LoRA")
    tokens = peft.TrainableTokensConfig(target_modules=["lm_head"], token_indices=[3, 5])
    refused(peft.get_peft_model(make_model("llama"), tokens), "TrainableTokensLayer; trainable_token_indices replaces rows")
    model = make_model("llama")
    decoupled = type("IdeficsDecoupledLinear", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x) * 2})
    model.lm_head = decoupled(16, 61)
    with pytest.raises(ValueError, match=r"got .*IdeficsDecoupledLinear$"):
        ll.model_logps(model, ids)
    trained = with_lora(make_model("llama"))
    trained.get_output_embeddings().base_layer.weight.requires_grad_()
    refused(trained, "base requires a gradient")
    several = with_lora(make_model("llama"))
    with pytest.raises(ValueError, match="adapter_names is given, and the model's head has adapters"):
        ll.model_logps(several, [i for i in ids if len(i)], padding_free=False, adapter_names=["default"] * 4 + ["__base__"])


def test_as_precise_as_peft_with_a_base_in_bfloat16_and_adapters_in_float32():
    """Against float64 of the same weights and the same hidden states; PEFT rounds the base's logits and the sum."""
    torch.manual_seed(0)
    head = nn.Linear(64, 3000, bias=False, dtype=torch.bfloat16)
    nn.init.normal_(head.weight, std=0.2)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(nn.Sequential(head), config).base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.dtype == B.dtype == torch.float32
    with torch.no_grad():
        A.normal_(std=0.1)
        B.normal_(std=0.1)
    hidden = torch.randn(300, 64, dtype=torch.bfloat16, requires_grad=True)
    labels, weights = torch.randint(3000, (300,)), torch.randn(300)
    leaves = [hidden, A, B]

    def measure(logps: Tensor) -> list[Tensor]:
        return [logps.detach(), *torch.autograd.grad((logps * weights.to(logps.dtype)).sum(), leaves)]

    def gather(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    exact = measure(gather(hidden.double() @ (head.weight.double() + 2 * B.double() @ A.double()).t()))
    theirs = measure(gather(layer(hidden).float()))
    ours = measure(ll.linear_logps(hidden, ll.LoRAWeight(head.weight, A, B, 2.0), labels).logps)
    for name, mine, other, reference in zip(("logps", "hidden", "A", "B"), ours, theirs, exact, strict=True):
        assert relative_error(mine, reference) <= relative_error(other, reference), name
