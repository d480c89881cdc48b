"""Tiny random models of every causal, image-text and multimodal class of transformers, from their default configs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 96
#: Token ids of the sequences are below this; ids with a meaning (images, padding, end of text) are at or above it.
WORDS = 40
WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 2
_MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")

#: Pattern of an attribute's whole name, and the value that replaces a larger one. The first that matches counts.
_SIZES: list[tuple[str, int]] = [
    (r"\w*vocab_size\w*|n_words|num_embeddings|codebook_size|num_embeds|encoder_hash_byte_group_vocab", VOCAB),
    (r"(shape_|pronunciation_)embed_dim|output_embedding_size|word_embed_proj_dim", WIDTH),
    (r"num_experts_per_tok(en)?|moe_top_?k|topk_group|router_top_k|top_k_experts|moe_k|num_activated\w*", 1),
    (r"(n|num)_(local_|routed_)?experts|moe_num_experts|num_local_experts|zero_expert_num", 2),
    (r"\w*shared_experts|n_groups?|num_expert_group|mamba_n_?groups", 1),
    (r"(num_(hidden|decoder|encoder)_|n_|num_|encoder_|decoder_)?layers?|depth|num_blocks|num_layers_per_stack", LAYERS),
    (r"\w*num_key_value_heads\w*|num_kv_heads|kv_n_heads|num_query_groups|indexer_kv_heads|\w*kv_heads", KV_HEADS),
    (r"linear_num_(key|value)_heads|\w*(attention_|n_|num_|linear_num_|index_n_)heads?|num_heads|mamba_(n|num)_heads", HEADS),
    (r"qk_(nope|rope)_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"\w*head_dim|d_kv|d_head|dim_head|attention_head_size|resampler_dim_head|mamba_headdim", HEAD_DIM),
    (r"\w*(q|kv|o)_lora_rank|laurel_rank|d_rel|\w*_rank|attention_adapter_rank", HEAD_DIM),
    (r"\w*(intermediate|ffn_hidden|expert_ffn_hidden|feed_forward)_size\w*|\w*ffn_dim|d_ff|d_inner|dim_ff|mlp_dim", 48),
    (r"(mamba_)?(d_)?(ssm_)?state(_size)?|mamba_d_state|mamba_dt_rank|time_step_rank", HEAD_DIM),
    (r"\w*chunk_size|block_size", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_target_positions|context_length|max_sequence_length|max_seq_len", 32),
    (r"(use_)?sliding_window(_size)?|attention_window_size|window_size", 4),
    (r"base_channels", 32),
    (r"image_size", 32),
    (r"patch_size", 8),
    (
        r"\w*(hidden|embedding|embed|embd|model|emb)(_size|_dim)?|\w*hidden_(size|dim)\w*|d_model|n_embd|projection_dim|dim",
        WIDTH,
    ),
    (r"(out|output|text|vision|merged)_(hidden_size|dim)|input_embedding_size|attention_hidden_size", WIDTH),
]
_RULES = [(re.compile(pattern), value) for pattern, value in _SIZES]
#: What a model may do to its logits, set to values that show. An attribute that a config lacks is left alone.
_LOGITS = {
    "final_logit_softcapping": 2.0,
    "logits_soft_cap": 2.0,
    "output_logit_soft_cap": 2.0,
    "logit_scale": 0.375,
    "logits_scaling": 4.0,
    "lm_head_multiplier": 0.375,
    "output_multiplier": 0.375,
    "logits_mup_width_multiplier": 3.0,
    "unpadded_vocab_size": VOCAB - 6,
    "dim_model_base": 8,
}
#: Image token of the classes that require images, and how many stand for an image.
IMAGE, IMAGE_TOKENS = 80, 2
#: What the defaults of a class need besides: dotted names of config attributes, and their values.
_MROPE = {"text_config.rope_parameters.mrope_section": [4, 2, 2]}
_NO_SHARED_KV = {"num_kv_shared_layers": 0}
_VOCABULARY_MAP = {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91, "IMGIMGBS": 70, "visual 0": 71}}
_ROPES = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}


def _indexer(prefix: str) -> dict[str, int]:
    sizes = {"budget": 8, "compress_ratio": 2, "n_heads": 2, "kv_heads": 1, "head_dim": 16}
    return {f"{prefix}indexer_{name}": size for name, size in sizes.items()}


OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32},
    "ChameleonForConditionalGeneration": _VOCABULARY_MAP,
    "Emu3ForConditionalGeneration": _VOCABULARY_MAP,
    "DiffusionGemmaForBlockDiffusion": {
        "text_config.num_experts": 2,
        "text_config.top_k_experts": 1,
        "text_config.moe_intermediate_size": 48,
    },
    "Dots1ForCausalLM": {"n_routed_experts": 2, "moe_intermediate_size": 48, "n_shared_experts": 1, "num_experts_per_tok": 1},
    "DoryForCausalLM": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 0},
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_n_heads": 4},
    "Gemma3nForCausalLM": _NO_SHARED_KV,
    "Gemma4UnifiedAssistantForCausalLM": {"text_config.num_kv_shared_layers": 0},
    "Glm46VForConditionalGeneration": _MROPE,
    "Glm4vForConditionalGeneration": _MROPE,
    "Glm4vMoeForConditionalGeneration": {"text_config.rope_parameters.mrope_section": [2, 1, 1]},
    "GlmOcrForConditionalGeneration": _MROPE,
    "PaddleOCRVLForConditionalGeneration": _MROPE,
    "Qwen2VLForConditionalGeneration": _MROPE,
    "Qwen2_5_VLForConditionalGeneration": _MROPE,
    "Qwen2_5OmniThinkerForConditionalGeneration": {**_MROPE, "vision_start_token_id": 80},
    "HunYuanVLForConditionalGeneration": _MROPE,
    "GPTNeoForCausalLM": {"max_position_embeddings": 16},  # fewer than the tokens of all sequences
    "Granite4VisionForConditionalGeneration": {"deepstack_layer_map": [(0, 0)], "downsample_rate": "1/2"},
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
    },
    "GraniteSpeechForConditionalGeneration": {"encoder_config.context_size": 8, "encoder_config.max_pos_emb": 8},
    "GraniteSpeechPlusForConditionalGeneration": {"encoder_config.context_size": 8, "encoder_config.max_pos_emb": 8},
    "HrmTextForCausalLM": {"num_hidden_layers": 16},
    "InklingForConditionalGeneration": {"vision_config.num_hidden_layers": 4, "vision_config.patch_size": 4},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KyutaiSpeechToTextForConditionalGeneration": {"codec_config.codebook_size": 64, "codec_config.upsample_groups": 64},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 1,
    },
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16},
    "Qwen4ExpForCausalLM": _indexer(""),
    "Qwen4ExpForConditionalGeneration": _indexer("text_config."),
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ReformerModelWithLMHead": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "num_buckets": 4,
        "attn_layers": ["local", "local"],
    },
    "Step3p7ForConditionalGeneration": {"text_config.sliding_window": 4},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "hybrid_layer_ids": [1],
    },
    "ZambaForCausalLM": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "xLSTMForCausalLM": {"chunk_size": 64},
    "Blip2ForConditionalGeneration": {"image_token_index": IMAGE, "num_query_tokens": IMAGE_TOKENS},
    "InstructBlipForConditionalGeneration": {"image_token_index": IMAGE, "num_query_tokens": IMAGE_TOKENS},
    "InstructBlipVideoForConditionalGeneration": {"video_token_index": IMAGE, "num_query_tokens": IMAGE_TOKENS},
    "Kosmos2ForConditionalGeneration": {"latent_query_num": IMAGE_TOKENS},
    "BltForCausalLM": {"global_config.encoder_cross_output_size": 128},
    "CohereCompassForCausalLM": {"rope_parameters": _ROPES},
    "CohereCompassForConditionalGeneration": {"text_config.rope_parameters": _ROPES},
    "DbrxForCausalLM": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 1},
    "Qwen3OmniMoeForConditionalGeneration": {
        "talker_config.text_config.shared_expert_intermediate_size": 48,
        "talker_config.spatial_merge_size": 2,
    },
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"vision_start_token_id": 80},
    "Mistral4ForCausalLM": {"rope_parameters.partial_rotary_factor": 1.0},
    "Gemma4AssistantForCausalLM": {"text_config.num_kv_shared_layers": LAYERS},
    "LongcatFlashForCausalLM": {"moe_topk": 2},
    "Florence2ForConditionalGeneration": {
        "vision_config.embed_dim": (32, 32, 32, 32),
        "vision_config.num_heads": (4, 4, 4, 4),
        "vision_config.num_groups": (4, 4, 4, 4),
        "vision_config.depths": (1, 1, 1, 1),
    },
    "VibeVoiceAsrForConditionalGeneration": {
        "acoustic_tokenizer_encoder_config.num_filters": 1,
        "semantic_tokenizer_encoder_config.num_filters": 1,
    },
}
#: Classes that have gradients in training mode alone.
TRAINING = {"ReformerModelWithLMHead"}
#: Arguments of the config's constructor, where it makes no valid config without.
CONFIGS: dict[str, dict[str, Any]] = {
    "Gemma4AssistantForCausalLM": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}


def _pixels(ids: list[Tensor], *frames: int) -> Tensor:
    return torch.randn(len(ids), *frames, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def _question(ids: list[Tensor]) -> Tensor:
    return torch.arange(3, 9).repeat(len(ids), 1)


#: Arguments that a class requires beside token ids: tensors by row, or lists of values per token.
INPUTS: dict[str, Callable[[list[Tensor]], dict[str, Any]]] = {
    "Blip2ForConditionalGeneration": lambda ids: {"pixel_values": _pixels(ids)},
    "InstructBlipForConditionalGeneration": lambda ids: {"pixel_values": _pixels(ids), "qformer_input_ids": _question(ids)},
    "InstructBlipVideoForConditionalGeneration": lambda ids: {
        "pixel_values": _pixels(ids, 1),
        "qformer_input_ids": _question(ids),
    },
    "Kosmos2ForConditionalGeneration": lambda ids: {
        "pixel_values": _pixels(ids),
        "image_embeds_position_mask": [(row == IMAGE).long() for row in ids],
    },
}


def every_class() -> dict[str, str]:
    """Model type by name of the class."""
    found: dict[str, str] = {}
    for mapping in _MAPPINGS:
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, model_type)
    return dict(sorted(found.items()))


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and the configs inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def _shrink_lists(config: PreTrainedConfig, layers: set[int]) -> None:
    """Lists with an entry per layer: the first entry, and the first one that differs."""
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) in layers and len(value) > LAYERS:
            other = next((entry for entry in value if entry != value[0]), value[1])
            _put(config, name, type(value)([value[0], other]))


def _put(config: PreTrainedConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Make a config tiny, in place: two layers, width 32, a vocabulary of 96."""
    special: dict[str, int] = {}
    for part in parts(config):
        layers = {v for n, v in vars(part).items() if isinstance(v, int) and _rule(n) == LAYERS and "layer" in n}
        _shrink_lists(part, layers)
        for name, value in list(vars(part).items()):
            if name in _LOGITS:
                _put(part, name, _LOGITS[name])
            elif (
                re.fullmatch(r"\w*(token_id|token_index|_id|_index|token_offset)", name)
                and isinstance(value, int)
                and value >= WORDS
            ):
                _put(part, name, special.setdefault(name, VOCAB - 7 - len(special) % (VOCAB - 7 - WORDS)))
            elif "dropout" in name or "pdrop" in name or "drop_rate" in name or name.endswith("layerdrop"):
                if isinstance(value, float):
                    _put(part, name, 0.0)
            elif type(value) is int and (size := _rule(name)) is not None and value > size:
                _put(part, name, size)
        _fit(part)
    return config


