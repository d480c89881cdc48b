"""``model_logps`` against plain forward passes of the same model, one sequence at a time."""

from __future__ import annotations

import dataclasses
import logging
import socket
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import logitless as ll
from logitless.fused.models.attention import why_not_padding_free
from logitless.fused.models.logps import model_logps
from logitless.fused.models.packing import PackedSequences, pack
from logitless.kernels.core.stats import OUTPUTS

from ..helpers import relative_error
from .tiny import (
    EPS,
    LENGTHS,
    VOCAB,
    assert_like_plain,
    gradients,
    make_ids,
    make_model,
    padded,
    plain_logits,
    plain_logps,
    transformers,
)

ROW_WITH = [
    *[(kind, "eager") for kind in ("llama", "qwen2", "qwen2-window", "gemma2", "mistral", "phi", "granite", "gpt2")],
    *[(kind, "sdpa") for kind in ("llama", "qwen2", "qwen2-window", "mistral", "gpt2")],
]


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama", "sdpa")


@pytest.mark.parametrize(("kind", "attention"), ROW_WITH)
def test_one_row_gives_what_one_sequence_at_a_time_gives(kind, attention, tmp_path):
    make_model(kind, attention).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention, dtype=torch.float32)
    assert why_not_padding_free(model) == []
    ids = make_ids()
    assert_like_plain(model, ids, lambda: model_logps(model, ids, padding_free=True).logps)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bloom", "opt", "gpt_oss", "mamba"])
def test_a_right_padded_batch_gives_what_one_sequence_at_a_time_gives(kind):
    model = make_model(kind, None if kind == "mamba" else "eager")
    ids = make_ids()
    assert_like_plain(model, ids, lambda: model_logps(model, ids, padding_free=False).logps)


@pytest.mark.parametrize("kind", ["bloom", "opt", "gpt_oss", "mamba"])
def test_a_model_that_would_mix_sequences_runs_padded_and_says_so(kind, caplog):
    model, ids = make_model(kind, None if kind == "mamba" else "eager").eval(), make_ids()
    with torch.no_grad(), caplog.at_level(logging.DEBUG, logger="logitless"):
        logps = model_logps(model, ids).logps
        torch.testing.assert_close(logps, plain_logps(model, ids), rtol=0, atol=1e-5)
    if why_not_padding_free(model):  # of a later transformers it may be right
        assert "packed sequences: right-padded batch: " in caplog.text
        with pytest.raises(ValueError, match="padding_free=True cannot be had: "):
            model_logps(model, ids, padding_free=True)


@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("gemma2", "eager"), ("mistral", "sdpa")])
@pytest.mark.parametrize("changed", [0, 3])
def test_a_segment_does_not_change_a_bit_of_the_others(kind, attention, changed):
    model, ids = make_model(kind, attention).eval(), make_ids()
    other = list(ids)
    other[changed] = (ids[changed] - 3 + 17) % (VOCAB - 3) + 3
    with torch.no_grad():
        a = model_logps(model, pack(ids), outputs=("logps", "entropy"), shifted=False, padding_free=True)
        b = model_logps(model, pack(other), outputs=("logps", "entropy"), shifted=False, padding_free=True)
    mine = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor(LENGTHS)) == changed
    for x, y in ((a.logps, b.logps), (a.entropy, b.entropy)):
        assert torch.equal(x[~mine], y[~mine])
        assert (x[mine][1:] != y[mine][1:]).all()


@pytest.mark.parametrize("padding_free", [True, False])
def test_every_form_of_the_input_gives_the_same(llama, padding_free):
    ids = make_ids()
    packed = pack(ids)
    with torch.no_grad():
        expected = model_logps(llama, ids, padding_free=padding_free).logps

        def logps(*args: Any, **kwargs: Any) -> Tensor:
            return model_logps(llama, *args, padding_free=padding_free, **kwargs).logps

        assert torch.equal(logps([i.tolist() for i in ids]), expected)
        assert torch.equal(logps(packed, shifted=False), expected)
        assert torch.equal(logps(packed)[:-1], expected[1:]) and logps(packed)[-1] == 0
        assert torch.equal(logps(packed), logps(ids, shifted=True))
        unlabelled = PackedSequences(packed.input_ids, packed.position_ids, packed.cu_seqlens, packed.max_seqlen)
        assert torch.equal(logps(unlabelled, shifted=False), expected)
        assert torch.equal(logps(packed.input_ids.int(), cu_seqlens=packed.cu_seqlens), expected)
        for side in ("right", "left"):
            values, mask = padded(ids, side)
            result = logps(values, attention_mask=mask)
            assert result.shape == values.shape
            assert torch.equal(result[mask.bool()], expected)
            assert (result[mask == 0] == 0).all()
        assert torch.equal(logps(ids, position_ids=packed.unpack(packed.position_ids)), expected)


