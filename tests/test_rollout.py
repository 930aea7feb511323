"""rollout.py against plain Hugging Face: G repeated rows, `generate`, and comparisons that have to fail."""

from functools import partial

import pytest
import torch
from helpers import compare_with_repeated_rows, make_completions, make_prompts
from torch.testing import assert_close

import rollout
import toy.model
from model.attention import use_shared_prefix
from model.packing import IMAGE_FEATURES, pack_row
from model.sampling import look_up, pick_tokens, restricted
from model.vlm import banned_token_ids, checkpoint_activations
from rollout import (
    completion_logprobs,
    sample_completions,
    see_images,
    takes_image_features,
    tower_is_frozen,
)


@pytest.fixture(scope="module")
def processor():
    return toy.model.build_processor()


@pytest.fixture(scope="module", params=["dense mask", "in parts"])
def model(processor, request):
    """A bare Hugging Face model, scored by the dense mask, and one as load_model leaves it, scored in parts."""
    model = toy.model.build_model(processor.tokenizer, seed=3).double().eval()
    if request.param == "in parts":
        use_shared_prefix(model)
    return model


# ---- scoring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1,), (0,), (3,), (1, 2, 0, 1)])
def test_a_packed_row_scores_as_repeated_rows_do_in_float64(model, processor, counts):
    prompts = make_prompts(processor, counts)
    difference, gradient = compare_with_repeated_rows(model, prompts, make_completions(model, len(prompts)))
    assert difference < 1e-6 and gradient < 1e-6  # HF casts norms and rotary angles to fp32 in a float64 model


def test_a_packed_row_scores_as_repeated_rows_do_in_float32(model, processor):
    prompts = make_prompts(processor)
    single = toy.model.build_model(processor.tokenizer, seed=3).eval()
    difference, gradient = compare_with_repeated_rows(single, prompts, make_completions(single, len(prompts)))
    assert difference < 1e-5 and gradient < 1e-5


def test_gradient_checkpointing_changes_nothing(processor):
    prompts = make_prompts(processor, (1, 0))
    checked = toy.model.build_model(processor.tokenizer, seed=3).double()
    completions = make_completions(checked, 2)
    plain = [v.detach() for v in completion_logprobs(checked, prompts, completions)]
    checkpoint_activations(checked)
    checked.train()
    for a, b in zip(plain, completion_logprobs(checked, prompts, completions), strict=True):
        assert_close(a, b)
    difference, gradient = compare_with_repeated_rows(checked, prompts, completions)
    assert difference < 1e-6 and gradient < 1e-6


def test_positions_that_continue_through_all_completions_fail_the_comparison(model, processor, monkeypatch):
    def not_restarted(*arguments):
        row = pack_row(*arguments)
        positions = row.inputs["position_ids"].clone()
        end = row.layout.groups[0][1]
        positions[:, :, end:] = positions[:, :, end - 1 : end] + 1 + torch.arange(positions.shape[2] - end)
        row.inputs["position_ids"] = positions
        return row

    monkeypatch.setattr(rollout, "pack_row", not_restarted)
    prompts = make_prompts(processor, (1,))
    difference, gradient = compare_with_repeated_rows(model, prompts, make_completions(model, 1))
    assert difference > 1e-3 and gradient > 1e-3


def test_a_plain_causal_mask_fails_the_comparison(model, processor, monkeypatch):
    def causal(model, layout):
        return {"attention_mask": torch.ones(1, 1, *[layout.groups[-1][-1]] * 2).bool().tril()}

    monkeypatch.setattr(rollout, "row_attention", causal)
    prompts = make_prompts(processor, (1,))
    difference, gradient = compare_with_repeated_rows(model, prompts, make_completions(model, 1))
    assert difference > 1e-3 and gradient > 1e-3


