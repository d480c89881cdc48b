"""Micro-batches of any sizes add up to one batch: ``num_items_in_batch`` and ``count_items`` of every loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import logitless as ll
from logitless.fused import num_items as counts

from ..helpers import relative_error
from .variants import VARIANTS

H, V, T = 6, 19, 6
#: Scored tokens of the chosen, then of the rejected sequences. Pair 1 has none; pairs 2 and 4 lack a side.
LENGTHS = (5, 0, 3, 6, 0, 4, 0, 0, 2, 6)
PAIRS = len(LENGTHS) // 2
#: One micro-batch has nothing scored, and one has no sequences.
PARTS: dict[str, list[list[int]]] = {"one by one": [[0], [1], [2, 3], [4], []], "uneven": [[3, 1], [0, 4, 2]]}
BUDGETS = {"one tile": 1 << 30, "tiles of 8 tokens": 1300}
every_budget = pytest.mark.parametrize("budget", BUDGETS)


def own_pair(pairs: ll.Pairs) -> ll.PreferenceLossResult:
    """A pair term, and an NLL term divided by tokens."""
    margin = torch.tanh(pairs.chosen_logps - pairs.rejected_logps)
    nll = pairs.chosen_nll()
    return ll.PreferenceLossResult(margin + 0.3 * nll, metrics={"nll": pairs.chosen_nll_of_call(), "margin": margin})


def own_sequence(sequences: ll.Sequences) -> ll.PreferenceLossResult:
    return ll.PreferenceLossResult(torch.tanh(sequences.mean_logps) + 0.2 * sequences.token_mean_nll())


def own_of_sequences(tokens: ll.Tokens) -> Tensor:
    return tokens.to_tokens(tokens.sequence_mean(tokens.logps).square()) - tokens.logps * tokens.advantages


REFUSED = {"aot", "aot smoothed", "aot_unpaired", "aot_unpaired smoothed", "wpo sft"}
#: Other numbers of an option.
REPEATED = {"cdpo", "margin mix", "ld 0", "ld 1", "alpha 1.7", "discopop tau", "simpo smoothed", "cpo smoothed", "wpo hinge"}
REPEATED |= {"js hinge", "js robust", "js exo", "js discopop"}
PREFERENCE: dict[str, ll.FusedLinearPreferenceLoss] = {
    **{name: variant.module for name, variant in VARIANTS.items() if name not in REFUSED | REPEATED},
    "ipo module": ll.FusedLinearIPOLoss(metrics=True),
    "sft alone": ll.FusedLinearDPOLoss(loss_type=["sft", "sft"], loss_weights=[0.5, 2.0], metrics=True),
    "orpo metrics": ll.FusedLinearORPOLoss(metrics=True),
    "cpo metrics": ll.FusedLinearCPOLoss(metrics=True),
    "kto metrics": ll.FusedLinearKTOLoss(undesirable_weight=1.7, metrics=True),
    "own pair": ll.FusedLinearPreferenceLoss(own_pair, uses_nll=True, metrics=True),
    "own sequence": ll.FusedLinearPreferenceLoss(own_sequence, group="sequence", uses_nll=True, metrics=True),
}
PPO, GRPO = ll.FusedLinearPPOLoss, ll.FusedLinearGRPOLoss
OF_SEQUENCES = ("grpo", "sapo", "luspo", "dr_grpo")
POLICY: dict[str, ll.FusedLinearPolicyLoss] = {
    **{
        f"ppo {name}": PPO(entropy_coef=0.1, aggregation=name, max_length=7 if name == "fixed-length" else None)
        for name in ("token-mean", "sequence-mean", "sequence-mean-token-sum", "fixed-length")
    },
    **{
        f"{name} {coef}": GRPO(name, entropy_coef=coef, max_completion_length=9 if name == "dr_grpo" else None, metrics=True)
        for name in OF_SEQUENCES
        for coef in (0.0, 0.1)
    },
    "dapo bonus": GRPO("dapo", entropy_coef=0.1),
    "bnpo": GRPO("bnpo"),
    "cispo": GRPO("cispo", epsilon_high=5.0),
    "vespo": GRPO("vespo"),
    "gspo bonus": GRPO("grpo", importance_sampling_level="sequence", entropy_coef=0.1),
    "gspo dapo": GRPO("dapo", importance_sampling_level="sequence"),
    "off policy": GRPO("grpo", off_policy_mask_threshold=0.05, entropy_coef=0.1),
    "top entropy": GRPO("dapo", top_entropy_quantile=0.4),
    "top entropy grpo": GRPO("grpo", top_entropy_quantile=0.4),
    "own": ll.FusedLinearPolicyLoss(lambda t: -t.logps * t.advantages, entropy_coef=0.1, metrics=True),
    "own of sequences": ll.FusedLinearPolicyLoss(own_of_sequences, group="sequence", aggregation="sequence-mean"),
}
LOSSES: dict[str, Any] = {**PREFERENCE, **POLICY}


@dataclass
class Batch:
    """Inputs of a step, and which of them each sequence has."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    per_sequence: dict[str, Tensor]
    others: dict[str, Any]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]

    def run(self, loss: Any, rows: list[int], num_items: Any = None) -> Any:
        """The loss of some sequences."""
        given = {name: value[rows] for name, value in self.per_sequence.items()}
        given |= self.others | ({} if num_items is None else {"num_items_in_batch": num_items})
        return loss(self.hidden[rows], self.weight, self.labels[rows], bias=self.bias, **given)

    def count(self, loss: Any, rows: list[int]) -> Tensor:
        nll_labels = self.per_sequence.get("nll_labels")
        return loss.count_items(self.labels[rows], nll_labels=None if nll_labels is None else nll_labels[rows])