@pytest.mark.parametrize("padding_free", [True, False])
def test_only_what_is_asked_for_is_scored(llama, padding_free):
    ids, prompts = make_ids([5, 3, 4]), [2, 0, 4]
    scored = torch.cat([(torch.arange(len(i)) >= max(1, p)).float() for i, p in zip(ids, prompts, strict=True)])
    labels = [torch.where(torch.arange(len(i)) < p, -7, i) for i, p in zip(ids, prompts, strict=True)]
    kwargs = {"padding_free": padding_free}
    assert_like_plain(llama, ids, lambda: model_logps(llama, ids, prompt_lengths=prompts, **kwargs).logps, scored)
    with torch.no_grad():
        expected = model_logps(llama, ids, prompt_lengths=torch.tensor(prompts), **kwargs).logps
        assert torch.equal(model_logps(llama, ids, labels=labels, ignore_index=-7, **kwargs).logps, expected)
        values, mask = padded(ids, "left")
        padded_labels = torch.full_like(values, -7).masked_scatter(mask.bool(), torch.cat(labels))
        result = model_logps(llama, values, attention_mask=mask, labels=padded_labels, ignore_index=-7, **kwargs).logps
        assert torch.equal(result[mask.bool()], expected)
    assert (expected[scored == 0] == 0).all() and (expected[scored == 1] < 0).all()


def test_every_output_belongs_to_the_distribution_that_the_token_was_drawn_from(llama):
    ids = make_ids([6, 4])
    with torch.no_grad():
        stats = model_logps(llama, ids, outputs=OUTPUTS, padding_free=True)
        start = 0
        for sequence in ids:
            logits = plain_logits(llama, sequence)[:-1]
            probs = logits.softmax(-1)
            here = slice(start + 1, start + len(sequence))
            expected = {
                "entropy": -(probs * probs.log()).sum(-1),
                "mean_logits": logits.mean(-1),
                "log_sum_sq_probs": probs.square().sum(-1).log(),
            }
            for name, value in expected.items():
                torch.testing.assert_close(getattr(stats, name)[here], value, rtol=0, atol=1e-5)
                assert getattr(stats, name)[start] == 0
            assert torch.equal(stats.is_top1[here], logits.argmax(-1) == sequence[1:])
            start += len(sequence)


def test_outputs_that_were_not_asked_for_are_none_and_entropy_has_a_gradient(llama):
    ids = make_ids([5, 6])
    stats = model_logps(llama, ids, outputs="entropy", padding_free=True)
    assert stats.logps is None and stats.is_top1 is None
    found = gradients(llama, stats.entropy, torch.ones(11))
    entropies = []
    for sequence in ids:
        logp = plain_logits(llama, sequence)[:-1].log_softmax(-1)
        entropies.append(-(logp.exp() * logp).sum(-1))
    wanted = gradients(llama, torch.cat(entropies), torch.ones(9))
    assert all(relative_error(found[name], wanted[name]) < 256 * EPS for name in wanted)


@pytest.mark.parametrize("head", [None, ll.HeadSpec(softcap=2.0), ll.HeadSpec(softcap=2.0, temperature=0.5)])
def test_temperature_goes_to_the_head_and_the_model_gives_the_rest(head):
    model, ids = make_model("gemma2").eval(), make_ids([5, 4])
    with torch.no_grad():
        logps = model_logps(model, ids, head=head, temperature=0.5).logps
        torch.testing.assert_close(logps, plain_logps(model, ids, temperature=0.5), rtol=0, atol=2e-5)


