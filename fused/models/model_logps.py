"""Per-token log-probabilities of a Hugging Face causal language model, without padding and without vocabulary logits."""

from __future__ import annotations

import inspect
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logitless.kernels.core.checks import check_outputs, check_spec
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.stats import TokenStats
from logitless.kernels.linear_logps import linear_logps

from .packing import Layout, PackedSequences, TokenSequences, lay_out, make_pack, unpack

log = logging.getLogger("logitless")

#: Attention that transformers gives a mask made from the position ids, and kinds of layers that read such a mask.
_MASKED = ("eager", "sdpa", "flex_attention")
_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
#: Arguments of the model's forward that this module fills in, or that change what reaches the head.
_NOT_FOR_THE_MODEL = (
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "fused_lm_head",
    "inputs_embeds",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "past_key_values",
    "shift_labels",
    "use_cache",
)
#: Arguments that a forward pass may take without naming them.
_UNNAMED = frozenset({"adapter_names", "is_causal", "output_attentions", "output_hidden_states", "output_router_logits"})
_PROBE_TOKENS = 8
#: What another sequence may change in the hidden states, and what being packed may, in units of what a true context changes:
#: far above rounding in bfloat16 and far below what a mask that is missing or positions that run on do.
_LEAK, _DIFFERENCE = 1 / 64, 1 / 8
#: What the probes found, by causal language model, then attention implementation and probe.
_probed: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], list[str]]] = weakref.WeakKeyDictionary()


@torch.compiler.disable
def model_logps(
    model: nn.Module,
    input_ids: TokenSequences | PackedSequences,
    *,
    attention_mask: Tensor | None = None,  # (S, T)
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    position_ids: TokenSequences | None = None,  # like input_ids
    labels: TokenSequences | None = None,  # like input_ids
    prompt_lengths: Tensor | Iterable[int] | None = None,  # (S,)
    head: HeadSpec | None = None,
    temperature: float | None = None,
    outputs: str | Iterable[str] = ("logps",),
    ignore_index: int = -100,
    shifted: bool | None = None,
    padding_free: bool | None = None,
    **model_kwargs: Any,
) -> TokenStats:
    """Log-probability of each token given those before it, under a Hugging Face causal language model.

    The model runs with its head left out: what would go into the head goes to :func:`logitless.linear_logps`, and only the
    scored positions are multiplied by the head's weight. Everything around the model stays in force: autocast, gradient
    checkpointing, ``DistributedDataParallel``, PEFT adapters.

    **Padding-free.** The sequences are laid end to end in one row, with position ids that start again at 0 in each and no
    attention mask, from which transformers tells them apart; ``*flash*`` and ``*varlen*`` also get ``cu_seq_lens_q/k`` and
    ``max_length_q/k``. Some models silently let such sequences see each other (recurrent and convolutional layers; models
    that do not pass position ids to their mask, as Bloom, OPT, GPT-OSS and AFMoE in transformers 5.23). So a model is looked
    at and tried out once, with 16 tokens, before it is used this way (:func:`why_not_padding_free`); where it cannot, the
    sequences run as a right-padded batch, for which it is tried out too. What transformers itself takes from the longest
    sequence of a batch (``"dynamic"`` and ``"longrope"`` position scaling) holds for all of a row as well. With ``sdpa`` and
    ``eager`` attention, the mask of one row of N tokens has N * N entries; unless asked for, these run padding-free only
    where that costs less than the padding does.

    Args:
        model: what ``AutoModelForCausalLM`` returns, or a wrapper of it. Its head must be a plain ``nn.Linear``.
        input_ids: padded ``[S, T]`` (with ``attention_mask``), packed ``[N]`` with ``cu_seqlens``, a list of 1-D tensors or
            lists of ints, or :class:`PackedSequences`. Sequences of no or one token are fine.
        attention_mask, cu_seqlens, labels, prompt_lengths, ignore_index: as in :func:`logitless.pack`: ``labels`` are not
            shifted; without ``labels`` and ``prompt_lengths`` every token but the first of each sequence is scored. Not with
            :class:`PackedSequences`, which has its own.
        position_ids: like ``input_ids``, for positions that do not start at 0 in each sequence.
        head: logit scale, soft-cap and temperature; default ``HeadSpec.from_config(model.config)``.
        temperature: divides the logits, in place of the head's.
        outputs: which fields of the result to compute, of :data:`logitless.OUTPUTS`.
        shifted: ``True``: align the results with shifted labels, that is with the token before, which predicts; losses take
            them so. ``None``: as the input's labels are, so shifted for :class:`PackedSequences` alone.
        padding_free: ``True``: one row, or an error where that would be wrong; ``False``: a right-padded batch; ``None``:
            whichever is right and costs less. The choice is logged at DEBUG.
        model_kwargs: further arguments of the model's forward, passed on as they are.

    Returns:
        TokenStats: each ``[S, T]`` for padded ids, else ``[N]``, aligned (unless shifted) with the token itself as Hugging
        Face and TRL do: entry t belongs to the distribution that token t was drawn from. 0 at the first token of each
        sequence, where not scored, and at padding. Differentiable with respect to the model's parameters.

    Raises:
        TypeError, ValueError: naming the argument; for a head that is not a plain linear layer (LoRA on ``lm_head``,
            quantised), prompt-learning PEFT methods, an encoder-decoder, a compiled model (compile its decoder instead:
            ``model.model.compile()``), or ``padding_free=True`` where the model or the position ids do not allow it.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2))
        >>> stats = model_logps(model, [[5, 6, 7, 8], [9, 10]], prompt_lengths=[2, 0])
        >>> (stats.logps != 0).tolist()
        [False, False, True, True, False, True]
    """
    wanted = check_outputs(outputs)
    if shifted not in (True, False, None):
        raise TypeError(f"shifted must be True, False or None, got {shifted!r}")
    shifted = isinstance(input_ids, PackedSequences) if shifted is None else shifted
    packed, layout = _packed(input_ids, attention_mask, cu_seqlens, labels, prompt_lengths, ignore_index)
    if position_ids is None and isinstance(input_ids, PackedSequences):
        position_ids = input_ids.position_ids
    positions = None if position_ids is None else _positions(position_ids, packed, layout)

    def score(at: HeadCall) -> TokenStats:
        labels = at.labels.to(at.weight.device)
        stats = linear_logps(at.hidden.to(at.weight.device), at.weight, labels, at.bias, at.head, wanted, packed.ignore_index)
        return TokenStats(**{name: _of_tokens(getattr(stats, name), at.where, layout, shifted) for name in wanted})

    options: dict[str, Any] = {
        "head": head,
        "temperature": temperature,
        "padding_free": padding_free,
        "model_kwargs": model_kwargs,
    }
    result: TokenStats = _run(model, packed, layout.bounds, positions, score, **options)
    return result


