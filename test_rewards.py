"""Tests of rewards.py: boxes, formats, length and repetition, against hand arithmetic and VLM-R1.

The cases from VLM-R1 are those of its functions run on the text shown; where ours differs on purpose, the test says so.
"""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rewards import REWARDS, count_tokens, first_box, load_reward, parse_boxes

CAT, DOG = {"bbox_2d": [10, 10, 50, 50], "label": "cat"}, {"bbox_2d": [60, 60, 90, 90], "label": "dog"}


@pytest.fixture(autouse=True)
def without_math_verify(monkeypatch):
    """Tests do not depend on whether math_verify is installed."""
    monkeypatch.setitem(sys.modules, "math_verify", None)


def fenced(items) -> str:
    return f"```json\n{json.dumps(items)}\n```"


def answered(text: str) -> str:
    return f"<think>so</think><answer>{text}</answer>"


def detect(name: str, predicted, true=(CAT, DOG)) -> float:
    return REWARDS[name](answered(fenced(predicted)), json.dumps(list(true)))


def relabelled(item: dict, label: str) -> dict:
    return item | {"label": label}


# ---- reading boxes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ('<answer>{"bbox_2d": [12, 7, 30, 22]}</answer>', [12, 7, 30, 22]),
        ('<answer> { "bbox_2d" : [ 12 , 7 , 30 , 22 ] } </answer>', [12, 7, 30, 22]),
        ("<answer>[1.5,-2.25,\n3e1,+.5]</answer>", [1.5, -2.25, 30, 0.5]),
        ("<answer>[1,2,3] [1,2,3,4,5] ['1','2','3','4'] [[5,6,7,8]]</answer>", [5, 6, 7, 8]),
        ("<answer>[1,2,3,4] [5,6,7,8]</answer><answer>[9,9,9,9]</answer>", [1, 2, 3, 4]),
        ("<answer>none</answer><answer>[9,9,9,9]</answer>", None),
        ("[1,2,3,4]", None),
        ("<answer>[1,2,3,4]", None),
        ("<answer>[NaN,2,3,4] [1,2,3,4]</answer>", None),
        ("<answer>[1e999,2,3,4]</answer>", None),
    ],
)
def test_the_first_box_of_the_first_answer_is_read(text, box):
    assert first_box(text) == box


def test_a_base_model_is_read_without_tags():
    assert first_box("The box is [1, 2, 3, 4].", anywhere=True) == [1, 2, 3, 4]
    assert first_box("[1,2,3,4] <answer>[5,6,7,8]</answer>", anywhere=True) == [5, 6, 7, 8]


def test_items_are_read_from_the_last_fence_of_the_last_answer():
    text = f"{answered(fenced([CAT]))} {answered(fenced([CAT, CAT]) + fenced([DOG]))}"
    assert parse_boxes(text) == [([60, 60, 90, 90], "dog")]
    assert parse_boxes(json.dumps([CAT])) == parse_boxes(fenced([CAT])) == parse_boxes(answered(json.dumps([CAT])))
    assert parse_boxes("None") == parse_boxes("<answer> none. </answer>") == parse_boxes("[]") == []
    assert parse_boxes("nothing") is parse_boxes('{"bbox_2d": [1, 2, 3, 4]}') is parse_boxes("[" * 10_000) is None
    assert parse_boxes('[5, {"bbox_2d": [1, 2, 3]}, {"label": 3}]') == [(None, None), (None, None), (None, 3)]


def test_boxes_inside_strings_and_keys_are_not_items():
    assert parse_boxes('[{"bbox_2d": ["1", "2", "3", "4"], "label": "a"}]') == [(None, "a")]


# ---- rewards of boxes; the first table is what VLM-R1's own functions return -----------------------------------------

