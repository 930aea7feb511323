"""rows.py: which completions a row holds, and the blank prompts that keep ranks together."""

from dataclasses import replace

import pytest
import torch
from helpers import ALONE, GROUP, make_model, make_rollout

from infra.parallel import World
from infra.rows import pack_rows
from model.packing import IMAGE_FEATURES
from model.vlm import blank_prompt

TWO = World(0, 2, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def step():
    """Four groups of three completions; only the first and the third prompt have images."""
    model, processor = make_model()
    return make_rollout(model, processor, ALONE), blank_prompt(processor)


def rows_of(step, chosen=range(4), row_tokens=4096, world=ALONE):
    rollout, blank = step
    return pack_rows(rollout.prompts, rollout.completions, chosen, row_tokens, blank, world)


@pytest.fixture
def other_rank(monkeypatch):
    """Sets how many rows the other rank has."""

    def set_rows(count):
        monkeypatch.setattr("infra.rows.all_max", lambda values, world: {"rows": float(max(count, values["rows"]))})

    return set_rows


@pytest.mark.parametrize("row_tokens, chosen", [(4096, [0, 1, 2, 3]), (60, [0, 1, 2, 3]), (30, [1, 3]), (4096, [3])])
def test_members_say_which_of_the_steps_completions_a_row_holds(step, row_tokens, chosen):
    rollout = step[0]
    flat = [ids for group in rollout.completions for ids in group]
    rows = rows_of(step, chosen, row_tokens)
    members = [row.members.tolist() for row in rows]
    assert sorted(sum(members, [])) == [number * GROUP + index for number in chosen for index in range(GROUP)]
    assert len(rows) == 1 if row_tokens == 4096 else len(rows) > 1
    for row, numbers in zip(rows, members, strict=True):
        held = [ids for group in row.completions for ids in group]
        owners = [prompt for prompt, group in zip(row.prompts, row.completions, strict=True) for _ in group]
        assert all(ids is flat[number] for ids, number in zip(held, numbers, strict=True))
        assert all(owner is rollout.prompts[number // GROUP] for owner, number in zip(owners, numbers, strict=True))


def test_the_mask_covers_each_completion_up_to_the_longest_of_its_row(step):
    for row in rows_of(step, row_tokens=60):
        lengths = [len(ids) for group in row.completions for ids in group]
        assert row.mask.shape == (len(row.members), max(lengths))
        assert row.mask.tolist() == [[place < length for place in range(max(lengths))] for length in lengths]


def test_no_groups_are_no_rows(step):
    assert rows_of(step, []) == []


def test_a_rank_with_less_to_do_adds_rows_of_a_blank_prompt(step, other_rank):
    other_rank(3)
    rows = rows_of(step, world=TWO)
    assert len(rows) == 3 and [len(row.members) for row in rows] == [12, 0, 0]
    assert all(any("pixel_values" in prompt for prompt in row.prompts) for row in rows)
    assert [prompt is step[1] for prompt in rows[0].prompts] == [False] * 4  # it has images and rows of its own
    for row in rows[1:]:
        assert row.prompts == [step[1]] and row.completions == [[]] and row.mask.shape == (0, 0)
    assert len(rows_of(step, [], world=TWO)) == 3  # a rank whose groups teach nothing


def test_a_row_without_an_image_gets_a_blank_one_if_there_are_several_ranks(step, other_rank):
    other_rank(1)
    [row] = rows_of(step, [1, 3], world=TWO)
    assert row.prompts[-1] is step[1] and row.completions[-1] == [] and len(row.prompts) == 3
    assert row.members.tolist() == [3, 4, 5, 9, 10, 11] and len(row.mask) == 6
    [row] = rows_of(step, [1, 3])
    assert len(row.prompts) == 2


def test_under_a_frozen_tower_only_an_empty_row_gets_the_blank_prompt(step, other_rank):
    other_rank(2)
    rollout, blank = step
    seen = [
        {key: value for key, value in prompt.items() if key != "pixel_values"} for prompt in (*rollout.prompts, blank)
    ]
    for inputs in seen:
        inputs[IMAGE_FEATURES] = ()
    frozen = replace(rollout, prompts=[replace(p, inputs=i) for p, i in zip(rollout.prompts, seen, strict=False)])
    rows = rows_of((frozen, replace(blank, inputs=seen[-1])), [1, 3], world=TWO)
    assert [len(row.prompts) for row in rows] == [2, 1] and [len(row.members) for row in rows] == [6, 0]
