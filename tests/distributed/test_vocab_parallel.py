"""A head sharded over its vocabulary gives what one process gives: statistics on all ranks, and gradients of the shards."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

import logitless as ll
import logitless.kernels.parallel.backend as sharded
from logitless.kernels.backends.torch import blockwise
from logitless.kernels.tile import factors

from ..core.test_cost import peak_bytes
from .ranks import run_ranks

V, H, PADDED = 211, 16, 214
#: The first row of each rank's shard, and the end of the last.
BOUNDS = {2: (0, 204, PADDED), 3: (0, 7, 100, PADDED)}
ALL = ("logps", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
F64 = torch.float64


class Inputs:
    """Seeded inputs of one case. ``raised``: labels' logits are up to hundreds of nats below the largest."""

    def __init__(self, *, raised: bool = False, bias: bool = False, padding: bool = False, hidden_size: int = H) -> None:
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=F64)

        self.rows = PADDED if padding else V
        self.hidden, self.weight = draw(6, 9, hidden_size), draw(self.rows, hidden_size)
        self.ref_hidden, self.ref_weight = draw(6, 9, 12), draw(self.rows, 12)
        self.labels = torch.randint(V, (6, 9), generator=generator)
        self.labels[0, :2], self.labels[1, :3] = torch.tensor([0, V - 1]), torch.tensor([6, 7, 204])
        self.labels[torch.rand((6, 9), generator=generator) < 0.3] = -100
        if raised:
            scale = torch.full((6, 9, 1), 1.0, dtype=F64)
            scale[:, ::2] = 12.0
            scale[0, 0] = 60.0
            self.hidden *= scale
        self.bias = draw(self.rows) if bias else None
        if padding:
            self.weight[V:], self.ref_weight[V:] = torch.nan, torch.nan
            if self.bias is not None:
                self.bias[V:] = torch.nan
        self.advantages, self.old_logps = draw(6), draw(6, 9) - 5
        self.temperature = torch.rand((6, 9), generator=generator, dtype=F64) + 0.5


def shard(rank: int, world: int, rows: int) -> slice:
    bounds = BOUNDS[world]
    return slice(bounds[rank], min(rows, bounds[rank + 1]))


def gradients(
    inputs: Inputs, part: slice, trained: bool, run: Any, parallel: ll.VocabParallel | None, positions: slice | None = None
) -> dict[str, Tensor]:
    """What ``run(hidden, weight, bias, parallel)`` gives, with the gradients of its first result."""
    hidden = inputs.hidden
    if positions is not None:
        hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
    hidden = hidden.clone().requires_grad_()
    weight = inputs.weight[part].clone().requires_grad_(trained)
    bias = None if inputs.bias is None else inputs.bias[part].clone().requires_grad_(trained)
    value, others = run(hidden, weight, bias, part, parallel)
    (value * 1.5).backward()
    found = {"value": value.detach(), "hidden": hidden.grad, **others}
    if trained:
        found["weight"] = weight.grad
        if bias is not None:
            found["bias"] = bias.grad
    return found


def close(name: str, got: Tensor, expected: Tensor) -> None:
    if got.dtype == torch.bool:
        assert torch.equal(got, expected), name
        return
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((got - expected).abs().max()) if got.numel() else 0.0
    assert error <= 1e-12 * max(1.0, scale), f"{name}: {error} of {scale}"


def check(world: int, rank: int, name: str, inputs: Inputs, trained: bool, run: Any, sequence_parallel: bool = False) -> Any:
    """Compare one rank with one process; returns what must have the same bits on all ranks."""
    vocab = V if inputs.rows > V else None
    alone = gradients(inputs, slice(0, inputs.rows), trained, lambda *a: run(*a, vocab), None)
    part = shard(rank, world, inputs.rows)
    positions = None
    if sequence_parallel:
        positions = (slice(0, 40), slice(40, 54))[rank] if world == 2 else (slice(0, 0), slice(0, 31), slice(31, 54))[rank]
    parallel = ll.VocabParallel(None, part.start, V, sequence_parallel)
    found = gradients(inputs, part, trained, lambda *a: run(*a, None), parallel, positions)
    for key, value in found.items():
        expected = alone[key]
        if key in ("weight", "bias"):
            expected = expected[part]
        if key == "hidden" and positions is not None:
            expected = expected.reshape(-1, H)[positions]
        close(f"{name} {key} on rank {rank}", value, expected)
    return {key: value for key, value in found.items() if key not in ("weight", "bias", "hidden")}


