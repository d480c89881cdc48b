"""Sequences that several ranks share: losses, gradients and metrics are those of one process, in float64 to 1e-12."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import logitless as ll

from ..helpers import relative_error
from ..losses.test_micro_batches import POLICY, PREFERENCE, Batch, H, T, V, make
from ..losses.variants import VARIANTS
from .ranks import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

DPO, GRPO, PPO = ll.FusedLinearDPOLoss, ll.FusedLinearGRPOLoss, ll.FusedLinearPPOLoss
#: Scored tokens of each sequence; one has none, and some are on one rank alone.
LENGTHS = (5, 0, 3, 6, 1, 4, 2, 6)
#: Ranks keep float64 tiles of this many bytes: 6 tokens of all.
SMALL = 6 * V * 8


def own_batch(pairs: ll.Pairs) -> Tensor:
    return -torch.log_softmax(0.1 * (pairs.chosen_logps - pairs.rejected_logps), 0)


LOSSES: dict[str, Any] = {
    **{name: loss for name, loss in PREFERENCE.items() if name != "reference free"},
    **{name: VARIANTS[name].module for name in ("aot", "aot_unpaired", "wpo sft", "wpo hinge", "js exo")},
    "ld metrics": DPO(ld_alpha=0.4, metrics=True),
    "own batch": ll.FusedLinearPreferenceLoss(own_batch, group="batch"),
    **{name: loss for name, loss in POLICY.items() if name not in ("dr_grpo 0.0", "luspo 0.0")},
    "gspo": GRPO("grpo", importance_sampling_level="sequence", metrics=True),
    "gspo kl": GRPO("grpo", importance_sampling_level="sequence", beta=0.1),
    "gspo sapo": GRPO("sapo", importance_sampling_level="sequence"),
    "masked sequences": GRPO("grpo", importance_sampling_mode="sequence_mask", importance_sampling_clip_max=8.0),
    "vespo truncated": GRPO("vespo", importance_sampling_mode="sequence_truncate"),
    "truncated tokens": PPO(importance_sampling_mode="token_truncate", aggregation="sequence-mean"),
}
#: Losses whose reference is scored in the same tiles.
WITH_STATES = ("sigmoid", "ld 0.4", "wpo", "mix", "kto weighted", "ipo module", "gspo kl")
#: Losses with ranks that score nothing, or have no position at all.
WITH_EMPTY_RANKS = (*WITH_STATES, "ld metrics", "orpo metrics", "kto metrics", "cpo", "aot", "simpo", "gspo", "gspo dapo")
WITH_EMPTY_RANKS += ("masked sequences", "vespo", "off policy", "grpo 0.1", "ppo token-mean", "own of sequences")


def batch_of(name: str) -> Batch:
    """Inputs of a loss on whole sequences."""
    batch = make(LOSSES[name], lengths=LENGTHS)
    batch.labels[3, 2] = -100  # a token in the middle that is not scored
    g = torch.Generator().manual_seed(5)
    loss = LOSSES[name]
    if isinstance(loss, ll.FusedLinearPolicyLoss):
        if loss.importance_sampling_mode is not None:
            batch.per_sequence["sampling_logps"] = batch.per_sequence["old_logps"] + 0.3 * _normal(g, len(LENGTHS), T)
        if loss.loss.needs_reference:
            batch.per_sequence["ref_logps"] = _normal(g, len(LENGTHS), T) - 3
    if "nll_labels" in batch.per_sequence:
        batch.per_sequence["nll_labels"][3, 2] = 4
    return batch


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_states(batch: Batch) -> None:
    """The reference's hidden states and head in place of its log-probabilities."""
    batch.per_sequence.pop("ref_logps", None)
    g = torch.Generator().manual_seed(7)
    batch.per_sequence["ref_hidden"] = _normal(g, len(LENGTHS), T, 3)
    batch.others["ref_weight"] = _normal(g, V, 3)


def positions(layout: str, ranks: int) -> list[list[int]]:
    """The positions of each rank. ``first``: rank 0 has only positions that are not scored, and the last rank may have none."""
    if layout == "first":
        borders = [0, 0, *[4] * (ranks - 2), T]
        return [list(range(a, b)) for a, b in zip(borders, borders[1:], strict=False)]
    return positions_of(layout, ranks, T)