MOVED_CAT = relabelled(CAT, "cat") | {"bbox_2d": [10, 10, 50, 40]}  # IoU 0.75
WRONG = [{"bbox_2d": [200 + 50 * i, 200, 240 + 50 * i, 240], "label": "cat"} for i in range(3)]
ABSENT = [{"bbox_2d": [200 + 50 * i, 200, 240 + 50 * i, 240], "label": "zebra"} for i in range(20)]


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ([CAT, DOG], (1.0, 1.0, 1.0, 1.0)),
        ([CAT, DOG] * 5, (1.0, 1.0, 0.2, 0.88)),
        ([*WRONG, CAT, DOG], (0.625, 0.625, 0.25, 0.91)),
        ([CAT, DOG, *ABSENT], (1.0, 1.0, 2 / 22, 0.7 + 0.3 * (1 - 20 / 22 / 2))),
        ([CAT], (0.5, 0.5, 0.5, 0.575)),
        ([CAT, CAT], (0.5, 0.5, 0.5, 0.5)),
        ([relabelled(CAT, "dog"), relabelled(DOG, "cat")], (0.0, 0.0, 0.0, 0.3)),
        ([relabelled(CAT, "Cat"), relabelled(DOG, "DOG")], (0.0, 0.0, 0.0, 1.0)),
        ([MOVED_CAT, DOG], (0.8, 1.0, 0.8, 0.9125)),
    ],
)
def test_detection_rewards_equal_those_of_vlm_r1(predicted, expected):
    names = ("od_ap", "od_ap50", "od_length", "weighted_sum")
    assert [detect(name, predicted) for name in names] == pytest.approx(expected, abs=1e-12)


def test_a_list_outside_of_a_fence_or_of_answer_tags_is_no_detection():
    for completion in (answered(json.dumps([CAT, DOG])), fenced([CAT, DOG]), f"<answer>{fenced([CAT, DOG])}"):
        assert REWARDS["od_ap"](completion, json.dumps([CAT, DOG])) == 0.0
    assert REWARDS["weighted_sum"](fenced([CAT, DOG]), json.dumps([CAT, DOG])) == 1.0  # reads no tags, in VLM-R1 too
    assert REWARDS["weighted_sum"](answered(json.dumps([CAT, DOG])), json.dumps([CAT, DOG])) == 0.0


def test_the_last_fence_of_the_last_answer_counts_and_for_weighted_sum_the_first_fence():
    completion = answered(fenced([CAT])) + answered(fenced([CAT, DOG]) + " or " + fenced([DOG]))
    truth = json.dumps([DOG])
    assert REWARDS["od_ap"](completion, truth) == REWARDS["od_f1"](completion, truth) == 1.0
    assert REWARDS["weighted_sum"](completion, truth) == pytest.approx(0.7 + 0.3 * 0.75)


def test_the_truth_may_be_bare_fenced_or_tagged():
    for name in ("od_ap", "od_ap50", "od_length", "od_f1", "weighted_sum"):
        for truth in (json.dumps([CAT]), fenced([CAT]), f"<answer> {fenced([CAT])} </answer>"):
            assert REWARDS[name](answered(fenced([CAT])), truth) == 1.0
        assert REWARDS[name](answered(fenced([CAT])), f"<answer>\n{json.dumps([CAT])}") == 0.0


@pytest.mark.parametrize("name", ["od_ap", "od_ap50", "od_length", "od_f1", "weighted_sum"])
def test_a_truth_of_none_pays_for_none_or_an_empty_list_alone(name):
    for truth in ("None", "<answer> None </answer>", "[]", fenced([])):
        for said in ("None", "none", "[]", fenced([]), "```json\nNone\n```"):
            assert REWARDS[name](answered(said), truth) == 1.0
        unreadable = ("", "blah blah", "null", "{}", "```json\n```", "```json [{ ```", fenced(None))
        for said in (*unreadable, fenced([CAT]), fenced([{}])):
            assert REWARDS[name](answered(said), truth) == 0.0
    for said in ("None", fenced([])):
        assert REWARDS[name](answered(said), json.dumps([CAT])) == 0.0


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_box_that_is_not_finite_is_a_wrong_prediction(number):
    for box in (f"[{number}, 10, 50, 50]", f"[10, 10, {number}, 50]", ", ".join([number] * 4).join("[]")):
        wrong = f'{{"bbox_2d": {box}, "label": "cat"}}'
        first = answered(f"```json\n[{wrong}, {json.dumps(CAT)}]\n```")
        assert REWARDS["od_ap"](first, json.dumps([CAT])) == 0.5  # the only hit has rank 2
        assert REWARDS["od_length"](first, json.dumps([CAT])) == 0.25
        assert REWARDS["od_f1"](first, json.dumps([CAT])) == pytest.approx(2 / 3)
        assert REWARDS["weighted_sum"](first, json.dumps([CAT])) == pytest.approx(0.7 + 0.3 * 0.75)
        assert REWARDS["od_ap"](answered(f"```json\n[{wrong}]\n```"), json.dumps([CAT])) == 0.0
        assert REWARDS["iou"](answered(box), "[10, 10, 50, 50]") == 0.0
        assert REWARDS["rec_format"](answered(f"{{{box}}}"), "") == 0.0


