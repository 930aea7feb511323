"""The mistakes that users make, and the one line that each prints."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import run_here

import eval as evaluation
import sft
import toy
import toy.scenes
import train
from infra import parallel
from infra.config import EvalConfig, SftConfig, TrainConfig
from infra.options import config_from_command_line

HERE = Path(__file__).parent.parent
COMMANDS = {"train": (train.main, TrainConfig), "sft": (sft.main, SftConfig), "eval": (evaluation.main, EvalConfig)}
SMALL = (
    "--template plain --min_pixels 256 --prompts_per_step 2 --group_size 2 --max_completion_tokens 3 --eval_every 0 "
    "--steps 1 --output_dir new"
)


def change_line(root, name, change):
    """Writes the first four training samples with the second one changed."""
    records = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()[:4]]
    change(records[1])
    (root / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def change_model(root, name, change):
    shutil.copytree(root / "model", root / name)
    change(root / name)


def answer(text):
    return lambda record: record["conversations"][1].update(value=text)


def break_models(root):
    """Copies of the model, each with something wrong."""
    change_model(root, "cut", lambda d: os.truncate(d / "model.safetensors", 500_000))
    change_model(root, "void", lambda d: os.truncate(d / "model.safetensors", 0))
    change_model(root, "weightless", lambda d: (d / "model.safetensors").unlink())
    change_model(root, "pickled", lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"))
    change_model(root, "wordless", lambda d: (d / "tokenizer.json").unlink())
    change_model(root, "blind", lambda d: (d / "processor_config.json").unlink())
    change_model(root, "torn", lambda d: (d / "config.json").write_text("{"))
    change_model(root, "untyped", lambda d: (d / "config.json").write_text("{}"))
    config = json.loads((root / "model" / "config.json").read_text()) | {"model_type": "gemma3"}
    change_model(root, "gemma", lambda d: (d / "config.json").write_text(json.dumps(config)))
    (root / "empty").mkdir()
    (root / "dangling").symlink_to("gone")


def break_data(root):
    """Data files, rewards and mixes, each with something wrong."""
    change_line(root, "outside.jsonl", answer("[3, 4, 900, 20]"))
    change_line(root, "swapped.jsonl", answer("[30, 4, 10, 20]"))
    change_line(root, "imageless.jsonl", lambda record: record.update(image="gone.png"))
    change_line(root, "keyless.jsonl", lambda record: record.pop("conversations"))
    change_line(root, "judged.jsonl", lambda record: record.update(accu_reward_method="llm"))
    records = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    for record in records:
        answer(str([side / 64 for side in json.loads(record["conversations"][1]["value"])]))(record)
    (root / "shares.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    change_line(root, "four.jsonl", lambda record: None)
    change_line(root, "special.jsonl", lambda record: record["conversations"][0].update(value="<image>the <|im_end|>"))
    files = {
        "one.json": (root / "train.jsonl").read_text().splitlines()[0],
        "void.jsonl": "",
        "torn.jsonl": '{"image": \n',
        "notes.txt": "notes",
        "syntax.py": "def f(:\n",
        "mine.py": "def one(completion): return 1.0\n"
        "def named(completion, answer, solution): return 1.0\n"
        "def bad(completion, answer): raise KeyError('boxes')\n"
        "def wide(completion, answer): return float('inf')\n",
        "fileless.json": '[{"image_root": "."}]',
        "misspelt.json": '[{"file": "a.jsonl", "reward": ["iou"]}]',
        "single.json": '{"file": "a.jsonl"}',
        "unpaid.json": '[{"file": "a.jsonl", "rewards": ["ioo"]}]',
    }
    for name, text in files.items():
        (root / name).write_text(text)


@pytest.fixture(scope="module")
def place(checkpoint, tmp_path_factory):
    """A directory with a model, data and two runs as they should be, and with all that can be wrong with each."""
    root = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(checkpoint, root / "model")
    toy.scenes.write_split(root, "train", 24, seed=1)
    break_models(root)
    break_data(root)
    argv = ["--model", str(root / "model"), "--data", str(root / "train.jsonl"), *shlex.split(SMALL)]
    run_here([*argv, "--output_dir", str(root / "out")])
    run_here([*argv, "--output_dir", str(root / "lora"), "--lora_rank", "2"])
    return root


@pytest.fixture
def here(place, monkeypatch):
    """The directory of mistakes as the current one; what a command makes there is removed again."""
    monkeypatch.chdir(place)
    yield place
    shutil.rmtree(place / "new", ignore_errors=True)


TRAIN = f"train --model model --data train.jsonl {SMALL}"
UNKNOWN_REWARD = (
    "error: reward '{}' is unknown: give file.py:function or one of iou, giou, rec_format, format, od_ap, od_ap50, "
    "od_length, od_f1, weighted_sum, point_in_box, mcq, yes_no, numeric, math, all_match, default, cosine_length, "
    "repetition, soft_overlong"
)
DEFINE = "define it as (completion, answer) -> float, with `sample` or `rng` after them if it needs them"
OURS = "a file that eval.py --output wrote is expected"
MISTAKES = {  # command line: the line that it prints
    # ---- the model
    f"train --model no/such/model --data train.jsonl {SMALL}": "error: model no/such/model: no such directory",
    f"train --model 'C:\\models\\qwen' --data train.jsonl {SMALL}": (
        "error: model C:\\models\\qwen: no such directory; write the path with / instead of \\"
    ),
    f"train --model notes.txt --data train.jsonl {SMALL}": (
        "error: model notes.txt is a file: a directory with config.json and *.safetensors is expected"
    ),
    f"train --model out --data train.jsonl {SMALL}": (
        "error: model out is the directory of a run: give one of its checkpoints, as out/best"
    ),
    f"train --model out/best --data train.jsonl {SMALL}": (
        "error: model out/best: no such directory; nothing has beaten the start of that run yet: give one of "
        "out/checkpoints"
    ),
    f"train --model dangling --data train.jsonl {SMALL}": (
        "error: model dangling is a link to gone, which does not exist"
    ),
    f"train --model empty --data train.jsonl {SMALL}": "error: model empty: it has no config.json; it is empty",
    f"train --model cut --data train.jsonl {SMALL}": (
        "error: cut/model.safetensors is cut off: 500,000 of 4,426,872 bytes; copy or download it again"
    ),
    f"train --model void --data train.jsonl {SMALL}": (
        "error: void/model.safetensors is damaged: 0 bytes without a whole header; copy or download it again"
    ),
    f"train --model weightless --data train.jsonl {SMALL}": (
        "error: model weightless: it has no weights (*.safetensors); it holds chat_template.jinja, config.json, "
        "generation_config.json, processor_config.json, tokenizer.json, tokenizer_config.json"
    ),
    f"train --model pickled --data train.jsonl {SMALL}": (
        "error: model pickled: its weights are pickled (*.bin), which can run code when they are read: convert them to "
        "safetensors"
    ),
    f"train --model wordless --data train.jsonl {SMALL}": (
        "error: model wordless: it has no tokenizer; one of tokenizer.json, vocab.json, tokenizer.model is expected"
    ),
    f"train --model blind --data train.jsonl {SMALL}": (
        "error: model blind: it has no processor; one of preprocessor_config.json, processor_config.json is expected"
    ),
    f"train --model torn --data train.jsonl {SMALL}": (
        "error: torn/config.json is damaged: Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)"
    ),
    f"train --model untyped --data train.jsonl {SMALL}": (
        "error: untyped/config.json names no model_type: it is not the config of a Hugging Face model"
    ),
    f"train --model lora/checkpoints/step-000001 --data train.jsonl {SMALL}": (
        "error: model lora/checkpoints/step-000001 is a LoRA adapter: merge it with python -m tools.merge "
        "lora/checkpoints/step-000001 OUT and train OUT, or continue its run with --resume"
    ),
    # ---- the data
    "train --model model": "error: no data for --model model: name a file with --data F.jsonl, or several with --mix",
    f"train --model model --data gone.jsonl {SMALL}": (
        "error: gone.jsonl: no such data file; give --data the path of a .jsonl or .json file"
    ),
    f"{TRAIN} --image_root nowhere": (
        "error: nowhere: no such directory; give --image_root the one that holds the images of train.jsonl"
    ),
    f"{TRAIN} --image_root model": (
        "error: train.jsonl:1: 'model/train/00000.png' is no file; check the image root and the name"
    ),
    f"{TRAIN} --eval_data gone.json": (
        "error: gone.json: no such data file; give --data the path of a .jsonl or .json file"
    ),
    f"train --model model --data torn.jsonl {SMALL}": (
        "error: torn.jsonl:1: not JSON: Expecting value: line 2 column 1 (char 11); write one JSON object per line, or "
        "one list"
    ),
    f"train --model model --data void.jsonl {SMALL}": (
        "error: void.jsonl: holds no sample; one JSON object per line is expected"
    ),
    f"train --model model --data one.json {SMALL}": (
        "error: one.json: holds one object; a .json file holds a list of them: [{...}, {...}]"
    ),
    f"train --model model --data outside.jsonl {SMALL}": (
        "error: outside.jsonl:2: box [3, 4, 900, 20] leaves its image of 64 x 64 pixels; boxes are in pixels of the "
        "original image"
    ),
    f"train --model model --data imageless.jsonl {SMALL}": (
        "error: imageless.jsonl:2: './gone.png' is no file; check the image root and the name"
    ),
    f"train --model model --data judged.jsonl {SMALL}": (
        "error: judged.jsonl:2: \"accu_reward_method\" 'llm' is unknown: one of odLength, mcq, yes_no, math, default, "
        "weighted_sum, od_ap, od_ap50, all_match"
    ),
    # ---- several data files
    "train --model model --data a.jsonl b.jsonl": (
        "error: 'b.jsonl' after 'a.jsonl' belongs to no option: put a text with spaces in quotes; several data files "
        "are described by --mix FILE.json"
    ),
    "train --model model --mix gone.json": (
        "error: --mix gone.json: No such file or directory; give the path of a JSON list of data files"
    ),
    "train --model model --mix notes.txt": (
        "error: --mix notes.txt: not JSON: Expecting value: line 1 column 1 (char 0)"
    ),
    "train --model model --mix single.json": (
        'error: --mix single.json: a list of objects is expected, as [{"file": "a.jsonl"}]'
    ),
    "train --model model --mix fileless.json": (
        'error: --mix fileless.json, entry 1: it has no "file": the path of a data file is expected'
    ),
    "train --model model --mix misspelt.json": (
        "error: --mix misspelt.json, entry 1: unknown key 'reward': did you mean 'rewards'?"
    ),
    "train --model model --mix unpaid.json": (
        UNKNOWN_REWARD.format("ioo").replace("error: ", "error: --mix unpaid.json, entry 1: ")
    ),
    # ---- options
    "train --gropu_size 4": "error: unknown option --gropu_size: did you mean --group_size?",
    "eval --rewards iou": "error: unknown option --rewards: did you mean --reward?",
    f"{TRAIN} --group_size 1": "error: group_size is 1: it must be at least 2",
    f"{TRAIN} --learning_rate 1e-6x": "error: argument --learning_rate: invalid float value: '1e-6x'",
    f"{TRAIN} --variant ppo": (
        "error: argument --variant: invalid choice: 'ppo' (choose from 'grpo', 'dapo', 'dr_grpo', "
        "'gspo', 'cispo', 'sapo')"
    ),
    f"{TRAIN} --template rek": (
        "error: template 'rek' is unknown: one of rec, default, detection, no_think, base, plain, or a text with "
        "{question}"
    ),
    f"{TRAIN} --lora_alpha 16": "error: lora_alpha is 16 without LoRA: give a --lora_rank, or leave it out",
    f"{TRAIN} --warmup_steps 5": "error: warmup_steps 5 leaves no step of 1 after the warm-up",
    f"{TRAIN} --max_pixels 100": "error: max_pixels 100 is below min_pixels 256",
    f"sft --model model --data train.jsonl {SMALL.replace('--group_size 2 ', '')} --response box": (
        "error: response 'box' lacks {answer}: there would be nothing to learn"
    ),
    # ---- rewards
    f"{TRAIN} --rewards ioo": UNKNOWN_REWARD.format("ioo"),
    f"{TRAIN} --rewards iou iou": "error: rewards iou iou name one twice: give it a weight instead",
    f"{TRAIN} --reward_weights 1": "error: 1 weights for 2 rewards: give one each",
    f"{TRAIN} --rewards mine.py:none": (
        "error: reward 'mine.py:none': mine.py has no function 'none': define (completion, answer) -> float"
    ),
    f"{TRAIN} --rewards mine.py:one": (
        "error: reward 'mine.py:one' has the parameters (completion) and cannot be called: too many positional "
        f"arguments; {DEFINE}"
    ),
    f"{TRAIN} --rewards mine.py:named": (
        "error: reward 'mine.py:named' has the parameters (completion, answer, solution) and cannot be called: missing "
        f"a required argument: 'solution'; {DEFINE}"
    ),
    # ---- the directory of a run
    f"{TRAIN} --output_dir out": ("error: out holds a run: give another --output_dir, or --resume out to continue it"),
    f"{TRAIN} --output_dir notes.txt": (
        "error: output_dir notes.txt cannot be written (File exists): give another --output_dir"
    ),
    f"{TRAIN} --output_dir notes.txt/new": (
        "error: output_dir notes.txt/new cannot be written (Not a directory): give another --output_dir"
    ),
    "train --resume nowhere": (
        "error: nowhere/config.json: no such file; --resume takes the output directory of a run"
    ),
    "train --resume out/checkpoints/step-000001": (
        "error: out/checkpoints/step-000001/config.json holds no options: --resume takes the directory of a run, not a "
        "checkpoint"
    ),
    "train --resume torn": (
        "error: torn/config.json is damaged (Expecting property name enclosed in double quotes: line 1 column 2 (char "
        "1)): start a new run, or write the file again"
    ),
    "train --resume out --group_size 4": (
        "error: group_size was 2 in the run that is resumed and is 4 now: leave it out, or start a new run"
    ),
    "sft --resume out": (
        "error: out/config.json was written by another command or another version of this one: 24 options differ, as "
        "advantages, beta, clip_high; resume it with the command that began it"
    ),
    # ---- eval.py
    "eval --model model": "error: no data for --model model: name files with --data, or with --mix",
    "eval --model out --data train.jsonl": (
        "error: model out is the directory of a run: give one of its checkpoints, as out/best"
    ),
    "eval --model model --data train.jsonl --output no/x.json": (
        "error: output no/x.json: its directory does not exist; make it first, or the answers are lost"
    ),
    "eval --model model --data train.jsonl --output empty": (
        "error: output empty is a directory: give the path of a file"
    ),
    "eval --predictions gone.json": f"error: gone.json: no such file; {OURS}",
    "eval --predictions notes.txt": (
        f"error: notes.txt is no JSON (Expecting value: line 1 column 1 (char 0)); {OURS}"
    ),
    "eval --predictions single.json": f'error: single.json holds no "rows"; {OURS}',
    "eval --compare single.json": "error: compare names 1 files: two are compared",
    "eval --compare single.json gone.json": f"error: gone.json: no such file; {OURS}",
}


def printed(words, capfd):
    """The lines that start with "error: " of a command in this process, which has to end with exit code 2."""
    script, *argv = words
    main, config_class = COMMANDS[script]
    with pytest.raises(SystemExit) as end:
        parallel.launch(main, config_from_command_line(config_class, argv, toy.PRESETS[script]))
    said = capfd.readouterr()
    assert end.value.code == parallel.USER_ERROR == 2
    assert "Traceback" not in said.err + said.out and "error: " not in said.out
    return [line for line in said.err.splitlines() if line.startswith("error: ")], said.err


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_prints_one_line_before_anything_is_loaded(here, capfd, monkeypatch, command):
    monkeypatch.setattr("infra.run.load_policy", lambda *names: pytest.fail("the model is loaded"))
    monkeypatch.setattr("eval.load_any", lambda *names, **named: pytest.fail("the model is loaded"))
    lines, said = printed(shlex.split(command), capfd)
    assert lines == [MISTAKES[command]]
    assert said.endswith(lines[0] + "\n")  # it is the last thing that one reads
    assert not list((here / "new").glob("*"))  # nothing of a run is left behind


def test_a_swapped_box_is_refused_with_its_line(here, capfd):
    [line], _ = printed(shlex.split(f"train --model model --data swapped.jsonl {SMALL}"), capfd)
    assert line.startswith(
        "error: swapped.jsonl:2: box [30, 4, 10, 20] has swapped corners or no area; [x1, y1, x2, y2]"
    )


def test_boxes_in_shares_of_the_image_are_refused_with_the_numbers_and_the_remedy(here, capfd):
    for command in ("train", "eval"):
        small = SMALL if command == "train" else "--limit 2"
        [line], _ = printed(shlex.split(f"{command} --model model --data shares.jsonl {small}"), capfd)
        assert line.startswith("error: shares.jsonl: all coordinates of its 24 boxes lie between 0.")
        assert "in images of about 64 x 64 pixels: they are shares of the image and must be pixels. Multiply x" in line


def test_a_question_that_spells_a_special_token_is_refused(here, capfd):
    lines, _ = printed(shlex.split(f"train --model model --data special.jsonl {SMALL}"), capfd)
    told = "the question spells <|im_end|>, a special token of the model: remove it, or write it with a space inside"
    assert lines == [f"error: special.jsonl:2: {told}"]


def test_a_sample_without_question_and_answer_is_refused_with_the_keys_that_it_has(here, capfd):
    [line], _ = printed(shlex.split(f"train --model model --data keyless.jsonl {SMALL}"), capfd)
    assert line.startswith("error: keyless.jsonl:2: ") and "['id', 'image']" in line


def test_an_unsupported_family_is_named_with_the_reason(here, capfd):
    [line], _ = printed(shlex.split(f"train --model gemma --data train.jsonl {SMALL}"), capfd)
    assert "model type 'gemma3' is not supported: " in line and "a packed row is causal" in line


def test_an_unknown_layer_for_adapters_is_refused_with_those_that_exist(here, capfd):
    [line], _ = printed(shlex.split(f"{TRAIN} --lora_rank 2 --lora_targets qproj"), capfd)
    assert line.startswith("error: lora_targets: 'qproj' ") and "q_proj, up_proj, v_proj" in line


def test_a_board_that_is_not_installed_is_told_with_the_command_that_installs_it(here, capfd, monkeypatch):
    monkeypatch.setattr("infra.config.importlib.util.find_spec", lambda name: None)
    lines, _ = printed(shlex.split(f"{TRAIN} --wandb"), capfd)
    assert lines == ["error: wandb is not installed: pip install wandb, or leave --wandb out"]


@pytest.mark.parametrize(
    "name, reason", [("bad", "raised KeyError: 'boxes'"), ("wide", "gave inf, which is not a finite number")]
)
def test_a_reward_that_fails_is_told_with_its_sample_and_the_completion(here, capfd, name, reason):
    [line], _ = printed(shlex.split(f"{TRAIN} --rewards mine.py:{name}"), capfd)
    start, _, end = line.partition(f": reward mine.py:{name} {reason}, for ")
    assert start.startswith("error: sample train-000")
    assert end.endswith("'; mend the reward, or let such completions score 0 with --on_reward_error zero")


def test_a_reward_whose_file_does_not_load_is_told_with_the_reason(here, capfd):
    lines, _ = printed(shlex.split(f"{TRAIN} --rewards syntax.py:f"), capfd)
    told = "reward 'syntax.py:f': its file cannot be loaded: SyntaxError: invalid syntax (syntax.py, line 1)"
    assert lines == [f"error: {told}"]


def test_a_plugin_that_is_not_there_is_looked_for_where_the_message_says(here, capfd):
    lines, _ = printed(shlex.split(f"{TRAIN} --rewards gone.py:f"), capfd)
    assert lines == [f"error: reward 'gone.py:f': there is no file 'gone.py' under {here}; correct the path"]


def test_a_resumed_run_whose_data_or_model_is_another_is_refused_with_both(here, capfd):
    [line], _ = printed(shlex.split("train --resume out --steps 2 --data outside.jsonl --held_out 0"), capfd)
    assert line.startswith("error: held_out was 200")
    [line], _ = printed(shlex.split("train --resume out --steps 2 --data four.jsonl"), capfd)
    start = "error: num_samples was 23 in out/checkpoints/step-000001 and is 4 now: the data order, the reference and "
    assert line == start + ("what is frozen would differ; give the data and the --model that the run began with")