class HeadCall(NamedTuple):
    """What there is where a model calls its head. P positions in the shape in which the model ran."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    head: HeadSpec
    labels: Tensor  # (...), shifted
    where: Tensor  # (N,) the flat position of each packed token


def run_packed(model: nn.Module, packed: PackedSequences, score: Callable[[HeadCall], Any], **options: Any) -> Any:
    """What ``score`` makes of a model's run on packed sequences; ``options`` as those of :func:`_run`."""
    checked, layout = _packed(packed, None, None, None, None, -100)
    return _run(model, checked, layout.bounds, _positions(packed.position_ids, checked, layout), score, **options)


def _run(
    model: nn.Module,
    packed: PackedSequences,
    bounds: list[int],
    positions: Tensor | None,  # (N,), where they are not the usual ones
    score: Callable[[HeadCall], Any],
    *,
    head: HeadSpec | None,
    temperature: float | None,
    padding_free: bool | None,
    model_kwargs: Mapping[str, Any],
) -> Any:
    """Run the model in the way that is right and costs less, and ``score`` in place of its head."""
    if padding_free not in (True, False, None):
        raise TypeError(f"padding_free must be True, False or None, got {padding_free!r}")
    for name in _NOT_FOR_THE_MODEL:
        if name in model_kwargs:
            raise ValueError(f"{name} is not to be given: what the model gets for it is decided here")
    lm = causal_lm(model)
    if unknown := model_kwargs.keys() - inspect.signature(type(lm).forward).parameters.keys() - _UNNAMED:
        # most models take any name, and drop what they do not know
        raise TypeError(f"{type(lm).__name__}.forward takes no argument {', '.join(sorted(unknown))}")
    spec = _spec(lm, head, temperature)
    reasons = _why_not(model, lm, padding_free, packed, bounds, positions is not None)
    log.debug("packed sequences: %s", f"right-padded batch: {'; '.join(reasons)}" if reasons else "one padding-free row")

    if reasons:
        if wrong := _known(model, lm, _probe_padded):
            raise ValueError(f"model cannot be used: {'; '.join(wrong)}")
        inputs, targets, where = _right_padded(lm, packed, positions)
    else:
        inputs = packed.model_inputs(flash_attention=_takes_bounds(lm))
        assert packed.labels is not None
        targets, where = packed.labels[None], torch.arange(len(packed.input_ids), device=packed.input_ids.device)
    if not len(packed.input_ids):
        # The model still runs, on one token that is not scored: ranks stay in step, and the result has a gradient, of 0.
        inputs, targets = {"input_ids": where.new_zeros(1, 1)}, where.new_full((1, 1), packed.ignore_index)

    def call(hidden: Tensor) -> Any:
        if hidden.shape[:-1] != targets.shape:
            raise ValueError(
                f"model must hand its head one hidden state a token, {tuple(targets.shape)}, got {tuple(hidden.shape[:-1])}"
            )
        return score(HeadCall(hidden, *_weights(lm), spec, targets, where))

    return _at_the_head(model, lm, {**inputs, **model_kwargs}, call)


