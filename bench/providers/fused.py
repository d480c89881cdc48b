"""Providers from logitless: the loss modules, and ``linear_logps`` with the loss in plain torch behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import logitless as ll

from ..core.cases import Case
from ..core.inputs import Inputs
from ..core.registry import Result, Work, provider
from ..losses import loss_of, policy, preference, uses_entropy
from .common import POLICY_TASKS, PREFERENCE_TASKS, TOKEN_TASKS, all_of, finish, needs_backend

_SMALL_BUDGET = 64 << 20


def _dapo(**options: Any) -> Any:
    return ll.FusedLinearGRPOLoss("dapo", epsilon_low=policy.EPSILON_LOW, epsilon_high=policy.EPSILON_HIGH, **options)


_MODULES: dict[str, Callable[[], Any]] = {
    "nll": lambda: ll.FusedLinearPreferenceLoss(lambda batch: batch.token_mean_nll(), group="sequence", uses_nll=True),
    "dpo": lambda: ll.FusedLinearDPOLoss(preference.DPO_BETA),
    "ipo": lambda: ll.FusedLinearIPOLoss(preference.IPO_BETA),
    "simpo": lambda: ll.FusedLinearSimPOLoss(preference.SIMPO_BETA, preference.SIMPO_GAMMA),
    "cpo": lambda: ll.FusedLinearCPOLoss(preference.CPO_BETA, preference.CPO_ALPHA),
    "orpo": lambda: ll.FusedLinearORPOLoss(preference.ORPO_BETA),
    "kto": lambda: ll.FusedLinearKTOLoss(preference.KTO_BETA),
    "dapo": _dapo,
    "dapo-entropy": lambda: _dapo(entropy_coef=policy.ENTROPY_COEF),
    "ppo": lambda: ll.FusedLinearPPOLoss(policy.PPO_CLIP),
}


def _of_plan(plan: Any) -> dict[str, Any]:
    """The fields of a result that logitless's plan fills; the schedule was chosen by the planner."""
    if plan is None:
        return {}
    predicted = None if plan.cost is None else {part.name: part.seconds for part in plan.cost.parts}
    return {"schedule": plan.schedule, "flops": plan.flops, "predicted": predicted}


def _preference_module(case: Case, inputs: Inputs, **settings: Any) -> Work:
    """A loss module on the padded batch."""
    task, module = case.task, _MODULES[case.task]()

    def call(hidden: Tensor, labels: Tensor) -> tuple[Any, Tensor]:
        """The module's output and the log-probs (S,) of the sequences, for any number of them."""
        more: dict[str, Any] = {"head": case.shape.head}
        if task in ("dpo", "ipo", "kto"):
            more["ref_logps"] = inputs.ref_logps[:1].expand(len(labels))
        if task == "kto":
            more.update(desirable=inputs.desirable.repeat_interleave(len(labels) // len(inputs.labels)), kl=inputs.kl)
        with ll.settings(**settings):
            out = module(hidden, inputs.weight, labels, **more)
        single = task in ("kto", "nll")  # losses of single sequences; the others report what they compare, sums or means
        return out, out.logps if single else torch.cat([out.chosen_logps, out.rejected_logps])

    def step() -> Result:
        out, logps = call(inputs.hidden, inputs.labels)
        with ll.settings(**settings):
            return finish(out.loss, inputs, sequence_logps=logps, **_of_plan(out.plan))

    def token_logps() -> Tensor:
        # Sequences of one token each: the same tiles, and log-probs of tokens come out.
        labels = inputs.labels.reshape(-1, 1)
        return call(inputs.hidden.reshape(len(labels), 1, -1), labels)[1].reshape(inputs.labels.shape)

    return Work(step, token_logps)


def _policy_module(case: Case, inputs: Inputs, **settings: Any) -> Work:
    """A loss module on the packed batch with its prompts, whose labels mark them as not scored."""
    module, packed = _MODULES[case.task](), inputs.packed
    arguments = {
        "head": case.shape.head,
        "advantages": packed.advantages if case.task == "ppo" else packed.sequence_advantages,
        "old_logps": packed.old_logps,
        "cu_seqlens": packed.cu_seqlens,
    }

    def step() -> Result:
        with ll.settings(**settings):
            out = module(packed.hidden, packed.weight, packed.labels, **arguments)
            return finish(out.loss, packed, token_logps=out.logps, **_of_plan(out.plan))

    return Work(step)


def _op(case: Case, inputs: Inputs, **settings: Any) -> Work:
    """``linear_logps``, on packed tokens for policy losses."""
    loss_fn, entropic = loss_of(case.task), uses_entropy(case.task)
    outputs, shape = ("logps", "entropy") if entropic else ("logps",), case.shape
    inputs = inputs.packed or inputs
    sizes: dict[str, Any] = {"num_tokens": shape.scored, "hidden_size": shape.hidden, "vocab_size": shape.vocab}
    trained = {"train_hidden": case.backward, "train_weight": case.backward and case.train_head, "arbitrary_loss": True}
    of_outputs = {"outputs": outputs, "entropy_gradient": entropic and case.backward}
    with ll.settings(**settings):
        plan = ll.plan(dtype=shape.torch_dtype, device=inputs.hidden.device, **{**sizes, **trained, **of_outputs})

    def step() -> Result:
        with ll.settings(**settings):
            stats = ll.linear_logps(inputs.hidden, inputs.weight, inputs.labels, head=shape.head, outputs=outputs)
            assert stats.logps is not None
            loss = loss_fn(stats.logps, inputs, stats.entropy)
            return finish(loss, inputs, token_logps=stats.logps, **_of_plan(plan))

    return Work(step)


_KINDS: dict[str, tuple[frozenset[str], Callable[..., Work]]] = {
    "logitless{}": (PREFERENCE_TASKS, _preference_module),
    "logitless{}:op": (TOKEN_TASKS, _op),
    "logitless:policy{}": (POLICY_TASKS, _policy_module),
    "logitless:policy-op{}": (POLICY_TASKS, _op),
}


def _register(suffix: str, **settings: Any) -> None:
    """Modules and ops under some settings, on the backend that these name."""
    why_not = all_of(*(needs_backend(name) for name in settings.values()))
    for form, (tasks, make) in _KINDS.items():

        def build(case: Case, inputs: Inputs, make: Callable[..., Work] = make) -> Work:
            return make(case, inputs, **settings)

        provider(form.format(suffix), tasks=tasks, why_not=why_not, quick=not settings)(build)  # ``auto`` need not run twice


_register("")
for _backend in ll.available_backends():
    _register(f"@{_backend}", backend=_backend)


@provider("logitless:small", tasks=PREFERENCE_TASKS, quick=False)
def small_budget(case: Case, inputs: Inputs) -> Work:
    """The loss module under a budget of 64 MiB: several tiles, and for a long pair the deferred scale."""
    return _preference_module(case, inputs, memory_budget=_SMALL_BUDGET)
