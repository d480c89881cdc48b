"""Tiny models of transformers that take images, and sequences with images for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .tiny import VOCAB, transformers

IMAGE, START = 60, 59  # the token that stands for (a part of) an image, and one that may precede images
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
SPECIAL = {"image_token_id": IMAGE, "video_token_id": 58, "vision_start_token_id": START, "vision_end_token_id": 57}
CLIP = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 4,
    "patch_size": 2,
}
QWEN_VISION = {"depth": 1, "in_channels": 3, "patch_size": 2, "temporal_patch_size": 1, "spatial_merge_size": 2, "num_heads": 2}
QWEN2 = {**QWEN_VISION, "embed_dim": 8, "hidden_size": 16, "mlp_ratio": 2}
QWEN2_5 = {**QWEN_VISION, "hidden_size": 8, "intermediate_size": 16, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
QWEN3 = {
    **QWEN_VISION,
    "hidden_size": 8,
    "intermediate_size": 16,
    "out_hidden_size": 16,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}


def _patches(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Images of 4 x 8 patches of Qwen's models, each 2 * 4 tokens after merging."""
    pixels = torch.randn(count * 32, 12, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 8]] * count)}


def _pictures(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 4, 4, generator=generator)}


class Kind(NamedTuple):
    """A class of transformers, its config, tokens of an image, pixels of images, and the name of its token types."""

    model: str
    config: dict[str, Any]
    tokens: int
    pixels: Callable[[int, torch.Generator], dict[str, Tensor]]
    types: str | None


KINDS = {
    "qwen2_vl": Kind(
        "Qwen2VL",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN2, **SPECIAL},
        8,
        _patches,
        "mm_token_type_ids",
    ),
    "qwen2_5_vl": Kind(
        "Qwen2_5_VL",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN2_5, **SPECIAL},
        8,
        _patches,
        "mm_token_type_ids",
    ),
    "qwen3_vl": Kind(
        "Qwen3VL",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN3, **SPECIAL},
        8,
        _patches,
        "mm_token_type_ids",
    ),
    "qwen3_vl_moe": Kind(
        "Qwen3VLMoe",
        {"text_config": {**TEXT, "rope_parameters": MROPE, **MOE}, "vision_config": QWEN3, **SPECIAL},
        8,
        _patches,
        "mm_token_type_ids",
    ),
    "cohere_compass": Kind(
        "CohereCompass",
        {"text_config": {**TEXT, "rope_parameters": {"full_attention": MROPE}}, "vision_config": QWEN3, **SPECIAL},
        8,
        _patches,
        "mm_token_type_ids",
    ),
    "gemma3": Kind(
        "Gemma3",
        {
            "text_config": {**TEXT, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": {**CLIP, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": 57,
        },
        4,
        _pictures,
        "token_type_ids",
    ),
    "llava": Kind(
        "Llava",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**CLIP, "model_type": "clip_vision_model"},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
        4,
        _pictures,
        None,
    ),
}


class Sequence(NamedTuple):
    """A sequence with images, as its kind's model takes it."""

    ids: Tensor  # (T,)
    types: Tensor  # (T,)
    images: int
    pixels: dict[str, Tensor]


def make_model(kind: str) -> Any:
    name, config, *_ = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(getattr(transformers, f"{name}Config")(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.4)
    return model.eval()


def make_sequences(kind: str, images: list[int], seed: int = 0) -> list[Sequence]:
    """Sequences of text around images, each of another length."""
    generator = torch.Generator().manual_seed(seed)
    _, _, tokens, pixels, _ = KINDS[kind]
    found = []
    for row, count in enumerate(images):
        parts = [torch.randint(3, 50, (2 + row,), generator=generator)]
        for _ in range(count):
            parts += [torch.tensor([START]), torch.full((tokens,), IMAGE), torch.randint(3, 50, (3,), generator=generator)]
        ids = torch.cat(parts)
        found.append(Sequence(ids, (ids == IMAGE).long(), count, pixels(count, generator) if count else {}))
    return found


def model_kwargs(sequences: list[Sequence]) -> dict[str, Tensor]:
    """Pixels of all sequences, in order."""
    names = sequences[0].pixels.keys()
    return {name: torch.cat([s.pixels[name] for s in sequences if s.pixels]) for name in names}


def plain_logps(model: Any, kind: str, sequences: list[Sequence]) -> Tensor:
    """Of every token but the first of a sequence, (N,), by plain forward passes of one sequence at a time."""
    types, out = KINDS[kind].types, []
    for s in sequences:
        more = {types: s.types[None]} if types else {}
        logits = model(input_ids=s.ids[None], attention_mask=torch.ones_like(s.ids)[None], use_cache=False, **s.pixels, **more)
        logps = logits.logits[0, :-1].float().log_softmax(-1)
        out += [logps.new_zeros(1), logps.gather(1, s.ids[1:, None])[:, 0]]
    return torch.cat(out)
