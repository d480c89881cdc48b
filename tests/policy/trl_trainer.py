"""TRL's GRPO trainer on a CPU, a batch for its loss, and the comparison of ours with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll

from ..helpers import relative_error
from ..integrations.tiny import make_model, make_tokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

TOKENS, HIDDEN, VOCABULARY = 9, 8, 37
#: Tokens of each completion; one has none.
LENGTHS = (9, 1, 6, 0, 4, 8)
SEQUENCES = len(LENGTHS)
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
#: What TRL reads from its arguments, and not from itself.
OF_ARGS = {
    "delta",
    "use_bias_correction_kl",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "steps_per_generation",
}
#: Metrics that are about other things than the loss.
NOT_COMPARED = {"policy_loss", "entropy_coef"}


def new_trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    args = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("grpo")),
        per_device_train_batch_size=SEQUENCES,
        num_generations=2,
        temperature=0.8,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    made = trl.GRPOTrainer(
        model=make_model("untied", 1),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": "bed"}] * SEQUENCES),
        processing_class=make_tokenizer(),
    )
    made.model.train()
    yield made
    torch.set_num_threads(threads)


@contextmanager
def configured(trainer: Any, **attributes: Any) -> Iterator[None]:
    """The trainer with some attributes; everything as before at the end."""
    attributes = {"current_gradient_accumulation_steps": 1, "steps_per_generation": 1, **attributes}
    owners = {name: trainer.args if name in OF_ARGS else trainer for name in attributes}
    before = {name: getattr(owner, name, None) for name, owner in owners.items()}
    dtype = torch.get_default_dtype()
    for name, value in attributes.items():
        setattr(owners[name], name, value)
    trainer._metrics["train"].clear()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        for name, value in before.items():
            setattr(owners[name], name, value)
        trainer.__dict__.pop("_get_per_token_logps_and_entropies", None)


@dataclass
class Batch:
    """hidden (S, T, H), weight (V, H); ids, masks and log-probabilities (S, T)."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    completion_mask: Tensor
    tool_mask: Tensor
    advantages: Tensor  # (S,)
    token_advantages: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    sampling_logps: Tensor

    @property
    def mask(self) -> Tensor:
        return self.completion_mask * self.tool_mask

    @property
    def labels(self) -> Tensor:
        return self.ids.masked_fill(self.mask == 0, -100)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight]

    def logps_and_entropies(self) -> tuple[Tensor, Tensor]:
        logps = F.linear(self.hidden, self.weight).log_softmax(-1)
        return logps.gather(-1, self.ids[..., None])[..., 0], -(logps.exp() * logps).sum(-1)


