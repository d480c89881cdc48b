"""The model, reference, TRL trainer and optimizer of a case, which all of its arms share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import logitless as ll

from ..core.cases import IGNORE
from ..core.inputs import LOG_RATIOS
from .attention import PADDED, VARLEN, in_one_row, register
from .batches import Batch, Data
from .cases import TrainCase
from .methods import METHODS
from .models import lora_config, make_model, move_away

#: Elements of a block of float64 logits.
_BLOCK = 64 << 20
_MAX_GRAD_NORM = 1.0


class Workbench:
    """One case, prepared. It holds everything that exists between steps.

    Attributes:
        model: the policy, within PEFT's wrapper where the case has adapters. base: the causal language model in it.
        reference: a separate model; ``None`` where there is none, or where it is the policy without adapters.
        parameters: those that are trained.
    """

    def __init__(self, case: TrainCase, device: torch.device, *, learning_rate: float = 0.0) -> None:
        self.case, self.device, self.method = case, device, METHODS[case.method]
        options: dict[str, Any] = {"tiny": case.tiny, "attention": PADDED, "seed": case.seed}
        peft = lora_config(case.model)
        policy = make_model(case.model, device, case.weights_dtype, **options)
        self.reference = None
        models: dict[str, Any] = {"model": policy}
        if peft is not None:
            models["peft_config"] = peft
        else:
            move_away(policy, case.seed)
        if self.method.reference and peft is None:
            self.reference = make_model(case.model, device, case.weights_dtype, **options).requires_grad_(False).eval()
            models["ref_model"] = self.reference
        torch.manual_seed(case.seed)  # of the adapters
        self.trainer = self.method.trainer(device, 2 * case.pairs, **models)
        self.trainer.current_gradient_accumulation_steps = 1  # set by the training loop, which does not run here
        self.model = self.trainer.model.to(device).train()
        self.base = self.model.get_base_model() if peft is not None else self.model
        if case.checkpointing:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
            if peft is not None:
                self.base.enable_input_require_grads()
        if case.compiled:
            self.base.model.compile()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        fused = device.type == "cuda"
        # With a learning rate of 0 the optimizer's step takes its time and leaves the weights as they are.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0, fused=fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=case.autocast_dtype == torch.float16)
        self.head, self.module = ll.HeadSpec.from_model(self.model, at="backbone"), self.method.module()
        self.vocab: int = self.base.config.vocab_size
        #: Whether logitless's arms run sequences in one row (the arm sets it), and the attention for that.
        self.in_one_row = False
        self.packed_attention = case.attention or in_one_row(device)
        if self.packed_attention == VARLEN:
            register()

    def use_attention(self, name: str) -> None:
        """Set the attention of the policy and the reference."""
        for model in (self.base, self.reference):
            if model is not None and model.config._attn_implementation != name:
                model.set_attn_implementation(name)

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = self.case.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    @contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The model to run as the reference, without gradients."""
        apart = self.reference is not None
        with torch.no_grad(), nullcontext() if apart else self.model.disable_adapter():
            yield self.reference if apart else self.model

    def _sums(self, model: nn.Module, packed: ll.PackedSequences) -> Tensor:
        """(S,) log-probs of sequences, in one row or padded."""

        def sums(at: ll.models.AtHead) -> Tensor:
            return ll.sequence_logps(at.hidden, at.weight, at.labels, at.bias, at.head, cu_seqlens=at.cu_seqlens)

        return ll.at_head(model, packed, sums, padding_free=self.in_one_row)

    def _reference_sums(self, packed: ll.PackedSequences) -> Tensor:
        with self.as_reference() as model:
            return self._sums(model, packed)

    def module_arguments(self, data: Data) -> dict[str, Any]:
        """Arguments of the loss module besides packed hidden states, weight and labels."""
        found: dict[str, Any] = {}
        if self.method.kl:
            with torch.no_grad():
                ratios = self._sums(self.model, data.packed_kl) - self._reference_sums(data.packed_kl)
            found |= {"desirable": data.desirable, "kl": ratios.mean()}
        if self.method.reference:
            found["ref_logps"] = self._reference_sums(data.packed)
        if self.method.every_token:
            found["nll_labels"] = data.every_label
        if self.method.rollouts:
            old_logps = torch.cat([row[:n] for row, n in zip(data.old_logps, data.batch.lengths, strict=True)])
            found |= {"advantages": data.advantages, "old_logps": old_logps}
        return found

    def data(self, batch: Batch, *, exact: bool) -> Data:
        """The tensors of a batch. ``exact``: also those of the exact step, which take a few forward passes.

        Rollouts come from the current policy.
        """
        device, g = self.device, torch.Generator().manual_seed(self.case.seed)
        ids, mask, labels = batch.padded(device)
        kl = batch.rotated()
        every_label = ll.pack(batch.sequences).labels
        assert every_label is not None
        data = Data(
            batch=batch,
            packed=ll.pack(batch.sequences, prompt_lengths=batch.prompt_lengths).to(device),
            packed_kl=ll.pack(kl.sequences, prompt_lengths=kl.prompt_lengths).to(device),
            every_label=every_label.to(device),
            ids=ids,
            mask=mask,
            labels=labels,
            desirable=torch.arange(len(batch), device=device) < len(batch) // 2,
            advantages=torch.randn(len(batch), generator=g).to(device),
            old_logps=torch.zeros(ids.shape, device=device),
        )
        if self.method.rollouts:
            self.use_attention(PADDED)
            drawn = torch.randint(len(LOG_RATIOS), tuple(ids.shape), generator=g)
            with torch.no_grad(), self.autocast():
                now = ll.model_logps(self.model, data.packed, padding_free=False).logps
            logps = torch.zeros(ids.shape, device=device)
            logps[mask != 0] = now.float()
            shifted = torch.zeros_like(mask, dtype=torch.bool)
            shifted[:, :-1] = data.scored
            data.old_logps = torch.where(shifted, logps - torch.tensor(LOG_RATIOS)[drawn].to(device), 0)
        if exact and self.method.reference:
            with self.as_reference() as model:
                data.exact_ref = self.exact_logps(model, data.ids, data.mask, data.labels).sum(-1)
            if self.method.kl:
                arguments = kl.padded(device)
                with torch.no_grad():
                    ours = self.exact_logps(self.model, *arguments).sum(-1)
                with self.as_reference() as model:
                    data.exact_kl = (ours - self.exact_logps(model, *arguments).sum(-1)).mean()
        data.trl = self.method.inputs(self.trainer, batch, data)
        return data

    def exact_logps(self, model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Log-probs (S, T - 1) by a float64 head on the model's own hidden states, differentiable, 0 at ``IGNORE``."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        with self.autocast():
            hidden = base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        chosen = targets != IGNORE
        weight = self.base.get_output_embeddings().weight.double()

        def score(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
            logps = ll.reference_logps(x.double(), w, y, head=self.head).logps
            assert logps is not None
            return logps

        rows = max(1, _BLOCK // len(weight))
        parts = zip(hidden[chosen].split(rows), targets[chosen].split(rows), strict=True)
        values = torch.cat([checkpoint(score, x, weight, y, use_reentrant=False) for x, y in parts])
        return torch.zeros(targets.shape, dtype=values.dtype, device=values.device).masked_scatter(chosen, values)

    def exact_loss(self, data: Data) -> Tensor:
        """The loss by the exact head, in float64."""
        labels = data.ids.masked_fill(data.mask == 0, IGNORE) if self.method.every_token else data.labels
        return self.method.exact(self.exact_logps(self.model, data.ids, data.mask, labels), data)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def gradients(self) -> dict[str, Tensor]:
        """Unscaled gradients of the trained parameters, removed from the model; parameters without one are left out."""
        scale = self.scaler.get_scale()
        found = {n: p.grad.div_(scale) for n, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        return found

    def update(self) -> None:
        """Clip, step, and drop the gradients."""
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, _MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
