"""report.html: what it shows of a run, what it must survive, and the page itself in a browser."""

import json
import math
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ALONE, make_model, make_run, options, run_here
from PIL import Image

import infra.report
import infra.run
from infra.report import write_report
from infra.report_data import choose_groups, failures, is_listed, read_marks, read_run
from infra.report_page import Line, advantage_colour, chart, escaped, number
from infra.runlog import append_rows, read_rows
from tools import report as command

PLACE = {"image_size": [200, 100], "input_size": [400, 400], "family": "qwen2_5_vl", "box_space": ""}
BOX = "<answer>[40, 80, 120, 200]</answer>"


def group_of(step=1, answer="[40, 80, 120, 200]", texts=(BOX, "none"), **more):
    rows = [
        {"completion": text, "rewards": {"iou": float(n)}, "reward": float(n), "advantage": 1.0 - n}
        for n, text in enumerate(texts)
    ]
    return {"step": step, "id": f"s{step}", "file": "a", "question": "the cat", "answer": answer, **PLACE, **more} | {
        "group": rows
    }


def answer_of(**more):
    about = {"step": 2, "set": "val", "of": 2, "index": 0, "id": "v", "question": "the dog", "answer": "[1, 2, 30, 40]"}
    truth = {"truth": "[2, 8, 60, 160]", "has_boxes": True, "completion": BOX, "truncated": False, **PLACE}
    return {**about, **truth, "box": [20, 20, 60, 50], "iou": 0.3, **more}


def write_run(out, *, steps=2, groups=(), answers=(), files=("a",), options=None, metrics=None):
    """The files of a run in `out`, with one image that all its samples share."""
    out.mkdir(parents=True, exist_ok=True)
    image = out / "image.png"
    Image.new("RGB", (200, 100), "navy").save(image)
    about = {"options": {"model": "m/x", "steps": 9, "rewards": ["iou"], "beta": 0.5, **(options or {})}}
    about |= {"files": [{"name": name} for name in files], "versions": {"torch": "2"}}
    (out / "config.json").write_text(json.dumps(about))
    row = metrics or {"reward": 0.5, "reward/iou": 0.25, "grad_norm": 1.0, "seconds_draw": 2.0, "seconds_learn": 1.0}
    append_rows(out / "metrics.jsonl", [{"step": step, **row} for step in range(1, steps + 1)])
    for step, value in ((0, 0.25), (steps, 0.75)):
        names = {"mean_iou": value, "mean_iou_low": value - 0.125, "mean_iou_high": value + 0.125}
        append_rows(out / "eval.jsonl", [{"step": step} | {f"eval/val/{key}": part for key, part in names.items()}])
    for name, rows in (("completions.jsonl", groups), ("answers.jsonl", answers)):
        if rows:
            append_rows(out / name, [{"images": [str(image)], **row} for row in rows])
    return out


def page_of(out):
    return write_report([out]).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every start tag of a page with its attributes, and the texts outside of scripts and style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def with_class(text, name):
    return [attributes for _, attributes in Elements(text).tags if name in (attributes.get("class") or "").split()]


# ---- what is shown -------------------------------------------------------------------------------------------------


def test_the_top_says_what_was_run_how_far_it_is_its_best_score_and_how_to_resume_it(tmp_path):
    text = " ".join(Elements(page_of(write_run(tmp_path / "my run"))).texts)
    for told in ("my run", "m/x", "step 2 of 9", "not finished", "best mean IoU, val", "0.75", "0.625 to 0.875"):
        assert told in text
    assert f"python train.py --resume {tmp_path}" in text and "torch 2" in text
    assert "beta" in text and "group_size" not in text  # only what differs from the defaults


def test_a_group_shows_its_image_the_true_box_and_every_predicted_box_with_its_completion(tmp_path):
    texts = (BOX, "<answer>[0, 0, 40, 40]</answer>", "no box")
    page = page_of(write_run(tmp_path, groups=[group_of(texts=texts)]))
    assert [mark["data-k"] for mark in with_class(page, "predicted")] == ["0", "1"]
    assert len([tag for tag, attributes in Elements(page).tags if (tag, attributes.get("class")) == ("g", "true")]) == 1
    assert [item["data-k"] for tag, item in Elements(page).tags if tag == "li"] == ["0", "1", "2"]
    assert 'x="20.00" y="20.00" width="40.00" height="30.00"' in page  # half as wide and a quarter as high: the image
    assert "data:image/jpeg;base64," in page and escaped(BOX) in page