def test_a_missing_label_is_a_wrong_label():
    unnamed = {"bbox_2d": CAT["bbox_2d"]}
    for other in (unnamed, unnamed | {"label": None}, unnamed | {"label": ["cat"]}):
        assert detect("od_ap", [other], [CAT]) == detect("od_f1", [other], [CAT]) == 0.0
        assert detect("weighted_sum", [other], [CAT]) == pytest.approx(0.3)  # VLM-R1 raises, or reuses the label before
        assert detect("weighted_sum", [DOG, other]) == pytest.approx(0.7 * 0.5 + 0.3)
    assert detect("od_ap", [unnamed], [unnamed]) == detect("od_f1", [unnamed], [unnamed]) == 1.0


def test_malformed_items_are_counted_but_match_nothing():
    broken = [None, 5, "x", [1, 2], {}, {"bbox_2d": [1, 2, 3], "label": "cat"}, {"bbox_2d": "1234", "label": "cat"}]
    assert detect("od_ap", [*broken, CAT], [CAT]) == 1.0  # skipped in COCO's ranking, in VLM-R1 too
    assert detect("od_length", [*broken, CAT], [CAT]) == 1 / 8
    assert detect("od_f1", [*broken, CAT], [CAT]) == pytest.approx(2 / 9)
    assert detect("weighted_sum", [*broken, CAT], [CAT]) == pytest.approx(0.7 + 0.3 * (1 - 7 / 8 / 2))


def test_f1_charges_duplicates_wrong_labels_absent_classes_and_loose_boxes():
    assert detect("od_f1", [CAT, DOG]) == 1.0
    assert detect("od_f1", [relabelled(DOG, "Dog"), CAT]) == 1.0
    assert detect("od_f1", [CAT, CAT, DOG]) == pytest.approx(4 / 5)
    assert detect("od_f1", [CAT, relabelled(DOG, "cat")]) == pytest.approx(2 / 4)
    assert detect("od_f1", [CAT, DOG, *ABSENT]) == pytest.approx(4 / 24)
    assert detect("od_f1", [CAT]) == pytest.approx(2 / 3)
    assert detect("od_f1", [MOVED_CAT, DOG]) == pytest.approx((6 * 1.0 + 4 * 0.5) / 10)  # IoU 0.75 passes 6 of 10


def test_the_101st_box_of_a_class_is_not_looked_at():
    wrong = [{"bbox_2d": [200 + i, 200, 240 + i, 240], "label": "cat"} for i in range(100)]
    assert detect("od_ap", [*wrong[:99], CAT], [CAT]) == pytest.approx(1 / 100)
    assert detect("od_ap", [*wrong, CAT], [CAT]) == 0.0
    assert detect("od_ap", [*(relabelled(item, "zebra") for item in wrong), CAT], [CAT]) == 1.0


def test_of_two_true_boxes_that_overlap_equally_the_later_is_taken():
    left, right, between = ({"bbox_2d": [x, 0, x + 10, 10], "label": "cat"} for x in (0, 2, 1))
    # between overlaps each of the others by 9/11, and those overlap by 2/3
    one, half = 51 / 101, 0.5 * 51 / 101  # a hit of rank 1 or 2 alone: half of the recalls
    assert detect("od_ap", [between, left], [left, right]) == pytest.approx((7 + 3 * half) / 10, abs=1e-12)
    assert detect("od_ap", [between, left], [right, left]) == pytest.approx((4 + 3 * one + 3 * half) / 10, abs=1e-12)


# ---- formats, overlaps and clicks ------------------------------------------------------------------------------------

VLM_R1_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
VLM_R1_REC_FORMAT = re.compile(
    r"<think>.*?</think>\s*<answer>.*?\{.*\[\d+,\s*\d+,\s*\d+,\s*\d+\].*\}.*?</answer>", re.DOTALL
)
PIECES = '<think>|</think>|<answer>|</answer>|{|}|[1, 2,3,4]|[1,2]| |\n|x|"bbox_2d": '.split("|")


def test_formats_accept_exactly_what_the_expressions_of_vlm_r1_accept():
    draw, accepted = random.Random(2), np.zeros(2, int)
    for _ in range(20_000):
        inside = ["".join(draw.choices(PIECES, k=draw.randint(0, 4))) for _ in range(4)]
        box = draw.choice(["", "{[1,2,3,4]}", "{", "}"])
        text = f"<think>{inside[0]}</think>{draw.choice(['', ' ', 'x'])}<answer>{inside[1]}{box}{inside[2]}</answer>"
        text = draw.choice(["", "", " "]) + text + draw.choice(["", "", "\n", inside[3]])
        text = "".join(draw.sample(inside, 4)) if draw.random() < 0.2 else text
        expected = [bool(VLM_R1_FORMAT.fullmatch(text)), bool(VLM_R1_REC_FORMAT.search(text))]
        assert [REWARDS["format"](text, ""), REWARDS["rec_format"](text, "")] == expected, text
        accepted += expected
    assert 2_000 < min(accepted) < max(accepted) < 18_000


