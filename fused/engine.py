"""The engine: runs any loss over the log-prob core, by the schedule that the planner chose.

A step scores the tokens of some groups, asks the loss for one coefficient a token (``c = dLoss / dlogps``, by autograd on
small tensors), and turns the finished gradient tile into ``dX`` and ``dW``. The order of these three is the schedule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logitless.kernels.backends.registry import Backend, get_backend
from logitless.kernels.core.dtypes import accumulate_dtype, tile_dtype
from logitless.kernels.core.stats import RowStats
from logitless.kernels.linear_logps import once_differentiable
from logitless.kernels.planner.plan import DEFERRED_SCALE, FORWARD_ONLY, RECOMPUTE, Plan, Step, plan
from logitless.kernels.tile.head_gradient import HeadGradient, scaled_to_dtype
from logitless.kernels.tile.rows import gather_rows, scatter_rows

from .job import Job


def run(job: Job, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, report_only: bool = False) -> tuple[Tensor, Any]:
    """The loss of a job (0-dim, differentiable in hidden (P, H), weight (V, H) and bias (V,)) and its report."""
    grads = torch.is_grad_enabled() and not report_only
    needs = tuple(grads and t is not None and t.requires_grad for t in (hidden, weight, bias))
    box: list[Any] = []
    loss = _FusedLoss.apply(hidden, weight, bias, job, needs, box)
    return loss, box[0]


class _Runner:
    """Carries out the steps of a plan."""

    def __init__(
        self,
        job: Job,
        the_plan: Plan,
        backend: Backend,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> None:
        self.job, self.plan, self.backend = job, the_plan, backend
        self.hidden, self.weight, self.bias, self.needs = hidden, weight, bias, needs
        acc = accumulate_dtype(hidden.dtype)
        wide = acc if hidden.device.type == "mps" else torch.float64
        self.evaluation = job.evaluation(wide, hidden.device)
        n = len(job.entries.rows)
        self.head_gradient = self._new_head_gradient() if needs[1] or needs[2] else None
        self.dhidden: Tensor | None = None
        if needs[0] and not self._scoring_makes_dhidden():
            self.dhidden = torch.empty((n, hidden.shape[1]), dtype=acc, device=hidden.device)
        self.second: HeadGradient | None = None
        self.fresh = True  # nothing is in head_gradient yet
        self.tokens: dict[str, Tensor] = {
            name: torch.empty(n, dtype=torch.bool if name == "is_top1" else acc, device=hidden.device) for name in job.outputs
        }

    def _new_head_gradient(self) -> HeadGradient:
        return HeadGradient(
            self.weight,
            self.bias,
            need_weight=self.needs[1],
            need_bias=self.needs[2],
            accumulate=self.plan.accumulate,
        )

    def _scoring_makes_dhidden(self) -> bool:
        """With a frozen head, where the loss needs the log-probabilities alone."""
        return self.head_gradient is None and any(s.schedule == DEFERRED_SCALE for s in self.plan.steps)

    def run(self) -> None:
        for step in self.plan.steps:
            if step.schedule == FORWARD_ONLY:
                self._forward_only(step)
            elif step.schedule == RECOMPUTE:
                self._recompute(step)
            elif step.schedule == DEFERRED_SCALE and self.head_gradient is None:
                self._deferred_rows(step)
            elif step.schedule == DEFERRED_SCALE:
                self._deferred_margin(step)
            else:
                self._gradient_in_forward(step)
            self.fresh = False

    def _score(self, start: int, stop: int, x: Tensor, **kwargs: Any) -> RowStats:
        stats: RowStats = self.backend.score(
            x, self.weight, self.bias, self.job.entries.labels[start:stop], self.job.head, self.plan.options, **kwargs
        )
        for name, values in self.tokens.items():
            values[start:stop] = getattr(stats, name)
        return stats

    def _reference(self, start: int, stop: int) -> Tensor | None:
        ref = self.job.reference
        if ref is None:
            return None
        entries = self.job.entries
        x = gather_rows(ref.hidden, entries.rows[start:stop], in_order=False)
        options = self.plan.options.without_outputs()
        stats = self.backend.score(x, ref.weight, ref.bias, entries.labels[start:stop], self.job.head, options)
        return stats.logps

    def _x(self, start: int, stop: int) -> Tensor:
        return gather_rows(self.hidden, self.job.entries.rows[start:stop], in_order=False)

    def _dhidden(self, start: int, stop: int) -> Tensor | None:
        return None if self.dhidden is None else self.dhidden[start:stop]

    def _tile(self, rows: int) -> Tensor:
        dtype = tile_dtype(self.hidden.dtype, self.hidden.device)
        return torch.empty((rows, len(self.weight)), dtype=dtype, device=self.hidden.device)

    def _forward_only(self, step: Step) -> None:
        stats = self._score(step.start, step.stop, self._x(step.start, step.stop))
        self.evaluation.coefficients(step, stats, self._reference(step.start, step.stop), False)

    def _deferred_rows(self, step: Step) -> None:
        """Frozen head: dX up to one factor a row needs no tile; the factor comes once the loss is known."""
        stats = self._score(step.start, step.stop, self._x(step.start, step.stop), unit_dhidden=True)
        c = self.evaluation.coefficients(step, stats, self._reference(step.start, step.stop), True)
        assert c.logps is not None and stats.unit_dhidden is not None
        self.dhidden = stats.unit_dhidden.mul_(c.logps[:, None])

    def _gradient_in_forward(self, step: Step) -> None:
        x, tile = self._x(step.start, step.stop), self._tile(step.num_tokens)
        stats = self._score(step.start, step.stop, x, tile=tile)
        c = self.evaluation.coefficients(step, stats, self._reference(step.start, step.stop), True)
        self.backend.tile_gradients(
            x,
            self.weight,
            self.job.entries.labels[step.start : step.stop],
            tile,
            stats,
            c.logps,
            self.job.head,
            self.plan.options,
            dhidden=self._dhidden(step.start, step.stop),
            head_gradient=self.head_gradient,
            entropy_coefficients=c.entropy,
        )

    def _recompute(self, step: Step) -> None:
        x = self._x(step.start, step.stop)
        stats = self._score(step.start, step.stop, x)
        c = self.evaluation.coefficients(step, stats, self._reference(step.start, step.stop), True)
        self.backend.recompute_gradients(
            x,
            self.weight,
            self.bias,
            self.job.entries.labels[step.start : step.stop],
            stats,
            c.logps,
            c.entropy,
            self.job.head,
            self.plan.options,
            dhidden=self._dhidden(step.start, step.stop),
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
        whole_tile = self._tile(min(step.rows, step.num_tokens))
        for start in range(step.start, step.stop, step.rows):
            stop = min(start + step.rows, step.stop)
            x, tile = self._x(start, stop), whole_tile[: stop - start]
            stats = self._score(start, stop, x, tile=tile)
            references.append(self._reference(start, stop))
            u = unit[start - step.start : stop - step.start].to(stats.logps.dtype)
            self.backend.tile_gradients(
                x,
                self.weight,
                self.job.entries.labels[start:stop],
                tile,
                stats,
                u,
                self.job.head,
                self.plan.options,
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
        entries, span = self.job.entries, slice(step.start, step.stop)
        (pair,) = entries.groups[step.first_group : step.last_group]
        sequences = entries.sequences[span]
        unit = torch.where(sequences == pair[0], 1.0, -1.0).double()
        if entries.weights is not None:
            unit = unit * entries.weights[span]
        if entries.counted is not None:  # tokens of the NLL alone are not in the margin
            unit = torch.where(entries.counted[span], unit, 0)
        if self.job.margin == "mean":
            sizes = entries.counted_sizes()
            for s in pair:
                unit = torch.where(sequences == s, unit / max(1, sizes[s]), unit)
        return unit


class _FusedLoss(torch.autograd.Function):
    """Runs the plan in the forward pass and keeps finished gradients for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        job: Job,
        needs: tuple[bool, bool, bool],
        box: list[Any],
    ) -> Tensor:
        entries = job.entries
        the_plan = plan(
            num_tokens=len(entries.rows),
            hidden_size=hidden.shape[1],
            vocab_size=len(weight),
            group_sizes=None if job.token_groups else entries.group_sizes,
            dtype=hidden.dtype,
            weight_dtype=weight.dtype,
            train_hidden=needs[0],
            train_weight=needs[1],
            train_bias=needs[2],
            margin=job.margin is not None,
            device=hidden.device,
            outputs=job.outputs | job.loss_outputs | {"logps"},
            token_groups=job.token_groups,
            entropy_gradient=job.entropy_gradient and any(needs),
        )
        with torch.autocast(hidden.device.type, enabled=False):
            runner = _Runner(job, the_plan, get_backend(the_plan.backend), hidden, weight, bias, needs)
            runner.run()
        evaluation, acc = runner.evaluation, accumulate_dtype(hidden.dtype)
        box.append(evaluation.report(the_plan, runner.tokens, acc))
        head = runner.head_gradient
        ctx.needs, ctx.distinct = needs, entries.nll is None
        ctx.shape, ctx.dtype, ctx.device = hidden.shape, hidden.dtype, hidden.device
        ctx.head_dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(
            runner.dhidden,
            entries.rows,
            None if head is None else head.weight,
            None if head is None else head.bias,
        )
        return evaluation.loss.to(acc)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, rows, dweight, dbias = ctx.saved_tensors
        # Without retain_graph the saved gradients die here, so scaling them in place saves a copy of the weight's size.
        keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
        dh = dw = db = None
        if ctx.needs[0]:
            dh = scatter_rows(ctx.shape, ctx.dtype, rows, dhidden, factor=grad, distinct=ctx.distinct)
        if ctx.needs[1]:
            if dweight.dtype == ctx.head_dtypes[0] and not grad.is_cuda and float(grad) == 1.0:
                dw = dweight.clone() if keep_graph else dweight
            else:
                dw = scaled_to_dtype(dweight, grad, ctx.head_dtypes[0], in_place=not keep_graph)
        if ctx.needs[2]:
            db = (dbias * grad).to(ctx.head_dtypes[1])
        return dh, dw, db, None, None, None