def test_the_questions_of_a_group_lose_their_image_marks(tmp_path):
    assert "&lt;image&gt;" not in page_of(write_run(tmp_path, groups=[group_of(question="<image>the cat")]))


DETECTED = '<answer>```json\n[{"bbox_2d": [0, 0, 40, 40], "label": "dog"}]\n```</answer>'


@pytest.mark.parametrize(
    "truth, text, expected",
    [
        ("[0, 0, 4, 4]", BOX, [([20, 20, 60, 50], "")]),
        ('[{"bbox_2d": [0, 0, 4, 4], "label": "cat"}]', DETECTED, [([0, 0, 20, 10], "dog")]),
        ("None", DETECTED, [([0, 0, 20, 10], "dog")]),
        ("[0, 0, 4, 4]", "<answer>the point (40, 80)</answer>", [([20, 20, 20, 20], "")]),
        ("[0, 0, 4, 4]", "3 cats and 2 dogs", []),
    ],
    ids=["box", "detection", "nothing there", "point", "no box"],
)
def test_boxes_and_points_are_moved_into_the_image(truth, text, expected):
    assert [(mark.box, mark.label) for mark in read_marks(text, PLACE, listed=is_listed(truth))] == expected


def test_a_text_task_shows_text_and_no_boxes(tmp_path):
    group = group_of(answer="7", texts=("<answer>[1, 2, 3, 4]</answer>", "7"), images=[], image_size=None)
    page = page_of(write_run(tmp_path, groups=[group]))
    assert not with_class(page, "predicted") and with_class(page, "plain") and "[1, 2, 3, 4]" in page


def test_a_box_in_thousandths_is_moved_by_the_whole_image():
    [mark] = read_marks(BOX, {**PLACE, "family": "qwen3_vl"}, listed=False)
    assert mark.box == pytest.approx([8, 8, 24, 20])


DOG, CAT = [[0, 0, 10, 10], "dog"], [[50, 50, 70, 70], "cat"]


@pytest.mark.parametrize(
    "row, kinds",
    [
        ({"bad_sample": "gone"}, ["image not read"]),
        ({"iou": 0.51, "box": [0, 0, 1, 1]}, ["right"]),
        ({"iou": 0.5, "box": [0, 0, 1, 1]}, ["loose box"]),
        ({"iou": 0.05, "box": [0, 0, 1, 1]}, ["wrong object"]),
        ({"iou": 0.0, "box": None}, ["unreadable"]),
        ({"reward": 1.0}, ["right"]),
        ({"reward": 0.5}, ["partly right"]),
        ({"reward": 0.0}, ["wrong"]),
        ({"unread": True, "predicted": [], "true": [DOG]}, ["unreadable"]),
        ({"unread": False, "predicted": [DOG, CAT], "true": [CAT, DOG]}, ["right"]),
        ({"unread": False, "predicted": [], "true": []}, ["right"]),
        ({"unread": False, "predicted": [DOG, CAT], "true": [DOG]}, ["extra"]),
        ({"unread": False, "predicted": [DOG], "true": [DOG, CAT]}, ["missed"]),
        ({"unread": False, "predicted": [DOG, [DOG[0], "dog"]], "true": [DOG]}, ["extra"]),
        ({"unread": False, "predicted": [[DOG[0], "cat"]], "true": [DOG]}, ["wrong object"]),
        ({"unread": False, "predicted": [[[0, 0, 10, 4], "dog"]], "true": [DOG]}, ["loose box"]),
        ({"unread": False, "predicted": [[[0, 0, 10, 0.5], "dog"]], "true": [DOG]}, ["missed", "extra"]),
        ({"unread": False, "predicted": [[None, None]], "true": []}, ["extra"]),
    ],
)
def test_an_answer_has_the_kinds_of_failure_that_its_score_shows(row, kinds):
    assert failures(row) == kinds


