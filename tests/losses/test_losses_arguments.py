"""Bad and unused options and arguments of the preference losses are errors that name them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import logitless as ll

from .variants import SEQUENCES, SIMPO, TOKENS, VARIANTS, VOCAB, gradients, make, own_margin

EVERY_BACKEND = True


BAD_OPTIONS = [
    (ll.FusedLinearDPOLoss, {"beta": 0.0}, "beta"),
    (ll.FusedLinearDPOLoss, {"beta": math.nan}, "beta"),
    (ll.FusedLinearDPOLoss, {"beta": "0.1"}, "beta"),
    (ll.FusedLinearDPOLoss, {"loss_type": "dpo"}, "loss_type"),
    (ll.FusedLinearDPOLoss, {"loss_type": []}, "loss_type"),
    (ll.FusedLinearDPOLoss, {"loss_type": ["sigmoid", "kto_pair"]}, "loss_type"),
    (ll.FusedLinearDPOLoss, {"loss_weights": [1.0, 2.0]}, "loss_weights"),
    (ll.FusedLinearDPOLoss, {"loss_weights": [math.inf]}, "loss_weights"),
    (ll.FusedLinearDPOLoss, {"label_smoothing": 1.5}, "label_smoothing"),
    (ll.FusedLinearDPOLoss, {"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing"),
    (ll.FusedLinearDPOLoss, {"loss_type": "exo_pair"}, "label_smoothing"),
    (ll.FusedLinearDPOLoss, {"f_divergence_type": "kl"}, "f_divergence_type"),
    (ll.FusedLinearDPOLoss, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": None}, "f_alpha"),
    (ll.FusedLinearDPOLoss, {"ld_alpha": 1.1}, "ld_alpha"),
    (ll.FusedLinearDPOLoss, {"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau"),
    (ll.FusedLinearDPOLoss, {"ignore_index": 0.5}, "ignore_index"),
    (ll.FusedLinearDPOLoss, {"metrics": "no"}, "metrics must be a bool, got 'no'"),
    (ll.FusedLinearDPOLoss, {"loss_type": "ipo", "length_normalize": "no"}, "length_normalize must be a bool, got 'no'"),
    (ll.FusedLinearDPOLoss, {"loss_type": "aot", "use_weighting": True}, "use_weighting"),
    (ll.FusedLinearDPOLoss, {"loss_type": ["sigmoid", "aot_unpaired"], "use_weighting": True}, "use_weighting"),
    (ll.FusedLinearIPOLoss, {"beta": -1.0}, "beta"),
    (ll.FusedLinearSimPOLoss, {"beta": 0.0}, "beta"),
    (ll.FusedLinearSimPOLoss, {"gamma": None}, "gamma"),
    (ll.FusedLinearSimPOLoss, {"label_smoothing": -0.1}, "label_smoothing"),
    (ll.FusedLinearSimPOLoss, {"alpha": math.inf}, "alpha"),
    (ll.FusedLinearCPOLoss, {"loss_type": "simpo"}, "loss_type"),
    (ll.FusedLinearCPOLoss, {"beta": True}, "beta"),
    (ll.FusedLinearCPOLoss, {"cpo_alpha": -1.0}, "cpo_alpha"),
    (ll.FusedLinearCPOLoss, {"alpha": "0"}, "alpha"),
    (ll.FusedLinearORPOLoss, {"beta": -0.1}, "beta"),
    (ll.FusedLinearKTOLoss, {"beta": 0}, "beta"),
    (ll.FusedLinearKTOLoss, {"loss_type": "bco"}, "loss_type"),
    (ll.FusedLinearKTOLoss, {"desirable_weight": -1.0}, "desirable_weight"),
    (ll.FusedLinearKTOLoss, {"undesirable_weight": math.nan}, "undesirable_weight"),
]
UNUSED_OPTIONS = [
    *((ll.FusedLinearDPOLoss, {"loss_type": n, "label_smoothing": 0.1}, "label_smoothing") for n in ("hinge", "ipo", "sft")),
    (ll.FusedLinearDPOLoss, {"length_normalize": False}, "length_normalize"),
    (ll.FusedLinearDPOLoss, {"discopop_tau": 0.1}, "discopop_tau"),
    (ll.FusedLinearDPOLoss, {"f_alpha_divergence_coef": 0.2}, "f_alpha_divergence_coef"),
    (ll.FusedLinearDPOLoss, {"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "f_divergence_type"),
    (ll.FusedLinearCPOLoss, {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
    (ll.FusedLinearCPOLoss, {"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
]


@pytest.mark.parametrize(("module", "options", "named"), BAD_OPTIONS + UNUSED_OPTIONS)
def test_a_bad_or_unused_option_is_an_error_that_names_it(module, options, named):
    with pytest.raises((TypeError, ValueError), match=named):
        module(**options)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


FLAGS = torch.ones(SEQUENCES, dtype=torch.bool)
BAD_ARGUMENTS = [
    # what the loss does not use
    ("simpo", {"ref_logps": zeros(8)}, "ref_logps"),
    ("cpo", {"ref_hidden": zeros(8, TOKENS, 4), "ref_weight": zeros(VOCAB, 4)}, "ref_hidden"),
    ("orpo", {"ref_bias": zeros(VOCAB)}, "ref_bias"),
    ("sft", {"ref_logps": zeros(8)}, "ref_logps"),
    ("reference free", {"ref_logps": zeros(8)}, "ref_logps"),
    ("sigmoid", {"nll_labels": torch.zeros(8, TOKENS, dtype=torch.long)}, "nll_labels"),
    ("simpo", {"nll_labels": torch.zeros(8, TOKENS, dtype=torch.long)}, "nll_labels"),
    ("apo_zero_unpaired", {"kl": 0.0}, "kl"),
    # what it needs
    ("sigmoid", {"ref_logps": None}, "ref_logps"),
    ("kto", {"ref_logps": None}, "ref_logps"),
    ("kto", {"kl": None}, "kl"),
    ("kto", {"desirable": None}, "desirable"),
    # shapes, types, values
    ("sigmoid", {"ref_logps": zeros(4)}, "ref_logps"),
    ("sigmoid", {"ref_logps": torch.zeros(8, dtype=torch.long)}, "ref_logps"),
    ("sigmoid", {"ref_logps": [0.0] * 8}, "ref_logps"),
    ("sigmoid", {"ref_hidden": zeros(8, TOKENS, 4), "ref_weight": zeros(VOCAB, 4)}, "ref_logps and ref_hidden"),
    ("sigmoid", {"ref_logps": None, "ref_hidden": zeros(8, TOKENS, 4)}, "ref_weight"),
    ("sigmoid", {"ref_logps": None, "ref_hidden": zeros(8, 5, 4), "ref_weight": zeros(VOCAB, 4)}, "ref_hidden"),
    ("sigmoid", {"ref_logps": None, "ref_hidden": zeros(8, TOKENS, 4), "ref_weight": zeros(9, 4)}, "ref_weight"),
    ("sigmoid", {"ref_logps": None, "ref_hidden": zeros(8, TOKENS, 4), "ref_weight": zeros(VOCAB, 5)}, "ref_weight"),
    (
        "sigmoid",
        {"ref_logps": None, "ref_hidden": zeros(8, TOKENS, 4).to("meta"), "ref_weight": zeros(VOCAB, 4).to("meta")},
        "ref_hidden is on meta, which has no data",
    ),
    ("kto", {"desirable": FLAGS[:3]}, "desirable"),
    ("kto", {"desirable": FLAGS.long()}, "desirable"),
    ("kto", {"kl": zeros(8)}, "kl"),
    ("kto", {"kl": torch.tensor(True)}, "kl"),
    *(("kto", {"kl": value}, f"^kl must be a finite number, got {value}") for value in (math.nan, math.inf, -math.inf)),
    *(("kto", {"kl": value}, "^kl must be a number, got") for value in ("0.1", [0.1], True)),
    ("simpo", {"token_weights": zeros(8)}, "token_weights"),
    ("simpo", {"token_weights": torch.ones(8, TOKENS, dtype=torch.long)}, "token_weights"),
    ("simpo", {"token_weights": torch.ones(8, TOKENS, requires_grad=True)}, "token_weights"),
    ("cpo", {"nll_labels": torch.full((8, TOKENS), VOCAB)}, "nll_labels|labels"),
    ("cpo", {"nll_labels": zeros(8, TOKENS)}, "nll_labels"),
    ("simpo", {"bias": zeros(5)}, "bias"),
    ("simpo", {"head": 1.0}, "head"),
    ("simpo", {"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens"),
]


@pytest.mark.parametrize(("name", "changed", "named"), BAD_ARGUMENTS)
def test_a_bad_or_unused_argument_is_an_error_that_names_it(name, changed, named):
    with pytest.raises((TypeError, ValueError, IndexError), match=named):
        VARIANTS[name].run(make(), **changed)


@pytest.mark.parametrize("name", ["sigmoid", "simpo", "cpo", "orpo"])
def test_an_odd_number_of_sequences_is_an_error(name):
    case = make()
    odd = replace(case, hidden=case.hidden[:7], labels=case.labels[:7], ref_logps=case.ref_logps[:7])
    with pytest.raises(ValueError, match="even number of sequences"):
        VARIANTS[name].run(odd)


BAD_OBJECTIVES = [
    (ll.Objective(SIMPO(), [0, 1, 4]), "'a'.*sequences"),
    (ll.Objective(SIMPO(), [0, 8]), "'a'.*sequences"),
    (ll.Objective(SIMPO(), [0, 0]), "'a'.*sequences"),
    (ll.Objective(SIMPO(), []), "'a'.*sequences"),
    *((ll.Objective(SIMPO(), value), "'a'.*sequences must be integer") for value in (None, "04", {0, 4}, [0.0, 4.0])),
    (ll.Objective(SIMPO(), [0, 4], weight=math.nan), "'a'.*weight"),
    (ll.Objective(SIMPO(), [0, 4], kl=0.0), "'a'.*kl"),
    (ll.Objective(ll.FusedLinearDPOLoss(), [0, 4]), "'a'.*reference"),
    (ll.Objective(ll.FusedLinearDPOLoss(), [0, 4], ref_logps=zeros(8)), "'a'.*ref_logps"),
    (ll.Objective(ll.FusedLinearDPOLoss(ld_alpha=0.5), [0, 4], ref_logps=zeros(2)), "'a'.*ld_alpha"),
    (ll.Objective(ll.FusedLinearKTOLoss(), [0, 4], ref_logps=zeros(2), desirable=FLAGS[:2]), "'a'.*kl"),
    (ll.Objective(ll.FusedLinearKTOLoss(), [0, 4], ref_logps=zeros(2), desirable=FLAGS[:2], kl=math.nan), "'a'.*kl"),
    (ll.Objective(ll.FusedLinearKTOLoss(), [0, 4], ref_logps=zeros(2), desirable=FLAGS[:3], kl=0.0), "'a'.*desirable"),
]


@pytest.mark.parametrize(("objective", "named"), BAD_OBJECTIVES)
def test_a_bad_objective_is_an_error_that_names_it(objective, named):
    case = make()
    with pytest.raises((TypeError, ValueError), match=named):
        ll.FusedLinearMultiObjectiveLoss()(case.hidden, case.weight, case.labels, {"a": objective})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fn": 3}, "fn"),
        ({"fn": own_margin, "group": "token"}, "group"),
        ({"fn": own_margin, "margin": "max"}, "margin"),
        ({"fn": own_margin, "margin": "sum", "group": "batch"}, "margin"),
    ],
)
def test_a_bad_declaration_of_your_own_loss_is_an_error_that_names_it(options, named):
    with pytest.raises((TypeError, ValueError), match=named):
        ll.FusedLinearPreferenceLoss(**options)


def test_a_loss_of_the_wrong_shape_is_an_error():
    case = make()
    with pytest.raises(ValueError, match="one loss per pair"):
        ll.FusedLinearPreferenceLoss(lambda pairs: pairs.logps)(case.hidden, case.weight, case.labels)


@pytest.mark.parametrize("name", ["sigmoid", "simpo", "kto", "aot", "orpo", "wpo"])
def test_no_sequences_at_all_is_a_loss_of_0(name):
    case = make()
    none = replace(
        case, hidden=case.hidden[:0], labels=case.labels[:0], ref_logps=case.ref_logps[:0], desirable=case.desirable[:0]
    )
    out = VARIANTS[name].run(none)
    assert out.loss.item() == 0
    assert all((g == 0).all() for g in gradients(out.loss, case))
