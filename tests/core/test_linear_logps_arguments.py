"""Bad input of the log-prob functions is an error that names the argument."""

from __future__ import annotations

import pytest
import torch

import logitless as ll
from logitless.kernels.core.settings import current_settings

from ..helpers import ENDS_THE_PROCESS, NAMES_THE_CPU, make_case, run_op

EVERY_BACKEND = True
_ENDS_THE_PROCESS = pytest.mark.cpu_only(ENDS_THE_PROCESS)


def bad(**changes):
    case = make_case()
    arguments = {"hidden": case.hidden, "weight": case.weight, "labels": case.labels}
    return ll.linear_logps(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        pytest.param(
            {"labels": torch.full((4, 7), 101)}, ValueError, r"labels must be in \[0, 101\).*got 101", marks=_ENDS_THE_PROCESS
        ),
        pytest.param(
            {"labels": torch.full((4, 7), -1)},
            ValueError,
            "labels must be in.*ignore_index=-100.*got -1",
            marks=_ENDS_THE_PROCESS,
        ),
        ({"labels": torch.zeros(4, 7)}, TypeError, "labels must be int32 or int64, got torch.float32"),
        ({"labels": torch.zeros(4, 6, dtype=torch.long)}, ValueError, r"labels must have shape \(4, 7\).*already shifted"),
        ({"labels": [1, 2]}, TypeError, "labels must be a torch.Tensor, got list"),
        ({"hidden": torch.zeros(4, 7, 15)}, ValueError, r"hidden must have shape \[\.\.\., 16\]"),
        ({"hidden": torch.zeros(4, 7, 16, dtype=torch.int32)}, TypeError, "hidden must be float64"),
        ({"hidden": torch.zeros(4, 7, 16).bfloat16()}, TypeError, "hidden is torch.bfloat16 but weight is torch.float32"),
        ({"weight": torch.zeros(101)}, ValueError, r"weight must have shape \[vocab, hidden\]"),
        ({"weight": torch.zeros(0, 16)}, ValueError, "weight must not be empty"),
        ({"bias": torch.zeros(100)}, ValueError, r"bias must have shape \[101\], got \(100,\)"),
        ({"bias": torch.zeros(101, dtype=torch.long)}, TypeError, "bias must be floating point"),
        pytest.param(
            {"weight": torch.zeros(101, 16, device="meta")},
            ValueError,
            "weight is on meta but hidden is on cpu",
            marks=pytest.mark.cpu_only(NAMES_THE_CPU),
        ),
        ({"outputs": ("logps", "perplexity")}, ValueError, "outputs must be a non-empty subset.*perplexity"),
        ({"outputs": ()}, ValueError, "outputs must be a non-empty subset"),
        ({"ignore_index": "x"}, TypeError, "ignore_index must be an int"),
        ({"head": {"temperature": 1}}, TypeError, "head must be a logitless.HeadSpec, got dict"),
    ],
)
def test_bad_input_is_an_error_that_names_the_argument(changes, error, words):
    with pytest.raises(error, match=words):
        bad(**changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"memory_budget": 0}, "memory_budget must be > 0"),
        ({"memory_budget": 1.5}, "memory_budget must be an int"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"backend": "cudnn"}, "backend must be 'auto' or one of"),
    ],
)
def test_bad_settings_are_errors_and_change_nothing(arguments, words):
    before = current_settings()
    with pytest.raises((ValueError, TypeError), match=words), ll.settings(**arguments):
        pass
    assert current_settings() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reduction": "max"}, "reduction must be 'sum' or 'mean', got 'max'"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 7])}, "labels must have shape"),
        ({"token_weights": torch.ones(3, 7)}, "token_weights must have shape"),
    ],
)
def test_bad_sequence_arguments(changes, words):
    case = make_case()
    with pytest.raises(ValueError, match=words):
        ll.sequence_logps(case.hidden, case.weight, case.labels, **changes)


@pytest.mark.parametrize("bounds", [[1, 7], [0, 6], [0, 5, 4, 7]])
def test_bad_cu_seqlens(bounds):
    case = make_case(sequences=1)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, never fall, and end at the token count 7"):
        ll.sequence_logps(case.hidden[0], case.weight, case.labels[0], cu_seqlens=torch.tensor(bounds))


def test_shift_aligns_hidden_states_with_the_labels_they_predict():
    x, y = torch.arange(24.0).view(2, 4, 3), torch.arange(8).view(2, 4)
    hidden, labels = ll.shift(x, y)
    assert torch.equal(hidden, x[:, :-1]) and torch.equal(labels, y[:, 1:])
    with pytest.raises(ValueError, match="labels must have shape"):
        ll.shift(x, y[:, :3])


def test_double_backward_is_refused_not_wrong():
    case = make_case(dtype=torch.float64)
    for loss in (run_op(case).logps.sum(), run_op(case).logps.square().sum()):
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(loss, case.hidden, create_graph=True)
