"""The promises of the policy-loss modules, kept in every schedule."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import logitless as ll

from ..core.test_cost import scored
from ..helpers import NAMES_THE_CPU, make_case, relative_error, run_reference
from .cases import (
    BUDGETS,
    GRPO,
    LOSSES,
    OF_BATCHES,
    OF_SEQUENCES,
    PPO,
    WITH_ENTROPY,
    assert_same,
    counted,
    every_budget,
    every_loss,
    extras,
    gradient,
    ragged,
    run,
)

EVERY_BACKEND = True


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


def test_micro_batches_of_top_entropy_add_up_where_the_threshold_is_known():
    case = make_case(sequences=2, tokens=9, dtype=torch.float64, masked=0.0, bias=True)
    case.hidden = torch.cat((case.hidden, case.hidden.flip(1))).detach().requires_grad_()
    case.labels = torch.cat((case.labels, case.labels.flip(1)))
    loss = GRPO("dapo", top_entropy_quantile=0.4)
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


@pytest.mark.cpu_only(NAMES_THE_CPU)
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
