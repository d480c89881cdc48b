"""The GRPO family agrees with TRL 1.16's own ``GRPOTrainer._compute_loss``: value, gradients and the metrics of one name.

The trainer is a real one. For most tests it gets log-probabilities and entropies from a float64 log-softmax over the same
hidden states, so that what is compared is the loss, to 1e-12; one test runs TRL's own head on a model's own hidden states.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll
from logitless.fused.policy.importance import importance_sampling_ratio
from logitless.fused.policy.losses.grpo import GRPO_LOSSES

from ..helpers import relative_error
from ..integrations.tiny import VOCAB
from .trl_trainer import CLIPPED, LENGTHS, SEQUENCES, TOKENS, Given, compare, configured, make, run_ours, run_trl, trl

EVERY_BACKEND = True

#: A mean over sequences in TRL, whatever their lengths, and over those without tokens too.
OF_SEQUENCES = (
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_max",
    "cispo_clip_ratio",
    "vespo/phi_seq_mean",
)
LENGTH = {"dr_grpo": {"max_completion_length": 11}}
every_loss = pytest.mark.parametrize("loss_type", GRPO_LOSSES)
clipped_losses = pytest.mark.parametrize("loss_type", CLIPPED)


def without_of(loss_type: str, level: str = "token") -> tuple[str, ...]:
    return OF_SEQUENCES if level == "sequence" or loss_type == "vespo" else ()


def test_the_batch_has_what_the_options_are_about():
    batch = make()
    logps = batch.logps_and_entropies()[0]
    ratios = (logps - batch.old_logps).exp()[batch.mask == 1]
    assert all(((low < ratios) & (ratios < high)).sum() >= 3 for low, high in ((0.0, 0.8), (0.8, 1.2), (1.2, 1.6), (1.6, 9.0)))
    assert batch.mask.sum(-1).tolist() == [7, 1, 5, 0, 4, 8]


def test_every_loss_type_of_trl_is_here():
    described = trl.GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert all(f"'{name}'" in described for name in GRPO_LOSSES)
    listed = {part for part in described.split("'")[1::2] if part.islower() and " " not in part}
    assert listed - {"sequence"} == set(GRPO_LOSSES)  # a level, of which it says what it suits


@every_loss
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_types_agree_with_trl(trainer, loss_type, level, beta):
    if (loss_type, level) == ("vespo", "sequence"):  # TRL warns and ignores it
        with pytest.raises(ValueError, match="importance_sampling_level is not used"):
            ll.FusedLinearGRPOLoss(loss_type=loss_type, importance_sampling_level=level)
        return
    compare(
        trainer,
        without=without_of(loss_type, level),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        **LENGTH.get(loss_type, {}),
    )


@every_loss
def test_metrics_of_sequences_agree_with_trl_where_these_are_equally_long(trainer, loss_type):
    """Where TRL has one value a sequence it averages over sequences; metrics here are means over tokens."""
    batch = make()
    batch.completion_mask = torch.ones_like(batch.completion_mask)
    batch.tool_mask = torch.ones_like(batch.completion_mask)
    level = "token" if loss_type == "vespo" else "sequence"
    options = {"epsilon_low": 0.05, "epsilon_high": 0.1} if loss_type in CLIPPED else {}
    ours = compare(
        trainer, batch=batch, loss_type=loss_type, importance_sampling_level=level, **options, **LENGTH.get(loss_type, {})
    )
    if loss_type in CLIPPED:
        assert 0 < ours.metrics["clip_ratio/high_mean"] < ours.metrics["clip_ratio/high_max"]
    elif loss_type != "sapo":
        assert ours.metrics["cispo_clip_ratio" if loss_type == "cispo" else "vespo/phi_seq_mean"] > 0


@every_loss
def test_the_first_update_after_a_rollout_agrees_with_trl(trainer, loss_type):
    """No old log-probabilities: all ratios are 1, and their gradients are not 0."""
    ours = compare(
        trainer,
        given=Given(old=False),
        without=without_of(loss_type),
        loss_type=loss_type,
        beta=0.1,
        **LENGTH.get(loss_type, {}),
    )
    assert ours.metrics["ratio"] == 1


@every_loss
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correct", [True, False])
def test_kl_with_and_without_bias_correction_agrees_with_trl(trainer, loss_type, level, correct):
    if loss_type == "vespo":
        level = "token"
    compare(
        trainer,
        without=without_of(loss_type, level),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.7,
        use_bias_correction_kl=correct,
        **LENGTH.get(loss_type, {}),
    )


@clipped_losses
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "options",
    [
        {"epsilon_low": 0.05},
        {"epsilon_low": 0.1, "epsilon_high": 0.28},
        {"epsilon_high": 0.28, "delta": 1.3},
        {"epsilon_low": 0.0, "epsilon_high": 0.0, "delta": 2.0},
        {"epsilon_high": 0.1, "delta": 1.15, "beta": 0.2},
    ],
    ids=str,
)
def test_clip_ranges_agree_with_trl(trainer, loss_type, level, options):
    compare(
        trainer,
        without=without_of(loss_type, level),
        loss_type=loss_type,
        importance_sampling_level=level,
        **options,
        **LENGTH.get(loss_type, {}),
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("high", [0.2, 1.0, 1.4, 5.0])
def test_cispo_clips_at_trls_bound(trainer, level, high):
    compare(trainer, without=without_of("cispo", level), loss_type="cispo", importance_sampling_level=level, epsilon_high=high)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sapo_temperatures_agree_with_trl(trainer, level):
    compare(
        trainer,
        without=without_of("sapo", level),
        loss_type="sapo",
        importance_sampling_level=level,
        sapo_temperature_pos=0.6,
        sapo_temperature_neg=2.3,
    )


@pytest.mark.parametrize("token_advantages", [False, True])
@pytest.mark.parametrize("far", [1.0, 30.0])
def test_vespo_shapes_agree_with_trl(trainer, token_advantages, far):
    """``far``: log-ratios that reach the bounds of the weights' logarithms."""
    batch = make()
    logps = batch.logps_and_entropies()[0].detach()
    batch.old_logps = logps + far * (batch.old_logps - logps)
    options = {"vespo_k_pos": 1.1, "vespo_lambda_pos": 0.9, "vespo_k_neg": 0.4, "vespo_lambda_neg": 0.0}
    compare(
        trainer,
        batch=batch,
        given=Given(token_advantages=token_advantages),
        without=without_of("vespo"),
        loss_type="vespo",
        **options,
    )