def same_bits(results: list[list[dict[str, Tensor]]]) -> None:
    for case in zip(*results, strict=True):
        for other in case[1:]:
            for key, value in case[0].items():
                assert torch.equal(value, other[key]), key


def spec(vocab: int | None, **kwargs: Any) -> ll.HeadSpec:
    return ll.HeadSpec(vocab_size=vocab, **kwargs)


def token_cases(rank: int, world: int) -> list[dict[str, Tensor]]:
    """linear_logps under a loss of log-probabilities and entropies, and sequence_logps."""
    results = []
    kinds = ({}, {"raised": True}, {"bias": True, "padding": True}, {"raised": True, "bias": True})
    for (i, kind), trained, cap in itertools.product(enumerate(kinds), (False, True), (None, 8.0)):
        inputs = Inputs(**kind)

        def run(
            hidden: Tensor,
            weight: Tensor,
            bias: Any,
            part: slice,
            parallel: Any,
            vocab: Any,
            inputs: Any = inputs,
            cap: Any = cap,
        ) -> Any:
            given: dict[str, Any] = {"temperature": inputs.temperature, "parallel": parallel}
            stats = ll.linear_logps(hidden, weight, inputs.labels, bias, spec(vocab, softcap=cap), ALL, **given)
            assert stats.logps is not None and stats.entropy is not None
            value = (stats.logps * inputs.old_logps).sum() + (stats.entropy * inputs.temperature).sum()
            return value, {name: getattr(stats, name).detach() for name in ALL}

        results.append(check(world, rank, f"linear_logps {kind} {trained} {cap}", inputs, trained, run, i == 1))

    def sequences(hidden: Tensor, weight: Tensor, bias: Any, part: slice, parallel: Any, vocab: Any) -> Any:
        logps = ll.sequence_logps(hidden, weight, inputs.labels, bias, spec(vocab), reduction="mean", parallel=parallel)
        return (logps * inputs.advantages).sum(), {"logps": logps.detach()}

    with ll.settings(batch_invariant=True):  # the same bits in any batch
        part = shard(rank, world, V)
        parallel, labels = ll.VocabParallel(None, part.start, V), inputs.labels.reshape(-1)
        hidden, weight = inputs.hidden.reshape(-1, H).float(), inputs.weight[part].float()
        whole = ll.linear_logps(hidden, weight, labels, parallel=parallel).logps
        some = ll.linear_logps(hidden[::5], weight, labels[::5], parallel=parallel).logps
        assert whole is not None and some is not None and torch.equal(whole[::5], some)

    for inputs, trained in itertools.product((Inputs(), Inputs(bias=True, padding=True)), (False, True)):
        results.append(check(world, rank, "sequence_logps", inputs, trained, sequences))
    return results


#: Bytes of budgets under which float64 losses of 54 positions take one tile, or other schedules.
BUDGETS = (512 << 20, 40_000, 12_000)


