"""packing.py: a row laid out by hand, the cut of groups into rows, and inputs that would be read wrongly."""

import pytest
import torch
from helpers import compare_with_repeated_rows, make_completions, make_prompts

import toy.model
from model.attention import use_shared_prefix
from model.packing import Piece, pack_row, plan_rows
from rollout import completion_logprobs


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


# ---- one row -------------------------------------------------------------------------------------------------------


def text_prompt(*ids):
    return {"input_ids": torch.tensor([ids])}


def test_a_row_of_two_groups_is_laid_out_as_by_hand(model):
    prompts = [text_prompt(10, 11, 12), text_prompt(20, 21)]
    completions = [[torch.tensor([30, 31]), torch.tensor([32])], [torch.tensor([40]), torch.tensor([41, 42])]]
    row = pack_row(model, prompts, completions)
    assert row.inputs["input_ids"].tolist() == [[10, 11, 12, 30, 31, 32, 20, 21, 40, 41, 42]]
    positions = [0, 1, 2, 3, 4, 3, 0, 1, 2, 2, 3]  # each completion goes on from its own prompt
    assert row.inputs["position_ids"].tolist() == [[positions]] * 3
    assert row.targets.tolist() == [30, 31, 32, 40, 41, 42]
    assert row.predictors.tolist() == [2, 3, 2, 7, 7, 9]  # a first token is predicted by its prompt's last one
    assert row.next_positions.tolist() == [[3, 2]] * 3
    assert set(row.inputs) == {"input_ids", "position_ids"}


def test_a_row_without_completions_has_positions_but_nothing_to_predict(model):
    row = pack_row(model, [text_prompt(10, 11), text_prompt(20)], [[], []])
    assert row.inputs["input_ids"].tolist() == [[10, 11, 20]] and row.next_positions.tolist() == [[2, 1]] * 3
    assert row.predictors.tolist() == row.targets.tolist() == [] and row.predictors.dtype == torch.long


def test_images_join_in_the_order_of_the_row_and_the_next_position_is_not_the_length(model, processor):
    prompts = make_prompts(processor, (1, 0, 2))
    row = pack_row(model, prompts, [[], [], []])
    for key in ("pixel_values", "image_grid_thw"):
        assert row.inputs[key].equal(torch.cat([prompts[0][key], prompts[2][key]]))
    with_image, text = prompts[0]["input_ids"].shape[1], prompts[1]["input_ids"].shape[1]
    places = row.inputs["position_ids"][:, 0]
    assert int(row.next_positions[0, 0]) == int(places[:, :with_image].max()) + 1 < with_image
    assert row.next_positions[:, 1].tolist() == [text] * 3


def test_image_prompts_without_token_types_are_refused(model, processor):
    prompt = {key: value for key, value in make_prompts(processor, (1,))[0].items() if key != "mm_token_type_ids"}
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        completion_logprobs(model, [prompt], [[torch.tensor([30])]])


def test_another_attention_kernel_is_refused_before_it_gives_wrong_numbers(processor):
    eager = toy.model.build_model(processor.tokenizer)
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="sdpa"):
        completion_logprobs(eager, make_prompts(processor, (0,)), [[torch.tensor([30])]])


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_rows_hold_every_completion_once_and_keep_to_the_budget():
    prompt_lengths, lengths = [10, 50, 30, 10], [[5, 9], [20, 20, 20], [1], [7, 8, 9, 10]]
    rows = plan_rows(prompt_lengths, lengths, 100)
    placed = sorted((piece.prompt, index) for row in rows for piece in row for index in piece.completions)
    assert placed == [(p, i) for p, group in enumerate(lengths) for i in range(len(group))]
    for row in rows:
        sizes = [
            prompt_lengths[piece.prompt] + sum(lengths[piece.prompt][i] for i in piece.completions) for piece in row
        ]
        assert sum(sizes) <= 100


def test_a_group_longer_than_a_row_is_split_and_its_prompt_repeated():
    assert plan_rows([60], [[20, 20, 20]], 100) == [[Piece(0, [0, 1])], [Piece(0, [2])]]
    assert plan_rows([60], [[200]], 100) == [[Piece(0, [0])]]  # one completion cannot be split


def test_rows_are_filled_by_the_longest_groups_first():
    # In the order given, first fit needs three rows of 100; from the longest on, two.
    assert len(plan_rows([30, 70, 30, 70], [[], [], [], []], 100)) == 2
    assert len(plan_rows([20, 20, 80, 80], [[], [], [], []], 100)) == 2


def test_splitting_groups_over_rows_leaves_log_probs_and_gradients_the_same(model, processor):
    prompts = make_prompts(processor)
    completions = make_completions(model, 4)

    def by_rows(model, prompts, completions):
        found = {}
        sizes = [prompt["input_ids"].shape[1] for prompt in prompts]
        rows = plan_rows(sizes, [[len(ids) for ids in group] for group in completions], 60)
        assert len(rows) > 4
        for row in rows:
            held = [[completions[piece.prompt][index] for index in piece.completions] for piece in row]
            parts = completion_logprobs(model, [prompts[piece.prompt] for piece in row], held)
            for piece, part in zip(row, parts, strict=True):
                found |= {(piece.prompt, index): values for index, values in zip(piece.completions, part, strict=True)}
        return [
            torch.nn.utils.rnn.pad_sequence([found[p, i][: len(ids)] for i, ids in enumerate(group)], batch_first=True)
            for p, group in enumerate(completions)
        ]

    difference, gradient = compare_with_repeated_rows(model, prompts, completions, by_rows)
    assert difference < 1e-6 and gradient < 1e-6