def test_the_gallery_shows_failures_first_and_the_share_of_each_kind(tmp_path):
    answers = [answer_of(iou=0.9, id="good"), *(answer_of(id=f"bad{n}") for n in range(3))]
    page = page_of(write_run(tmp_path, answers=answers))
    assert [card["data-kinds"] for card in with_class(page, "answer")] == ["loose box"] * 3 + ["right"]
    text = " ".join(Elements(page).texts)
    assert "75%" in text and "3 of 4" in text and "25%" in text and "Evaluation at step 2" in text


def test_answers_of_a_later_step_than_the_log_are_left_out(tmp_path):
    assert read_run(write_run(tmp_path, answers=[answer_of(step=3)])).answers == []


def test_several_files_have_a_filter_and_a_curve_each(tmp_path):
    metrics = {"reward": 1.0, "file/a/reward": 0.5, "file/b/reward": 1.5}
    out = write_run(tmp_path, files=("a", "b"), groups=[group_of(), group_of(2, file="b")], metrics=metrics)
    page = page_of(out)
    assert [item["data-file"] for item in with_class(page, "group")] == ["a", "b"]
    assert ("select", {"name": "file"}) in Elements(page).tags and "Reward by file" in page


def test_two_runs_share_their_axes(tmp_path):
    first, second = write_run(tmp_path / "A", steps=3), write_run(tmp_path / "B", steps=9)
    page = write_report([first, second]).read_text()
    assert not (second / "report.html").exists() and page.count('<section class="run">') == 2
    chart_data = page.partition("weighted sum")[2].partition('<script type="application/json">')[2].partition("<")[0]
    data = json.loads(chart_data)
    assert data["range"] == [1, 9] and [len(line) for line in data["lines"]] == [3, 9]


def test_two_runs_show_their_groups_and_answers_one_after_the_other(tmp_path):
    runs = [
        write_run(tmp_path / name, groups=[group_of(id=f"group {name}")], answers=[answer_of(id=f"answer {name}")])
        for name in "AB"
    ]
    told = write_report(runs).read_text()
    heads = ["Groups of A", "group A", "Groups of B", "group B", "Evaluation of A", "answer A", "Evaluation of B"]
    places = [told.index(head) for head in [*heads, "answer B"]]
    assert places == sorted(places) and told.count("<img ") == 4
    alone = write_report(runs[:1]).read_text()
    assert "<h2>Groups</h2>" in alone and "group B" not in alone


def test_a_figure_that_some_steps_lack_is_drawn_from_the_others(tmp_path):
    out = write_run(tmp_path / "run")
    append_rows(out / "metrics.jsonl", [{"step": 3, "reward": 1.0, "entropy": 0.5}, {"step": 4}, {"step": 5}])
    data = write_report([out]).read_text().partition(">Entropy ")[2].partition('json">')[2].partition("<")[0]
    assert json.loads(data)["lines"] == [[[3.0, 0.5]]]


@pytest.mark.parametrize("num_steps, state", [(2, "step 2 of 2, finished"), (3, "step 2 of 3, not finished")])
def test_a_run_by_epochs_is_finished_after_the_steps_that_they_come_to(tmp_path, num_steps, state):
    out = write_run(tmp_path / "run", options={"steps": 0, "epochs": 1.0})
    about = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**about, "num_steps": num_steps}))
    assert state in write_report([out]).read_text()


# ---- curves --------------------------------------------------------------------------------------------------------


def test_a_curve_goes_through_its_values_and_the_start_is_a_level_line():
    steps, values = np.array([0.0, 10.0]), np.array([0.0, 1.0])
    found = Elements(chart("t", "n", [Line("x", steps, values, start=0.0)]))
    curves = {tag["class"]: tag["points"].split() for name, tag in found.tags if name == "polyline"}
    assert curves["alone"][0] == curves["start"][0] == "42.0,160.0"  # bottom left of 360 x 180, without the margins
    left, right = (point.split(",") for point in curves["alone"])
    assert right[0] == "344.0" and float(right[1]) == pytest.approx(8 + 0.05 / 1.05 * 152, abs=0.1)
    assert curves["start"][1] == "344.0,160.0"