def make(seed: int = 0) -> Batch:
    """Old, reference and sampling log-probabilities are some tenths of a nat off: ratios on both sides of every bound."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = (torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]).long()
    tool = torch.ones_like(mask)
    tool[0, 3:5] = tool[2, 1] = 0
    ids = torch.randint(VOCABULARY, mask.shape, generator=g)
    x, w = normal(SEQUENCES, TOKENS, HIDDEN).requires_grad_(), (0.7 * normal(VOCABULARY, HIDDEN)).requires_grad_()
    advantages = torch.tensor([1.3, -0.7, -1.1, 0.4, 0.0, 0.9], dtype=torch.float64)
    empty = torch.empty(0)
    batch = Batch(x, w, ids, mask, tool, advantages, normal(*mask.shape), empty, empty, empty)
    logps = batch.logps_and_entropies()[0].detach()
    batch.old_logps = logps - 0.15 - 0.35 * normal(*mask.shape)
    batch.ref_logps = logps + 0.5 * normal(*mask.shape)
    batch.sampling_logps = batch.old_logps + 0.3 * normal(*mask.shape)
    batch.sampling_logps[2, 2] = batch.sampling_logps[5, 0] = torch.nan  # the engine has none
    return batch


@dataclass
class Given:
    """What a call gets besides the hidden states."""

    old: bool = True
    sampling: bool = False
    token_advantages: bool = False
    ratio: Tensor | None = None  # (S, T), or (S,)
    num_items: float | None = None  # of TRL
    accumulation: int = 1
    ours: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    loss: float
    gradients: list[Tensor]
    metrics: dict[str, float]


def run_trl(trainer: Any, batch: Batch, options: dict[str, Any], given: Given) -> Run:
    mask = batch.mask
    items = mask.sum() if given.num_items is None else torch.tensor(given.num_items)
    inputs = {
        "prompt_ids": torch.zeros(SEQUENCES, 2, dtype=torch.long),
        "prompt_mask": torch.ones(SEQUENCES, 2, dtype=torch.long),
        "completion_ids": batch.ids,
        "completion_mask": batch.completion_mask,
        "tool_mask": batch.tool_mask,
        "advantages": batch.token_advantages if given.token_advantages else batch.advantages,
        "ref_per_token_logps": batch.ref_logps,
        "num_items_in_batch": items,
    }
    if given.old:
        inputs["old_per_token_logps"] = batch.old_logps
    if given.sampling:
        inputs["sampling_per_token_logps"] = batch.sampling_logps
    attributes = {
        "loss_type": "dapo",
        "epsilon_low": 0.2,
        "epsilon_high": options.get("epsilon_low", 0.2),
        "beta": 0.0,
        "use_vllm": given.ratio is not None,
        "vllm_importance_sampling_correction": given.ratio is not None,
        "current_gradient_accumulation_steps": given.accumulation,
        "steps_per_generation": given.accumulation,
        "_entropy_bonus_enabled": options.get("entropy_coef", 0.0) != 0,
        **options,
    }
    if given.ratio is not None:
        inputs["importance_sampling_ratio"] = given.ratio if given.ratio.dim() == 2 else given.ratio[:, None]
    with configured(trainer, **attributes):
        torch.set_default_dtype(torch.float64)  # TRL makes tensors of its options
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (*batch.logps_and_entropies(), None)
        loss = trainer._compute_loss(trainer.model, inputs)
        gradients = torch.autograd.grad(loss, batch.leaves)
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if name not in NOT_COMPARED}
    return Run(loss.item(), list(gradients), metrics)


def run_ours(batch: Batch, options: dict[str, Any], given: Given) -> Run:
    arguments: dict[str, Any] = {"advantages": batch.token_advantages if given.token_advantages else batch.advantages}
    if given.old:
        arguments["old_logps"] = batch.old_logps
    if given.sampling:
        arguments["sampling_logps"] = batch.sampling_logps
    if options.get("beta"):
        arguments["ref_logps"] = batch.ref_logps
    if given.ratio is not None:
        arguments["importance_sampling_ratio"] = given.ratio
    if options.get("loss_type") == "cispo":  # TRL's default, which has no place here
        options = {"epsilon_high": 0.2, **options}
    module = ll.FusedLinearGRPOLoss(metrics=True, **options)
    out = module(batch.hidden, batch.weight, batch.labels, **{**arguments, **given.ours})
    assert out.loss.dtype == torch.float64
    return Run(
        out.loss.item(),
        list(torch.autograd.grad(out.loss, batch.leaves)),
        {name: value.item() for name, value in out.metrics.items()},
    )


def compare(trainer: Any, *, without: tuple[str, ...] = (), batch: Batch | None = None, given: Given | None = None, **options):
    """Options have one name in TRL's trainer and in our module. Returns our run."""
    batch, given = make() if batch is None else batch, Given() if given is None else given
    theirs, ours = run_trl(trainer, batch, options, given), run_ours(batch, options, given)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-12)
    for mine, its in zip(ours.gradients, theirs.gradients, strict=True):
        assert its.abs().max() > 0
        assert relative_error(mine, its) <= 1e-12
    assert {"entropy"} <= theirs.metrics.keys() - set(without) <= ours.metrics.keys()
    for name, value in theirs.metrics.items():
        if name not in without:
            assert ours.metrics[name] == pytest.approx(value, rel=2.0**-22), name  # TRL counts clipped tokens in float32
    return ours
