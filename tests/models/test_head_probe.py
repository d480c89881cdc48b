"""The measured head: composite models, heads that are not what they seem, and heads given by the caller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import logitless as ll
from logitless.models import at_head, model_logps

from .test_head_spec import GEMMA, TEXT, VOCAB, assert_head_reproduces_logits, make
from .tiny import make_ids, make_model, plain_logps, transformers

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def composite(name: str, **parts: Any) -> nn.Module:
    """A vision-language model of transformers; text_config and vision_config are configs or dicts."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**parts)
    config._attn_implementation = "eager"
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


def text_part(name: str) -> Any:
    """A text config with a scale or a soft-cap, which composite models apply or leave out."""
    return {
        "llama": lambda: transformers.LlamaConfig(**TEXT),
        "gemma2": lambda: transformers.Gemma2Config(**GEMMA, final_logit_softcapping=2.0),
        "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA, final_logit_softcapping=2.0),
        "cohere": lambda: transformers.CohereConfig(**TEXT, logit_scale=0.25),
        "cohere2": lambda: transformers.Cohere2Config(**TEXT, logit_scale=0.25),
        "granite": lambda: transformers.GraniteConfig(**TEXT, logits_scaling=8.0),
    }[name]()


@pytest.mark.parametrize(
    ("name", "text", "vision"),
    [
        ("Llava", "llama", "clip"),
        ("Llava", "gemma2", "clip"),
        ("Llava", "granite", "clip"),
        ("Llava", "cohere", "clip"),
        ("Gemma3", "gemma3", "siglip"),
        ("AyaVision", "cohere2", "siglip"),
        ("Cohere2Vision", "cohere2", "siglip"),
        ("InternVL", "gemma2", "internvl"),
        ("Idefics3", "gemma2", "idefics3"),
        ("Ovis2", "gemma2", "ovis2"),
        ("Qwen2Audio", "cohere", "audio"),
    ],
)
def test_a_composite_does_to_its_logits_what_the_outer_class_does(name, text, vision):
    """The text config has a scale or a soft-cap that these classes do not apply."""
    parts = {
        "clip": lambda: {"vision_config": transformers.CLIPVisionConfig(**VISION)},
        "siglip": lambda: {"vision_config": transformers.SiglipVisionConfig(**VISION)},
        "internvl": lambda: {
            "vision_config": transformers.InternVLVisionConfig(**{**VISION, "image_size": [16, 16], "patch_size": [8, 8]})
        },
        "idefics3": lambda: {"vision_config": transformers.Idefics3VisionConfig(**VISION)},
        "ovis2": lambda: {
            "vision_config": transformers.Ovis2VisionConfig(**VISION, vocab_size=32),
            "hidden_size": 32,
            "vocab_size": VOCAB,
        },
        "audio": lambda: {
            "audio_config": transformers.Qwen2AudioEncoderConfig(
                d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, num_mel_bins=8
            )
        },
    }[vision]()
    assert_head_reproduces_logits(composite(name, text_config=text_part(text), **parts), ll.HeadSpec())


def test_a_composite_over_gemma_or_hyperclova_applies_what_its_text_part_says():
    siglip = transformers.SiglipVisionConfig(**VISION)
    hyperclova = transformers.HyperCLOVAXConfig(**TEXT, logits_scaling=0.125)
    qwen = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    assert_head_reproduces_logits(
        composite("PaliGemma", text_config=text_part("gemma2"), vision_config=siglip, image_token_index=96, projection_dim=32),
        ll.HeadSpec(softcap=2.0),
    )
    assert_head_reproduces_logits(
        composite("HyperCLOVAXVisionV2", text_config=hyperclova, vision_config=qwen), ll.HeadSpec(0.125)
    )


@pytest.fixture
def llama() -> Any:
    return make_model("llama").eval()


def assert_right(model: Any, **options: Any) -> None:
    ids = make_ids([5, 4])
    with torch.no_grad():
        torch.testing.assert_close(model_logps(model, ids, **options).logps, plain_logps(model, ids), rtol=0, atol=2e-5)


