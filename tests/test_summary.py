"""Tests of metrics/summary.py: figures by hand, intervals against exact probabilities, paired comparisons."""

import json
import math

import numpy as np
import pytest

from metrics.summary import bootstrap_interval, compare, headline, mean_interval, share_interval, summarize

BOX = [0.0, 0.0, 100.0, 100.0]


def row(overlap, box=(1, 2, 3, 4), truncated=False):
    return {"iou": overlap, "box": box and list(box), "truncated": truncated}


def detected(predicted, true, **more):
    return {"predicted": predicted, "true": true, "unread": False, "truncated": False, **more}


# ---- figures -------------------------------------------------------------------------------------------------------


def test_the_figures_of_rec_are_shares_of_the_overlaps():
    rows = [row(0.0, None, True), row(0.5), row(0.51), row(0.9), {"bad_sample": "gone"}]
    summary = summarize(rows)
    assert (summary["samples"], summary["bad_samples"]) == (4, 1)
    assert summary["accuracy"] == 0.5  # above 0.5, not at it, as VLM-R1 counts
    assert summary["accuracy_75"] == summary["unparsed"] == summary["truncated"] == 0.25
    assert summary["mean_iou"] == pytest.approx(1.91 / 4)
    assert summary["mean_iou_low"] < summary["mean_iou"] < summary["mean_iou_high"]


def test_the_figures_of_a_text_task_are_the_mean_reward():
    summary = summarize([{"reward": value, "truncated": False} for value in (0.0, 1.0, 0.5)])
    assert summary["reward"] == 0.5 and summary["reward_low"] <= 0.5 <= summary["reward_high"]


def test_box_and_text_samples_of_one_set_are_both_reported():
    summary = summarize([row(0.6), {"reward": 0.0, "truncated": True}])
    assert summary["accuracy"] == 1 and summary["reward"] == 0 and summary["truncated"] == 0.5


def test_the_figures_of_detection_are_those_of_its_images():
    rows = [detected([(BOX, "cat")], [(BOX, "cat")]), detected([], [(BOX, "cat")]) | {"unread": True}]
    summary = summarize(rows)
    assert summary["map"] == summary["map_large"] == summary["nms_ap"] == pytest.approx(51 / 101)
    assert summary["precision"] == 1.0 and summary["recall"] == summary["unparsed"] == 0.5
    assert "map_small" not in summary


def test_a_set_without_a_true_object_has_no_map_and_no_headline():
    summary = summarize([detected([(BOX, "cat")], [])])
    assert not {"map", "map_50", "map_large", "nms_ap"} & summary.keys() and summary["precision"] == 0.0
    with pytest.raises(
        ValueError, match="none of the figures mean_iou, map, reward.*no sample of the set has a true box"
    ):
        headline(summary)


def test_the_headline_is_the_first_of_overlap_map_and_reward():
    assert headline(summarize([row(0.6), {"reward": 1.0, "truncated": False}])) == "mean_iou"
    assert headline(summarize([detected([], [(BOX, "cat")])])) == "map"
    assert headline(summarize([{"reward": 1.0, "truncated": False}])) == "reward"


def test_no_readable_sample_is_an_error_that_names_the_first():
    with pytest.raises(ValueError, match="none of 2 samples.*gone"):
        summarize([{"bad_sample": "gone"}, {"bad_sample": "late"}])
    with pytest.raises(ValueError, match="none of 0 samples"):
        summarize([])


@pytest.mark.parametrize(
    "rows",
    [
        [row(0.0, None, True), row(0.75), {"bad_sample": "gone"}],
        [detected([(BOX, "cat"), (None, None)], [(BOX, "cat"), (BOX, 3.0)]), detected([], [])],
        [{"reward": 0.25, "truncated": False}, {"reward": 0.0, "reward_error": "raised", "truncated": True}],
    ],
)
def test_rows_from_a_saved_file_give_the_same_figures_as_fresh_ones(rows):
    again = summarize(json.loads(json.dumps(rows)))
    assert again == summarize(rows) and list(again) == list(summarize(rows))


# ---- intervals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [8, 20, 400])
def test_the_bounds_of_a_share_are_where_the_share_is_1_96_deviations_away(count):
    # Wilson's bounds solve |share - p| = 1.96 sqrt(p (1 - p) / n) for p.
    for successes in range(1, count):
        for bound in share_interval(successes, count):
            deviation = math.sqrt(bound * (1 - bound) / count)
            assert abs(successes / count - bound) == pytest.approx(1.959964 * deviation, rel=1e-9)