def positions_of(layout: str, ranks: int, length: int) -> list[list[int]]:
    borders = [length * j // (2 * ranks) for j in range(2 * ranks + 1)]
    parts = [list(range(a, b)) for a, b in zip(borders, borders[1:], strict=False)]
    if layout == "contiguous":
        return [parts[2 * r] + parts[2 * r + 1] for r in range(ranks)]
    return [parts[r] + parts[2 * ranks - 1 - r] for r in range(ranks)]


def part_of(batch: Batch, here: list[int], name: str, packed: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """The leaves and the other arguments of a rank with some of the positions."""
    hidden = batch.hidden[:, here].detach()
    given = {n: v[:, here] if v.shape[1:2] == (T,) else v for n, v in batch.per_sequence.items()} | batch.others
    given["labels"] = batch.labels[:, here]
    if getattr(LOSSES[name], "ld_alpha", None) is not None:
        given["position_ids"] = torch.tensor(here, dtype=torch.long).expand(len(hidden), -1)
    if packed:
        hidden = hidden.reshape(-1, H)
        given = {n: v.flatten(0, 1) if isinstance(v, Tensor) and v.shape[1:2] == (len(here),) else v for n, v in given.items()}
        given["cu_seqlens"] = torch.arange(len(LENGTHS) + 1) * len(here)
    leaves = [hidden.requires_grad_(), *(t.detach().requires_grad_() for t in (batch.weight, batch.bias))]
    return leaves, given


@contextmanager
def collectives(seen: list[tuple[str, int]]) -> Iterator[None]:
    """Name and bytes of each collective on this rank."""
    before = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(("all_reduce", tensor.numel() * tensor.itemsize))
        return before[0](tensor, *args, **kwargs)

    def all_gather(tensors: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(("all_gather", tensor.numel() * tensor.itemsize))
        return before[1](tensors, tensor, *args, **kwargs)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        yield
    finally:
        dist.all_reduce, dist.all_gather = before


def result(out: Any, leaves: list[Tensor]) -> dict[str, Any]:
    """Everything that is compared."""
    gradients = torch.autograd.grad(out.loss, leaves)
    found = {"loss": out.loss.detach(), "gradients": list(gradients), "metrics": out.metrics, "logps": out.logps}
    found["schedules"] = [step.schedule for step in out.plan.steps]
    for name in ("chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards", "rewards", "ref_logps", "entropies"):
        if getattr(out, name, None) is not None:
            found[name] = getattr(out, name)
    return found


def cases(ranks: int) -> Iterator[tuple[str, str, str, bool]]:
    """Names of a case: the loss, the layout, where the reference comes from, and whether sequences are packed."""
    for name in LOSSES:
        yield name, "zigzag", "given", True
        if ranks == 2 or name in WITH_EMPTY_RANKS:
            yield name, "contiguous", "given", False
    for name in WITH_EMPTY_RANKS:
        yield name, "first", "given", False
    for name in WITH_STATES:
        yield name, "zigzag", "states", False


def on_each_rank(rank: int, ranks: int) -> dict[Any, Any]:
    return losses_on_a_rank(rank, ranks) | of_rank(rank, ranks)


def of_rank(rank: int, ranks: int) -> dict[str, Any]:
    return {
        "flops": flops_on_a_rank(rank, ranks),
        "shift": shift_on_a_rank(rank, ranks),
        "refused": {name: refusal(*call) for name, call in REFUSED.items()},
        "objectives": objectives_on_a_rank(rank, ranks),
        "one rank": group_of_one_on_a_rank(rank, ranks),
    }


def losses_on_a_rank(rank: int, ranks: int) -> dict[Any, Any]:
    found = {}
    for case in cases(ranks):
        name, layout, reference, packed = case
        batch = batch_of(name)
        if reference == "states":
            with_states(batch)
        leaves, given = part_of(batch, positions(layout, ranks)[rank], name, packed)
        seen: list[tuple[str, int]] = []
        budget = SMALL if layout == "zigzag" and rank == 1 else 1 << 30  # ranks need not agree on a schedule
        with ll.settings(memory_budget=budget), collectives(seen):
            out = LOSSES[name](leaves[0], leaves[1], bias=leaves[2], sequence_group=dist.group.WORLD, **given)
        found[case] = result(out, leaves) | {"collectives": seen}
    return found


@functools.cache
def ranks_of(ranks: int) -> list[dict[Any, Any]]:
    return run_ranks(ranks, on_each_rank, ranks)


@functools.cache
def one_process(name: str, reference: str) -> dict[str, Any]:
    batch = batch_of(name)
    if reference == "states":
        with_states(batch)
    return result(batch.run(LOSSES[name], list(range(len(LENGTHS)))), batch.leaves)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.double() - b.double()).abs().max() <= 1e-12 * max(1.0, b.double().abs().max().item()))


every_number_of_ranks = pytest.mark.parametrize("ranks", [2, 3])


@pytest.mark.parametrize(("ranks", "case"), [(ranks, case) for ranks in (2, 3) for case in cases(ranks)], ids=str)
def test_losses_gradients_and_metrics_are_those_of_one_process(ranks, case):
    name, layout, reference, _ = case
    whole, parts = one_process(name, reference), [found[case] for found in ranks_of(ranks)]
    assert close(sum(part["loss"] for part in parts), whole["loss"])
    if isinstance(LOSSES[name], ll.FusedLinearPreferenceLoss):
        assert all(torch.equal(part["loss"], parts[0]["loss"]) for part in parts)
    dhidden = torch.zeros_like(whole["gradients"][0])
    for here, part in zip(positions(layout, ranks), parts, strict=True):
        dhidden[:, here] = part["gradients"][0].view(len(LENGTHS), len(here), H)
    assert relative_error(dhidden, whole["gradients"][0]) <= 1e-12
    for i in (1, 2):
        assert relative_error(sum(part["gradients"][i] for part in parts), whole["gradients"][i]) <= 1e-12
    per_token = isinstance(LOSSES[name], ll.FusedLinearPolicyLoss)
    for part, here in zip(parts, positions(layout, ranks), strict=True):
        assert part["metrics"].keys() == whole["metrics"].keys()
        assert all(close(part["metrics"][key], value) for key, value in whole["metrics"].items())
        for key in whole.keys() - {"loss", "gradients", "metrics", "schedules"}:
            value = whole[key][:, here] if per_token else whole[key]
            assert not value.numel() or close(part[key].view(value.shape), value), key
    one_step = not per_token or LOSSES[name].loss.group == "sequence"
    alone = "recompute" if one_step else "gradient_in_forward"
    if layout == "zigzag" and ranks == 2:  # more tokens than a tile of rank 1 holds
        assert [set(part["schedules"]) for part in parts] == [{"gradient_in_forward"}, {alone}]


@every_number_of_ranks
def test_every_rank_runs_the_same_collectives_and_one_before_the_loss(ranks):
    row = 8 * len(LENGTHS)
    for case in cases(ranks):
        parts, loss = [found[case]["collectives"] for found in ranks_of(ranks)], LOSSES[case[0]]
        assert all(part == parts[0] for part in parts)
        seen = [size for _, size in parts[0]]
        if isinstance(loss, ll.FusedLinearPolicyLoss):
            assert seen[0] == row  # the numbers of scored tokens
            if case[0] == "gspo":
                assert seen[1:3] == [row, row]  # log-ratios before the loss, their gradient after it
                assert seen[3:] == [8 * 7, 2 * row]  # metrics: means over tokens, shares of sequences
            continue
        if getattr(loss, "ld_alpha", None) is not None:  # the order of the tokens, before any is scored
            assert [kind for kind, _ in parts[0][:2]] == ["all_reduce", "all_gather"] and seen[0] == 8
            seen = seen[2:]
        rows = 2 + 2 * loss.loss.uses_nll + loss.loss.uses_confidence + (case[2] == "states")
        assert seen == [rows * row, *([2 * 4 * 8] if loss.metrics else [])], case


def flops_on_a_rank(rank: int, ranks: int) -> dict[tuple[str, str], float]:
    """FLOP / (N H V) of a trained head: in one tile, and in more tokens than a tile holds."""
    found = {}
    for name in ("sigmoid", "sigmoid_norm", "kto weighted", "gspo"):
        for budget, size in (("one tile", 1 << 30), ("small", SMALL)):
            leaves, given = part_of(batch_of(name), positions("contiguous", ranks)[rank], name, False)
            with ll.settings(memory_budget=size, batch_invariant=False), FlopCounterMode(display=False) as counter:
                out = LOSSES[name](leaves[0], leaves[1], bias=leaves[2], sequence_group=dist.group.WORLD, **given)
                out.loss.backward()
            scored = int((given["labels"] != -100).sum())
            found[name, budget] = counter.get_total_flops() / (scored * H * V)
    return found


@every_number_of_ranks
def test_six_passes_where_the_rows_of_a_rank_fit_one_tile_else_eight(ranks):
    for rank, found in enumerate(ranks_of(ranks)):
        for (_, budget), passes in found["flops"].items():
            if budget == "one tile" or rank == 0:  # the others may have too few rows to fill a tile
                assert passes == pytest.approx(6 if budget == "one tile" else 8, abs=0.02)


def shift_on_a_rank(rank: int, ranks: int) -> dict[str, tuple[Tensor, Tensor]]:
    hidden, labels = whole_row(ranks)
    with pytest.raises(ValueError, match="divisible by 2"):
        ll.shift(hidden[:, :3], labels[:, :3], dist.group.WORLD, "zigzag")
    found = {}
    for layout in ("contiguous", "zigzag"):
        here = positions_of(layout, ranks, labels.shape[1])[rank]
        found[layout] = ll.shift(hidden[:, here], labels[:, here].to(torch.int32), dist.group.WORLD, layout, ignore_index=-7)
    return found


def whole_row(ranks: int) -> tuple[Tensor, Tensor]:
    length = 6 * ranks
    return torch.arange(2.0 * length).view(2, length, 1), torch.arange(2 * length).view(2, length)


@every_number_of_ranks
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_labels_are_shifted_over_the_borders_of_ranks(layout, ranks):
    hidden, labels = whole_row(ranks)
    wanted = torch.cat((labels[:, 1:], torch.full((2, 1), -7)), 1).to(torch.int32)
    for here, found in zip(positions_of(layout, ranks, labels.shape[1]), ranks_of(ranks), strict=True):
        assert torch.equal(found["shift"][layout][0], hidden[:, here])
        assert torch.equal(found["shift"][layout][1], wanted[:, here])


def objectives_of(batch: Batch) -> dict[str, ll.Objective]:
    flags = torch.tensor([True, False, True])
    return {
        "pairs": ll.Objective(ll.FusedLinearORPOLoss(), [0, 2, 4, 7], weight=0.7),
        "dpo": ll.Objective(DPO(), [3, 4], ref_logps=batch.per_sequence["ref_logps"][3:5]),
        "kto": ll.Objective(ll.FusedLinearKTOLoss(), [1, 3, 5], 0.3, batch.per_sequence["ref_logps"][:3], flags, 0.2),
    }


def objectives_on_a_rank(rank: int, ranks: int) -> dict[str, Any]:
    """A sum of objectives over some of the sequences, with weights of tokens; whole with ``ranks=1``."""
    batch = batch_of("sigmoid")
    here = positions("contiguous", ranks)[rank] if ranks > 1 else list(range(T))
    leaves, given = part_of(batch, here, "sigmoid", False)
    weights = _normal(torch.Generator().manual_seed(9), len(LENGTHS), T)[:, here]
    more = {"token_weights": weights, "sequence_group": dist.group.WORLD if ranks > 1 else None}
    labels = given["labels"]
    out = ll.FusedLinearMultiObjectiveLoss()(leaves[0], leaves[1], labels, objectives_of(batch), bias=leaves[2], **more)
    out.loss.backward()
    return {"out": (out.loss.detach(), out.losses, out.logps), "gradients": [leaf.grad for leaf in leaves], "here": here}


@every_number_of_ranks
def test_sums_of_objectives_are_those_of_one_process(ranks):
    whole, parts = objectives_on_a_rank(0, 1), [found["objectives"] for found in ranks_of(ranks)]
    loss, losses, logps = whole["out"]
    assert close(sum(part["out"][0] for part in parts), loss)
    assert all(close(sum(part["out"][1][name] for part in parts), value) for name, value in losses.items())
    for part in parts:
        assert close(part["out"][2], logps)
        assert relative_error(part["gradients"][0], whole["gradients"][0][:, part["here"]]) <= 1e-12
    for i in (1, 2):
        assert relative_error(sum(part["gradients"][i] for part in parts), whole["gradients"][i]) <= 1e-12


def undeclared_nll(pairs: ll.Pairs) -> Tensor:
    return pairs.chosen_nll() + pairs.chosen_logps


#: Calls that cannot be served, with what is passed besides the batch, and a part of the message.
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "ld_alpha without positions": (DPO(ld_alpha=0.4), {"position_ids": None}, "position_ids is needed by ld_alpha"),
    "positions of this rank": (
        DPO(ld_alpha=0.4),
        {"position_ids": torch.zeros(len(LENGTHS), T, dtype=torch.long)},
        "position_ids must be at least 0, and distinct",
    ),
    "positions in another dtype": (
        DPO(ld_alpha=0.4),
        {"position_ids": torch.zeros(len(LENGTHS), T)},
        "position_ids must be an int",
    ),
    "positions in another shape": (
        DPO(ld_alpha=0.4),
        {"position_ids": torch.zeros(1, T, dtype=torch.long)},
        "position_ids must have shape",
    ),
    "unused positions": (DPO(), {"position_ids": torch.zeros(1)}, "position_ids is given"),
    "quantile of the batch": (GRPO(top_entropy_quantile=0.5), {"entropy_threshold": None}, "pass an entropy_threshold"),
    "own loss of the batch": (
        ll.FusedLinearPolicyLoss(lambda tokens: -tokens.logps, group="batch"),
        {},
        "sequence_group cannot be used with a loss that depends on all tokens",
    ),
    "no group": (DPO(), {"sequence_group": "cp"}, "sequence_group must be a torch.distributed.ProcessGroup"),
}


