"""KTO, CPO, SimPO, AlphaPO and ORPO agree with TRL 1.16's own trainers run on a CPU: value, all gradients, every logged metric.

Two precisions. In float32 TRL runs untouched. In float64 its head, which adds up in float32 whatever its inputs, is replaced
by a plain log-softmax; the rest of the trainer is TRL's, and agreement is to 1e-10. Where TRL is wrong or means something
else, a test named after the difference shows it, and how to get TRL's value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import logitless as ll
from logitless.fused.preference.losses.kto import KTO_LOSSES

from .trl_trainers import Run, assert_same, configured, ref_states, run_ours, run_trl, setups

EVERY_BACKEND = True


# KTO


def kto_inputs(trainer: Any, which: list[int]) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in which])


def kl_logps(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    ids = inputs["KL_input_ids"]
    with torch.no_grad():
        states = model.base_model(input_ids=ids, attention_mask=inputs["KL_attention_mask"], use_cache=False)
        x, y = ll.shift(states.last_hidden_state, ids.masked_fill(inputs["KL_completion_mask"] == 0, -100))
        return ll.sequence_logps(x, model.lm_head.weight, y, model.lm_head.bias)


def compare_kto(
    trainer: Any,
    precision: str,
    which: list[int],
    *,
    loss_type: str = "kto",
    beta: float = 0.2,
    **weights: float,
) -> tuple[Run, Run]:
    with configured(trainer, precision, loss_type=loss_type, calculate_KL=loss_type == "kto", beta=beta, **weights):
        inputs = kto_inputs(trainer, which)
        theirs = run_trl(trainer, inputs)
        kl = None
        if loss_type == "kto":
            kl = (kl_logps(trainer.model, inputs) - kl_logps(trainer.ref_model, inputs)).mean()
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        ours = run_ours(
            trainer.model,
            ll.FusedLinearKTOLoss(beta=beta, loss_type=loss_type, metrics=True, **weights),
            ids,
            attention,
            ids.masked_fill(inputs["completion_mask"] == 0, -100),
            desirable=inputs["label"].bool(),
            kl=kl,
            **ref_states(trainer.ref_model, ids, attention),
        )
    if loss_type != "kto":
        assert theirs.metrics.pop("kl") == 0  # TRL logs a KL of 0 where it has none
    assert_same(ours, theirs, beta)
    return ours, theirs


ALL, DESIRABLE, UNDESIRABLE = [0, 1, 2, 3, 4], [0, 2, 4], [1, 3]


@setups
@pytest.mark.parametrize("loss_type", list(KTO_LOSSES))
@pytest.mark.parametrize("which", [ALL, DESIRABLE, UNDESIRABLE, [2, 1]], ids=["both", "desirable", "undesirable", "two"])
def test_kto_agrees_with_trl(trainer_of, kind, precision, loss_type, which):
    trainer = trainer_of("kto", kind)
    compare_kto(trainer, precision, which, loss_type=loss_type)
    compare_kto(trainer, precision, which, loss_type=loss_type, desirable_weight=1.7, undesirable_weight=0.6)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_kto_agrees_with_trl_where_the_kl_estimate_is_positive_and_where_it_is_clamped(trainer_of, precision):
    trainer = trainer_of("kto", "untied")
    seen = set()
    for which in (ALL, [0], [1], [2], [3], [4]):
        _, theirs = compare_kto(trainer, precision, which)
        seen.add(theirs.metrics["kl"] > 0)
    assert seen == {True, False}


# CPO, SimPO, AlphaPO and ORPO


@dataclass
class Concatenated:
    ids: Tensor
    attention: Tensor
    labels: Tensor


def paired_batch(trainer: Any, which: list[int] | None = None) -> tuple[dict[str, Any], Concatenated]:
    keys = [k for k in trainer.train_dataset.column_names if k.endswith(("_ids", "_mask", "_labels"))]
    data = trainer.train_dataset.select_columns(keys)
    batch = trainer.data_collator([data[i] for i in (range(len(data)) if which is None else which)])
    pad = trainer.processing_class.pad_token_id
    both = trainer.concatenated_inputs(batch, padding_value=pad)
    names = ("concatenated_input_ids", "concatenated_attention_mask", "concatenated_labels")
    return batch, Concatenated(*(both[name] for name in names))


#: TRL's are over all positions, see test_trl_cpo_and_orpo_average_logits_over_all_positions.
LOGITS = ("logits/chosen", "logits/rejected")


def compare_cpo(
    trainer: Any,
    precision: str,
    loss: ll.FusedLinearPreferenceLoss,
    *,
    beta: float,
    which: list[int] | None = None,
    without: tuple[str, ...] = (),
    slope: float | None = None,
    **attributes: Any,
) -> tuple[Run, Run]:
    with configured(trainer, precision, beta=beta, **attributes):
        batch, both = paired_batch(trainer, which)
        theirs = run_trl(trainer, batch)
        ours = run_ours(trainer.model, loss, both.ids, both.attention, both.labels)
    assert_same(ours, theirs, beta if slope is None else slope, (*LOGITS, *without))
    return ours, theirs


@setups
@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0, 0.4])
@pytest.mark.parametrize(("loss_type", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)])
def test_cpo_agrees_with_trl(trainer_of, kind, precision, loss_type, smoothing, cpo_alpha):
    loss = ll.FusedLinearCPOLoss(beta=0.3, cpo_alpha=cpo_alpha, loss_type=loss_type, label_smoothing=smoothing, metrics=True)
    compare_cpo(
        trainer_of("cpo", kind),
        precision,
        loss,
        beta=0.3,
        cpo_alpha=cpo_alpha,
        loss_type=loss_type,
        label_smoothing=smoothing,
        alpha=0.0,
        without=() if cpo_alpha else ("nll_loss",),  # TRL logs an NLL of 0 where it has none
    )


@setups
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.1])
@pytest.mark.parametrize("gamma", [0.5, 1.4])
def test_simpo_and_alphapo_agree_with_trl(trainer_of, kind, precision, alpha, smoothing, gamma):
    compare_cpo(
        trainer_of("cpo", kind),
        precision,
        ll.FusedLinearSimPOLoss(beta=2.0, gamma=gamma, label_smoothing=smoothing, alpha=alpha, metrics=True),
        beta=2.0,
        cpo_alpha=0.0,
        loss_type="simpo",
        simpo_gamma=gamma,
        label_smoothing=smoothing,
        alpha=alpha,
        without=("nll_loss",),
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_alphapo_of_cpo_agrees_with_trl(trainer_of, loss_type):
    """float64 alone: TRL takes powers of the probability of a whole sequence, which float32 cannot hold."""
    compare_cpo(
        trainer_of("cpo", "untied"),
        "float64",
        ll.FusedLinearCPOLoss(beta=0.3, loss_type=loss_type, alpha=0.02, metrics=True),
        beta=0.3,
        slope=0.3 / 0.02,  # TRL takes the difference of 1 and a power, and divides it by alpha
        cpo_alpha=1.0,
        loss_type=loss_type,
        label_smoothing=0.0,
        alpha=0.02,
    )


def test_alphapo_is_finite_where_trl_underflows(trainer_of):
    """TRL: ``exp(logp) ** -alpha``, infinite once the probability underflows. Here: ``expm1(-alpha * logp)``."""
    logps = torch.tensor([-120.0, -3.0])
    with configured(trainer_of("cpo", "untied"), "float32", alpha=0.02, beta=0.3, loss_type="sigmoid") as trainer:
        _, chosen, rejected = trainer.cpo_loss(logps[:1], logps[1:])
    assert torch.isinf(chosen).item() and torch.isfinite(rejected).item()
    x, w = torch.zeros(2, 30, 4), torch.zeros(55, 4)
    x[0, :, 0], w[0, 0], labels = 1.0, 110.0, torch.full((2, 30), -100)
    labels[0], labels[1, 0] = 1, 2
    x[0, :, 0] = 4.0 / 110.0
    out = ll.FusedLinearCPOLoss(beta=0.3, alpha=0.02)(x.requires_grad_(), w, labels)
    assert out.chosen_logps.item() < -104  # exp underflows in float32
    exact = 0.3 * (1 - torch.exp(-0.02 * out.chosen_logps.double())) / 0.02
    assert out.chosen_rewards.item() == pytest.approx(exact.item(), rel=1e-6)
    out.loss.backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_trl_ignores_label_smoothing_of_cpo_hinge_and_ipo(trainer_of, loss_type):
    trainer = trainer_of("cpo", "untied")
    attributes = {"loss_type": loss_type, "alpha": 0.0, "label_smoothing": 0.3, "cpo_alpha": 1.0}
    compare_cpo(trainer, "float64", ll.FusedLinearCPOLoss(beta=0.3, loss_type=loss_type, metrics=True), beta=0.3, **attributes)
    with pytest.raises(ValueError, match="label_smoothing"):
        ll.FusedLinearCPOLoss(loss_type=loss_type, label_smoothing=0.3)


def test_metrics_that_a_loss_does_not_have_are_left_out_where_trl_logs_0(trainer_of):
    trainer = trainer_of("cpo", "untied")
    with configured(trainer, "float32", cpo_alpha=0.0, loss_type="sigmoid"):
        batch, both = paired_batch(trainer)
        theirs = run_trl(trainer, batch)
        loss = ll.FusedLinearCPOLoss(cpo_alpha=0.0, metrics=True)
        ours = run_ours(trainer.model, loss, both.ids, both.attention, both.labels)
    assert theirs.metrics["nll_loss"] == 0
    assert "nll_loss" not in ours.metrics
    ours, _ = compare_kto(trainer_of("kto", "untied"), "float32", ALL, loss_type="apo_zero_unpaired")
    assert "kl" not in ours.metrics


@setups
def test_cpo_simpo_of_trl_is_simpo_plus_sft(trainer_of, kind, precision):
    """TRL's CPOTrainer adds ``cpo_alpha`` (default 1) times the NLL to SimPO too; here that is a second objective."""
    trainer = trainer_of("cpo", kind)
    attributes = {"loss_type": "simpo", "simpo_gamma": 0.5, "label_smoothing": 0.0, "alpha": 0.0, "cpo_alpha": 0.7}
    with configured(trainer, precision, beta=2.0, **attributes):
        batch, both = paired_batch(trainer)
        theirs = run_trl(trainer, batch)
        every = range(len(both.ids))
        objectives = {
            "simpo": ll.Objective(ll.FusedLinearSimPOLoss(beta=2.0, gamma=0.5), every),
            "nll": ll.Objective(ll.FusedLinearDPOLoss(loss_type="sft"), every, weight=0.7),
        }
        loss = ll.FusedLinearMultiObjectiveLoss()
        ours = run_ours(trainer.model, loss, both.ids, both.attention, both.labels, objectives=objectives)
    assert ours.output.losses["nll"].item() == pytest.approx(theirs.metrics["nll_loss"], rel=1e-6)
    assert_same(ours, theirs, 2.0, tuple(theirs.metrics))


