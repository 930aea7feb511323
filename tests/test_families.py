"""Each row of families.FAMILIES all the way: processor, prompts, drawing, scoring, a step, a checkpoint, boxes.

A family is built from its configuration, as a random model of 50,000 to 110,000 parameters in a directory laid out as
on the hub. Expected values are those of plain Hugging Face: `generate`, one forward per completion, `from_pretrained`.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ALONE, make_completions, relative_difference, set_rank, spawn, step_gradients
from PIL import Image
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS

import rollout
import toy
import toy.model
from data import IMAGE_MARK, BadSample, Sample
from infra import checkpoint
from infra.checkpoint import Packaging, save_checkpoint
from infra.parallel import gathered, process_group, shard_model
from model.families import FAMILIES, family_of, to_image_box, to_model_box
from model.vlm import (
    banned_token_ids,
    build_prompt,
    check_special_tokens,
    describe_processor,
    has_pixel_budget,
    load_model,
    load_processor,
    vision_modules,
)
from rollout import TOKEN_KEYS, completion_logprobs, sample_completions

# Transformers takes its own tokenizer class for these types, whatever the directory says; ours has another vocabulary.
MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.difference_update(("qwen3_5", "qwen3_5_moe"))
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}}
HALF_ROPE = {"rope_parameters": {**ROPE["rope_parameters"], "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
VIT = {"depth": 2, "num_heads": 2, "out_hidden_size": 32}
QWEN = {
    "mark": "<|vision_start|><|image_pad|><|vision_end|>",
    "tokens": {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
               "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"},
    "images": "Qwen2VLImageProcessor",
    "text": ROPE,
}  # fmt: skip
QWEN3 = QWEN | {
    "images": "Qwen2VLImageProcessorFast",
    "vision": VIT | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN3_5 = QWEN3 | {
    "text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 0],
                            "partial_rotary_factor": 0.25},
        "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "vision": VIT | {"num_position_embeddings": 16},
}  # fmt: skip
GLM = {
    "mark": "<|begin_of_image|><|image|><|end_of_image|>",
    "tokens": {"image_token_id": "<|image|>", "video_token_id": "<|video|>",
               "image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>"},
    "images": "Glm4vImageProcessor",
    "text": ROPE,
    "vision": VIT | {"image_size": 32},
}  # fmt: skip
# model type -> what its chat template writes for an image, its vision tokens, the image processor that the hub's
# checkpoints name, and what its text and vision configurations need beyond TEXT and VISION. A new family is an entry.
CASES = {
    "qwen2_vl": QWEN | {"vision": {"depth": 2, "num_heads": 2, "embed_dim": 32}},
    "qwen2_5_vl": QWEN | {"vision": VIT | {"window_size": 32, "fullatt_block_indexes": [1]}},
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3 | {"text": ROPE | MIXTURE},
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5 | {"text": QWEN3_5["text"] | MIXTURE | {"shared_expert_intermediate_size": 24}},
    "internvl": {"mark": "<IMG_CONTEXT>", "tokens": {"image_token_id": "<IMG_CONTEXT>"},
                 "images": "GotOcr2ImageProcessorFast", "text": {"model_type": "qwen2"},
                 "vision": {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": [32, 32]}},
    "glm4v": GLM,
    "glm4v_moe": GLM | {"text": HALF_ROPE | MIXTURE | {"n_routed_experts": 4, "first_k_dense_replace": 1}},
    "glm46v": GLM | {"images": "Glm46VImageProcessor", "text": HALF_ROPE},
}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
        "num_key_value_heads": 1, "initializer_range": 0.15, "max_position_embeddings": 4096}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.15, "patch_size": 8}
PATCHES = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 12_845_056}
TILES = {"size": {"height": 32, "width": 32}, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
INTERNVL = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>"}  # fmt: skip


def write_checkpoint(family, directory, seed=3):
    """A directory as the hub has them, with a random model of the family."""
    case = CASES[family]
    tiles = "GotOcr2" in case["images"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=toy.model.build_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        extra_special_tokens=INTERNVL if tiles else {},
        chat_template=toy.model.CHAT_TEMPLATE.replace(QWEN["mark"], case["mark"]),
    )
    tokenizer.add_tokens([*toy.model.SPECIAL, *case["tokens"].values()], special_tokens=True)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in case["tokens"].items()}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = CONFIG_MAPPING[family](
        text_config={**TEXT, **ends, "vocab_size": len(tokenizer), **case["text"]},
        vision_config=VISION | case["vision"],
        **ids,
        **({"image_seq_length": 4} if tiles else {}),
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    images = {"image_processor_type": case["images"], **(TILES if tiles else PATCHES)}
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    if tiles:
        (directory / "processor_config.json").write_text(json.dumps({"image_seq_length": 4}))
    return directory


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint of each family."""
    path = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        write_checkpoint(family, path / family)
    return path