def make(loss: Any, dtype: torch.dtype = torch.float64, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    count = len(lengths)
    labels = torch.randint(V, (count, T), generator=g)
    labels[torch.arange(T) >= torch.tensor(lengths)[:, None]] = -100
    hidden, weight, bias = (normal(*shape).requires_grad_() for shape in ((count, T, H), (V, H), (V,)))
    given: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    if isinstance(loss, ll.FusedLinearPolicyLoss):
        given = {"advantages": normal(count), "old_logps": normal(count, T) - 3}
        if loss._takes_threshold:
            others["entropy_threshold"] = 1.7
    else:
        if loss.loss.needs_reference:
            given["ref_logps"] = normal(count) - 10
        if loss.loss.uses_nll:
            other = torch.randint(V, (count, T), generator=g)
            given["nll_labels"] = torch.where((labels == -100) & (torch.rand(count, T, generator=g) < 0.5), other, labels)
        if isinstance(loss, ll.FusedLinearKTOLoss):
            given["desirable"] = torch.arange(count) % 3 == 0
            others["kl"] = 0.4 if loss.loss_type == "kto" else None
    return Batch(hidden, weight, bias, labels, given, others)


def rows_of(loss: Any, part: list[int]) -> list[int]:
    """The sequences of some units: of pairs the chosen, then the rejected ones."""
    if isinstance(loss, ll.FusedLinearPolicyLoss) or loss.loss.group == "sequence":
        return [row for unit in part for row in (unit, PAIRS + unit)]
    return [*part, *(PAIRS + unit for unit in part)]


def assert_adds_up(total: Tensor, whole: Tensor, leaves: list[Tensor], tolerance: float) -> None:
    """Value, and the gradients of hidden states, weight and bias."""
    assert abs(total.item() - whole.item()) <= tolerance * max(1.0, abs(whole.item()))
    parts, one = (torch.autograd.grad(loss, leaves) for loss in (total, whole))
    for a, b in zip(parts, one, strict=True):
        assert b.abs().max() > 0
        assert relative_error(a, b) <= tolerance


@pytest.mark.parametrize(("split", "budget"), list(zip(PARTS, BUDGETS, strict=True)))
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_one_batch(name, split, budget, monkeypatch):
    loss = LOSSES[name]
    batch, parts = make(loss), [rows_of(loss, part) for part in PARTS[split]]
    items: Any = sum(batch.count(loss, rows) for rows in parts)
    assert torch.equal(items, batch.count(loss, list(range(2 * PAIRS))))
    if split == "uneven":  # the way of tensors on a GPU, whose value is not read
        monkeypatch.setattr(counts, "check_num_items", lambda value, *_: value if isinstance(value, Tensor) else float(value))
    else:
        items = tuple(items.tolist())
    with ll.settings(memory_budget=BUDGETS[budget]):
        whole = batch.run(loss, list(range(2 * PAIRS)))
        outs = [batch.run(loss, rows, items) for rows in parts]
        alone = [batch.run(loss, rows) for rows in parts] if loss.metrics else []
    assert ([step.schedule for step in whole.plan.steps] == ["gradient_in_forward"]) == (budget == "one tile")
    total = torch.stack([out.loss for out in outs]).sum()
    assert_adds_up(total, whole.loss, batch.leaves, 1e-12)
    for out, other in zip(outs, alone, strict=False):  # metrics are those of the call alone
        assert out.metrics.keys() == other.metrics.keys() == whole.metrics.keys()
        for key, value in other.metrics.items():
            torch.testing.assert_close(out.metrics[key], value, rtol=1e-12, atol=0)


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(
    st.sampled_from(["mix", "orpo metrics", "kto", "own sequence", "dr_grpo 0.1", "ppo token-mean"]),
    st.lists(st.integers(0, 3), min_size=PAIRS, max_size=PAIRS),
)
def test_any_split_adds_up_to_one_batch(name, places):
    """``places``: the micro-batch, of four, of each pair; some have none."""
    loss = LOSSES[name]
    batch = make(loss)
    parts = [rows_of(loss, [unit for unit, place in enumerate(places) if place == i]) for i in range(4)]
    items = sum(batch.count(loss, rows) for rows in parts)
    total = torch.stack([batch.run(loss, rows, items).loss for rows in parts]).sum()
    assert_adds_up(total, batch.run(loss, list(range(2 * PAIRS))).loss, batch.leaves, 1e-12)


@pytest.mark.parametrize(
    "name", ["sigmoid", "mix", "sft", "cpo", "orpo", "kto", "grpo 0.1", "dr_grpo 0.1", "ppo sequence-mean"]
)
def test_micro_batches_in_float32_add_up_to_1e_6(name):
    loss = LOSSES[name]
    batch, parts = make(loss, torch.float32), [rows_of(loss, part) for part in PARTS["one by one"]]
    items = sum(batch.count(loss, rows) for rows in parts)
    whole = batch.run(loss, list(range(2 * PAIRS)))
    total = torch.stack([batch.run(loss, rows, items).loss for rows in parts]).sum()
    assert_adds_up(total, whole.loss, batch.leaves, 1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_counts_of_0_give_a_loss_of_0(name):
    """A step of which no sequence has a scored token: pairs that count, and pairs that do not, have no gradient."""
    loss = LOSSES[name]
    batch = make(loss, lengths=(0,) * 4)
    batch.per_sequence.pop("nll_labels", None)
    for items in ((0, 0), torch.zeros(2, dtype=torch.float64)):
        out = batch.run(loss, [0, 1, 2, 3], items)
        assert out.loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(out.loss, batch.leaves))


def two_counts(loss: Any) -> bool:
    policy = isinstance(loss, ll.FusedLinearPolicyLoss)
    counted = loss._counted("") if policy else loss.loss.counted("")
    return None not in counted


@pytest.mark.parametrize("name", LOSSES)
def test_one_number_is_accepted_where_the_loss_has_one_count(name):
    loss = LOSSES[name]
    batch = make(loss)
    rows = list(range(2 * PAIRS))
    units, tokens = batch.count(loss, rows).tolist()
    if two_counts(loss):
        assert units > 0 and tokens > 0
        with pytest.raises(ValueError, match=r"num_items_in_batch must be two numbers .* divides by \w+ and by .*count_items"):
            batch.run(loss, rows, 7)
        return
    assert (units == 0) != (tokens == 0)
    for one in (units + tokens, torch.tensor(units + tokens), torch.tensor([units + tokens])):
        torch.testing.assert_close(batch.run(loss, rows, one).loss, batch.run(loss, rows).loss, rtol=1e-13, atol=0)


COUNTED: list[tuple[Any, list[float]]] = [
    # of the table in docs/normalisation.md; 4 sequences of 3, 1, 2 and 0 scored tokens
    (ll.FusedLinearDPOLoss(), [2, 0]),
    (ll.FusedLinearDPOLoss(ld_alpha=0.5, use_weighting=True), [2, 0]),
    (ll.FusedLinearDPOLoss(loss_type="sft"), [0, 4]),
    (ll.FusedLinearDPOLoss(loss_type=["sigmoid", "sft"]), [2, 4]),
    (ll.FusedLinearIPOLoss(), [2, 0]),
    (ll.FusedLinearSimPOLoss(), [2, 0]),
    (ll.FusedLinearCPOLoss(), [2, 4]),
    (ll.FusedLinearCPOLoss(cpo_alpha=0.0), [2, 0]),
    (ll.FusedLinearORPOLoss(), [2, 4]),
    (ll.FusedLinearKTOLoss(), [4, 0]),
    (ll.FusedLinearPreferenceLoss(own_sequence, group="sequence", uses_nll=True), [4, 6]),
    (PPO(entropy_coef=0.1), [0, 6]),
    (PPO(entropy_coef=0.1, aggregation="sequence-mean"), [4, 0]),
    (PPO(aggregation="fixed-length", max_length=5), [4, 0]),
    *((GRPO(name), [0, 6]) for name in ("dapo", "bnpo", "vespo")),
    *((GRPO(name), [4, 0]) for name in ("grpo", "sapo", "luspo")),
    *((GRPO(name, entropy_coef=0.1), [4, 6]) for name in ("grpo", "sapo", "luspo")),
    (GRPO("dapo", entropy_coef=0.1), [0, 6]),
    (GRPO("dapo", top_entropy_quantile=0.5), [0, 6]),
]


@pytest.mark.parametrize(("loss", "expected"), COUNTED)
def test_count_items_counts_what_the_table_says(loss, expected):
    padded = torch.tensor([[1, 2, 3], [4, -100, -100], [5, 6, -100], [-100, -100, -100]])
    packed, bounds = torch.tensor([1, 2, 3, 4, 5, 6, -100]), torch.tensor([0, 3, 4, 7, 7])
    for found in (loss.count_items(padded), loss.count_items(packed, cu_seqlens=bounds)):
        assert found.dtype == torch.float64
        assert found.tolist() == expected
    if not isinstance(loss, ll.FusedLinearPolicyLoss) and loss.loss.uses_nll:
        nll_labels = torch.tensor([[1, 2, 3], [4, 9, -100], [5, 6, 7], [-100, -100, 8]])
        sequences = 4 if loss.loss.group == "sequence" else 2
        assert loss.count_items(padded, nll_labels=nll_labels)[1] == (nll_labels[:sequences] != -100).sum()
    else:
        with pytest.raises(ValueError, match="nll_labels is given, but this loss has no NLL term"):
            loss.count_items(padded, nll_labels=padded)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"labels": [[1]]}, "labels must be a torch.Tensor"),
        ({"labels": torch.zeros(2, 2)}, "labels must be int32 or int64"),
        ({"labels": torch.zeros(3, 2, dtype=torch.long)}, "labels must hold an even number of sequences"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, "no cu_seqlens"),
        ({"labels": torch.zeros(4, dtype=torch.long), "cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens must start at 0"),
        ({"nll_labels": torch.zeros(2, 3, dtype=torch.long)}, "nll_labels must have shape"),
        ({"nll_labels": torch.zeros(2, 2)}, "nll_labels must be int32 or int64"),
    ],
)
def test_bad_labels_of_count_items_are_named(changed, words):
    with pytest.raises((TypeError, ValueError), match=words):
        ll.FusedLinearORPOLoss().count_items(**{"labels": torch.zeros(2, 2, dtype=torch.long), **changed})


