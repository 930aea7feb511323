"""model/linear_attention.py: packed rows through Qwen3.5's gated delta nets, against one plain forward per completion.

The models are random, in float64, and forget slowly: with the decay that transformers draws, a state would hardly
matter. Images, processors and checkpoints of the family are in test_families.py.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_difference
from torch.nn.utils.rnn import pad_sequence
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import rollout
from model import graphs, linear_attention, packing
from model.attention import row_layout, use_shared_prefix
from model.graphs import GraphedStep, Graphs
from model.linear_attention import LinearStates, delta_nets, recur_row, state_layout, use_shared_states
from model.lora import adapters_off, add_adapters, choose_layers
from model.vlm import checkpoint_activations
from rollout import Pace, completion_logprobs, decode, sample_completions

SIZES = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "initializer_range": 0.2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
MLP = {
    "qwen3_5_text": {"intermediate_size": 48},
    "qwen3_5_moe_text": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                         "shared_expert_intermediate_size": 24},
}  # fmt: skip
PROJECTIONS = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")


def build(model_type="qwen3_5_text"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZES, **MLP[model_type]))
    model.set_experts_implementation("eager")
    for layer in delta_nets(model):
        torch.nn.init.uniform_(layer.A_log, -6, -2)
    use_shared_states(model)
    return model.double().eval()


@pytest.fixture(scope="module", params=MLP)
def model(request):
    return build(request.param)


def random_ids(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 99, (length,), generator=generator) for length in lengths]


# Prompts shorter than the convolution and longer than the 64 tokens of a chunk, in no order; ragged completions.
PROMPTS = [{"input_ids": ids[None]} for ids in random_ids([70, 2, 9, 12], 1)]
COMPLETIONS = [random_ids(lengths, seed) for seed, lengths in enumerate([(5, 130, 1), (3, 64), (2, 1), (7, 20, 6)])]


def repeated_logprobs(model, prompts, completions):
    result = []
    for prompt, group in zip(prompts, completions, strict=True):
        start, rows = prompt["input_ids"].shape[1], []
        for answer in group:
            logits = model(torch.cat([prompt["input_ids"][0], answer])[None], use_cache=False).logits[0]
            rows.append(logits[start - 1 : -1].log_softmax(1).gather(1, answer[:, None])[:, 0])
        result.append(pad_sequence(rows, batch_first=True))
    return result


def difference(model, score=completion_logprobs):
    """Between packed and repeated rows: of log-probs, and of gradients relative to the largest of each parameter."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sides = []
    for function in (score, repeated_logprobs):
        logprobs = torch.cat([group.flatten() for group in function(model, PROMPTS, COMPLETIONS)])
        weights = torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)
        gradients = torch.autograd.grad((logprobs * weights).sum(), parameters.values())
        sides.append((logprobs.detach(), dict(zip(parameters, gradients, strict=True))))
    (packed, packed_gradients), (plain, plain_gradients) = sides
    gradients = [
        relative_difference({name: packed_gradients[name]}, {name: plain_gradients[name]}) for name in parameters
    ]
    return (packed - plain).abs().max().item(), max(gradients)


# ---- scoring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["dense mask", "in parts"])
def test_a_packed_row_scores_as_repeated_rows_do(model, attention, all_in_double):
    if attention == "in parts":
        use_shared_prefix(model)
    logprobs, gradients = difference(model)
    assert logprobs < 1e-12 and gradients < 1e-11


def test_the_recurrence_as_transformers_ships_it_in_fp32_agrees_too(model):
    logprobs, gradients = difference(model)
    assert logprobs < 1e-4 and gradients < 1e-3


def test_activation_checkpointing_changes_nothing(all_in_double):
    model = build()
    checkpoint_activations(model.train())
    logprobs, gradients = difference(model)
    assert logprobs < 1e-12 and gradients < 1e-11


