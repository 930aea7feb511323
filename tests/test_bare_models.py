"""Plain Hugging Face models, as a copier gives them to `completion_logprobs`: scored right, or refused with the reason.

The models are random and tiny, from a config. Expected values are those of one plain forward per completion.
"""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import rollout
from rollout import completion_logprobs, sample_completions

GENERATOR = torch.Generator().manual_seed(0)
PROMPT = torch.randint(1, 99, (9,), generator=GENERATOR)
COMPLETIONS = [torch.randint(1, 99, (length,), generator=GENERATOR) for length in (7, 4, 6)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 100, "pad_token_id": None,
         "bos_token_id": None, "eos_token_id": None}  # fmt: skip
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 1}
DELTA = {"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 16, "head_dim": 16,
         "linear_value_head_dim": 16, "layer_types": ["linear_attention"] * 2 + ["full_attention"]}  # fmt: skip

RIGHT = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "qwen2": {"sliding_window": 4},  # which counts only with use_sliding_window
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 16},
    "granite": {"logits_scaling": 1.0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
# model type, its settings, and what the message says. Each is off by more than 0.1 if it is not refused.
REFUSED = [
    ("mistral", {"sliding_window": 4}, "layers of sliding_attention: a packed row is causal without a window"),
    ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}, "layers of sliding_attention"),
    ("phi3", {"sliding_window": 4}, "layers of sliding_attention"),
    ("gemma3_text", {"sliding_window": 4, "head_dim": 16}, "layers of sliding_attention"),
    ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "layers of conv"),
    ("phi", {}, "a head with a bias"),
    ("granite", {"logits_scaling": 8.0}, "logits_scaling = 8.0 in its config"),
    ("cohere", {"logit_scale": 0.0625}, "logit_scale = 0.0625 in its config"),
    ("nanochat", {"final_logit_softcapping": 2.0}, "final_logit_softcapping = 2.0 in its config"),
    ("falcon_h1", MAMBA, "layers of hybrid"),
    ("qwen3_next", {**DELTA, "num_experts": 4, "decoder_sparse_step": 9}, "carries a state from token to token"),
    ("minimax", {"head_dim": 16, "num_local_experts": 4, "block_size": 8}, "carries a state from token to token"),
    ("qwen3_5_text", DELTA, "call use_shared_states"),
]


def build(model_type, settings):
    """A random model, its head's bias random too: a bias of zeros would do nothing."""
    torch.manual_seed(0)
    small = {"num_key_value_heads": 1, "intermediate_size": 48, "initializer_range": 0.3}
    config_class = CONFIG_MAPPING[model_type]
    known = config_class.__dataclass_fields__.keys() | config_class.attribute_map.keys()
    config = config_class(**{name: value for name, value in {**SIZES, **small, **settings}.items() if name in known})
    model = AutoModelForCausalLM.from_config(config).eval()
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


def difference(model):
    """Between the packed row and a plain forward of each completion."""
    expected = []
    with torch.no_grad():
        for ids in COMPLETIONS:
            logits = model(input_ids=torch.cat([PROMPT, ids])[None], use_cache=False).logits[0]
            expected.append(logits[len(PROMPT) - 1 : -1].log_softmax(1).gather(1, ids[:, None])[:, 0])
        [found] = completion_logprobs(model, [{"input_ids": PROMPT[None]}], [COMPLETIONS])
    return (found - pad_sequence(expected, batch_first=True)).abs().max()


@pytest.mark.parametrize("model_type", RIGHT)
def test_a_plain_decoder_is_scored_as_by_itself(model_type):
    model = build(model_type, RIGHT[model_type])
    assert difference(model) < 1e-4
    drawn, logprobs = sample_completions(
        model, [{"input_ids": PROMPT[None]}], 2, max_new_tokens=6, eos_ids=[], return_logprobs=True
    )
    [scored] = completion_logprobs(model, [{"input_ids": PROMPT[None]}], drawn)
    assert torch.stack(logprobs[0]).sub(scored).abs().max() < 1e-4


@pytest.mark.parametrize("model_type, settings, reason", REFUSED, ids=[case[0] for case in REFUSED])
def test_what_a_packed_row_would_score_wrongly_is_refused_at_the_first_call(model_type, settings, reason, monkeypatch):
    model = build(model_type, settings)
    with pytest.raises(ValueError, match=f"^{type(model).__name__} .*{reason}"):
        completion_logprobs(model, [{"input_ids": PROMPT[None]}], [COMPLETIONS])
    with pytest.raises(ValueError, match=reason):
        sample_completions(model, [{"input_ids": PROMPT[None]}], 2, max_new_tokens=1, eos_ids=[])
    monkeypatch.setattr(rollout, "require_mask_support", lambda model: None)
    assert difference(model) > 0.1


@pytest.mark.parametrize("model_type, reason", [("gpt2", "no decoder named `model`"), ("bart", "no position_ids")])
def test_a_model_that_is_built_otherwise_is_refused_in_a_sentence(model_type, reason):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 48}
    config_class = CONFIG_MAPPING[model_type]
    known = config_class.__dataclass_fields__.keys()
    config = config_class(vocab_size=100, **{name: value for name, value in sizes.items() if name in known})
    with pytest.raises(ValueError, match=reason):
        completion_logprobs(AutoModelForCausalLM.from_config(config), [{"input_ids": PROMPT[None]}], [COMPLETIONS])
