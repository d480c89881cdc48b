"""What logitless cannot serve runs on TRL's own code under the patch: the same loss and gradients, and one warning."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logitless.fused.models.served import why_not_served
from logitless.integrations import trl as swap

from .tiny import make_model, make_tokenizer, text, training_options

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
cpo = pytest.importorskip("trl.experimental.cpo")
orpo = pytest.importorskip("trl.experimental.orpo")
utils = pytest.importorskip("trl.trainer.utils")

WHOLE_LOGITS = {"cpo": (cpo.CPOTrainer, cpo.CPOConfig), "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig)}
FUSED = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "sft": (trl.SFTTrainer, trl.SFTConfig),
}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    swap.unpatch()
    torch.set_num_threads(threads)


def tilted(hidden: Tensor, logits: Tensor) -> Tensor:
    """What no scale and soft-cap gives."""
    return logits + hidden.mean(-1, keepdim=True) * torch.linspace(-1, 1, logits.shape[-1])


class Shifted(nn.Linear):
    """A head that adds something to its logits."""

    def forward(self, hidden: Tensor) -> Tensor:
        return tilted(hidden, super().forward(hidden))


def of_another_class(model: nn.Module) -> nn.Module:
    head = Shifted(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def with_a_hook(model: nn.Module) -> nn.Module:
    model.lm_head.register_forward_hook(lambda head, args, logits: tilted(args[0], logits))
    return model


def in_float8(model: nn.Module) -> nn.Module:
    """TRL casts a tile of the weight at a time, and takes any dtype."""
    weight = model.lm_head.weight.detach().to(torch.float8_e4m3fn)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def adapter(*targets: str, **options: Any) -> Any:
    return peft.LoraConfig(r=2, target_modules=["q_proj", *targets], init_lora_weights=False, **options)


def make_trainer(kind: str, model: nn.Module, out: Path, peft_config: Any = None, **options: Any) -> Any:
    torch.set_num_threads(1)
    trainer, config = (WHOLE_LOGITS | FUSED)[kind]
    rng = random.Random(0)
    rows = [{name: text(rng, rng.randint(2, 7)) for name in ("prompt", "chosen", "rejected")} for _ in range(4)]
    if kind in ("kto", "sft"):
        label = {"label": True} if kind == "kto" else {}
        rows = [{"prompt": row["prompt"], "completion": row["chosen"], **label} for row in rows]
    options = training_options(out, 1) | options | ({"remove_unused_columns": False} if kind in WHOLE_LOGITS else {})
    data = datasets.Dataset.from_list(rows)
    given = {} if peft_config is None else {"peft_config": peft_config}
    return trainer(model=model, args=config(**options), train_dataset=data, processing_class=make_tokenizer(), **given)


def step(trainer: Any) -> tuple[float, list[Tensor]]:
    """The loss of the first batch, and the gradients of the trained parameters."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    assert found and any(bool((g != 0).any()) for g in found)
    return loss.item(), found