@pytest.mark.parametrize(
    "missing", ["inputs of the convolution", "state", "gradient of the state", "gradient of the inputs"]
)
def test_a_completion_needs_what_its_prompt_left_and_the_gradients_through_it(
    model, missing, all_in_double, monkeypatch
):
    real = linear_attention.recur_prompts

    def without(*arguments):
        out, contexts, states = real(*arguments)
        if missing == "inputs of the convolution":
            contexts = torch.zeros_like(contexts)
        elif missing == "state":
            states = torch.zeros_like(states)
        elif missing == "gradient of the state":
            states = states.detach()
        else:
            contexts = contexts.detach()
        return out, contexts, states

    monkeypatch.setattr(linear_attention, "recur_prompts", without)
    logprobs, gradients = difference(model)
    assert gradients > 0.1
    assert (logprobs > 0.1) == (not missing.startswith("gradient"))


def test_layers_that_are_left_alone_run_on_from_one_completion_into_the_next(model, all_in_double, monkeypatch):
    monkeypatch.setattr(packing, "shares_states", lambda model: False)
    monkeypatch.setattr(rollout, "require_mask_support", lambda model: None)
    logprobs, _ = difference(model)
    assert logprobs > 0.1


def test_without_recur_a_layer_is_what_it_was(model):
    fresh = AutoModelForCausalLM.from_config(model.config).double().eval()
    fresh.load_state_dict(model.state_dict())
    ids = PROMPTS[0]["input_ids"]
    assert fresh(ids).logits.equal(model(ids).logits)


def test_a_row_of_one_layer_is_the_recurrence_of_the_paper_token_by_token(all_in_double):
    """S <- exp(g) S, then S <- S + k (beta (v - S^T k))^T, and the output is S^T q (Gated DeltaNet, equation 10)."""
    layer = delta_nets(build())[0]
    generator = torch.Generator().manual_seed(4)
    layout = row_layout([5, 3], [[2, 4], [1]], torch.device("cpu"))
    size, channels = layout.groups[-1].last, 2 * layer.key_dim + layer.value_dim
    inputs = torch.randn(1, size, channels, generator=generator, dtype=torch.float64)
    decay = -torch.rand(1, size, layer.num_v_heads, generator=generator, dtype=torch.float64)
    beta = torch.rand(1, size, layer.num_v_heads, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        found = recur_row(state_layout(layout), layer, inputs, decay, beta)[0]
        for start, *own in [(0, 5, 7), (0, 7, 11), (11, 14, 15)]:  # prompt, and from where to where a completion
            prompt = list(range(start, 5 if start == 0 else 14))
            places = prompt + list(range(*own))
            expected = by_hand(layer, inputs[0, places], decay[0, places], beta[0, places])
            assert (found[places] - expected).abs().max() < 1e-12


def by_hand(layer, inputs, decay, beta):
    kernel = layer.conv1d.weight[:, 0]  # [X, W]
    padded = F.pad(inputs, (0, 0, kernel.shape[1] - 1, 0))
    mixed = torch.stack([F.silu((padded[t : t + kernel.shape[1]].T * kernel).sum(1)) for t in range(len(inputs))])
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], 1)
    repeats, out = layer.num_v_heads // layer.num_k_heads, []
    query, key = (part.unflatten(1, (layer.num_k_heads, -1)) for part in (query, key))
    query, key = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (query, key))
    query, key = (part.repeat_interleave(repeats, 1) for part in (query, key))
    value = value.unflatten(1, (layer.num_v_heads, -1))
    state = torch.zeros(layer.num_v_heads, layer.head_k_dim, layer.head_v_dim, dtype=torch.float64)
    for t in range(len(inputs)):
        state = state * decay[t].exp()[:, None, None]
        seen = torch.einsum("vkd,vk->vd", state, key[t])
        state = state + torch.einsum("vk,vd->vkd", key[t], beta[t][:, None] * (value[t] - seen))
        out.append(torch.einsum("vkd,vk->vd", state, query[t]) / layer.head_k_dim**0.5)
    return torch.stack(out)


def test_the_layout_of_states_names_each_completions_prompt_and_every_tokens_place():
    row = row_layout([9, 2, 8], [[3, 1], [], [2]], torch.device("cpu"))
    layout = state_layout(row)
    assert [batch.own.shape for batch in layout.prompts] == [(1, 2), (2, 9)]
    assert layout.prompt_order.tolist() == [1, 0, 2]  # the prompt of two tokens is in the first batch
    assert [prompts.tolist() for prompts in layout.prompt_of] == [[0], [0, 2]]
    places = torch.cat([batch.own.flatten() for batch in (*layout.prompts, *layout.completions)])
    assert places[layout.order].tolist() == list(range(row.groups[-1].last))


