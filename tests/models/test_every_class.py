"""Every causal, image-text and multimodal class of transformers gives the log-probabilities of its own logits, or is refused.

By default a class of each kind of head and of positions is tested. ``make test-models``, or ``LOGITLESS_EVERY_CLASS=1``, tests
all of them. A class that is neither right nor in a list below, with its reason, fails.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import logitless as ll

pytest.importorskip("transformers", minversion="5.24")

from transformers import PreTrainedModel

from . import every_class as ec

EPS = torch.finfo(torch.float32).eps
_NOT_LINEAR, _NO_HEAD = "model's head must be an nn.Linear", "model must have a head"
_SEQ2SEQ = "model must be a causal language model, got the encoder-decoder"
_SEES_LATER = "is not causal: later tokens change the hidden states of earlier ones"
#: Classes that model_logps refuses, and the reason that it gives.
REFUSED = {
    "BlipForConditionalGeneration": _NO_HEAD,
    "ChameleonForConditionalGeneration": "masks 1 of its 96 logits after the head",  # image tokens
    "CpmAntForCausalLM": _SEES_LATER,
    "DiffusionGemmaForBlockDiffusion": "passes",  # one hidden state per position of a canvas
    "DoryForCausalLM": _NOT_LINEAR,
    "Florence2ForConditionalGeneration": _SEQ2SEQ,
    "IdeficsForVisionText2Text": _NOT_LINEAR,
    "KyutaiSpeechToTextForConditionalGeneration": "model must embed one token id per position",
    "MusicgenForCausalLM": _NOT_LINEAR,
    "MusicgenMelodyForCausalLM": _NOT_LINEAR,
    "NemotronH_Omni_Reasoning_V3": _NO_HEAD,
    "PI0ForConditionalGeneration": _NO_HEAD,
    "PPFormulaNetForConditionalGeneration": _SEQ2SEQ,
    "PaliGemmaForConditionalGeneration": _SEES_LATER,  # a prefix is read in both directions
    "Pix2StructForConditionalGeneration": _SEQ2SEQ,
    "ProphetNetForCausalLM": "passes",  # a hidden state per n-gram
    "Qwen2_5OmniForConditionalGeneration": _NO_HEAD,
    "Qwen3OmniMoeForConditionalGeneration": _NO_HEAD,
    "T5Gemma2ForConditionalGeneration": _SEQ2SEQ,
    "UdopForConditionalGeneration": _SEQ2SEQ,
    "VisionEncoderDecoderModel": _SEQ2SEQ,
    "XLMWithLMHeadModel": _SEES_LATER,
    "XLNetLMHeadModel": _SEES_LATER,
}
#: Classes whose own forward does not run on what the scan can give, and its error.
CANNOT_RUN = {
    "Gemma4AssistantForCausalLM": "shared_kv_states cannot be None",
    "Gemma4UnifiedAssistantForCausalLM": "shared_kv_states cannot be None",
    "Llama4ForConditionalGeneration": "has no attribute 'image_outputs'",  # a fault of transformers 5.24
    "VoxtralRealtimeForConditionalGeneration": "exactly one of input_features or encoder_inputs_embeds",
}
#: Classes for whose backbone's output HeadSpec.from_model(at="backbone") finds no spec.
NO_BACKBONE = {
    "BertLMHeadModel",
    "BigBirdForCausalLM",
    "CamembertForCausalLM",
    "Data2VecTextForCausalLM",
    "ElectraForCausalLM",
    "ErnieForCausalLM",
    "MegatronBertForCausalLM",
    "ModernBertDecoderForCausalLM",
    "RemBertForCausalLM",
    "RoCBertForCausalLM",
    "RoFormerForCausalLM",
    "RobertaForCausalLM",
    "RobertaPreLayerNormForCausalLM",
    "XLMRobertaForCausalLM",
    "XLMRobertaXLForCausalLM",
    "XmodForCausalLM",
}
#: A class of each kind of head, and of each kind of positions or state.
QUICK = {
    "LlamaForCausalLM": "plain",
    "PhiForCausalLM": "bias",
    "CohereForCausalLM": "logit scale",
    "GraniteForCausalLM": "logits divided",
    "Gemma2ForCausalLM": "soft-cap",
    "RecurrentGemmaForCausalLM": "soft-cap under another name; recurrent",
    "xLSTMForCausalLM": "soft-cap under a third name; recurrent",
    "MiniCPM3ForCausalLM": "hidden states divided before the head; latent attention",
    "InklingForCausalLM": "logits cut off; hidden states divided",
    "MptForCausalLM": "logit scale that the model does not apply; ALiBi",
    "BertLMHeadModel": "layer between backbone and head",
    "ChameleonForConditionalGeneration": "masked logits",
    "DoryForCausalLM": "head of another class",
    "Gemma3ForConditionalGeneration": "soft-cap of the text part, not applied",
    "AyaVisionForConditionalGeneration": "scale of the text part, not applied",
    "GPT2LMHeadModel": "learned positions",
    "OPTForCausalLM": "positions from the attention mask",
    "BloomForCausalLM": "ALiBi, no positions",
    "GPTNeoForCausalLM": "mask of a fixed size",
    "MixtralForCausalLM": "experts",
    "MambaForCausalLM": "state-space layers",
    "JambaForCausalLM": "attention and state-space layers",
    "Qwen2VLForConditionalGeneration": "positions of three axes",
    "XLNetLMHeadModel": "not causal",
}
EVERY = bool(int(os.environ.get("LOGITLESS_EVERY_CLASS", "0")))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_backbone(name: str, model: Any, inputs: dict[str, Any]) -> None:
    """The backbone's output and the spec for it give the logits of a plain forward pass, or there is an error."""
    given = {key: value for key, value in inputs.items() if key != "use_cache"} if name in ec.INPUTS else None
    if name in NO_BACKBONE:
        with pytest.raises(ValueError, match="no HeadSpec describes this model"):
            ll.HeadSpec.from_model(model, at="backbone", inputs=given)
        return
    spec = ll.HeadSpec.from_model(model, at="backbone", inputs=given)
    head, kept = model.get_output_embeddings(), []
    for base in model.modules():
        if isinstance(base, PreTrainedModel) and base is not model:
            base.register_forward_hook(lambda module, args, output: kept.append(getattr(output, "last_hidden_state", None)))
    logits = model(**inputs).logits
    hidden = [states for states in kept if states is not None and states.shape[-1] == head.weight.shape[1]][-1]
    found = spec.apply(torch.nn.functional.linear(hidden, head.weight, head.bias))
    torch.testing.assert_close(found.log_softmax(-1), logits.log_softmax(-1), rtol=1e-4, atol=1e-4)


