"""RMS norms in one kernel are those of the modelling files, and norms that compute something else are left alone."""

import pytest
import torch
from torch.testing import assert_close
from transformers.models.glm4v.modeling_glm4v import Glm4vRMSNorm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, Qwen3_5RMSNormGated
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

import toy
from model import norms
from model.norms import fuse_norms, is_plain, rms_norm


@pytest.mark.parametrize("kind", [Qwen2_5_VLRMSNorm, Qwen3VLTextRMSNorm, Glm4vRMSNorm])
def test_a_fused_norm_and_its_gradients_are_the_modelling_files(kind):
    torch.manual_seed(0)
    norm, states = kind(32, eps=1e-3), torch.randn(5, 32, requires_grad=True)
    norm.weight.data.normal_()
    assert is_plain(kind)
    fused, expected = rms_norm(norm, states), norm(states)
    assert_close(fused, expected)
    gradients = [torch.autograd.grad(out.square().sum(), (states, norm.weight)) for out in (fused, expected)]
    assert_close(*gradients)


def test_a_norm_in_another_dtype_than_its_input_returns_what_its_own_forward_does():
    norm, states = Qwen2_5_VLRMSNorm(8), torch.randn(3, 8).bfloat16()
    assert rms_norm(norm, states).equal(norm(states)) and rms_norm(norm, states).dtype == torch.float32


@pytest.mark.parametrize("kind", [Qwen3_5RMSNorm, Qwen3_5RMSNormGated, torch.nn.RMSNorm, torch.nn.LayerNorm])
def test_other_norms_are_left_alone(kind):
    assert not is_plain(kind)


def test_a_model_has_its_norms_fused_and_computes_the_same(monkeypatch):
    model, ids = toy.model.build_model(toy.model.build_processor().tokenizer), torch.randint(10, 150, (2, 12))
    expected, calls = model(input_ids=ids).logits, []
    monkeypatch.setattr(norms, "rms_norm", lambda *inputs: calls.append(inputs) or rms_norm(*inputs))
    fuse_norms(model)
    assert_close(model(input_ids=ids).logits, expected)
    assert len(calls) == 2 * model.config.text_config.num_hidden_layers + 1
