"""Tests of metrics/detection.py against pycocotools, OVDEval's published rule and tables, and hand arithmetic."""

import contextlib
import copy
import io
import math
import random

import numpy as np
import pytest

from metrics.detection import (
    average_precision,
    box_ious,
    coco_map,
    giou,
    greedy_matches,
    greedy_precision_recall,
    iou,
    nms_ap,
    ovdeval_overall,
    suppress,
)

NAN, INF = math.nan, math.inf
A, B, FAR = [0.0, 0.0, 100.0, 100.0], [200.0, 0.0, 300.0, 100.0], [500.0, 500.0, 600.0, 600.0]
SETS = ("celebrity", "logo", "landmark", "color", "material", "position", "relationship", "negation")


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
    assert -1.0 <= giou(box, [0, 0, 10, 10]) == giou([0, 0, 10, 10], box) <= 0.0


def test_boxes_whose_area_overflows_give_numbers():
    huge = [-1e200, -1e200, 1e200, 1e200]
    assert iou(huge, huge) == iou(huge, [0, 0, 1, 1]) == 0.0 and giou(huge, [0, 0, 1, 1]) == -1.0


def test_overlaps_are_those_of_counting_cells_and_stay_when_both_boxes_move_and_grow():
    draw = random.Random(0)
    for _ in range(200):
        a, b = ([x, y, x + w, y + h] for x, y, w, h in ([draw.randint(1, 40) for _ in range(4)] for _ in "ab"))
        moved = [[3 * c[0] + 7, 3 * c[1] - 5, 3 * c[2] + 7, 3 * c[3] - 5] for c in (a, b)]
        assert iou(a, b) == iou(b, a) == pytest.approx(iou(*moved), abs=1e-12)
        cells = [{(x, y) for x in range(c[0], c[2]) for y in range(c[1], c[3])} for c in (a, b)]
        either, both = cells[0] | cells[1], cells[0] & cells[1]
        hull = math.prod(max(cell[i] for cell in either) + 1 - min(cell[i] for cell in either) for i in (0, 1))
        assert iou(a, b) == pytest.approx(len(both) / len(either), abs=1e-15)
        assert giou(a, b) == giou(b, a) == pytest.approx(iou(a, b) - 1 + len(either) / hull, abs=1e-12)


def test_the_matrix_of_overlaps_holds_the_iou_of_every_pair():
    draw = random.Random(4)
    boxes = [[x, y, x + w, y + h] for x, y, w, h in ([draw.uniform(0.1, 40) for _ in range(4)] for _ in range(40))]
    boxes += [
        [5, 5, 5, 9],
        [9, 9, 1, 1],
        [9, 1, 1, 9],
        [NAN, 0, 9, 9],
        [0, 0, INF, 9],
        [-INF, -INF, INF, INF],
        [NAN] * 4,
    ]
    boxes += [[-1e200, -1e200, 1e200, 1e200]] * 2
    ious = box_ious(boxes, boxes[::-1])
    assert ious.shape == (49, 49) and box_ious([], boxes).shape == (0, 49)
    assert ious == pytest.approx(np.array([[iou(a, b) for b in boxes[::-1]] for a in boxes]), abs=1e-12)


def test_giou_takes_off_the_empty_share_of_the_enclosing_box():
    assert giou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7 - 2 / 9, abs=1e-15)
    assert giou([0, 0, 1, 1], [2, 0, 3, 1]) == pytest.approx(-1 / 3, abs=1e-15)
    assert giou([3, 4, 8, 9], [3, 4, 8, 9]) == 1.0
    assert giou([0, 0, 1, 1], [2, 0, 3, 1]) > giou([0, 0, 1, 1], [9, 0, 10, 1])
    assert giou([8, 8, 2, 2], [0, 0, 10, 10]) == 0.0  # hull 100, union 100, overlap none


def random_image(draw: random.Random, num_labels: int = 6, width: float = 200) -> tuple[list, list]:
    """An image with found, missed, repeated and invented boxes; either side may be empty."""

    def box() -> list[float]:
        x, y = draw.uniform(0, 300), draw.uniform(0, 300)
        w, h = (draw.choice([32.0, 96.0, draw.uniform(4, 40), draw.uniform(20, width)]) for _ in "wh")
        return [round(v, draw.choice([0, 2])) for v in (x, y, x + w, y + h)]

    labels = [f"class {k}" for k in range(num_labels)]
    true = [(box(), draw.choice(labels)) for _ in range(draw.choice([0, 1, 2, 5, 8]))]
    if true and draw.random() < 0.2:
        true.append(draw.choice(true))  # a tie
    predicted = []
    for corners, label in true:
        for _ in range(draw.choice([0, 1, 1, 2])):
            side = min(corners[2] - corners[0], corners[3] - corners[1])
            moved = [v + draw.choice([0, draw.uniform(-0.2, 0.2)]) * side for v in corners]
            predicted.append((moved, label if draw.random() < 0.9 else draw.choice([*labels, "unknown"])))
    predicted += [(box(), draw.choice([*labels, "unknown"])) for _ in range(draw.choice([0, 0, 1, 3]))]
    predicted += [draw.choice(predicted) for _ in range(draw.choice([0, 0, 2]) if predicted else 0)]
    draw.shuffle(predicted)
    return ([] if draw.random() < 0.05 else predicted), true