class HalvedLinear(nn.Linear):
    """A head that scales its output."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) / 2


@pytest.mark.parametrize("factor", [0.5, 1.25])
def test_a_hook_that_scales_the_heads_output_is_measured(llama, factor):
    assert_right(llama)
    handle = llama.lm_head.register_forward_hook(lambda module, args, output: output * factor)
    assert_right(llama)  # the probe runs again
    assert ll.HeadSpec.from_model(llama).logit_scale == pytest.approx(factor, rel=1e-5)
    handle.remove()
    assert_right(llama)


def test_a_hook_on_the_heads_input_is_part_of_its_input(llama):
    llama.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    assert_right(llama)
    assert ll.HeadSpec.from_model(llama) == ll.HeadSpec()
    assert ll.HeadSpec.from_model(llama, at="backbone").logit_scale == pytest.approx(0.5, rel=1e-5)


def test_a_patched_forward_is_measured(llama):
    plain = llama.lm_head.forward
    llama.lm_head.forward = lambda hidden: 3 * torch.tanh(plain(hidden) / 3)
    assert_right(llama)
    assert ll.HeadSpec.from_model(llama).softcap == pytest.approx(3, rel=1e-4)


def test_a_hook_on_the_models_output_is_measured(llama):
    def double(module: Any, args: Any, output: Any) -> Any:
        output.logits = output.logits * 2
        return output

    llama.register_forward_hook(double)
    assert_right(llama)


def test_a_subclass_of_linear_that_scales_is_refused(llama):
    head = HalvedLinear(16, 61, bias=False)
    llama.lm_head = head
    with pytest.raises(ValueError, match="HalvedLinear"):
        model_logps(llama, make_ids([5, 4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z + torch.arange(61.0), "adds a bias of up to 60 to its logits after the head"),
        (lambda z: z.sin(), "are no scale and soft-cap of hidden @ weight.T"),
        (lambda z: z.clamp(-5, 5), "are no scale and soft-cap of hidden @ weight.T"),
        (
            lambda z: z.index_fill(-1, torch.tensor([7, 9]), -torch.inf),
            "masks 2 of its 61 logits after the head, the first at 7",
        ),
        (lambda z: nn.functional.pad(z, (0, 3)), r"gives its head \(8, 61\) raw logits and returns \(8, 64\) logits"),
        (lambda z: z * torch.nan, "logits of LlamaForCausalLM are not finite"),
    ],
)
def test_what_no_spec_describes_is_an_error_that_says_what_differs(llama, change, message):
    llama.lm_head.register_forward_hook(lambda module, args, output: change(output))
    for call in (lambda: model_logps(llama, make_ids([5, 4])), lambda: ll.HeadSpec.from_model(llama)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("cut", [lambda z: z[..., :50], lambda z: z.index_fill(-1, torch.arange(50, 61), -torch.inf)])
def test_padded_entries_that_the_model_cuts_off_or_masks_do_not_exist(llama, cut):
    ids = [ids.clamp(max=49) for ids in make_ids([5, 4])]
    llama.lm_head.register_forward_hook(lambda module, args, output: cut(output))
    assert ll.HeadSpec.from_model(llama) == ll.HeadSpec(vocab_size=50)
    with torch.no_grad():
        torch.testing.assert_close(model_logps(llama, ids).logps, plain_logps(llama, ids), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="vocab_size is None, but the model returns 50 logits"):
        model_logps(llama, ids, head=ll.HeadSpec())
    with pytest.raises(ValueError, match="labels must be in"):
        model_logps(llama, [[3, 55]])


@pytest.mark.parametrize(
    ("kind", "head", "message"),
    [
        (
            "gemma2",
            ll.HeadSpec(),
            r"softcap is None, but the model's logits have 2.0. Pass head=HeadSpec\(logit_scale=1.0, softcap=2",
        ),
        ("gemma2", ll.HeadSpec(0.5, 2.0), "logit_scale is 0.5, but the model's logits have 1.0"),
        ("granite", ll.HeadSpec(temperature=0.5), r"logit_scale is 1.0, .* 0.25. Pass head=HeadSpec\(.*temperature=0.5"),
    ],
)
def test_a_given_head_that_contradicts_the_model_is_an_error(kind, head, message):
    model = make_model(kind).eval()
    for call in (
        lambda: model_logps(model, [[3, 4, 5]], head=head),
        lambda: at_head(model, ll.pack([[3, 4]]), print, head=head),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_given_head_may_name_padding_that_the_model_leaves_in(llama):
    ids = [[3, 4, 5, 49]]
    with torch.no_grad():
        logits = llama(input_ids=torch.tensor(ids)).logits[0, :-1, :50]
        found = model_logps(llama, ids, head=ll.HeadSpec(vocab_size=50)).logps[1:]
    torch.testing.assert_close(found, logits.log_softmax(-1).gather(1, torch.tensor(ids).mT[1:])[:, 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_any_dtype_gives_the_numbers_of_the_config(kind, dtype):
    model = make_model(kind).eval().to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)  # an untrained model: a soft-cap of 2 is far away
    expected = {"llama": ll.HeadSpec(), "gemma2": ll.HeadSpec(softcap=2.0), "granite": ll.HeadSpec(0.25)}[kind]
    assert ll.HeadSpec.from_model(model) == ll.HeadSpec.from_model(model, at="backbone") == expected


def test_a_layer_between_backbone_and_head_has_a_spec_at_the_head_alone():
    bert = make("Bert", {**TEXT, "is_decoder": True})
    assert ll.HeadSpec.from_model(bert) == ll.HeadSpec()
    with pytest.raises(ValueError, match=r"BertLMHeadModel transforms its backbone's output .* with at=\"head\""):
        ll.HeadSpec.from_model(bert, at="backbone")


def test_the_probe_runs_once_and_leaves_the_model_as_it_was(llama):
    runs: list[int] = []
    handle = llama.model.register_forward_hook(lambda module, args, output: runs.append(1))
    llama.train()
    for _ in range(3):
        model_logps(llama, [[3, 4, 5]], padding_free=False)
    first = len(runs)
    for kwargs in ({"temperature": 0.5}, {"head": ll.HeadSpec()}):
        model_logps(llama, [[3, 4, 5]], padding_free=False, **kwargs)
    assert len(runs) == first + 2
    handle.remove()
    assert llama.training and not llama.lm_head._forward_pre_hooks and not llama.model._forward_hooks
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_temperature_and_inputs_of_from_model(llama):
    assert ll.HeadSpec.from_model(llama, temperature=0.7) == ll.HeadSpec(temperature=0.7)
    assert ll.HeadSpec.from_model(llama, inputs={"input_ids": torch.ones(2, 20, dtype=torch.long)}) == ll.HeadSpec()
    with pytest.raises(ValueError, match='at must be "head" or "backbone", got \'logits\''):
        ll.HeadSpec.from_model(llama, at="logits")
    with pytest.raises(TypeError, match="model must be a transformers causal language model"):
        ll.HeadSpec.from_model(nn.Linear(2, 2))


class Doubled(nn.Module):
    """A wrapper that doubles the logits."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        output = self.module(**inputs)
        output.logits = 2 * output.logits
        return output


def test_what_a_wrapper_does_to_the_logits_is_measured(llama):
    ids = make_ids([5, 4])
    with torch.no_grad():
        for model, temperature in ((llama, 1.0), (Doubled(llama), 0.5), (llama, 1.0)):
            expected = plain_logps(llama, ids, temperature)
            torch.testing.assert_close(model_logps(model, ids).logps, expected, rtol=0, atol=2e-5)


class NeedsMore(nn.Module):
    """A wrapper whose model does not run on token ids alone."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        return self.module(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def test_a_model_that_needs_more_than_ids_is_probed_with_the_callers_inputs(llama):
    model = NeedsMore(llama)
    ids = torch.ones(3, 20, dtype=torch.long)
    spec = ll.HeadSpec.from_model(model, inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert spec == ll.HeadSpec()
    with pytest.raises(TypeError, match="attention_mask"):
        ll.HeadSpec.from_model(model)