def test_the_interval_of_a_share_is_honest_at_both_ends():
    low, high = share_interval(0, 8)
    assert low == 0.0 and high == pytest.approx(1.959964**2 / (8 + 1.959964**2))
    assert share_interval(8, 8) == (pytest.approx(1 - high), 1.0)
    for successes in range(9):
        low, high = share_interval(successes, 8)
        assert 0 <= low <= successes / 8 <= high <= 1


def test_the_interval_of_a_share_covers_the_truth_in_about_95_of_100_cases():
    count, truth = 30, 0.07
    weights = [math.comb(count, k) * truth**k * (1 - truth) ** (count - k) for k in range(count + 1)]
    covered = [low <= truth <= high for low, high in (share_interval(k, count) for k in range(count + 1))]
    assert 0.92 < sum(weight for weight, inside in zip(weights, covered, strict=True) if inside) < 0.99


def test_the_bootstrap_interval_of_a_mean_has_the_width_of_its_standard_error():
    # 95% of a share of 0.5 over 400 samples: +- 1.96 * 0.025
    low, high = bootstrap_interval(np.arange(400) % 2 == 0)
    assert low == pytest.approx(0.451, abs=0.01) and high == pytest.approx(0.549, abs=0.01)


def test_the_interval_of_a_mean_is_that_of_a_share_if_all_values_are_0_or_1():
    assert mean_interval(np.zeros(8)) == share_interval(0, 8)
    assert mean_interval(np.array([1.0, 0.0, 1.0])) == share_interval(2, 3)
    assert mean_interval(np.array([0.0, 1.0, 0.5])) == bootstrap_interval(np.array([0.0, 1.0, 0.5]))
    assert mean_interval(np.full(8, 0.3)) == pytest.approx((0.3, 0.3))  # a bootstrap of a constant has no width


def test_accuracy_and_overlap_of_no_hit_in_8_have_an_interval_with_width():
    summary = summarize([row(0.0, None)] * 8)
    assert summary["accuracy_low"] == summary["mean_iou_low"] == 0.0
    assert summary["accuracy_high"] == summary["mean_iou_high"] == pytest.approx(0.3244, abs=1e-4)


# ---- comparison ----------------------------------------------------------------------------------------------------


def answers(overlaps, first=0):
    return [{"id": str(n), "question": "q", "iou": value} for n, value in enumerate(overlaps, first)]


def test_evaluations_are_compared_sample_by_sample():
    result = compare(answers([0.2, 0.6, 0.4, 0.9]), answers([0.7, 0.6, 0.8, 0.8, 0.1]))
    assert result["samples"] == 4 and result["accuracy"] == 0.5
    assert result["mean_iou"] == pytest.approx(0.2)
    assert result["mean_iou_low"] < 0.2 < result["mean_iou_high"]


def test_the_order_of_the_samples_does_not_matter_and_unread_samples_are_left_out():
    first = [*answers([0.2, 0.6]), {"id": "2", "bad_sample": "gone"}]
    second = [*answers([0.8, 0.3, 0.9])[::-1], {"id": "3", "bad_sample": "gone"}]
    result = compare(first, second)
    assert result["samples"] == 2 and result["mean_iou"] == pytest.approx((0.6 - 0.3) / 2)


def test_detections_are_compared_by_the_ap_of_each_image():
    truth = {"question": "q", "true": [(BOX, "cat")]}
    worse = [{"id": "a", "predicted": [], **truth}, {"id": "b", "question": "q", "true": [], "predicted": []}]
    better = [{"id": "a", "predicted": [(BOX, "cat")], **truth}, worse[1]]
    assert compare(worse, better)["image_ap"] == 0.5


def test_rewards_are_compared_beside_overlaps():
    first, second = answers([0.2]), answers([0.4])
    first += [{"id": "9", "question": "q", "reward": 0.25}]
    second += [{"id": "9", "question": "q", "reward": 1.0}]
    result = compare(first, second)
    assert result["samples"] == 2 and result["reward"] == 0.75 and result["mean_iou"] == pytest.approx(0.2)


def test_evaluations_with_no_sample_in_common_are_refused_with_an_id_of_each():
    with pytest.raises(ValueError, match=r"'0' \('q'\), the second '5' \('q'\); evaluate both on the same data"):
        compare(answers([0.2]), answers([0.2], first=5))
    with pytest.raises(ValueError, match="the first has none, the second '0'"):
        compare([{"id": "0", "bad_sample": "gone"}], answers([0.2]))


def test_evaluations_that_share_samples_but_no_score_are_refused():
    with pytest.raises(
        ValueError, match="share 1 samples but no score: the first has accuracy, mean_iou, the second reward"
    ):
        compare(answers([0.2]), [{"id": "0", "question": "q", "reward": 1.0}])