def loss_cases(rank: int, world: int) -> list[dict[str, Tensor]]:
    results, schedules = [], set()
    ref: dict[str, Any] = {}

    def case(inputs: Inputs, make: Any, call: Any, softcap: float | None) -> Any:
        def run(hidden: Tensor, weight: Tensor, bias: Any, part: slice, parallel: Any, vocab: Any) -> Any:
            out = call(make, inputs, hidden, weight, bias, spec(vocab, softcap=softcap), part, parallel)
            if parallel is not None:
                schedules.update((step.schedule, weight.requires_grad) for step in out.plan.steps)
            return out.loss, {"logps": out.logps.detach()}

        return run

    def pairs(loss: Any, inputs: Inputs, hidden: Tensor, weight: Any, bias: Any, head: Any, part: Any, parallel: Any) -> Any:
        return loss(hidden, weight, inputs.labels, bias, head, parallel=parallel)

    def referenced(
        loss: Any, inputs: Inputs, hidden: Tensor, weight: Any, bias: Any, head: Any, part: Any, parallel: Any
    ) -> Any:
        states = inputs.ref_hidden
        if parallel is not None and parallel.sequence_parallel:
            states = states.reshape(54, -1)[positions_of(rank, world)]
        ref.update(ref_hidden=states, ref_weight=inputs.ref_weight[part], parallel=parallel)
        return loss(hidden, weight, inputs.labels, bias=bias, head=head, **ref)

    def odds(loss: Any, inputs: Inputs, hidden: Tensor, weight: Any, bias: Any, head: Any, part: Any, parallel: Any) -> Any:
        nll = torch.where(inputs.labels == -100, 3, inputs.labels)
        return loss(hidden, weight, inputs.labels, bias, head, nll_labels=nll, parallel=parallel)

    def kto(loss: Any, inputs: Inputs, hidden: Tensor, weight: Any, bias: Any, head: Any, part: Any, parallel: Any) -> Any:
        desirable = torch.tensor([True, False, True, True, False, False])
        ref_logps = inputs.advantages * 3 - 20
        return loss(hidden, weight, inputs.labels, desirable, bias, head, ref_logps=ref_logps, kl=0.3, parallel=parallel)

    def policy(loss: Any, inputs: Inputs, hidden: Tensor, weight: Any, bias: Any, head: Any, part: Any, parallel: Any) -> Any:
        given: dict[str, Any] = {"advantages": inputs.advantages, "old_logps": inputs.old_logps, "parallel": parallel}
        return loss(hidden, weight, inputs.labels, bias, head, **given)

    losses: list[tuple[Any, Any]] = [
        (ll.FusedLinearDPOLoss(beta=0.1, metrics=True), referenced),
        (ll.FusedLinearSimPOLoss(beta=2.0), pairs),
        (ll.FusedLinearORPOLoss(), odds),
        (ll.FusedLinearKTOLoss(), kto),
        (ll.FusedLinearGRPOLoss(entropy_coef=0.02, epsilon_high=5.0), policy),
    ]
    plain, raised, padded = Inputs(), Inputs(raised=True), Inputs(bias=True, padding=True)
    for (make, call), trained, budget in itertools.product(losses, (False, True), BUDGETS):
        for i, (inputs, softcap) in enumerate(((plain, 8.0), (raised, None), (padded, None))):
            if (budget != BUDGETS[0] and i != 1) or (world == 3 and (budget, i) not in ((BUDGETS[0], 2), (BUDGETS[2], 1))):
                continue
            name = f"{type(make).__name__} {trained} {budget} {i}"
            with ll.settings(memory_budget=budget if rank == 0 else BUDGETS[0]):
                sequence_parallel = i == 2
                results.append(check(world, rank, name, inputs, trained, case(inputs, make, call, softcap), sequence_parallel))
    with torch.no_grad():
        inputs = plain
        out = losses[1][0](inputs.hidden, inputs.weight, inputs.labels)
        part = shard(rank, world, V)
        parallel = ll.VocabParallel(None, part.start, V)
        close("no gradient", losses[1][0](inputs.hidden, inputs.weight[part], inputs.labels, parallel=parallel).loss, out.loss)
        none = losses[1][0](inputs.hidden, inputs.weight[part], torch.full_like(inputs.labels, -100), parallel=parallel)
        assert none.loss.isfinite()
    assert schedules >= {(name, True) for name in ("gradient_in_forward", "deferred_scale", "recompute")}, schedules
    assert ("deferred_scale", False) in schedules, schedules
    return results


def positions_of(rank: int, world: int) -> slice:
    return ((slice(0, 40), slice(40, 54)) if world == 2 else (slice(0, 0), slice(0, 31), slice(31, 54)))[rank]


