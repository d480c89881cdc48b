"""TRL's CPO and ORPO trainers, which make whole logits, train the same on logitless without any."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import logitless as ll
from logitless.integrations import trl as swap

from .tiny import VOCAB, make_model, make_tokenizer, text, training_options

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
pytest.importorskip("trl")
cpo = pytest.importorskip("trl.experimental.cpo")
orpo = pytest.importorskip("trl.experimental.orpo")

STEPS = 6
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "cpo": (cpo.CPOTrainer, cpo.CPOConfig, {"beta": 0.3}),
    "cpo-hinge-without-nll": (cpo.CPOTrainer, cpo.CPOConfig, {"loss_type": "hinge", "cpo_alpha": 0.0}),
    "cpo-ipo": (cpo.CPOTrainer, cpo.CPOConfig, {"loss_type": "ipo", "label_smoothing": 0.0}),
    "simpo": (cpo.CPOTrainer, cpo.CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}),
    "cpo-simpo": (cpo.CPOTrainer, cpo.CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.5, "beta": 2.0}),
    "alphapo": (cpo.CPOTrainer, cpo.CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.2, "beta": 1.5}),
    "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, {"beta": 0.2}),
}
ORIGINALS = {trainer: trainer.concatenated_forward for trainer in (cpo.CPOTrainer, orpo.ORPOTrainer)}


@pytest.fixture(autouse=True)
def _restored():
    threads = torch.get_num_threads()
    yield
    swap.unpatch()
    torch.set_num_threads(threads)
    assert all(trainer.concatenated_forward is original for trainer, original in ORIGINALS.items())


def sentences(count: int = 24) -> list[dict[str, str]]:
    rng = random.Random(0)
    lengths = [(rng.randint(2, 6), rng.randint(3, 9), rng.randint(3, 9)) for _ in range(count)]
    return [{"prompt": text(rng, p), "chosen": " " + text(rng, c), "rejected": " " + text(rng, r)} for p, c, r in lengths]


def make_trainer(kind: str, model: nn.Module, out: Path, lora: bool = False, **options: Any) -> Any:
    torch.set_num_threads(1)
    trainer, config, own = KINDS[kind]
    common = training_options(out, STEPS) | {"per_device_train_batch_size": 3, "remove_unused_columns": False}
    extra = {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")} if lora else {}
    return trainer(
        model=model,
        args=config(**common | own | options),
        train_dataset=datasets.Dataset.from_list(sentences()),
        processing_class=make_tokenizer(),
        **extra,
    )


def history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class Largest(TorchDispatchMode):
    """The largest number of elements of a tensor whose last dimension is the vocabulary, made by any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == VOCAB:
            self.positions = max(self.positions, out.numel() // VOCAB)
        return out


@pytest.mark.parametrize(
    ("kind", "model", "lora"),
    [
        *((kind, "untied", False) for kind in KINDS),
        ("orpo", "tied", True),
        ("simpo", "softcap", False),
        ("cpo", "bias", False),
    ],
)
def test_training_logs_the_same(kind, model, lora, tmp_path):
    theirs = history(make_trainer(kind, make_model(model, 0), tmp_path / "a", lora))
    trainer = make_trainer(kind, make_model(model, 0), tmp_path / "b", lora)
    with swap.patch():  # a trainer that exists already runs on it
        ours = history(trainer)
    assert len(ours) == len(theirs) == STEPS
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        # a margin is the difference of two rewards, and rounds as they do
        largest = max(abs(value) for name, value in b.items() if name.startswith("rewards/"))
        for name, value in b.items():
            if not name.startswith("logits/"):  # means over other positions
                rounding = 2e-6 * largest if name == "rewards/margins" else 0.0
                assert a[name] == pytest.approx(value, rel=2e-5, abs=2e-6 + rounding), name


@pytest.mark.parametrize("kind", ["cpo", "orpo"])
def test_evaluation_reports_the_same(kind, tmp_path):
    trainer = make_trainer(kind, make_model("untied", 0), tmp_path, eval_strategy="no", per_device_eval_batch_size=3)
    held_out = trainer.train_dataset.select(range(6))
    theirs = trainer.evaluate(held_out)
    with swap.patch():
        ours = trainer.evaluate(held_out)
    assert ours.keys() == theirs.keys() and "eval_nll_loss" in ours
    for name, value in theirs.items():
        if "logits/" not in name and name.startswith("eval_") and not name.endswith(("runtime", "per_second")):
            assert ours[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_autocast_and_checkpointing_train(lora, tmp_path):
    options = {"bf16": True, "gradient_checkpointing": True}
    theirs = history(make_trainer("cpo", make_model("untied", 0), tmp_path / "a", lora, **options))
    with swap.patch():
        ours = history(make_trainer("cpo", make_model("untied", 0), tmp_path / "b", lora, **options))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.1)


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_no_logits_are_made_and_prompts_are_left_out(kind, tmp_path):
    trainer = make_trainer(kind, make_model("untied", 0), tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    inputs = trainer.concatenated_inputs(batch)
    rows: list[int] = []
    from logitless.kernels import linear_logps as op

    original = op.token_stats

    def spy(hidden, weight, labels, *rest, **more):
        rows.append(int((labels != -100).sum()))
        return original(hidden, weight, labels, *rest, **more)

    with pytest.MonkeyPatch.context() as patched, swap.patch(), Largest() as largest:
        patched.setattr(op, "token_stats", spy)
        trainer.compute_loss(trainer.model, batch)
    responses = int((inputs["concatenated_labels"][:, 1:] != -100).sum())
    chosen_prompts = int((inputs["concatenated_attention_mask"][:3, 1:] == 1).sum()) - int(
        (inputs["concatenated_labels"][:3, 1:] != -100).sum()
    )
    assert rows == [responses + (chosen_prompts if kind == "orpo" else 0)]
    with Largest() as before:
        trainer.compute_loss(trainer.model, batch)
    positions = inputs["concatenated_input_ids"].numel()
    assert before.positions >= positions - len(inputs["concatenated_input_ids"]) > largest.positions


def test_mean_logits_are_those_of_scored_tokens(tmp_path):
    trainer = make_trainer("cpo", make_model("bias", 0), tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    inputs = trainer.concatenated_inputs(batch)
    with torch.no_grad(), swap.patch():
        *_, chosen, rejected, _ = trainer.concatenated_forward(trainer.model, batch)
        logits = trainer.model(inputs["concatenated_input_ids"], attention_mask=inputs["concatenated_attention_mask"]).logits
    scored = inputs["concatenated_labels"][:, 1:] != -100
    means = logits[:, :-1].mean(-1)
    torch.testing.assert_close(chosen, means[:3][scored[:3]].mean())
    torch.testing.assert_close(rejected, means[3:][scored[3:]].mean())


def test_a_sequence_without_scored_tokens_is_no_nan(tmp_path):
    trainer = make_trainer("simpo", make_model("untied", 0), tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    batch["rejected_labels"][1] = -100
    with swap.patch():
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())


def test_what_is_not_served_runs_as_before_and_is_said(tmp_path, caplog):
    trainer = make_trainer("orpo", make_model("untied", 0), tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.aux_loss_enabled = True
    with caplog.at_level(logging.WARNING, logger="logitless"), swap.patch(), pytest.raises(AttributeError):
        trainer.concatenated_forward(trainer.model, batch)  # TRL's own, which looks for the loss of a router
    assert "ORPOTrainer runs on TRL's own code, not on logitless: a router's auxiliary loss" in caplog.text


def test_a_trainer_that_takes_other_arguments_is_left_alone_and_named(monkeypatch, caplog):
    def other(self, model, batch, more):
        return ()

    with monkeypatch.context() as changed, caplog.at_level(logging.WARNING, logger="logitless"):
        changed.setattr(cpo.CPOTrainer, "concatenated_forward", other)
        with swap.patch():
            assert cpo.CPOTrainer.concatenated_forward is other
            assert orpo.ORPOTrainer.concatenated_forward is not ORIGINALS[orpo.ORPOTrainer]
    assert "CPOTrainer is left as it is" in caplog.text


def test_the_patch_holds_for_the_block(tmp_path):
    with ll.integrations.trl.patch():
        assert all(trainer.concatenated_forward is not original for trainer, original in ORIGINALS.items())
    assert all(trainer.concatenated_forward is original for trainer, original in ORIGINALS.items())