def why_not_padding_free(model: nn.Module) -> list[str]:
    """Every reason why a model cannot take several sequences in one row of tokens; empty when it can.

    Looked at: whether its forward pass takes position ids, its attention implementation (``eager``, ``sdpa``,
    ``flex_attention``, ``*flash*`` or ``*varlen*``), whether it keeps a recurrent state, and ``layer_types`` of its config.
    That is not enough, since some models that pass all of it drop the position ids on the way to the mask. So the model is also
    tried out: two sequences of eight tokens in one row must give the hidden states that they give alone, whatever tokens
    the other one has. This costs five forward passes without gradients, in evaluation mode, the first time that a model is
    seen with an attention implementation.

    Raises:
        TypeError, ValueError: as :func:`model_logps` does, for a model that it cannot run.

    Example:
        >>> from transformers import BloomConfig, BloomForCausalLM
        >>> why_not_padding_free(BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=16, n_layer=1, n_head=2)))
        ['BloomForCausalLM.forward takes no position_ids']
    """
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    reasons = []
    name = type(lm).__name__
    if not _takes_positions(lm):
        reasons.append(f"{name}.forward takes no position_ids")
    attention = _attention(lm)
    if attention not in _MASKED and not _takes_bounds(lm):
        reasons.append(f"attention implementation {attention!r} is not known to tell sequences apart")
    if getattr(lm, "_is_stateful", False):
        reasons.append(f"{name} keeps a recurrent state, which runs on from one sequence into the next")
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - _LAYERS):
        reasons.append(f"config.layer_types has {', '.join(others)}: only attention layers tell sequences apart")
    if reasons:
        return reasons
    return _known(model, lm, _probe_row)


def causal_lm(model: nn.Module) -> Any:
    """The ``transformers`` causal language model inside of wrappers (PEFT, DistributedDataParallel and the like)."""
    lm: Any = model
    while isinstance(lm, nn.Module) and not hasattr(lm, "get_output_embeddings") and hasattr(lm, "module"):
        lm = lm.module
    if not isinstance(lm, nn.Module) or not hasattr(lm, "get_output_embeddings") or not hasattr(lm, "config"):
        raise TypeError(f"model must be a transformers causal language model, got {type(lm).__name__}")
    if callable(get_base_model := getattr(lm, "get_base_model", None)):
        adapter: Any = lm.active_peft_config
        if adapter.is_prompt_learning:
            raise ValueError(
                f"model has a prompt-learning adapter ({adapter.peft_type}), which adds tokens of its own: model_logps serves "
                "adapters that keep the tokens, such as LoRA"
            )
        lm = get_base_model()
    if getattr(lm.config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a causal language model, got the encoder-decoder {type(lm).__name__}")
    for part in (model, lm, lm.get_output_embeddings()):
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "model is compiled together with its head, which cannot be left out then: compile the decoder alone, as in "
                "model.model.compile()"
            )
    _head_weight(lm)
    return lm


