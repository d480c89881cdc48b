"""The DPO family agree with TRL 1.16's own trainers run on a CPU: value, all gradients, every logged metric.

Two precisions. In float32 TRL runs untouched. In float64 its head, which adds up in float32 whatever its inputs, is replaced
by a plain log-softmax; the rest of the trainer is TRL's, and agreement is to 1e-10. Where TRL is wrong or means something
else, a test named after the difference shows it, and how to get TRL's value.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll
from logitless.fused.preference.losses.dpo import DPO_LOSSES

from ..integrations.tiny import make_model, make_tokenizer
from .trl_trainers import (
    Run,
    accelerate,
    assert_same,
    configured,
    datasets,
    ref_states,
    rows,
    run_ours,
    run_trl,
    setups,
    trl,
)

EVERY_BACKEND = True


def dpo_inputs(trainer: Any, which: list[int] | None = None) -> dict[str, Tensor]:
    data = trainer.train_dataset
    return trainer.data_collator([data[i] for i in (range(len(data)) if which is None else which)])


def dpo_ours(trainer: Any, inputs: dict[str, Tensor], **options: Any) -> Run:
    loss = ll.FusedLinearDPOLoss(metrics=True, **options)
    ids, attention = inputs["input_ids"], inputs["attention_mask"]
    labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
    reference = {} if not loss.loss.needs_reference else ref_states(trainer.ref_model, ids, attention)
    return run_ours(trainer.model, loss, ids, attention, labels, **reference)


def compare_dpo(
    trainer: Any,
    precision: str,
    types: list[str],
    *,
    weights: list[float] | None = None,
    beta: float = 0.3,
    label_smoothing: float = 0.0,
    which: list[int] | None = None,
    slope: float | None = None,
    **options: Any,
) -> tuple[Run, Run]:
    """Run both with options that have the same name in TRL's trainer and in our module; they must agree."""
    attributes = {"loss_types": types, "loss_weights": weights or [1.0] * len(types), "beta": beta, **options}
    with configured(trainer, precision, label_smoothing=label_smoothing, **attributes):
        inputs = dpo_inputs(trainer, which)
        theirs = run_trl(trainer, inputs)
        ours = dpo_ours(
            trainer, inputs, beta=beta, loss_type=types, loss_weights=weights, label_smoothing=label_smoothing, **options
        )
    assert_same(ours, theirs, beta if slope is None else slope, REWARDS if types == ["sft"] else ())
    return ours, theirs


#: ``sft`` alone takes no reference here, so its rewards are against none.
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
SMOOTHING = {"exo_pair": 0.1, "robust": 0.2, "aot": 0.1, "aot_unpaired": 0.1}
DIVERGENT = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]


@setups
@pytest.mark.parametrize("name", list(DPO_LOSSES))
def test_dpo_loss_types_agree_with_trl(trainer_of, kind, precision, name):
    compare_dpo(trainer_of("dpo", kind), precision, [name], label_smoothing=SMOOTHING.get(name, 0.0))


def test_every_loss_type_of_trl_is_here():
    described = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert all(f"'{name}'" in described for name in DPO_LOSSES)
    assert described.count("'") == 2 * len(DPO_LOSSES)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "robust"])
def test_smoothed_types_without_smoothing_agree_with_trl(trainer_of, precision, name):
    compare_dpo(trainer_of("dpo", "untied"), precision, [name])


@setups
@pytest.mark.parametrize(
    ("types", "weights", "smoothing"),
    [
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], 0.0),
        (["sigmoid", "sft"], [1.0, 0.1], 0.0),
        (["ipo", "sigmoid_norm"], None, 0.0),
        (["aot", "hinge", "exo_pair"], [0.5, -0.25, 2.0], 0.05),
        (["sigmoid", "sigmoid"], [0.5, 0.5], 0.0),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_weighted_mixes_agree_with_trl(trainer_of, kind, precision, types, weights, smoothing):
    compare_dpo(trainer_of("dpo", kind), precision, types, weights=weights, label_smoothing=smoothing)