def refusal(loss: Any, others: dict[str, Any], message: str) -> str:
    batch = make(loss, lengths=LENGTHS)
    given = batch.per_sequence | batch.others | {"sequence_group": dist.group.WORLD} | others
    with pytest.raises((TypeError, ValueError)) as caught:
        loss(batch.hidden, batch.weight, batch.labels, **given)
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_an_error_on_every_rank(name):
    assert all(REFUSED[name][2] in found["refused"][name] for found in ranks_of(2))


def group_of_one_on_a_rank(rank: int, ranks: int) -> tuple[Any, Any, Tensor]:
    groups = [dist.new_group([r]) for r in range(ranks)]
    batch, loss = batch_of("ld 0.4"), LOSSES["ld 0.4"]
    where = torch.arange(T).expand(len(LENGTHS), -1)
    outs = [
        loss(batch.hidden, batch.weight, batch.labels, ref_logps=batch.per_sequence["ref_logps"], **more)
        for more in ({}, {"sequence_group": groups[rank], "position_ids": where})
    ]
    nll = ll.FusedLinearPreferenceLoss(undeclared_nll)(
        batch.hidden, batch.weight, batch.labels, sequence_group=dist.group.WORLD
    )
    return outs[0].loss, outs[1].loss, nll.loss


def test_a_group_of_one_rank_is_no_group_and_an_undeclared_nll_is_nan():
    for found in ranks_of(2):
        alone, grouped, nll = found["one rank"]
        assert torch.equal(alone, grouped) and nll.isnan()