def _spec(lm: Any, head: HeadSpec | None, temperature: float | None) -> HeadSpec:
    if head is None:
        return HeadSpec.from_config(lm.config, 1.0 if temperature is None else temperature)
    spec = check_spec(head)
    if temperature is None:
        return spec
    if spec.temperature not in (1.0, temperature):
        raise ValueError(f"temperature={temperature!r} contradicts head.temperature={spec.temperature!r}: pass one of them")
    return spec.with_temperature(temperature)


def _packed(
    input_ids: Any, attention_mask: Any, cu_seqlens: Any, labels: Any, prompt_lengths: Any, ignore_index: int
) -> tuple[PackedSequences, Layout]:
    """The sequences end to end, and how the caller laid them out."""
    if not isinstance(input_ids, PackedSequences):
        ids, layout = lay_out(input_ids, attention_mask, cu_seqlens, name="input_ids")
        return make_pack(ids, layout, labels, prompt_lengths, ignore_index), layout
    given = {
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
        "labels": labels,
        "prompt_lengths": prompt_lengths,
    }
    if extra := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{', '.join(extra)}: input_ids is a PackedSequences, which has its own; give them to pack instead")
    if ignore_index not in (-100, input_ids.ignore_index):
        raise ValueError(f"ignore_index={ignore_index} contradicts that of input_ids, {input_ids.ignore_index}")
    ids, layout = lay_out(input_ids.input_ids, None, input_ids.cu_seqlens, name="input_ids")
    packed = make_pack(ids, layout, ignore_index=input_ids.ignore_index)
    if (labels := input_ids.labels) is not None:
        last = torch.tensor([b - 1 for a, b in itertools.pairwise(layout.bounds) if b > a], dtype=torch.long)
        if bool((labels[last.to(labels.device)] != packed.ignore_index).any()):
            raise ValueError("input_ids.labels must be ignore_index at the last token of each sequence, which predicts none")
        packed = replace(packed, labels=labels)
    return packed, layout


def _positions(position_ids: Any, packed: PackedSequences, layout: Layout) -> Tensor | None:
    """The caller's positions, (N,); ``None`` where they are the usual ones."""
    positions = layout.flatten("position_ids", position_ids)
    inside = packed.position_ids[1:] > 0
    if bool((inside & (positions.diff() != 1)).any()):
        raise ValueError("position_ids must rise by 1 from token to token of a sequence")
    return positions if bool((positions != packed.position_ids).any()) else None


def _attention(lm: Any) -> str:
    return str(lm.config.get_text_config()._attn_implementation)


def _takes_positions(lm: Any) -> bool:
    return "position_ids" in inspect.signature(type(lm).forward).parameters


def _why_not(
    model: nn.Module,
    lm: Any,
    padding_free: bool | None,
    packed: PackedSequences,
    bounds: list[int],
    other_positions: bool,
) -> list[str]:
    """Why this call is not to run as one row; empty when it is."""
    if padding_free is False:
        return ["padding_free=False"]
    if other_positions:  # transformers would take 5, 6, 7 | 8, 9 for one sequence
        reasons = ["position_ids do not start at 0 in each sequence, by which models tell them apart"]
    else:
        reasons = why_not_padding_free(model)
    if reasons and padding_free:
        raise ValueError(f"padding_free=True cannot be had: {'; '.join(reasons)}. Pass None or False for a right-padded batch")
    if reasons or padding_free or _attention(lm) not in ("eager", "sdpa"):
        return reasons
    sizes = [b - a for a, b in itertools.pairwise(bounds) if b > a]
    width = _head_weight(lm)[0].shape[1]
    one, batch = _row_cost(1, bounds[-1], width), _row_cost(len(sizes), packed.max_seqlen, width)
    return [f"a row of {bounds[-1]} tokens costs {one / batch:.1f} times the padded batch"] if one > batch else []


def _takes_bounds(lm: Any) -> bool:
    """Whether the attention implementation takes the sequences' bounds, by its name: a registered one may be of that kind."""
    return "flash" in _attention(lm) or "varlen" in _attention(lm)