def test_a_long_curve_keeps_its_spike_in_few_points():
    values = np.zeros(5000)
    values[1234] = 7.0
    told = json.loads(chart("t", "n", [Line("x", np.arange(5000.0), values)]).partition('json">')[2].partition("<")[0])
    assert len(told["lines"][0]) == 300 and sum(row[1] for row in told["lines"][0]) > 0
    points = [
        tag["points"]
        for name, tag in Elements(chart("t", "n", [Line("x", np.arange(5000.0), values)])).tags
        if name == "polyline"
    ]
    assert len(points[0].split()) <= 301 and ",8.0" in points[0]


@pytest.mark.parametrize(
    "value, told", [(12345.0, "12,345"), (0.12345, "0.123"), (3e-4, "3.0e-4"), (None, "-"), (math.nan, "-")]
)
def test_a_figure_takes_few_characters(value, told):
    assert number(value) == told


def test_the_colour_tells_the_sign_of_the_advantage():
    assert advantage_colour(2) == advantage_colour(1) == "#1c6ee6" and advantage_colour(-1) == "#f05a0a"
    assert advantage_colour(0) == advantage_colour(math.nan) == "#969ca4"


# ---- texts from models and data ------------------------------------------------------------------------------------

NASTY = "</script><script>alert(1)</script></style>\"'><img src=x onerror=alert(2)>\0\ud800"


def test_every_text_from_a_model_or_a_data_set_is_escaped(tmp_path):
    listed = json.dumps([{"bbox_2d": [0, 0, 40, 40], "label": NASTY}])
    groups = [group_of(answer=listed, texts=(listed, NASTY), question=NASTY, id=NASTY, file=NASTY), group_of(2)]
    answers = [answer_of(set=NASTY, question=NASTY, completion=NASTY, truth=NASTY, id=NASTY), answer_of()]
    answers.append({"step": 2, "set": "val", "of": 2, "id": "x", "bad_sample": NASTY})
    detected = {"predicted": [[[0, 0, 9, 9], NASTY]], "true": [], "unread": False}
    answers.append(answer_of(**detected))
    out = write_run(tmp_path, groups=groups, answers=answers, files=(NASTY,), options={"model": NASTY, NASTY: NASTY})
    row = {"step": 3, f"reward/{NASTY}": 1.0, f"file/{NASTY}/reward": 1.0}
    append_rows(out / "metrics.jsonl", [row])
    append_rows(out / "eval.jsonl", [{"step": 3, f"eval/{NASTY}/mean_iou": 1.0}])
    found = Elements(page_of(out)).tags
    scripts = [attributes for tag, attributes in found if tag == "script"]
    assert [tag for tag in scripts if tag != {"type": "application/json"}] == [{}]
    assert not [tag for tag in found if any(name.startswith("on") for name in tag[1])]
    assert all(attributes["src"].startswith("data:image/") for tag, attributes in found if tag == "img")
    assert [tag for tag, _ in found].count("style") == 1


def test_the_page_asks_the_network_for_nothing_and_lets_only_its_own_script_run(tmp_path):
    page = page_of(write_run(tmp_path, groups=[group_of()], answers=[answer_of()]))
    links = [value for _, tag in Elements(page).tags for name, value in tag.items() if name in ("src", "href")]
    assert all(link.startswith("data:") for link in links) and "url(" not in page and "@import" not in page
    [policy] = [tag["content"] for name, tag in Elements(page).tags if tag.get("http-equiv")]
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


# ---- runs that are unfinished, old, large --------------------------------------------------------------------------


def test_a_run_that_was_killed_while_it_wrote_still_opens(tmp_path):
    out = write_run(tmp_path, groups=[group_of()])
    for name in ("metrics.jsonl", "completions.jsonl", "eval.jsonl"):
        with open(out / name, "a") as file:
            file.write('{"step": 3, "rew')
    assert "step 2 of 9" in page_of(out)


def test_a_run_that_has_only_begun_still_opens(tmp_path):
    out = write_run(tmp_path)
    for name in ("metrics.jsonl", "eval.jsonl"):
        (out / name).unlink()
    page = page_of(out)
    assert "No step has been logged yet" in page and "No group has been logged" in page


def test_a_run_of_before_opens_and_says_why_it_has_no_boxes(tmp_path):
    old = {key: value for key, value in group_of().items() if key not in (*PLACE, "file")}
    for row in old["group"]:
        del row["reward"]
    page = page_of(write_run(tmp_path, groups=[old]))
    assert "did not log where boxes lie" in page and "<img" in page and escaped(BOX) in page


