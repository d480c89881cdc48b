"""The transforms of a language-model head: logit scale, soft-cap, temperature, and its number of real entries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

#: Config attributes that multiply the logits, in order of precedence.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


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
    def from_config(cls, config: Any, temperature: float = 1.0) -> HeadSpec:
        """Read the head's transforms from a Hugging Face model config.

        Covers configs without any (Llama, Mistral, Qwen2, Qwen3 ...), Gemma 2/3 ``final_logit_softcapping``, Cohere
        ``logit_scale``, Granite and MiniCPM3 ``logits_scaling`` (which divide), HyperCLOVA X ``logits_scaling`` (which
        multiplies), Falcon-H1 ``lm_head_multiplier``, and composite vision-language configs, whose text part is read.

        Args:
            config: a ``transformers.PretrainedConfig``, or any object with the same attributes.
            temperature: sampling temperature; not part of the config.

        Example:
            >>> from types import SimpleNamespace
            >>> HeadSpec.from_config(SimpleNamespace(model_type="granite", logits_scaling=8.0)).logit_scale
            0.125
        """
        if config is None or isinstance(config, Mapping):
            raise TypeError(f"config must be a model config with attributes, got {type(config).__name__}")
        get_text_config = getattr(config, "get_text_config", None)
        text = get_text_config() if callable(get_text_config) else config
        scale = next((s for name in _MULTIPLIERS if (s := getattr(text, name, None)) is not None), None)
        if scale is None and (divisor := getattr(text, "logits_scaling", None)) is not None:
            if not divisor:
                raise ValueError(f"config.logits_scaling must not be 0, got {divisor!r}")
            scale = divisor if getattr(text, "model_type", None) == "hyperclovax" else 1 / divisor
        return cls(
            logit_scale=1.0 if scale is None else scale,
            softcap=getattr(text, "final_logit_softcapping", None),
            temperature=temperature,
        )

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
