"""model/vlm.py: loading, processors, prompts, token ids; the toy stands for a checkpoint on disk."""

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import toy
import toy.model
from data import BadSample, Sample
from model.vlm import (
    MAX_PIXELS,
    banned_token_ids,
    blank_prompt,
    build_prompt,
    check_special_tokens,
    describe_processor,
    eos_token_ids,
    family_of_processor,
    load_model,
    load_processor,
    to_image_box,
    to_model_box,
    trainable,
)
from rollout import sample_completions


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (100, 50), (9, 9, 9)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def sample(images, answer="[10, 10, 50, 40]", question="the red circle", has_boxes=True):
    return Sample("s", question, answer, tuple(images), "", has_boxes, "file.jsonl:1")


def test_a_saved_directory_loads_with_equal_weights_and_the_pixel_budget(checkpoint):
    model, processor = load_model(checkpoint, max_pixels=4096, min_pixels=256)
    fresh = toy.model.build_model(processor.tokenizer)
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))
    assert processor.image_processor.size == {"shortest_edge": 256, "longest_edge": 4096}
    assert processor.tokenizer.padding_side == "left" and not model.training


def test_the_budget_shrinks_images_and_the_default_is_not_the_hubs(checkpoint, photo):
    small = load_processor(checkpoint, max_pixels=1024, min_pixels=256)
    inputs = build_prompt(small, sample([photo]), template="plain")
    assert inputs.input_size[0] * inputs.input_size[1] <= 1024
    assert load_processor(checkpoint).image_processor.size["longest_edge"] == MAX_PIXELS == 1280 * 28 * 28


def test_true_boxes_move_into_pixels_of_the_resized_image_or_into_a_thousand(checkpoint, photo):
    processor = load_processor(checkpoint, max_pixels=1024, min_pixels=256)
    pixels = build_prompt(processor, sample([photo]), template="plain")
    width, height = pixels.input_size
    assert pixels.image_size == (100, 50) and (width, height) == (32, 16)
    assert json.loads(pixels.answer) == pytest.approx([3.2, 3.2, 16, 12.8])
    thousand = build_prompt(processor, sample([photo]), family="qwen3_vl", template="plain")
    assert json.loads(thousand.answer) == pytest.approx([100, 200, 500, 800])


def test_boxes_are_those_of_the_first_image(checkpoint, photo, tmp_path):
    Image.new("RGB", (20, 400)).save(tmp_path / "tall.png")
    processor = load_processor(checkpoint, max_pixels=1024, min_pixels=256)
    prompt = build_prompt(processor, sample([photo, str(tmp_path / "tall.png")]), template="plain")
    assert prompt.image_size == (100, 50) and prompt.input_size == (32, 16)
    assert json.loads(prompt.answer) == pytest.approx([3.2, 3.2, 16, 12.8])


def test_text_answers_are_left_alone(checkpoint, photo):
    processor = load_processor(checkpoint)
    prompt = build_prompt(processor, sample([photo], "[1, 2, 3, 4]", has_boxes=False), family="qwen3_vl")
    assert prompt.answer == "[1, 2, 3, 4]"
    text = build_prompt(processor, sample([], "4", has_boxes=False), template="plain")
    assert "pixel_values" not in text.inputs and text.image_size is None


def test_a_prompt_is_what_the_processor_returned_and_can_be_drawn_from(checkpoint, photo):
    model, processor = load_model(checkpoint, min_pixels=256)
    prompt = build_prompt(processor, sample([photo]), template="plain")
    assert set(prompt) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    [[ids]] = sample_completions(model, [prompt], 1, max_new_tokens=2, eos_ids=[2])
    assert 1 <= len(ids) <= 2


def test_a_processor_of_no_known_family_is_refused():
    with pytest.raises(ValueError, match="SimpleNamespace belongs to none of qwen2_vl"):
        family_of_processor(SimpleNamespace())