def orpo_nll_labels(both: Concatenated) -> Tensor:
    """TRL's NLL is over prompt and response."""
    return both.ids.masked_fill(both.attention == 0, -100)[:, 1:]


@setups
@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_orpo_agrees_with_trl(trainer_of, kind, precision, beta, monkeypatch):
    trainer = trainer_of("orpo", kind)
    with configured(trainer, precision, beta=beta):
        batch, both = paired_batch(trainer)
        with monkeypatch.context() as patch:  # TRL rounds the log-probabilities of the odds to float32
            to_float = Tensor.float
            patch.setattr(Tensor, "float", lambda t: t if t.dtype == torch.float64 else to_float(t))
            theirs = run_trl(trainer, batch)
        ours = run_ours(
            trainer.model,
            ll.FusedLinearORPOLoss(beta=beta, metrics=True),
            both.ids,
            both.attention,
            both.labels,
            nll_labels=orpo_nll_labels(both),
        )
    assert_same(ours, theirs, beta, LOGITS)


def test_orpo_without_nll_labels_is_the_papers_nll_over_the_response(trainer_of):
    trainer = trainer_of("orpo", "untied")
    with configured(trainer, "float64", beta=0.1):
        batch, both = paired_batch(trainer)
        theirs = run_trl(trainer, batch)
        ours = run_ours(trainer.model, ll.FusedLinearORPOLoss(beta=0.1, metrics=True), both.ids, both.attention, both.labels)
        x, y = ll.shift(trainer.model.base_model(input_ids=both.ids, attention_mask=both.attention)[0], both.labels)
        logps = ll.linear_logps(x, trainer.model.lm_head.weight, y).logps
    half = len(y) // 2
    assert ours.metrics["nll_loss"] == pytest.approx(-(logps[:half].sum() / (y[:half] != -100).sum()).item(), rel=1e-12)
    assert abs(ours.metrics["nll_loss"] - theirs.metrics["nll_loss"]) > 1e-2
    assert ours.metrics["log_odds_chosen"] == pytest.approx(theirs.metrics["log_odds_chosen"], abs=1e-5)


