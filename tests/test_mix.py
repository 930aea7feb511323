"""infra/mix.py: what a mix says about each of its files, and what is refused."""

import json
import math
import shutil
from dataclasses import replace

import pytest

import toy
from infra.config import EvalConfig, TrainConfig
from infra.mix import DataFile, file_names, read_mix
from infra.options import parse_options
from infra.protocol import settle

PLAIN = DataFile("", "", "images", "base", ("iou", "format"), (1.0, 0.5))
A, B = {"file": "d/a.jsonl"}, {"file": "d/b.jsonl"}


def write(tmp_path, *entries):
    (tmp_path / "mix.json").write_text(json.dumps(entries))
    return str(tmp_path / "mix.json")


def read(tmp_path, *entries, plain=PLAIN):
    return read_mix(write(tmp_path, *entries), plain)


def parse(mix, *more):
    return parse_options(TrainConfig, ["--model", "m", "--mix", str(mix), *more])


# ---- what is read --------------------------------------------------------------------------------------------------


def test_a_key_that_is_left_out_takes_the_value_of_the_plain_option(tmp_path):
    [file, other] = read(tmp_path, A, {**B, "rewards": ["math"], "template": "rec"})
    assert file == DataFile("a", "d/a.jsonl", "images", "base", ("iou", "format"), (1.0, 0.5))
    assert other == DataFile("b", "d/b.jsonl", "images", "rec", ("math",), (1.0,))  # other rewards, other weights


def test_the_plain_options_are_those_of_the_command_line(tmp_path):
    [file] = parse(write(tmp_path, A), "--template", "plain", "--rewards", "math", "--image_root", "r").files
    assert (file.template, file.rewards, file.image_root, file.eval_files) == ("plain", ("math",), "r", ())
    [file] = parse(write(tmp_path, {**A, "template": "base", "image_root": "s"}), "--template", "plain").files
    assert (file.template, file.rewards, file.image_root) == ("base", ("iou", "rec_format"), "s")


def test_without_an_image_root_images_lie_beside_their_file(tmp_path):
    assert [file.image_root for file in parse(write(tmp_path, A, {"file": "e/b.jsonl"})).files] == ["d", "e"]


def test_an_evaluation_file_has_the_image_root_of_its_entry_unless_it_has_its_own(tmp_path):
    known = {**A, "eval_file": "v/val.json"}
    for entry, options, root in (
        (known | {"image_root": "coco"}, [], "coco"),
        (known | {"image_root": "coco", "eval_image_root": "val"}, [], "val"),
        (known, ["--image_root", "coco"], "coco"),
        (known, [], ""),  # then beside the evaluation file, as without a mix
    ):
        [file] = parse(write(tmp_path, entry), *options).files
        assert file.eval_image_root == root, entry


def test_evaluating_a_mix_looks_for_images_where_training_does(tmp_path):
    entry = {**A, "eval_file": "v/val.json"}
    for more, options, root in (({}, [], "v"), ({"image_root": "coco"}, [], "coco"), ({}, ["--image_root", "r"], "r")):
        mix = write(tmp_path, entry | more)
        _, [target] = settle(parse_options(EvalConfig, ["--model", "m", "--mix", mix, *options]))
        assert target.image_root == root, (more, options)


def test_a_checkpoint_is_evaluated_under_what_its_run_gave_to_each_file_of_the_mix(tmp_path):
    saved = {"files": {"val": {"template": "base", "measure": "math", "has_boxes": True}}}
    model = tmp_path / "m"
    shutil.copytree(toy.MODEL, model)
    (model / "evaluation.json").write_text(json.dumps(saved))
    mix = write(tmp_path, {**A, "eval_file": "val.json"}, {**B, "eval_file": "w.json", "template": "plain"})
    targets = settle(parse_options(EvalConfig, ["--model", str(model), "--mix", mix]))[1]
    assert [(t.template, t.measure, t.has_boxes) for t in targets] == [("base", "math", True), ("plain", "iou", True)]
    targets = settle(parse_options(EvalConfig, ["--model", str(model), "--mix", mix, "--template", "no_think"]))[1]
    assert [target.template for target in targets] == ["no_think", "plain"]
    targets = settle(parse_options(EvalConfig, ["--model", str(model), "--data", "val.json", "other.json"]))[1]
    assert [(t.measure, t.has_boxes) for t in targets] == [("math", True), ("math", False)]


def test_every_key_of_an_entry_is_read(tmp_path):
    entry = {"file": "a.jsonl", "image_root": "r", "template": "plain", "rewards": ["od_ap"], "weights": [2],
             "share": 3, "eval_file": "v.json", "eval_image_root": "w", "task": "detection"}  # fmt: skip
    [file] = read(tmp_path, entry)
    assert file == DataFile("a", "a.jsonl", "r", "plain", ("od_ap",), (2.0,), 3, ("v.json",), "w", "detection")
    assert file.measure == "detection" and replace(file, task="").measure == "od_ap"
    [file] = read(tmp_path, entry | {"eval_file": ["v.json", "w.json"]})
    assert file.eval_files == ("v.json", "w.json")


def test_files_are_called_by_their_stem_unless_two_have_the_same():
    assert file_names(["x/a.jsonl", "y/b.json"]) == ["a", "b"]
    assert file_names(["x/a.jsonl", "y/a.json"]) == ["x/a.jsonl", "y/a.json"]


