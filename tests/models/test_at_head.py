"""``at_head`` and ``model_loss``: losses where a Hugging Face model would have called its head; and the page on policies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import logitless as ll
from logitless.fused.policy.losses.grpo import GRPO_LOSSES

PAGE = Path(__file__).parents[2] / "docs" / "policy.md"
SEQUENCES = [[5, 6, 7, 8, 9], [10, 11], [12], [], [13, 14, 15, 16]]
EPS = torch.finfo(torch.float32).eps
#: Limits of a loss, of what tokens have, and of gradients: of models in float64, and of those that round to float32 within.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}, {"rtol": 1e-10, "atol": 1e-11}, {"rtol": 1e-8, "atol": 1e-11}
FLOAT32 = {"rtol": EPS, "atol": EPS}, {"rtol": EPS, "atol": EPS}, {"rtol": 1e-5, "atol": 1e-8}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "bloom":  # takes no position ids, so it runs as a right-padded batch
        return BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)).double()
    if name == "gemma2":  # soft-capped logits, tied weights
        caps = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": None}
        config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=3, **caps)
        model = Gemma2ForCausalLM(config).double()
        # its eager attention takes the softmax in float32, where the sum over a longer row can have other bits
        model.config._attn_implementation = "sdpa"
        return model
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).double()


def packed() -> ll.PackedSequences:
    return ll.pack(SEQUENCES, prompt_lengths=[2, 1, 0, 0, 1])


def plain(model: nn.Module, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the scored tokens, one sequence at a time."""
    logps, entropies = [], []
    for sequence, start in zip(SEQUENCES, (2, 1, 1, 1, 1), strict=True):
        if len(sequence) > start:
            ids = torch.tensor([sequence])
            log_probs = (model(ids).logits[0] / temperature).log_softmax(-1)[start - 1 : -1]
            logps.append(log_probs.gather(1, ids[0, start:, None])[:, 0])
            entropies.append(-(log_probs.exp() * log_probs).sum(-1))
    return torch.cat(logps), torch.cat(entropies)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_a_loss_of_a_model_is_that_of_its_log_probabilities(name):
    model = make(name)
    batch = packed()
    scored = batch.labels != -100
    advantages = torch.randn(len(batch.labels), dtype=torch.float64)
    old = ll.model_logps(model, batch, temperature=0.8, shifted=True).logps.detach()
    assert ((old != 0) == scored).all()
    old = old + 0.1 * torch.randn_like(old)
    loss = ll.FusedLinearPPOLoss(entropy_coef=0.1, metrics=True)
    out = ll.model_loss(model, loss, batch, temperature=0.8, advantages=advantages, old_logps=old)
    out.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logps, entropies = plain(model, 0.8)
    ratios = (logps - old[scored]).exp()
    losses = torch.maximum(-advantages[scored] * ratios, -advantages[scored] * ratios.clamp(0.8, 1.2))
    wanted = (losses - 0.1 * entropies).mean()
    wanted.backward()
    # Gemma 2 takes norms and softmax in float32, whose sums have other bits in another place and on another CPU
    of_loss, of_tokens, of_gradients = FLOAT32 if name == "gemma2" else FLOAT64
    torch.testing.assert_close(out.loss, wanted.detach(), **of_loss)
    torch.testing.assert_close(out.logps[scored], logps.detach(), **of_tokens)
    torch.testing.assert_close(out.entropies[scored], entropies.detach(), **of_tokens)
    for n, p in model.named_parameters():
        torch.testing.assert_close(found[n], p.grad, **of_gradients)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo"])