COUPLED: dict[str, Any] = {
    "aot": ll.FusedLinearDPOLoss(loss_type="aot"),
    "aot_unpaired with sigmoid": ll.FusedLinearDPOLoss(loss_type=["sigmoid", "aot_unpaired"]),
    "wpo with sft": ll.FusedLinearDPOLoss(loss_type=["sigmoid", "sft"], use_weighting=True),
    "own batch": ll.FusedLinearPreferenceLoss(lambda pairs: pairs.chosen_logps.sort().values, group="batch"),
    "own batch of tokens": ll.FusedLinearPolicyLoss(lambda t: t.logps - t.logps.mean(), group="batch"),
    "top entropy bonus": GRPO("dapo", top_entropy_quantile=0.5, entropy_coef=0.1),
}


@pytest.mark.parametrize("name", COUPLED)
def test_what_couples_the_batch_is_refused(name):
    loss = COUPLED[name]
    batch = make(loss)
    for call in (lambda: batch.run(loss, [0, 5], (1, 7)), lambda: loss.count_items(batch.labels)):
        with pytest.raises(ValueError, match=r"(num_items_in_batch|count_items) cannot be used with"):
            call()
    assert batch.run(loss, [0, 5]).loss.isfinite()


def test_top_entropy_needs_its_threshold():
    loss = LOSSES["top entropy"]
    batch = make(loss)
    batch.others.clear()
    with pytest.raises(ValueError, match="num_items_in_batch needs an entropy_threshold"):
        batch.run(loss, [0, 1], 7)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ((2,), "one number, or two"),
        ((2, 3, 4), "one number, or two"),
        ("22", "one number, or two"),
        (True, "one number, or two"),
        (torch.ones(3), "one number, or two"),
        (torch.tensor([True, True]), "one number, or two"),
        ((2, "3"), "one number, or two"),
        ((2, float("nan")), "must be a finite number"),
        ((-2, 3), "must be a finite number"),
        ((0, 3), "must be a finite number"),
        ((2, 0), "must be a finite number"),
        (torch.tensor([2.0, torch.inf]), "must be a finite number"),
        (torch.ones(2, device="meta"), "is on meta"),
    ],
)
def test_bad_counts_are_named(items, words):
    batch = make(LOSSES["orpo"])
    with pytest.raises((TypeError, ValueError), match=f"num_items_in_batch.* {words}"):
        batch.run(LOSSES["orpo"], list(range(2 * PAIRS)), items)