def test_completions_that_start_at_the_prompts_length_fail_the_comparison(model, processor, monkeypatch):
    def by_length(*arguments):
        row = pack_row(*arguments)
        start, end, _ = row.layout.groups[0]
        shift = (end - start) - (row.inputs["position_ids"][0, 0, start:end].max() + 1)
        assert shift > 0
        positions = row.inputs["position_ids"].clone()
        positions[:, :, end:] += shift
        row.inputs["position_ids"] = positions
        return row

    monkeypatch.setattr(rollout, "pack_row", by_length)
    prompts = make_prompts(processor, (1,))
    difference, _ = compare_with_repeated_rows(model, prompts, make_completions(model, 1))
    assert difference > 1e-3


def test_temperature_and_banned_ids_reach_the_training_softmax(model, processor):
    prompts, banned = make_prompts(processor, (1,)), [20, 21]
    completions = [[torch.tensor([30, 31, 32])]]
    [ours] = completion_logprobs(model, prompts, completions, temperature=0.5, banned_ids=banned)
    prompt = prompts[0]
    ids = torch.cat([prompt["input_ids"][0], completions[0][0]])[None]
    types = torch.cat([prompt["mm_token_type_ids"], torch.zeros(1, 3, dtype=torch.long)], 1)
    logits = model(input_ids=ids, mm_token_type_ids=types, pixel_values=prompt["pixel_values"],
                   image_grid_thw=prompt["image_grid_thw"]).logits[0, -4:-1] / 0.5  # fmt: skip
    logits[:, banned] = -torch.inf
    assert_close(ours[0], logits.log_softmax(1).gather(1, completions[0][0][:, None])[:, 0], rtol=1e-6, atol=1e-6)


def test_prompts_and_completions_are_left_as_they_were(model, processor):
    prompts = make_prompts(processor, (1, 0))
    completions = make_completions(model, 2)
    before = [{key: value.clone() for key, value in prompt.items()} for prompt in prompts]
    completion_logprobs(model, prompts, completions)
    sample_completions(model, prompts, 2, max_new_tokens=2, eos_ids=[2])
    for prompt, copy in zip(prompts, before, strict=True):
        assert prompt.keys() == copy.keys() and all(prompt[key].equal(copy[key]) for key in copy)


# ---- drawing -------------------------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_generate(model, processor):
    prompts = make_prompts(processor, (1, 2, 0, 1))
    drawn = sample_completions(model, prompts, 1, max_new_tokens=12, eos_ids=[2], temperature=0)
    for prompt, [ids] in zip(prompts, drawn, strict=True):
        expected = model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=2)
        assert ids.tolist() == expected[0, prompt["input_ids"].shape[1] :].tolist()


def test_completions_stop_at_their_end_token_and_keep_it(model, processor):
    prompts = make_prompts(processor)
    # With a fifth of the vocabulary as end tokens, rows finish at different times and are dropped on the way.
    ends = list(range(10, 50))
    drawn = sample_completions(
        model, prompts, 6, max_new_tokens=12, eos_ids=ends, generator=torch.Generator().manual_seed(0)
    )
    flat = [ids.tolist() for group in drawn for ids in group]
    assert len(drawn) == 4 and all(len(group) == 6 for group in drawn)
    assert len({len(ids) for ids in flat}) > 3
    for ids in flat:
        assert not set(ids[:-1]) & set(ends)
        assert ids[-1] in ends or len(ids) == 12


def test_log_probs_while_drawing_are_those_of_the_packed_row(model, processor):
    prompts, banned = make_prompts(processor), banned_token_ids(model, processor)
    options = {"temperature": 0.8, "banned_ids": banned}
    drawn, logprobs = sample_completions(
        model, prompts, 4, max_new_tokens=10, eos_ids=list(range(10, 40)), top_p=0.9, return_logprobs=True,
        generator=torch.Generator().manual_seed(1), **options,
    )  # fmt: skip
    scored = completion_logprobs(model, prompts, drawn, **options)
    for group, rows in zip(logprobs, scored, strict=True):
        for values, row in zip(group, rows, strict=True):
            assert_close(values, row[: len(values)].detach().float(), rtol=1e-6, atol=1e-6)