def test_preference_losses_of_a_model(kind, padding_free):
    model, sequences = make("llama"), [SEQUENCES[0], SEQUENCES[4], SEQUENCES[1], SEQUENCES[4][:3]]
    batch = ll.pack(sequences, prompt_lengths=[2, 1, 1, 1])
    ref_logps = torch.tensor([-9.0, -10.0, -5.0, -8.0], dtype=torch.float64)
    more = {"dpo": {"ref_logps": ref_logps}, "orpo": {"nll_labels": ll.pack(sequences).labels}}
    more["kto"] = {"ref_logps": ref_logps, "desirable": torch.tensor([True, False, False, True]), "kl": 0.3}
    modules = {"dpo": ll.FusedLinearDPOLoss(), "kto": ll.FusedLinearKTOLoss(), "orpo": ll.FusedLinearORPOLoss()}
    out = ll.model_loss(model, modules[kind], batch, padding_free=padding_free, **more[kind])
    out.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    tokens = [model(torch.tensor([s])).logits[0, :-1].log_softmax(-1) for s in sequences]
    tokens = [t.gather(1, torch.tensor(s[1:])[:, None])[:, 0] for t, s in zip(tokens, sequences, strict=True)]
    scored = [t[start - 1 :] for t, start in zip(tokens, (2, 1, 1, 1), strict=True)]
    ratios = torch.stack([t.sum() for t in scored]) - ref_logps
    if kind == "dpo":
        wanted = -nn.functional.logsigmoid(0.1 * (ratios[:2] - ratios[2:])).mean()
    elif kind == "kto":
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
        wanted = (1 - torch.sigmoid(0.1 * signs * (ratios - 0.3))).mean()
    else:
        means = torch.stack([t.mean() for t in scored])
        odds = means - torch.log1p(-means.exp())
        nll = -torch.cat(tokens[:2]).mean()
        wanted = nll - 0.1 * nn.functional.logsigmoid(odds[:2] - odds[2:]).mean()
    wanted.backward()
    torch.testing.assert_close(out.loss, wanted.detach(), rtol=1e-11, atol=1e-12)
    for n, p in model.named_parameters():
        torch.testing.assert_close(found[n], p.grad, rtol=1e-8, atol=1e-11)


def test_a_weighted_sum_of_objectives_of_a_model():
    model, batch = make("llama"), ll.pack([SEQUENCES[0], SEQUENCES[4], SEQUENCES[1], SEQUENCES[4][:3]])
    parts = {"a": ll.FusedLinearSimPOLoss(), "b": ll.FusedLinearCPOLoss()}
    objectives = {name: ll.Objective(loss, sequences=[0, 1, 2, 3], weight=0.5) for name, loss in parts.items()}
    out = ll.model_loss(model, ll.FusedLinearMultiObjectiveLoss(), batch, objectives=objectives)
    single = [ll.model_loss(model, loss, batch).loss.detach() for loss in parts.values()]
    torch.testing.assert_close(out.loss.detach(), 0.5 * sum(single), rtol=1e-11, atol=1e-12)
    out.loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("padding_free", [True, False])
def test_what_a_function_gets_at_the_head(padding_free):
    model, batch, value_head = make("llama"), packed(), nn.Linear(32, 1).double()

    def fn(at: ll.models.AtHead):
        assert at.weight is model.lm_head.weight and at.bias is None and at.head == ll.HeadSpec(temperature=0.5)
        assert torch.equal(at.labels, batch.labels) and torch.equal(at.cu_seqlens, batch.cu_seqlens)
        return at.hidden, value_head(at.hidden)[:, 0]

    hidden, values = ll.at_head(model, batch, fn, temperature=0.5, padding_free=padding_free)
    assert hidden.shape == (12, 32) and values.shape == (12,)
    alone = [model.model(torch.tensor([s])).last_hidden_state[0] for s in SEQUENCES if s]
    torch.testing.assert_close(hidden, torch.cat(alone), rtol=1e-9, atol=1e-10)
    values.sum().backward()
    assert value_head.weight.grad is not None and model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert model.lm_head.weight.grad is None


