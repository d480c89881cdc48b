"""The engine: computes a loss and its gradients by the schedule that the planner chose.

A step scores the tokens of some groups, asks the loss for one coefficient per token (``c = dLoss / dlogps``, by autograd on
small tensors), and turns the finished gradient tile into ``dX`` and ``dW``. The schedule is the order of these three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from logitless.kernels.backends.interface import Backend
from logitless.kernels.backends.registry import get_backend
from logitless.kernels.core.autograd import once_differentiable
from logitless.kernels.core.blocking import real_rows
from logitless.kernels.core.checks import check_temperature_range, compute_dtype
from logitless.kernels.core.dtypes import accumulate_dtype, tile_dtype
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.head_weight import LoRAWeight, Weight
from logitless.kernels.core.row_head import head_rows, with_temperatures
from logitless.kernels.core.stats import RowStats
from logitless.kernels.core.weight_rows import HeadRows, JoinedRows, trained_part
from logitless.kernels.parallel.backend import sharded_backend
from logitless.kernels.parallel.vocab_parallel import Shard
from logitless.kernels.planner.plan import Plan, plan
from logitless.kernels.planner.steps import DEFERRED_SCALE, FORWARD_ONLY, GRADIENT_IN_FORWARD, RECOMPUTE, Step
from logitless.kernels.tile.head_gradient import HeadGradient
from logitless.kernels.tile.rows import gather_rows

from .call import LossCall
from .job import Job, Report
from .scored_tokens import ScoredTokens


def run(job: Job[Report]) -> tuple[Tensor, Report]:
    """The loss of a job (0-dim, differentiable in hidden, weight and bias) and its report.

    The forward pass finishes the gradients up to the upstream one, without autograd; then the loss is attached to them.
    """
    call = job.call
    hidden = call.hidden.to(compute_dtype(call.hidden)).reshape(-1, call.hidden.shape[-1])
    with torch.no_grad():
        tokens = job.scored_tokens()
    weight = _joined(hidden, call.weight, tokens.rows)
    trained, inputs = trained_part(weight), weight.inputs if isinstance(weight, JoinedRows) else None
    grads = torch.is_grad_enabled()
    needs = tuple(
        grads and any(t is not None and t.requires_grad for t in tensors)
        for tensors in ((hidden, inputs), (trained,), (call.bias,))
    )
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        shard = None
        if call.parallel is not None:
            shard = Shard.agree(call.parallel, len(call.weight), len(tokens), needs, hidden.device)
        the_plan = plan(
            num_tokens=len(tokens),
            hidden_size=call.weight.shape[1],
            vocab_size=call.vocab_size if shard is None else shard.largest * shard.parallel.ranks,
            group_sizes=None if job.token_groups else tokens.group_sizes,
            dtype=hidden.dtype,
            weight_dtype=weight.dtype if trained is None else trained.dtype,
            train_hidden=needs[0],
            train_weight=needs[1],
            train_bias=needs[2],
            margin=job.margin is not None,
            memory_budget=None if shard is None else shard.memory_budget,
            device=hidden.device,
            outputs=job.outputs | job.loss_outputs | {"logps"},
            token_groups=job.token_groups,
            entropy_gradient=job.entropy_gradient and any(needs),
            lora_rank=weight.shape[1] - call.weight.shape[1],
            quantized=isinstance(call.weight, HeadRows) or isinstance(getattr(call.weight, "base", None), HeadRows),
            parallel=call.parallel,
        )
        the_plan = replace(the_plan, extra_bytes=the_plan.extra_bytes + _padding_bytes(call, trained, the_plan, needs))
        work = _Work(job, tokens, the_plan, hidden, weight, needs)
        schedules = work.schedules()
        for step in the_plan.steps:
            schedules[step.schedule](step)
            work.fresh = False
        report = work.evaluation.report(the_plan, work.stats, work.acc)
    loss: Tensor = _FinishedGradients.apply(hidden, inputs, trained, call.bias, work)
    return loss, report


def _joined(hidden: Tensor, weight: Weight, rows: Tensor) -> Tensor | HeadRows:
    """The weight as backends take it; adapters read the given rows (N,) of the hidden states (P, H) alone."""
    if not isinstance(weight, LoRAWeight):
        return weight
    scored = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    return weight.join(hidden, scored.index_fill_(0, rows, True))


def _padding_bytes(call: LossCall, trained: Tensor | None, the_plan: Plan, needs: tuple[bool, ...]) -> int:
    """Bytes of the gradient's rows beyond ``HeadSpec.vocab_size``, which the plan does not have."""
    rows, acc, row_bytes = len(call.weight) - call.entries, accumulate_dtype(call.weight.dtype).itemsize, 0
    if needs[1] and trained is not None:
        row_bytes = trained.shape[1] * (trained.dtype.itemsize + acc * the_plan.accumulate)
    return rows * (row_bytes + (3 * acc if needs[2] else 0))