@every_loss
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_advantage_for_each_token_agrees_with_trl(trainer, loss_type, level):
    level = "token" if loss_type == "vespo" else level
    compare(
        trainer,
        given=Given(token_advantages=True),
        without=without_of(loss_type, level),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.1,
        **LENGTH.get(loss_type, {}),
    )


@every_loss
@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("token_advantages", [False, True])
def test_off_policy_masks_agree_with_trl(trainer, loss_type, sampling, token_advantages):
    batch = make()
    batch.old_logps[1] += 0.9  # far from the policy, with a negative advantage
    given = Given(sampling=sampling, token_advantages=token_advantages)
    ours = compare(
        trainer,
        batch=batch,
        given=given,
        without=without_of(loss_type),
        loss_type=loss_type,
        off_policy_mask_threshold=0.02,
        beta=0.1,
        **LENGTH.get(loss_type, {}),
    )
    assert 0 < ours.metrics["off_policy_kept"] < 1


@every_loss
@pytest.mark.parametrize("quantile", [0.2, 0.37, 0.8])
@pytest.mark.parametrize("coef", [0.0, 0.05])
def test_the_quantile_of_high_entropy_agrees_with_trl(trainer, loss_type, quantile, coef):
    compare(
        trainer,
        without=without_of(loss_type),
        loss_type=loss_type,
        top_entropy_quantile=quantile,
        entropy_coef=coef,
        beta=0.1,
        **LENGTH.get(loss_type, {}),
    )


@every_loss
@pytest.mark.parametrize("as_tensor", [False, True])
def test_an_entropy_threshold_in_place_of_the_quantile_agrees_with_trl(trainer, loss_type, as_tensor):
    batch = make()
    entropies = batch.logps_and_entropies()[1].detach()[batch.mask == 1]
    threshold = torch.quantile(entropies, 1 - 0.37)
    compare(
        trainer,
        batch=batch,
        given=Given(ours={"entropy_threshold": threshold if as_tensor else threshold.item()}),
        without=without_of(loss_type),
        loss_type=loss_type,
        top_entropy_quantile=0.37,
        **LENGTH.get(loss_type, {}),
    )


