"""Models that Accelerate offloads: the head's weight is on the meta device until the head is called."""

from __future__ import annotations

import pytest
import torch

import logitless as ll

from .tiny import make_ids, make_model, plain_logps

accelerate = pytest.importorskip("accelerate")


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # the second has a head that is tied to its embedding
def test_an_offloaded_model_is_served_without_gradients(kind, where, tmp_path):
    model, ids = make_model(kind, "sdpa").eval(), make_ids()
    with torch.no_grad():
        expected = plain_logps(model, ids)
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu")
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
        assert model.lm_head.weight.is_meta
        for padding_free in (True, False):
            found = ll.model_logps(model, ids, padding_free=padding_free).logps
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert model.lm_head.weight.is_meta
        loss = ll.model_loss(model, ll.FusedLinearDPOLoss(), ll.pack(ids), ref_logps=torch.zeros(6)).loss
    assert loss.isfinite()


def test_a_gradient_that_would_be_lost_is_an_error():
    model, ids = make_model("llama").eval(), make_ids()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"offloaded by Accelerate.* run the model under torch.no_grad\(\), freeze the head"):
        ll.model_logps(model, ids)
    model.lm_head.weight.requires_grad_(False)
    assert ll.model_logps(model, ids).logps.isfinite().all()


def test_a_model_without_weights_is_an_error():
    with pytest.raises(ValueError, match="weight on the meta device: load the model's weights first"):
        ll.model_logps(make_model("llama").to("meta"), make_ids())