def test_orpo_is_finite_where_trl_is_not(trainer_of):
    """p = 1: TRL's log-odds are infinite, and not a number where both are. Here they saturate, with gradient 0."""
    trainer = trainer_of("orpo", "untied")
    certain = torch.zeros(1, requires_grad=True)
    losses, *_ = trainer.odds_ratio_loss(certain, torch.zeros(1))
    assert torch.isnan(losses).all()
    losses, *_ = trainer.odds_ratio_loss(certain, torch.full((1,), -1.0))
    losses.sum().backward()
    assert not torch.isfinite(certain.grad).all()
    x = torch.zeros(2, 3, 4)
    x[..., 0] = 1.0
    w, labels = torch.zeros(9, 4), torch.full((2, 3), 5)
    w[5, 0] = 200.0  # every target has probability 1
    x, w = x.requires_grad_(), w.requires_grad_()
    out = ll.FusedLinearORPOLoss()(x, w, labels)
    assert out.loss.item() == pytest.approx(0.1 * math.log(2))
    out.loss.backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(w.grad).all()


def test_trl_cpo_and_orpo_average_logits_over_all_positions(trainer_of):
    """TRL: prompt and padding too (CPO: also the last position, which predicts nothing). Here: scored tokens.

    ``linear_logps`` on labels for every position gives TRL's value.
    """
    for task, last in (("cpo", None), ("orpo", -1)):
        trainer = trainer_of(task, "untied")
        with configured(trainer, "float64"):
            batch, both = paired_batch(trainer)
            theirs = run_trl(trainer, batch)
            hidden = trainer.model.base_model(input_ids=both.ids, attention_mask=both.attention)[0][:, :last]
            everywhere = torch.zeros(hidden.shape[:2], dtype=torch.long)
            stats = ll.linear_logps(hidden, trainer.model.lm_head.weight, everywhere, outputs=("mean_logits",))
            ours = run_ours(trainer.model, ll.FusedLinearORPOLoss(metrics=True), both.ids, both.attention, both.labels)
        half = len(both.ids) // 2
        assert stats.mean_logits[:half].mean().item() == pytest.approx(theirs.metrics["logits/chosen"], rel=1e-10)
        assert stats.mean_logits[half:].mean().item() == pytest.approx(theirs.metrics["logits/rejected"], rel=1e-10)
        assert abs(ours.metrics["logits/chosen"] - theirs.metrics["logits/chosen"]) > 1e-3