# Sums of objectives


def objectives(rows: list[int], items: dict[str, Any] | None = None) -> dict[str, ll.Objective]:
    """Over the sequences of a part of the batch: pairs 0, 1, 3 of one objective, sequences 2, 4, 7, 9 of another."""
    place = {row: i for i, row in enumerate(rows)}
    pairs = [p for p in (0, 1, 3) if p in place]
    chosen, flagged = [place[p] for p in pairs], [s for s in (2, 4, 7, 9) if s in place]
    made = {
        "orpo": ll.Objective(ll.FusedLinearORPOLoss(0.3), [*chosen, *(place[p + PAIRS] for p in pairs)], weight=0.7),
        "kto": ll.Objective(
            ll.FusedLinearKTOLoss(),
            [place[s] for s in flagged],
            weight=2.0,
            ref_logps=torch.tensor([-3.0 - s for s in flagged], dtype=torch.float64),
            desirable=torch.tensor([s > 3 for s in flagged], dtype=torch.bool),
            kl=0.2,
        ),
    }
    for name, given in (items or {}).items():
        made[name].num_items_in_batch = given
    return made


@every_budget
def test_objectives_of_micro_batches_add_up(budget):
    """In the first part one objective is empty, in the last one both are."""
    loss, batch = ll.FusedLinearMultiObjectiveLoss(), make(LOSSES["sigmoid"])

    def run(rows: list[int], items: dict[str, Any] | None = None) -> Any:
        return loss(batch.hidden[rows], batch.weight, batch.labels[rows], objectives(rows, items), bias=batch.bias)

    def count(rows: list[int]) -> dict[str, Tensor]:
        return loss.count_items(batch.labels[rows], objectives(rows))

    parts = [[0, 5], [1, 6, 2, 7, 3, 8], [4, 9], []]
    items = {name: sum(count(rows)[name] for rows in parts) for name in ("orpo", "kto")}
    assert {name: counted.tolist() for name, counted in items.items()} == {"orpo": [3, 11], "kto": [4, 0]}
    with ll.settings(memory_budget=BUDGETS[budget]):
        whole = run(list(range(2 * PAIRS)))
        outs = [run(rows, items) for rows in parts]
    assert_adds_up(torch.stack([out.loss for out in outs]).sum(), whole.loss, batch.leaves, 1e-12)
    for name, value in whole.losses.items():
        assert sum(out.losses[name] for out in outs).item() == pytest.approx(value.item(), rel=1e-12)


