"""Every registered operator under torch.library.opcheck, torch.compile and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import logitless as ll
from logitless.kernels.logps_operators import ALL_ROWS, SCORED_ROWS
from logitless.kernels.operators import loading, schemas

from ..conftest import backends
from ..helpers import gradients, make_case, run_op

N, H, V = 5, 8, 12  # tokens, hidden size, vocabulary
HEAD = ll.HeadSpec(0.8, 6.0, 1.2)
NUMBERS = (HEAD.logit_scale, HEAD.softcap, HEAD.temperature)
Arguments = tuple[Any, ...]


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def labels() -> Tensor:
    return torch.randint(V, (N,))


def sums() -> Tensor:
    return schemas.new_sums(N, torch.device("cpu"))


class Recorder(TorchDispatchMode):
    """Keeps what an operator is called with."""

    def __init__(self, operator) -> None:
        super().__init__()
        self.operator, self.calls = operator, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is self.operator:
            self.calls.append(tuple(a.detach() if isinstance(a, Tensor) else a for a in args))
        return function(*args, **(kwargs or {}))


def by_linear_logps(name: str) -> list[Arguments]:
    """What ``linear_logps`` calls an operator with, on each backend."""
    with Recorder(getattr(torch.ops.logitless, name).default) as recorder:
        for backend in backends():
            for train in ("", "h", "w", "hwb"):
                case = make_case(bias=True, train=train, head=HEAD)
                with ll.settings(backend=backend):
                    stats = run_op(case, ("logps", "entropy", "is_top1"))
                if train:
                    gradients((stats.logps + stats.entropy).sum(), case)
    return recorder.calls


#: Where ``logps_forward`` is told of which rows to return the gradient.
UNIT = [a.name for a in torch.ops.logitless.logps_forward.default._schema.arguments].index("unit_dhidden")


def forward() -> list[Arguments]:
    calls = by_linear_logps("logps_forward")
    of_all_rows = [(*c[:UNIT], ALL_ROWS, *c[UNIT + 1 :]) for c in calls if c[UNIT] == SCORED_ROWS]  # as in compiled code
    return calls + of_all_rows


def tile_pass() -> list[Arguments]:
    source, bias, k = torch.randn(N, V), torch.randn(V), torch.randn(N)
    return [
        (source, torch.zeros(N, V), bias, labels(), k, sums(), None, None, torch.rand(N), *NUMBERS, 0, 15, 0),
        (source, None, None, labels(), k, sums(), None, None, None, *NUMBERS, 0, 0, 1),
        (source, torch.zeros(N, V), None, labels(), k, None, torch.rand(2, N), torch.rand(N), None, *NUMBERS, 0, 0, 0),
    ]


def pair_loss() -> list[Arguments]:
    logps, offsets = torch.randn(N), torch.tensor([0, 2, 3, 3, 5])
    outputs = (torch.zeros(2, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    weights, reference = torch.rand(N).double(), torch.randn(4).double()
    return [
        (logps, weights, offsets, reference, 0, True, 0.3, 0.1, 0.1, 0.5, *outputs, torch.zeros(N)),
        (logps, None, offsets, None, 2, False, 0.3, 0.0, 0.0, 1.0, *outputs, None),
    ]


def score_block() -> list[Arguments]:
    packed, start, gradient = torch.zeros(schemas.packed_tokens_size(N, H)).bfloat16(), torch.randn(N), bf16(V * N)
    torch.ops.logitless.pack_tokens(bf16(N, H), packed)
    return [
        (packed, bf16(V, H), torch.randn(V), labels(), start, start.clone(), sums(), None, None, gradient, *NUMBERS, 0, 15, 0),
        (packed, bf16(V, H), None, labels(), None, start, None, torch.rand(2, N), torch.rand(N), gradient, *NUMBERS, 0, 0, 0),
    ]


def grad_weight() -> list[Arguments]:
    x, scale, packed = bf16(N, H), torch.rand(N), torch.zeros(schemas.packed_rows_size(N, H)).bfloat16()
    torch.ops.logitless.pack_rows(x, scale, packed)
    given = (x, scale, torch.rand(N), labels(), 0, V)
    return [
        (bf16(V * N), packed, *given, True, torch.zeros(V, H), torch.zeros(V)),
        (bf16(V * N), None, *given, False, None, torch.zeros(V)),
    ]


def finish_tile() -> list[Arguments]:
    tile = torch.randn(N, V)
    return [(tile, torch.rand(3, N), labels(), torch.rand(N), 5), (tile, None, labels(), torch.rand(N), 5)]


#: Arguments to call each operator with.
CASES: dict[str, Callable[[], list[Arguments]]] = {
    "logps_forward": forward,
    "logps_backward": lambda: by_linear_logps("logps_backward"),
    "segment_sum": lambda: [(torch.randn(N), torch.tensor([0, 1, 1, N]), "auto")],
    "indexed_dot": lambda: [(torch.randn(N, H), bf16(V, H), torch.randn(V), labels(), False, torch.zeros(N))],
    "tile_pass": tile_pass,
    "pair_loss": pair_loss,
    "scale_scatter": lambda: [(torch.randn(2, H), torch.tensor([3, 0]), torch.rand(2), torch.zeros(N, H))],
    "scaled_convert": lambda: [(torch.randn(N, H), torch.rand(1), bf16(N, H))],
    "finish_tile": finish_tile,
    "pack_tokens": lambda: [(bf16(N, H), torch.zeros(schemas.packed_tokens_size(N, H)).bfloat16())],
    "pack_rows": lambda: [(bf16(N, H), torch.rand(N), torch.zeros(schemas.packed_rows_size(N, H)).bfloat16())],
    "score_block": score_block,
    "grad_hidden": lambda: [(bf16(V * N), bf16(V, H), torch.randn(N, H))],
    "finish_rows": lambda: [(torch.randn(N, H), torch.rand(N), torch.rand(N), bf16(V, H), labels())],
    "grad_weight": grad_weight,
}
REGISTERED = sorted(
    {n.removeprefix("logitless::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("logitless::")}
)
DYNAMIC = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
#: Those that need oneDNN's small GEMM.
GEMM = ("score_block", "grad_hidden", "grad_weight")


def prepare(name: str) -> tuple[Any, list[Arguments], list[int]]:
    """An operator, what to call it with, and which of its arguments it writes into."""
    assert name in CASES, f"logitless::{name} is registered, but CASES has no arguments for it"
    if name in schemas.SCHEMAS and loading.why_no_cpu_extension():
        pytest.skip("; ".join(loading.why_no_cpu_extension()))
    if name in GEMM and not loading.has_bf16_gemm():
        pytest.skip("oneDNN has no bfloat16 small GEMM here")
    torch.manual_seed(0)
    operator = getattr(torch.ops.logitless, name).default
    written = [i for i, argument in enumerate(operator._schema.arguments) if argument.is_write]
    return operator, CASES[name](), written


def cloned(arguments: Arguments) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in arguments]


def test_every_case_is_of_a_registered_operator():
    assert set(CASES) <= set(REGISTERED)


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name):
    operator, cases, _ = prepare(name)
    for arguments in cases:
        # as many rows as there are scored tokens: such a size has no static graph
        sized_by_data = name == "logps_forward" and arguments[UNIT] == SCORED_ROWS
        torch.library.opcheck(operator, arguments, test_utils=DYNAMIC if sized_by_data else "ALL")


@pytest.mark.parametrize("name", REGISTERED)
def test_compile_with_fullgraph(name):
    operator, cases, written = prepare(name)

    def call(*arguments):
        returned = operator(*arguments)
        return returned, [arguments[i] * 1 for i in written if arguments[i] is not None]  # what the rest of a graph sees

    for arguments in cases:
        torch._dynamo.reset()
        given, again = cloned(arguments), cloned(arguments)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            got = torch.compile(call, fullgraph=True, backend="aot_eager")(*given)
        torch.testing.assert_close(got, call(*again), rtol=0, atol=0)
        torch.testing.assert_close([given[i] for i in written], [again[i] for i in written], rtol=0, atol=0)


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_fakes_take_what_the_operators_take_and_nothing_of_two_devices(name):
    operator, cases, _ = prepare(name)
    for arguments in cases:
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
            assert operator(*fakes) is None
            fakes[-1 if isinstance(fakes[-1], Tensor) else 0] = torch.empty(N, H, device="cuda")
            with pytest.raises(ValueError, match=f"{name}: all tensors must be on one device"):
                operator(*fakes)


def test_fakes_name_an_argument_of_the_wrong_shape():
    with FakeTensorMode():
        for dhidden in (torch.empty(N, H + 1), torch.empty(N * H)):
            with pytest.raises(RuntimeError, match=r"grad_hidden: dhidden must have shape \(n, h\), got .* 'h': 8"):
                torch.ops.logitless.grad_hidden(torch.empty(V * N), torch.empty(V, H), dhidden)


def test_fakes_do_not_look_at_sizes_that_depend_on_data():
    operator, ((x, weight, *_),), _ = prepare("indexed_dot")

    def dot(x, weight, labels):
        rows = (labels != -100).nonzero()[:, 0]
        out = torch.empty(len(rows))
        operator(x[rows], weight, None, labels[rows], False, out)
        return out

    torch._dynamo.reset()
    y = torch.tensor([3, -100, 0, 11, -100])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(torch.compile(dot, fullgraph=True, backend="aot_eager")(x, weight, y), dot(x, weight, y))