def _row_cost(rows: int, tokens: int, width: int) -> int:
    """FLOP of a decoder layer over ``rows`` of ``tokens`` with every entry of the attention computed, / (4 * width).

    24 * width ** 2 a token for projections and a 4 * width feed-forward, 4 * width an entry of the attention.
    """
    return rows * tokens * (6 * width + tokens)


def _right_padded(
    lm: Any,
    packed: PackedSequences,
    positions: Tensor | None,  # (N,), where they are not the usual ones
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The model's inputs, shifted labels of their shape, and the place of each token in it, (N,). Empty rows are left out."""
    if positions is not None and not _takes_positions(lm):
        raise ValueError(f"position_ids: {type(lm).__name__}.forward takes none")
    compact = packed.cu_seqlens.unique_consecutive()
    pad = getattr(lm.config.get_text_config(), "pad_token_id", None)

    def padded(values: Tensor, value: int) -> Tensor:
        result = unpack(values, compact, padded=True, padding_value=value)
        assert isinstance(result, Tensor)
        return result

    assert packed.labels is not None
    mask = padded(torch.ones_like(packed.input_ids), 0)
    inputs: dict[str, Any] = {
        # roberta-like models count positions by the pad token
        "input_ids": padded(packed.input_ids, pad if isinstance(pad, int) and pad >= 0 else 0),
        "attention_mask": mask,
    }
    if positions is not None:
        inputs["position_ids"] = padded(positions, 0)
    return inputs, padded(packed.labels, packed.ignore_index), mask.reshape(-1).nonzero()[:, 0]


def _of_tokens(values: Tensor, where: Tensor, layout: Layout, shifted: bool) -> Tensor:
    """Results at the positions that predict, as run, moved to the tokens that they predict, as the caller laid them out."""
    flat = values.reshape(-1).to(where.device)[where]
    if shifted:
        return layout.unflatten(flat)
    # what the last token of a sequence predicts is 0, and so becomes the first token of the next one's
    return layout.unflatten(torch.cat((flat.new_zeros(min(1, len(flat))), flat[:-1])))


def _head_weight(lm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (V, H) and bias (V,) of the head, once it is known to be ``hidden @ weight.T + bias`` and nothing else."""
    head = lm.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have a head, but {type(lm).__name__}.get_output_embeddings() is None")
    linear = head
    while not isinstance(linear, nn.Linear):  # PEFT's wrappers, told by names that neither torch nor transformers has
        off = getattr(linear, "disable_adapters", False) or not getattr(linear, "active_adapters", [])
        copies = getattr(linear, "modules_to_save", None)
        if not off and isinstance(copies, nn.ModuleDict):
            linear = copies[linear.active_adapters[0]]
            continue
        inner = getattr(linear, "base_layer" if hasattr(linear, "base_layer") else "original_module", None)
        if not isinstance(inner, nn.Module) or not (off or getattr(linear, "merged", False)):
            break
        linear = inner
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise ValueError(
            f"model's head must be an nn.Linear, got {type(linear).__module__}.{type(linear).__name__}; an adapter on the head "
            "must be merged, or left out of target_modules (modules_to_save=['lm_head'] trains it whole)"
        )
    if hasattr(linear.weight, "ds_id"):  # gone again when the backward pass asks for it
        raise ValueError("model's head is sharded by DeepSpeed ZeRO-3, which model_logps does not serve: use stage 1 or 2")
    return linear.weight, linear.bias


def _weights(lm: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = _head_weight(lm)
    # FSDP2 shards parameters as DTensors, whose gradient finds its way back through full_tensor
    return _full(weight), None if bias is None else _full(bias)


def _full(parameter: Tensor) -> Tensor:
    full_tensor = getattr(parameter, "full_tensor", None)
    return parameter if full_tensor is None else full_tensor()


def _at_the_head(model: nn.Module, lm: Any, inputs: dict[str, Any], score: Callable[[Tensor], Any]) -> Any:
    """What ``score(hidden)`` makes of what the model hands its head, which itself gets no rows to work on.

    A hook on the head, and not a call of the decoder: so wrappers of the model do their work, what a model does to its
    hidden states before the head is done, and autocast is on or off as it is for the head.
    """
    results: list[Any] = []
    owner, scoring = threading.get_ident(), False

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal scoring
        if threading.get_ident() != owner or scoring:  # what ``score`` runs the model for has a hook of its own
            return None
        hidden, *rest = args
        scoring = True
        try:
            results.append(score(hidden))
        finally:
            scoring = False
        return (hidden[..., :0, :], *rest)

    handle = lm.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        model(**inputs, use_cache=False)  # with a cache, transformers does not tell packed sequences apart
    finally:
        handle.remove()
    if len(results) != 1:
        raise ValueError(f"model must call its head once in a forward pass, but {type(lm).__name__} did {len(results)} times")
    return results[0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _known(model: nn.Module, lm: Any, probe: Callable[[nn.Module, Any], list[str]]) -> list[str]:
    """What a probe finds about a model, found once."""
    known = _probed.setdefault(lm, {})
    key = (_attention(lm), probe.__name__)
    if key not in known:
        with torch.no_grad(), _evaluating(model):
            known[key] = probe(model, lm)
    return list(known[key])


def _probe_ids(lm: Any, count: int) -> Tensor:
    """Token ids (count, _PROBE_TOKENS)."""
    vocab = lm.config.get_text_config().vocab_size
    ids = torch.arange(count * _PROBE_TOKENS, device=lm.get_input_embeddings().weight.device)
    return ((ids * 7 + vocab // 3) % vocab).view(count, _PROBE_TOKENS)


def _states(model: nn.Module, lm: Any, inputs: dict[str, Any]) -> Tensor:
    """What the model hands its head, (S, T, H) float64."""
    states: Tensor = _at_the_head(model, lm, inputs, lambda hidden: hidden).double()
    if not bool(states.isfinite().all()):
        raise ValueError("model cannot be tried out: its hidden states are not finite, so its weights may not be either")
    return states


def _change(a: Tensor, b: Tensor) -> float:
    """The most that a hidden state differs. Each (..., H)."""
    return float((a - b).norm(dim=-1).max())


def _probe_row(model: nn.Module, lm: Any) -> list[str]:
    """Whether two short sequences in one row get the hidden states that they get alone."""
    n = _PROBE_TOKENS
    first, other, second = _probe_ids(lm, 3)
    alone, joined = torch.arange(n, device=second.device), torch.arange(2 * n, device=second.device)
    bounds = torch.tensor([0, n, 2 * n], dtype=torch.int32, device=second.device)

    def packed(before: Tensor) -> Tensor:
        pack = PackedSequences(torch.cat((before, second)), alone.repeat(2), bounds, n)
        return _states(model, lm, pack.model_inputs(flash_attention=_takes_bounds(lm)))[0, n:]

    def continued(before: Tensor) -> Tensor:
        ids = torch.cat((before, second))
        return _states(model, lm, {"input_ids": ids[None], "position_ids": joined[None]})[0, n:]

    by_itself = _states(model, lm, {"input_ids": second[None], "position_ids": alone[None]})[0]
    row, scale = packed(first), _change(continued(first), continued(other))
    name = f"{type(lm).__name__} with {_attention(lm)} attention"
    # written so that NaN, and a model in which context changes nothing, are reasons
    if not _change(row, packed(other)) < _LEAK * scale:
        return [f"{name} lets the sequences of one row see each other (or does not react to context at all)"]
    if not _change(row, by_itself) < _DIFFERENCE * scale:
        return [f"{name} gives the sequences of one row other hidden states than alone"]
    return []


def _probe_padded(model: nn.Module, lm: Any) -> list[str]:
    """Whether neither padding to its right nor later tokens change the hidden states of a sequence."""
    (ids,) = _probe_ids(lm, 1)
    short = ids[: _PROBE_TOKENS // 2]
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[1, len(short) :] = 0
    alone = _states(model, lm, {"input_ids": short[None], "attention_mask": torch.ones_like(short)[None]})[0]
    later, padded = _states(model, lm, {"input_ids": ids.repeat(2, 1), "attention_mask": mask})[:, : len(short)]
    limit = _DIFFERENCE * float((alone - alone.mean(0)).norm(dim=-1).max())
    if not _change(later, alone) <= limit:
        return [f"{type(lm).__name__} is not causal: later tokens change the hidden states of earlier ones"]
    if not _change(padded, alone) <= limit:
        return [f"{type(lm).__name__} gives sequences with padding to their right other hidden states than alone"]
    return []