@pytest.fixture(scope="module")
def loaded(family, directory):
    model, processor = load_model(str(directory / family), min_pixels=256, max_pixels=4096)
    return in_double(model), processor


def in_double(model):
    model.set_experts_implementation("eager")  # grouped_mm, the default, has no float64; nothing without experts
    return model.double()


@pytest.fixture(scope="module")
def samples(directory):
    """Samples with no image, with one, and with three inside the text, of different sizes."""
    questions = {
        "the small red circle": [],
        "the red circle": [(64, 48)],
        f"the {IMAGE_MARK} above {IMAGE_MARK} left of {IMAGE_MARK}": [(48, 96), (33, 20), (130, 90)],
    }
    return [make_sample(directory, question, sizes) for question, sizes in questions.items()]


def make_sample(directory, question, sizes, answer=""):
    generator = np.random.default_rng(len(question))
    paths = [directory / f"{width}x{height}.png" for width, height in sizes]
    for path, (width, height) in zip(paths, sizes, strict=True):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return Sample("s", question, answer, tuple(map(str, paths)), "", bool(answer), "data.jsonl:7")


def make_prompts(processor, samples):
    return [build_prompt(processor, sample, template="plain") for sample in samples]


# ---- the table -----------------------------------------------------------------------------------------------------


def test_the_table_is_read_without_torch_and_transformers():
    code = "import sys, model.families; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


def test_of_all_families_qwen2_5_vl_alone_answers_in_pixels():  # docs/families.md names the sources
    assert [name for name, family in FAMILIES.items() if family.box_space != "thousand"] == ["qwen2_5_vl"]
    assert FAMILIES["qwen2_5_vl"].box_space == "pixels"


def test_an_unknown_model_type_is_refused_with_those_that_work():
    with pytest.raises(ValueError, match="'blip' is not supported: one of qwen2_vl"):
        family_of("blip")


def test_the_modules_that_the_table_names_are_all_that_is_not_the_language_model(loaded, family):
    model, _ = loaded
    vision, blocks = vision_modules(model), FAMILIES[family].vision_blocks
    assert blocks.startswith(f"{vision[0]}.") and len(model.get_submodule(blocks)) == 2
    children = {f"model.{name}" for name, _ in model.model.named_children()}
    assert children == {*vision, "model.language_model"}


def test_a_frozen_tower_takes_its_projector_along_and_leaves_the_language_model(family, directory):
    model, _ = load_model(str(directory / family), freeze_vision=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "language_model" in name or "lm_head" in name}


def test_all_vision_tokens_of_the_family_are_banned_and_nothing_else(loaded, family):
    model, processor = loaded
    vision = {*re.findall(r"<[^>]+>", CASES[family]["mark"]), *CASES[family]["tokens"].values()}
    vision |= {"<img>", "</img>"} if family == "internvl" else set()
    assert {*processor.tokenizer.convert_ids_to_tokens(banned_token_ids(model, processor))} == vision


# ---- processor and prompts -----------------------------------------------------------------------------------------


def test_images_stand_where_the_text_names_them(loaded, family, samples):
    _, processor = loaded
    image = re.escape(CASES[family]["tokens"]["image_token_id"])
    block = rf"(<\|vision_start\|>|<\|begin_of_image\|>|<img>)({image})+(<\|vision_end\|>|<\|end_of_image\|>|</img>)"
    for sample, prompt in zip(samples, make_prompts(processor, samples), strict=True):
        text = processor.tokenizer.decode(prompt["input_ids"][0])
        leading = "" if IMAGE_MARK in sample.question else IMAGE_MARK * len(sample.images)
        expected = f"<|im_start|>user\n{leading}{sample.question}<|im_end|>\n<|im_start|>assistant\n"
        assert re.sub(block, IMAGE_MARK, text) == expected
        assert ("pixel_values" in prompt) == bool(sample.images)