def test_shares_decide_where_they_are_given_and_the_sizes_of_the_files_where_not(tmp_path):
    assert parse(write(tmp_path, {**A, "share": 2}, {**B, "share": 0.5})).shares == [2, 0.5]
    assert parse(write(tmp_path, A, B)).shares == []


def test_evaluation_files_are_known_by_name_with_the_entry_that_names_them(tmp_path):
    entry = {**B, "template": "no_think", "rewards": ["math"], "eval_file": ["v/val.json", "v/test.json"]}
    known = parse(write(tmp_path, A, entry)).evaluated
    assert list(known) == ["a", "b", "val", "test"] and known["val"] == known["test"] == known["b"] != known["a"]
    assert (known["val"].template, known["val"].measure) == ("no_think", "math")


# ---- what is refused -----------------------------------------------------------------------------------------------

REFUSED = [  # what the first of two entries has besides "file", and what the message says
    ({"file": ""}, 'entry 1: it has no "file": the path of a data file is expected'),
    ({"file": 3}, 'entry 1: "file" is 3: a text is expected'),
    ({"tempalte": "rec"}, "entry 1: unknown key 'tempalte': did you mean 'template'?"),
    ({"reward": "iou"}, "entry 1: unknown key 'reward': did you mean 'rewards'?"),
    ({"zzz": 1}, "entry 1: unknown key 'zzz': the keys are file, image_root,"),
    ({"rewards": "math"}, "entry 1: \"rewards\" is 'math': a list is expected"),
    ({"rewards": []}, "entry 1: rewards are empty"),
    ({"rewards": ["iou", "iou"]}, "entry 1: rewards iou iou name one twice"),
    ({"weights": [1]}, "entry 1: 1 weights for 2 rewards"),
    ({"weights": ["a", "b"]}, "entry 1: \"weights\" is ['a', 'b']: a list is expected"),
    ({"weights": [1, math.nan]}, "entry 1: weights are [1.0, nan]: finite numbers are expected"),
    ({"share": 0}, 'entry 1: "share" is 0: a number above 0 is expected'),
    ({"share": -1}, 'entry 1: "share" is -1: a number above 0 is expected'),
    ({"share": math.nan}, 'entry 1: "share" is nan: a number above 0 is expected'),
    ({"share": math.inf}, 'entry 1: "share" is inf: a number above 0 is expected'),
    ({"share": "2"}, "entry 1: \"share\" is '2': a number above 0 is expected"),
    ({"share": 2}, 'some entries have a "share" and some have none'),
    ({"task": "guess"}, "entry 1: \"task\" is 'guess'"),
    ({"eval_file": 3}, 'entry 1: "eval_file" is 3: a list is expected'),
    ({"image_root": 3}, 'entry 1: "image_root" is 3: a text is expected'),
    ({"image_root": None}, 'entry 1: "image_root" is None: a text is expected'),
    ({"template": ["rec"]}, "entry 1: \"template\" is ['rec']: a text is expected"),
    ({"eval_image_root": 3}, 'entry 1: "eval_image_root" is 3: a text is expected'),
    ({"rewards": ["mth"]}, "entry 1: reward 'mth' is unknown"),
    ({"template": "rek"}, "entry 1: template 'rek' is unknown"),
]


@pytest.mark.parametrize("change, reason", REFUSED)
def test_an_entry_that_does_not_fit_is_refused_with_its_number_and_the_value(tmp_path, change, reason):
    with pytest.raises(ValueError) as error:
        read(tmp_path, A | change, B)
    assert str(error.value).startswith(f"--mix {tmp_path}/mix.json") and reason in str(error.value)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{}", 'a list of objects is expected, as [{"file": "a.jsonl"}]'),
        ("[]", 'a list of objects is expected, as [{"file": "a.jsonl"}]'),
        ('["a.jsonl"]', 'a list of objects is expected, as [{"file": "a.jsonl"}]'),
        ('[{"file": ', "not JSON"),
    ],
)
def test_a_mix_that_is_no_list_of_objects_is_refused(tmp_path, text, reason):
    (tmp_path / "mix.json").write_text(text)
    with pytest.raises(ValueError) as error:
        read_mix(str(tmp_path / "mix.json"), PLAIN)
    assert str(error.value).startswith(f"--mix {tmp_path}/mix.json: {reason}")


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--data", "d.jsonl"], "data d.jsonl and mix .* are both given: the mix names all files, leave --data out"),
        (["--eval_data", "v.json"], 'eval_data is given beside a mix: name it as the "eval_file" of an entry'),
        (["--reward_weights", "1", "2"], r'reward_weights are \[1.0, 2.0\] beside a mix: give its entries "weights"'),
    ],
)
def test_options_that_a_mix_replaces_are_refused_beside_it(tmp_path, more, reason):
    with pytest.raises(ValueError, match=reason):
        parse(write(tmp_path, A, B), *more)


def test_a_reward_named_twice_is_refused():
    with pytest.raises(ValueError, match="rewards iou iou name one twice"):
        parse_options(TrainConfig, ["--model", "m", "--data", "d", "--rewards", "iou", "iou"])