def _fit(part: PreTrainedConfig) -> None:
    """What depends on other values of the same config."""
    values = vars(part)
    if "head_dim" in values and values["head_dim"] is None:
        _put(part, "head_dim", HEAD_DIM)
    if "qk_rope_head_dim" in values:  # multi-head latent attention: head_dim, where a config has it, is the rotated part
        _put(part, "head_dim", values["qk_rope_head_dim"])
    if "num_key_value_heads" in values and (values["num_key_value_heads"] is None or "kv_lora_rank" in values):
        _put(part, "num_key_value_heads", HEADS)
    ropes = values.get("rope_parameters") or {}
    for rope in (ropes, *(r for r in ropes.values() if isinstance(r, dict))):
        if sections := rope.get("mrope_section"):
            total = int(values.get("head_dim", HEAD_DIM) * rope.get("partial_rotary_factor", 1.0)) // 2
            rest = (total // 4,) * (len(sections) - 1)
            rope["mrope_section"] = [total - sum(rest), *rest]


def _rule(name: str) -> int | None:
    return next((value for pattern, value in _RULES if pattern.fullmatch(name)), None)


def build(name: str) -> nn.Module:
    """A tiny model with random weights."""
    cls = getattr(transformers, name)
    # the class's own config: that of a text model may be a part of the model type's
    config_class = cls.config_class or CONFIG_MAPPING[every_class()[name]]
    config = shrink(config_class(**CONFIGS.get(name, {})))
    if "is_decoder" in vars(config):
        config.is_decoder = True
    for path, value in OVERRIDES.get(name, {}).items():
        *folders, last = path.split(".")
        part: Any = config
        for folder in folders:
            part = part[folder] if isinstance(part, dict) else getattr(part, folder)
        if isinstance(part, dict):
            part[last] = value
        else:
            _put(part, part.attribute_map.get(last, last), value)
    torch.manual_seed(0)
    model: nn.Module = cls(config).train(name in TRAINING)
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights under which every layer, every bias and the context of a token show in the logits."""
    g = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        noise = torch.randn(parameter.shape, generator=g)
        if parameter.dim() > 1:
            parameter.copy_(noise * (0.4 if "embed" in name else parameter[0].numel() ** -0.5))
        else:
            parameter.add_(0.1 * noise)


def batch(name: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Ragged sequences of words, after an image where the class requires one, and further arguments. One has a single word."""
    g = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, WORDS, (n,), generator=g) for n in (7, 1, 9, 4)]
    if name not in INPUTS:
        return ids, {}
    ids = [torch.cat((torch.full((IMAGE_TOKENS,), IMAGE), row)) for row in ids]
    return ids, INPUTS[name](ids)