def assert_right(name: str, model: Any) -> None:
    ids, inputs = ec.batch(name)
    logps = ll.model_logps(model, ids, **inputs).logps
    found = ec.gradients(model, logps)
    expected = ec.plain_logps(model, ids, inputs)
    wanted = ec.gradients(model, expected)
    tolerance = 16 * EPS * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(logps, expected, rtol=0, atol=tolerance)
    error, parameter = ec.gradient_error(found, wanted)
    assert wanted and error < 1e-5, parameter
    with torch.no_grad():
        padded = ll.model_logps(model, ids, padding_free=False, **inputs).logps
        torch.testing.assert_close(padded, expected, rtol=0, atol=tolerance)
        assert_backbone(name, model, ec.row_inputs(ids, inputs, 0))


@pytest.mark.parametrize("name", ec.every_class() if EVERY else QUICK)
def test_a_class_is_right_or_refused_with_the_reason(name):
    try:
        model = ec.build(name)
    except ImportError as error:
        pytest.skip(f"{name}: {' '.join(str(error).split())}")
    if name in CANNOT_RUN:
        for run in (
            lambda: model(input_ids=torch.ones(1, 3, dtype=torch.long)),
            lambda: ll.model_logps(model, ec.batch(name)[0]),
        ):
            with pytest.raises((ValueError, AttributeError), match=CANNOT_RUN[name]):
                run()
    elif name in REFUSED:
        with pytest.raises((TypeError, ValueError), match=REFUSED[name]):
            ll.model_logps(model, ec.batch(name)[0])
    else:
        assert_right(name, model)


def test_the_lists_name_classes_that_exist():
    assert {*REFUSED, *CANNOT_RUN, *NO_BACKBONE, *QUICK, *ec.OVERRIDES, *ec.INPUTS, *ec.CONFIGS} <= ec.every_class().keys()
