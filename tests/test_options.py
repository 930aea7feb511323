"""infra/options.py and infra/config.py: what is refused, what the defaults are, what stands in for them, and --help."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest

import toy
from infra.config import EvalConfig, RunConfig, SftConfig, TrainConfig
from infra.options import build_parser, parse_options

HERE = Path(__file__).parent.parent
COMMANDS = {"train.py": TrainConfig, "sft.py": SftConfig, "eval.py": EvalConfig}


def parse(*argv):
    return parse_options(TrainConfig, ["--model", "m", "--data", "d.jsonl", *argv])


# ---- defaults ------------------------------------------------------------------------------------------------------


def test_the_defaults_for_real_models_are_the_recipe_of_vlm_r1():
    config = parse()
    recipe = (
        config.prompts_per_step,
        config.group_size,
        config.learning_rate,
        config.schedule,
        config.beta,
        config.clip_low,
    )
    assert recipe == (16, 8, 1e-6, "constant", 0.04, 0.2)
    assert (config.temperature, config.top_k, config.top_p, config.num_iterations, config.variant) == (
        1.0,
        0,
        1.0,
        1,
        "grpo",
    )
    [file] = config.files
    assert (file.rewards, file.weights, config.optimizer, config.weight_decay) == (
        ("iou", "rec_format"),
        (1, 1),
        "adamw",
        0,
    )


def test_without_a_model_the_toys_preset_stands_in_and_options_still_win():
    config = parse_options(TrainConfig, ["--steps", "7"], preset=toy.PRESETS["train"])
    assert config.steps == 7 and config.beta == 0 and config.model == str(toy.MODEL) and config.template == "plain"
    config = parse_options(TrainConfig, ["--model", "m", "--data", "d"], preset=toy.PRESETS["train"])
    assert config.beta == 0.04 and config.template == "rec"  # a model of one's own: VLM-R1's recipe


@pytest.mark.parametrize("command", COMMANDS)
def test_the_toys_preset_is_a_supported_run_of_each_command(command):
    config = parse_options(COMMANDS[command], [], preset=toy.PRESETS[command.removesuffix(".py")])
    assert config.model == str(toy.MODEL)


def test_lora_brings_ten_times_the_rate_and_all_that_is_given_wins():
    config = parse("--lora_rank", "64")
    assert (config.learning_rate, config.lora_alpha, config.lora_targets) == (1e-5, 0, [])  # alpha 0 is twice the rank
    assert parse().learning_rate == parse("--lora_rank", "0").learning_rate == 1e-6
    assert parse("--lora_rank", "64", "--learning_rate", "3e-6").learning_rate == 3e-6
    words = ["--model", "m", "--data", "d.jsonl", "--lora_rank", "8"]
    assert parse_options(SftConfig, words).learning_rate == 1e-4
    toys = parse_options(TrainConfig, ["--lora_rank", "8"], preset=toy.PRESETS["train"])
    assert toys.learning_rate == toy.PRESETS["train"]["learning_rate"]  # the toy's options outrank the recipe


def test_a_resumed_run_of_lora_keeps_its_rate(tmp_path):
    for argv in (["--lora_rank", "8", "--learning_rate", "2e-6"], ["--lora_rank", "8"]):
        (tmp_path / "config.json").write_text(json.dumps({"options": asdict(parse(*argv))}))
        resumed = parse_options(TrainConfig, ["--resume", str(tmp_path), "--lora_rank", "8"])
        assert resumed.learning_rate == parse(*argv).learning_rate


def test_dr_grpo_does_not_divide_by_the_deviation_unless_told_to():
    assert parse().divides_by_deviation and not parse("--variant", "dr_grpo").divides_by_deviation
    assert parse("--variant", "dr_grpo", "--scale_advantages").divides_by_deviation
    assert not parse("--scale_advantages", "False").divides_by_deviation


# ---- types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, value",
    [([], False), (["--tensorboard"], True)]
    + [(["--tensorboard", word], True) for word in ("True", "true", "yes", "1")]
    + [(["--tensorboard", word], False) for word in ("False", "false", "NO", "0")],
)
def test_a_switch_takes_a_word_or_none(words, value, monkeypatch):
    monkeypatch.setattr("infra.config.importlib.util.find_spec", lambda name: object())
    assert parse(*words).tensorboard is value
    assert parse(*words, "--steps", "3").steps == 3  # what follows is another option


def test_options_have_the_types_of_their_fields():
    config = parse("--steps", "3", "--beta", "1e-3", "--rewards", "iou", "format", "--reward_weights", "1", "0.5")
    assert (config.steps, config.beta, config.rewards, config.reward_weights) == (3, 1e-3, ["iou", "format"], [1, 0.5])
    assert [type(weight) for weight in config.reward_weights] == [float, float]
    assert parse("--template=see {question}").template == "see {question}"
    given = parse_options(EvalConfig, ["--model", "m", "--data", "a", "--seed", "0", "--max_pixels", "9000"])
    assert (given.seed, given.max_pixels, given.min_pixels, given.max_completion_tokens) == (0, 9000, None, None)


@pytest.mark.parametrize("config_class", COMMANDS.values())
def test_every_option_is_in_help_once_in_a_group_with_a_sentence(config_class):
    actions = [action for group in build_parser(config_class)._action_groups[2:] for action in group._group_actions]
    names = [action.dest for action in actions]
    assert sorted(names) == sorted(entry.name for entry in fields(config_class))
    assert all(len(action.help) > 12 for action in actions)
    assert set(RunConfig.FREE_ON_RESUME) <= {name for c in COMMANDS.values() for name in (f.name for f in fields(c))}


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, reason",
    [
        ("--group_size 1", "group_size is 1: it must be at least 2"),
        ("--temperature 0", "temperature is 0.0: it must be above 0"),
        ("--top_p 0", "top_p is 0"),
        ("--top_p 1.5", "top_p is 1.5: it must be at most 1"),
        ("--clip_low 1", "clip_low is 1.0: it must be below 1"),
        ("--rewards iou unheard_of", "'unheard_of' is unknown"),
        ("--rewards iou --reward_weights 1 2", "2 weights for 1 rewards"),
        ("--reward_weights nan 1", "weights are [nan, 1.0]: finite numbers are expected"),
        ("--beta -1", "beta is -1"),
        ("--num_iterations 0", "num_iterations is 0"),
        ("--advantages gdpo --scale_advantages False", "scale_advantages is False beside advantages gdpo"),
        ("--ref_every 5 --beta 0", "ref_every is 5 and beta is 0: without a penalty there is no reference"),
        ("--refill always", "argument --refill: invalid choice: 'always'"),
        ("--refill_rounds 0", "refill_rounds is 0"),
        ("--steps 5 --warmup_steps 5", "warmup_steps 5 leaves no step of 5"),
        ("--steps 0 --epochs 0", "how long to train"),
        ("--max_pixels 100", "is below min_pixels"),
        ("--template rek", "'rek' is unknown"),
        ("--prompts_per_step 0", "prompts_per_step is 0"),
        ("--learning_rate 0", "learning_rate is 0"),
        ("--learning_rate nan", "learning_rate is nan"),
        ("--beta inf", "beta is inf"),
        ("--lora_alpha 8", "lora_alpha is 8 without LoRA"),
        ("--lora_targets q_proj", "lora_targets is ['q_proj'] without LoRA"),
        ("--lora_rank 8 --lora_dropout 1", "lora_dropout is 1.0"),
        ("--lora_rank -1", "lora_rank is -1"),
        ("--max_bad_steps 0", "max_bad_steps is 0"),
        ("--max_hours -1", "max_hours is -1"),
        ("--reward_seconds -1", "reward_seconds is -1"),
        ("--seed -1", "seed is -1"),
        ("--group_sise 4", "unknown option --group_sise: did you mean --group_size?"),
        ("--group 4", "unknown option --group"),
        ("--group_sise=4", "unknown option --group_sise: did you mean --group_size?"),
        ("--qqqqq", "unknown option --qqqqq: --help lists all options"),
        ("--steps 5 7", "'7' after '5' belongs to no option"),
        ("--steps two", "argument --steps: invalid int value: 'two'"),
        ("--steps", "argument --steps: expected one argument"),
        ("--rewards", "argument --rewards: expected at least one argument"),
        ("--variant ppo", "argument --variant: invalid choice: 'ppo'"),
        ("--freeze_vision maybe", "argument --freeze_vision: 'maybe' is neither True nor False"),
        ("--help_me", "unknown option --help_me"),
    ],
)
def test_contradictory_and_unknown_options_are_refused_with_the_value(argv, reason):
    with pytest.raises(ValueError, match=".") as error:
        parse(*argv.split())
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_second_data_file_is_pointed_to_the_mix():
    with pytest.raises(ValueError) as error:
        parse_options(TrainConfig, ["--model", "m", "--data", "a.jsonl", "b.jsonl"])
    told = "'b.jsonl' after 'a.jsonl' belongs to no option: put a text with spaces in quotes; several data files are "
    assert str(error.value) == told + "described by --mix FILE.json"


def test_a_template_without_quotes_is_pointed_to_them():
    with pytest.raises(ValueError, match="'the' after 'find' belongs to no option: put a text with spaces in quotes$"):
        parse(*"--template find the {question}".split())


def test_a_real_model_needs_data():
    for config_class in COMMANDS.values():
        with pytest.raises(ValueError, match="no data for --model m: name "):
            parse_options(config_class, ["--model", "m"])


@pytest.mark.parametrize(
    "argv, reason",
    [
        ("--data d --task guess", "argument --task: invalid choice: 'guess'"),
        ("--data d --task text --reward ioo", "'ioo' is unknown"),
        ("", "no data for --model m: name files with --data, or with --mix"),
        ("--data d --mix m.json", "data and mix are both given"),
        ("--data d --template rek", "'rek' is unknown"),
        ("--data d --limit -1", "limit is -1"),
        ("--compare a", "compare names 1 files: two are compared"),
        ("--compare a b c", "compare names 3 files: two are compared"),
    ],
)
def test_contradictory_options_of_an_evaluation_are_refused(argv, reason):
    with pytest.raises(ValueError) as error:
        parse_options(EvalConfig, ["--model", "m", *argv.split()])
    assert reason in str(error.value)


# ---- a run that is resumed -----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """The directory of a run with an option of its own."""
    options = asdict(parse("--group_size", "4", "--rewards", "iou", "--output_dir", "where/it/was"))
    (tmp_path / "config.json").write_text(json.dumps({"options": options}))
    return tmp_path


def test_a_resumed_run_keeps_its_options_and_goes_on_where_it_lies(run):
    config = parse_options(TrainConfig, ["--resume", str(run)], preset=toy.PRESETS["train"])
    assert (config.group_size, config.rewards, config.template) == (4, ["iou"], "rec")
    assert config.output_dir == config.resume == str(run)


def test_an_option_that_differs_is_refused_on_resume_and_the_same_value_is_not(run):
    for argv in (["--group_size", "4"], ["--rewards", "iou"], ["--learning_rate", "0.000001"]):
        parse_options(TrainConfig, ["--resume", str(run), *argv])
    with pytest.raises(ValueError) as error:
        parse_options(TrainConfig, ["--resume", str(run), "--group_size", "8"])
    told = "group_size was 4 in the run that is resumed and is 8 now: leave it out, or start a new run"
    assert str(error.value) == told


OTHER_VALUES = {bool: "True", int: "7", float: "0.5", str: "other", list: "other"}


@pytest.mark.parametrize("name", sorted(entry.name for entry in fields(TrainConfig)))
def test_an_option_may_differ_on_resume_if_and_only_if_it_is_listed(run, name):
    choices = {"optimizer": "muon", "schedule": "cosine", "variant": "dapo", "dtype": "bf16", "box_space": "pixels",
               "on_reward_error": "zero", "advantages": "gdpo", "refill": "rewards",
               "template": "base", "reward_weights": "3", "rewards": "format",
               "scale_advantages": "False", "clip_low": "0.5", "lora_dropout": "0.5", "lora_targets": "q_proj",
               "resume": str(run), "max_pixels": "9000", "freeze_vision": "True"}  # fmt: skip
    kind = type(getattr(parse(), name))
    value = choices.get(name) or OTHER_VALUES[kind]
    argv = ["--resume", str(run), *([] if name == "resume" else [f"--{name}", value])]
    if name in TrainConfig.FREE_ON_RESUME:
        try:
            parse_options(TrainConfig, argv)
        except ValueError as error:  # for a reason of its own
            assert "in the run that is resumed" not in str(error)
        return
    with pytest.raises(ValueError, match=f"^{name} was .* in the run that is resumed and is .* now: leave it out"):
        parse_options(TrainConfig, argv)


# ---- from the command line -----------------------------------------------------------------------------------------


def command(*words, **environment):
    """A command in a process of its own, and the seconds that it took."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *words], cwd=HERE, capture_output=True, text=True, env={**os.environ, **environment}
    )
    return done, time.monotonic() - began