def test_the_head_gets_no_rows_and_the_model_is_left_as_it_was(llama):
    ids, widths = make_ids(), []
    handle = llama.lm_head.register_forward_hook(lambda module, args, output: widths.append(tuple(output.shape)))
    for padding_free in (True, False):  # probes run once per model and hooks of its head
        model_logps(llama, ids, padding_free=padding_free)
    widths.clear()
    try:
        model_logps(llama, ids, padding_free=True)
        model_logps(llama, ids, padding_free=False)
    finally:
        handle.remove()
    assert widths == [(1, 0, VOCAB), (4 + 1, 0, VOCAB)]  # five of the six sequences have tokens
    assert llama(input_ids=ids[0][None]).logits.shape == (1, len(ids[0]), VOCAB)


def test_the_hook_goes_when_scoring_fails(llama):
    with pytest.raises(ValueError, match="labels must be in"):
        model_logps(llama, [[3, VOCAB - 1]], labels=[[3, VOCAB]])
    assert llama(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, VOCAB)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("ids", [[], [[]], [[5]], [[5], [], [6]]], ids=str)
def test_nothing_to_score_gives_zeros_and_a_gradient_of_zero(llama, ids, padding_free):
    logps = model_logps(llama, ids, padding_free=padding_free).logps
    assert logps.tolist() == [0.0] * sum(map(len, ids))
    assert all((g == 0).all() for g in gradients(llama, logps, torch.ones_like(logps)).values())
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert model_logps(llama, empty, attention_mask=empty, padding_free=padding_free).logps.shape == (2, 0)


def test_sdpa_runs_one_row_only_where_that_costs_less(llama, caplog):
    with torch.no_grad(), caplog.at_level(logging.DEBUG, logger="logitless"):
        few = model_logps(llama, make_ids([6, 30]))
        assert "one padding-free row" in caplog.text
        caplog.clear()
        many = make_ids([20] * 40)
        logps = model_logps(llama, many).logps
        assert "a row of 800 tokens costs" in caplog.text
    assert few.logps.shape == (36,)
    torch.testing.assert_close(logps, plain_logps(llama, many).detach(), rtol=0, atol=1e-5)


def test_positions_that_start_elsewhere_run_padded():
    model, ids = make_model("gpt2").eval(), make_ids([5, 4])
    positions = [torch.arange(5) + 3, torch.arange(4) + 8]  # the second runs on from the first
    with torch.no_grad():
        logps = model_logps(model, ids, position_ids=positions).logps
        expected = []
        for sequence, where in zip(ids, positions, strict=True):
            logits = model(input_ids=sequence[None], position_ids=where[None]).logits[0]
            expected += [torch.zeros(1), logits.log_softmax(-1)[:-1].gather(-1, sequence[1:, None])[:, 0]]
    torch.testing.assert_close(logps, torch.cat(expected), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="position_ids do not start at 0"):
        model_logps(model, ids, position_ids=positions, padding_free=True)


def test_gradient_checkpointing_changes_nothing():
    model, ids = make_model("llama", "sdpa"), make_ids()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_like_plain(model, ids, lambda: model_logps(model, ids, padding_free=True).logps)


def test_flex_attention_runs_one_row():
    ids = make_ids([7, 1, 5])
    # torch 2.13 makes C++ of it that does not compile; the functions are the same when they are not compiled
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for kind in ("llama", "mistral"):
            model, plain = make_model(kind, "flex_attention").eval(), make_model(kind, "eager").eval()
            logps = model_logps(model, ids).logps
            torch.testing.assert_close(logps, plain_logps(plain, ids), rtol=0, atol=1e-5)
            assert why_not_padding_free(model) == []