@pytest.mark.parametrize("name", DIVERGENT)
@pytest.mark.parametrize(
    ("divergence", "precision"),
    [
        ("forward_kl", "float32"),
        ("forward_kl", "float64"),
        ("js_divergence", "float32"),
        ("js_divergence", "float64"),
        ("alpha_divergence", "float32"),
    ],
)
def test_f_divergences_agree_with_trl(trainer_of, name, divergence, precision):
    compare_dpo(
        trainer_of("dpo", "untied"),
        precision,
        [name],
        label_smoothing=SMOOTHING.get(name, 0.0),
        f_divergence_type=divergence,
    )


def test_trls_alpha_divergence_knows_no_float64(trainer_of):
    """TRL looks up by dtype where to clamp the exponent. Here it is 80, TRL's for float32, in every dtype."""
    trainer = trainer_of("dpo", "untied")
    with configured(trainer, "float64", loss_types=["sigmoid"], f_divergence_type="alpha_divergence"):
        inputs = dpo_inputs(trainer)
        with pytest.raises(KeyError):
            trainer.compute_loss(trainer.model, inputs)
        ours = dpo_ours(trainer, inputs, f_divergence_type="alpha_divergence")
    assert math.isfinite(ours.loss)


@pytest.mark.parametrize("coef", [0.0, 0.5, 1.0, 1.0 + 1e-7, 2.0, -0.5])  # 1 and next to it: the logarithm
def test_alpha_divergence_coefficients_agree_with_trl(trainer_of, coef):
    compare_dpo(
        trainer_of("dpo", "untied"),
        "float32",
        ["sigmoid"],
        beta=0.02,
        slope=max(1.0, abs(coef - 1)),  # an exponential of this times the log-ratio
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=coef,
    )


@pytest.mark.parametrize("name", sorted(set(DPO_LOSSES) - set(DIVERGENT)))
def test_f_divergences_are_refused_where_trl_refuses_them(name):
    with pytest.raises(ValueError, match="f_divergence_type"):
        ll.FusedLinearDPOLoss(loss_type=name, f_divergence_type="js_divergence")


@setups
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "apo_zero", "aot", "sft"])
def test_ld_dpo_agrees_with_trl(trainer_of, kind, precision, name, alpha):
    compare_dpo(trainer_of("dpo", kind), precision, [name], ld_alpha=alpha)


def test_sft_with_weight_1_beside_another_type_with_weight_0_logs_trls_rewards(trainer_of):
    """``sft`` alone takes no reference here, so it logs rewards against none; TRL always runs the reference."""
    trainer = trainer_of("dpo", "untied")
    with configured(trainer, "float64", loss_types=["sft"], loss_weights=[1.0]):
        inputs = dpo_inputs(trainer)
        theirs = run_trl(trainer, inputs)
        ours = dpo_ours(trainer, inputs, loss_type=["sft", "sigmoid"], loss_weights=[1.0, 0.0])
        alone = dpo_ours(trainer, inputs, loss_type="sft")
    assert_same(ours, theirs, 0.1)
    assert alone.metrics["rewards/chosen"] == pytest.approx(0.1 * alone.metrics["logps/chosen"], rel=1e-12)


@setups
@pytest.mark.parametrize("name", sorted(set(DPO_LOSSES) - {"aot", "aot_unpaired", "sft", "hinge"}))
def test_wpo_weights_agree_with_trl(trainer_of, kind, precision, name):
    compare_dpo(trainer_of("dpo", kind), precision, [name], use_weighting=True, label_smoothing=SMOOTHING.get(name, 0.0))


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("which", [[0], [1]])
def test_wpo_with_sft_agrees_with_trl_on_one_pair(trainer_of, precision, which):
    trainer = trainer_of("dpo", "untied")
    compare_dpo(trainer, precision, ["sigmoid", "sft"], weights=[1.0, 0.5], use_weighting=True, which=which)


