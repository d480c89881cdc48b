"""Models are probed before they run on packed or padded rows, with token ids that they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from logitless.fused.models.attention import why_not_padding_free
from logitless.fused.models.logps import model_logps

from .tiny import VOCAB, assert_like_plain, make_ids, make_model, transformers


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