@pytest.mark.parametrize("box", ["[ 12 , 7 , 30 , 22 ]", "[1.5, -2, 3.25, 4]", "[-1,\n2,\t3,4]"])
def test_boxes_with_decimals_signs_and_spaces_are_paid_for_format_and_overlap(box):
    text = answered(f'{{"bbox_2d": {box} }}')
    assert REWARDS["rec_format"](text, box) == REWARDS["iou"](text, box) == REWARDS["giou"](text, box) == 1.0


def test_the_toys_answer_is_paid_in_full_however_it_is_spaced():
    for text in (
        '<think>the small red circle</think><answer>{"bbox_2d": [12, 7, 30, 22]}</answer>',
        '<think> the small red circle </think> <answer> { "bbox_2d" : [ 12 , 7 , 30 , 22 ] } </answer>',
    ):
        assert [REWARDS[name](text, "[12, 7, 30, 22]") for name in ("format", "rec_format", "iou", "giou")] == [1.0] * 4


def test_overlap_is_soft_and_a_text_without_a_box_scores_nothing():
    assert REWARDS["iou"](answered("[0, 0, 2, 2]"), "<answer> [1, 1, 3, 3] </answer>") == pytest.approx(1 / 7)
    assert REWARDS["giou"](answered("[0, 0, 1, 1]"), "[2, 0, 3, 1]") == pytest.approx(-1 / 3)
    for text in ("[0, 0, 2, 2]", answered("none"), answered("[1, 2, 3]"), "", "<answer>[0, 0, 2, 2]"):
        assert REWARDS["iou"](text, "[0, 0, 2, 2]") == REWARDS["giou"](text, "[0, 0, 2, 2]") == 0.0
    assert REWARDS["iou"](answered("[0, 0, 2, 2]"), "no box") == 0.0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("[20, 20]", 1.0),
        ("click(20.5, 10)", 1.0),
        ('{"point_2d": [30, 40], "label": "ok"}', 1.0),
        ("[0, 0, 40, 40]", 1.0),  # the centre of a box
        ("[31, 20]", 0.0),
        ("[20, 41] then [20, 20]", 0.0),
        ("[NaN, 20]", 0.0),
        ("[20, 20, 30]", 0.0),
        ("20, 20", 0.0),
    ],
)
def test_a_click_counts_inside_the_true_box_and_on_its_edge(said, expected):
    assert REWARDS["point_in_box"](answered(said), "[10, 10, 30, 40]") == expected
    assert REWARDS["point_in_box"](said, "[10, 10, 30, 40]") == 0.0


# ---- length and repetition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "right"), [(0, 1.0), (256, 0.9267766953), (512, 0.75), (1024, 0.5), (1500, 0.5), (2048, 0.5)]
)
def test_the_cosine_reward_falls_with_length_for_right_and_wrong_answers_and_stays_down(tokens, right):
    text = "word " * tokens  # the truth is the text itself, as default sees it; VLM-R1 pays 1.0 at 2,048 tokens
    assert count_tokens(text) == tokens
    assert REWARDS["cosine_length"](text, text) == pytest.approx(right, abs=1e-9)
    assert REWARDS["cosine_length"](text, "5 seas") == pytest.approx(right - 1, abs=1e-9)


def test_the_cosine_reward_judges_by_what_the_truth_holds():
    right = {"[60, 60, 90, 90]": answered("[60, 60, 90, 90]"), json.dumps([CAT]): answered(fenced([CAT]))}
    right |= {"None": answered("None"), "yes": answered("yes")}
    for truth in right:
        for other, completion in right.items():
            assert (REWARDS["cosine_length"](completion, truth) > 0.5) == (other == truth)
    barely = [CAT, DOG, *ABSENT[:4]]  # weighted sum 0.7 + 0.3 (1 - 4/6/2) = 0.9; without the dog 0.575 < 0.7
    assert detect("cosine_length", barely) > 0.5 and detect("cosine_length", [CAT]) < 0.0