def test_drawn_tokens_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 5.0]], dtype=torch.float64)
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, _ = pick_tokens(logits.expand(200_000, -1), uniform, temperature=2.0, banned_ids=torch.tensor([4]))
    expected = (logits[0, :4] / 2).softmax(0)
    counts = torch.bincount(ids, minlength=5).double() / len(ids)
    assert counts[4] == 0
    # the standard error is 0.0011 at most, so five of them are exceeded about once in 400,000 seeds
    assert (counts[:4] - expected).abs().max() < 0.0056


def test_drawing_is_repeated_by_the_same_generator_and_changed_by_another(model, processor):
    draw = partial(sample_completions, model, make_prompts(processor, (1, 0)), 3, max_new_tokens=6, eos_ids=[2])
    first, again, other = (draw(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    same = [[a.equal(b) for a, b in zip(x, y, strict=True)] for x, y in zip(first, again, strict=True)]
    assert all(all(row) for row in same)
    assert [ids.tolist() for ids in first[0]] != [ids.tolist() for ids in other[0]]


def test_banned_tokens_are_never_drawn(model, processor):
    banned = list(range(0, 200))
    drawn = sample_completions(
        model, make_prompts(processor, (1,)), 4, max_new_tokens=5, eos_ids=[2], banned_ids=banned
    )
    assert all(int(token) >= 200 for ids in drawn[0] for token in ids)


def test_a_number_is_looked_up_in_blocks_as_in_one_sum_and_never_falls_on_zero():
    torch.manual_seed(0)
    for size in (7, 512, 1187 * 128):
        weights = torch.rand(64, size) ** 8
        weights[:, ::3] = 0
        weights[:3], weights[:3, size // 2] = 0, 1
        uniform = torch.rand(64, dtype=torch.float64)
        uniform[5], uniform[6] = 0, 1 - 2**-53
        sums = weights.cumsum(1, dtype=torch.float64)
        expected = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]
        ids = look_up(weights, uniform)
        assert ids.equal(expected) and weights[torch.arange(64), ids].all()


def test_a_token_is_drawn_even_from_no_numbers():
    logits = torch.zeros(2, 512)
    logits[0, 3] = torch.nan  # a run stops over bad steps, not over an index out of bounds
    ids, logprobs = pick_tokens(logits, torch.full((2,), 0.5, dtype=torch.float64), temperature=1.0)
    assert (ids < 512).all() and logprobs[0].isnan() and logprobs[1].isfinite()


def test_top_k_and_top_p_keep_the_likeliest_tokens_and_never_none():
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert restricted(logprobs, 2, 1.0).isfinite().tolist() == [[True, True, False, False]]
    assert restricted(logprobs, 0, 0.6).isfinite().tolist() == [[True, True, False, False]]
    assert restricted(logprobs, 0, 0.5).isfinite().tolist() == [[True, False, False, False]]
    assert restricted(logprobs, 0, 1e-9).isfinite().tolist() == [[True, False, False, False]]
    assert restricted(logprobs, 99, 1.0).equal(logprobs)


def test_drawing_leaves_the_model_in_the_mode_it_was_in(model, processor):
    model.train()
    sample_completions(model, make_prompts(processor, (0,)), 1, max_new_tokens=1, eos_ids=[2])
    assert model.training
    model.eval()


def test_many_prompts_prefilled_in_several_rows_draw_the_same(model, processor, monkeypatch):
    prompts = make_prompts(processor, (1, 2, 0, 1))
    draw = partial(sample_completions, model, prompts, 1, max_new_tokens=6, eos_ids=[2], temperature=0)
    together = draw()
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 40)
    for a, b in zip(together, draw(), strict=True):
        assert a[0].equal(b[0])


# ---- images of a frozen tower --------------------------------------------------------------------------------------


def test_images_seen_once_give_the_same_draws_and_log_probs(model, processor):
    prompts = make_prompts(processor)
    seen = [see_images(model, prompt) for prompt in prompts]
    assert "pixel_values" in prompts[0] and ("pixel_values" in seen[0]) != takes_image_features(model)
    draw = partial(sample_completions, group_size=2, max_new_tokens=6, eos_ids=[2])
    drawn = [draw(model, p, generator=torch.Generator().manual_seed(0)) for p in (prompts, seen)]
    assert [[ids.tolist() for ids in group] for group in drawn[0]] == [[i.tolist() for i in g] for g in drawn[1]]
    completions = make_completions(model, 4)
    for a, b in zip(*(completion_logprobs(model, p, completions) for p in (prompts, seen)), strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


def test_a_tower_is_frozen_when_nothing_but_the_language_model_is_trained(processor):
    model = toy.model.build_model(processor.tokenizer)
    assert not tower_is_frozen(model)
    model.model.visual.requires_grad_(False)
    assert tower_is_frozen(model)
    next(model.model.visual.parameters()).requires_grad_(True)
    assert not tower_is_frozen(model)


# ---- what callers may rely on --------------------------------------------------------------------------------------


class Noisy(torch.nn.Linear):
    """A layer that is wrong in training mode, as one with dropout is."""

    def forward(self, x):
        return super().forward(x) * (0.0 if self.training else 1.0)


def test_drawing_and_seeing_images_run_without_dropout_and_leave_every_module_in_its_mode(processor):
    noisy = toy.model.build_model(processor.tokenizer, seed=3)
    for module in (noisy.model.language_model.layers[0].mlp.down_proj, noisy.model.visual.blocks[0].mlp.down_proj):
        module.__class__ = Noisy
    prompts = make_prompts(processor, (1, 0))
    draw = partial(sample_completions, noisy, max_new_tokens=5, eos_ids=[2], temperature=0, return_logprobs=True)
    noisy.eval()
    expected, seen = draw(prompts, 1)[1], see_images(noisy, prompts[0])
    noisy.train()
    noisy.model.visual.eval()
    modes = [module.training for module in noisy.modules()]
    for a, b in zip(draw(prompts, 1)[1], expected, strict=True):
        assert a[0].equal(b[0])
    if takes_image_features(noisy):
        again = see_images(noisy, prompts[0])[IMAGE_FEATURES]
        assert all(x.equal(y) for x, y in zip(again[0], seen[IMAGE_FEATURES][0], strict=True))
        assert not again[0][0].requires_grad
    with pytest.raises(TypeError):
        draw([None], 1)
    assert [module.training for module in noisy.modules()] == modes


def test_entropies_are_those_of_the_softmax_and_top_k_reaches_the_draw(model, processor):
    prompts, completions = make_prompts(processor, (0,)), [[torch.tensor([30, 31])]]
    [entropies] = completion_logprobs(model, prompts, completions, return_entropies=True)[1]
    ids = torch.cat([prompts[0]["input_ids"][0], completions[0][0]])[None]
    logprobs = model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits[0, -3:-1].log_softmax(1)
    assert_close(entropies[0], -(logprobs.exp() * logprobs).sum(1), rtol=1e-6, atol=1e-6)
    greedy = sample_completions(model, prompts, 1, max_new_tokens=4, eos_ids=[2], temperature=0)
    drawn = sample_completions(model, prompts, 3, max_new_tokens=4, eos_ids=[2], temperature=3.0, top_k=1)
    assert all(ids.equal(greedy[0][0]) for ids in drawn[0])


def test_a_negative_temperature_is_refused(model, processor):
    with pytest.raises(ValueError, match="temperature is -1"):
        sample_completions(model, make_prompts(processor, (0,)), 1, max_new_tokens=1, eos_ids=[2], temperature=-1)


@pytest.mark.parametrize("number, expected", [(0.0, 1), (0.5, 3), (1 - 2**-53, 3)])
def test_a_token_of_no_probability_is_never_drawn_at_the_edges(number, expected):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0]])
    uniform = torch.tensor([number], dtype=torch.float64)
    assert pick_tokens(logits, uniform, temperature=1.0)[0].tolist() == [expected]
