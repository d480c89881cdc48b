"""TRL's trainers on logitless: their fused lm-head, or whole logits, are swapped for this library's log-prob operator.

TRL (1.15 and later) gives every model a fused head (``trl.trainer.utils.add_fused_lm_head``), through which its DPO, KTO,
GRPO, RLOO and SFT trainers get their log-probabilities: one autograd function, a module global of TRL. :func:`patch` puts a
drop-in there, with the same arguments and the same five outputs. What changes for a run:

- logits are not rounded to bfloat16 on the way to the log-probabilities where the hardware makes that cheap;
- a frozen head (LoRA) costs ``4 * N * H * V`` FLOP instead of 6, and is gathered once instead of twice under ZeRO-3;
- positions that the loss leaves out are left out of the GEMMs on a CPU too.

The CPO and ORPO trainers of ``trl.experimental`` (SimPO is a loss type of the first) have no fused head and make whole logits.
They get their log-probabilities from :func:`logitless.model_logps` instead: no logits, scored tokens only, and sequences in one
row where the model's attention is FlashAttention's or flex attention. See :func:`concatenated_forward`.

What this library cannot serve runs on TRL's own code, with one warning that names the reason. Checks of the model decide that
before a step; errors of the step itself are never caught.

:func:`logitless.settings` holds for it as for every other call. Nothing is patched, and TRL is not imported, before
:func:`patch` is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import threading
import warnings
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from logitless.fused.models.attention import attention_of
from logitless.fused.models.causal_lm import causal_lm
from logitless.fused.models.logps import model_logps
from logitless.fused.models.served import why_not_served
from logitless.kernels.core.checks import DTYPES, check_head, compute_dtype
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.sharded import inside_forward
from logitless.kernels.core.stats import OPTIONAL_OUTPUTS
from logitless.kernels.linear_logps import LinearLogps, token_stats

_UTILS = "trl.trainer.utils"
_FUNCTION = "_ChunkedLogProbFunction"
_COMPACTS = "_use_triton"
_GATHER = "maybe_gather_lm_head_ctx"
#: Arguments of TRL's autograd function that the drop-in serves.
_ARGUMENTS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
_HOW = "install another (pip install 'trl>=1.15,<1.17'), or run this one unpatched"
#: Trainers that make whole logits: module, class, and whether the NLL is over prompt and response.
_WHOLE_LOGITS = (
    ("trl.experimental.cpo.cpo_trainer", "CPOTrainer", False),
    ("trl.experimental.orpo.orpo_trainer", "ORPOTrainer", True),
)
_FORWARD = "concatenated_forward"

log = logging.getLogger("logitless")
_lock = threading.Lock()
#: What :func:`unpatch` puts back: owner, name, value.
_originals: list[tuple[Any, str, Any]] = []
#: Warnings given since :func:`patch`.
_given: set[str] = set()


def _utils() -> ModuleType:
    return importlib.import_module(_UTILS)


def _own(name: str) -> Any:
    """TRL's own value of a replaced name of its module; ``None`` if it is not replaced."""
    return next((value for owner, replaced, value in _originals if replaced == name and isinstance(owner, ModuleType)), None)


def _warn_once(what: str, reason: str) -> None:
    message = f"{what} runs on TRL's own code, not on logitless: {reason}"
    if message not in _given:
        _given.add(message)
        log.warning(message)