def test_tokens_are_words_digits_signs_and_line_breaks():
    assert count_tokens("") == count_tokens("   ") == 0
    assert count_tokens("The cat, 42!\n") == 7
    assert count_tokens("internationalization" * 1000) == 2500 and count_tokens("答" * 16) == 2


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0.0), (768, 0.0), (896, -0.5), (960, -0.75), (1024, -1.0), (5000, -1.0)]
)
def test_an_overlong_text_is_punished_along_a_straight_line(tokens, expected):
    assert REWARDS["soft_overlong"]("word " * tokens, "") == expected


def test_repetition_counts_items_of_a_list_and_else_runs_of_six_words():
    def repeated(text: str) -> float:
        return REWARDS["repetition"](text, "")

    assert repeated(fenced([CAT] * 5)) == repeated(f"```\n{json.dumps([CAT] * 5)}```") == pytest.approx(-0.8)
    assert repeated("boxes: " + json.dumps([CAT] * 5) + " done") == pytest.approx(-0.8)
    assert repeated(fenced([CAT | {"bbox_2d": [i, i, 50, 50]} for i in range(5)])) == 0.0
    assert repeated(fenced([{"x": 1}] * 5)) == repeated("") == repeated("a b c d e") == 0.0
    assert repeated("A b c d e f a B c d e f") == pytest.approx(1 / 7 * 6 - 1)
    for further in (fenced([CAT]), "```\n[1]```"):
        assert repeated(fenced([CAT] * 5) + further) == pytest.approx(-0.8)
    assert repeated(fenced([CAT] * 5).replace("}]", "},]")) == pytest.approx(-0.8)  # VLM-R1 needs json_repair for this
    assert repeated(fenced([5, None, "x", CAT, CAT])) == pytest.approx(-0.5)  # VLM-R1 raises a TypeError


# ---- use elsewhere ---------------------------------------------------------------------------------------------------


def test_a_reward_is_loaded_by_name_or_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def shout(completion, answer):\n    return float(completion.isupper())\n\nnothing = 3\n")
    assert load_reward("iou") is REWARDS["iou"]
    assert load_reward(f"{path}:shout")("A", "") == 1.0 and load_reward(f"{path}:shout") is load_reward(f"{path}:shout")
    with pytest.raises(ValueError, match="odLength.*unknown.*od_length"):
        load_reward("odLength")
    with pytest.raises(ValueError, match="there is no file"):
        load_reward("absent.py:shout")
    for spec in (f"{path}:quiet", f"{path}:nothing"):
        with pytest.raises(ValueError, match=r"has no function.*\(completion, answer\) -> float"):
            load_reward(spec)


ALONE = """
import sys
from rewards import REWARDS, average_precision, giou, iou, parse_boxes

assert iou([0, 0, 2, 2], [1, 1, 3, 3]) == 1 / 7 and giou([0, 0, 1, 1], [2, 0, 3, 1]) == -1 / 3
items = parse_boxes('[{"bbox_2d": [0, 0, 10, 10], "label": "cat"}]')
assert average_precision(items, items) == 1.0
assert not {"math_verify", "sympy"} & sys.modules.keys()  # loaded when a formula needs them
for name, reward in REWARDS.items():
    reward("<think>so</think><answer>[0, 0, 2, 2]</answer>", "[0, 0, 2, 2]")
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def test_rewards_and_detection_work_when_copied_alone(tmp_path):
    root = Path(__file__).parent
    (tmp_path / "metrics").mkdir()
    shutil.copy(root / "rewards.py", tmp_path)
    shutil.copy(root / "metrics/detection.py", tmp_path / "metrics")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def trl_reward(name, column="solution"):
    """REWARDS[name] as TRL calls it; `column` is the column of the data set that holds the truth."""

    def reward(completions, **columns):
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        return [REWARDS[name](text, answer) for text, answer in zip(texts, columns[column], strict=True)]

    reward.__name__ = name  # TRL logs the reward under this name
    return reward


def test_a_reward_can_be_given_to_trl():
    texts = [answered("[0, 0, 2, 2]"), answered("[1, 1, 3, 3]"), "none"]
    columns = {"prompts": ["p"] * 3, "completion_ids": [[1]] * 3, "truth": ["[1, 1, 3, 3]"] * 3, "trainer_state": None}
    adapted = trl_reward("iou", column="truth")
    assert adapted.__name__ == "iou"
    assert adapted(completions=texts, **columns) == [pytest.approx(1 / 7), 1.0, 0.0]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert adapted(completions=chats, **columns) == adapted(completions=texts, **columns)
    assert trl_reward("math")(completions=["5"], solution=["5"]) == [1.0]
