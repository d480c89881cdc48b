"""The promises of the loss modules, in every schedule (``tests/README.md`` lists them)."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import logitless as ll

from ..helpers import ENDS_THE_PROCESS, NAMES_THE_CPU, gradients, make_case, plain_logps, relative_error, run_reference

EVERY_BACKEND = True

BUDGETS = {"gradient_in_forward": 1 << 30, "small tiles": 60_000, "one token a tile": 1}
LOSSES = {
    "dpo": ll.FusedLinearDPOLoss(beta=0.3),
    "dpo smoothed": ll.FusedLinearDPOLoss(beta=0.3, label_smoothing=0.2),
    "dpo ld": ll.FusedLinearDPOLoss(beta=0.3, ld_alpha=0.4),
    "wpo": ll.FusedLinearDPOLoss(beta=0.3, use_weighting=True),
    "aot": ll.FusedLinearDPOLoss(beta=0.3, loss_type="aot"),
    "mix": ll.FusedLinearDPOLoss(beta=0.3, loss_type=["sigmoid", "apo_zero", "sft"], loss_weights=[1.0, 0.5, 0.2]),
    "ipo": ll.FusedLinearIPOLoss(beta=0.3),
    "simpo": ll.FusedLinearSimPOLoss(),
    "alphapo": ll.FusedLinearSimPOLoss(alpha=0.2),
    "cpo": ll.FusedLinearCPOLoss(beta=0.3),
    "orpo": ll.FusedLinearORPOLoss(beta=0.3),
    "kto": ll.FusedLinearKTOLoss(beta=0.3, undesirable_weight=1.4),
}


def extras(name: str, sequences: int, dtype=torch.float32) -> dict:
    """What the loss needs besides the tensors of every call."""
    ref = torch.linspace(-30, -20, sequences, dtype=dtype)
    if name == "kto":
        return {"ref_logps": ref, "desirable": torch.arange(sequences) % 3 != 0, "kl": 0.2}
    return {} if name in ("simpo", "alphapo", "cpo", "orpo") else {"ref_logps": ref}


def gradient(out, case, scale=1.0, retain=False):
    return torch.autograd.grad(out.loss * scale, case.leaves, retain_graph=retain)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_same_result_for_any_budget(name, budget):
    results = []
    for size in (BUDGETS[budget], 1 << 30):
        case = make_case(sequences=6, tokens=12, bias=True, dtype=torch.float64, vocab=211)
        with ll.settings(memory_budget=size):
            out = LOSSES[name](case.hidden, case.weight, case.labels, bias=case.bias, **extras(name, 6, torch.float64))
            results.append([out.loss, *gradient(out, case)])
            steps = out.plan.steps
    assert len(steps) == 1
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_batch_order_and_padding_change_nothing(name):
    case = make_case(sequences=6, tokens=9, dtype=torch.float64)
    kwargs = extras(name, 6, torch.float64)
    out = LOSSES[name](case.hidden, case.weight, case.labels, **kwargs)
    order = [2, 0, 1] if name != "kto" else [5, 1, 0, 4, 2, 3]
    order = order if name == "kto" else order + [i + 3 for i in order]
    moved = {k: v[order] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in kwargs.items()}
    x = torch.cat((case.hidden[order], torch.full((6, 4, 16), torch.nan, dtype=torch.float64)), dim=1)
    labels = torch.cat((case.labels[order], torch.full((6, 4), -100)), dim=1)
    other = LOSSES[name](x, case.weight, labels, **moved)
    assert torch.allclose(out.loss, other.loss, rtol=1e-12)
    (dw,) = torch.autograd.grad(out.loss, case.weight)
    (other_dw,) = torch.autograd.grad(other.loss, case.weight)
    assert torch.allclose(dw, other_dw, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_packed_equals_padded(name, budget):
    case = make_case(sequences=4, tokens=9, dtype=torch.float64, masked=0.0)
    lengths = [9, 4, 0, 7]
    for s, length in enumerate(lengths):
        case.labels[s, length:] = -100
    kwargs = extras(name, 4, torch.float64)
    with ll.settings(memory_budget=BUDGETS[budget]):
        padded = LOSSES[name](case.hidden, case.weight, case.labels, **kwargs)
        x = torch.cat([case.hidden[s, :length] for s, length in enumerate(lengths)])
        labels = torch.cat([case.labels[s, :length] for s, length in enumerate(lengths)])
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        packed = LOSSES[name](x, case.weight, labels, cu_seqlens=bounds, **kwargs)
    assert torch.allclose(padded.loss, packed.loss, rtol=1e-12)
    for a, b in zip(gradient(padded, case), gradient(packed, case), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("train", ["", "h", "w", "b", "hw", "hb", "wb", "hwb"])
def test_frozen_tensors_get_no_gradient(train, budget):
    case, full = (make_case(bias=True, dtype=torch.float64, train=t) for t in (train, "hwb"))
    with ll.settings(memory_budget=BUDGETS[budget]):
        outs = [
            LOSSES["mix"](c.hidden, c.weight, c.labels, bias=c.bias, **extras("mix", 4, torch.float64)) for c in (case, full)
        ]
    assert torch.allclose(outs[0].loss, outs[1].loss)
    assert outs[0].loss.requires_grad == bool(train)
    if not train:
        assert outs[0].plan.schedule == "forward_only"
        return
    outs[0].loss.backward()
    outs[1].loss.backward()
    for key, mine, its in zip("hwb", (case.hidden, case.weight, case.bias), (full.hidden, full.weight, full.bias), strict=True):
        if key in train:
            assert torch.allclose(mine.grad, its.grad, atol=1e-12)
        else:
            assert mine.grad is None


@pytest.mark.parametrize("budget", BUDGETS)
def test_upstream_gradients_and_backward_twice(budget):
    case = make_case(dtype=torch.float64, bias=True)
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = LOSSES["mix"](case.hidden, case.weight, case.labels, bias=case.bias, **extras("mix", 4, torch.float64))
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


def test_gradients_accumulate_into_existing_ones():
    case = make_case(dtype=torch.bfloat16, hidden=32, vocab=500)
    loss = LOSSES["dpo"]
    for _ in range(2):
        loss(case.hidden, case.weight, case.labels, **extras("dpo", 4)).loss.backward()
    twice = case.weight.grad.clone()
    case.weight.grad = None
    loss(case.hidden, case.weight, case.labels, **extras("dpo", 4)).loss.backward()
    assert torch.equal(twice, 2 * case.weight.grad)


def test_a_loss_scale_saves_fp16_gradients_that_would_underflow():
    case = make_case(dtype=torch.float16, hidden=32, vocab=2000, tokens=40)
    wide = case.double()
    kwargs = extras("dpo", 4)
    scale = 65536.0
    out = LOSSES["dpo"](case.hidden, case.weight, case.labels, **kwargs)
    assert out.plan.accumulate
    expected = LOSSES["dpo"](wide.hidden, wide.weight, wide.labels, **kwargs)
    tiny = 1e-3  # a loss this small leaves nothing of most fp16 gradients, unless its scale comes before the rounding
    for ours, theirs in zip(gradient(out, case, scale * tiny), gradient(expected, wide, scale * tiny), strict=True):
        assert ours.dtype == torch.float16
        assert relative_error(ours, theirs) < 2**-9


@pytest.mark.cpu_only(NAMES_THE_CPU)
def test_autocast_keeps_parameter_dtypes():
    case = make_case(hidden=64, vocab=500)
    with torch.autocast("cpu", torch.bfloat16):
        out = LOSSES["dpo"](case.hidden, case.weight, case.labels, **extras("dpo", 4))
    dx, dw = gradient(out, case)
    assert out.loss.dtype == dx.dtype == dw.dtype == torch.float32
    wide = case.double()
    expected = LOSSES["dpo"](wide.hidden, wide.weight, wide.labels, **extras("dpo", 4))
    assert torch.allclose(out.chosen_logps.double(), expected.chosen_logps, rtol=2e-3)
    low = make_case(hidden=64, vocab=500, dtype=torch.bfloat16)
    same = LOSSES["dpo"](low.hidden, low.weight, low.labels, **extras("dpo", 4))
    assert torch.equal(out.loss, same.loss)
    for ours, theirs in zip((dx, dw), gradient(same, low), strict=True):
        assert relative_error(ours, theirs) < 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("train", ["", "h", "hw"])
def test_identical_policy_and_reference_give_exactly_ln_2(dtype, budget, train):
    case = make_case(dtype=dtype, hidden=64, vocab=9001, sequences=6, tokens=10, train=train)
    with ll.settings(memory_budget=BUDGETS[budget] * 100):
        out = ll.FusedLinearDPOLoss()(
            case.hidden, case.weight, case.labels, ref_hidden=case.hidden.detach(), ref_weight=case.weight.detach()
        )
    assert out.loss.item() == torch.tensor(math.log(2)).item()
    assert (out.chosen_rewards == 0).all()
    assert (out.rejected_rewards == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ignored_positions_change_nothing(name, value):
    outs = []
    for poison in (False, True):
        case = make_case(sequences=4, dtype=torch.float64)
        ref = case.hidden.detach().clone()
        if poison:
            with torch.no_grad():
                case.hidden[case.labels == -100] = value
                ref[case.labels == -100] = value
        kwargs = extras(name, 4, torch.float64)
        if "ref_logps" in kwargs:
            del kwargs["ref_logps"]
            kwargs |= {"ref_hidden": ref, "ref_weight": case.weight.detach() * 0.9}
        out = LOSSES[name](case.hidden, case.weight, case.labels, **kwargs)
        outs.append([out.loss, *gradient(out, case)])
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_scored_is_finite_and_has_zero_gradients(name, tokens):
    case = make_case(sequences=4, tokens=tokens, masked=1.0, bias=True)
    out = LOSSES[name](case.hidden, case.weight, case.labels, bias=case.bias, **extras(name, 4))
    assert torch.isfinite(out.loss)
    for g in gradient(out, case):
        assert (g == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_one_empty_sequence_is_finite(name):
    case = make_case(sequences=4)
    case.labels[3] = -100
    out = LOSSES[name](case.hidden, case.weight, case.labels, **extras(name, 4))
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(g).all() for g in gradient(out, case))


def test_gradient_accumulation_over_uneven_micro_batches_equals_one_batch():
    """Losses average over pairs, so a micro-batch counts by its share of them."""
    case = make_case(sequences=10, tokens=9, dtype=torch.float64)
    ref = torch.linspace(-30, -20, 10, dtype=torch.float64)
    loss = LOSSES["dpo smoothed"]
    whole = loss(case.hidden, case.weight, case.labels, ref_logps=ref)
    expected = gradient(whole, case)
    total, summed = 0.0, None
    for pairs in ([0, 1, 2], [3], [4]):
        rows = pairs + [p + 5 for p in pairs]
        out = loss(case.hidden[rows], case.weight, case.labels[rows], ref_logps=ref[rows])
        share = out.loss * len(pairs) / 5
        total += share.item()
        parts = torch.autograd.grad(share, case.leaves)
        summed = parts if summed is None else [a + b for a, b in zip(summed, parts, strict=True)]
    assert total == pytest.approx(whole.loss.item(), rel=1e-12)
    for a, b in zip(summed, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-13)


def test_bitwise_repeatable_in_every_schedule():
    for budget in BUDGETS.values():
        runs = []
        for _ in range(2):
            case = make_case(dtype=torch.bfloat16, vocab=900, hidden=32, tokens=20)
            with ll.settings(memory_budget=budget * 10):
                out = LOSSES["mix"](case.hidden, case.weight, case.labels, **extras("mix", 4))
            runs.append([out.loss, *gradient(out, case)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradients_do_not_get_worse_with_the_number_of_tiles():
    """bf16: dX and dW of 64 tiles are as exact as of one, and no worse than plain PyTorch's.

    What a bf16 accumulator loses on 64 tiles makes dW's error 3.8 times that of one tile.
    """

    def case():
        return make_case(sequences=128, tokens=6, hidden=64, vocab=2048, dtype=torch.bfloat16, scale=0.05, masked=0.0)

    def dpo(logps):
        chosen, rejected = logps.sum(-1).chunk(2)
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    wide, plain = case().double(), case()
    expected = gradients(dpo(run_reference(wide).logps), wide)

    def errors(values):
        return [relative_error(a, b) for a, b in zip(values, expected, strict=True)]

    found = {}
    for tiles, budget in ((1, 1 << 30), (64, 96 << 10)):  # a tile of 18 rows: one pair of 12 tokens
        one = case()
        with ll.settings(memory_budget=budget):
            out = ll.FusedLinearDPOLoss()(one.hidden, one.weight, one.labels, ref_logps=torch.zeros(128))
        assert len(out.plan.steps) == tiles
        assert {step.schedule for step in out.plan.steps} == {"gradient_in_forward"}
        found[tiles] = errors(gradient(out, one))
    for single, many, its in zip(found[1], found[64], errors(gradients(dpo(plain_logps(plain)), plain)), strict=True):
        assert many <= 1.05 * single
        assert max(single, many) <= its


@pytest.mark.parametrize("name", LOSSES)
def test_modules_can_be_pickled_and_copied(name):
    case = make_case(train="")
    kwargs = extras(name, 4)
    expected = LOSSES[name](case.hidden, case.weight, case.labels, **kwargs).loss
    for other in (pickle.loads(pickle.dumps(LOSSES[name])), copy.deepcopy(LOSSES[name])):
        assert torch.equal(other(case.hidden, case.weight, case.labels, **kwargs).loss, expected)


def test_weights_of_zero_take_whole_sequences_out_in_every_schedule():
    """A pair whose tokens all weigh 0 has no gradient; it used to be 0 / 0 where the pair exceeds the budget."""
    for budget in BUDGETS.values():
        case = make_case(tokens=20)
        weights = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None].expand(case.labels.shape).contiguous()
        with ll.settings(memory_budget=budget):
            out = LOSSES["simpo"](case.hidden, case.weight, case.labels, token_weights=weights)
        dx, dw = gradient(out, case)
        assert torch.isfinite(dw).all()
        assert (dx[[0, 2]] == 0).all()
        assert (dx[1] != 0).any()


def test_an_impossible_token_does_not_spoil_the_others():
    """A label of log-probability -inf: the loss is what its formula gives, and weight 0 takes it out."""
    case = make_case(bias=True, masked=0.0)
    with torch.no_grad():
        case.bias[50] = -torch.inf
        case.labels[case.labels == 50] = 51
        case.labels[2, 3] = 50
    out = ll.FusedLinearDPOLoss(loss_type="hinge")(
        case.hidden, case.weight, case.labels, bias=case.bias, ref_logps=torch.zeros(4)
    )
    expected = torch.relu(1 - 0.1 * (out.chosen_logps - out.rejected_logps)).mean()
    assert out.rejected_logps[0] == -torch.inf
    assert out.loss == expected
    weights = torch.ones(case.labels.shape)
    weights[2, 3] = 0
    out = LOSSES["dpo"](case.hidden, case.weight, case.labels, bias=case.bias, token_weights=weights, **extras("dpo", 4))
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(g).all() for g in gradient(out, case)[:2])


def test_a_loss_function_with_parameters_of_its_own_is_refused():
    beta = torch.nn.Parameter(torch.tensor(0.5))
    loss = ll.FusedLinearPreferenceLoss(lambda pairs: beta * (pairs.rejected_logps - pairs.chosen_logps))
    for train in ("", "hw"):
        case = make_case(train=train)
        with pytest.raises(ValueError, match=r"uses a tensor of shape \(\) that requires a gradient"):
            loss(case.hidden, case.weight, case.labels)


@pytest.mark.cpu_only(ENDS_THE_PROCESS)
def test_a_margin_that_is_none_is_refused_where_it_would_matter():
    case = make_case(tokens=20)
    wrong = ll.FusedLinearPreferenceLoss(lambda pairs: pairs.chosen_logps - 2 * pairs.rejected_logps, margin="sum")
    with ll.settings(memory_budget=1), pytest.raises(ValueError, match="margin='sum' is declared"):
        wrong(case.hidden, case.weight, case.labels)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda pairs: 0.5, "losses of type float"),
        (lambda pairs: pairs.chosen_logps.mean(), r"losses of shape \(\)"),
        (lambda pairs: ll.PreferenceLossResult(pairs.chosen_logps, metrics={"m": 1.0}), r"metrics\['m'\] of type float"),
        (lambda pairs: ll.PreferenceLossResult(pairs.chosen_logps, chosen_rewards=pairs.logps), "chosen_rewards of shape"),
    ],
)
def test_what_a_loss_function_returns_is_checked(result, words):
    case = make_case()
    with pytest.raises((TypeError, ValueError), match=words):
        ll.FusedLinearPreferenceLoss(result)(case.hidden, case.weight, case.labels)


def test_weights_narrower_than_the_hidden_states_train():
    """A lossless mix of dtypes is computed in the wider one."""
    case = make_case(dtype=torch.float64)
    narrow = case.weight.detach().float().requires_grad_()
    out = LOSSES["simpo"](case.hidden, narrow, case.labels)
    dx, dw = torch.autograd.grad(out.loss, (case.hidden, narrow))
    assert dx.dtype == torch.float64
    assert dw.dtype == torch.float32
    logps = ll.linear_logps(case.hidden, narrow, case.labels).logps
    assert torch.autograd.grad(logps.sum(), narrow)[0].dtype == torch.float32


def test_gradients_kept_for_a_second_backward_are_the_callers_own():
    case = make_case()
    out = LOSSES["simpo"](case.hidden, case.weight, case.labels)
    (first,) = torch.autograd.grad(out.loss, case.weight, retain_graph=True)
    expected = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(out.loss, case.weight)[0], expected)


def test_a_kl_tensor_that_is_nan_reaches_the_loss_and_is_not_looked_at():
    """As in TRL: a look would wait for the device, and a step that overflowed in fp16 is for the loss scaler to skip."""
    case = make_case()
    out = LOSSES["kto"](case.hidden, case.weight, case.labels, **extras("kto", 4) | {"kl": torch.tensor(torch.nan)})
    assert out.loss.isnan()
    assert all(g.isnan().any() for g in gradient(out, case))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_default_device_elsewhere_changes_nothing(name, budget):
    """Every tensor made on the way says where it belongs; on ``"meta"``, one that does not has no numbers."""
    results = []
    for default in ("cpu", "meta"):
        case, kwargs = make_case(sequences=6, tokens=12, bias=True, vocab=211), extras(name, 6)
        with ll.settings(memory_budget=BUDGETS[budget]), torch.device(default):
            out = LOSSES[name](case.hidden, case.weight, case.labels, bias=case.bias, **kwargs)
            results.append([out.loss, *gradient(out, case)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def with_a_reference_and_metrics(case):
    return ll.FusedLinearDPOLoss(metrics=True)(
        case.hidden, case.weight, case.labels, ref_hidden=case.hidden.detach(), ref_weight=case.weight.detach()
    )


def with_nll_labels(case):
    return ll.FusedLinearORPOLoss(metrics=True)(case.hidden, case.weight, case.labels, nll_labels=case.labels.clamp(min=0))


def kto_with_metrics(case):
    module = ll.FusedLinearKTOLoss(metrics=True)
    return module(
        case.hidden, case.weight, case.labels, case.labels[:, 0] >= 0, ref_logps=case.hidden.detach()[:, 0, 0], kl=0.1
    )


def several_objectives(case):
    objectives = {"a": ll.Objective(LOSSES["simpo"], [0, 2]), "b": ll.Objective(LOSSES["cpo"], range(1, 3), weight=0.5)}
    return ll.FusedLinearMultiObjectiveLoss()(case.hidden, case.weight, case.labels, objectives)


def packed(case):
    flat = case.hidden.flatten(0, 1), case.weight, case.labels.flatten()
    return LOSSES["simpo"](*flat, cu_seqlens=case.labels.new_tensor([0, 7, 14, 20, 28]))


@pytest.mark.parametrize(
    "call",
    [
        with_a_reference_and_metrics,
        with_nll_labels,
        kto_with_metrics,
        several_objectives,
        packed,
    ],
)
def test_a_default_device_elsewhere_changes_no_kind_of_call(call):
    results = []
    for default in ("cpu", "meta"):
        case = make_case()
        with torch.device(default):
            out = call(case)
            results.append([out.loss, *getattr(out, "metrics", {}).values(), *gradient(out, case)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