class _Work:
    """The state of a call while its plan is carried out: one method per schedule, which adds a step to the loss and gradients.

    Attributes:
        dhidden: (N, H) gradient of the scored tokens' hidden states; with an adapter (N, H + r), of its inputs too.
        head_gradient: of weight and bias.
        fresh: whether ``head_gradient`` holds nothing yet.
        stats: the job's ``outputs``, (N,) each.
    """

    def __init__(
        self,
        job: Job[Any],
        tokens: ScoredTokens,
        the_plan: Plan,
        hidden: Tensor,  # (P, H)
        weight: Tensor | HeadRows,  # (V, H) or (V, H + r), with its padding rows
        needs: tuple[bool, ...],  # whether hidden (or an adapter's inputs), weight and bias need a gradient
    ) -> None:
        self.job, self.call, self.tokens, self.needs = job, job.call, tokens, needs
        self.hidden, self.head = hidden, job.call.head
        self.whole_weight, ref = weight, job.call.reference.states
        self.ref_weight = None if ref is None else _joined(ref.hidden, ref.weight, tokens.rows)
        self.weight, self.bias = real_rows(weight, job.call.bias, self.head)
        if job.call.temperature is not None:
            temperature = job.call.temperature.reshape(-1)[tokens.rows]
            check_temperature_range(temperature)
            self.head = with_temperatures(self.head, temperature, accumulate_dtype(hidden.dtype))
        self.options, self.accumulate = the_plan.options, the_plan.accumulate
        self.backend: Backend = get_backend(the_plan.backend)
        if self.call.parallel is not None:
            self.backend = sharded_backend(self.backend, self.call.parallel)
        self.evaluation = job.evaluation(tokens, self.backend.elementwise)
        self.acc = accumulate_dtype(hidden.dtype)
        self.head_gradient = self._new_head_gradient() if needs[1] or needs[2] else None
        self.second: HeadGradient | None = None
        self.fresh = True
        self.dhidden: Tensor | None = None
        deferred = any(step.schedule == DEFERRED_SCALE for step in the_plan.steps)
        if needs[0] and not (deferred and self.head_gradient is None):  # otherwise scoring makes it
            self.dhidden = torch.empty((len(tokens), weight.shape[1]), dtype=self.acc, device=hidden.device)
        self.stats = {
            name: torch.empty(len(tokens), dtype=torch.bool if name == "is_top1" else self.acc, device=hidden.device)
            for name in job.outputs
        }

    def schedules(self) -> dict[str, Callable[[Step], None]]:
        """The method of each schedule."""
        return {
            FORWARD_ONLY: self._forward_only,
            GRADIENT_IN_FORWARD: self._gradient_in_forward,
            DEFERRED_SCALE: self._deferred_rows if self.head_gradient is None else self._deferred_margin,
            RECOMPUTE: self._recompute,
        }

    def _new_head_gradient(self) -> HeadGradient:
        return HeadGradient(
            self.whole_weight,
            self.call.bias,
            need_weight=self.needs[1],
            need_bias=self.needs[2],
            accumulate=self.accumulate,
            entries=self.head.vocab_size,
        )

    def _inputs(self, start: int, stop: int) -> tuple[Tensor, Tensor, HeadSpec]:
        """Hidden states (n, H), labels (n,) and the transforms of some tokens."""
        rows = self.tokens.rows[start:stop]
        x = gather_rows(self.hidden, rows, in_order=False)
        if isinstance(self.weight, JoinedRows):
            inputs = gather_rows(self.weight.inputs, rows, in_order=False)
            x = self.weight.extend(x, inputs)
            for gradient in (self.head_gradient, self.second):
                if gradient is not None:
                    gradient.adapter_inputs = inputs
        return x, self.tokens.labels[start:stop], head_rows(self.head, slice(start, stop))

    def _keep(self, start: int, stop: int, stats: RowStats) -> None:
        for name, values in self.stats.items():
            values[start:stop] = getattr(stats, name)

    def _reference(self, start: int, stop: int) -> Tensor | None:
        """Log-probabilities of some tokens under the reference (n,), if its states were given."""
        ref = self.call.reference.states
        if ref is None:
            return None
        rows = self.tokens.rows[start:stop]
        x = gather_rows(ref.hidden, rows, in_order=False)
        if isinstance(self.ref_weight, JoinedRows):
            x = self.ref_weight.extend(x, gather_rows(self.ref_weight.inputs, rows, in_order=False))
        labels, options = self.tokens.labels[start:stop], self.options.without_outputs()
        head = head_rows(self.head, slice(start, stop))
        return self.backend.score(x, self.ref_weight, ref.bias, labels, head, options).logps

    def _dhidden(self, start: int, stop: int) -> Tensor | None:
        return None if self.dhidden is None else self.dhidden[start:stop]

    def _new_tile(self, rows: int) -> Tensor:
        dtype = tile_dtype(self.hidden.dtype, self.hidden.device)
        return torch.empty((rows, len(self.weight)), dtype=dtype, device=self.hidden.device)

    def _forward_only(self, step: Step) -> None:
        start, stop = step.start, step.stop
        x, labels, head = self._inputs(start, stop)
        stats = self.backend.score(x, self.weight, self.bias, labels, head, self.options)
        self._keep(start, stop, stats)
        self.evaluation.coefficients(step, stats, self._reference(start, stop), False)

    def _deferred_rows(self, step: Step) -> None:
        """Frozen head: dX up to one factor per row needs no tile; the factor is known once the loss is."""
        start, stop = step.start, step.stop
        x, labels, head = self._inputs(start, stop)
        stats = self.backend.score(x, self.weight, self.bias, labels, head, self.options, unit_dhidden=True)
        self._keep(start, stop, stats)
        c = self.evaluation.coefficients(step, stats, self._reference(start, stop), True)
        assert c.logps is not None and stats.unit_dhidden is not None
        self.dhidden = stats.unit_dhidden.mul_(c.logps[:, None])

    def _gradient_in_forward(self, step: Step) -> None:
        """All tokens of the step in one tile, which becomes the gradient."""
        start, stop = step.start, step.stop
        x, labels, head = self._inputs(start, stop)
        tile = self._new_tile(step.num_tokens)
        stats = self.backend.score(x, self.weight, self.bias, labels, head, self.options, tile=tile)
        self._keep(start, stop, stats)
        c = self.evaluation.coefficients(step, stats, self._reference(start, stop), True)
        self.backend.tile_gradients(
            x,
            self.weight,
            labels,
            tile,
            stats,
            c.logps,
            head,
            self.options,
            dhidden=self._dhidden(start, stop),
            head_gradient=self.head_gradient,
            entropy_coefficients=c.entropy,
        )

    def _recompute(self, step: Step) -> None:
        """Scored without a tile; the logits are computed again once the coefficients are known."""
        start, stop = step.start, step.stop
        x, labels, head = self._inputs(start, stop)
        stats = self.backend.score(x, self.weight, self.bias, labels, head, self.options)
        self._keep(start, stop, stats)
        c = self.evaluation.coefficients(step, stats, self._reference(start, stop), True)
        self.backend.recompute_gradients(
            x,
            self.weight,
            self.bias,
            labels,
            stats,
            c.logps,
            c.entropy,
            head,
            self.options,
            dhidden=self._dhidden(start, stop),
            head_gradient=self.head_gradient,
        )

    def _deferred_margin(self, step: Step) -> None:
        """One pair larger than a tile: its gradient up to one scalar, tile by tile; then the scalar."""
        assert self.head_gradient is not None
        target = self.head_gradient
        if not self.fresh:
            if self.second is None:
                self.second = self._new_head_gradient()
            target = self.second
            target.zero_()
        unit = self._unit_coefficients(step)
        collected: list[RowStats] = []
        references: list[Tensor | None] = []
        whole_tile = self._new_tile(min(step.rows, step.num_tokens))
        for start in range(step.start, step.stop, step.rows):
            stop = min(start + step.rows, step.stop)
            x, labels, head = self._inputs(start, stop)
            tile = whole_tile[: stop - start]
            stats = self.backend.score(x, self.weight, self.bias, labels, head, self.options, tile=tile)
            self._keep(start, stop, stats)
            references.append(self._reference(start, stop))
            self.backend.tile_gradients(
                x,
                self.weight,
                labels,
                tile,
                stats,
                unit[start - step.start : stop - step.start].to(stats.logps.dtype),
                head,
                self.options,
                dhidden=self._dhidden(start, stop),
                head_gradient=target,
            )
            collected.append(stats)
        joined = RowStats.cat(collected)
        ref = None if references[0] is None else torch.cat([r for r in references if r is not None])
        c = self.evaluation.coefficients(step, joined, ref, True).logps
        assert c is not None
        scalar = (c * unit).sum() / (unit * unit).sum().clamp(min=torch.finfo(unit.dtype).tiny)  # all weights may be 0
        excess = (c - scalar * unit).abs().max() - 1e-4 * c.abs().max()
        if c.is_cuda:
            torch._assert_async(~(excess > 0))
        elif excess > 0:
            raise ValueError(
                f"margin={self.job.margin!r} is declared, but the loss depends on more than the difference of "
                "chosen and rejected log-probabilities: declare margin=None"
            )
        scalar = scalar.to(joined.logps.dtype)
        if self.dhidden is not None:
            self.dhidden[step.start : step.stop].mul_(scalar)
        if target is self.head_gradient:
            target.scale_(scalar)
        else:
            self.head_gradient.add_scaled_(target, scalar)

    def _unit_coefficients(self, step: Step) -> Tensor:
        """d margin / d logps of the step's pair: the weight of each token, negative for the rejected sequence. (n,)."""
        tokens, span = self.tokens, slice(step.start, step.stop)
        (pair,) = tokens.groups[step.first_group : step.last_group]
        sequences = tokens.sequences[span]
        unit = torch.where(sequences == pair[0], 1.0, -1.0).double()
        if tokens.weights is not None:
            unit = unit * tokens.weights[span]
        if tokens.counted is not None:  # tokens of the NLL alone are not in the margin
            unit = torch.where(tokens.counted[span], unit, 0)
        if self.job.margin == "mean":
            sizes = tokens.counted_sizes()
            for s in pair:
                unit = torch.where(sequences == s, unit / max(1, sizes[s]), unit)
        return unit


