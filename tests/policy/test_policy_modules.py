"""The promises of the policy-loss modules, kept in every schedule."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
from logitless.fused.policy.base import PolicyOutput

from ..core.test_cost import budget_for_rows, flops, inputs, peak_bytes, scored
from ..helpers import Case, make_case, relative_error, run_reference

EVERY_BACKEND = True

GRPO, PPO = ll.FusedLinearGRPOLoss, ll.FusedLinearPPOLoss
LOSSES: dict[str, ll.FusedLinearPolicyLoss] = {
    "ppo": PPO(),
    "ppo everything": PPO(dual_clip=3.0, kl_coef=0.1, kl_estimator="k3+", entropy_coef=0.02, aggregation="sequence-mean"),
    "ppo rollouts": PPO(importance_sampling_mode="sequence_truncate", importance_sampling_clip_max=2.0),
    "grpo": GRPO("grpo", beta=0.1),
    "dapo": GRPO("dapo", epsilon_high=0.28, entropy_coef=0.02),
    "dr_grpo": GRPO("dr_grpo", max_completion_length=20),
    "gspo": GRPO("grpo", importance_sampling_level="sequence"),
    "gspo bonus": GRPO("dapo", importance_sampling_level="sequence", entropy_coef=0.02, beta=0.1),
    "luspo": GRPO("luspo", importance_sampling_level="sequence"),
    "cispo": GRPO("cispo", epsilon_high=1.2),
    "sapo": GRPO("sapo"),
    "vespo": GRPO("vespo", importance_sampling_mode="token_mask"),
    "off policy": GRPO("dapo", off_policy_mask_threshold=0.05),
    "top entropy": GRPO("dapo", top_entropy_quantile=0.4, beta=0.1),
    "top entropy bonus": GRPO("dapo", top_entropy_quantile=0.4, entropy_coef=0.1),
    "own": ll.FusedLinearPolicyLoss(
        lambda t: t.to_tokens(t.sequence_mean(t.entropies).square()) - t.logps * t.advantages,
        group="sequence",
        entropy_gradient=True,
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
#: Those whose tokens wait for others of their sequence, or of the batch.
OF_SEQUENCES = ("gspo", "gspo bonus", "luspo", "vespo", "off policy", "own")
OF_BATCHES = ("top entropy", "top entropy bonus")
WITH_ENTROPY = ("ppo everything", "dapo", "gspo bonus", "top entropy bonus", "own")
BUDGETS = {"one tile": 1 << 30, "small tiles": 22_000, "one token a tile": 1}
every_budget = pytest.mark.parametrize("budget", BUDGETS)
#: What may be given for each token, whether a loss uses it or not.
OF_TOKENS = ("advantages", "old_logps", "ref_logps", "sampling_logps")


def extras(name: str, case: Case, reference: bool = True) -> dict[str, Any]:
    """What the loss needs besides the tensors of every call. Ratios are some tenths of a nat away from 1."""
    loss, g = LOSSES[name], torch.Generator().manual_seed(9)
    with torch.no_grad():
        logps = run_reference(case.double()).logps

    def near(scale: float) -> Tensor:
        return logps + scale * torch.randn(logps.shape, generator=g, dtype=torch.float64)

    given: dict[str, Any] = {"advantages": torch.linspace(-1.2, 1.4, len(logps), dtype=torch.float64), "old_logps": near(0.4)}
    if loss.loss.needs_reference and reference:
        given["ref_logps"] = near(0.5)
    if loss.importance_sampling_mode is not None or name == "off policy":
        given["sampling_logps"] = given["old_logps"] + 0.2 * torch.randn(logps.shape, generator=g, dtype=torch.float64)
    return given


def run(name: str, case: Case, given: dict[str, Any] | None = None, **changed: Any) -> PolicyOutput:
    given = {**(extras(name, case) if given is None else given), **changed}
    return LOSSES[name](case.hidden, case.weight, case.labels, case.bias, case.head, **given)


def gradient(out: PolicyOutput, case: Case, scale: float = 1.0, retain: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(out.loss * scale, case.leaves, retain_graph=retain))


def ragged(**options: Any) -> Case:
    """Six sequences of 9, 4, 0, 7, 1 and 9 tokens, with holes."""
    case = make_case(sequences=6, tokens=9, dtype=torch.float64, masked=0.15, bias=True, **options)
    for s, length in enumerate((9, 4, 0, 7, 1, 9)):
        case.labels[s, length:] = -100
    case.labels[4, 0] = 3
    return case


def assert_same(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-11) -> None:
    for x, y in zip(a, b, strict=True):
        assert relative_error(x, y) <= tolerance


# One batch, however it is cut


@every_loss
@every_budget
def test_same_result_for_any_budget(name, budget):
    results, plans = [], []
    for size in (BUDGETS[budget], 1 << 30):
        case = make_case(sequences=5, tokens=12, bias=True, dtype=torch.float64, vocab=211)
        with ll.settings(memory_budget=size):
            out = run(name, case)
        plans.append(out.plan)
        results.append([out.loss, *gradient(out, case)])
    assert_same(*results)
    steps = plans[0].steps
    if budget == "one tile":
        assert [s.schedule for s in steps] == ["gradient_in_forward"]
    elif name in OF_BATCHES or (name in OF_SEQUENCES and budget == "one token a tile"):
        assert steps[0].schedule == "recompute"
    elif name in OF_SEQUENCES:  # some do not fit a tile
        assert [s.schedule for s in steps[:2]] == ["recompute", "gradient_in_forward"]
    else:
        assert len(steps) > 1
        assert {s.schedule for s in steps} == {"gradient_in_forward"}
    assert plans[1].passes == 6


@every_loss
@pytest.mark.parametrize("budget", ["one tile", "one token a tile"])
def test_packed_equals_padded(name, budget):
    case = ragged()
    lengths = [9, 4, 0, 7, 1, 9]
    given = extras(name, case)
    kept = torch.arange(9) < torch.tensor(lengths)[:, None]
    packed = {k: v[kept] if v.shape == case.labels.shape else v for k, v in given.items()}
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    with ll.settings(memory_budget=BUDGETS[budget]):
        padded = run(name, case)
        flat = LOSSES[name](
            case.hidden[kept], case.weight, case.labels[kept], bias=case.bias, cu_seqlens=bounds.int(), **packed
        )
    assert_same([flat.loss, *gradient(flat, case)], [padded.loss, *gradient(padded, case)])
    assert torch.equal(flat.logps, padded.logps[kept])
    assert flat.metrics.keys() == padded.metrics.keys()
    for key, value in flat.metrics.items():
        assert value.item() == pytest.approx(padded.metrics[key].item(), rel=1e-12), key


def test_as_many_packed_sequences_as_positions():
    """Advantages of shape [N] are then of tokens, or of sequences: PPO takes the former, GRPO the latter."""
    case = make_case(sequences=1, tokens=3, dtype=torch.float64, masked=0.0)
    x, y, bounds = case.hidden[0], case.labels[0], torch.tensor([0, 0, 3, 3])
    a = torch.tensor([5.0, 1.0, -3.0], dtype=torch.float64)
    ppo = LOSSES["ppo"](x, case.weight, y, advantages=a, cu_seqlens=bounds)
    grpo = LOSSES["dapo"](x, case.weight, y, advantages=a, cu_seqlens=bounds)
    assert ppo.loss.item() == pytest.approx(-1.0)
    assert grpo.loss.item() == pytest.approx(-1.0 - 0.02 * grpo.metrics["entropy"].item())


def counted(name: str, labels: Tensor) -> int:
    return scored(labels) if LOSSES[name].aggregation == "token-mean" else len(labels)


#: What the others keep of a micro-batch is a quantile of its own.
ADDED_UP = [name for name in LOSSES if name not in OF_BATCHES]


@pytest.mark.parametrize("name", ADDED_UP)
@pytest.mark.parametrize(
    ("parts", "as_tensor"),
    [([[0], [1], [2], [3], [4], [5]], False), ([[3, 0, 2], [5], [1, 4]], True)],
    ids=["one by one", "uneven"],
)
def test_micro_batches_add_up_to_one_batch(name, parts, as_tensor):
    case = ragged()
    given = extras(name, case)
    items = counted(name, case.labels)
    whole = run(name, case)
    same = run(name, case, num_items_in_batch=items)
    assert torch.equal(whole.loss, same.loss)
    total, sums = torch.zeros((), dtype=torch.float64), None
    for rows in parts:
        out = LOSSES[name](
            case.hidden[rows],
            case.weight,
            case.labels[rows],
            bias=case.bias,
            num_items_in_batch=torch.tensor(items) if as_tensor else items,
            **{key: value[rows] for key, value in given.items()},
        )
        total = total + out.loss.detach()
        found = gradient(out, case)
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
    assert sums is not None
    assert_same([total, *sums], [whole.loss, *gradient(whole, case)])


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "sequence-mean-token-sum", "fixed-length"])
def test_micro_batches_add_up_with_every_aggregation(aggregation):
    case = ragged()
    length = 15 if aggregation == "fixed-length" else None
    loss = PPO(entropy_coef=0.1, aggregation=aggregation, max_length=length)
    given = extras("ppo", case)
    items = scored(case.labels) if aggregation == "token-mean" else len(case.labels)
    whole = loss(case.hidden, case.weight, case.labels, bias=case.bias, **given)
    outs = [
        loss(
            case.hidden[rows],
            case.weight,
            case.labels[rows],
            bias=case.bias,
            num_items_in_batch=items,
            **{key: value[rows] for key, value in given.items()},
        )
        for rows in ([0], [5, 2, 1], [3, 4])
    ]
    total = sum(out.loss for out in outs)
    assert_same([total, *torch.autograd.grad(total, case.leaves)], [whole.loss, *gradient(whole, case)])


@pytest.mark.parametrize("coef", [0.0, 0.1])
def test_micro_batches_of_top_entropy_add_up_where_the_threshold_is_known(coef):
    """The bonus is a mean over what is kept, so these micro-batches keep as many tokens, each half of them."""
    case = make_case(sequences=2, tokens=9, dtype=torch.float64, masked=0.0, bias=True)
    case.hidden = torch.cat((case.hidden, case.hidden.flip(1))).detach().requires_grad_()
    case.labels = torch.cat((case.labels, case.labels.flip(1)))
    loss = GRPO("dapo", top_entropy_quantile=0.4, entropy_coef=coef)
    a = torch.tensor([1.0, -0.5, 0.3, 0.7], dtype=torch.float64)
    entropies = run_reference(case).entropy
    assert entropies is not None
    threshold = entropies.detach()[:2].flatten().sort().values[10:12].mean()  # between two tokens
    whole = loss(case.hidden, case.weight, case.labels, bias=case.bias, advantages=a, entropy_threshold=threshold)
    total: Tensor | float = 0.0
    for rows in ([0, 1], [2, 3]):
        out = loss(
            case.hidden[rows],
            case.weight,
            case.labels[rows],
            bias=case.bias,
            advantages=a[rows],
            num_items_in_batch=36,
            entropy_threshold=threshold,
        )
        total = total + out.loss
    assert isinstance(total, Tensor)
    assert_same([total, *torch.autograd.grad(total, case.leaves)], [whole.loss, *gradient(whole, case)])


@every_loss
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("of_tokens", [False, True])
def test_what_stands_at_ignored_positions_changes_no_bit(name, value, of_tokens):
    results = []
    for poison in (False, True):
        case = ragged()
        given = extras(name, case)
        if of_tokens:
            given["advantages"] = given["advantages"][:, None].repeat(1, case.labels.shape[1])
        if LOSSES[name].importance_sampling_mode is None and LOSSES[name].loss.reads:
            g = torch.Generator().manual_seed(2)
            given["importance_sampling_ratio"] = torch.rand(case.labels.shape, generator=g, dtype=torch.float64) + 0.5
        if poison:
            with torch.no_grad():
                case.hidden[case.labels == -100] = value
            for key, tensor in given.items():
                if tensor.shape == case.labels.shape:
                    given[key] = tensor.masked_fill(case.labels == -100, value)
                else:  # the sequence without tokens
                    given[key] = tensor.masked_fill(torch.arange(6) == 2, value)
        assert not poison or sum(bool(t.isfinite().all()) for t in given.values()) == 0
        out = LOSSES[name](case.hidden, case.weight, case.labels, bias=case.bias, **given)
        results.append([out.loss, out.logps, *gradient(out, case), *out.metrics.values()])
    assert all(torch.isfinite(t).all() for t in results[1])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@every_loss
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("budget", ["one tile", "one token a tile"])
def test_nothing_scored_is_0_and_has_zero_gradients(name, tokens, budget):
    case = make_case(sequences=4, tokens=tokens, masked=1.0, bias=True)
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = run(name, case)
    assert out.loss.item() == 0
    assert out.logps.shape == case.labels.shape
    assert (out.logps == 0).all()
    assert all(value == 0 for value in out.metrics.values())
    for g in gradient(out, case):
        assert (g == 0).all()


@pytest.mark.parametrize("name", ["ppo", "dapo", "gspo", "top entropy bonus", "own"])
def test_no_sequences_at_all(name):
    x, w = torch.zeros(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    nothing = torch.zeros(0)
    out = LOSSES[name](
        x, w, torch.zeros(0, dtype=torch.long), advantages=nothing, ref_logps=nothing if name == "top entropy" else None,
        cu_seqlens=torch.tensor([0]),
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == 0
    assert (w.grad == 0).all()


@every_loss
def test_a_sequence_without_tokens_gets_no_gradient(name):
    case = ragged()
    out = run(name, case)
    dx, dw, db = gradient(out, case)
    assert (dx[case.labels == -100] == 0).all()
    assert all(torch.isfinite(t).all() and (t != 0).any() for t in (dx, dw, db))


# What is trained, and what comes from above


@pytest.mark.parametrize("name", ["ppo", "ppo everything", "gspo bonus", "top entropy bonus", "own"])
@pytest.mark.parametrize("budget", ["one tile", "small tiles"])
@pytest.mark.parametrize("train", ["", "h", "w", "b", "hw", "hb", "wb", "hwb"])
def test_frozen_tensors_get_no_gradient(name, budget, train):
    case, full = (make_case(bias=True, dtype=torch.float64, train=t) for t in (train, "hwb"))
    with ll.settings(memory_budget=BUDGETS[budget]):
        out, other = run(name, case), run(name, full)
    assert relative_error(out.loss, other.loss) <= 1e-12
    assert out.loss.requires_grad == bool(train)
    if not train:
        assert out.plan.schedule == "forward_only"
        return
    if train == "h" and name not in WITH_ENTROPY:
        assert out.plan.schedule == "deferred_scale"
    out.loss.backward()
    other.loss.backward()
    for key, mine, its in zip("hwb", (case.hidden, case.weight, case.bias), (full.hidden, full.weight, full.bias), strict=True):
        if key in train:
            assert relative_error(mine.grad, its.grad) <= 1e-11
        else:
            assert mine.grad is None


@pytest.mark.parametrize("name", ["ppo everything", "gspo bonus", "own"])
@every_budget
def test_upstream_gradients_and_backward_twice(name, budget):
    case = make_case(dtype=torch.float64, bias=True)
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = run(name, case)
    once = [g.clone() for g in gradient(out, case, retain=True)]
    scaled = [g.clone() for g in gradient(out, case, -0.25, retain=True)]
    zero = gradient(out, case, 0.0, retain=True)
    again = gradient(out, case)
    for a, b, z, c in zip(once, scaled, zero, again, strict=True):
        assert torch.equal(a, c)
        assert torch.allclose(b, -0.25 * a)
        assert (z == 0).all()
    with pytest.raises(RuntimeError, match="second time"):
        gradient(out, case)


@every_loss
def test_without_gradients_one_forward_pass_gives_the_same(name):
    case = make_case(dtype=torch.float64)
    with_gradient = run(name, case)
    with torch.no_grad():
        out = run(name, case)
    assert not out.loss.requires_grad
    assert (out.plan.schedule, out.plan.passes) == ("forward_only", 2)
    assert relative_error(out.loss, with_gradient.loss) <= 1e-13
    assert torch.equal(out.logps, with_gradient.logps)


def test_only_the_loss_carries_a_gradient():
    case = make_case(dtype=torch.float64)
    out = run("ppo everything", case)
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in (out.logps, out.entropies, *out.metrics.values()))


def test_inputs_that_require_a_gradient_get_none():
    case = make_case(dtype=torch.float64)
    given = {key: value.requires_grad_() for key, value in extras("ppo everything", case).items()}
    run("ppo everything", case, given).loss.backward()
    assert all(value.grad is None for value in given.values())


def test_autocast_computes_in_its_dtype_and_keeps_gradient_dtypes():
    case = make_case(hidden=64, vocab=500)
    low = make_case(hidden=64, vocab=500, dtype=torch.bfloat16)
    given = extras("ppo everything", case)
    with torch.autocast("cpu", torch.bfloat16):
        out = run("ppo everything", case, given)
    same = run("ppo everything", low, given)
    dx, dw = gradient(out, case)
    assert out.loss.dtype == out.logps.dtype == dx.dtype == dw.dtype == torch.float32
    assert torch.equal(out.loss, same.loss)
    for ours, theirs in zip((dx, dw), gradient(same, low), strict=True):
        assert relative_error(ours, theirs) < 2**-7


def test_a_loss_scale_saves_fp16_gradients_that_would_underflow():
    case = make_case(dtype=torch.float16, hidden=32, vocab=2000, tokens=40)
    given, wide = extras("ppo everything", case), case.double()
    out, exact = run("ppo everything", case, given), run("ppo everything", wide, given)
    assert out.plan.accumulate
    scale = 65536.0 * 1e-3  # a loss this small leaves nothing of most fp16 gradients, unless its scale comes first
    for ours, theirs in zip(gradient(out, case, scale), gradient(exact, wide, scale), strict=True):
        assert ours.dtype == torch.float16
        assert relative_error(ours, theirs) < 2**-9


@every_loss
def test_bitwise_repeatable(name):
    runs = []
    for _ in range(2):
        case = make_case(dtype=torch.bfloat16, vocab=500, hidden=32, tokens=12)
        with ll.settings(memory_budget=60_000):
            out = run(name, case)
        runs.append([out.loss, *gradient(out, case)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_loss
def test_modules_can_be_pickled_and_copied(name):
    case = make_case(train="", dtype=torch.float64)
    given = extras(name, case)
    expected = run(name, case, given).loss
    copies = [copy.deepcopy(LOSSES[name])]
    if name != "own":  # a lambda, which pickle does not take
        copies.append(pickle.loads(pickle.dumps(LOSSES[name])))
    for other in copies:
        assert torch.equal(other(case.hidden, case.weight, case.labels, **given).loss, expected)


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_outputs_can_be_pickled(name):
    case = make_case(train="", dtype=torch.float64)
    out = run(name, case)
    again = pickle.loads(pickle.dumps(out))
    assert torch.equal(again.loss, out.loss)
    assert again.plan == out.plan


@pytest.mark.parametrize("name", ["ppo everything", "gspo bonus", "vespo", "top entropy", "own"])
@pytest.mark.parametrize("budget", ["one tile", "one token a tile"])
def test_a_default_device_elsewhere_changes_nothing(name, budget):
    """Every tensor made on the way says where it belongs; on ``"meta"``, one that does not has no numbers."""
    results = []
    for default in ("cpu", "meta"):
        case = make_case(sequences=4, bias=True, dtype=torch.float64)
        given = extras(name, case)
        with ll.settings(memory_budget=BUDGETS[budget]), torch.device(default):
            out = run(name, case, given)
            results.append([out.loss, *gradient(out, case)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# The reference, and identical policies


@pytest.mark.parametrize("name", ["ppo everything", "grpo", "gspo bonus", "top entropy"])
@every_budget
def test_ref_hidden_equals_ref_logps(name, budget):
    """The reference has another hidden size, and no numbers where nothing is scored."""
    case, other = (
        ragged(head=ll.HeadSpec(softcap=5.0, temperature=0.9)),
        ragged(seed=1, hidden=24, head=ll.HeadSpec(softcap=5.0)),
    )
    other.labels, other.head = case.labels, case.head
    ref = run_reference(other).logps.detach()
    x = other.hidden.detach().masked_fill((case.labels == -100)[..., None], torch.nan)
    with ll.settings(memory_budget=BUDGETS[budget]):
        given = run(name, case, ref_logps=ref)
        out = run(name, case, ref_logps=None, ref_hidden=x, ref_weight=other.weight.detach(), ref_bias=other.bias.detach())
    assert given.ref_logps is None
    assert relative_error(out.ref_logps, ref) <= 1e-12
    assert_same([out.loss, *gradient(out, case)], [given.loss, *gradient(given, case)])


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@every_dtype
@pytest.mark.parametrize("train", ["", "h", "hw"])
@pytest.mark.parametrize("budget", ["one tile", "small tiles"])
@pytest.mark.parametrize(
    "make", [lambda: PPO(kl_coef=0.1), lambda: GRPO("grpo", 0.2, beta=0.1, importance_sampling_level="sequence")]
)
def test_identical_policies_have_ratio_1_and_kl_0_exactly(dtype, train, budget, make):
    case = make_case(dtype=dtype, hidden=48, vocab=3001, sequences=3, tokens=9, train=train, exact=True)
    with ll.settings(memory_budget=BUDGETS[budget] * 20):
        old = ll.linear_logps(case.hidden.detach(), case.weight.detach(), case.labels).logps
        out = make()(
            case.hidden,
            case.weight,
            case.labels,
            advantages=torch.ones(3),
            old_logps=old,
            ref_hidden=case.hidden.detach(),
            ref_weight=case.weight.detach(),
        )
    assert torch.equal(out.logps, old)
    assert torch.equal(out.ref_logps, old)
    assert out.metrics["ratio"] == 1
    assert out.metrics["kl"] == out.metrics["approx_kl"] == out.metrics["approx_kl_k3"] == 0
    assert out.loss == -1


def test_old_logps_of_an_earlier_output_are_those_of_now_until_the_weights_move():
    case = make_case(dtype=torch.bfloat16, vocab=500)
    a = torch.linspace(-1, 1, 4)
    first = LOSSES["dapo"](case.hidden, case.weight, case.labels, advantages=a)
    second = LOSSES["dapo"](case.hidden, case.weight, case.labels, advantages=a, old_logps=first.logps)
    assert torch.equal(first.loss, second.loss)
    assert_same(gradient(first, case), gradient(second, case), 0.0)


# Losses of one's own


def stats_of(case: Case) -> tuple[Tensor, Tensor]:
    stats = run_reference(case)
    assert stats.logps is not None
    assert stats.entropy is not None
    return stats.logps, stats.entropy


@pytest.mark.parametrize("group", ["token", "sequence", "batch"])
@every_budget
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_loss_quadratic_in_the_entropy(group, budget, softcap):
    case = make_case(sequences=5, tokens=8, dtype=torch.float64, bias=True, head=ll.HeadSpec(softcap=softcap))
    mask = case.labels != -100
    logps, entropies = stats_of(case)

    def centre(h: Tensor, t: ll.Tokens | None) -> Tensor:
        if group == "token":
            return torch.full_like(h, 2.0)
        if t is None:
            return h.sum() / mask.sum() if group == "batch" else (h.sum(-1) / mask.sum(-1).clamp(min=1))[:, None]
        return h.mean() if group == "batch" else t.to_tokens(t.sequence_mean(h))

    def fn(t: ll.Tokens) -> ll.PolicyLossResult:
        moved = t.entropies - centre(t.entropies, t)
        return ll.PolicyLossResult(moved.square() + 0.3 * t.logps * t.advantages, {"moved": moved})

    loss = ll.FusedLinearPolicyLoss(fn, group=group, entropy_gradient=True, aggregation="sequence-mean")
    a = torch.linspace(-1, 1, 5, dtype=torch.float64)
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = loss(case.hidden, case.weight, case.labels, case.bias, case.head, advantages=a)
    moved = entropies - centre(entropies, None)
    losses = torch.where(mask, moved.square() + 0.3 * logps * a[:, None], 0)
    expected = (losses.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    right = list(torch.autograd.grad(expected, case.leaves))
    assert_same([out.loss, *gradient(out, case)], [expected, *right])
    mean = torch.where(mask, moved, 0).sum().item() / mask.sum().item()
    assert out.metrics["moved"].item() == pytest.approx(mean, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("group", ["token", "sequence", "batch"])
@pytest.mark.parametrize("coef", [0.0, 0.2])
def test_own_losses_see_what_is_given(group, coef):
    case = ragged()
    given = {**extras("grpo", case), "importance_sampling_ratio": torch.linspace(0.5, 1.5, 6, dtype=torch.float64)}
    seen = []

    def fn(t: ll.Tokens) -> Tensor:
        seen.append(t)
        return -(t.logps - t.old_logps).exp() * t.advantages * t.inputs["importance_sampling_ratio"] + t.logps - t.ref_logps

    loss = ll.FusedLinearPolicyLoss(
        fn,
        group=group,
        uses_reference=True,
        reads=["importance_sampling_ratio"],
        aggregation="fixed-length",
        max_length=7,
        entropy_coef=coef,
    )
    out = loss(case.hidden, case.weight, case.labels, bias=case.bias, **given)
    logps, entropies = stats_of(case)
    factor = (given["advantages"] * given["importance_sampling_ratio"])[:, None]
    losses = -(logps - given["old_logps"]).exp() * factor + logps - given["ref_logps"] - coef * entropies
    expected = torch.where(case.labels == -100, 0, losses).sum() / 42
    assert_same([out.loss, *gradient(out, case)], [expected, *torch.autograd.grad(expected, case.leaves)])
    assert (seen[0].offsets is None) == (group == "token")
    if group != "token":
        assert sum(len(t.lengths) for t in seen) == 6
        assert sum(int(t.lengths.sum()) for t in seen) == scored(case.labels)


def test_a_token_loss_does_not_see_sequences():
    case = make_case()
    loss = ll.FusedLinearPolicyLoss(lambda t: t.to_tokens(t.sequence_mean(t.logps)))
    with pytest.raises(ValueError, match="declare group='sequence'"):
        loss(case.hidden, case.weight, case.labels, advantages=torch.ones(4))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda t: 0.5, "losses of type float"),
        (lambda t: t.logps.mean(), r"losses of shape \(\)"),
        (lambda t: t.logps > 0, "losses of shape .* torch.bool"),
        (lambda t: ll.PolicyLossResult(t.logps, {"m": 1.0}), r"metrics\['m'\] of type float"),
        (lambda t: ll.PolicyLossResult(t.logps, {"m": t.logps.sum()}), r"metrics\['m'\] of shape"),
    ],
)
def test_what_a_loss_function_returns_is_checked(result, words):
    case = make_case()
    with pytest.raises((TypeError, ValueError), match=words):
        ll.FusedLinearPolicyLoss(result)(case.hidden, case.weight, case.labels, advantages=torch.ones(4))


def test_a_loss_function_with_parameters_of_its_own_is_refused():
    scale = torch.nn.Parameter(torch.tensor(0.5))
    loss = ll.FusedLinearPolicyLoss(lambda t: scale * t.logps)
    for train in ("", "hw"):
        case = make_case(train=train)
        with pytest.raises(ValueError, match=r"uses a tensor of shape \(\) that requires a gradient"):
            loss(case.hidden, case.weight, case.labels, advantages=torch.ones(4))


def test_an_entropy_without_a_declared_gradient_has_none():
    """``uses_entropy`` alone: a weight, as it were."""
    case = make_case(dtype=torch.float64)
    loss = ll.FusedLinearPolicyLoss(lambda t: -t.entropies * t.logps, uses_entropy=True)
    with pytest.raises(ValueError, match="declare entropy_gradient"):
        loss(case.hidden, case.weight, case.labels, advantages=torch.ones(4))
    loss = ll.FusedLinearPolicyLoss(lambda t: -t.entropies.detach() * t.logps, uses_entropy=True)
    out = loss(case.hidden, case.weight, case.labels, advantages=torch.ones(4))
    logps, entropies = stats_of(case)
    expected = -(entropies.detach() * logps).sum() / scored(case.labels)
    assert_same([out.loss, *gradient(out, case)], [expected, *torch.autograd.grad(expected, case.leaves)])


def test_a_bonus_mask_leaves_tokens_out_of_the_bonus():
    case = make_case(dtype=torch.float64)

    def fn(t: ll.Tokens) -> ll.PolicyLossResult:
        return ll.PolicyLossResult(-t.logps, bonus_mask=t.advantages > 0)

    a = torch.tensor([1.0, -1.0, 2.0, -2.0])
    out = ll.FusedLinearPolicyLoss(fn, entropy_coef=0.5)(case.hidden, case.weight, case.labels, advantages=a)
    logps, entropies = stats_of(case)
    expected = -(logps.sum() + 0.5 * (entropies * (a > 0)[:, None]).sum()) / scored(case.labels)
    assert_same([out.loss, *gradient(out, case)], [expected, *torch.autograd.grad(expected, case.leaves)])


def test_losses_that_are_detached_are_an_error():
    case = make_case(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"do not depend on tokens\.logps"):
        ll.FusedLinearPolicyLoss(lambda t: t.advantages)(case.hidden, case.weight, case.labels, advantages=torch.ones(4))


# What it costs

H, V = 32, 4096


def cost_arguments(name: str, labels: Tensor, reference: bool = True) -> dict[str, Any]:
    given = {"advantages": torch.linspace(-1, 1, len(labels)), "old_logps": torch.full(labels.shape, -8.0)}
    if LOSSES[name].loss.needs_reference and reference:
        given["ref_logps"] = given["old_logps"]
    if LOSSES[name].importance_sampling_mode is not None:
        given["sampling_logps"] = given["old_logps"]
    return given


def step(name: str, train: str, labels: Tensor, x: Tensor, w: Tensor, given: dict[str, Any]) -> Any:
    out = LOSSES[name](x, w, labels, **given)
    if train:
        out.loss.backward()
    return out


@every_loss
@pytest.mark.parametrize(("train", "limit"), [("hw", 6.02), ("h", 4.02), ("w", 4.02), ("", 2.01)])
def test_every_loss_needs_6_4_or_2_on_scored_tokens(name, train, limit):
    x, w, labels = inputs(train)
    given = cost_arguments(name, labels)
    counted = flops(lambda: step(name, train, labels, x, w, given))
    assert 0 < counted <= limit * scored(labels) * H * V


@pytest.mark.parametrize("name", ["ppo", "ppo everything", "dapo", "cispo"])
@pytest.mark.parametrize(("train", "limit"), [("hw", 6.02), ("h", 4.02)])
def test_token_losses_need_no_more_however_small_the_budget(name, train, limit):
    x, w, labels = inputs(train)
    plans = []
    with ll.settings(memory_budget=budget_for_rows(7)):
        counted = flops(lambda: plans.append(step(name, train, labels, x, w, cost_arguments(name, labels)).plan))
    assert counted <= limit * scored(labels) * H * V
    assert plans[0].flops == pytest.approx(counted, rel=0.01)
    if "w" in train or name in WITH_ENTROPY:
        assert len(plans[0].steps) > 5


@pytest.mark.parametrize("name", ["gspo", "own", "top entropy"])
def test_sequences_larger_than_the_budget_pay_8(name):
    x, w, labels = inputs("hw")
    with ll.settings(memory_budget=budget_for_rows(5)):
        counted = flops(lambda: step(name, "hw", labels, x, w, cost_arguments(name, labels)))
        out = step(name, "", labels, x, w, cost_arguments(name, labels))
    assert counted == 8 * scored(labels) * H * V == out.plan.flops
    assert out.plan.schedule == "recompute"


@pytest.mark.parametrize("coef", [0.0, 0.1])
def test_a_known_entropy_threshold_saves_the_second_pass(coef):
    """But not where the entropy bonus is a mean over tokens that only the end of the pass counts."""
    x, w, labels = inputs("hw")
    loss = GRPO("dapo", top_entropy_quantile=0.4, entropy_coef=coef)
    with ll.settings(memory_budget=budget_for_rows(5)):
        counted = flops(lambda: loss(x, w, labels, advantages=torch.linspace(-1, 1, 4), entropy_threshold=7.5).loss.backward())
    assert counted == (8 if coef else 6) * scored(labels) * H * V


@pytest.mark.parametrize("name", ["ppo everything", "grpo", "gspo bonus"])
@pytest.mark.parametrize(("train", "passes"), [("hw", 6), ("h", 4), ("", 2)])
def test_reference_hidden_states_cost_one_forward_pass(name, train, passes):
    x, w, labels = inputs(train)
    given = {**cost_arguments(name, labels, reference=False), "ref_hidden": x.detach(), "ref_weight": w.detach()}
    counted = flops(lambda: step(name, train, labels, x, w, given))
    assert counted == (passes + 2) * scored(labels) * H * V


@pytest.mark.parametrize("train", ["hw", "h"])
def test_entropy_for_metrics_costs_no_gemm(train):
    x, w, labels = inputs(train)
    for loss in (PPO(metrics=True), GRPO("vespo", metrics=True)):
        counted = flops(lambda loss=loss: loss(x, w, labels, advantages=torch.ones(4)).loss.backward())
        assert counted == (6 if train == "hw" else 4) * scored(labels) * H * V


@pytest.mark.parametrize(("train", "passes"), [("hw", 6), ("h", 4), ("w", 4), ("", 2)])
@pytest.mark.parametrize("entropy", [False, True])
def test_the_plan_of_a_token_loss(train, passes, entropy):
    plan = ll.plan(
        num_tokens=4096,
        hidden_size=1024,
        vocab_size=65536,
        token_groups=True,
        entropy_gradient=entropy,
        train_hidden="h" in train,
        train_weight="w" in train,
        memory_budget=64 << 20,
    )
    assert plan.passes == passes
    expected = {"": "forward_only", "h": "gradient_in_forward" if entropy else "deferred_scale"}
    assert plan.schedule == expected.get(train, "gradient_in_forward")
    assert plan.steps[0].start == 0
    assert plan.steps[-1].stop == 4096
    assert all(a.stop == b.start for a, b in zip(plan.steps, plan.steps[1:]))
    sizes = [s.num_tokens for s in plan.steps]
    assert max(sizes) - min(sizes) <= 128 * len(sizes)
    assert plan.options.slopes_later == entropy
    assert ("entropy" in plan.options.outputs) == entropy
    if plan.schedule == "gradient_in_forward":
        assert len(sizes) > 1
        assert "no token waits for another" in str(plan)


@pytest.mark.parametrize("other", [{"group_sizes": [5, 5]}, {"arbitrary_loss": True}])
def test_token_groups_go_without_other_groups(other):
    with pytest.raises(ValueError, match="token_groups"):
        ll.plan(num_tokens=10, hidden_size=8, vocab_size=64, token_groups=True, **other)


VOCAB, HIDDEN, BUDGET = 49_152, 8, 6 << 20


@pytest.mark.parametrize(
    ("name", "train", "dtype"),
    [
        ("ppo", "hw", torch.bfloat16),
        ("ppo", "", torch.float32),
        ("ppo everything", "hw", torch.bfloat16),
        ("ppo everything", "h", torch.bfloat16),
        ("ppo everything", "hw", torch.float32),
        ("gspo bonus", "hw", torch.float16),
        ("own", "h", torch.float32),
    ],
    ids=str,
)
def test_extra_memory_stays_within_the_plan(name, train, dtype):
    """Logits of all 400 scored tokens would be 39 MB in bfloat16, and several times that with what follows them."""
    x, w, labels = inputs(train, 150, HIDDEN, VOCAB, dtype, masked=50)
    given = cost_arguments(name, labels)
    plans: list[ll.Plan] = []
    with ll.settings(memory_budget=BUDGET):
        step(name, train, labels[:, :55], x[:, :55], w, cost_arguments(name, labels[:, :55]))  # what lives for ever
        x.grad = w.grad = None
        measured = peak_bytes(lambda: plans.append(step(name, train, labels, x, w, given).plan))
    assert measured <= plans[0].extra_bytes + x.numel() * 2 * dtype.itemsize
    assert plans[0].extra_bytes < scored(labels) * VOCAB * dtype.itemsize / 2


# Bad input

X, W, Y = torch.zeros(2, 3, 8), torch.zeros(11, 8), torch.tensor([[1, 2, -100], [3, 4, 5]])
A = torch.ones(2)
T = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PPO(clip_low=-0.1), "clip_low"),
        (lambda: PPO(clip_low=1.5), "clip_low"),
        (lambda: PPO(clip_low="0.2"), "clip_low"),
        (lambda: PPO(clip_low=True), "clip_low"),
        (lambda: PPO(clip_high=-0.1), "clip_high"),
        (lambda: PPO(clip_high=float("inf")), "clip_high"),
        (lambda: PPO(dual_clip=1.2), "dual_clip must be above"),
        (lambda: PPO(dual_clip=1.25, clip_high=0.28), "dual_clip must be above"),
        (lambda: PPO(kl_coef=-1.0), "kl_coef"),
        (lambda: PPO(kl_coef=0.1, kl_estimator="k4"), "kl_estimator"),
        (lambda: PPO(kl_coef=0.1, kl_estimator="k2+"), "kl_estimator"),
        (lambda: PPO(kl_estimator="k1"), "kl_estimator.*kl_coef above 0"),
        (lambda: PPO(entropy_coef=float("nan")), "entropy_coef"),
        (lambda: PPO(entropy_coef=None), "entropy_coef"),
        (lambda: PPO(aggregation="mean"), "aggregation"),
        (lambda: PPO(aggregation="fixed-length"), "max_length must be at least 1"),
        (lambda: PPO(aggregation="fixed-length", max_length=0), "max_length must be at least 1"),
        (lambda: PPO(aggregation="fixed-length", max_length=9.0), "max_length must be an int"),
        (lambda: PPO(max_length=9), "max_length is used"),
        (lambda: PPO(metrics=1), "metrics"),
        (lambda: PPO(ignore_index=1.5), "ignore_index"),
        (lambda: PPO(importance_sampling_mode="token"), "importance_sampling_mode"),
        (lambda: PPO(importance_sampling_clip_max=2.0), "importance_sampling_clip_min and _max need"),
        (lambda: PPO(importance_sampling_clip_min=0.5), "importance_sampling_clip_min and _max need"),
        (
            lambda: PPO(importance_sampling_mode="token_mask", importance_sampling_clip_min=4.0),
            "importance_sampling_clip_min must be less",
        ),
        (
            lambda: PPO(importance_sampling_mode="token_mask", importance_sampling_clip_max=-4.0),
            "importance_sampling_clip_max",
        ),
        (
            lambda: PPO(importance_sampling_mode="token_truncate", importance_sampling_clip_max=None),
            "importance_sampling_clip_min or importance_sampling_clip_max",
        ),
        (lambda: GRPO("ppo"), "loss_type"),
        (lambda: GRPO(["dapo"]), "loss_type"),
        (lambda: GRPO(importance_sampling_level="batch"), "importance_sampling_level"),
        (lambda: GRPO(epsilon_low=-0.1), "epsilon_low"),
        (lambda: GRPO(epsilon_low=1.1), "epsilon_low"),
        (lambda: GRPO(epsilon_high=-0.1), "epsilon_high"),
        (lambda: GRPO(delta=1.2), "delta must be above"),
        (lambda: GRPO(delta=1.25, epsilon_high=0.28), "delta must be above"),
        (lambda: GRPO(beta=-0.1), "beta"),
        (lambda: GRPO(use_bias_correction_kl=False), "use_bias_correction_kl"),
        (lambda: GRPO(use_bias_correction_kl=0, beta=0.1), "use_bias_correction_kl"),
        (lambda: GRPO("dr_grpo"), "max_completion_length"),
        (lambda: GRPO("dr_grpo", max_completion_length=0), "max_completion_length"),
        (lambda: GRPO("dapo", max_completion_length=5), "max_completion_length is not used by loss_type='dapo'"),
        (lambda: GRPO("cispo", epsilon_low=0.1), "epsilon_low is not used by loss_type='cispo'"),
        (lambda: GRPO("sapo", epsilon_high=0.1), "epsilon_high is not used by loss_type='sapo'"),
        (lambda: GRPO("vespo", epsilon_low=0.1), "epsilon_low is not used by loss_type='vespo'"),
        (lambda: GRPO("cispo", delta=4.0), "delta is not used by loss_type='cispo'"),
        (lambda: GRPO("vespo", importance_sampling_level="sequence"), "importance_sampling_level is not used"),
        (lambda: GRPO(sapo_temperature_pos=2.0), "sapo_temperature_pos is not used"),
        (lambda: GRPO(sapo_temperature_neg=2.0), "sapo_temperature_neg is not used"),
        (lambda: GRPO("sapo", sapo_temperature_neg=0.0), "sapo_temperature_neg"),
        *((lambda n=n: GRPO(**{n: 9.0}), f"{n} is not used") for n in ("vespo_k_pos", "vespo_lambda_pos")),
        *((lambda n=n: GRPO(**{n: 9.0}), f"{n} is not used") for n in ("vespo_k_neg", "vespo_lambda_neg")),
        *((lambda n=n: GRPO("vespo", **{n: -1.0}), n) for n in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg")),
        (lambda: GRPO(off_policy_mask_threshold=-0.1), "off_policy_mask_threshold"),
        (lambda: GRPO(top_entropy_quantile=0.0), "top_entropy_quantile"),
        (lambda: GRPO(top_entropy_quantile=1.1), "top_entropy_quantile"),
        (lambda: ll.FusedLinearPolicyLoss(None), "fn must be callable"),
        (lambda: ll.FusedLinearPolicyLoss(len, group="pair"), "group"),
        (lambda: ll.FusedLinearPolicyLoss(len, uses_reference=1), "uses_reference"),
        (lambda: ll.FusedLinearPolicyLoss(len, needs_reference="yes"), "needs_reference"),
        (lambda: ll.FusedLinearPolicyLoss(len, uses_entropy=1), "uses_entropy"),
        (lambda: ll.FusedLinearPolicyLoss(len, entropy_gradient=1), "entropy_gradient"),
    ],
)
def test_bad_options_are_errors_that_name_them(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


MASKED = PPO(importance_sampling_mode="token_mask")


@pytest.mark.parametrize(
    ("loss", "changed", "words"),
    [
        (PPO(), {"advantages": None}, "advantages must be a torch.Tensor"),
        (PPO(), {"advantages": [1.0, 1.0]}, "advantages must be a torch.Tensor"),
        (PPO(), {"advantages": torch.ones(3)}, r"advantages must have shape \(2, 3\) or \(2,\)"),
        (PPO(), {"advantages": torch.ones(3, 2)}, "advantages must have shape"),
        (PPO(), {"advantages": torch.ones(2, dtype=torch.long)}, "advantages must be floating point"),
        (PPO(), {"advantages": torch.ones(2, device="meta")}, "advantages is on meta"),
        (PPO(), {"old_logps": A}, r"old_logps must have shape \(2, 3\)"),
        (PPO(), {"old_logps": T.long()}, "old_logps must be floating point"),
        (PPO(), {"old_logps": 0.0}, "old_logps must be a torch.Tensor"),
        (PPO(kl_coef=0.1), {"ref_logps": A}, r"ref_logps must have shape \(2, 3\)"),
        (PPO(kl_coef=0.1), {}, "needs a reference: pass ref_logps"),
        (GRPO(beta=0.1), {}, "needs a reference: pass ref_logps"),
        (PPO(), {"ref_logps": T}, "ref_logps is given, but this loss does not use a reference"),
        (PPO(), {"ref_hidden": X, "ref_weight": W}, "ref_hidden is given, but"),
        (PPO(), {"ref_weight": W}, "ref_weight is given, but"),
        (GRPO(beta=0.1), {"ref_logps": T, "ref_hidden": X, "ref_weight": W}, "ref_logps and ref_hidden are given"),
        (GRPO(beta=0.1), {"ref_logps": T, "ref_bias": W[:, 0]}, "ref_logps and ref_bias are given"),
        (GRPO(beta=0.1), {"ref_hidden": X}, "ref_weight"),
        (GRPO(beta=0.1), {"ref_weight": W}, "reference|ref_hidden"),
        (GRPO(beta=0.1), {"ref_hidden": X[:1], "ref_weight": W}, "ref_hidden"),
        (GRPO(beta=0.1), {"ref_hidden": X, "ref_weight": W[:5]}, "ref_weight"),
        (PPO(), {"num_items_in_batch": 0}, "num_items_in_batch"),
        (PPO(), {"num_items_in_batch": -3.0}, "num_items_in_batch"),
        (PPO(), {"num_items_in_batch": "6"}, "num_items_in_batch"),
        (PPO(), {"num_items_in_batch": float("inf")}, "num_items_in_batch"),
        (PPO(), {"num_items_in_batch": A}, "num_items_in_batch must be one number"),
        (PPO(), {"num_items_in_batch": torch.tensor(True)}, "num_items_in_batch must be one number"),
        (PPO(), {"sampling_logps": T}, "sampling_logps is given, but this loss does not use it"),
        (GRPO(), {"sampling_logps": T}, "sampling_logps is given, but this loss does not use it"),
        (MASKED, {"sampling_logps": T}, "old_logps is needed by importance_sampling_mode='token_mask'"),
        (MASKED, {"old_logps": T}, "sampling_logps is needed by importance_sampling_mode='token_mask'"),
        (MASKED, {"old_logps": T, "sampling_logps": A}, r"sampling_logps must have shape \(2, 3\)"),
        (MASKED, {"old_logps": T, "sampling_logps": T, "importance_sampling_ratio": T}, "importance_sampling_ratio is given"),
        (PPO(), {"importance_sampling_ratio": torch.ones(5)}, "importance_sampling_ratio must have shape"),
        (PPO(), {"importance_sampling_ratio": torch.ones(2, 1)}, "importance_sampling_ratio must have shape"),
        (GRPO(), {"entropy_threshold": 1.0}, "entropy_threshold is used with a top_entropy_quantile below 1"),
        (GRPO(top_entropy_quantile=0.5), {"entropy_threshold": A}, "entropy_threshold must be one floating point"),
        (GRPO(top_entropy_quantile=0.5), {"entropy_threshold": torch.tensor(1)}, "entropy_threshold must be one floating"),
        (GRPO(top_entropy_quantile=0.5), {"entropy_threshold": "1"}, "entropy_threshold"),
        (PPO(), {"labels": Y[0]}, "labels"),
        (PPO(), {"labels": Y.float()}, "labels"),
        (PPO(), {"labels": Y + 7}, "labels must be"),
        (PPO(), {"cu_seqlens": torch.tensor([0, 6])}, "labels must have shape"),
        (PPO(), {"hidden": X.flatten(0, 1), "labels": Y.flatten()}, "labels must have shape .* no cu_seqlens"),
        (PPO(), {"hidden": X.flatten(0, 1), "labels": Y.flatten(), "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
        (PPO(), {"hidden": X.long()}, "hidden"),
        (PPO(), {"weight": W[:, :5]}, "weight"),
        (PPO(), {"bias": W}, "bias"),
        (PPO(), {"head": 1.0}, "head"),
    ],
)
def test_bad_input_is_an_error_that_names_the_argument(loss, changed, words):
    given = {"hidden": X, "weight": W, "labels": Y, "advantages": A, **changed}
    with pytest.raises((TypeError, ValueError), match=words):
        loss(**given)


def test_advantages_are_needed():
    with pytest.raises(TypeError, match="advantages"):
        PPO()(X, W, Y)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mode": "token"}, "mode must be one of"),
        ({"clip_max": -1.0}, "clip_max"),
        ({"clip_min": 3.0}, "clip_min must be less than clip_max=3.0"),
        ({"mode": "sequence_truncate", "clip_max": None}, "clip_min or clip_max must be given"),
        ({"old_logps": T.long()}, "old_logps"),
        ({"sampling_logps": A}, "sampling_logps"),
        ({"mask": T}, "mask"),
        ({"mask": A.bool()}, "mask"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "old_logps|cu_seqlens"),
        ({"old_logps": T.flatten(), "sampling_logps": T.flatten(), "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
        ({"old_logps": T.flatten(), "sampling_logps": T.flatten()}, "old_logps|cu_seqlens"),
    ],
)
def test_bad_input_of_importance_sampling_ratio(changed, words):
    given = {"old_logps": T, "sampling_logps": T, **changed}
    with pytest.raises((TypeError, ValueError), match=words):
        ll.rl.importance_sampling_ratio(given.pop("old_logps"), given.pop("sampling_logps"), **given)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_importance_sampling_ratio_looks_at_no_masked_position(mode, dtype):
    g = torch.Generator().manual_seed(0)
    old, sampled = (torch.randn(3, 7, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    mask = torch.rand(3, 7, generator=g) < 0.6
    mask[1] = False
    found = []
    for value in (0.0, torch.nan, torch.inf):
        poisoned = (t.masked_fill(~mask, value) for t in (old, sampled))
        found.append(ll.rl.importance_sampling_ratio(*poisoned, mask=mask, mode=mode, clip_min=0.2, clip_max=4.0))
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.isfinite(found[0]).all()
    if mode.startswith("token"):
        assert (found[0][~mask] == 1).all()
    else:
        assert found[0][1] == 1


# What an attack on the modules found


@every_budget
@pytest.mark.parametrize("options", [{"importance_sampling_level": "sequence"}, {"off_policy_mask_threshold": 0.05}], ids=str)
def test_a_known_threshold_lets_sequences_go_on_by_themselves(options, budget):
    loss = GRPO("grpo", top_entropy_quantile=0.5, **options)
    results = []
    for size in (BUDGETS[budget], 1 << 30):
        case = ragged(vocab=211)
        given = extras("off policy" if "off_policy_mask_threshold" in options else "grpo", case, reference=False)
        given.pop("ref_logps", None)
        with ll.settings(memory_budget=size):
            out = loss(case.hidden, case.weight, case.labels, case.bias, entropy_threshold=4.5, **given)
        results.append([out.loss, *gradient(out, case)])
    assert_same(*results)


@pytest.mark.parametrize("name", ["ppo everything", "dapo", "gspo", "sapo", "cispo", "vespo"])
@pytest.mark.parametrize("value", [-math.inf, -1e4])
@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
def test_a_token_that_the_old_policy_ruled_out_makes_no_nan(name, value, sign):
    case = ragged()
    given = extras(name, case)
    given["old_logps"][0, 0] = value
    given["advantages"][0] = sign
    out = run(name, case, given)
    for tensor in (out.loss, *gradient(out, case)):
        assert tensor.isfinite().all()


def test_an_undeclared_gradient_of_the_entropy_is_seen_beside_a_bonus():
    case = make_case(dtype=torch.float64)
    loss = ll.FusedLinearPolicyLoss(lambda t: -t.logps * t.entropies, uses_entropy=True, entropy_coef=0.1)
    with pytest.raises(ValueError, match="declare entropy_gradient"):
        loss(case.hidden, case.weight, case.labels, advantages=torch.ones(4))


@pytest.mark.parametrize("value", [0, -3, math.nan, math.inf])
def test_num_items_in_batch_is_checked_as_a_tensor_too(value):
    case = make_case()
    with pytest.raises(ValueError, match="num_items_in_batch"):
        PPO()(case.hidden, case.weight, case.labels, advantages=torch.ones(4), num_items_in_batch=torch.tensor(value))


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
@pytest.mark.parametrize("module", [PPO, GRPO])
def test_weights_of_rollouts_where_there_are_as_many_sequences_as_positions(module, mode):
    case, g = make_case(sequences=1, tokens=3, masked=0.0, dtype=torch.float64), torch.Generator().manual_seed(0)
    old, sampled = -torch.rand(2, 3, generator=g, dtype=torch.float64) - 4
    loss, results = module(importance_sampling_mode=mode), []
    for bounds in ([0, 3], [0, 3, 3, 3]):
        given = {"advantages": torch.tensor([1.0, *[0.0] * (len(bounds) - 2)]), "cu_seqlens": torch.tensor(bounds)}
        if module is PPO:
            given["advantages"] = torch.ones(3)
        x, y = case.hidden[0], case.labels[0]
        out = loss(x, case.weight, y, old_logps=old, sampling_logps=sampled, **given)
        results.append([out.loss, *gradient(out, case)])
    assert_same(*results)


def test_what_a_loss_function_returns_for_parts_of_a_batch_fits_together():
    case = make_case()
    given = {"advantages": torch.ones(4)}
    calls: list[int] = []

    def moody(t: ll.Tokens) -> ll.PolicyLossResult:
        calls.append(1)
        return ll.PolicyLossResult(-t.logps, {"first": t.logps} if len(calls) == 1 else {})

    with ll.settings(memory_budget=1), pytest.raises(ValueError, match="other metrics for one part"):
        ll.FusedLinearPolicyLoss(moody)(case.hidden, case.weight, case.labels, **given)
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(()), [True]):
        wrong = ll.FusedLinearPolicyLoss(lambda t, mask=mask: ll.PolicyLossResult(-t.logps, bonus_mask=mask), entropy_coef=0.1)
        with pytest.raises(ValueError, match="bonus_mask"):
            wrong(case.hidden, case.weight, case.labels, **given)
