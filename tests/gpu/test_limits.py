"""What only a GPU shows of the backends: tiles beyond 2^31 elements, other devices, graphs, bits, bytes, compilations.

``python -m pytest -m gpu``; elsewhere they are skipped. ``LOGITLESS_GPU_TEST_DEVICE=cpu`` runs at small sizes what a CPU can.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import logitless as ll
from logitless.kernels.backends.registry import get_backend
from logitless.kernels.core.blocking import core_options
from logitless.kernels.core.dtypes import tile_dtype
from logitless.kernels.core.stats import OUTPUTS, CoreOptions, RowStats
from logitless.kernels.tile.head_gradient import HeadGradient

from ..helpers import Case, gradients, make_case, relative_error, run_op, run_reference

DEVICE = os.environ.get("LOGITLESS_GPU_TEST_DEVICE", "cuda")
ON_GPU = DEVICE != "cpu"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no such thing on a CPU")
BF16, F32 = torch.bfloat16, torch.float32


def require(name: str) -> None:
    if reasons := ll.available_backends()[name]:
        pytest.skip(f"{name}: " + "; ".join(reasons))


@pytest.fixture(autouse=True, scope="module", params=("torch", "cuda", "triton") if ON_GPU else ("torch", "cpu"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    require(request.param)
    with ll.settings(backend=request.param):
        yield request.param


@pytest.fixture
def triton(backend: str) -> Iterator[None]:
    """For tests of what this backend alone has."""
    if backend != ("triton" if ON_GPU else "torch"):
        pytest.skip("the triton backend alone has it")
    require("triton")
    with ll.settings(backend="triton"):
        yield


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


def require_gigabytes(gigabytes: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GiB, and {free >> 30} are free")


# Sizes beyond 2^31

#: N, H, V. The first has a tile, the second a weight with more elements than 31 bits can count.
LARGE = [(16_400, 128, 131_080), (192, 4104, 524_296)] if ON_GPU else [(40, 16, 301), (9, 24, 400)]


@dataclass
class Large:
    x: Tensor  # (N, H)
    w: Tensor  # (V, H)
    labels: Tensor  # (N,)
    rows: Tensor  # a sample of the tokens, the first and the last among them
    columns: Tensor  # of the vocabulary

    def few(self) -> tuple[Tensor, Tensor]:
        """float64 log-probabilities of the sampled tokens, and d logps / d hidden of each."""
        x, w = self.x.detach()[self.rows].double(), self.w.detach()
        targets = w[self.labels[self.rows]].double()
        parts = w.split(32_768)
        log_denominator = torch.stack([(x @ part.double().t()).logsumexp(-1) for part in parts]).logsumexp(0)
        mean = sum((x @ part.double().t() - log_denominator[:, None]).exp() @ part.double() for part in parts)
        return (x * targets).sum(-1) - log_denominator, targets - mean

    def check_dhidden(self, dhidden: Tensor, logps: Tensor, factor: float) -> None:
        """Of a loss that is ``factor`` times the sum of log-probabilities."""
        expected, slopes = self.few()
        assert (logps[self.rows] - expected).abs().max() < 1e-3
        assert relative_error(dhidden[self.rows], factor * slopes) < 2**-7

    def check_dweight(self, dweight: Tensor, logps: Tensor, factor: float) -> None:
        wide, w = self.x.detach().double(), self.w.detach()
        targets = torch.cat([(a * w[b].double()).sum(-1) for a, b in zip(wide.split(4096), self.labels.split(4096))])
        p = torch.exp(wide @ w[self.columns].double().t() - targets[:, None] + logps.double()[:, None])
        g = (self.labels[:, None] == self.columns).double() - p
        assert relative_error(dweight[self.columns], factor * (g.t() @ wide)) < 2**-7


@pytest.fixture(scope="module", params=LARGE, ids=["tile", "weight"])
def large(request: pytest.FixtureRequest) -> Large:
    n, hidden, vocab = request.param
    if ON_GPU:
        require_gigabytes(24)
        assert max(n, hidden) * vocab > 2**31
    g = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(n, hidden, generator=g, device=DEVICE, dtype=BF16).requires_grad_()
    w = torch.empty(vocab, hidden, device=DEVICE, dtype=BF16).normal_(std=hidden**-0.5, generator=g)
    labels = torch.randint(vocab, (n,), generator=g, device=DEVICE)
    labels[-1] = vocab - 1
    rows = torch.tensor([0, n // 2, n - 2, n - 1], device=DEVICE)
    return Large(x, w, labels, rows, torch.tensor([0, vocab // 2, vocab - 2, vocab - 1], device=DEVICE))


def test_a_loss_module_beyond_31_bits(large):
    nll = ll.FusedLinearPreferenceLoss(lambda batch: -batch.logps, group="sequence")
    w = large.w.requires_grad_()
    try:
        with ll.settings(memory_budget=10 << 30):
            out = nll(large.x, w, large.labels, cu_seqlens=torch.tensor([0, len(large.labels)]))
            dx, dw = torch.autograd.grad(out.loss, (large.x, w))
            assert len(out.plan.steps) == 1
            with torch.no_grad():
                logps = run_logps(large)
    finally:
        w.requires_grad_(False)
    assert out.loss.item() == pytest.approx(-logps.double().sum().item(), rel=1e-5)
    large.check_dhidden(dx, logps, -1)
    large.check_dweight(dw, logps, -1)


def run_logps(large: Large) -> Tensor:
    return ll.linear_logps(large.x, large.w, large.labels).logps


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "recompute"])
def test_the_op_beyond_31_bits(large, train_head):
    w = large.w.requires_grad_(train_head)
    try:
        with ll.settings(memory_budget=8 << 30):
            logps = run_logps(large)
            dx, *rest = torch.autograd.grad(2 * logps.sum(), [large.x, *([w] if train_head else [])])
    finally:
        w.requires_grad_(False)
    large.check_dhidden(dx, logps.detach(), 2)
    if train_head:
        large.check_dweight(rest[0], logps.detach(), 2)


# The core: what a backend does once it is known which rows count


@dataclass
class Core:
    """The three functions of a backend on fixed tokens. x (N, H), weight (V, H), labels, coefficients (N,)."""

    backend: str
    x: Tensor
    weight: Tensor
    labels: Tensor
    coefficients: Tensor
    head: ll.HeadSpec
    options: CoreOptions

    @classmethod
    def make(cls, backend: str, dtype: torch.dtype, device: str = DEVICE, grad_filter: float = 0.0, rows: int = 200) -> Core:
        n, vocab = (rows, 9001 if rows > 40 else 1001) if ON_GPU else (20, 301)
        case = make_case(sequences=1, tokens=n, hidden=64, vocab=vocab, dtype=dtype, masked=0.0, scale=0.1, peaked=2.0).to(
            device
        )
        c = torch.linspace(-1, 1, n).to(device)
        outputs = frozenset({"entropy", "is_top1"})
        options = core_options(4 << 20, outputs, "auto", 4, torch.device(device), grad_filter)
        head = ll.HeadSpec(softcap=20.0, temperature=0.9)
        return cls(backend, case.hidden.detach()[0], case.weight.detach(), case.labels[0], c, head, options)

    @classmethod
    def half_improbable(cls, grad_filter: float) -> Core:
        """Of the triton backend; the second half of the vocabulary has no label and next to no probability."""
        core = cls.make("triton", BF16 if ON_GPU else F32, grad_filter=grad_filter)
        half = len(core.weight) // 2
        core.labels %= half
        core.x[:, 0] = 10
        core.weight[half:, 0] = -3
        core.head = ll.HeadSpec()  # of slope 1
        return core

    @property
    def arguments(self) -> tuple[Tensor, Tensor, None, Tensor, ll.HeadSpec, CoreOptions]:
        return self.x, self.weight, None, self.labels, self.head, self.options

    def outputs(self) -> tuple[Tensor, HeadGradient]:
        dhidden = torch.empty(self.x.shape, dtype=F32, device=self.x.device)
        return dhidden, HeadGradient(self.weight, None, need_weight=True, need_bias=False, accumulate=False)

    def score(self) -> list[Tensor]:
        return self.values(get_backend(self.backend).score(*self.arguments))

    def frozen(self) -> list[Tensor]:
        return self.values(get_backend(self.backend).score(*self.arguments, unit_dhidden=True))

    def tile(self) -> list[Tensor]:
        tile = torch.empty(len(self.x), len(self.weight), dtype=tile_dtype(self.x.dtype, self.x.device), device=self.x.device)
        stats = get_backend(self.backend).score(*self.arguments, tile=tile)
        dhidden, head_gradient = self.outputs()
        get_backend(self.backend).tile_gradients(
            self.x, self.weight, self.labels, tile, stats, self.coefficients, self.head, self.options,
            dhidden=dhidden, head_gradient=head_gradient,
        )  # fmt: skip
        assert head_gradient.weight is not None
        return [*self.values(stats), dhidden, head_gradient.weight]

    def recompute(self) -> list[Tensor]:
        stats = get_backend(self.backend).score(*self.arguments)
        dhidden, head_gradient = self.outputs()
        get_backend(self.backend).recompute_gradients(
            self.x, self.weight, None, self.labels, stats, self.coefficients, None, self.head, self.options,
            dhidden=dhidden, head_gradient=head_gradient,
        )  # fmt: skip
        assert head_gradient.weight is not None
        return [*self.values(stats), dhidden, head_gradient.weight]

    @staticmethod
    def values(stats: RowStats) -> list[Tensor]:
        found = [stats.logps, stats.k, stats.sum_others, stats.log_denom, stats.entropy, stats.is_top1, stats.unit_dhidden]
        return [t for t in found if t is not None]


def test_small_sizes(backend):
    """Every function against the torch backend's; scripts/sanitize_gpu.sh runs this under compute-sanitizer."""
    for dtype in (BF16, F32):
        cores = [Core.make(name, dtype, rows=40) for name in (backend, "torch")]
        for work in ("score", "frozen", "tile", "recompute"):
            for ours, theirs in zip(*(getattr(core, work)() for core in cores), strict=True):
                assert relative_error(ours, theirs) < 2**-6