def test_the_template_and_the_images_reach_the_prompt(checkpoint, photo):
    processor = load_processor(checkpoint, min_pixels=256)
    prompt = build_prompt(
        processor,
        sample([photo, photo], question="the <image> above <image>"),
        family="qwen2_5_vl",
        template="no {question}",
    )
    text = processor.tokenizer.decode(prompt.inputs["input_ids"][0])
    assert prompt.inputs["image_grid_thw"].shape == (2, 3)
    assert text.replace("<|image_pad|>", "") == (
        "<|im_start|>user\nno the <|vision_start|><|vision_end|> above <|vision_start|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_samples_that_cannot_be_used_are_bad_samples(checkpoint, tmp_path, photo):
    processor = load_processor(checkpoint, min_pixels=256)
    Image.new("RGB", (900, 4)).save(tmp_path / "thin.png")
    with pytest.raises(BadSample, match="aspect ratio"):
        build_prompt(processor, sample([str(tmp_path / "thin.png")], "[1, 1, 9, 3]"))
    with pytest.raises(BadSample, match="leaves its image"):
        build_prompt(processor, sample([photo], "[1, 1, 900, 30]"))
    with pytest.raises(BadSample, match="without an image"):
        build_prompt(processor, sample([]))


def test_vision_tokens_and_rows_without_a_token_are_banned_and_words_are_not(checkpoint):
    model, processor = load_model(checkpoint)
    model.resize_token_embeddings(len(processor.tokenizer) + 5)
    banned = {*banned_token_ids(model, processor)}
    named = processor.tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    assert banned == {*named, *range(len(processor.tokenizer), len(processor.tokenizer) + 5)}
    assert not banned & {*eos_token_ids(model, processor)}


def test_every_end_token_of_the_generation_config_ends_an_answer(checkpoint):
    model, processor = load_model(checkpoint)
    model.generation_config.eos_token_id = [7, 0]
    assert eos_token_ids(model, processor) == [0, 2, 7]


def test_a_frozen_tower_leaves_the_language_model_to_be_trained(checkpoint):
    model, _ = load_model(checkpoint, freeze_vision=True)
    names = [name for name, _ in trainable(model)]
    assert names and not any("visual" in name for name in names)


def test_a_blank_prompt_holds_one_image(checkpoint):
    inputs = blank_prompt(load_processor(checkpoint)).inputs
    assert inputs["image_grid_thw"].shape == (1, 3) and inputs["pixel_values"].dtype == torch.float32


def edited(checkpoint, directory, change):
    """A copy of the checkpoint with its config.json changed."""
    shutil.copytree(checkpoint, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(change(config)))
    return str(directory)


@pytest.mark.parametrize(
    "model_type, reason",
    [
        ("gemma3", "both ways"),
        ("paligemma", "both ways"),
        ("mistral3", "cannot be joined"),
        ("ovis2", "indicator tokens"),
        ("smolvlm", "num2words"),
        ("internvl_chat", "-hf"),
        ("llava", "one of qwen2_vl"),
    ],
)
def test_a_family_that_a_packed_row_would_score_wrongly_is_refused_with_the_reason(
    checkpoint, tmp_path, model_type, reason
):
    path = edited(checkpoint, tmp_path / "other", lambda config: config | {"model_type": model_type})
    with pytest.raises(ValueError, match=f"'{model_type}' is not supported: .*{reason}"):
        load_model(path)


def test_windows_of_attention_are_refused(checkpoint, tmp_path):
    def windowed(config):
        types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
        text = {**config["text_config"], "use_sliding_window": True, "sliding_window": 8, "layer_types": types}
        return {**config, "text_config": text}

    with pytest.raises(ValueError, match="sliding_attention: a packed row is causal"):
        load_model(edited(checkpoint, tmp_path / "windowed", windowed))


def test_code_that_a_checkpoint_brings_along_never_runs(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("a question at the terminal"))
    code = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model", "AutoProcessor": "code.Reader"}
    known = edited(checkpoint, tmp_path / "known", lambda config: config | {"auto_map": code})
    unknown = edited(checkpoint, tmp_path / "unknown", lambda config: config | {"auto_map": code, "model_type": "mine"})
    for directory in (known, unknown):
        (Path(directory) / "code.py").write_text("raise RuntimeError('the code of the checkpoint ran')\n")
    load_model(known)
    with pytest.raises(ValueError, match="'mine' is not supported"):
        load_model(unknown)


def test_pickled_weights_are_never_read(checkpoint, tmp_path):
    path = Path(edited(checkpoint, tmp_path / "pickled", dict))
    (path / "model.safetensors").unlink()
    torch.save(load_model(checkpoint)[0].state_dict(), path / "pytorch_model.bin")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load_model(str(path))


@pytest.mark.parametrize("name", ["owner/name", "here/or/there"])
def test_a_model_that_is_neither_here_nor_on_the_hub_is_refused_in_one_line(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as the variable of that name sets it
    with pytest.raises(ValueError, match=f"^model {name}: no directory here, and the hub does not give it: .*$"):
        load_model(name)


# ---- special tokens in the data ------------------------------------------------------------------------------------


def special_processor():
    """A processor with a special token more, one that only the processor reads as special, and one that is none."""
    processor = toy.model.build_processor()
    processor.tokenizer.add_tokens(["<|ref|>"], special_tokens=True)
    processor.tokenizer.add_tokens(["<note>", "<clip>"])
    processor.video_token = "<clip>"
    return processor


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|ref|>", "<clip>", "<unk>"])
@pytest.mark.parametrize("part", ["question", "answer"])
def test_a_sample_that_spells_a_special_token_is_refused_with_its_line(token, part):
    processor, usual = special_processor(), sample([], "4", "what is 2 + 2", has_boxes=False)
    check_special_tokens(processor, [usual])
    wrong = replace(usual, **{part: f"a{token}b"})
    message = rf"file.jsonl:1: the {part} spells {re.escape(token)}, a special token of the model: remove it"
    with pytest.raises(ValueError, match=message):
        check_special_tokens(processor, [usual, wrong])
    with pytest.raises(BadSample, match=message):
        build_prompt(processor, wrong, template="plain")


def test_tags_image_marks_and_ordinary_added_tokens_are_no_special_tokens(photo):
    processor = special_processor()
    fine = sample([photo], "<answer>a</answer>", "<|im_ <image> <note> <think> | <|im_end >", has_boxes=False)
    check_special_tokens(processor, [fine])
    assert build_prompt(processor, fine, template="plain")["image_grid_thw"].shape == (1, 3)


def test_an_image_mark_stands_for_an_image_even_if_the_tokenizer_has_a_token_of_that_name(photo):
    processor = special_processor()
    processor.tokenizer.add_tokens(["<image>"], special_tokens=True)
    fine = sample([photo], "4", "<|im_<image>end|>", has_boxes=False)  # no special token once the image is between
    check_special_tokens(processor, [fine])
    assert processor.tokenizer.eos_token_id in build_prompt(processor, fine, template="plain")["input_ids"]
    with pytest.raises(ValueError, match="the answer spells <image>"):
        check_special_tokens(processor, [replace(fine, answer="an <image>")])


def test_hundreds_of_thousands_of_samples_are_checked_within_seconds():
    question = "the red circle to the left of the small blue square, in 20 or 30 words such as a user may write"
    samples = [sample([], question=question)] * 400_000
    processor, start = special_processor(), time.process_time()
    check_special_tokens(processor, samples)
    assert time.process_time() - start < 2  # 0.2 s on an idle core


# ---- box spaces ----------------------------------------------------------------------------------------------------


def test_the_box_space_can_be_overridden_both_ways(checkpoint, photo):
    processor = load_processor(checkpoint, max_pixels=1024, min_pixels=256)
    prompt = build_prompt(processor, sample([photo]), template="plain", box_space="thousand")
    assert json.loads(prompt.answer) == pytest.approx([100, 200, 500, 800])
    sizes = (100, 50), (32, 16)
    assert to_image_box([100, 200, 500, 800], *sizes, "qwen2_5_vl", "thousand") == pytest.approx([10, 10, 50, 40])
    assert to_image_box([3.2, 3.2, 16, 12.8], *sizes, "qwen3_vl", "pixels") == pytest.approx([10, 10, 50, 40])
    assert "0..1000" in describe_processor(processor, "thousand") and "resized" in describe_processor(processor)
    with pytest.raises(ValueError, match="'percent' is unknown: one of thousand, pixels"):
        to_model_box([0, 0, 1, 1], *sizes, "qwen3_vl", "percent")
