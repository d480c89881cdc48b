"""The transforms of a language-model head: logit scale, soft-cap, temperature, and its number of real entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

#: Implementation of :meth:`HeadSpec.from_model`, which runs models and is therefore not part of the kernels.
_measure: Callable[..., HeadSpec] | None = None


def measure_with(function: Callable[..., HeadSpec]) -> None:
    """Set the implementation of :meth:`HeadSpec.from_model`."""
    global _measure
    _measure = function


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not abs(value) < math.inf:  # unlike math.isfinite, Dynamo traces it
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class HeadSpec:
    """The map from raw logits ``r = hidden @ weight.T + bias`` to the logits ``z`` of the softmax.

    Applied in this order: ``r * logit_scale``, then ``softcap * tanh(. / softcap)`` when ``softcap`` is set, then
    ``/ temperature``.

    Args:
        logit_scale: multiplies the raw logits (Cohere ``logit_scale``, Granite ``1 / logits_scaling``). Any finite number.
        softcap: soft-cap of Gemma 2 (``final_logit_softcapping``); positive, or ``None`` for no cap.
        temperature: sampling temperature; positive.
        vocab_size: number of real entries of a padded head; ``None``: all rows of the weight. The rows of weight and bias
            beyond it do not exist: they are never read, get no probability and a gradient of 0, and labels there are out of
            range.

    Raises:
        TypeError, ValueError: naming the argument, when a value is not a number or out of range.

    Example:
        >>> HeadSpec(softcap=30.0, temperature=0.7)
        HeadSpec(logit_scale=1.0, softcap=30.0, temperature=0.7, vocab_size=None)
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_scale", _number("logit_scale", self.logit_scale))
        object.__setattr__(self, "temperature", _number("temperature", self.temperature))
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if self.softcap is not None:
            object.__setattr__(self, "softcap", _number("softcap", self.softcap))
            if self.softcap <= 0:
                raise ValueError(f"softcap must be > 0 or None, got {self.softcap}")
        if self.vocab_size is not None:
            if isinstance(self.vocab_size, bool) or not isinstance(self.vocab_size, int):
                raise TypeError(f"vocab_size must be an int or None, got {type(self.vocab_size).__name__} {self.vocab_size!r}")
            if self.vocab_size < 1:
                raise ValueError(f"vocab_size must be >= 1 or None, got {self.vocab_size}")

    @classmethod
    def from_model(
        cls,
        model: torch.nn.Module,
        at: Literal["head", "backbone"] = "head",
        temperature: float = 1.0,
        inputs: Mapping[str, Any] | None = None,
    ) -> HeadSpec:
        """Measure what a Hugging Face causal language model does to its logits.

        The model runs once on eight tokens, without gradients and in evaluation mode. Its logits are compared with
        ``apply(hidden @ weight.T + bias)`` on rows that are rescaled, so that a scale, a soft-cap and missing or masked entries
        show. Scales and soft-caps that are numbers of the model's config are taken exactly.

        Args:
            model: a causal language model of transformers, or a wrapper of it.
            at: which hidden states the result is for. ``"head"``: the input of the head, as :func:`logitless.model_logps` and
                :class:`logitless.models.AtHead` have it. ``"backbone"``: ``last_hidden_state`` of the model without its head.
                They differ where a model scales its hidden states in between (MiniCPM3, Inkling).
            temperature: sampling temperature, which is no property of the model.
            inputs: arguments of the model's forward, for models that do not run on token ids alone.

        Raises:
            ValueError: no ``HeadSpec`` gives the model's logits: a layer between backbone and head (Bert and similar, with
                ``at="backbone"``), logits masked in the middle of the vocabulary (Chameleon), any other function of the logits.
            TypeError, ValueError: as :func:`logitless.model_logps`, for a model without a head that it can use.

        Example:
            >>> from transformers import GraniteConfig, GraniteForCausalLM
            >>> sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
            >>> model = GraniteForCausalLM(GraniteConfig(**sizes, num_attention_heads=2, logits_scaling=8.0))
            >>> HeadSpec.from_model(model, at="backbone").logit_scale
            0.125
        """
        assert _measure is not None  # importing logitless sets it
        return _measure(model, at, temperature, inputs)

    def with_temperature(self, temperature: float) -> HeadSpec:
        """The same head at another temperature."""
        return replace(self, temperature=temperature)

    @property
    def slope(self) -> float:
        """``dz/dr`` at an uncapped logit. Constant, so the kernels apply it to a row of the gradient, not to the tile."""
        return self.logit_scale / self.temperature

    def transform_(self, r: Tensor) -> Tensor | None:
        """Turn raw logits into logits in place; with a soft-cap, return ``tanh(...)`` squared, else ``None``.

        ``dz/dr = slope * (1 - tanh**2)``, so the returned tensor is all that the backward pass needs.
        """
        if self.softcap is None:
            if self.slope != 1.0:
                r.mul_(self.slope)
            return None
        r.mul_(self.logit_scale / self.softcap).tanh_()
        squared = r * r
        r.mul_(self.softcap / self.temperature)
        return squared

    def apply(self, r: Tensor) -> Tensor:
        """Out-of-place and differentiable: the logits of raw logits ``r`` (..., V), without those beyond ``vocab_size``.

        Raises:
            ValueError: when ``vocab_size`` is larger than V.
        """
        if self.vocab_size is not None:
            r = r[..., : self.entries_of(r.shape[-1])]
        z = r * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature

    def entries_of(self, rows: int) -> int:
        """The number of vocabulary entries of a head whose weight has that many rows.

        Raises:
            ValueError: when ``vocab_size`` is larger.
        """
        if self.vocab_size is None:
            return rows
        if self.vocab_size > rows:
            raise ValueError(f"vocab_size of the HeadSpec must be at most the {rows} rows of the head, got {self.vocab_size}")
        return self.vocab_size

    def pack(self) -> Tensor:
        """The numbers as a float64 CPU tensor, 0 for no soft-cap and for no ``vocab_size``.

        Operators take this tensor: a Python float would be compiled in as a constant, and every new temperature would
        recompile the caller's graph. Multiplication (unlike ``torch.tensor``) keeps the floats symbolic under Dynamo.
        """
        one = torch.ones((), dtype=torch.float64, device="cpu")
        cap = 0.0 if self.softcap is None else self.softcap
        return torch.stack((one * self.logit_scale, one * cap, one * self.temperature, one * (self.vocab_size or 0)))

    @classmethod
    def unpack(cls, packed: Tensor) -> HeadSpec:
        """Inverse of :meth:`pack`."""
        scale, cap, temperature, vocab_size = packed.tolist()
        return cls(scale, cap or None, temperature, int(vocab_size) or None)