def test_an_image_that_is_gone_leaves_the_text(tmp_path):
    out = write_run(
        tmp_path, groups=[group_of(images=["gone.png"])], answers=[answer_of(images=["gone.png"], image_size=None)]
    )
    page = page_of(out)
    assert "<img" not in page and escaped(BOX) in page and "cannot be read" in page


def test_images_beyond_the_budget_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(infra.report, "MAX_IMAGE_BYTES", 10)
    assert "<img" not in page_of(write_run(tmp_path, groups=[group_of()]))


def test_a_long_run_is_sampled_and_keeps_the_best_the_worst_and_the_most_disputed():
    groups = [group_of(step) for step in range(1, 501)]
    for group in groups:
        for row in group["group"]:
            row["reward"] = 0.5
    for row in groups[100]["group"]:
        row["reward"] = 1.0
    for row in groups[200]["group"]:
        row["reward"] = 0.0
    for row, reward in zip(groups[306]["group"], (0.9, 0.1), strict=True):
        row["reward"] = reward
    chosen = [group["step"] for group in choose_groups(groups)]
    assert {101, 201, 307} <= set(chosen) and len(chosen) <= 48 and chosen == sorted(chosen)


def test_a_page_of_5000_steps_takes_less_than_2_seconds_and_15_mb(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    photos = []
    for place in range(100):
        photos.append(str(tmp_path / f"{place}.jpg"))
        Image.fromarray(np.roll(noise, place, axis=1)).save(photos[-1])
    groups = [group_of(step, texts=(BOX * 9,) * 8, images=[photos[step % 50]]) for step in range(1, 501)]
    answers = [answer_of(images=[photos[50 + n % 50]]) for n in range(200)]
    metrics = {f"figure{n}": 0.5 for n in range(20)} | {"reward": 0.5, "kl": 0.1, "grad_norm": 1.0, "seconds_draw": 1.0}
    out = write_run(tmp_path / "run", steps=5000, groups=groups, answers=answers, metrics=metrics)
    start = time.process_time()
    path = write_report([out])
    assert time.process_time() - start < 2 and path.stat().st_size < 15e6


# ---- in a run ------------------------------------------------------------------------------------------------------


def test_a_run_writes_the_page_its_answers_and_where_boxes_lie(checkpoint, scenes, tmp_path):
    out = tmp_path / "out"
    run_here(options(checkpoint, scenes, out, "--steps", "2", "--eval_every", "1", "--save_every", "0"))
    answers = read_rows(out / "answers.jsonl")
    assert [row["step"] for row in answers] == [2] * 6 and {row["set"] for row in answers} == {"test"}
    [group, _] = read_rows(out / "completions.jsonl")
    assert group["image_size"] == group["input_size"] == [64, 64] and group["family"] == "qwen2_5_vl"
    assert group["file"] == "train" and group["group"][0]["reward"] == sum(group["group"][0]["rewards"].values())
    page = (out / "report.html").read_text()
    assert "step 2 of 2, finished" in page and len(with_class(page, "answer")) == 6


def test_without_report_a_run_writes_no_page(checkpoint, scenes, tmp_path):
    more = ["--steps", "1", "--save_every", "0", "--report", "False"]
    run_here(options(checkpoint, scenes, tmp_path / "out", *more))
    assert not (tmp_path / "out" / "report.html").exists() and (tmp_path / "out" / "answers.jsonl").exists()


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    def broken(outs):
        raise OSError("No space left on device")

    said, run = [], make_run(*make_model(), ALONE, [], out=tmp_path)
    run.log = SimpleNamespace(say=said.append)
    monkeypatch.setattr(infra.run, "write_report", broken)
    run.report([{"step": 1}])
    assert len(said) == 1 and "No space left" in said[0] and read_rows(tmp_path / "answers.jsonl") == [{"step": 1}]


def test_the_command_names_its_page_and_refuses_what_is_no_run(tmp_path, capsys):
    assert command.main([str(write_run(tmp_path / "run"))]) == 0
    assert str(tmp_path / "run" / "report.html") in capsys.readouterr().out
    assert command.main([str(tmp_path)]) == 2 and "config.json: no such file" in capsys.readouterr().err
    assert command.main([]) == 2