def test_objectives_have_their_own_counts():
    loss, batch = ll.FusedLinearMultiObjectiveLoss(), make(LOSSES["sigmoid"])

    def run(made: dict[str, ll.Objective], **options: Any) -> Any:
        return loss(batch.hidden, batch.weight, batch.labels, made, **options)

    rows = list(range(2 * PAIRS))
    with pytest.raises(ValueError, match=r"num_items_in_batch .* Objective\(num_items_in_batch"):
        run(objectives(rows), num_items_in_batch=3)
    with pytest.raises(ValueError, match=r"objectives\['orpo'\].num_items_in_batch must be two numbers"):
        run(objectives(rows, {"orpo": 3}))
    with pytest.raises(ValueError, match=r"objectives\['kto'\].num_items_in_batch must be a finite number"):
        run(objectives(rows, {"kto": -1}))
    with pytest.raises(ValueError, match=r"objectives\['kto'\].sequences .* at least one \(or none, with num_items_in_batch\)"):
        run({"kto": objectives([0, 5])["kto"]})
    coupled = ll.Objective(COUPLED["aot"], rows, ref_logps=torch.zeros(10), num_items_in_batch=5)
    with pytest.raises(ValueError, match=r"objectives\['aot'\].num_items_in_batch cannot be used"):
        run({"aot": coupled})