def _why_not_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the drop-in cannot serve these tensors; ``None`` if it can, whichever of the accepted dtypes is wider."""
    if torch.compiler.is_compiling():
        return None
    try:
        no_rows = hidden[:0]
        if hidden.dtype in DTYPES and weight.dtype in DTYPES:
            no_rows = no_rows.to(torch.promote_types(hidden.dtype, weight.dtype))
        with inside_forward():  # TRL calls it in the model's forward pass
            check_head(no_rows, weight, bias)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _padding_free(model: torch.nn.Module) -> bool | None:
    """How CPO's and ORPO's batches run: in one row a mask of all against all would cost these what the padding does."""
    return False if attention_of(causal_lm(model)) in ("eager", "sdpa") else None


class _GatheredLogps(LinearLogps):
    """The log-prob function for a head that ZeRO-3 shards again as soon as TRL's forward pass has left its context.

    Outside of the context the parameters have no elements, so nothing here may look at their shapes.
    """

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_entropy = grads[1]
        if ctx.options.unit_dhidden and grad_entropy is None:
            return LinearLogps.backward(ctx, *grads)  # scales what the forward pass left; never reads the head
        weight, bias = ctx.saved_tensors[1:3]
        with getattr(_utils(), _GATHER)(weight, bias):
            return LinearLogps.backward(ctx, *grads)


class LogProbFunction:
    """Stands in for ``trl.trainer.utils._ChunkedLogProbFunction``, of which TRL calls nothing but ``apply``."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Per-token log-probabilities of ``targets`` and, where asked for, statistics of the distribution.

        Args:
            hidden: (N, H). The head is applied in its dtype, or in autocast's, whatever the dtype of the weight.
            weight: (V, H); bias: (V,) or ``None``.
            targets: (N,) int64; -100 gives 0 and costs nothing.
            temperature: divides the logits; positive.
            chunk_size: ignored; see ``memory_budget`` in :func:`logitless.settings`.
            final_logit_softcapping: soft-cap, or ``None``.
            logit_scale: multiplies the logits before the soft-cap.
            outputs: of ``"entropy"``, ``"log_sum_sq_probs"``, ``"mean_logits"``, ``"is_top1"``; other names are TRL's own.

        Returns:
            logps, entropy, log_sum_sq_probs, mean_logits, is_top1, each (N,), ``None`` unless asked for. Float32 (float64
            for float64 input), ``is_top1`` bool. The first two are differentiable with respect to hidden, weight and bias.

        A head that this library does not take (a weight in float8, for example) is left to TRL's own function, with a warning.

        Raises:
            TypeError, ValueError: for a temperature, scale or soft-cap out of range, or a target outside of the vocabulary.

        Example:
            >>> x, w = torch.randn(3, 16), torch.randn(100, 16)
            >>> logps, entropy, *_ = LogProbFunction.apply(x, w, None, torch.tensor([1, 2, 3]), 1.0, 32, outputs=("entropy",))
            >>> logps.shape, entropy.shape
            (torch.Size([3]), torch.Size([3]))
        """
        own = _own(_FUNCTION)
        if own is not None and (reason := _why_not_head(hidden, weight, bias)):
            _warn_once("the fused head", reason)
            found: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None] = own.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
            return found
        head = HeadSpec(logit_scale, final_logit_softcapping, temperature)
        wanted = frozenset(outputs) & frozenset(OPTIONAL_OUTPUTS)
        x = hidden.to(compute_dtype(hidden))
        stats = token_stats(x, weight, targets, bias, head, wanted | {"logps"}, -100, function=_GatheredLogps)
        assert stats.logps is not None
        return stats.logps, stats.entropy, stats.log_sum_sq_probs, stats.mean_logits, stats.is_top1


def concatenated_forward(
    trainer: Any, model: torch.nn.Module, batch: dict[str, Any], nll_of_prompt: bool
) -> tuple[Tensor, ...]:
    """What ``concatenated_forward`` of TRL's CPOTrainer and ORPOTrainer returns, without logits.

    Differences: in place of the logits, of which the trainers log the mean, stand their means over scored tokens (TRL: over all
    positions, padding too); a sequence without scored tokens has a log-probability of 0, and not NaN.

    Args:
        trainer: the trainer. model: its model, as it is called in training.
        batch: of the trainer's collator.
        nll_of_prompt: whether the NLL of the chosen sequences is over prompt and response, as ORPO's.

    Returns:
        chosen and rejected log-probabilities (P,), chosen and rejected mean logits (0-dim), NLL (0-dim).

    Raises:
        TypeError, ValueError: as :func:`logitless.model_logps`, for a model whose head cannot be left out.
    """
    padding = trainer.padding_value if nll_of_prompt else trainer.pad_token_id
    inputs = trainer.concatenated_inputs(batch, padding_value=padding, device=trainer.accelerator.device)
    ids, mask = inputs["concatenated_input_ids"], inputs["concatenated_attention_mask"]
    labels = inputs["concatenated_labels"]
    half = len(batch["chosen_labels"])
    wanted = labels.clone()
    if nll_of_prompt:
        wanted[:half] = torch.where(mask[:half] == 1, ids[:half], -100)
    stats = model_logps(
        model,
        ids,
        attention_mask=mask,
        labels=wanted,
        outputs=("logps", "mean_logits"),
        padding_free=_padding_free(model),
    )
    assert stats.logps is not None and stats.mean_logits is not None

    def scored_by(chosen: Tensor) -> Tensor:
        scored = chosen != -100
        scored[:, 0] = False  # nothing predicts the first token
        return scored

    responses = scored_by(labels)
    logps = torch.where(responses, stats.logps, 0).sum(-1)
    if nll_of_prompt or trainer.loss_type in ("ipo", "simpo"):
        logps = logps / responses.sum(-1).clamp(min=1)
    of_nll = scored_by(wanted)[:half]
    nll = -torch.where(of_nll, stats.logps[:half], 0).sum() / of_nll.sum().clamp(min=1)
    if not nll_of_prompt and trainer.cpo_alpha == 0:
        nll = torch.zeros_like(nll)
    means = torch.where(responses, stats.mean_logits, 0)
    chosen, rejected = (m.sum() / r.sum().clamp(min=1) for m, r in zip(means.split(half), responses.split(half), strict=True))
    return logps[:half], logps[half:], chosen, rejected, nll


def _without_logits(original: Any, nll_of_prompt: bool) -> Any:
    """The method that replaces ``original``, which runs what this library cannot serve."""

    def forward(self: Any, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        reason: str | None
        if self.is_encoder_decoder:
            reason = "the model is an encoder-decoder"
        elif self.aux_loss_enabled:
            reason = "a router's auxiliary loss is added to the loss"
        else:
            reason = why_not_served(model)
        if reason is not None:
            _warn_once(type(self).__name__, reason)
            found: tuple[Tensor, ...] = original(self, model, batch)
            return found
        return concatenated_forward(self, model, batch, nll_of_prompt)

    return forward


def _trainers_with_logits() -> list[tuple[type, Any]]:
    """Trainers of ``trl.experimental``, and what to put in place of their ``concatenated_forward``."""
    found = []
    for module, name, nll_of_prompt in _WHOLE_LOGITS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the trainer is experimental; its own import has already said so
                trainer = getattr(importlib.import_module(module), name)
            original = getattr(trainer, _FORWARD)
        except (ImportError, AttributeError) as error:
            log.info("%s.%s is left as it is: %s", module, name, error)
            continue
        if list(inspect.signature(original).parameters) != ["self", "model", "batch"]:
            log.warning("%s.%s is left as it is: its %s takes other arguments than (model, batch)", module, name, _FORWARD)
            continue
        found.append((trainer, _without_logits(original, nll_of_prompt)))
    return found


def _load() -> ModuleType:
    """``trl.trainer.utils``, once all that is relied on has been found there."""
    if importlib.util.find_spec("trl") is None:
        raise ImportError("logitless.integrations.trl needs TRL, which is not installed: pip install 'trl>=1.15'")
    version = str(getattr(importlib.import_module("trl"), "__version__", "of unknown version"))
    utils = _utils()
    names = [_FUNCTION, _GATHER, "add_fused_lm_head"]
    if not version.startswith("1.15."):  # 1.15 scores labelled positions only on every device: it has nothing to ask
        names.append(_COMPACTS)
    missing = [f"{_UTILS}.{name}" for name in names if not hasattr(utils, name)]
    if missing:
        raise RuntimeError(f"logitless.integrations.trl needs {', '.join(missing)}, which TRL {version} lacks: {_HOW}")
    function = getattr(utils, _FUNCTION)
    if function is not None:  # TRL 1.15 has None there without Triton
        found = tuple(inspect.signature(function.forward).parameters)[1:]
        if found != _ARGUMENTS:
            raise RuntimeError(
                f"{_UTILS}.{_FUNCTION} of TRL {version} takes ({', '.join(found)}) where logitless serves "
                f"({', '.join(_ARGUMENTS)}): {_HOW}"
            )
    return utils


class Patch:
    """What :func:`patch` returns; as a context manager it undoes that call, and only if the call changed something."""

    def __init__(self, installed: bool) -> None:
        self._installed = installed

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._installed:
            unpatch()


def patch() -> Patch:
    """Run the heads of TRL's trainers on logitless, those that exist already included.

    What this library cannot serve, such as CPO with a DoRA adapter on the head, runs on TRL's own code as without the patch. A
    warning of the logger ``logitless`` names the reason once.

    Calling it again changes nothing. As a context manager it holds for the block; a block inside another, or after a plain
    call, leaves the patch in place when it ends.

    Returns:
        Patch: for use in a ``with`` statement; may be dropped.

    Raises:
        ImportError: when TRL is not installed.
        RuntimeError: when this TRL lacks a name that is replaced or relied on, or its function takes other arguments.

    Example:
        >>> import logitless as ll
        >>> with ll.integrations.trl.patch():  # doctest: +SKIP
        ...     trainer.train()
    """
    with _lock:
        if _originals:
            return Patch(installed=False)
        utils = _load()
        replacements: dict[str, Any] = {_FUNCTION: LogProbFunction}
        if (asks_triton := getattr(utils, _COMPACTS, None)) is not None:

            def compacts(device: torch.device) -> bool:
                # TRL asks this to find out whether a varying number of rows is cheap: so it is on these two, while devices
                # that recompile for each shape keep TRL's answer
                return device.type in ("cpu", "cuda") or asks_triton(device)

            replacements[_COMPACTS] = compacts
        swaps: list[tuple[Any, str, Any]] = [(utils, name, replacement) for name, replacement in replacements.items()]
        swaps += [(trainer, _FORWARD, method) for trainer, method in _trainers_with_logits()]
        for owner, name, replacement in swaps:
            _originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, replacement)
        return Patch(installed=True)


def unpatch() -> None:
    """Give TRL its own functions back, however often :func:`patch` was called. Does nothing when it was not."""
    with _lock:
        while _originals:
            owner, name, original = _originals.pop()
            setattr(owner, name, original)
        _given.clear()


def is_patched() -> bool:
    """Whether TRL's fused head runs on logitless now."""
    return bool(_originals)
