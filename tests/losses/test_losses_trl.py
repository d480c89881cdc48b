"""Each loss agrees with TRL 1.16's own trainers run on a CPU: value, all gradients, every logged metric.

Two precisions. In float32 TRL runs untouched. In float64 its head, which adds up in float32 whatever its inputs, is replaced
by a plain log-softmax; the rest of the trainer is TRL's, and agreement is to 1e-10. Where TRL is wrong or means something
else, a test named after the difference shows it, and how to get TRL's value.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logitless as ll
from logitless.fused.preference.losses.dpo import DPO_LOSSES
from logitless.fused.preference.losses.kto import KTO_LOSSES

from ..integrations.tiny import make_model, make_tokenizer, text

EVERY_BACKEND = True

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

accelerate = pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
cpo = pytest.importorskip("trl.experimental.cpo")
orpo = pytest.importorskip("trl.experimental.orpo")
utils = pytest.importorskip("trl.trainer.utils")

ROUND = 2.0**-23  # distance from 1 to the next float32
#: Model and precision of most tests.
SETUPS = [("untied", "float32"), ("tied", "float32"), ("bias", "float32"), ("untied", "float64")]
setups = pytest.mark.parametrize(("kind", "precision"), SETUPS, ids=["-".join(s) for s in SETUPS])
#: Words of the prompt, the chosen and the rejected completion of each pair; two pairs differ a lot in length.
LENGTHS = [(3, 4, 4), (5, 2, 19), (2, 11, 1), (7, 6, 8)]
NOT_COMPARED = {"num_tokens"}


# TRL's side: trainers, one call of `compute_loss`


def rows(task: str) -> list[dict[str, Any]]:
    rng = random.Random(0)
    pairs = [{"prompt": text(rng, p), "chosen": " " + text(rng, c), "rejected": " " + text(rng, r)} for p, c, r in LENGTHS]
    if task != "kto":
        return pairs
    sides = [(0, "chosen"), (1, "rejected"), (2, "chosen"), (3, "rejected"), (3, "chosen")]
    return [{"prompt": pairs[i]["prompt"], "completion": pairs[i][side], "label": side == "chosen"} for i, side in sides]


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Any]]:
    """A trainer for a task and a model, made once; tests set its attributes."""
    made: dict[tuple[str, str], Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def make(task: str, kind: str) -> Any:
        trainer_class, config_class = {
            "dpo": (trl.DPOTrainer, trl.DPOConfig),
            "kto": (trl.KTOTrainer, trl.KTOConfig),
            "cpo": (cpo.CPOTrainer, cpo.CPOConfig),
            "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig),
        }[task]
        options = {"loss_type": "simpo"} if task == "cpo" else {}
        data = rows(task)
        args = config_class(
            output_dir=str(tmp_path_factory.mktemp(task)),
            per_device_train_batch_size=len(data),
            max_length=64,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **options,
        )
        extra = {"ref_model": make_model(kind, 2, hidden=24)} if task in ("dpo", "kto") else {}
        trainer = trainer_class(
            model=make_model(kind, 1),
            args=args,
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=make_tokenizer(),
            **extra,
        )
        trainer.model.train()
        if task == "dpo":  # WPO needs one output more than the default trainer asks for
            outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
            trainer.model.forward = type(trainer.model).forward.__get__(trainer.model)
            utils.add_fused_lm_head(trainer.model, outputs=outputs)
        return trainer

    def get(task: str, kind: str) -> Any:
        if (task, kind) not in made:
            made[task, kind] = make(task, kind)
        return made[task, kind]

    yield get
    torch.set_num_threads(threads)


class PlainHead:
    """What TRL's head computes, by definition, in the dtype of the hidden states."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        assert (temperature, softcap, scale) == (1.0, None, 1.0)
        logits = F.linear(hidden, weight, bias)
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        square = (2 * logp).logsumexp(-1).detach()
        return logp.gather(-1, targets[:, None])[:, 0], entropy, square, logits.mean(-1).detach(), logits.argmax(-1) == targets