@pytest.mark.parametrize("task", ["cpo", "orpo"])
def test_an_empty_completion_is_finite_where_trl_divides_by_zero(trainer_of, task):
    trainer = trainer_of(task, "untied")
    attributes = {"loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.0} if task == "cpo" else {}
    with configured(trainer, "float32", beta=0.1, **attributes):
        batch, both = paired_batch(trainer)
        batch["rejected_labels"][1] = -100
        both.labels[5] = -100
        assert math.isnan(trainer.compute_loss(trainer.model, batch).item())
        loss = ll.FusedLinearSimPOLoss(beta=0.1, gamma=0.5) if task == "cpo" else ll.FusedLinearORPOLoss(beta=0.1)
        ours = run_ours(trainer.model, loss, both.ids, both.attention, both.labels)
    assert math.isfinite(ours.loss)
    assert all(torch.isfinite(g).all() for g in ours.gradients.values())
    assert ours.output.rejected_logps[1] == 0


def test_an_nll_over_no_tokens_is_0_where_trls_is_nan(trainer_of):
    trainer = trainer_of("cpo", "untied")
    with configured(trainer, "float32", loss_type="sigmoid", cpo_alpha=1.0, beta=0.1):
        batch, both = paired_batch(trainer)
        batch["chosen_labels"][:] = -100
        both.labels[: len(both.labels) // 2] = -100
        assert math.isnan(trainer.compute_loss(trainer.model, batch).item())
        loss = ll.FusedLinearCPOLoss(metrics=True)
        ours = run_ours(trainer.model, loss, both.ids, both.attention, both.labels)
    assert math.isfinite(ours.loss)
    assert ours.metrics["nll_loss"] == 0
