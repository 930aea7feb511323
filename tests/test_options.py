"""options.py: what is refused, what the defaults are, and what stands in for them."""

import pytest

import toy
from infra.options import parse_options
from train import Config


def parse(*argv):
    return parse_options(Config, ["--model", "m", "--data", "d.jsonl", *argv], {})


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
    assert (config.rewards, config.weights, config.optimizer, config.weight_decay) == (
        ["iou", "rec_format"],
        [1, 1],
        "adamw",
        0,
    )


@pytest.mark.parametrize(
    "argv, reason",
    [
        ("--group_size 1", "group_size is 1"),
        ("--temperature 0", "temperature is 0"),
        ("--top_p 0", "top_p is 0"),
        ("--rewards iou unheard_of", "'unheard_of' is unknown"),
        ("--rewards iou --reward_weights 1 2", "2 reward_weights for 1 rewards"),
        ("--beta -1", "beta -1"),
        ("--num_iterations 0", "num_iterations"),
        ("--image_root a b", "2 image_root for 1 files"),
        ("--steps 5 --warmup_steps 5", "leaves nothing of 5 steps"),
        ("--steps 0 --epochs 0", "how long to train"),
        ("--max_pixels 100", "is below min_pixels"),
        ("--template rek", "'rek' is unknown"),
        ("--prompts_per_step 0", "prompts_per_step is 0"),
        ("--learning_rate 0", "learning_rate is 0"),
        ("--lora_alpha 8", "lora_alpha is 8 without LoRA"),
        ("--lora_targets q_proj", "lora_targets is ['q_proj'] without LoRA"),
        ("--lora_rank 8 --lora_dropout 1", "lora_dropout is 1.0"),
        ("--lora_rank -1", "lora_rank is -1"),
        ("--train_projector", "train_projector is set where all is trained"),
        ("--freeze_vision --vision_learning_rate 1e-5", "vision_learning_rate is 1e-05 where nothing"),
        ("--lora_rank 8 --vision_learning_rate 1e-5", "vision_learning_rate is 1e-05 where nothing"),
        ("--max_bad_steps 0", "max_bad_steps is 0"),
        ("--max_hours -1", "max_hours is -1"),
        ("--reward_seconds -1", "reward_seconds is -1"),
        ("--group_sise 4", "--group_sise"),
        ("--group 4", "--group"),
    ],
)
def test_contradictory_and_unknown_options_are_refused_with_the_value(argv, reason):
    with pytest.raises(ValueError, match="specified|is|for|beta|leaves|how|must|not used") as error:
        parse(*argv.split())
    assert reason in str(error.value)


def test_a_real_model_needs_data():
    with pytest.raises(ValueError, match="data is empty"):
        parse_options(Config, ["--model", "m"], {})


def test_without_a_model_the_toys_preset_stands_in_and_options_still_win(monkeypatch):
    monkeypatch.setattr(toy, "write_data", lambda: None)
    config = parse_options(Config, ["--steps", "7"], toy.PRESETS["train"])
    assert config.steps == 7 and config.beta == 0 and config.model == str(toy.MODEL) and config.template == "plain"
