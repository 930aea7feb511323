"""Tests of rewards.py against hand arithmetic, pycocotools, plain re-implementations and properties.

The cases from VLM-R1 are those of its functions run on the text shown; where ours differs on purpose, the test says so.
"""

import json
import math
import random

import pytest

from rewards import (
    REWARDS,
    first_box,
    giou,
    iou,
    parse_boxes,
)

NAN, INF = math.nan, math.inf
CAT, DOG = {"bbox_2d": [10, 10, 50, 50], "label": "cat"}, {"bbox_2d": [60, 60, 90, 90], "label": "dog"}


def fenced(items) -> str:
    return f"```json\n{json.dumps(items)}\n```"


def answered(text: str) -> str:
    return f"<think>so</think><answer>{text}</answer>"


def detect(name: str, predicted, true=(CAT, DOG)) -> float:
    return REWARDS[name](answered(fenced(predicted)), json.dumps(list(true)))


def relabelled(item: dict, label: str) -> dict:
    return item | {"label": label}


# Boxes


def test_iou_of_a_shifted_square_is_a_seventh():
    assert iou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7, abs=1e-15)
    assert iou([0, 0, 10, 10], [2, 3, 4, 8]) == pytest.approx(10 / 100, abs=1e-15)


def test_iou_counts_overlaps_of_one_pixel_and_less_which_vlm_r1_does_not():
    assert iou([7, 7, 8, 8], [7, 7, 8, 8]) == 1.0
    assert iou([0, 0, 10, 10], [9, 0, 19, 10]) == pytest.approx(10 / 190, abs=1e-15)
    assert iou([0, 0, 1, 1], [0.5, 0, 1.5, 1]) == pytest.approx(0.5 / 1.5, abs=1e-15)


@pytest.mark.parametrize(
    "box", [[5, 5, 5, 9], [9, 9, 1, 1], [9, 1, 1, 9], [NAN, 0, 9, 9], [0, 0, INF, 9], [-INF, -INF, INF, INF], [NAN] * 4]
)
def test_empty_inverted_and_infinite_boxes_overlap_nothing(box):
    assert iou(box, [0, 0, 10, 10]) == iou([0, 0, 10, 10], box) == iou(box, box) == 0.0
    assert -1.0 <= giou(box, [0, 0, 10, 10]) <= 0.0


def test_boxes_whose_area_overflows_give_numbers():
    huge = [-1e200, -1e200, 1e200, 1e200]
    assert iou(huge, huge) == iou(huge, [0, 0, 1, 1]) == 0.0 and giou(huge, [0, 0, 1, 1]) == -1.0


def test_iou_is_symmetric_and_does_not_change_when_both_boxes_move_or_grow():
    random_numbers = random.Random(0)
    for _ in range(200):
        a, b = ([x, y, x + w, y + h] for x, y, w, h in ([random_numbers.randint(1, 40) for _ in range(4)] for _ in "ab"))
        moved = ([3 * a[0] + 7, 3 * a[1] - 5, 3 * a[2] + 7, 3 * a[3] - 5], [3 * b[0] + 7, 3 * b[1] - 5, 3 * b[2] + 7, 3 * b[3] - 5])
        assert iou(a, b) == iou(b, a) == pytest.approx(iou(*moved), abs=1e-12)
        cells = [{(x, y) for x in range(c[0], c[2]) for y in range(c[1], c[3])} for c in (a, b)]
        assert iou(a, b) == pytest.approx(len(cells[0] & cells[1]) / len(cells[0] | cells[1]), abs=1e-15)


def test_giou_takes_off_the_empty_share_of_the_enclosing_box():
    assert giou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7 - 2 / 9, abs=1e-15)
    assert giou([0, 0, 1, 1], [2, 0, 3, 1]) == pytest.approx(-1 / 3, abs=1e-15)
    assert giou([3, 4, 8, 9], [3, 4, 8, 9]) == 1.0
    assert giou([0, 0, 1, 1], [2, 0, 3, 1]) > giou([0, 0, 1, 1], [9, 0, 10, 1])
    assert giou([8, 8, 2, 2], [0, 0, 10, 10]) == 0.0  # hull 100, union 100, overlap none


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


# The table of VLM-R1's own behaviour (section 2.7 of the reference report), od_ap, od_ap50, od_length, weighted_sum

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
        ([CAT], (51 / 101 + 50 / 101 * 0, 0.5, 0.5, 0.575)),
        ([CAT, CAT], (0.5, 0.5, 0.5, 0.5)),
        ([relabelled(CAT, "dog"), relabelled(DOG, "cat")], (0.0, 0.0, 0.0, 0.3)),
        ([relabelled(CAT, "Cat"), relabelled(DOG, "DOG")], (0.0, 0.0, 0.0, 1.0)),
        ([MOVED_CAT, DOG], (0.8, 1.0, 0.8, 0.9125)),
    ],
)
def test_detection_rewards_equal_those_of_vlm_r1(predicted, expected):
    names = ("od_ap", "od_ap50", "od_length", "weighted_sum")
    assert [detect(name, predicted) for name in names] == pytest.approx(expected, abs=1e-12)