@every_loss
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("coef", [0.1, -0.05])
def test_the_entropy_bonus_agrees_with_trl(trainer, loss_type, level, coef):
    level = "token" if loss_type == "vespo" else level
    compare(
        trainer,
        without=without_of(loss_type, level),
        loss_type=loss_type,
        importance_sampling_level=level,
        entropy_coef=coef,
        **LENGTH.get(loss_type, {}),
    )


@every_loss
@pytest.mark.parametrize("shape", ["token", "sequence"])
def test_ratios_of_the_rollout_engine_agree_with_trl(trainer, loss_type, shape):
    """Some are 0, as the masking modes leave them. TRL has 1 where nothing is scored, and a VESPO of token ratios only."""
    g = torch.Generator().manual_seed(5)
    size = (SEQUENCES, TOKENS) if shape == "token" else (SEQUENCES,)
    ratio = (0.4 * torch.randn(size, generator=g, dtype=torch.float64)).exp()
    if shape == "token":
        ratio[0, 1] = ratio[5, 4] = 0
        ratio = ratio.masked_fill(make().mask == 0, 1)
    elif loss_type != "vespo":
        ratio[4] = 0
    compare(
        trainer,
        given=Given(ratio=ratio),
        without=without_of(loss_type),
        loss_type=loss_type,
        beta=0.1,
        **LENGTH.get(loss_type, {}),
    )


@every_loss
@pytest.mark.parametrize(("coef", "quantile"), [(0.0, 1.0), (0.1, 1.0), (0.0, 0.37)])
def test_one_of_several_micro_batches_agrees_with_trl(trainer, loss_type, coef, quantile):
    """TRL divides by the number of micro-batches, which here are of the same size."""
    batch = make()
    tokens = float(batch.mask.sum())
    of_tokens = loss_type in ("bnpo", "dapo", "cispo", "vespo")
    items = 3 * (tokens if of_tokens else SEQUENCES)
    threshold = {}
    if quantile < 1:
        entropies = batch.logps_and_entropies()[1].detach()[batch.mask.bool()]
        threshold = {"entropy_threshold": torch.quantile(entropies, 1 - quantile)}
    two = torch.tensor([3.0 * SEQUENCES, 3 * tokens])
    for counts in (two,) if coef and not of_tokens else (items, torch.tensor(items), two):
        compare(
            trainer,
            given=Given(num_items=3 * tokens, accumulation=3, ours={"num_items_in_batch": counts, **threshold}),
            without=without_of(loss_type),
            loss_type=loss_type,
            entropy_coef=coef,
            top_entropy_quantile=quantile,
            **LENGTH.get(loss_type, {}),
        )


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_num_items_in_batch_agrees_with_trl(trainer, loss_type):
    compare(
        trainer,
        given=Given(num_items=171.0, ours={"num_items_in_batch": 171}),
        without=without_of(loss_type),
        loss_type=loss_type,
        beta=0.1,
    )


# TRL computes these ratios inline, in a method that generates; its lines are copied here.


def trls_ratio(old: Tensor, sampling: Tensor, mask: Tensor, mode: str, low: float | None, high: float | None) -> Tensor:
    difference = torch.nan_to_num((old - sampling) * mask, nan=0.0)
    if mode in ("sequence_mask", "sequence_truncate"):
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = torch.exp(difference)
    if mode in ("sequence_truncate", "token_truncate"):
        return torch.clamp(ratio, min=low, max=high)
    smallest, largest = -math.inf if low is None else low, math.inf if high is None else high
    return ratio.masked_fill((ratio < smallest) | (ratio > largest), value=0.0)


MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
RANGES = [(None, 3.0), (None, 1.1), (0.8, 1.2), (0.9, None)]
modes = pytest.mark.parametrize("mode", MODES)
ranges = pytest.mark.parametrize(("low", "high"), RANGES)


@modes
@ranges
def test_importance_sampling_ratios_agree_with_trl(mode, low, high):
    batch = make()
    exact = trls_ratio(batch.old_logps, batch.sampling_logps, batch.mask, mode, low, high)
    ratio = importance_sampling_ratio(
        batch.old_logps, batch.sampling_logps, mask=batch.mask == 1, mode=mode, clip_min=low, clip_max=high
    )
    assert torch.allclose(ratio, exact[:, 0] if mode.startswith("sequence") else exact, rtol=1e-14)
    assert high == 3.0 or ((exact == 0) | (exact == low) | (exact == high)).sum() > 0
    flat = [t.flatten()[batch.completion_mask.flatten() == 1] for t in (batch.old_logps, batch.sampling_logps, batch.mask == 1)]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    packed = importance_sampling_ratio(*flat[:2], cu_seqlens=bounds, mask=flat[2], mode=mode, clip_min=low, clip_max=high)
    assert torch.equal(packed, ratio if mode.startswith("sequence") else ratio[batch.completion_mask == 1])


