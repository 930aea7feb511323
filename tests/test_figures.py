"""figures.py: figures of groups and steps by hand, over files and ranks; warnings, once for each cause."""

import json
import re
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import ALONE, CONFIG

import infra.figures
from data import Sample
from infra.figures import causes_for_concern, group_figures, reward_key, step_figures
from infra.run import Run
from model.vlm import Prompt

EOS = 2
BOX = "<answer>[1, 2, 3, 4]</answer>"


@pytest.fixture
def two_files(tmp_path):
    """The options of a run of rec.jsonl (the default rewards) and math.jsonl."""
    mix = [{"file": "rec.jsonl"}, {"file": "math.jsonl", "rewards": ["math", "format"]}]
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    return replace(CONFIG, data="", mix=str(tmp_path / "mix.json"))


def prompt_of(reward="", file=0):
    return Prompt({}, "", Sample("s", "q", "a", (), reward, True, "here", file=file), None, None)


# ---- a group -------------------------------------------------------------------------------------------------------


def figures_of(prompt, texts, config=CONFIG):
    completions = [torch.tensor([9, 9, EOS]), torch.tensor([9]), torch.tensor([EOS])]
    return group_figures(
        prompt, texts, completions, torch.tensor([1.0, 2.0, 3.0]), SimpleNamespace(config=config, eos_ids=[EOS])
    )


def test_the_figures_of_a_group_are_as_by_hand():
    figures = figures_of(prompt_of(), [BOX, "<answer>[1, 2]</answer>", "[1, 2, 3, 4]"])
    assert figures == {
        "reward": 2.0,
        "reward_std": 1.0,  # unbiased
        "groups_equal": 0.0,
        "truncated": pytest.approx(1 / 3),  # the second has no end token
        "unparsed": pytest.approx(2 / 3),  # no four numbers; no tags
        "completion_tokens": pytest.approx(5 / 3),
    }


def test_an_answer_counts_as_unread_by_what_its_prompt_is_measured_by(two_files):
    texts = ["<answer>7</answer>", "7", "<answer>8"]
    assert figures_of(prompt_of(file=1), texts, two_files)["unparsed"] == pytest.approx(1 / 3)  # math reads any answer
    assert figures_of(prompt_of(file=0), texts, two_files)["unparsed"] == 1  # none is a box
    assert figures_of(prompt_of("mcq"), texts)["unparsed"] == pytest.approx(1 / 3)  # its own method is not iou
    assert figures_of(prompt_of("iou", file=1), texts, two_files)["unparsed"] == 1


@pytest.mark.parametrize("totals, equal", [([0.0, 0.0, 0.0], 1.0), ([1.5, 1.5, 1.5], 1.0), ([1.5, 1.5, 1.25], 0.0)])
def test_a_group_is_equal_if_all_its_completions_earn_the_same(totals, equal):
    run = SimpleNamespace(config=CONFIG, eos_ids=[EOS])
    figures = group_figures(prompt_of(), [BOX] * 3, [torch.tensor([EOS])] * 3, torch.tensor(totals), run)
    assert figures["groups_equal"] == equal


def test_a_plugin_is_logged_under_the_name_of_its_function():
    assert reward_key("iou") == "reward/iou" and reward_key("my/rewards.py:length") == "reward/length"


# ---- a step --------------------------------------------------------------------------------------------------------


def group(reward, **paid):
    names = ("reward_std", "groups_equal", "truncated", "unparsed", "completion_tokens")
    return {"reward": reward, **dict.fromkeys(names, reward / 10), **{f"reward/{k}": v for k, v in paid.items()}}


GROUPS = [group(1.0, iou=0.5, rec_format=0.5), group(2.0, od_ap=1.0, rec_format=1.0), group(6.0, math=4.0, format=2.0),
          group(3.0, iou=1.0, rec_format=2.0)]  # fmt: skip
FILES = [0, 0, 1, 0]


def test_a_figure_is_the_mean_over_the_prompts_that_have_it(two_files):
    figures = step_figures(GROUPS, FILES, two_files, ALONE)
    assert figures["reward"] == 3.0 and figures["file/rec/reward"] == 2.0 and figures["file/math/reward"] == 6.0
    assert figures["reward/iou"] == 0.75 and figures["reward/od_ap"] == 1.0  # a sample's own method, paid once
    assert figures["reward/rec_format"] == pytest.approx(3.5 / 3) and figures["reward/math"] == 4.0
    assert (figures["file/rec/share"], figures["file/math/share"]) == (0.75, 0.25)
    for name in ("groups_equal", "truncated", "unparsed", "completion_tokens"):
        assert figures[name] == pytest.approx(0.3) and figures[f"file/rec/{name}"] == pytest.approx(0.2)
    assert figures["reward_std"] == pytest.approx(0.3) and "file/rec/reward_std" not in figures


def test_a_file_or_reward_that_no_prompt_has_is_left_out_and_one_file_is_told_once(two_files):
    figures = step_figures(GROUPS[:1], FILES[:1], two_files, ALONE)
    assert figures["file/rec/reward"] == 1.0 and figures["file/math/share"] == 0
    assert not {"file/math/reward", "reward/math", "reward/format", "reward/od_ap"} & figures.keys()
    one = step_figures(GROUPS[:2], [0, 0], CONFIG, ALONE)
    assert not [key for key in one if key.startswith("file/")] and one["reward"] == 1.5


