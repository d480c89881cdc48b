"""Models are probed before they run on packed or padded rows, with token ids that they have."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from logitless.fused.models.attention import why_not_padding_free
from logitless.fused.models.logps import model_logps

from .tiny import VOCAB, assert_like_plain, make_ids, make_model, plain_logps, transformers


def forgetful(what: str) -> Any:
    """A Llama with a flaw that no attribute tells of."""

    class Forgetful(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, position_ids=None, attention_mask=None, **kwargs):
            if what == "positions":
                position_ids = None
            elif what == "order":  # sees later tokens
                input_ids = input_ids.cumsum(-1).flip(-1) % VOCAB
            elif what == "padding":
                input_ids = (input_ids + (attention_mask == 0).sum(-1, keepdim=True)) % VOCAB
            return super().forward(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **kwargs)

    return Forgetful(make_model("llama").config).eval()


def test_a_model_that_drops_position_ids_is_found_out_by_trying():
    model = forgetful("positions")
    assert "lets the sequences of one row see each other" in why_not_padding_free(model)[0]
    with pytest.raises(ValueError, match="see each other"):
        model_logps(model, make_ids(), padding_free=True)


@pytest.mark.parametrize(("what", "message"), [("order", "is not causal"), ("padding", "padding to their right")])
def test_a_model_that_no_batch_is_right_for_is_refused(what, message):
    with pytest.raises(ValueError, match=message):
        model_logps(forgetful(what), make_ids(), padding_free=False)


@pytest.mark.parametrize("padding_free", [True, False, None])
def test_a_model_that_is_not_causal_is_refused_in_every_layout(padding_free):
    """Its small random weights mix little: less than an eighth of what tells its hidden states apart."""
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.BertLMHeadModel(config).eval()
    with pytest.raises(ValueError, match="model cannot be used: BertLMHeadModel is not causal"):
        model_logps(model, make_ids(), padding_free=padding_free)


def test_a_model_without_context_is_told_from_one_that_mixes_sequences():
    model, ids = make_model("llama"), make_ids()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    (reason,) = why_not_padding_free(model)
    assert "does not react to context" in reason and "lets the sequences" not in reason
    (reason,) = why_not_padding_free(forgetful("positions"))
    assert "lets the sequences of one row see each other" in reason and "react" not in reason
    expected = plain_logps(model, ids)
    torch.testing.assert_close(model_logps(model, ids).logps, expected, rtol=0, atol=1e-5)


def test_a_row_longer_than_a_mask_of_fixed_size_runs_padded(caplog):
    config = transformers.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        max_position_embeddings=16,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        intermediate_size=24,
        attention_dropout=0.0,
        embed_dropout=0.0,
        resid_dropout=0.0,
    )
    model, ids = transformers.GPTNeoForCausalLM(config), make_ids([12, 1, 9])
    with caplog.at_level(logging.DEBUG, logger="logitless"):
        assert_like_plain(model, ids, lambda: model_logps(model, ids).logps)
    assert "right-padded batch: a row of 22 tokens is longer than the model's mask of 16" in caplog.text
    assert_like_plain(model, ids[:2], lambda: model_logps(model, ids[:2], padding_free=True).logps)
    with pytest.raises(ValueError, match="padding_free=True cannot be had: a row of 22 tokens is longer"):
        model_logps(model, ids, padding_free=True)


def prophetnet() -> Any:
    sizes = {"hidden_size": 16, "decoder_ffn_dim": 24, "num_decoder_layers": 1, "num_decoder_attention_heads": 2}
    decoder = {"is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False}
    config = transformers.ProphetNetConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes, **decoder)
    return transformers.ProphetNetForCausalLM(config)


def diffusion_gemma(canvas_length: int) -> Any:
    """Its head gets the states of a canvas of random tokens, whatever the number of token ids."""
    text = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 8, "layer_types": ["full_attention"], "max_position_embeddings": 64}
    text |= {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    config = transformers.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=canvas_length)
    return transformers.DiffusionGemmaForBlockDiffusion(config).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (prophetnet, r"must pass its head one hidden state per token, \(1, 8, 16\), but .* passes \(1, 2, 8, 16\)"),
        (
            lambda: diffusion_gemma(5),
            r"must pass its head one hidden state per token, \(1, 8, 16\), but .* passes \(1, 5, 16\)",
        ),
        (lambda: diffusion_gemma(8), "DiffusionGemmaForBlockDiffusion is not causal"),  # as many as the probe's tokens
    ],
    ids=["prophetnet", "diffusion", "diffusion-8"],
)
def test_a_head_that_gets_other_states_than_one_per_token_is_an_error(make, message):
    model = make()
    for padding_free in (None, True, False):
        with pytest.raises(ValueError, match=f"model cannot be used: .*{message}"):
            model_logps(model, make_ids(), padding_free=padding_free)


def test_a_head_that_is_called_by_keyword_is_an_error():
    model = make_model("llama")

    class ByKeyword(nn.Linear):
        def __call__(self, hidden):
            return super().__call__(input=hidden)

    model.lm_head.__class__ = ByKeyword
    with pytest.raises(ValueError, match="as its first argument, but LlamaForCausalLM passes keywords"):
        model_logps(model, make_ids())


def test_probes_do_not_depend_on_the_data():
    """Where each forward pass gathers sharded weights, ranks with other data must run as many."""
    passes = []
    for ids, positions in (([], None), ([[5]], None), ([[3, 4, 5], [6, 7]], None), ([[3, 4]], [[4, 5]]), ([[3]] * 40, None)):
        model, calls = make_model("llama", "sdpa"), []
        model.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        for _ in range(2):
            model_logps(model, ids, position_ids=positions)
            passes.append(len(calls))
    assert passes == [passes[0], passes[0] + 1] * 5


def test_trying_a_model_leaves_it_as_it_was():
    model = make_model("llama")
    model.config.attention_dropout = 0.5
    model.train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    why_not_padding_free(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def enlarged_config() -> Any:
    model = make_model("llama")
    model.config.vocab_size = 10 * VOCAB
    return model


def resized_embedding() -> Any:
    """After ``resize_token_embeddings``, with the config of before, as saved beside many a fine-tuned model."""
    model = make_model("llama")
    model.resize_token_embeddings(VOCAB - 20)
    model.config.vocab_size = VOCAB
    return model


@pytest.mark.parametrize("make", [enlarged_config, resized_embedding])
@pytest.mark.parametrize("padding_free", [True, False, None])
def test_a_model_with_fewer_embeddings_than_its_config_says_is_probed_with_ids_that_it_has(make, padding_free):
    model = make()
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows < model.config.vocab_size
    ids = [sequence % rows for sequence in make_ids()]
    assert why_not_padding_free(model) == []
    assert_like_plain(model, ids, lambda: model_logps(model, ids, padding_free=padding_free).logps)


def test_a_pad_token_without_an_embedding_pads_no_batch():
    model, ids = make_model("llama"), make_ids()
    model.config.pad_token_id = VOCAB + 3
    assert_like_plain(model, ids, lambda: model_logps(model, ids, padding_free=False).logps)