@pytest.mark.parametrize("script", COMMANDS)
def test_help_shows_groups_and_real_defaults_at_once_without_torch(script):
    done, _ = command("-X", "importtime", script, "--help")
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "argparse" in imported
    assert not {"torch", "transformers", "safetensors", "tokenizers"} & imported
    seconds = min(command(script, "--help")[1] for _ in range(3))
    assert seconds < 1.0  # about 0.25 s on an idle machine, 4 s with torch and transformers
    assert "object at 0x" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 160
    for entry in fields(COMMANDS[script]):
        assert f"--{entry.name} " in done.stdout or f"--{entry.name}\n" in done.stdout, entry.name


def test_help_has_the_groups_in_the_order_of_a_run():
    out = command("train.py", "--help")[0].stdout
    groups = ["Model:", "Data:", "Prompt and image:", "Training:", "Algorithm:", "Drawing completions:", "Evaluation:",
              "Output:", "Machine:"]  # fmt: skip
    assert [line for line in out.splitlines() if line in groups] == groups
    for default in ("(default: 8)", "(default: 1e-06)", "(default: iou rec_format)", "(default: grpo)"):
        assert default in out


def test_a_misspelt_option_is_told_in_one_line_at_once():
    done, seconds = command("train.py", "--group_sise", "4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option --group_sise: did you mean --group_size?\n" and seconds < 2
    done, _ = command("train.py", "--group_sise", "4", "--traceback")
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "did you mean --group_size?" in done.stderr


def test_of_several_ranks_the_first_alone_tells_of_a_wrong_command_line():
    assert command("train.py", "--group_sise", "4", RANK="0")[0].stderr.count("error: ") == 1
    done, _ = command("train.py", "--group_sise", "4", RANK="1")
    assert (done.returncode, done.stderr) == (2, "")
