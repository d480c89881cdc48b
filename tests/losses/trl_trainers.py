"""TRL's trainers on a CPU, one call of their ``compute_loss``, and the comparison of a loss with it."""

from __future__ import annotations

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

from ..integrations.tiny import make_model, make_tokenizer, text

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


def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Any]]:
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