@pytest.mark.parametrize("world", [2, 3])
def test_tokens_of_a_sharded_head(world: int) -> None:
    same_bits(run_ranks(world, token_cases, world))


@pytest.mark.parametrize("world", [2, 3])
def test_losses_of_a_sharded_head(world: int) -> None:
    same_bits(run_ranks(world, loss_cases, world))


def ring_bytes(world: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Counts what a rank sends by ring collectives of floating point numbers: a list of the bytes of each."""
    sent: list[float] = []

    def counted(name: str, share: float, argument: int) -> None:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            values = args[argument]
            if values.is_floating_point():
                sent.append(share * values.numel() * values.element_size())
            return original(*args, **kwargs)

        monkeypatch.setattr(dist, name, call)

    counted("all_reduce", 2 * (world - 1) / world, 0)
    counted("all_gather", world - 1, 1)
    counted("reduce_scatter_tensor", (world - 1) / world, 1)
    return sent


def costs(rank: int, world: int) -> None:
    """FLOP and bytes of a rank, of each schedule that makes all gradients in one pass or none."""
    tokens, hidden_size, vocab = 256, 128, 1000
    size = vocab // world
    weight, labels = torch.randn(size, hidden_size), torch.randint(vocab, (4, tokens // 4), generator=torch.manual_seed(0))
    x = torch.randn(4, tokens // 4, hidden_size)
    simpo, grpo = ll.FusedLinearSimPOLoss(beta=2.0), ll.FusedLinearGRPOLoss(entropy_coef=0.1)
    for (loss, given), trained, sequence_parallel in itertools.product(
        ((simpo, {}), (grpo, {"advantages": torch.ones(4)})), (None, False, True), (False, True)
    ):
        parallel = ll.VocabParallel(None, rank * size, vocab, sequence_parallel)
        hidden = x.view(tokens, -1)[rank * tokens // world : (rank + 1) * tokens // world] if sequence_parallel else x
        hidden = hidden.clone().requires_grad_(trained is not None)
        with pytest.MonkeyPatch.context() as monkeypatch, FlopCounterMode(display=False) as counter:
            sent = ring_bytes(world, monkeypatch)
            out = loss(hidden, weight.requires_grad_(bool(trained)), labels, parallel=parallel, **given)
            if trained is not None:
                out.loss.backward()
        most = 2.01 if trained is None else 6.02 if trained or loss is grpo else 4.02
        assert counter.get_total_flops() <= most * tokens * hidden_size * size
        plan = out.plan
        assert plan.flops <= most * tokens * hidden_size * size
        assert plan.sent_bytes == round(sum(sent)), (plan.sent_bytes, sent)
        sizes = {"num_tokens": tokens, "hidden_size": hidden_size, "vocab_size": vocab, "dtype": torch.float32}
        wanted = {
            "entropy_gradient": loss is grpo and trained is not None,
            "outputs": ("logps", "entropy")[: 1 + (loss is grpo)],
        }
        gradients = {"train_hidden": trained is not None, "train_weight": bool(trained), "parallel": parallel}
        assert ll.plan(**sizes, **wanted, **gradients).sent_bytes == plan.sent_bytes
        assert ll.plan(**sizes, **gradients).extra_bytes < ll.plan(**{**sizes, "vocab_size": vocab * world}).extra_bytes
    for sequence_parallel in (False, True):
        parallel = ll.VocabParallel(None, rank * 8000, 16000, sequence_parallel)
        hidden = torch.randn(128, hidden_size) if sequence_parallel else torch.randn(4, 64, hidden_size)
        hidden, weight, plans = hidden.requires_grad_(), torch.randn(8000, hidden_size).requires_grad_(), []

        def step(hidden: Tensor = hidden, weight: Tensor = weight, parallel: Any = parallel, plans: Any = plans) -> None:
            with ll.settings(memory_budget=4 << 20):
                out = simpo(hidden, weight, labels, parallel=parallel)
            plans.append(out.plan)
            out.loss.backward()

        assert peak_bytes(step) <= plans[0].extra_bytes


def test_flops_and_bytes_of_a_rank() -> None:
    run_ranks(2, costs, 2)


def dtensors(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    inputs = Inputs(bias=True)
    assert inputs.bias is not None
    vocab = V - 2

    def run(weight: Any, bias: Any, ref_weight: Any) -> list[Tensor]:
        weight, bias = weight.requires_grad_(), bias.requires_grad_()
        hidden, labels = inputs.hidden.clone().requires_grad_(), inputs.labels.clamp(max=vocab - 1)
        loss = ll.FusedLinearDPOLoss(beta=0.1)
        states = {"ref_hidden": inputs.ref_hidden, "ref_weight": ref_weight}
        value = loss(hidden, weight, labels, bias, spec(vocab), **states).loss
        value = value + ll.linear_logps(hidden, weight, labels, bias, spec(vocab, softcap=9.0)).logps.mean()
        value.backward()
        assert weight.grad is not None and bias.grad is not None and hidden.grad is not None
        return [value.detach(), hidden.grad, weight.grad, bias.grad]

    def sharded(whole: Tensor) -> DTensor:
        return distribute_tensor(whole.clone(), mesh, [Shard(0)])

    alone = run(inputs.weight.clone(), inputs.bias.clone(), inputs.ref_weight)
    found = run(sharded(inputs.weight), sharded(inputs.bias), sharded(inputs.ref_weight))
    for i, (a, b) in enumerate(zip(alone, found, strict=True)):
        if i > 1:
            assert isinstance(b, DTensor) and b.placements == (Shard(0),) and b.device_mesh == mesh
            b = b.full_tensor()
        close(f"DTensor, result {i}", b, a)
    data = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    refused = (
        distribute_tensor(inputs.weight.clone(), data, [Shard(0)]),
        distribute_tensor(inputs.weight.clone(), mesh, [Shard(1)]),
        distribute_tensor(inputs.weight.clone(), mesh, [Replicate()]),
    )
    for weight in refused:
        with pytest.raises(TypeError, match="weight is a DTensor"):
            ll.linear_logps(inputs.hidden, weight, inputs.labels)
        with pytest.raises(TypeError, match="weight is a DTensor"):
            ll.FusedLinearSimPOLoss()(inputs.hidden, weight, inputs.labels)
    with pytest.raises(ValueError, match="weight is a DTensor with 100 entries"):
        ll.linear_logps(inputs.hidden, sharded(inputs.weight), inputs.labels, head=spec(100))
    with pytest.raises(ValueError, match="parallel is given beside"):
        ll.linear_logps(inputs.hidden, sharded(inputs.weight), inputs.labels, parallel=ll.VocabParallel(None, 0, V))


def refusals(rank: int, world: int) -> None:
    """Errors are the same on all ranks, or of arguments that are."""
    inputs, part = Inputs(), shard(rank, world, V)
    weight, simpo = inputs.weight[part], ll.FusedLinearSimPOLoss()
    right = ll.VocabParallel(None, part.start, V)

    def call(parallel: Any = right, weight: Any = weight, labels: Tensor = inputs.labels, head: Any = None) -> None:
        ll.linear_logps(inputs.hidden, weight, labels, head=head, parallel=parallel)

    def loss(parallel: Any = right, weight: Any = weight, labels: Tensor = inputs.labels, head: Any = None) -> None:
        simpo(inputs.hidden, weight, labels, head=head, parallel=parallel)

    lora = ll.LoRAWeight(weight, torch.randn(2, H, dtype=F64), torch.randn(len(weight), 2, dtype=F64))
    fewer = inputs.labels.clone()
    fewer[0, 0] = -100 if rank else 1
    for run in (call, loss):
        for error, text, given in (
            (TypeError, "parallel must be a logitless.VocabParallel", {"parallel": "tp"}),
            (TypeError, "LoRAWeight, which is not served with parallel", {"weight": lora}),
            (ValueError, "head.vocab_size must be None with parallel", {"head": spec(200)}),
            (ValueError, "parallel must describe shards", {"parallel": ll.VocabParallel(None, part.start + rank, V)}),
            (ValueError, "vocab_size of parallel must be the same", {"parallel": ll.VocabParallel(None, part.start, V + rank)}),
            (ValueError, "number of scored tokens must be the same", {"labels": fewer}),
            (ValueError, f"labels must be in .0, {V}.", {"labels": inputs.labels.clamp(min=V)}),
            (ValueError, "hidden must hold each of the 54", {"parallel": ll.VocabParallel(None, part.start, V, True)}),
        ):
            with pytest.raises(error, match=text):
                run(**given)
        with ll.settings(backend="triton"), pytest.raises(RuntimeError, match="as parallel= needs"):
            run()
    with pytest.raises(ValueError, match="the set of wanted gradients must be the same"):
        loss(weight=weight.clone().requires_grad_(rank == 0))
    for arguments in ((0, 0), (V, V), (-1, V), (0, True)):
        with pytest.raises((TypeError, ValueError), match=r"start must|vocab_size must"):
            ll.VocabParallel(None, *arguments)
    with pytest.raises(ValueError, match="not served with parallel"):
        ll.plan(num_tokens=8, hidden_size=8, vocab_size=8, lora_rank=2, parallel=right)
    with pytest.raises(Exception, match="parallel is given in compiled code"):
        torch.compile(call, backend="eager", fullgraph=True)()


def test_dtensors_and_refusals() -> None:
    run_ranks(2, dtensors, 2)
    run_ranks(2, refusals, 2)


def precisions(rank: int, world: int) -> list[dict[str, Tensor]]:
    """Other dtypes and backends lose no more than one process; ``in_tile``: labels' entries are in the tile, as on GPUs."""
    results = []
    inputs = Inputs(raised=True)
    part = shard(rank, world, V)
    parallel = ll.VocabParallel(None, part.start, V)

    def run(dtype: torch.dtype, of: slice, given: Any, loss: Any, budget: int) -> list[Tensor]:
        hidden = inputs.hidden.to(dtype, copy=True).requires_grad_()
        weight = inputs.weight[of].to(dtype, copy=True).requires_grad_()
        with ll.settings(memory_budget=budget):
            out = loss(hidden, weight, inputs.labels, advantages=inputs.advantages.float(), parallel=given)
        out.loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        stats = ll.linear_logps(hidden.detach(), weight.detach(), inputs.labels, outputs=ALL, parallel=given)
        assert stats.logps is not None and stats.entropy is not None
        return [out.loss.detach(), stats.logps, stats.entropy, hidden.grad, weight.grad]

    plain, bonus = ll.FusedLinearGRPOLoss(), ll.FusedLinearGRPOLoss(entropy_coef=0.1)
    of_float64 = {loss: run(F64, slice(None), None, loss, 512 << 20) for loss in (plain, bonus)}
    cases = [(torch.float32, backend) for backend in ("torch", "cpu", "in_tile")]
    cases += [(torch.bfloat16, "cpu"), (torch.bfloat16, "in_tile"), (torch.float16, "in_tile")]
    for (dtype, backend), (loss, budget) in itertools.product(cases, ((plain, 12_000), (bonus, 512 << 20))):
        with pytest.MonkeyPatch.context() as patch, ll.settings(backend="cpu" if backend == "cpu" else "torch"):
            if backend == "in_tile":
                for module in (blockwise, factors, sharded):
                    patch.setattr(module, "targets_in_tile", lambda device: True)
            alone = run(dtype, slice(None), None, loss, budget)
            found = run(dtype, part, parallel, loss, budget)
        for i, (a, b, e) in enumerate(zip(alone, found, of_float64[loss], strict=True)):
            if i == 4:
                a, e = a[part], e[part]
            off, allowed = float((b.double() - e).norm()), float((a.double() - e).norm())
            name = f"{dtype} {backend} {type(loss).__name__} {budget} result {i}: {off}, one process {allowed}"
            assert off <= 1.5 * allowed + 1e-6 * float(e.norm()), name
        results.append({str(i): value for i, value in enumerate(found[:3])})
    return results


def test_other_dtypes_and_backends() -> None:
    same_bits(run_ranks(2, precisions, 2))