class _FinishedGradients(torch.autograd.Function):
    """Hands the finished gradients, scaled by the upstream one, to autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        inputs: Tensor | None,  # of an adapter
        weight: Tensor | None,
        bias: Tensor | None,
        work: _Work,
    ) -> Tensor:
        ctx.needs, ctx.distinct = work.needs, work.tokens.nll is None
        ctx.likes = [(t.shape, t.dtype) for t in (hidden, inputs) if t is not None]
        ctx.head_dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        ctx.elementwise = work.backend.elementwise
        head = work.head_gradient
        ctx.save_for_backward(
            work.dhidden,
            work.tokens.rows,
            None if head is None else head.whole_weight,
            None if head is None else head.whole_bias,
        )
        return work.evaluation.loss.to(work.acc)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, rows, dweight, dbias = ctx.saved_tensors
        # Without retain_graph the saved gradients are freed after this, so scaling them in place saves a copy of dW.
        keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
        dw = db = None
        dinputs: list[Tensor | None] = [None, None]
        for i, (shape, dtype) in enumerate(ctx.likes):
            if ctx.needs_input_grad[i]:  # columns of the hidden states, then of the adapter's inputs
                part = dhidden if len(ctx.likes) == 1 else dhidden.split([s[1] for s, _ in ctx.likes], dim=1)[i]
                put = ctx.elementwise.scatter_rows
                dinputs[i] = put(shape, dtype, rows, part, factor=grad, distinct=ctx.distinct)
        if ctx.needs[1]:
            if dweight.dtype == ctx.head_dtypes[0] and not grad.is_cuda and float(grad) == 1.0:
                dw = dweight.clone() if keep_graph else dweight
            else:
                dw = ctx.elementwise.scaled_to_dtype(dweight, grad, ctx.head_dtypes[0], in_place=not keep_graph)
        if ctx.needs[2]:
            db = (dbias * grad).to(ctx.head_dtypes[1])
        return *dinputs, dw, db, None