def row_inputs(ids: list[Tensor], inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """The arguments of a plain forward pass of one sequence."""
    own = {name: value[row][None] for name, value in inputs.items()}
    return {"input_ids": ids[row][None], "use_cache": False, **own}


def plain_logps(model: Any, ids: list[Tensor], inputs: dict[str, Any]) -> Tensor:
    """Of every token but the first of a sequence, (N,), by plain forward passes of one sequence at a time."""
    out = []
    for row, sequence in enumerate(ids):
        out.append(torch.zeros(1))
        if len(sequence) > 1:
            logits = model(**row_inputs(ids, inputs, row)).logits[0, -len(sequence) :].float()
            out.append(logits.log_softmax(-1)[:-1].gather(-1, sequence[1:, None])[:, 0])
    return torch.cat(out)


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    logps.backward(torch.randn(len(logps), generator=torch.Generator().manual_seed(3)))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error of a parameter's gradient, relative to its norm or to a hundredth of the norm of all gradients."""
    if found.keys() != expected.keys():
        return math.inf, f"gradients of {', '.join(sorted(found.keys() ^ expected.keys())[:3])}"
    total = math.hypot(*(float(g.norm()) for g in expected.values()))
    return max((float((found[n] - g).norm()) / max(float(g.norm()), total / 100), n) for n, g in expected.items())
