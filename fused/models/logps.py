"""Per-token log-probabilities of a Hugging Face causal language model, without padding and without vocabulary logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from logitless.kernels.core.checks import check_outputs
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.stats import TokenStats
from logitless.kernels.linear_logps import linear_logps

from .layout import Layout, TokenSequences, lay_out
from .packing import PackedSequences, make_pack
from .runner import HeadCall, Placed, RunOptions, place, place_packed, run_packed


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
    """Log-probability of each token given the tokens before it, under a Hugging Face causal language model.

    The model runs up to its head. The head's input goes to :func:`logitless.linear_logps`, which multiplies only the scored
    positions by the head's weight. Autocast, gradient checkpointing, ``DistributedDataParallel`` and PEFT adapters work as in
    an ordinary forward pass.

    **Padding-free.** The sequences are laid end to end in one row, without an attention mask and with position ids that start
    at 0 in each sequence, from which transformers tells the sequences apart. ``*flash*`` and ``*varlen*`` attention also get
    ``cu_seq_lens_q/k`` and ``max_length_q/k``. With some models, sequences in one row silently attend to each other: recurrent
    and convolutional layers, and models that do not pass position ids to their mask (Bloom, OPT, GPT-OSS and AFMoE in
    transformers 5.23). Each model is therefore checked and probed once, with 16 tokens, before it runs this way
    (:func:`logitless.models.why_not_padding_free`). A model that fails runs on a right-padded batch, which is probed once as
    well. Whatever the layout, the model is probed once for causality. ``"dynamic"`` and ``"longrope"`` position scaling depend
    on the longest sequence of a batch; in one row they apply to all of its sequences. With ``sdpa`` and ``eager`` attention,
    the mask of one row of N tokens has N * N entries; unless asked for, these run padding-free only where that costs less
    than padding.

    **Images, and other arguments.** Values per token (``token_type_ids``, ``mm_token_type_ids``, ``cross_attention_mask`` ...,
    or any tensor whose shape follows ``input_ids``) are given in the layout of ``input_ids``, also as a list or packed, and are
    laid out anew with the ids. Data of images or of whole sequences (``pixel_values``, ``image_grid_thw``,
    ``encoder_hidden_states``, ``adapter_names`` ...) are passed on unchanged, in the order of the sequences, and make the model
    run on a right-padded batch without position ids, so that it derives the positions of images (M-RoPE) itself. The first
    such batch also serves as the probe, which costs four forward passes without gradients.

    Args:
        model: the result of ``AutoModelForCausalLM``, or a wrapper of it. Its head must be an ``nn.Linear``, plain or quantised
            (torchao int8 or float8 weight-only, bitsandbytes ``Linear4bit`` or ``Linear8bitLt``, whose input is not quantised
            here), with or without LoRA adapters on it.
        input_ids: padded ``[S, T]`` (with ``attention_mask``), packed ``[N]`` with ``cu_seqlens``, a list of 1-D tensors or
            lists of ints, or :class:`PackedSequences`. Sequences may have no or one token.
        attention_mask, cu_seqlens, labels, prompt_lengths, ignore_index: as in :func:`logitless.pack`: ``labels`` are not
            shifted; without ``labels`` and ``prompt_lengths`` every token but the first of each sequence is scored. Not
            allowed with :class:`PackedSequences`, which has its own.
        position_ids: like ``input_ids``, for positions that do not start at 0 in each sequence.
        head: logit scale, soft-cap, temperature and entries; default :meth:`HeadSpec.from_model`, measured once per model. One
            that contradicts the model's own logits is an error; the temperature is free.
        temperature: divides the logits, in place of the head's.
        outputs: which fields of the result to compute, of ``logitless.kernels.core.stats.OUTPUTS``.
        shifted: ``True``: align the results with shifted labels, that is with the position that predicts the token, as loss
            modules take them. ``None``: aligned as the labels of the input are, so shifted only for :class:`PackedSequences`.
        padding_free: ``True``: one row, or an error where that would be wrong; ``False``: a right-padded batch; ``None``:
            the correct one that costs less. The choice is logged at DEBUG.
        model_kwargs: further arguments of the model's forward: values per token in the layout of ``input_ids``, others
            unchanged.

    Returns:
        TokenStats: each ``[S, T]`` for padded ids, else ``[N]``, aligned (unless shifted) with the token itself, as in Hugging
        Face and TRL: entry t belongs to the distribution that token t was drawn from. 0 at the first token of each
        sequence, at positions that are not scored, and at padding. Differentiable in the model's parameters.

    Raises:
        TypeError, ValueError: naming the argument; for a head that is no linear layer or has an adapter other than plain LoRA
            (DoRA, IA3, ``trainable_token_indices`` ...), prompt-learning PEFT methods, an encoder-decoder, a compiled model
            (compile its decoder instead: ``model.model.compile()``), a model that is not causal, a required argument of the
            model's forward that is missing, values per token in another layout than ``input_ids``, a head that Accelerate
            offloads and that needs a gradient, logits that no :class:`HeadSpec` describes (Chameleon masks image tokens), or
            ``padding_free=True`` where the model, its arguments or the position ids do not allow it.

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
    sequences = _place(input_ids, attention_mask, cu_seqlens, position_ids, labels, prompt_lengths, ignore_index)
    ignored, layout = sequences.packed.ignore_index, sequences.layout

    def score(at: HeadCall) -> TokenStats:
        labels = at.labels.to(at.weight.device)
        stats = linear_logps(at.hidden.to(at.weight.device), at.weight, labels, at.bias, at.head, wanted, ignored)
        return TokenStats(**{name: _of_tokens(getattr(stats, name), at.where, layout, shifted) for name in wanted})

    result: TokenStats = run_packed(model, sequences, score, RunOptions(head, temperature, padding_free, model_kwargs))[0]
    return result


def _place(
    input_ids: Any,
    attention_mask: Any,
    cu_seqlens: Any,
    position_ids: Any,
    labels: Any,
    prompt_lengths: Any,
    ignore_index: int,
) -> Placed:
    """The sequences end to end, and how the caller laid them out."""
    if not isinstance(input_ids, PackedSequences):
        ids, layout = lay_out(input_ids, attention_mask, cu_seqlens, name="input_ids")
        return place(make_pack(ids, layout, labels, prompt_lengths, ignore_index), layout, position_ids)
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
    return place_packed(input_ids, position_ids)


def _of_tokens(values: Tensor, where: Tensor, layout: Layout, shifted: bool) -> Tensor:
    """Results at the predicting positions, in the order of the run, moved to the predicted tokens in the caller's layout."""
    flat = values.reshape(-1).to(where.device)[where]
    if shifted:
        return layout.unflatten(flat)
    # the value at the last token of a sequence is 0, and becomes that of the next sequence's first token
    return layout.unflatten(torch.cat((flat.new_zeros(min(1, len(flat))), flat[:-1])))