def cocoeval_stats(images: list[tuple[list, list]]) -> dict[str, float]:
    """The first six stats of pycocotools, without those that have no true box."""
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    names = dict.fromkeys(label for _, true in images for _, label in true)
    ids = {label: k for k, label in enumerate(names, start=1)}

    def rows(side: int) -> list[dict]:
        items = [(i, box, label) for i, image in enumerate(images) for box, label in image[side] if label in ids]
        return [
            {
                "id": n,
                "image_id": i,
                "category_id": ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "score": 1.0,
            }
            for n, (i, (x1, y1, x2, y2), label) in enumerate(items, start=1)
        ]

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {"info": {}, "images": [{"id": i} for i in range(len(images))], "annotations": rows(1)}
        truth.dataset["categories"] = [{"id": k, "name": label} for label, k in ids.items()]
        truth.createIndex()
        run = evaluation.COCOeval(truth, truth.loadRes(rows(0)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    keys = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    stats = zip(keys, run.stats[:6].tolist(), strict=True)
    return {key: value for key, value in stats if value != -1}  # its mark of a range without truth


def worst_difference(images: list[tuple[list, list]]) -> float:
    ours, theirs = coco_map(images), cocoeval_stats(images)
    assert ours.keys() == theirs.keys()
    return max(abs(ours[key] - theirs[key]) for key in theirs)


def test_every_stat_of_a_data_set_is_that_of_cocoeval():
    assert worst_difference([random_image(random.Random(seed)) for seed in range(1000)]) < 1e-12


def test_every_stat_of_250_small_data_sets_is_that_of_cocoeval():
    worst, compared, missing = 0.0, 0, 0
    for first in range(0, 1000, 4):
        images = [random_image(random.Random(seed), 3, 60) for seed in range(2000 + first, 2004 + first)]
        labels = {label for _, true in images for _, label in true}
        if any(label in labels for predicted, _ in images for _, label in predicted):  # pycocotools cannot load none
            worst = max(worst, worst_difference(images))
            compared += 1
            missing += len(coco_map(images)) < 6
    assert worst < 1e-12
    assert compared > 200 and missing > 20  # so many have a range without truth


def crowded_image(draw: random.Random) -> tuple[list, list]:
    """True boxes of one class that overlap across the border between medium and large, on a grid that makes ties."""

    def box() -> list[float]:
        x, y, size = draw.choice([0.0, 8.0, 16.0]), draw.choice([0.0, 8.0, 16.0]), draw.choice([88.0, 96.0, 104.0])
        return [x, y, x + size, y + draw.choice([size, size / 2])]

    return [(box(), "a") for _ in range(draw.choice([1, 3, 5]))], [(box(), "a") for _ in range(draw.choice([1, 2, 4]))]


def test_ties_and_true_boxes_of_two_ranges_on_one_place_are_as_in_cocoeval():
    for seed in range(60):
        draw = random.Random(seed)
        assert worst_difference([crowded_image(draw) for _ in range(5)]) < 1e-12


def test_more_than_100_boxes_of_a_class_are_cut_per_image_as_in_cocoeval():
    draw = random.Random(0)
    for length in (99, 100, 101, 250):
        noise = [([x, 0.0, x + 5, 5.0], draw.choice("ab")) for x in range(1000, 1000 + length)]
        images = [([(FAR, "a")] * length + [(A, "a"), (B, "b")], [(A, "a"), (B, "b")]), (noise, [(FAR, "a")])]
        assert worst_difference(images) < 1e-12


def test_a_true_box_too_large_for_coco_is_ignored_with_what_takes_it():
    huge = [0.0, 0.0, 2e5, 2e5]
    images = [([(huge, "a"), (huge, "a"), (A, "a")], [(huge, "a"), (A, "a")])]
    assert worst_difference(images) < 1e-12
    assert coco_map(images)["map"] == 1.0


def test_a_figure_without_a_true_box_is_absent():
    assert coco_map([([(A, "a")], [(A, "a")])]) == {"map": 1, "map_50": 1, "map_75": 1, "map_large": 1}
    assert coco_map([([(A, "a")], [])]) == coco_map([]) == nms_ap([([(A, "a")], [])]) == nms_ap([]) == {}


def test_map_by_hand_over_two_images():
    # Ranked: wrong, right (of 2 true): precision 1/2 at recalls 0 to 0.5, which are 51 of 101.
    images = [([(FAR, "a"), (A, "a")], [(A, "a")]), ([], [(B, "a")])]
    assert coco_map(images)["map"] == pytest.approx(0.5 * 51 / 101, abs=1e-12)
    # The order of the images is that of the ranking: with the hit first, precision is 1 up to recall 0.5.
    images = [([(A, "a")], [(A, "a")]), ([(FAR, "a")], [(B, "a")])]
    assert coco_map(images)["map_50"] == pytest.approx(51 / 101, abs=1e-12)


def test_map_of_one_image_is_that_of_the_reward():
    for seed in range(200):
        predicted, true = random_image(random.Random(seed))
        if true:
            assert coco_map([(predicted, true)])["map"] == pytest.approx(average_precision(predicted, true), abs=1e-12)


def test_boxes_that_are_not_finite_are_wrong_predictions_in_every_range():
    for bad in ([math.nan] * 4, [0.0, 0.0, math.inf, 100.0], [-math.inf, 0.0, math.inf, 1.0]):
        images = [([(bad, "a"), (A, "a")], [(A, "a")])]
        scores = coco_map(images)
        assert scores["map"] == scores["map_large"] == pytest.approx(0.5)
        assert greedy_precision_recall(images) == {"precision": 0.5, "recall": 1.0}
        assert nms_ap(images)["nms_ap"] == pytest.approx(0.5)


def test_items_without_a_box_or_label_raise_nothing_and_hit_nothing():
    predicted = [(None, "a"), (None, None), (A, None), (A, 3.0)]
    images = [(predicted, [(A, "a"), (None, "a")])]
    assert coco_map(images)["map"] == nms_ap(images)["nms_ap"] == 0.0
    assert greedy_precision_recall(images) == {"precision": 0.0, "recall": 0.0}


def test_other_area_ranges_can_be_given():
    images = [([(A, "a")], [(A, "a"), (B, "a")])]
    scores = coco_map(images, sizes={"tiny": (0, 10), "any": (10, 1e6)})
    assert scores["map_any"] == scores["map"] == pytest.approx(51 / 101)
    assert not {"map_tiny", "map_small"} & scores.keys()


def test_greedy_precision_and_recall_by_hand():
    half = [0.0, 0.0, 100.0, 50.0]  # IoU 1/2 with A
    images = [
        ([(A, "a"), (A, "a"), (B, "b")], [(A, "a"), (B, "a")]),  # a hit, a duplicate, a wrong label
        ([(half, "a")], [(A, "a"), (FAR, "b")]),  # a hit on the threshold
        ([(FAR, "a")], []),
    ]
    assert greedy_precision_recall(images) == {"precision": 2 / 5, "recall": 2 / 4}
    assert greedy_precision_recall(images, threshold=0.51) == {"precision": 1 / 5, "recall": 1 / 4}
    assert greedy_precision_recall([]) == {"precision": 0.0, "recall": 0.0}


def test_greedy_matching_gives_a_true_box_to_its_best_prediction_whatever_the_order():
    near, true = [0.0, 0.0, 100.0, 90.0], [(A, "a"), ([0.0, 0.0, 100.0, 60.0], "a")]
    for predicted in ([(near, "a"), (A, "a")], [(A, "a"), (near, "a")]):  # near takes the second: 60 / 90
        assert greedy_precision_recall([(predicted, true)]) == {"precision": 1.0, "recall": 1.0}


def test_suppression_keeps_one_prediction_per_true_box_of_any_class():
    close = [0.0, 0.0, 100.0, 90.0]
    predicted = [(close, "not a"), (A, "a"), (FAR, "a"), (FAR, "b"), (B, "b")]
    assert suppress(predicted, [(A, "a"), (B, "b")]) == [predicted[0], *predicted[2:]]
    assert suppress(predicted, [(A, "a"), (B, "b")], keep_last=True) == predicted[1:]
    half = [0.0, 0.0, 100.0, 50.0]
    assert len(suppress([(half, "a"), (half, "b")], [(A, "a")])) == 2  # IoU 0.5 is not above 0.5


def test_what_is_kept_for_one_true_box_is_not_dropped_for_another():
    # The first overlaps A alone (8/12). The second overlaps A too (85/115) and is dropped there, but kept for b2.
    b2 = [0.0, 30.0, 100.0, 130.0]
    predicted = [([0.0, -20.0, 100.0, 80.0], "a"), ([0.0, 15.0, 100.0, 115.0], "b")]
    assert suppress(predicted, [(A, "a"), (b2, "b")]) == predicted
    assert suppress(predicted, [(A, "a")]) == predicted[:1]


def test_nms_ap_by_hand():
    # A model that gives every box both labels has AP 1/2 for a and 1 for b (A as "b" is no false positive to a).
    both = [([(A, "b"), (A, "a"), (B, "b"), (B, "a")], [(A, "a"), (B, "b")])]
    assert coco_map(both)["map"] == pytest.approx((1 + 0.5) / 2)
    # Kept: (A, "b"), (B, "b"): a is never found, and b is second.
    assert nms_ap(both)["nms_ap"] == nms_ap(both)["nms_ap_50"] == pytest.approx((0 + 0.5) / 2)
    assert nms_ap(both, keep_last=True)["nms_ap"] == pytest.approx((1 + 0) / 2)


def test_suppression_is_ovdevals_rule_written_out():
    for seed in range(300):
        predicted, true = random_image(random.Random(seed), 3)
        for keep_last in (False, True):
            kept, dropped = set(), set()
            for corners, _ in true:
                rivals = [i for i, (box, _) in enumerate(predicted) if iou(box, corners) > 0.5]
                rivals = rivals[::-1] if keep_last else rivals
                kept |= set(rivals[:1])
                dropped |= set(rivals[1:])
            expected = [item for i, item in enumerate(predicted) if i not in dropped - kept]
            assert suppress(predicted, true, keep_last=keep_last) == expected


def test_nms_ap_is_cocoevals_ap_of_what_is_kept():
    images = [random_image(random.Random(seed)) for seed in range(5000, 5200)]
    stats = cocoeval_stats([(suppress(predicted, true), true) for predicted, true in images])
    scores = nms_ap(images)
    assert scores["nms_ap"] == pytest.approx(stats["map"], abs=1e-12)
    assert scores["nms_ap_50"] == pytest.approx(stats["map_50"], abs=1e-12)


@pytest.mark.parametrize(
    ("values", "overall"),
    [  # Tables 4 and 7 of the paper: base 3B, base 7B, 3B after SFT and after RL, 32B after RL
        ((13.2, 26.5, 21.3, 2.9, 11.6, 47.9, 13.1, 38.7), 25.46),
        ((48.4, 35.8, 44.6, 3.0, 10.5, 40.5, 16.2, 39.0), 29.08),
        ((50.4, 34.9, 50.7, 4.3, 7.6, 33.7, 13.1, 34.4), 26.50),
        ((55.0, 34.6, 47.9, 4.5, 9.7, 42.9, 21.5, 37.7), 31.01),
        ((57.8, 35.8, 48.3, 7.8, 19.1, 44.5, 27.0, 51.7), 36.79),
    ],
)
def test_the_overall_score_is_that_of_the_papers_tables(values, overall):
    assert ovdeval_overall(dict(zip(SETS, values, strict=True))) == pytest.approx(overall, abs=0.01)


def test_an_overall_score_without_all_sets_names_the_missing_ones():
    with pytest.raises(ValueError, match="logo, negation"):
        ovdeval_overall({name: 1.0 for name in SETS if name not in ("logo", "negation")})


def best_first(ious: list[list[float]], floor: float) -> list[tuple[int, int]]:
    """A one-to-one matching by looking for the best pair again and again, as VLM-R1 does."""
    pairs, rows, columns = [], list(range(len(ious))), list(range(len(ious[0])))
    while rows and columns:
        p, t = max(((p, t) for p in rows for t in columns), key=lambda pair: ious[pair[0]][pair[1]])
        if ious[p][t] < floor:
            break
        pairs.append((p, t))
        rows.remove(p)
        columns.remove(t)
    return pairs


def test_matches_are_those_of_looking_for_the_best_pair_again_and_again():
    draw = random.Random(1)
    for _ in range(500):
        ious = [[draw.randint(0, 9) / 9 for _ in range(draw.randint(1, 6))]]
        ious += [[draw.randint(0, 9) / 9 for _ in ious[0]] for _ in range(draw.randint(0, 6))]
        assert greedy_matches(np.array(ious)) == best_first(ious, 0.5)


def test_images_are_left_as_they_were():
    images = [random_image(random.Random(seed)) for seed in range(20)]
    before = copy.deepcopy(images)
    for metric in (coco_map, greedy_precision_recall, nms_ap):
        assert metric(images) == metric(images)
    assert images == before
    assert np.isfinite(list(coco_map(images).values())).all()