# Losses of values, rewards and models


def add_up(loss: Callable[..., Tensor], parts: list[list[int]], leaf: Tensor, items: float | Tensor) -> None:
    total, whole = sum(loss(rows, items) for rows in parts), loss(list(range(len(leaf))), None)
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    found, expected = (torch.autograd.grad(value, leaf)[0] for value in (total, whole))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_value_losses_of_micro_batches_add_up(aggregation):
    g = torch.Generator().manual_seed(0)
    values, returns = (torch.randn(5, T, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(T) < torch.tensor([6, 0, 2, 3, 1])[:, None]
    values.requires_grad_()

    def loss(rows: list[int], items: Any) -> Tensor:
        options = {"aggregation": aggregation, "num_items_in_batch": items}
        given = {"old_values": returns[rows] + 0.5, "clip_range": 0.3, "mask": mask[rows]}
        return ll.value_loss(values[rows], returns[rows], **given, **options).loss

    one = float(mask.sum()) if aggregation == "token-mean" else 5.0
    for items in (one, torch.tensor([5.0, float(mask.sum())])):
        add_up(loss, [[0, 3], [1], [2, 4], []], values, items)
    assert loss([1], 0) == 0
    with pytest.raises(ValueError, match="num_items_in_batch must be a finite number"):
        loss([1], -1.0)


def test_reward_losses_of_micro_batches_add_up():
    rewards = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    module = ll.BradleyTerryLoss(0.01)
    parts = [[0, 5], [1, 2, 6, 7], [3, 4, 8, 9], []]
    items = sum(module.count_items(rewards[rows]) for rows in parts)
    assert items.tolist() == module.count_items(rewards[:5, None], rewards[5:, None]).tolist() == [5, 0]
    for given in (items, 5):
        add_up(lambda rows, n: module(rewards[rows], num_items_in_batch=n).loss, parts, rewards, given)
    assert module(rewards[:4], num_items_in_batch=5).metrics["margin"] == (rewards[:2] - rewards[2:4]).mean()
    with pytest.raises(ValueError, match="num_items_in_batch must be a finite number"):
        module(rewards, num_items_in_batch=0)


@pytest.mark.parametrize("name", ["orpo", "mix", "kto", "dr_grpo 0.1"])
def test_model_losses_of_micro_batches_add_up(name):
    """Gradients of all parameters of a model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2, n_positions=16, attn_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    loss = LOSSES[name]
    batch = make(loss)
    batch.per_sequence.pop("nll_labels", None)
    g = torch.Generator().manual_seed(1)
    sequences = [torch.randint(V, (length + 1,), generator=g) for length in LENGTHS]

    def run(rows: list[int], items: Any = None) -> Tensor:
        packed = ll.pack([sequences[row] for row in rows], prompt_lengths=[1] * len(rows))
        given = {name: value[rows] for name, value in batch.per_sequence.items()}
        if "old_logps" in given:
            of_tokens = torch.cat((given["old_logps"], given["old_logps"][:, :1]), 1)
            given["old_logps"] = torch.cat([v[: LENGTHS[r] + 1] for r, v in zip(rows, of_tokens, strict=True)])
        counted.append(loss.count_items(packed.labels, packed.cu_seqlens))
        return ll.model_loss(model, loss, packed, num_items_in_batch=items, **given, **batch.others).loss

    counted: list[Tensor] = []
    parts = [rows_of(loss, part) for part in ([0, 3], [1], [2, 4])]
    whole = run(list(range(2 * PAIRS)))
    (items,) = counted
    total = torch.stack([run(rows, items) for rows in parts]).sum()
    assert torch.equal(sum(counted[1:]), items)
    assert_adds_up(total, whole, [p for n, p in model.named_parameters() if "attn.bias" not in n], 1e-11)
