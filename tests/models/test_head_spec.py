"""``HeadSpec``: its numbers, and ``from_model``, which measures what a model does to its logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import logitless as ll

EVERY_BACKEND = True

transformers = pytest.importorskip("transformers")

VOCAB = 97
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**TEXT, "head_dim": 8}
#: Prefix of the class names in transformers, config on top of TEXT, the head that it stands for.
MODELS = [
    ("Llama", TEXT, ll.HeadSpec()),
    ("Mistral", TEXT, ll.HeadSpec()),
    ("Qwen2", TEXT, ll.HeadSpec()),
    ("Qwen3", GEMMA, ll.HeadSpec()),
    ("Gemma2", {**GEMMA, "final_logit_softcapping": 3.0}, ll.HeadSpec(softcap=3.0)),
    ("Gemma2", {**GEMMA, "final_logit_softcapping": None}, ll.HeadSpec()),
    ("Gemma3Text", {**GEMMA, "final_logit_softcapping": 2.0}, ll.HeadSpec(softcap=2.0)),
    ("Cohere", {**TEXT, "logit_scale": 0.0625}, ll.HeadSpec(0.0625)),
    ("Cohere2", {**TEXT, "logit_scale": 0.25}, ll.HeadSpec(0.25)),
    ("Granite", {**TEXT, "logits_scaling": 8.0}, ll.HeadSpec(0.125)),
    (
        "MiniCPM3",
        {
            **TEXT,
            "num_key_value_heads": 4,
            "dim_model_base": 8,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
        ll.HeadSpec(0.25),
    ),
    ("HyperCLOVAX", {**TEXT, "logits_scaling": 0.125}, ll.HeadSpec(0.125)),
    (
        "FalconH1",
        {
            **TEXT,
            "lm_head_multiplier": 0.375,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
        ll.HeadSpec(0.375),
    ),
]


def make(name: str, config: dict[str, Any]) -> nn.Module:
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(**config)
    return transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()


def assert_head_reproduces_logits(model: nn.Module, expected: ll.HeadSpec, at_head: ll.HeadSpec | None = None) -> None:
    """linear_logps under the measured specs equals log_softmax of the model's own logits.

    The head's weight is scaled so that logits have a standard deviation of 5: a missing scale or soft-cap shows at once.
    """
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # untied: the hidden states stay as they are
    spec = ll.HeadSpec.from_model(model, at="backbone")
    assert spec == expected
    assert ll.HeadSpec.from_model(model) == ll.HeadSpec.from_model(model, at="head") == (at_head or expected)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        head.weight *= 5 / (nn.functional.linear(hidden, head.weight, head.bias).std() * spec.logit_scale)
        logits = model(input_ids=ids).logits
        found = ll.linear_logps(hidden, head.weight, labels, head.bias, spec).logps
        plain = ll.linear_logps(hidden, head.weight, labels, head.bias).logps
    theirs = logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    # 4 roundings of the largest raw logit
    raw = nn.functional.linear(hidden, head.weight, head.bias).abs().max().item() * spec.logit_scale
    torch.testing.assert_close(found.double(), theirs, rtol=0, atol=4 * 2.0**-23 * raw)
    assert (spec == ll.HeadSpec()) == torch.allclose(plain.double(), theirs, atol=1e-2)


@pytest.mark.parametrize(("name", "config", "expected"), MODELS, ids=[f"{name}-{spec}" for name, _, spec in MODELS])
def test_the_measured_spec_reproduces_the_models_own_logits(name, config, expected):
    # MiniCPM3 divides its hidden states, not its logits
    assert_head_reproduces_logits(make(name, config), expected, ll.HeadSpec() if name == "MiniCPM3" else None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature must be > 0, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be > 0, got -1"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite, got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite, got inf"),
        ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got str '1'"),
        ({"softcap": 0.0}, ValueError, "softcap must be > 0 or None, got 0"),
        ({"softcap": -30.0}, ValueError, "softcap must be > 0 or None, got -30"),
        ({"softcap": math.inf}, ValueError, "softcap must be finite, got inf"),
        ({"softcap": True}, TypeError, "softcap must be a number, got bool True"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale must be finite, got inf"),
        ({"logit_scale": torch.ones(())}, TypeError, "logit_scale must be a number, got Tensor"),
    ],
)
def test_what_no_head_does_is_an_error_that_names_the_argument(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ll.HeadSpec(**arguments)


def test_numbers_are_kept_as_floats():
    spec = ll.HeadSpec(2, 30, 1)
    assert [type(v) for v in (spec.logit_scale, spec.softcap, spec.temperature)] == [float] * 3
    assert spec == ll.HeadSpec(2.0, 30.0, 1.0) and hash(spec) == hash(ll.HeadSpec(2.0, 30.0, 1.0))


@pytest.mark.parametrize(
    "spec", [ll.HeadSpec(), ll.HeadSpec(-0.3, 1 / 3, 0.7), ll.HeadSpec(0.0, None, 1e-3), ll.HeadSpec(vocab_size=151643)]
)
def test_unpack_undoes_pack_exactly(spec):
    packed = spec.pack()
    assert packed.shape == (4,) and packed.dtype == torch.float64 and packed.device.type == "cpu"
    assert ll.HeadSpec.unpack(packed) == spec


def test_with_temperature_changes_that_alone():
    spec = ll.HeadSpec(0.5, 30.0)
    assert spec.with_temperature(0.7) == ll.HeadSpec(0.5, 30.0, 0.7)
    assert spec == ll.HeadSpec(0.5, 30.0)
    assert ll.HeadSpec(vocab_size=7).with_temperature(0.7) == ll.HeadSpec(1.0, None, 0.7, 7)
    with pytest.raises(ValueError, match="temperature"):
        spec.with_temperature(0)


@pytest.mark.parametrize("spec", [ll.HeadSpec(), ll.HeadSpec(0.5), ll.HeadSpec(2.0, 3.0, 0.7), ll.HeadSpec(0.0, 3.0)])
def test_transform_in_place_equals_apply_and_knows_its_derivative(spec):
    r = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
    z = spec.apply(r)
    (slope,) = torch.autograd.grad(z.sum(), r)
    work = r.detach().clone()
    squared = spec.transform_(work)
    torch.testing.assert_close(work, z.detach(), rtol=1e-14, atol=1e-14)
    assert (squared is None) == (spec.softcap is None)
    expected = torch.full_like(work, spec.slope) if squared is None else spec.slope * (1 - squared)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-14)