def _varlen_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """Attention within ``cu_seq_lens_q`` and nothing else, as FlashAttention's varlen functions do. query (1, heads, N, d)."""
    assert attention_mask is None
    group, sizes = query.shape[1] // key.shape[1], [query.shape[2]]
    if cu_seq_lens_q is not None:
        assert torch.equal(cu_seq_lens_q, kwargs["cu_seq_lens_k"]) and cu_seq_lens_q.dtype == torch.int32
        sizes = cu_seq_lens_q.diff().tolist()
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(sizes) and min(sizes) > 0
    parts = [t.split(sizes, dim=2) for t in (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))]
    out = [nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in zip(*parts)]
    return torch.cat(out, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("name", ["flash_reference", "varlen_reference"])
def test_flash_attention_gets_its_sequences_by_argument(name):
    transformers.AttentionInterface.register(name, _varlen_attention)
    transformers.AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    model, plain, ids = make_model("llama", "eager").eval(), make_model("llama", "eager").eval(), make_ids()
    model.config._attn_implementation = name  # the method looks for a kernel of that name
    with torch.no_grad():
        logps = model_logps(model, ids).logps
        torch.testing.assert_close(logps, plain_logps(plain, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding_free", [True, False])
def test_lora_and_a_head_that_is_trained_whole(padding_free):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model, ids = peft.get_peft_model(make_model("llama", "sdpa"), config), make_ids()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    assert_like_plain(model, ids, lambda: model_logps(model, ids, padding_free=padding_free).logps)
    with torch.no_grad(), model.disable_adapter():  # the reference of DPO
        reference = model_logps(model, ids, padding_free=padding_free).logps
        torch.testing.assert_close(reference, plain_logps(model, ids), rtol=0, atol=1e-5)
        base = plain_logps(make_model("llama", "sdpa"), ids)
        torch.testing.assert_close(reference, base, rtol=0, atol=1e-5)


def test_lora_on_a_frozen_tied_head():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model, ids = peft.get_peft_model(make_model("qwen2", "sdpa"), config), make_ids()
    assert not model.get_output_embeddings().weight.requires_grad
    assert_like_plain(model, ids, lambda: model_logps(model, ids, padding_free=True).logps)


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt-learning adapter"):
        model_logps(peft.get_peft_model(make_model("llama"), config), make_ids())


def test_distributed_data_parallel_keeps_its_hooks():
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    store = torch.distributed.TCPStore("localhost", port, 1, is_master=True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ids, calls = make_ids(), []
        wrapped = nn.parallel.DistributedDataParallel(make_model("llama", "sdpa"))

        def reduced(state, bucket):  # an annotation as text is refused
            calls.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, reduced)
        weights = torch.randn(sum(LENGTHS))
        found = gradients(wrapped.module, model_logps(wrapped, ids, padding_free=True).logps, weights)
        assert calls
        wanted = gradients(wrapped.module, plain_logps(wrapped.module, ids), weights)
        assert all(relative_error(found[name], wanted[name]) < 128 * EPS for name in wanted)
    finally:
        torch.distributed.destroy_process_group()


def test_autocast_holds_for_the_head_as_for_the_model(llama):
    ids = make_ids([6, 9])
    with torch.no_grad():
        exact = plain_logps(llama, ids)
        with torch.autocast("cpu", torch.bfloat16):
            logps, plain = model_logps(llama, ids, padding_free=True).logps, plain_logps(llama, ids)
    assert logps.dtype == torch.float32
    assert 0 < (logps - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_a_model_compiled_with_its_head_is_refused(llama):
    with pytest.raises(ValueError, match=r"compile the decoder alone, as in model.model.compile\(\)"):
        model_logps(torch.compile(llama), make_ids())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_compiled_decoder_tells_sequences_apart(kind):
    model, ids = make_model(kind, "sdpa"), make_ids([7, 1, 5])
    model.model.compile(backend="eager")
    plain = make_model(kind, "sdpa")
    wanted = gradients(plain, plain_logps(plain, ids), torch.ones(13))
    logps = model_logps(model, ids, padding_free=True).logps
    torch.testing.assert_close(logps, plain_logps(plain, ids), rtol=0, atol=1e-5)
    found = gradients(model, logps, torch.ones(13))
    assert all(relative_error(found[name], wanted[name]) < 128 * EPS for name in wanted)


def _no_head() -> Any:
    model = make_model("llama")
    model.get_output_embeddings = lambda: None
    return model


def _own_head(head: nn.Module) -> Any:
    model = make_model("llama")
    model.lm_head = head
    return model


def _sharded_head() -> Any:
    model = make_model("llama")
    model.lm_head.weight.data = model.lm_head.weight.data[:0, 0]
    return model


class _DoubleLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


TOKENS = [[3, 4, 5], [6, 7]]


def _by_hand(**changes: Tensor) -> PackedSequences:
    return dataclasses.replace(pack(TOKENS), **changes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: model_logps(nn.Linear(3, 3), TOKENS), TypeError, "model must be a transformers causal language model"),
        (lambda m: model_logps("llama", TOKENS), TypeError, "model must be a transformers causal language model, got str"),
        (lambda m: model_logps(_no_head(), TOKENS), ValueError, "model must have a head"),
        (lambda m: model_logps(_own_head(_DoubleLinear(16, VOCAB)), TOKENS), ValueError, "must be an nn.Linear, got .*Double"),
        (lambda m: model_logps(_own_head(nn.Identity()), TOKENS), ValueError, "must be an nn.Linear, got .*Identity"),
        (lambda m: model_logps(_sharded_head(), TOKENS), ValueError, "a weight of shape .0,. when it runs, a shard"),
        (lambda m: model_logps(m, TOKENS, use_cache=True), ValueError, "use_cache is not to be given"),
        (lambda m: model_logps(m, TOKENS, logits_to_keep=1), ValueError, "logits_to_keep is not to be given"),
        (lambda m: model_logps(m, TOKENS, inputs_embeds=1), ValueError, "inputs_embeds is not to be given"),
        (lambda m: model_logps(m, TOKENS, padding_free="auto"), TypeError, "padding_free must be True, False or None"),
        (lambda m: model_logps(m, TOKENS, outputs=("logp",)), ValueError, "outputs must be a non-empty subset"),
        (lambda m: model_logps(m, TOKENS, temperature=0.0), ValueError, "temperature must be > 0"),
        (lambda m: model_logps(m, TOKENS, temperature="1"), TypeError, "temperature must be a number"),
        (lambda m: model_logps(m, TOKENS, head=1.0), TypeError, "head must be a logitless.HeadSpec"),
        (
            lambda m: model_logps(m, TOKENS, head=ll.HeadSpec(temperature=0.5), temperature=0.7),
            ValueError,
            "temperature=0.7 contradicts head.temperature=0.5",
        ),
        (lambda m: model_logps(m, pack(TOKENS), labels=TOKENS), ValueError, "labels: input_ids is a PackedSequences"),
        (lambda m: model_logps(m, pack(TOKENS), prompt_lengths=[1, 1]), ValueError, "prompt_lengths: input_ids is a"),
        (
            lambda m: model_logps(m, _by_hand(labels=torch.arange(5))),
            ValueError,
            "must be ignore_index at the last token of each",
        ),
        (
            lambda m: model_logps(m, _by_hand(position_ids=torch.arange(5)), padding_free=True),
            ValueError,
            "position_ids do not start at 0 in each sequence",
        ),
        (lambda m: model_logps(m, _by_hand(cu_seqlens=torch.tensor([0, 6]).int())), ValueError, "cu_seqlens must start at 0"),
        (lambda m: model_logps(m, pack(TOKENS), ignore_index=-1), ValueError, "ignore_index=-1 contradicts"),
        (lambda m: model_logps(m, TOKENS, prompt_lengths=[4, 0]), ValueError, r"prompt_lengths\[0\] must be between 0 and"),
        (lambda m: model_logps(m, TOKENS, attention_mask=torch.ones(2, 3)), ValueError, "attention_mask is for padded ids"),
        (lambda m: model_logps(m, torch.ones(2, 3)), TypeError, "input_ids must be int32 or int64"),
        (lambda m: model_logps(m, torch.tensor([3, 4])), ValueError, "input_ids must be padded .* without cu_seqlens"),
        (lambda m: model_logps(m, TOKENS, position_ids=[[0, 2, 3], [0, 1]]), ValueError, "position_ids must rise by 1"),
        (lambda m: model_logps(m, TOKENS, position_ids=[[0, 1], [0, 1]]), ValueError, "position_ids must have the lengths"),
        (
            lambda m: model_logps(m, TOKENS, prompt_length=[1, 1]),
            TypeError,
            "LlamaForCausalLM.forward takes no argument prompt_len",
        ),
    ],
)
def test_bad_input_is_an_error_that_names_the_argument_of_model_logps(llama, call, error, message):
    with pytest.raises(error, match=message):
        call(llama)


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder T5ForConditionalGeneration"):
        model_logps(transformers.T5ForConditionalGeneration(config), TOKENS)