WORK = pytest.mark.parametrize("work", ["score", "frozen", "tile", "recompute"])
RUNS = 100 if ON_GPU else 3


def assert_same_bits(run: Callable[[], list[Tensor]]) -> None:
    first = [t.clone() for t in run()]
    for _ in range(RUNS - 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@WORK
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
def test_the_same_bits_in_100_runs(backend, work, dtype):
    assert_same_bits(getattr(Core.make(backend, dtype), work))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("work", ["tile", "recompute"])
def test_the_same_bits_in_100_runs_with_blocks_left_out(work):
    ll.skipped_share()
    assert_same_bits(getattr(Core.half_improbable(1e-5), work))
    assert ll.skipped_share() > 0.2


@pytest.mark.parametrize("budget", [1 << 30, 400_000], ids=["one tile", "several"])
def test_a_loss_module_has_the_same_bits_in_100_runs(budget):
    case = make_case(dtype=BF16, vocab=9001 if ON_GPU else 401, hidden=64, tokens=40, train="hw").to(DEVICE)

    def run() -> list[Tensor]:
        with ll.settings(memory_budget=budget):
            out = ll.FusedLinearSimPOLoss()(case.hidden, case.weight, case.labels)
            return [out.loss, *gradients(out.loss, case)]

    assert_same_bits(run)


@needs_gpu
@WORK
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_capture_in_a_graph(backend, work, dtype):
    """The backend's functions; ``linear_logps`` itself is the next test's."""
    core = Core.make(backend, dtype)
    run = getattr(core, work)
    eager = [t.clone() for t in run()]
    side = torch.cuda.Stream()  # the workspaces of a capture's stream must be there before
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = run()
    for t in captured:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
    other = Core.make(backend, dtype).x.flip(0)
    core.x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


@needs_gpu
@pytest.mark.parametrize("train", ["", "h", "hw"])
def test_linear_logps_in_a_graph_follows_new_labels(train):
    """Positions that were scored when it was captured are ignored when it is replayed, and the other way round."""
    first, second = (make_case(dtype=BF16, vocab=9001, hidden=64, tokens=40, train=train, seed=s).to(DEVICE) for s in (0, 1))

    def run(case: Case) -> list[Tensor]:
        logps = run_op(case).logps
        return [logps, *(gradients(1.5 * logps.sum(), case) if train else ())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(first)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = run(first)
    for case in (first, second):
        expected = run(case)
        with torch.no_grad():
            first.hidden.copy_(case.hidden)
            first.weight.copy_(case.weight)
            first.labels.copy_(case.labels)
        graph.replay()
        torch.cuda.synchronize()
        for ours, theirs in zip(captured, expected, strict=True):
            assert relative_error(ours, theirs) < 2**-7
        assert (captured[0] != 0).eq(case.labels != -100).all()


@needs_gpu
@WORK
def test_runs_on_the_device_of_its_tensors(backend, work):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    with torch.cuda.device(0):
        here = getattr(Core.make(backend, BF16), work)()
        there = getattr(Core.make(backend, BF16, "cuda:1"), work)()
        assert torch.cuda.current_device() == 0
    for a, b in zip(here, there, strict=True):
        assert b.device == torch.device("cuda:1")
        torch.testing.assert_close(a, b.to(a.device), rtol=1e-2, atol=1e-4)


@needs_gpu
def test_runs_on_the_current_stream(backend):
    core = Core.make(backend, BF16)
    expected, inputs = core.tile(), core.x.clone()
    core.x.zero_()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        core.x.copy_(inputs)
        found = core.tile()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# The memory formula

#: Tokens of each of 4 sequences, H, V.
SHAPES = [(64, 256, 9001), (300, 512, 32_000), (512, 1024, 50_257)]
BUDGETS = [2 << 20, 32 << 20, 512 << 20]


def peak_of(step: Callable[[], object]) -> int:
    """Bytes beyond what there was, the second time: the first compiles, and the GEMM library takes its workspace."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = step()  # noqa: F841 - results are part of what the call needs
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def case_on_gpu(shape: tuple[int, int, int], dtype: torch.dtype, train: str) -> Case:
    """Drawn there: on a CPU it would take longer than the test."""
    tokens, hidden, vocab = shape

    def normal(*size: int, std: float, trained: bool) -> Tensor:
        return torch.empty(size, device=DEVICE, dtype=dtype).normal_(std=std).requires_grad_(trained)

    x, w = normal(4, tokens, hidden, std=1, trained="h" in train), normal(vocab, hidden, std=0.05, trained="w" in train)
    bias = normal(vocab, std=1, trained=True) if "b" in train else None
    return Case(x, w, bias, torch.randint(vocab, (4, tokens), device=DEVICE), ll.HeadSpec())


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("train", ["", "h", "hw", "hwb"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
def test_no_loss_module_takes_more_than_its_plan_says(shape, budget, train, dtype):
    case = case_on_gpu(shape, dtype, train)
    plans = []

    def step() -> object:
        out = ll.FusedLinearSimPOLoss()(case.hidden, case.weight, case.labels, bias=case.bias)
        plans.append(out.plan)
        return [out.loss, *gradients(out.loss, case)] if train else out.loss

    with ll.settings(memory_budget=budget):
        assert peak_of(step) <= plans[-1].extra_bytes, plans[-1]


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("train", ["", "h", "hw"])
@pytest.mark.parametrize("outputs", [("logps",), OUTPUTS], ids=["logps", "all"])
def test_linear_logps_takes_no_more_than_its_plan_says(shape, budget, train, outputs):
    tokens, hidden, vocab = shape
    case = case_on_gpu(shape, BF16, train)

    def step() -> object:
        stats = run_op(case, outputs)
        return gradients(stats.logps.sum(), case) if train else stats

    with ll.settings(memory_budget=budget):
        plan = ll.plan(
            num_tokens=4 * tokens,
            hidden_size=hidden,
            vocab_size=vocab,
            train_hidden="h" in train,
            train_weight="w" in train,
            arbitrary_loss=True,
            device=DEVICE,
            outputs=outputs,
        )
        assert peak_of(step) <= plan.extra_bytes, plan


# The filter, and what nothing must depend on


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("work", ["tile", "recompute"])
@pytest.mark.parametrize("eps", [1e-9, 1e-5])
def test_what_the_filter_leaves_out_is_bounded_and_reported(work, eps):
    """No dropped entry of the logits' gradient reaches eps: dX is off by eps times the weight's column sums at most."""
    whole, filtered = Core.half_improbable(0.0), Core.half_improbable(eps)
    ll.skipped_share()
    *_, dx, dw = getattr(whole, work)()
    assert ll.skipped_share() == 0
    *_, filtered_dx, filtered_dw = getattr(filtered, work)()
    assert 0.2 < ll.skipped_share() < 0.8
    rounding = 2**-7 if whole.x.dtype == BF16 else 1e-5
    x_limit = eps * whole.weight.float().abs().sum(0) + rounding * dx.float().abs().max()
    w_limit = eps * whole.x.float().abs().sum(0) + rounding * dw.float().abs().max()
    assert ((filtered_dx - dx).abs() <= x_limit).all()
    assert ((filtered_dw.float() - dw.float()).abs() <= w_limit).all()


def compiled_kernels() -> int:
    """How many specialisations of this library's Triton kernels the process has."""
    from triton.runtime.jit import JITFunction

    modules = [module for name, module in sys.modules.items() if name.startswith("logitless.kernels.backends.triton.")]
    kernels = {id(f): f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}
    return sum(len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values())


@needs_gpu
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", [BF16, torch.float64])
@pytest.mark.parametrize("train", ["", "h", "hw"])
def test_no_batch_compiles_a_kernel_anew(dtype, train):
    """After a warm-up, nothing depends on temperature, tokens, sequences or the share of them that is scored."""

    def call(sequences: int, tokens: int, temperature: float, masked: float) -> None:
        head = ll.HeadSpec(temperature=temperature)
        shape = {"sequences": sequences, "tokens": tokens, "hidden": 64, "vocab": 9001, "masked": masked}
        case = make_case(**shape, dtype=dtype, head=head, train=train).to(DEVICE)
        loss = ll.FusedLinearSimPOLoss()(case.hidden, case.weight, case.labels, head=head).loss
        logps = ll.sequence_logps(case.hidden, case.weight, case.labels, head=head, reduction="mean").sum()
        if train:
            gradients(loss + logps, case)

    for tokens in (8, 200):  # few tokens have a configuration of their own
        call(4, tokens, 0.7, 0.0)
        call(4, tokens, 0.7, 0.3)
    before = compiled_kernels()
    assert before > 0
    for arguments in [
        (4, 8, 1.3, 0.1),
        (2, 33, 0.7, 0.0),
        (6, 64, 1.0, 0.5),
        (32, 7, 2.1, 0.2),
        (10, 128, 0.9, 0.3),
        (2, 1, 1.0, 0.0),
    ]:
        call(*arguments)
        assert compiled_kernels() == before, arguments


@pytest.mark.parametrize("train", ["h", "hw"])
def test_float32_is_not_rounded_to_tf32(train):
    """With torch's defaults; over 2048 products TF32 is off by some 1e-3."""
    if ON_GPU:
        assert torch.get_float32_matmul_precision() == "highest"
    case = make_case(hidden=2048, vocab=4099 if ON_GPU else 301, tokens=50, train=train, scale=2048**-0.5).to(DEVICE)
    wide = replace(case.double(), labels=case.labels)
    if train == "h":
        wide.weight = wide.weight.detach()
    logps, reference = run_op(case).logps, run_reference(wide).logps
    assert ((logps - reference).abs() / (1 + reference.abs())).max() < 4e-6
    for ours, theirs in zip(gradients(logps.sum(), case), gradients(reference.sum(), wide), strict=True):
        assert relative_error(ours, theirs) < 1e-5


@needs_gpu
@pytest.mark.parametrize("label", [101, -1])
def test_a_label_out_of_range_stops_the_device(backend, label):
    """An assertion on the device, for which nothing waits; it ends the process, so this one is a child."""
    script = f"""
import torch, logitless as ll
x, w = torch.randn(4, 16, device="cuda"), torch.randn(101, 16, device="cuda")
with ll.settings(backend={backend!r}):
    ll.linear_logps(x, w, torch.full((4,), {label}, device="cuda"))
    torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "assert" in done.stderr.lower()