def test_several_images_of_a_prompt_are_those_images_one_by_one_and_in_their_order(loaded, directory, samples):
    _, processor = loaded
    sizes = [Image.open(path).size for path in samples[2].images]
    single = [make_prompts(processor, [make_sample(directory, "the circle", [size])])[0] for size in sizes]
    [together] = make_prompts(processor, samples[2:])
    for key in set(together) - set(TOKEN_KEYS):
        assert together[key].equal(torch.cat([prompt[key] for prompt in single]))


def test_batches_of_text_are_padded_on_the_left_as_generate_needs_it(loaded):
    _, processor = loaded
    masks = processor.tokenizer(["the", "the red circle"], padding=True, return_tensors="pt")["attention_mask"]
    assert masks[0, 0] == 0 and masks[0, -1] == 1


def test_the_special_tokens_of_every_family_are_refused_in_a_question_and_its_own_tags_are_not(
    loaded, family, directory
):
    _, processor = loaded
    sample = make_sample(directory, "the red circle", [(64, 48)])
    tokens = {*re.findall(r"<[^>]+>", CASES[family]["mark"]), *CASES[family]["tokens"].values(), "<|im_end|>"}
    tokens |= {*INTERNVL.values()} if family == "internvl" else set()
    for token in tokens:
        wrong = replace(sample, question=f"the {token} circle")
        with pytest.raises(ValueError, match=f"data.jsonl:7: the question spells {re.escape(token)}, a special token"):
            check_special_tokens(processor, [sample, wrong])
        with pytest.raises(BadSample, match=f"data.jsonl:7: the question spells {re.escape(token)}, a special token"):
            build_prompt(processor, wrong, template="plain")
    fine = replace(sample, question=f"{IMAGE_MARK} <think> <answer> <|im_ end|>")
    check_special_tokens(processor, [fine])
    assert len(build_prompt(processor, fine, template="plain")["input_ids"])


# ---- drawing and scoring -------------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_generate(loaded, samples):
    model, processor = loaded
    prompts = make_prompts(processor, samples)
    drawn = sample_completions(model, prompts, 1, max_new_tokens=12, eos_ids=[2], temperature=0)
    for prompt, [ids] in zip(prompts, drawn, strict=True):
        expected = model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=2)
        assert ids.tolist() == expected[0, prompt["input_ids"].shape[1] :].tolist()
    assert len({tuple(ids.tolist()) for [ids] in drawn}) == len(prompts)  # the prompt, image included, decides


def repeated_logprobs(model, prompts, completions):
    """The naive way: one plain forward of prompt + completion for every completion, all that is needed inferred."""
    result = []
    for prompt, group in zip(prompts, completions, strict=True):
        features = {key: value for key, value in prompt.items() if key not in TOKEN_KEYS}
        start, rows = prompt["input_ids"].shape[1], []
        for answer in group:
            ids = torch.cat([prompt["input_ids"][0], answer])[None]
            if "mm_token_type_ids" in prompt:
                types = [prompt["mm_token_type_ids"], torch.zeros_like(answer)[None]]
                features["mm_token_type_ids"] = torch.cat(types, 1)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **features).logits[0]
            rows.append(logits[start - 1 : -1].log_softmax(1).gather(1, answer[:, None])[:, 0])
        result.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    return result


