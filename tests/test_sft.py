"""sft.py: what is imitated, the loss against plain Hugging Face, and a run that learns."""

import json

import pytest
import torch
from helpers import ALONE, Recorder, make_run, set_rank, spawn
from safetensors.torch import load_file

import toy
import toy.model
import toy.scenes
from data import Sample, read_samples
from infra.config import SftConfig
from infra.options import parse_options
from model.vlm import Prompt, banned_token_ids, build_prompt, load_model
from sft import main, response_ids, train_step


def prompt_of(answer, has_boxes=True):
    return Prompt({}, answer, Sample("s", "<image>the red circle", answer, (), "", has_boxes, "here"), None, None)


@pytest.mark.parametrize(
    "answer, has_boxes, text",
    [
        ("[1.4, 2.6, 30, 20]", True, '<answer>{"bbox_2d": [1, 3, 30, 20]}</answer>'),
        (
            '[{"bbox_2d": [1.4, 2, 3, 4], "label": "a"}]',
            True,
            '<answer>[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]</answer>',
        ),
        ("None", False, "<answer>None</answer>"),
    ],
)
def test_the_answer_is_written_in_whole_numbers_and_ends(answer, has_boxes, text):
    processor = toy.model.build_processor()
    ids = response_ids(processor, prompt_of(answer, has_boxes), "<answer>{answer}</answer>")
    assert processor.tokenizer.decode(ids[:-1]) == text
    assert int(ids[-1]) == processor.tokenizer.eos_token_id


def test_a_response_may_repeat_the_question_without_its_image_mark():
    processor = toy.model.build_processor()
    ids = response_ids(processor, prompt_of("[1, 2, 3, 4]"), toy.RESPONSE)
    assert (
        processor.tokenizer.decode(ids[:-1])
        == '<think>the red circle</think><answer>{"bbox_2d": [1, 2, 3, 4]}</answer>'
    )


@pytest.mark.parametrize("row_tokens", [50, 4096])
def test_the_loss_is_that_of_plain_hugging_face_on_the_answers_alone(checkpoint, scenes, row_tokens):
    argv = ["--model", checkpoint, "--data", "d", "--row_tokens", str(row_tokens), "--max_grad_norm", "1e9"]
    config = parse_options(SftConfig, argv)
    model, processor = load_model(checkpoint, min_pixels=256)
    samples = read_samples(scenes / "train.jsonl", scenes)[:3]
    prompts = [build_prompt(processor, sample, template="plain") for sample in samples]
    recorder, banned = Recorder(model), banned_token_ids(model, processor)
    run = make_run(model, processor, ALONE, [recorder])
    run.config, run.banned_ids = config, banned
    figures = train_step(run, prompts)

    model.zero_grad()
    losses = []
    for prompt in prompts:
        answer = response_ids(processor, prompt, config.response)
        ids = torch.cat([prompt.inputs["input_ids"][0], answer])[None]
        types = torch.cat([prompt.inputs["mm_token_type_ids"], torch.zeros(1, len(answer), dtype=torch.long)], 1)
        features = {key: prompt.inputs[key] for key in ("pixel_values", "image_grid_thw")}
        logits = model(input_ids=ids, mm_token_type_ids=types, **features).logits[0, -len(answer) - 1 : -1]
        logits[:, sorted(banned)] = -torch.inf
        losses.append(torch.nn.functional.cross_entropy(logits, answer, reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    assert figures["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    largest = max(p.grad.abs().max() for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert (recorder.gradients[name] - parameter.grad).abs().max() < 1e-5 * largest


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_learns_the_format_and_writes_a_checkpoint(checkpoint, scenes, tmp_path, optimizer):
    rate = {"adamw": "3e-3", "muon": "2e-2"}[optimizer]
    argv = ["--model", checkpoint, "--data", str(scenes / "train.jsonl"), "--eval_data", str(scenes / "test.jsonl"),
            "--template", "plain", "--response", toy.RESPONSE, "--output_dir", str(tmp_path / "out"),
            "--prompts_per_step", "8", "--min_pixels", "256", "--learning_rate", rate, "--steps", "12",
            "--max_completion_tokens", "24", "--optimizer", optimizer]  # fmt: skip
    main(parse_options(SftConfig, argv))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert (tmp_path / "out" / "checkpoints" / "step-000012" / "model.safetensors").exists()


def test_a_response_may_hold_a_text_field_of_the_record_and_no_other():
    processor = toy.model.build_processor()
    sample = Sample("s", "q", "[1, 2, 3, 4]", (), "", True, "f.jsonl:3", extra={"thought": "a red circle", "number": 3})
    prompt = Prompt({}, "[1, 2, 3, 4]", sample, None, None)
    ids = response_ids(processor, prompt, "<think>{thought}</think>{answer}")
    assert processor.tokenizer.decode(ids).startswith("<think>a red circle</think>")
    for name in ("{thougt}", "{number}"):
        with pytest.raises(ValueError, match=f"f.jsonl:3: the record has no text field for {name} of --response"):
            response_ids(processor, prompt, f"<think>{name}</think>{{answer}}")


def test_a_thought_that_the_chat_template_has_opened_is_not_opened_again():
    processor, sample = toy.model.build_processor(), Sample("s", "q", "red", (), "", False, "here")
    prompt = Prompt({}, "red", sample, None, None, opening="<think>\n")
    ids = response_ids(processor, prompt, "<think>q</think><answer>{answer}</answer>")
    assert processor.tokenizer.decode(ids) == "q</think><answer>red</answer><|im_end|>"


def test_a_response_without_the_answer_is_refused(checkpoint):
    with pytest.raises(ValueError, match="lacks {answer}"):
        parse_options(SftConfig, ["--model", checkpoint, "--data", "d", "--response", "yes"])


def test_the_default_rate_is_that_of_the_papers_sft_and_not_the_one_of_grpo(checkpoint):
    assert parse_options(SftConfig, ["--model", checkpoint, "--data", "d"]).learning_rate == 1e-5


def sft_run(rank, port, argv):
    set_rank(rank, 2, port)
    main(parse_options(SftConfig, argv))


def test_two_processes_of_which_one_has_no_image_train_as_one_does_under_a_frozen_tower(checkpoint, tmp_path):
    toy.scenes.write_split(tmp_path, "train", 1, seed=3)
    text = {"problem": "the red circle", "solution": "red"}
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps(text) + "\n")
    argv = ["--model", checkpoint, "--data", str(tmp_path / "train.jsonl"), "--template", "plain", "--eval_every", "0",
            "--response", "<answer>{answer}</answer>", "--prompts_per_step", "2", "--steps", "2", "--freeze_vision",
            "--min_pixels", "256", "--max_completion_tokens", "24", "--learning_rate", "1e-3"]  # fmt: skip
    main(parse_options(SftConfig, [*argv, "--output_dir", str(tmp_path / "one")]))
    spawn(sft_run, 2, [*argv, "--output_dir", str(tmp_path / "two")])
    one, two = (load_file(tmp_path / name / "checkpoints/step-000002/model.safetensors") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