# ---- adapters ------------------------------------------------------------------------------------------------------


def test_adapters_go_on_the_projections_by_name_and_are_trained_through_the_row(all_in_double):
    model = build()
    plain = completion_logprobs(model, PROMPTS, COMPLETIONS)
    chosen = choose_layers(model, PROJECTIONS)
    assert len(chosen) == 3 * len(PROJECTIONS) and all(".linear_attn." in name for name in chosen)
    assert {*chosen} < {*choose_layers(model)}
    model.requires_grad_(False)
    add_adapters(model, chosen, rank=2, alpha=4)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    logprobs, gradients = difference(model.double())
    assert logprobs < 1e-12 and gradients < 1e-11
    with adapters_off(model):
        for found, expected in zip(completion_logprobs(model, PROMPTS, COMPLETIONS), plain, strict=True):
            assert found.equal(expected)


# ---- drawing -------------------------------------------------------------------------------------------------------


def drawing(model):
    """Greedy completions of five prompts, two each, that end at different steps, and their log-probs."""
    prompts = [{"input_ids": ids[None]} for ids in random_ids([70, 2, 9, 12, 33], 3)]
    eos_ids = list(range(0, 100, 9))
    drawn, logprobs = sample_completions(
        model, prompts, 2, max_new_tokens=40, eos_ids=eos_ids, temperature=0, return_logprobs=True
    )
    return prompts, drawn, logprobs, eos_ids


def test_greedy_tokens_are_those_of_generate_and_their_log_probs_those_of_scoring(model, all_in_double, monkeypatch):
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 80)  # several rows of prompts
    prompts, drawn, logprobs, eos_ids = drawing(model)
    assert len({len(group[0]) for group in drawn}) > 2  # sequences leave at different steps
    for prompt, group in zip(prompts, drawn, strict=True):
        expected = model.generate(prompt["input_ids"], max_new_tokens=40, do_sample=False, eos_token_id=eos_ids)
        for ids in group:
            assert ids.tolist() == expected[0, prompt["input_ids"].shape[1] :].tolist()
    with torch.no_grad():
        scored = completion_logprobs(model, prompts, drawn)
    for found, expected in zip(logprobs, scored, strict=True):
        assert (pad_sequence(found, batch_first=True) - expected).abs().max() < 1e-6  # drawing keeps them in fp32


@pytest.mark.parametrize("method", ["expand", "keep"])
def test_the_states_of_other_sequences_draw_other_tokens(model, method, monkeypatch):
    expected = drawing(model)[1]
    real = getattr(LinearStates, method)

    def turned(self, argument):
        real(self, argument)
        for layer in self.layers.values():
            for part in layer:
                part.copy_(part.roll(2, 0))

    monkeypatch.setattr(LinearStates, method, turned)
    found = drawing(model)[1]
    assert any(a.tolist() != b.tolist() for a, b in zip(sum(found, []), sum(expected, []), strict=True))


def test_a_step_that_is_recorded_and_repeated_once_draws_the_same(model, monkeypatch):
    """The check of a CUDA graph repeats a step from where it began, so the states must go back too."""
    expected = drawing(model)[1]

    def record(step):
        result = torch.empty(0)

        def replay():
            logits = step()
            result.resize_(logits.shape).copy_(logits)

        return replay, result

    monkeypatch.setattr(graphs, "GRAPHS", Graphs())
    monkeypatch.setattr(rollout, "EVERY_TOKEN", Pace(2, 16))
    monkeypatch.setattr(rollout, "GraphedStep", partial(GraphedStep, record=record))
    monkeypatch.setattr(rollout, "decode", lambda *args, graphed: decode(*args, graphed=True))
    found = drawing(model)[1]
    assert graphs.GRAPHS.compared and graphs.GRAPHS.usable
    assert [ids.tolist() for ids in sum(found, [])] == [ids.tolist() for ids in sum(expected, [])]