def difference(model, prompts):
    """Between the packed row and repeated rows: of log-probs, and of gradients relative to the largest of them."""
    completions, sides = make_completions(model, len(prompts)), []
    for score in (completion_logprobs, repeated_logprobs):
        logprobs = torch.cat([group.flatten() for group in score(model, prompts, completions)])
        weights = torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)
        gradients = torch.autograd.grad(
            (logprobs * weights).sum(), list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        sides.append((logprobs.detach(), dict(enumerate(gradients))))
    (packed, packed_gradients), (repeated, repeated_gradients) = sides
    return (packed - repeated).abs().max(), relative_difference(packed_gradients, repeated_gradients)


def test_a_packed_row_scores_as_repeated_rows_do(loaded, samples, all_in_double):
    model, processor = loaded
    logprobs, gradients = difference(model, make_prompts(processor, samples))
    assert logprobs < 1e-6 and gradients < 1e-6  # HF casts norms, rotary angles and routers to fp32


def test_a_plain_causal_mask_fails_the_comparison(loaded, samples, monkeypatch):
    model, processor = loaded

    def causal(model, layout):
        return {"attention_mask": torch.ones(1, 1, *[layout.groups[-1][-1]] * 2).bool().tril()}

    monkeypatch.setattr(rollout, "row_attention", causal)
    logprobs, gradients = difference(model, make_prompts(processor, samples))
    assert logprobs > 1e-3 and gradients > 1e-3


def test_internvl_3_5_whose_decoder_is_qwen3_draws_and_scores_as_the_older_ones(tmp_path, samples, monkeypatch):
    monkeypatch.setitem(CASES, "internvl", CASES["internvl"] | {"text": {"model_type": "qwen3"}})
    model, processor = load_model(str(write_checkpoint("internvl", tmp_path)))
    test_greedy_tokens_are_those_of_generate((in_double(model), processor), samples)
    logprobs, gradients = difference(model, make_prompts(processor, samples))
    assert logprobs < 1e-6 and gradients < 1e-6


# ---- a step and a checkpoint ---------------------------------------------------------------------------------------


def save(directory, name, model, world, source):
    packaging = Packaging(str(source), torch.float32, (256, 4096), {})
    save_checkpoint(directory / name, model, [], {"step": 1}, world, packaging)


def two_processes(rank, port, directory):
    """A step of every family over two ranks, the second without images, and a checkpoint; results go to files."""
    set_rank(rank, 2, port)
    directory, gradients = Path(directory), {}
    with process_group(bf16=False) as world:
        for family in FAMILIES:
            model, processor = load_model(str(directory / family), min_pixels=256, max_pixels=4096)
            model = shard_model(model, world, compute_dtype=torch.float32)
            gradients[family] = step_gradients(model, None, processor, world, 4096, beta=0.0)[0]
            save(directory / "two", family, model, world, directory / family)
    torch.save(gradients, directory / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def double(directory):
    spawn(two_processes, 2, str(directory))
    return [torch.load(directory / f"rank{rank}.pt") for rank in (0, 1)]


def test_two_processes_give_the_gradients_of_one_with_images_on_one_rank_only(family, directory, double):
    model, processor = load_model(str(directory / family), min_pixels=256, max_pixels=4096)
    alone, _, _ = step_gradients(model, None, processor, ALONE, 4096, beta=0.0)
    unused = {name for name, parameter in model.named_parameters() if name not in alone}
    assert not unused and max(gradient.abs().max() for gradient in alone.values()) > 1e-3
    for gradients in double:
        assert gradients[family].keys() == alone.keys()
        assert relative_difference(gradients[family], alone) < 1e-5


def test_bf16_draws_and_learns_over_fp32_masters(family, directory, samples):
    model, processor = load_model(str(directory / family), min_pixels=256, max_pixels=4096)
    exact, _, _ = step_gradients(model, None, processor, ALONE, 4096, beta=0.0)
    with process_group(bf16=True) as world:
        model = shard_model(model, world, compute_dtype=torch.bfloat16)
        low, _, _ = step_gradients(model, None, processor, world, 4096, beta=0.0)
        with gathered(model):
            drawn = sample_completions(
                model, make_prompts(processor, samples), 2, max_new_tokens=6, eos_ids=[2], return_logprobs=True
            )
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(logprobs.isfinite().all() for group in drawn[1] for logprobs in group)
    # bf16 was really used. Qwen3.5 normalises the small queries and keys of a random model, which amplifies rounding:
    # repeated rows in bf16 are as far off, by 0.26 (packed: 0.28).
    assert 1e-5 < relative_difference(low, exact) < (0.5 if family.startswith("qwen3_5") else 0.3)


@pytest.mark.parametrize("processes", ["one", "two"])
def test_plain_transformers_loads_a_checkpoint(
    loaded, family, directory, samples, double, processes, tmp_path, monkeypatch
):
    path = directory / "two" / family
    if processes == "one":
        monkeypatch.setattr(checkpoint, "SHARD_SIZE", "100KB")
        path = tmp_path / "one"
        save(tmp_path, "one", load_model(str(directory / family))[0], ALONE, directory / family)
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert {*index["weight_map"].values()} == {file.name for file in path.glob("model-*-of-*.safetensors")}
        with safe_open(directory / family / "model.safetensors", "pt") as file:
            assert index["weight_map"].keys() == {*file.keys()}  # the names that other engines look for
    model, prompts = loaded[0], make_prompts(load_processor(str(path), min_pixels=256, max_pixels=4096), samples)
    again = AutoModelForImageTextToText.from_pretrained(path)
    assert all(file.name.startswith("model") for file in path.glob("*.safetensors"))  # vLLM loads all that there are
    # The budget must be in the files, for whoever reads them next.
    images = type(loaded[1].image_processor).from_pretrained(path)
    for sample, expected in zip(samples[1:], make_prompts(loaded[1], samples[1:]), strict=True):
        pixels = images([Image.open(file) for file in sample.images], return_tensors="pt")["pixel_values"]
        assert pixels.equal(expected["pixel_values"])
    assert type(again) is type(model) and again.generation_config.eos_token_id == [2, 0]
    for prompt, expected in zip(prompts, make_prompts(loaded[1], samples), strict=True):
        assert all(prompt[key].equal(expected[key]) for key in expected)
        with torch.no_grad():
            logits = in_double(again)(**prompt).logits  # whose norms round to fp32, which ours do not
            difference = (logits - model(**expected).logits).abs().max()
            assert difference < 1e-4 * logits.abs().max(), (difference, logits.abs().max())


# ---- pixels and boxes ----------------------------------------------------------------------------------------------

SIZES = [(1, 1), (3, 5), (27, 29), (640, 480), (333, 1000), (1999, 10), (10, 1990), (4000, 21), (16, 3100)]
STEP = 16  # two patches, which become one token


@pytest.mark.parametrize(
    "image_size, input_size", [((640, 480), (644, 476)), ((3, 2000), (28, 5600)), ((17, 13), (56, 28))]
)
def test_a_box_goes_to_the_model_and_back_unchanged(family, image_size, input_size):
    box = [0.25, 1, image_size[0] - 0.5, image_size[1]]
    there = to_model_box(box, image_size, input_size, family)
    assert to_image_box(there, image_size, input_size, family) == pytest.approx(box, rel=1e-12)


@pytest.mark.parametrize("pixels", [(256, 256), (256, 4096), (3136, 1_003_520)])
@pytest.mark.parametrize("box_space", ["", "pixels", "thousand"])
def test_boxes_of_any_image_go_to_the_model_and_back(family, directory, pixels, box_space):
    processor = load_processor(str(directory / family), min_pixels=pixels[0], max_pixels=pixels[1])
    for size in SIZES:
        width, height = size
        box = [width * 0.125, 0, width, height * 0.7]
        sample = make_sample(directory, "the circle", [size], json.dumps(box))
        prompt = build_prompt(processor, sample, template="plain", box_space=box_space)
        there = json.loads(prompt.answer)
        frame = (1000, 1000) if (box_space or FAMILIES[family].box_space) == "thousand" else prompt.input_size
        assert there == pytest.approx([frame[0] * 0.125, 0, frame[0], frame[1] * 0.7], rel=1e-12)
        back = to_image_box(there, prompt.image_size, prompt.input_size, family, box_space)
        assert back == pytest.approx(box, rel=1e-9, abs=1e-9)


def test_images_are_resized_within_the_budget_and_make_use_of_it(family, directory):
    processor = load_processor(str(directory / family), min_pixels=2048, max_pixels=4096)
    text = describe_processor(processor)
    assert type(processor.image_processor).__name__ in text and type(processor).__name__ in text
    if not has_pixel_budget(processor):
        assert "tiles of 32 x 32" in text
        return
    assert "2,048 to 4,096 pixels" in text
    for size in SIZES:
        sample = make_sample(directory, "the circle", [size])
        width, height = build_prompt(processor, sample, template="plain").input_size
        assert width % STEP == 0 and height % STEP == 0 and width * height >= 2048
        assert width * height <= 4096 or STEP in (width, height)  # one step is the least, however thin the image
    width, height = build_prompt(processor, make_sample(directory, "the circle", [(640, 480)])).input_size
    assert width * height == 48 * 64  # the next larger ones with the aspect ratio, 64 x 80 and 64 x 96, hold too much


def test_an_image_too_thin_for_the_processor_is_refused_with_its_line(family, directory):
    processor = load_processor(str(directory / family), min_pixels=256, max_pixels=4096)
    sample = make_sample(directory, "the circle", [(4020, 20)], "[0, 0, 4020, 10]")
    if has_pixel_budget(processor):
        with pytest.raises(BadSample, match="data.jsonl:7: .* aspect ratio must be smaller than 200, got 20.*; crop"):
            build_prompt(processor, sample)
    else:
        assert json.loads(build_prompt(processor, sample).answer) == pytest.approx([0, 0, 1000, 500])