@contextmanager
def configured(trainer: Any, precision: str, **attributes: Any) -> Iterator[Any]:
    """The trainer with some attributes, its models in some precision; everything as before at the end."""
    before = {name: getattr(trainer, name) for name in attributes}
    models = [m for m in (trainer.model, getattr(trainer, "ref_model", None)) if m is not None]
    own = utils._ChunkedLogProbFunction
    for name, value in attributes.items():
        setattr(trainer, name, value)
    dtype = torch.get_default_dtype()
    if precision == "float64":
        torch.set_default_dtype(torch.float64)  # TRL makes a tensor of the label smoothing
        utils._ChunkedLogProbFunction = PlainHead
        for model in models:
            model.double()
    try:
        yield trainer
    finally:
        torch.set_default_dtype(dtype)
        utils._ChunkedLogProbFunction = own
        for name, value in before.items():
            setattr(trainer, name, value)
        for model in models:
            model.float()
            model.zero_grad()


@dataclass
class Run:
    """What a call gave: gradients by name of the parameter, and that of the last hidden states under ``hidden``."""

    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]
    output: Any = None
    largest_logit: float = 0.0


def gradients_of(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert hidden.grad is not None
    return {**found, "hidden": hidden.grad}


def run_trl(trainer: Any, inputs: dict[str, Tensor]) -> Run:
    model = trainer.model
    model.zero_grad()
    states: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
            states.append(output.last_hidden_state)

    logged = trainer._metrics if hasattr(trainer, "_metrics") else trainer._stored_metrics
    logged["train"].clear()
    hook = model.base_model.register_forward_hook(keep)
    try:
        loss = trainer.compute_loss(model, inputs)
    finally:
        hook.remove()
    loss.backward()
    (hidden,) = states
    metrics = {name: values[-1] for name, values in logged["train"].items() if name not in NOT_COMPARED}
    return Run(loss.item(), gradients_of(model, hidden), metrics)


def run_ours(
    model: nn.Module, loss: ll.FusedLinearPreferenceLoss, ids: Tensor, attention: Tensor, labels: Tensor, **arguments: Any
) -> Run:
    """The loss on the same model's last hidden states; ``labels`` and arguments are not shifted yet but for ``ref_hidden``."""
    model.zero_grad()
    hidden = model.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    hidden.retain_grad()
    x, y = ll.shift(hidden, labels)
    out = loss(x, model.lm_head.weight, y, bias=model.lm_head.bias, **arguments)
    out.loss.backward()
    metrics = {name: value.item() for name, value in getattr(out, "metrics", {}).items()}
    largest = F.linear(hidden, model.lm_head.weight, model.lm_head.bias).abs().max().item()
    return Run(out.loss.item(), gradients_of(model, hidden), metrics, out, largest)


def ref_states(model: nn.Module, ids: Tensor, attention: Tensor) -> dict[str, Tensor | None]:
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    return {"ref_hidden": hidden[:, :-1], "ref_weight": model.lm_head.weight, "ref_bias": model.lm_head.bias}


def assert_same(ours: Run, theirs: Run, slope: float, without: tuple[str, ...] = ()) -> None:
    """Agreement to 4 roundings of the numbers that things are made of.

    Rounding a logit z moves a token's log-probability by ``eps * z``, and rounding a sequence's log-probability L moves
    rewards and loss by ``eps * L`` times the slope of the loss, which is ``beta`` for most. A gradient is a sum of as many
    rounded terms as there are tokens.
    """
    eps = ROUND if ours.gradients["hidden"].dtype == torch.float32 else 2.0**-52
    largest = max(abs(v) for name, v in theirs.metrics.items() if name.startswith("logps/"))
    spread = max(1.0, ours.largest_logit, slope * largest)
    assert abs(ours.loss - theirs.loss) <= 4 * eps * max(1.0, abs(theirs.loss)) * spread
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert "lm_head.weight" in ours.gradients or "model.embed_tokens.weight" in ours.gradients
    for name, gradient in theirs.gradients.items():
        error = (ours.gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-30)
        assert error <= 16 * eps * spread, (name, error.item())
    missing = theirs.metrics.keys() - ours.metrics.keys() - set(without)
    assert not missing
    for name, value in theirs.metrics.items():
        if name in without:
            continue
        size = max(largest, ours.largest_logit) if name.startswith("logps/") or name == "kl" else max(1.0, abs(value))
        size *= spread if name.startswith(("rewards/", "nll", "log_odds")) else 1.0
        assert abs(ours.metrics[name] - value) <= 4 * eps * size, (name, ours.metrics[name], value)


# DPO


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