@setups
def test_wpo_with_hinge_runs_where_trl_overwrites_what_its_backward_needs(trainer_of, kind, precision, monkeypatch):
    """TRL 1.16 multiplies the result of relu in place, so that the backward pass fails. Made a copy, it agrees."""
    trainer = trainer_of("dpo", kind)
    with (
        configured(trainer, precision, loss_types=["hinge"], loss_weights=[1.0], use_weighting=True),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        trainer.compute_loss(trainer.model, dpo_inputs(trainer)).backward()
    relu = torch.relu
    monkeypatch.setattr(torch, "relu", lambda t: relu(t).clone())
    compare_dpo(trainer, precision, ["hinge"], use_weighting=True)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_wpo_with_sft_runs_where_trl_writes_into_an_expanded_tensor(trainer_of, precision, monkeypatch):
    """TRL 1.16 multiplies the expanded scalar NLL in place, which torch refuses for two pairs. Made a copy, it agrees."""
    trainer = trainer_of("dpo", "untied")
    with (
        configured(trainer, precision, loss_types=["sft"], loss_weights=[1.0], use_weighting=True),
        pytest.raises(RuntimeError, match="single memory location"),
    ):
        trainer.compute_loss(trainer.model, dpo_inputs(trainer))
    expand = Tensor.expand
    monkeypatch.setattr(Tensor, "expand", lambda t, *size: expand(t, *size).clone() if t.dim() == 0 else expand(t, *size))
    compare_dpo(trainer, precision, ["sft"], use_weighting=True)
    compare_dpo(trainer, precision, ["sigmoid", "sft"], weights=[1.0, 0.5], use_weighting=True)


@setups
def test_options_together_agree_with_trl(trainer_of, kind, precision):
    compare_dpo(
        trainer_of("dpo", kind),
        precision,
        ["sigmoid", "discopop", "robust"],
        weights=[0.5, 0.25, 2.0],
        label_smoothing=0.0,
        ld_alpha=0.25,
        f_divergence_type="js_divergence",
        use_weighting=True,
    )


@pytest.mark.parametrize("which", [[0], [1, 2], [2, 3, 1]])
def test_any_part_of_the_batch_agrees_with_trl(trainer_of, which):
    compare_dpo(trainer_of("dpo", "untied"), "float32", ["sigmoid", "sft"], which=which)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_given_reference_log_probabilities_agree_with_trl(trainer_of, alpha):
    trainer = trainer_of("dpo", "untied")
    with configured(trainer, "float32", loss_types=["sigmoid"], ld_alpha=alpha, precompute_ref_logps=True):
        inputs = dpo_inputs(trainer)
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
        theirs = run_trl(trainer, {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected})
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
        loss = ll.FusedLinearDPOLoss(ld_alpha=alpha, metrics=True)
        ours = run_ours(trainer.model, loss, ids, attention, labels, ref_logps=torch.cat((chosen, rejected)))
    assert_same(ours, theirs, 0.1)


def test_trl_ignores_label_smoothing_of_sigmoid(trainer_of):
    """TRL: plain DPO whatever ``label_smoothing`` is. Here: cDPO; 0 gives TRL's value."""
    trainer = trainer_of("dpo", "untied")
    with configured(trainer, "float64", loss_types=["sigmoid"], label_smoothing=0.3):
        inputs = dpo_inputs(trainer)
        theirs = run_trl(trainer, inputs)
        without, smoothed = (dpo_ours(trainer, inputs, label_smoothing=e) for e in (0.0, 0.3))
    assert_same(without, theirs, trainer.beta)
    h = smoothed.output.chosen_rewards - smoothed.output.rejected_rewards
    cdpo = (-0.7 * F.logsigmoid(h) - 0.3 * F.logsigmoid(-h)).mean()
    assert smoothed.loss == pytest.approx(cdpo.item(), rel=1e-12)
    assert abs(smoothed.loss - theirs.loss) > 0.01


def test_smoothing_of_one_type_in_a_mix_is_a_second_objective(trainer_of):
    """TRL smooths ``robust`` and leaves the ``sigmoid`` beside it alone; here ``label_smoothing`` is that of both."""
    trainer = trainer_of("dpo", "untied")
    attributes = {"loss_types": ["sigmoid", "robust"], "loss_weights": [0.5, 2.0], "label_smoothing": 0.2}
    with configured(trainer, "float64", **attributes):
        inputs = dpo_inputs(trainer)
        theirs = run_trl(trainer, inputs)
        both = dpo_ours(trainer, inputs, loss_type=["sigmoid", "robust"], loss_weights=[0.5, 2.0], label_smoothing=0.2)
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        robust = ll.FusedLinearDPOLoss(loss_type="robust", label_smoothing=0.2)
        objectives = {
            "sigmoid": ll.Objective(ll.FusedLinearDPOLoss(), range(len(ids)), weight=0.5),
            "robust": ll.Objective(robust, range(len(ids)), weight=2.0),
        }
        ours = run_ours(
            trainer.model,
            ll.FusedLinearMultiObjectiveLoss(),
            ids,
            attention,
            ids.masked_fill(inputs["completion_mask"] == 0, -100),
            objectives=objectives,
            **ref_states(trainer.ref_model, ids, attention),
        )
    assert_same(ours, theirs, 0.1, tuple(theirs.metrics))
    assert abs(both.loss - theirs.loss) > 1e-3


def test_wpo_on_sorted_losses_is_refused_as_trl_refuses_it(tmp_path):
    for name in ("aot", "aot_unpaired"):
        args = trl.DPOConfig(str(tmp_path), loss_type=[name], use_weighting=True, use_cpu=True, bf16=False, report_to="none")
        with pytest.raises(NotImplementedError, match="WPO"):
            trl.DPOTrainer(
                model=make_model("untied", 1),
                args=args,
                train_dataset=datasets.Dataset.from_list(rows("dpo")),
                processing_class=make_tokenizer(),
            )
        with pytest.raises(ValueError, match="use_weighting"):
            ll.FusedLinearDPOLoss(loss_type=name, use_weighting=True)
    accelerate.Accelerator(cpu=True)  # the arguments of trainers that were never made have reset what the others share


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_trl_counts_a_first_token_that_nothing_predicts(trainer_of, name):
    """Without a prompt TRL divides by the completion's length, one more than the tokens scored.

    Here the divisor is the number of scored tokens. Token weights of ``n / (n + 1)`` give TRL's value.
    """
    trainer = trainer_of("dpo", "untied")
    with configured(trainer, "float64", loss_types=[name]):
        inputs = dpo_inputs(trainer)
        inputs["completion_mask"] = inputs["attention_mask"].clone()
        theirs = run_trl(trainer, inputs)
        plain = dpo_ours(trainer, inputs, loss_type=name)
        lengths = inputs["attention_mask"].sum(1, keepdim=True).double()
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        ours = run_ours(
            trainer.model,
            ll.FusedLinearDPOLoss(loss_type=name),
            ids,
            attention,
            ids.masked_fill(attention == 0, -100),
            token_weights=((lengths - 1) / lengths).expand(-1, ids.shape[1] - 1),
            **ref_states(trainer.ref_model, ids, attention),
        )
    assert abs(plain.loss - theirs.loss) > 1e-3
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-12)
    for key, gradient in theirs.gradients.items():
        assert torch.allclose(ours.gradients[key], gradient, rtol=1e-10, atol=1e-14)


def test_an_empty_completion_agrees_with_trl(trainer_of):
    """A sequence without scored tokens: log-probability 0 in both, and finite in both."""
    trainer = trainer_of("dpo", "untied")
    for name in ("sigmoid", "ipo", "sigmoid_norm"):
        with configured(trainer, "float64", loss_types=[name]):
            inputs = dpo_inputs(trainer)
            inputs["completion_mask"][5] = 0
            theirs = run_trl(trainer, inputs)
            ours = dpo_ours(trainer, inputs, loss_type=name)
        assert_same(ours, theirs, 0.1)
        assert ours.output.rejected_logps[1] == 0