def assert_falls_back(trainer: Any, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """Two steps under the patch are TRL's own to the last bit, with one warning."""
    torch.manual_seed(1)
    loss, gradients = step(trainer)
    with caplog.at_level(logging.WARNING, logger="logitless"), swap.patch():
        for _ in range(2):
            torch.manual_seed(1)
            ours, found = step(trainer)
            assert ours == loss
            assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
    (warning,) = [record.message for record in caplog.records if record.name == "logitless"]
    assert "runs on TRL's own code, not on logitless: " in warning
    assert reason in warning


@pytest.mark.parametrize("kind", WHOLE_LOGITS)
@pytest.mark.parametrize("head", ["dora", "class", "hook"])
def test_trainers_of_whole_logits_fall_back(kind, head, tmp_path, caplog):
    if head == "dora":
        trainer = make_trainer(
            kind, make_model("untied", 0), tmp_path, peft_config=adapter("lm_head", use_dora=True, lora_dropout=0.1)
        )
        reason = why_not_served(trainer.model)
        assert reason is not None
    else:
        change, reason = {"class": (of_another_class, "Shifted"), "hook": (with_a_hook, "the logits of LlamaForCausalLM")}[head]
        trainer = make_trainer(kind, change(make_model("untied", 0)), tmp_path)
    assert_falls_back(trainer, caplog, reason)


@pytest.mark.parametrize("kind", FUSED)
def test_trainers_with_a_fused_head_fall_back(kind, tmp_path, caplog):
    trainer = make_trainer(kind, in_float8(make_model("untied", 0)), tmp_path, peft_config=adapter())
    assert_falls_back(trainer, caplog, "weight must be float64, float32, bfloat16 or float16, got torch.float8_e4m3fn")


def test_every_output_of_the_fused_head_falls_back(caplog):
    """GRPO and RLOO ask for more outputs of the same function."""
    model = in_float8(make_model("untied", 0))
    utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    ids = torch.arange(8).view(2, 4)
    outs = []
    with caplog.at_level(logging.WARNING, logger="logitless"):
        for patched in (False, True):
            with swap.patch() if patched else torch.no_grad():
                outs.append(model(ids, labels=ids, fused_lm_head=True))
    for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
        assert torch.equal(getattr(outs[0], name), getattr(outs[1], name)), name
    assert len([record for record in caplog.records if record.name == "logitless"]) == 1


def test_a_head_of_another_class_is_that_of_trl_where_trl_has_a_fused_head(tmp_path, caplog):
    """TRL's fused head reads the weight alone, with the patch as without."""
    trainer = make_trainer("dpo", of_another_class(make_model("untied", 0)), tmp_path, peft_config=adapter())
    loss, _ = step(trainer)
    with caplog.at_level(logging.WARNING, logger="logitless"), swap.patch():
        assert step(trainer)[0] == pytest.approx(loss, rel=1e-5)
    assert not [record for record in caplog.records if record.name == "logitless"]


@pytest.mark.parametrize("kind", ["sft", "cpo"])
def test_accumulation_divides_by_the_counts_of_trl(kind, tmp_path):
    """SFT divides by the tokens of the whole step; CPO averages micro-batches."""
    runs = []
    for patched in (False, True):
        trainer = make_trainer(
            kind,
            make_model("untied", 0),
            tmp_path / str(patched),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
        )
        with swap.patch() if patched else contextlib.nullcontext():
            trainer.train()
        runs.append(trainer.state.log_history[0])
    for name in ("loss", "grad_norm"):
        assert runs[1][name] == pytest.approx(runs[0][name], rel=2e-5), name


def test_errors_of_a_step_are_not_caught(tmp_path, caplog):
    """Bad input of a model that is served is an error, and no reason to fall back."""
    trainer = make_trainer("cpo", make_model("untied", 0), tmp_path)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch["chosen_labels"] = torch.where(batch["chosen_labels"] >= 0, 10**6, -100)
    with caplog.at_level(logging.WARNING, logger="logitless"), swap.patch():
        with pytest.raises(ValueError, match="labels must be in"):
            trainer.compute_loss(trainer.model, batch)
        with pytest.raises(ValueError, match="temperature must be"):
            swap.LogProbFunction.apply(torch.ones(1, 4), torch.ones(5, 4), None, torch.zeros(1, dtype=torch.long), -1.0, 8)
    assert not [record for record in caplog.records if record.name == "logitless"]


def test_a_model_is_checked_again_when_its_head_changes(caplog):
    model = make_model("untied", 0)
    assert why_not_served(model) is None
    calls: list[Any] = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(0))
    assert why_not_served(model) is None and not calls  # one run for each state of the head
    handle.remove()
    plain = model.lm_head
    assert "Shifted" in str(why_not_served(of_another_class(model)))
    model.lm_head = plain
    assert why_not_served(model) is None
    adapted = peft.get_peft_model(model, adapter("lm_head", use_dora=True))
    assert why_not_served(adapted) is not None
    with adapted.disable_adapter():
        assert why_not_served(adapted) is None
    assert model.training


def test_what_is_no_language_model_has_a_reason():
    assert "transformers causal language model" in str(why_not_served(nn.Linear(2, 2)))