def test_nothing_to_score_still_runs_the_model_and_has_a_gradient_of_zero():
    model, batch = make("llama"), ll.pack([[], []])
    out = ll.model_loss(model, ll.FusedLinearGRPOLoss(), batch, advantages=torch.ones(2))
    out.loss.backward()
    assert out.loss == 0 and model.lm_head.weight.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: ll.at_head(m, [[1, 2]], print), TypeError, "packed must be PackedSequences"),
        (lambda m: ll.at_head(m, packed(), None), TypeError, "fn must be callable"),
        (lambda m: ll.at_head(m, packed(), print, use_cache=True), ValueError, "use_cache is not to be given"),
        (lambda m: ll.model_loss(m, nn.CrossEntropyLoss(), packed()), TypeError, "loss must be a loss module"),
        (lambda m: ll.model_loss(m, ll.FusedLinearDPOLoss(), packed()), ValueError, "even number of sequences"),
        (
            lambda m: ll.model_loss(m, ll.FusedLinearPPOLoss(), packed(), advantages=torch.ones(3)),
            ValueError,
            "advantages",
        ),
        (lambda m: ll.model_loss(m, ll.FusedLinearPPOLoss(), packed(), model_kwargs={"nope": 1}), TypeError, "nope"),
    ],
)
def test_bad_input_is_an_error_that_names_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call(make("llama"))


def test_an_error_within_the_function_leaves_the_model_as_it_was():
    model = make("llama")
    with pytest.raises(ZeroDivisionError):
        ll.at_head(model, packed(), lambda at: 1 / 0)
    assert not model.lm_head._forward_pre_hooks
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 61)


def test_a_function_may_run_the_model_again():
    """As a reference by the same model without its adapters does."""
    model, batch = make("llama"), packed()
    expected = ll.model_logps(model, batch).logps

    def fn(at: ll.models.AtHead) -> torch.Tensor:
        again = ll.model_logps(model, batch).logps
        return again - ll.linear_logps(at.hidden, at.weight, at.labels, at.bias, at.head).logps

    assert ll.at_head(model, batch, fn).abs().max() < 1e-12
    assert torch.equal(ll.model_logps(model, batch).logps, expected)
    assert not model.lm_head._forward_pre_hooks


def test_another_ignore_index_than_the_packs_is_refused():
    batch = ll.pack(SEQUENCES, prompt_lengths=[2, 1, 0, 0, 1], ignore_index=0)
    with pytest.raises(ValueError, match="ignore_index"):
        ll.model_loss(make("llama"), ll.FusedLinearPPOLoss(), batch, advantages=torch.ones(5))
    loss = ll.FusedLinearPPOLoss(ignore_index=0)
    out = ll.model_loss(make("llama"), loss, batch, advantages=torch.ones(12))
    assert ((out.logps != 0) == batch.mask).all()


def test_a_model_that_is_not_finite_is_not_remembered():
    model, batch = make("llama"), packed()
    good = model.lm_head.weight.detach().clone(), model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        ll.model_logps(model, batch)
    with torch.no_grad():
        model.model.norm.weight.copy_(good[1])
    assert ll.model_logps(model, batch).logps.isfinite().all()


def test_examples_of_the_page_on_policies_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), re.DOTALL)
    whole = [b for b in blocks if "import torch" in b]
    assert len(whole) == 1
    exec(compile(whole[0], str(PAGE), "exec"), {})


def test_the_page_on_policies_names_every_loss_type_and_option():
    text = PAGE.read_text(encoding="utf8")
    from logitless.fused.policy.aggregation import AGGREGATIONS
    from logitless.fused.policy.importance import IMPORTANCE_SAMPLING_MODES
    from logitless.fused.policy.losses.ppo import KL_PENALTIES

    for name in (*GRPO_LOSSES, *AGGREGATIONS, *KL_PENALTIES):
        assert f'"{name}"' in text, name
    for name in IMPORTANCE_SAMPLING_MODES:
        assert name in text
