"""Every example in the docstring of a public name does what it says."""

from __future__ import annotations

import doctest

import pytest
import torch

import logitless as ll

NAMESPACE = {**{name: getattr(ll, name) for name in ll.__all__}, "torch": torch}
EXAMPLES = [
    test
    for name in ll.__all__
    for test in doctest.DocTestFinder().find(getattr(ll, name), name, globs=dict(NAMESPACE))
    if test.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_the_example_runs(example):
    if any("transformers" in part.source for part in example.examples):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    found: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=found.append)
    assert result.attempted and not result.failed, "".join(found)