@modes
@ranges
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "vespo"])
def test_correction_of_rollouts_agrees_with_trl(trainer, mode, low, high, loss_type):
    batch = make()
    theirs = trls_ratio(batch.old_logps, batch.sampling_logps, batch.mask, mode, low, high)
    if mode.startswith("sequence"):
        theirs = theirs[:, 0]
    options = {"loss_type": loss_type, "beta": 0.1}
    expected = run_trl(trainer, batch, options, Given(ratio=theirs))
    mine = {
        "importance_sampling_mode": mode,
        "importance_sampling_clip_min": low,
        "importance_sampling_clip_max": high,
    }
    ours = run_ours(batch, {**options, **mine}, Given(sampling=True))
    assert ours.loss == pytest.approx(expected.loss, rel=1e-12)
    for a, b in zip(ours.gradients, expected.gradients, strict=True):
        assert relative_error(a, b) <= 1e-12


# TRL's own head, on a model's own hidden states


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "vespo"])
@pytest.mark.parametrize("coef", [0.0, 0.1])
def test_a_model_in_a_trainer_agrees_with_trl_in_float32(trainer, loss_type, coef):
    """Prompts are padded on the left; the trainer divides logits by its sampling temperature."""
    g = torch.Generator().manual_seed(3)
    prompts, completions = (torch.randint(3, VOCAB, (SEQUENCES, n), generator=g) for n in (4, TOKENS))
    prompt_mask = (torch.arange(4) >= torch.tensor([0, 2, 1, 3, 0, 1])[:, None]).long()
    batch, model = make(), trainer.model
    ids, attention = torch.cat((prompts, completions), 1), torch.cat((prompt_mask, batch.completion_mask), 1)
    head = ll.HeadSpec(temperature=trainer.temperature)
    assert trainer.temperature == 0.8
    labels = ids.clone()
    labels[:, :4] = -100
    labels[:, 4:][batch.mask == 0] = -100

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        hidden = model.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        return (hidden, *ll.shift(hidden, labels))

    with torch.no_grad():
        _, x, y = ours()
        logps = ll.linear_logps(x, model.lm_head.weight, y, head=head).logps
        noise = torch.where(y == -100, 0, 0.4 * torch.randn(y.shape, generator=g))
        old = logps + noise
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": batch.completion_mask,
        "tool_mask": batch.tool_mask,
        "advantages": batch.advantages.float(),
        "old_per_token_logps": old[:, 3:],
        "num_items_in_batch": batch.mask.sum(),
    }
    states: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        states.append(output.last_hidden_state)

    found = []
    with configured(trainer, loss_type=loss_type, entropy_coef=coef, _entropy_bonus_enabled=coef != 0, epsilon_high=0.2):
        hook = model.base_model.register_forward_hook(keep)
        try:
            for theirs in (True, False):
                model.zero_grad()
                if theirs:
                    loss = trainer._compute_loss(model, inputs)
                else:
                    _, x, y = ours()
                    high = {"epsilon_high": 0.2} if loss_type == "cispo" else {}
                    module = ll.FusedLinearGRPOLoss(loss_type=loss_type, entropy_coef=coef, **high)
                    out = module(x, model.lm_head.weight, y, head=head, advantages=batch.advantages.float(), old_logps=old)
                    loss = out.loss
                loss.backward()
                gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
                found.append((loss.item(), {**gradients, "hidden": states[-1].grad}))
            largest = F.linear(states[-1], model.lm_head.weight).abs().max().item() / 0.8
        finally:
            hook.remove()
            model.zero_grad()
    (its, exact), (mine, gradients) = found
    eps = 2.0**-23  # rounding a logit z moves a log-probability by eps * z
    assert abs(mine - its) <= 4 * eps * max(1.0, largest)
    for name, gradient in exact.items():
        assert gradient.abs().max() > 0
        assert relative_error(gradients[name], gradient) <= 16 * eps * max(1.0, largest), name
