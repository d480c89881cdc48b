"""Images and other arguments of a model's forward, against plain forward passes of one sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import logitless as ll

from ..helpers import relative_error
from . import tiny
from .tiny import EPS, VOCAB, gradients, make_ids, transformers
from .tiny_images import CLIP, IMAGE, KINDS, TEXT, Sequence, make_model, make_sequences, model_kwargs, plain_logps

IMAGES = [1, 0, 2]


def assert_like(model: Any, found: Tensor, expected: Tensor) -> None:
    """Values and gradients of all parameters agree up to rounding."""
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * EPS * max(1.0, float(expected.detach().abs().max())))
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    wanted = gradients(model, expected, weights)
    got = gradients(model, found, weights)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert relative_error(got[name], gradient) < 128 * EPS or float((got[name] - gradient).norm()) < 64 * EPS, name


def kwargs_of(kind: str, sequences: list[Sequence]) -> dict[str, Any]:
    """Pixels, and token types as a list."""
    types = KINDS[kind].types
    return model_kwargs(sequences) | ({types: [s.types for s in sequences]} if types else {})


def padded(values: list[Tensor], side: str, extra: int = 2) -> Tensor:
    width = max(map(len, values)) + extra
    out = values[0].new_zeros(len(values), width, *values[0].shape[1:])
    for row, value in enumerate(values):
        out[row, slice(0, len(value)) if side == "right" else slice(width - len(value), width)] = value
    return out


def init(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or not parameter.any():  # zeros would close a gate
                nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_and_gradients_with_images_are_the_models_own(kind):
    model, sequences = make_model(kind), make_sequences(kind, IMAGES)
    found = ll.model_logps(model, [s.ids for s in sequences], **kwargs_of(kind, sequences)).logps
    assert_like(model, found, plain_logps(model, kind, sequences))
    images = [p for name, p in model.named_parameters() if "vision" in name or "visual" in name]
    assert images and any(p.requires_grad for p in images)


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3"])
@pytest.mark.parametrize("layout", ["left", "right", "packed", "row", "pack"])
def test_token_types_follow_the_ids_in_every_layout(kind, layout):
    model, sequences = make_model(kind), make_sequences(kind, IMAGES)
    ids, types = [s.ids for s in sequences], [s.types for s in sequences]
    pixels, name = model_kwargs(sequences), KINDS[kind].types
    packed = ll.pack(ids)
    with torch.no_grad():
        expected = plain_logps(model, kind, sequences)
        if layout in ("left", "right"):
            mask = padded([torch.ones_like(i) for i in ids], layout)
            more = {name: padded(types, layout)}
            found = ll.model_logps(model, padded(ids, layout), attention_mask=mask, **more, **pixels).logps[mask.bool()]
        elif layout == "packed":
            found = ll.model_logps(
                model, torch.cat(ids), cu_seqlens=packed.cu_seqlens, **{name: torch.cat(types)}, **pixels
            ).logps
        else:
            more = {name: torch.cat(types) if layout == "pack" else torch.cat(types)[None]}
            found = ll.model_logps(model, packed, shifted=False, **more, **pixels).logps
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * EPS * float(expected.abs().max()))


def test_a_loss_with_images_is_that_of_the_models_log_probabilities():
    kind = "qwen3_vl"
    model, sequences = make_model(kind), make_sequences(kind, [1, 2])
    kwargs = model_kwargs(sequences) | {"mm_token_type_ids": torch.cat([s.types for s in sequences])}
    out = ll.model_loss(
        model, ll.FusedLinearDPOLoss(), ll.pack([s.ids for s in sequences]), ref_logps=torch.zeros(2), model_kwargs=kwargs
    )
    chosen, rejected = (part.sum() for part in plain_logps(model, kind, sequences).split([len(s.ids) for s in sequences]))
    assert_like(model, out.loss[None], -nn.functional.logsigmoid(0.1 * (chosen - rejected))[None])


@pytest.mark.parametrize("how", ["checkpointing", "lora", "bfloat16"])
def test_images_train_as_the_model_does(how):
    kind = "qwen3_vl"
    model, sequences = make_model(kind), make_sequences(kind, IMAGES)
    kwargs = kwargs_of(kind, sequences)
    if how == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    elif how == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "linear_fc1"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    else:
        model = model.bfloat16()
    found = ll.model_logps(model, [s.ids for s in sequences], **kwargs).logps
    expected = plain_logps(model, kind, sequences)
    if how == "bfloat16":  # the model's own rounding of its logits
        exact = plain_logps(model.float(), kind, sequences).detach()
        assert float((found - exact).abs().max()) < 2 * float((expected - exact).abs().max())
        return
    assert_like(model, found, expected)


def test_text_alone_still_runs_as_one_row():
    model, ids = make_model("qwen3_vl"), make_ids()
    assert ll.models.why_not_padding_free(model) == []
    expected = tiny.plain_logps(model, ids)
    found = ll.model_logps(model, ids, padding_free=True).logps
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * EPS * float(expected.detach().abs().max()))


@pytest.mark.parametrize("padding_free", [True, False, None])
def test_token_types_of_a_text_model_are_laid_out_with_the_ids(padding_free):
    model, ids = tiny.make_model("gpt2").eval(), make_ids()
    types = [(i * 7) % VOCAB for i in ids]
    with torch.no_grad():
        expected = []
        for sequence, of in zip(ids, types, strict=True):
            expected.append(torch.zeros(min(1, len(sequence))))
            if len(sequence) > 1:
                logits = model(input_ids=sequence[None], token_type_ids=of[None]).logits[0]
                expected.append(logits.log_softmax(-1)[:-1].gather(1, sequence[1:, None])[:, 0])
        found = [
            ll.model_logps(model, ids, token_type_ids=types, padding_free=padding_free).logps,
            ll.model_logps(model, ids, token_type_ids=[t.tolist() for t in types], padding_free=padding_free).logps,
        ]
        for side in ("left", "right"):
            mask = padded([torch.ones_like(i) for i in ids], side)
            more = {"attention_mask": mask, "token_type_ids": padded(types, side), "padding_free": padding_free}
            found.append(ll.model_logps(model, padded(ids, side), **more).logps[mask.bool()])
    for logps in found:
        torch.testing.assert_close(logps, torch.cat(expected), rtol=0, atol=1e-5)
    nothing = ll.model_logps(model, [[], []], token_type_ids=[[], []], padding_free=padding_free).logps
    assert nothing.shape == (0,)


def test_masks_between_tokens_and_images_follow_left_padded_ids():
    text = {k: v for k, v in TEXT.items() if k != "head_dim"} | {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    vision = {"hidden_size": 8, "attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1}
    vision |= {"image_size": 4, "patch_size": 2, "max_num_tiles": 2, "vision_output_dim": 16}
    vision |= {"supported_aspect_ratios": [[1, 1], [1, 2]], "intermediate_layers_indices": [0]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    model, ids = init(transformers.MllamaForConditionalGeneration(config)), make_ids([6, 4])
    masks = [torch.ones(len(i), 1, 2, dtype=torch.long) for i in ids]
    masks[0][:2], masks[0][3:, :, 1] = 0, 0
    rows = {"pixel_values": torch.randn(2, 1, 2, 3, 4, 4), "aspect_ratio_mask": torch.ones(2, 1, 2).long()}
    rows["aspect_ratio_ids"] = torch.full((2, 1), 2)
    with torch.no_grad():
        expected = []
        for row, sequence in enumerate(ids):
            more = {name: value[row : row + 1] for name, value in rows.items()} | {"cross_attention_mask": masks[row][None]}
            logits = model(input_ids=sequence[None], attention_mask=torch.ones_like(sequence)[None], **more).logits[0]
            expected += [torch.zeros(1), logits.log_softmax(-1)[:-1].gather(1, sequence[1:, None])[:, 0]]
        mask = padded([torch.ones_like(i) for i in ids], "left")
        more = {"attention_mask": mask, "cross_attention_mask": padded(masks, "left"), **rows}
        found = ll.model_logps(model, padded(ids, "left"), **more).logps[mask.bool()]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)


def blip(name: str) -> Any:
    qformer = {"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    qformer |= {"intermediate_size": 16, "max_position_embeddings": 32, "encoder_hidden_size": 8}
    text = {"model_type": "opt", "vocab_size": VOCAB, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "dropout": 0.0}
    config = getattr(transformers, f"{name}Config")(
        vision_config=CLIP, qformer_config=qformer, text_config=text, num_query_tokens=3, image_token_index=IMAGE
    )
    return init(getattr(transformers, f"{name}ForConditionalGeneration")(config))


@pytest.mark.parametrize("name", ["Blip2", "InstructBlip"])
def test_a_model_that_requires_pixels_gets_them_in_its_probes(name):
    model, ids = blip(name), [torch.tensor([IMAGE] * 3 + rest) for rest in ([5, 6, 7, 8], [2, 9])]
    kwargs = {"pixel_values": torch.randn(2, 3, 4, 4)}
    if name == "InstructBlip":
        kwargs["qformer_input_ids"] = torch.tensor([[4, 5, 6, 9, 9, 9, 9], [7, 8, 9, 9, 9, 9, 9]])  # (S, T) by chance
    left, mask = padded(ids, "left", 0), padded([torch.ones_like(i) for i in ids], "left", 0)
    expected = []
    for row, sequence in enumerate(ids):
        more = {k: v[row : row + 1] for k, v in kwargs.items()}
        logits = model(input_ids=sequence[None], attention_mask=torch.ones_like(sequence)[None], **more).logits[0]
        expected += [torch.zeros(1), logits.log_softmax(-1)[:-1].gather(1, sequence[1:, None])[:, 0]]
    assert_like(model, ll.model_logps(model, left, attention_mask=mask, **kwargs).logps[mask.bool()], torch.cat(expected))
    assert "requires pixel_values" in " ".join(ll.models.why_not_padding_free(model))
    with pytest.raises(TypeError, match=rf"{name}ForConditionalGeneration.forward requires pixel_values"):
        ll.model_logps(model, ids)


def test_adapters_chosen_for_each_sequence_go_with_their_rows():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.make_model("llama"), config, adapter_name="one")
    model.add_adapter("two", config)
    model.eval()
    ids, expected = make_ids([6, 4]), []
    with torch.no_grad():
        found = ll.model_logps(model, ids, adapter_names=["one", "two"]).logps
        for name, sequence in zip(("one", "two"), ids, strict=True):
            model.set_adapter(name)
            expected.append(tiny.plain_logps(model, [sequence]))
        later = [torch.arange(len(i)) + 3 for i in ids]  # rotary positions are relative
        elsewhere = ll.model_logps(model, ids, adapter_names=["one", "two"], position_ids=later).logps
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(elsewhere, torch.cat(expected), rtol=0, atol=1e-5)


def careless(what: str) -> Any:
    """A Llava with a flaw that only shows beside images."""
    model = make_model("llava")

    class Careless(type(model)):
        def forward(self, input_ids=None, attention_mask=None, pixel_values=None, **kwargs):
            text = input_ids != IMAGE
            if what == "order":
                input_ids = torch.where(text, (input_ids + input_ids.sum(-1, keepdim=True)) % 50, input_ids)
            else:
                input_ids = torch.where(text, (input_ids + (attention_mask == 0).sum(-1, keepdim=True)) % 50, input_ids)
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, **kwargs)

    model.__class__ = Careless
    return model


@pytest.mark.parametrize(("what", "message"), [("order", "is not causal"), ("padding", "padding to their right")])
def test_a_model_that_no_batch_with_images_is_right_for_is_refused(what, message):
    sequences = make_sequences("llava", IMAGES)
    with pytest.raises(ValueError, match=f"model cannot be used: .*{message}"):
        ll.model_logps(careless(what), [s.ids for s in sequences], **kwargs_of("llava", sequences))


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (
            {"padding_free": True},
            ValueError,
            "padding_free=True cannot be had: pixel_values, image_grid_thw, mm_token_type_ids",
        ),
        (
            {"position_ids": [torch.arange(n) + 5 for n in (14, 3, 28)]},
            ValueError,
            "position_ids cannot be given beside pixel_",
        ),
        (
            {"mm_token_type_ids": torch.zeros(3, 28).long()},
            ValueError,
            r"mm_token_type_ids must be a list .*\[14, 3, 28\], got \(3",
        ),
        ({"labels_of_images": 1}, TypeError, "forward takes no argument labels_of_images"),
        ({"cache": 1}, ValueError, "cache is not to be given"),
        ({"return_dict": False}, ValueError, "return_dict is not to be given"),
        ({"is_causal": False}, ValueError, "is_causal is not to be given"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_argument_beside_images_is_an_error_that_names_it(more, error, message):
    sequences = make_sequences("qwen3_vl", IMAGES)
    with pytest.raises(error, match=message):
        ll.model_logps(make_model("qwen3_vl"), [s.ids for s in sequences], **(kwargs_of("qwen3_vl", sequences) | more))


def test_what_the_library_sets_is_refused_beside_a_pack():
    model, packed = tiny.make_model("llama"), ll.pack(make_ids())
    for name in ("attention_mask", "position_ids", "labels", "input_ids"):
        with pytest.raises(ValueError, match=f"{name} is not to be given"):
            ll.model_loss(model, ll.FusedLinearDPOLoss(), packed, model_kwargs={name: torch.ones(1, 22).long()})


def test_data_of_rows_beside_an_empty_sequence_is_refused():
    sequences = make_sequences("llava", [1])
    with pytest.raises(ValueError, match=r"pixel_values: each sequence must have at least one token, got lengths \[10, 0\]"):
        ll.model_logps(make_model("llava"), [sequences[0].ids, torch.tensor([]).long()], **kwargs_of("llava", sequences))