def test_bad_arguments_are_errors_that_name_them():
    x, y = torch.zeros(2, 6, 3), torch.zeros(2, 6, dtype=torch.long)
    for call, message in (
        (lambda: ll.shift(x, y, group="cp"), "group must be a torch.distributed.ProcessGroup"),
        (lambda: ll.shift(x, y, layout="ring"), "layout must be one of"),
        (lambda: ll.shift(x, y, layout="zigzag"), "is used with a group only"),
        (lambda: DPO().count_items(y, sequence_group=0), "sequence_group must be a torch.distributed.ProcessGroup"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


#: Losses of two data-parallel groups of two ranks each.
COUNTED = ("sigmoid", "orpo", "kto weighted", "sft alone", "grpo 0.1", "gspo dapo", "ppo fixed-length", "ppo token-mean")


def counted_on_a_rank(rank: int) -> dict[str, Any]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group, pairs = groups[rank // 2], [[0], [1, 2, 3]][rank // 2]
    rows = [*pairs, *(len(LENGTHS) // 2 + pair for pair in pairs)]
    found = {}
    for name in COUNTED:
        batch, loss = batch_of(name), LOSSES[name]
        leaves, given = part_of(batch, positions("contiguous", 2)[rank % 2], name, False)
        mine = {n: v[rows] if isinstance(v, Tensor) and v.dim() and len(v) == len(LENGTHS) else v for n, v in given.items()}
        items = loss.count_items(mine["labels"], nll_labels=mine.get("nll_labels"), sequence_group=group)
        dist.all_reduce(items)
        out = loss(leaves[0][rows], leaves[1], bias=leaves[2], sequence_group=group, num_items_in_batch=items.unbind(), **mine)
        found[name] = result(out, leaves[1:]) | {"items": items}
    return found | {"averaged": averaged_on_a_rank(rank, rows, group), "sharded": sharded_on_a_rank(rank, groups)}


#: Losses of two halves of the sequences, each on two halves of the head.
SHARDED = ("sigmoid", "orpo metrics", "kto metrics", "gspo")
ROWS = (slice(0, 7), slice(7, V))


def sharded_on_a_rank(rank: int, heads: list[Any]) -> dict[str, Any]:
    """``heads``: the groups of ranks that share a head, over its vocabulary."""
    shared = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rows, found = ROWS[rank % 2], {}
    for name in SHARDED:
        leaves, given = part_of(batch_of(name), positions("zigzag", 2)[rank // 2], name, False)
        leaves[1:] = [leaf.detach()[rows].clone().requires_grad_() for leaf in leaves[1:]]
        parallel = ll.VocabParallel(heads[rank // 2], start=rows.start, vocab_size=V)
        more = {"sequence_group": shared[rank % 2], "parallel": parallel}
        found[name] = result(LOSSES[name](leaves[0], leaves[1], bias=leaves[2], **more, **given), leaves)
    return found


def test_ranks_that_share_sequences_may_have_a_sharded_head():
    ranks = four_ranks()
    for name in SHARDED:
        whole, parts = one_process(name, "given"), [found["sharded"][name] for found in ranks]
        assert close(parts[0]["loss"] + parts[2]["loss"], whole["loss"])
        for rank, part in enumerate(parts):
            assert all(close(part["metrics"][key], value) for key, value in whole["metrics"].items())
            here = positions("zigzag", 2)[rank // 2]
            assert relative_error(part["gradients"][0], whole["gradients"][0][:, here]) <= 1e-12
        for shard, rows in enumerate(ROWS):
            for i in (1, 2):
                total = parts[shard]["gradients"][i] + parts[2 + shard]["gradients"][i]
                assert relative_error(total, whole["gradients"][i][rows]) <= 1e-12


class Tiny(nn.Module):
    """An embedding, a layer and a head; the loss is a part of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.embedding, self.layer, self.head = (nn.Parameter(_normal(g, *shape)) for shape in ((V, H), (H, H), (V, H)))

    def forward(self, ids: Tensor, labels: Tensor, group: Any = None) -> Tensor:
        hidden, labels = ll.shift(
            torch.tanh(self.embedding[ids] @ self.layer), labels, group, "zigzag" if group else "contiguous"
        )
        loss = ll.FusedLinearORPOLoss()
        items = loss.count_items(labels, sequence_group=group)
        if group:
            dist.all_reduce(items)
        return loss(hidden, self.head, labels, sequence_group=group, num_items_in_batch=items.unbind()).loss


def averaged_on_a_rank(rank: int, rows: list[int], group: Any) -> list[Tensor]:
    """Gradients under DDP over all ranks, which averages."""
    ids, labels = tiny_batch()
    model = nn.parallel.DistributedDataParallel(Tiny())
    here = positions_of("zigzag", 2, ids.shape[1])[rank % 2]
    (model(ids[rows][:, here], labels[rows][:, here], group) * 4).backward()
    return [p.grad for p in model.parameters()]


def tiny_batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (len(LENGTHS), 12), generator=torch.Generator().manual_seed(3))
    return ids, ids.masked_fill(torch.arange(12) >= 2 * torch.tensor(LENGTHS)[:, None], -100)


@functools.cache
def four_ranks() -> list[dict[str, Any]]:
    return run_ranks(4, counted_on_a_rank)


def test_a_wrapper_that_averages_over_all_ranks_gives_the_gradient_of_one_process():
    model = Tiny()
    model(*tiny_batch()).backward()
    for found in four_ranks():
        for averaged, parameter in zip(found["averaged"], model.parameters(), strict=True):
            assert relative_error(averaged, parameter.grad) <= 1e-12


def test_counts_of_data_and_sequence_ranks_add_up_to_one_batch():
    ranks = four_ranks()
    for name in COUNTED:
        batch, parts = batch_of(name), [found[name] for found in ranks]
        assert torch.equal(parts[0]["items"], batch.count(LOSSES[name], list(range(len(LENGTHS)))))
        whole = one_process(name, "given")
        assert close(sum(part["loss"] for part in parts), whole["loss"])
        for i in (0, 1):
            assert relative_error(sum(part["gradients"][i] for part in parts), whole["gradients"][i + 1]) <= 1e-12
