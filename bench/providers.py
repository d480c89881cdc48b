"""Providers from this project and from torch: bare GEMMs, plain PyTorch, torch.compile, and logitless in its schedules."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll

from . import losses
from .cases import Case, Inputs
from .losses import LOSSES, loss_of
from .registry import Result, Work, finish, of_plan, provider

TOKEN_TASKS = frozenset({"logps", *LOSSES})
_SMALL_BUDGET = 64 << 20


@provider("gemm", tasks=TOKEN_TASKS, roofline=True)
def gemm(case: Case, inputs: Inputs) -> Work:
    """The GEMMs alone, on scored tokens, into buffers that exist: what nothing that uses the same GEMMs can beat."""
    x = inputs.hidden.detach()[inputs.scored]  # (N, H)
    w = inputs.weight.detach()
    tile = torch.empty((len(x), len(w)), dtype=x.dtype, device=x.device)
    dx, dw = torch.empty_like(x), torch.empty_like(w) if case.gemms == 3 else None

    def step() -> Result:
        torch.mm(x, w.t(), out=tile)
        if case.gemms >= 2:
            torch.mm(tile, w, out=dx)
        if dw is not None:
            torch.mm(tile.t(), x, out=dw)
        return Result()

    return Work(step)


def _target_logps(hidden: Tensor, weight: Tensor, targets: Tensor, head: ll.HeadSpec) -> Tensor:
    """hidden (..., H), weight (V, H), targets (...) -> (...)."""
    logits = F.linear(hidden, weight).float()
    if head.softcap is not None:
        logits = head.apply(logits)
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0]


@provider("torch", tasks=TOKEN_TASKS)
def plain(case: Case, inputs: Inputs) -> Work:
    """Plain PyTorch on every position, as trainers did before they had a fused head."""
    loss_fn = loss_of(case.task)

    def step() -> Result:
        logps = _target_logps(inputs.hidden, inputs.weight, inputs.labels.clamp(min=0), case.shape.head)
        logps = torch.where(inputs.scored, logps, 0)
        return finish(loss_fn(logps, inputs), inputs, token_logps=logps)

    return Work(step)


def _on_scored(case: Case, inputs: Inputs, logps_fn: Callable[..., Tensor]) -> Work:
    loss_fn = loss_of(case.task)

    def step() -> Result:
        mask = inputs.scored
        values = logps_fn(inputs.hidden[mask], inputs.weight, inputs.labels[mask], case.shape.head)
        logps = torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
        return finish(loss_fn(logps, inputs), inputs, token_logps=logps)

    return Work(step)


@provider("torch-scored", tasks=TOKEN_TASKS)
def plain_scored(case: Case, inputs: Inputs) -> Work:
    """Plain PyTorch, the prompt left out first."""
    return _on_scored(case, inputs, _target_logps)


def _no_compiler(case: Case, device: torch.device) -> list[str]:
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return ["torch.compile needs a C++ compiler, and none is on PATH"]
    return []


@provider("torch-compile", tasks=TOKEN_TASKS, why_not=_no_compiler, warm_up=True)
def compiled(case: Case, inputs: Inputs) -> Work:
    """``torch.compile`` of the plain log-probs, on scored positions."""
    torch._dynamo.reset()  # after 8 shapes of one function it would run it uncompiled
    return _on_scored(case, inputs, torch.compile(_target_logps, dynamic=False))


_MODULES: dict[str, Callable[[], Any]] = {
    "nll": lambda: ll.FusedLinearPreferenceLoss(lambda batch: batch.token_mean_nll(), group="sequence", uses_nll=True),
    "dpo": lambda: ll.FusedLinearDPOLoss(losses.DPO_BETA),
    "ipo": lambda: ll.FusedLinearIPOLoss(losses.IPO_BETA),
    "simpo": lambda: ll.FusedLinearSimPOLoss(losses.SIMPO_BETA, losses.SIMPO_GAMMA),
    "cpo": lambda: ll.FusedLinearCPOLoss(losses.CPO_BETA, losses.CPO_ALPHA),
    "orpo": lambda: ll.FusedLinearORPOLoss(losses.ORPO_BETA),
    "kto": lambda: ll.FusedLinearKTOLoss(losses.KTO_BETA),
}


def _call(case: Case, module: Any, inputs: Inputs, hidden: Tensor, labels: Tensor) -> tuple[Any, Tensor]:
    """Run a loss module; its output and the log-probs (S,) of the sequences, for any number of them."""
    task, count, per = case.task, len(labels), len(labels) // len(inputs.labels)
    more: dict[str, Any] = {"head": case.shape.head}
    if task in ("dpo", "ipo", "kto"):
        more["ref_logps"] = inputs.ref_logps[:1].expand(count)
    if task == "kto":
        more.update(desirable=inputs.desirable.repeat_interleave(per), kl=inputs.kl)
    out = module(hidden, inputs.weight, labels, **more)
    single = task in ("kto", "nll")  # losses of single sequences; the others report what they compare, sums or means
    return out, out.logps if single else torch.cat([out.chosen_logps, out.rejected_logps])


def _module(case: Case, inputs: Inputs, **settings: Any) -> Work:
    """A loss module; the planner chooses the schedule, which the table shows."""
    module = _MODULES[case.task]()

    def step() -> Result:
        with ll.settings(**settings):
            out, logps = _call(case, module, inputs, inputs.hidden, inputs.labels)
            return finish(out.loss, inputs, sequence_logps=logps, **of_plan(out.plan))

    def token_logps() -> Tensor:
        # Sequences of one token each: the same tiles, and log-probs of tokens come out.
        labels = inputs.labels.reshape(-1, 1)
        with ll.settings(**settings):
            _, logps = _call(case, module, inputs, inputs.hidden.reshape(len(labels), 1, -1), labels)
        return logps.reshape(inputs.labels.shape)

    return Work(step, token_logps)


def _op(case: Case, inputs: Inputs, **settings: Any) -> Work:
    """``linear_logps`` and the loss in plain torch behind it."""
    loss_fn = loss_of(case.task)
    with ll.settings(**settings):
        plan = ll.plan(
            num_tokens=case.shape.scored,
            hidden_size=case.shape.hidden,
            vocab_size=case.shape.vocab,
            dtype=case.shape.torch_dtype,
            train_hidden=case.backward,
            train_weight=case.backward and case.train_head,
            arbitrary_loss=True,
            device=inputs.hidden.device,
        )

    def step() -> Result:
        with ll.settings(**settings):
            logps = ll.linear_logps(inputs.hidden, inputs.weight, inputs.labels, head=case.shape.head).logps
            assert logps is not None
            return finish(loss_fn(logps, inputs), inputs, token_logps=logps, **of_plan(plan))

    return Work(step)


def _register(name: str, **settings: Any) -> None:
    """The module and the op under some settings, on the backend that these name."""

    def why_not(case: Case, device: torch.device) -> list[str]:
        from logitless.kernels.backends.interface import Call
        from logitless.kernels.backends.registry import get_backend

        if "backend" not in settings:
            return []
        backend, dtype = get_backend(settings["backend"]), case.shape.torch_dtype
        if backend.name == "triton" and device.type == "cpu":
            return ["Triton's interpreter is no kernel to time"]
        return [*backend.why_unavailable(), *backend.why_not(Call(device, dtype, dtype))]

    quick = not settings  # what ``auto`` chose need not run twice
    provider(name, tasks=LOSSES, why_not=why_not, quick=quick)(lambda case, inputs: _module(case, inputs, **settings))
    provider(f"{name}:op", tasks=TOKEN_TASKS, why_not=why_not, quick=quick)(lambda case, inputs: _op(case, inputs, **settings))


_register("logitless")
for _backend in ll.available_backends():
    _register(f"logitless@{_backend}", backend=_backend)


@provider("logitless:small", tasks=LOSSES, quick=False)
def small_budget(case: Case, inputs: Inputs) -> Work:
    """The loss module under a budget of 64 MiB: several tiles, and for a long pair the deferred scale."""
    return _module(case, inputs, memory_budget=_SMALL_BUDGET)
