"""The public names are the declared ones, each is documented, and every example in a docstring is correct."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest
import torch

import logitless as ll
from logitless.kernels.backends import registry

SPACES = {"logitless": ll, "logitless.rl": ll.rl, "logitless.models": ll.models}
#: Names of every space, by the name that an example uses.
NAMES = {name: getattr(space, name) for space in SPACES.values() for name in space.__all__}
NAMESPACE = {**NAMES, "torch": torch}
EXAMPLES = [
    test
    for name, value in NAMES.items()
    for test in doctest.DocTestFinder().find(value, name, globs=dict(NAMESPACE))
    if test.examples
]
TOP = """
    BradleyTerryLoss FusedLinearCPOLoss FusedLinearDPOLoss FusedLinearGRPOLoss FusedLinearIPOLoss FusedLinearKTOLoss
    FusedLinearMultiObjectiveLoss FusedLinearORPOLoss FusedLinearPPOLoss FusedLinearPolicyLoss FusedLinearPreferenceLoss
    FusedLinearSimPOLoss HeadSpec LoRAWeight Objective PackedSequences Pairs Plan PolicyLoss PolicyLossResult PreferenceLoss
    PreferenceLossResult Sequences TokenStats Tokens VocabParallel at_head available_backends gae group_advantages integrations
    linear_logps model_logps model_loss models pack plan reference_logps register_backend rl sequence_logps settings shift
    skipped_share unpack value_loss
"""
RL = """
    GAE KL_ESTIMATORS BradleyTerryLoss RewardModelOutput ValueLoss ValueTracker gae group_advantages importance_sampling_ratio
    kl_estimate kl_shaped_rewards last_token_pool leave_one_out_advantages masked_mean masked_var masked_whiten
    reinforce_plus_plus_advantages value_loss
"""
MODELS = "AtHead PackedSequences at_head model_logps model_loss pack unpack why_not_padding_free"


@pytest.mark.parametrize(("space", "names"), [("logitless", TOP), ("logitless.rl", RL), ("logitless.models", MODELS)])
def test_the_public_names_are_these(space, names):
    module = importlib.import_module(space)
    assert module is SPACES[space]
    assert sorted(module.__all__) == sorted(names.split())
    # what else can be reached from a space without an underscore is one of its modules
    others = {name for name in vars(module) if not name.startswith("_")} - set(module.__all__)
    assert all(inspect.ismodule(getattr(module, name)) for name in others), others


def test_a_name_means_one_thing_in_every_space():
    for space in SPACES.values():
        assert all(getattr(space, name) is NAMES[name] for name in space.__all__)


@pytest.mark.parametrize("name", [name for name, value in NAMES.items() if not isinstance(value, dict)])
def test_a_public_name_has_a_docstring_and_an_operation_an_example(name):
    value = NAMES[name]
    assert value.__doc__, name
    assert not inspect.isclass(value) or not value.__doc__.startswith(f"{value.__name__}("), "dataclasses make this docstring"
    if inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, torch.nn.Module)):
        assert ">>>" in value.__doc__, name


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_the_example_runs(example, monkeypatch):
    if any("transformers" in part.source for part in example.examples):
        pytest.importorskip("transformers")
    # an example may register a backend
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(registry, "backend_names", set(registry.backend_names))
    torch.manual_seed(0)
    found: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=found.append)
    assert result.attempted and not result.failed, "".join(found)