def test_ranks_with_different_prompts_add_up_to_the_figures_of_one_process(two_files, monkeypatch):
    shares = [([0, 2], [1, 3]), ([0, 1, 2, 3], []), ([2], [0, 1, 3])]
    expected = step_figures(GROUPS, FILES, two_files, ALONE)
    for mine, others in shares:
        told = []  # what the other rank adds up: the sums, then the counts

        def record(values, world, told=told):
            told.append(values)
            return values

        def add(values, world, told=told):
            other = told.pop(0)
            assert list(values) == list(other)  # ranks add up tensors, in one order
            return {key: value + other[key] for key, value in values.items()}

        monkeypatch.setattr(infra.figures, "all_sum", record)
        step_figures([GROUPS[n] for n in others], [FILES[n] for n in others], two_files, ALONE)
        monkeypatch.setattr(infra.figures, "all_sum", add)
        found = step_figures([GROUPS[n] for n in mine], [FILES[n] for n in mine], two_files, ALONE)
        assert found == pytest.approx(expected) and list(found) == list(expected)


# ---- warnings ------------------------------------------------------------------------------------------------------

FINE = {"unparsed": 0.0, "truncated": 0.0, "groups_equal": 0.1, "reward": 0.5}


@pytest.mark.parametrize(
    "changes, cause, text",
    [
        ({"unparsed": 1.0}, "unparsed", r"100% of the completions cannot be read.*\['iou', 'rec_format'\]"),
        ({"truncated": 0.8}, "truncated", "80% of the completions are cut off at 9 tokens.*--max_completion_tokens"),
        ({"groups_equal": 0.95}, "groups_equal", r"95% of the groups earn equal rewards \(0.5 on average\)"),
        ({"groups_equal": 1.0, "reward": 0.0, "unparsed": 0.6}, "groups_equal", r"equal rewards \(0 on average\)"),
        ({"clamped": 0.01}, "clamped", r"1.00% of the tokens .* e\^20 .*lower --learning_rate"),
    ],
)
def test_a_warning_names_the_likely_cause(changes, cause, text):
    assert causes_for_concern([FINE] * 3, CONFIG) == {}
    found = causes_for_concern([FINE | changes] * 3, CONFIG)
    assert list(found) == [cause]
    assert re.search(text, found[cause])


def test_equal_rewards_are_no_cause_of_their_own_beside_answers_that_cannot_be_read_or_do_not_end():
    for changes in ({"unparsed": 1.0}, {"truncated": 0.8}):
        assert list(causes_for_concern([FINE | {"groups_equal": 1.0} | changes], CONFIG)) == list(changes)
    assert causes_for_concern([FINE | {"unparsed": 0.9, "truncated": 0.5, "groups_equal": 0.9}], CONFIG) == {}  # bounds


def test_causes_are_judged_by_the_mean_of_the_last_steps():
    rows = [FINE, FINE | {"truncated": 1.0}]
    assert causes_for_concern(rows, CONFIG) == {}
    assert list(causes_for_concern([*rows, rows[1]], CONFIG)) == ["truncated"]


def test_a_rising_share_of_truncated_completions_is_a_cause_while_it_is_still_small():
    def causes(shares):
        return list(causes_for_concern([FINE | {"truncated": share} for share in shares], CONFIG))

    assert causes([0.0, 0.0, 0.0, 0.2, 0.2, 0.2]) == ["truncated rises"]
    assert causes([0.2, 0.2, 0.2, 0.0, 0.0, 0.0]) == causes([0.2] * 6) == []
    assert causes([0.0, 0.0, 0.0, 0.09, 0.09, 0.09]) == []  # by less than a tenth
    assert causes([0.0, 0.0, 0.3, 0.3, 0.3]) == []  # too few steps
    text = causes_for_concern([FINE | {"truncated": share} for share in (0, 0, 0, 0.3, 0.3, 0.3)], CONFIG)
    assert "cut off at 9 tokens rises, from 0% to 30%" in text["truncated rises"]


def test_with_several_files_a_warning_names_the_file_though_the_others_are_fine(two_files):
    rows = [FINE | {f"file/{name}/{key}": value for name in ("rec", "math") for key, value in FINE.items()}] * 2
    assert causes_for_concern([*rows, FINE], two_files) == {}  # the last step has a prompt of neither
    bad = rows[0] | {"file/math/unparsed": 1.0}
    [(cause, text)] = causes_for_concern([bad, bad, FINE], two_files).items()
    assert cause == "file/math/unparsed"
    assert text.startswith("100% of the completions of math cannot be read") and "['math', 'format']" in text
    rising = [rows[0] | {"file/rec/truncated": share} for share in (0, 0, 0, 0.3, 0.3, 0.3)]
    assert list(causes_for_concern(rising, two_files)) == ["file/rec/truncated rises"]


def test_a_run_warns_from_the_third_step_on_and_once_for_each_cause():
    said = []
    run = SimpleNamespace(recent=deque(), warned=set(), log=SimpleNamespace(say=said.append), step=0)
    for step in range(1, 6):
        run.step = step
        run.recent.append(FINE)
        warnings = {"truncated": f"long in {step}"} | ({"clamped": f"far in {step}"} if step >= 4 else {})
        Run.warn_once(run, warnings)
    assert said == ["warning: step 3: long in 3", "warning: step 4: far in 4"]
