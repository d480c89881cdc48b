"""The load-balancing loss of mixture-of-experts models in ``model_loss`` and ``at_head``, against the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import logitless as ll

from ..helpers import relative_error
from . import tiny
from .tiny import EPS, VOCAB, make_ids, transformers
from .tiny_images import make_model as make_image_model
from .tiny_images import make_sequences, model_kwargs

KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 3},
    "olmoe": {},
    "granitemoe": {},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "mamba_d_state": 4,
        "mamba_d_conv": 2,
        "mamba_dt_rank": 2,
    },
}
LENGTHS = [9, 5, 0, 7, 4]
ADVANTAGES = torch.tensor([1.0, -1.0, 0.0, 0.5, -0.5])
COEF = 0.3


def make_model(kind: str, **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **KINDS[kind],
        **more,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.4)
    return model


def own_aux_loss(model: Any, ids: list[Tensor]) -> Tensor:
    """The model's own value on a padded batch."""
    values, mask = tiny.padded([i for i in ids if len(i)], "right", extra=3)
    return model(input_ids=values, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert relative_error(found[name], gradient) < 128 * EPS or float((found[name] - gradient).norm()) < 16 * EPS, name


@pytest.mark.parametrize("padding_free", [None, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_routers_loss_and_its_gradient_are_the_models_own(kind, padding_free):
    model, ids = make_model(kind), make_ids(LENGTHS)
    loss, kwargs = ll.FusedLinearGRPOLoss(), {"advantages": ADVANTAGES, "padding_free": padding_free}
    plain = ll.model_loss(model, loss, ll.pack(ids), **kwargs)
    assert plain.aux_loss is None
    of_plain, of_aux = gradients(model, plain.loss), gradients(model, own := own_aux_loss(model, ids))
    out = ll.model_loss(model, loss, ll.pack(ids), aux_loss_coef=COEF, **kwargs)
    torch.testing.assert_close(out.aux_loss.detach(), own.detach(), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(out.loss.detach(), (plain.loss + COEF * own).detach(), rtol=4 * EPS, atol=4 * EPS)
    wanted = {name: of_plain[name] + COEF * of_aux.get(name, 0) for name in of_plain}
    assert any(".gate" in name or "router" in name for name in of_aux)
    assert_same(gradients(model, out.loss), wanted)


@pytest.mark.parametrize("how", ["config", "kwarg"])
def test_a_model_that_returns_the_loss_has_it_handed_over_and_not_added(how):
    model, ids = make_model("mixtral", output_router_logits=how == "config"), make_ids(LENGTHS)
    more = {} if how == "config" else {"model_kwargs": {"output_router_logits": True}}
    out = ll.model_loss(model, ll.FusedLinearGRPOLoss(), ll.pack(ids), advantages=ADVANTAGES, **more)
    model.config.output_router_logits = False
    plain = ll.model_loss(model, ll.FusedLinearGRPOLoss(), ll.pack(ids), advantages=ADVANTAGES)
    assert torch.equal(out.loss, plain.loss)
    torch.testing.assert_close(out.aux_loss, own_aux_loss(model, ids), rtol=4 * EPS, atol=0)
    assert_same(gradients(model, out.aux_loss), gradients(model, own_aux_loss(model, ids)))


def test_every_family_of_losses_carries_it():
    model, ids = make_model("mixtral"), make_ids([9, 5, 7, 4])
    packed, own = ll.pack(ids), own_aux_loss(model, ids).detach()
    ref = torch.full((4,), -20.0)
    objective = ll.Objective(ll.FusedLinearSimPOLoss(), sequences=[0, 1, 2, 3], weight=0.5)
    for loss, inputs in [
        (ll.FusedLinearDPOLoss(), {"ref_logps": ref}),
        (ll.FusedLinearKTOLoss(), {"ref_logps": ref, "desirable": torch.tensor([True, False, True, False]), "kl": 0.1}),
        (ll.FusedLinearMultiObjectiveLoss(), {"objectives": {"a": objective}}),
        (ll.FusedLinearPPOLoss(), {"advantages": torch.ones(25)}),
    ]:
        with torch.no_grad():
            plain = ll.model_loss(model, loss, packed, **inputs)
            out = ll.model_loss(model, loss, packed, aux_loss_coef=COEF, **inputs)
        torch.testing.assert_close(out.aux_loss, own, rtol=4 * EPS, atol=0)
        torch.testing.assert_close(out.loss, plain.loss + COEF * own, rtol=4 * EPS, atol=4 * EPS)


def test_images_and_routers_together():
    model, sequences = make_image_model("qwen3_vl_moe"), make_sequences("qwen3_vl_moe", [1, 2])
    kwargs = model_kwargs(sequences)
    more = {"model_kwargs": kwargs | {"mm_token_type_ids": torch.cat([s.types for s in sequences])}}
    packed, advantages = ll.pack([s.ids for s in sequences]), torch.tensor([1.0, -1.0])
    out = ll.model_loss(model, ll.FusedLinearGRPOLoss(), packed, advantages=advantages, aux_loss_coef=COEF, **more)
    values, mask = tiny.padded([s.ids for s in sequences], "left")
    types, _ = tiny.padded([s.types for s in sequences], "left")
    own = model(input_ids=values, attention_mask=mask, mm_token_type_ids=types, output_router_logits=True, **kwargs).aux_loss
    torch.testing.assert_close(out.aux_loss.detach(), own.detach(), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("how", ["checkpointing", "lora", "bfloat16"])
def test_it_is_trained_as_the_model_would(how):
    model, ids = make_model("mixtral"), make_ids(LENGTHS)
    if how == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    elif how == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    else:
        model = model.bfloat16()
    out = ll.model_loss(model, ll.FusedLinearGRPOLoss(), ll.pack(ids), advantages=ADVANTAGES, aux_loss_coef=COEF)
    own = own_aux_loss(model, ids)
    if how == "bfloat16":
        exact = own_aux_loss(model.float(), ids)
        assert abs(float(out.aux_loss - exact)) <= 2 * abs(float(own - exact)) + 1e-3
        return
    torch.testing.assert_close(out.aux_loss.detach(), own.detach(), rtol=4 * EPS, atol=0)
    assert_same(gradients(model, out.aux_loss), gradients(model, own))


def test_nothing_to_score_has_a_routers_loss_of_zero():
    model = make_model("mixtral")
    out = ll.model_loss(model, ll.FusedLinearGRPOLoss(), ll.pack([[], []]), advantages=torch.ones(2), aux_loss_coef=COEF)
    assert out.loss == 0 and out.aux_loss == 0
    assert all((g == 0).all() for g in gradients(model, out.loss).values())


def test_a_function_at_the_head_gets_it_beside_its_result():
    model, ids = make_model("mixtral"), make_ids(LENGTHS)
    shape, aux = ll.at_head(model, ll.pack(ids), lambda at: at.hidden.shape, aux_loss=True, output_router_logits=True)
    assert shape == (25, 16)
    torch.testing.assert_close(aux, own_aux_loss(model, ids), rtol=4 * EPS, atol=0)
    assert ll.at_head(model, ll.pack(ids), lambda at: 3, aux_loss=True) == (3, None)


def _loss(model: Any, **more: Any) -> Any:
    return ll.model_loss(model, ll.FusedLinearGRPOLoss(), ll.pack(make_ids(LENGTHS)), advantages=ADVANTAGES, **more)


@pytest.mark.parametrize(
    ("kind", "more", "error", "message"),
    [
        ("llama", {"aux_loss_coef": 0.1}, ValueError, "aux_loss_coef=0.1: LlamaForCausalLM has no routers"),
        ("mixtral", {"aux_loss_coef": "0.1"}, TypeError, "aux_loss_coef must be a number or None, got '0.1'"),
        ("mixtral", {"aux_loss_coef": True}, TypeError, "aux_loss_coef must be a number or None, got True"),
        ("mixtral", {"aux_loss_coef": float("nan")}, ValueError, "aux_loss_coef must be finite, got nan"),
        (
            "mixtral",
            {"aux_loss_coef": 0.1, "model_kwargs": {"output_router_logits": False}},
            ValueError,
            "aux_loss_coef=0.1 contradicts output_router_logits=False",
        ),
    ],
)
def test_a_bad_coefficient_is_an_error_that_names_it(kind, more, error, message):
    model = make_model(kind) if kind in KINDS else tiny.make_model(kind)
    with pytest.raises(error, match=message):
        _loss(model, **more)


def test_a_loss_that_would_be_lost_is_an_error():
    model, packed = make_model("mixtral"), ll.pack(make_ids(LENGTHS))
    with pytest.raises(ValueError, match="output_router_logits=True: pass aux_loss=True as well"):
        ll.at_head(model, packed, lambda at: at.hidden, output_router_logits=True)
    with pytest.raises(TypeError, match="aux_loss must be True or False, got None"):
        ll.at_head(model, packed, lambda at: at.hidden, aux_loss=None)
