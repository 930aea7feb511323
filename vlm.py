"""What differs between model families, in one table, and what is done to a model before anything runs on it.

Whatever a processor returns passes through unopened: it is `input_ids` plus tensors that are joined along their first
dimension. No class per family, no test of a path: the model type comes from the checkpoint's config.
Left out: LoRA, video, models whose text attention is not plainly causal (Gemma 3, PaliGemma).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from data import BadSample, Sample, chat_messages, check_boxes, load_image, move_answer_boxes

MAX_PIXELS = 1_003_520  # 1,280 image tokens at 28 x 28; the hub's configs say 12.8 million, 16,384 tokens an image
DECODER_LAYERS = "model.language_model.layers"


@dataclass(frozen=True)
class Family:
    box_space: str  # "pixels" of the resized image, or "thousand": 0..1000 on both axes
    vision: str  # the vision tower
    vision_blocks: str  # its blocks, each sharded by itself


# Sources: Qwen2.5-VL's report (absolute pixels of the input), Qwen2-VL's and Qwen3-VL's cookbooks, InternVL's and
# GLM-4.1V's documentation (0..1000). A new family is one row.
FAMILIES = {
    "qwen2_vl": Family("thousand", "model.visual", "model.visual.blocks"),
    "qwen2_5_vl": Family("pixels", "model.visual", "model.visual.blocks"),
    "qwen3_vl": Family("thousand", "model.visual", "model.visual.blocks"),
    "internvl": Family("thousand", "model.vision_tower", "model.vision_tower.encoder.layer"),
    "glm4v": Family("thousand", "model.visual", "model.visual.blocks"),
}


@dataclass(frozen=True, eq=False)
class Prompt(Mapping[str, Tensor]):
    """What the processor returns for one sample, as a mapping that rollout.py reads, with the truth beside it."""

    inputs: dict[str, Tensor]  # input_ids [1, P], pixel_values, image_grid_thw, ...
    answer: str  # the truth, its boxes in the space the model answers in
    sample: Sample
    image_size: tuple[int, int] | None  # (width, height) of the first image as it is
    input_size: tuple[int, int] | None  # and as the model sees it

    def __getitem__(self, key: str) -> Tensor:
        return self.inputs[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)


def family_of(model_type: str) -> Family:
    """The row of a model type, or the list of those that work."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {model_type!r} is not supported: one of {', '.join(FAMILIES)}; "
            "a new one is a row in vlm.FAMILIES if its text attention is causal"
        )
    return FAMILIES[model_type]


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_pixels: int = MAX_PIXELS,
    min_pixels: int = 3136,
    freeze_vision: bool = False,
    gradient_checkpointing: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model, on the CPU and in eval mode, and its processor with the pixel budget applied."""
    family = family_of(AutoConfig.from_pretrained(name_or_path).model_type)
    model = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype, attn_implementation="sdpa")
    if freeze_vision:
        model.get_submodule(family.vision).requires_grad_(False)
    if gradient_checkpointing:
        checkpoint_activations(model)
    return model.eval(), load_processor(name_or_path, max_pixels=max_pixels, min_pixels=min_pixels)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turns gradient checkpointing on, under the name that this version of transformers has for it."""
    if "activation_checkpointing_enable" in dir(model):  # 5.23; the older name is deprecated there
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class _ImageOnly:
    """Mixed into a processor class, leaves out its video part: video processors need torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]


def image_only(processor_class: type) -> type:
    """The processor class without its video part, for use where torchvision is not installed."""
    return type(processor_class.__name__, (_ImageOnly, processor_class), {})


def load_processor(name_or_path: str, *, max_pixels: int = MAX_PIXELS, min_pixels: int = 3136) -> ProcessorMixin:
    """The checkpoint's processor, padding on the left and with this pixel budget, with or without torchvision."""
    if is_torchvision_available():
        processor = AutoProcessor.from_pretrained(name_or_path)
    else:
        config = AutoConfig.from_pretrained(name_or_path)
        processor = image_only(PROCESSOR_MAPPING[type(config)]).from_pretrained(name_or_path)
    size = processor.image_processor.size
    if "longest_edge" in size and "shortest_edge" in size:  # the Qwen way of saying pixels; tiles have no such budget
        # Assigned after loading: given to from_pretrained, `size` is overridden by the config's max_pixels in silence.
        processor.image_processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    processor.tokenizer.padding_side = "left"
    return processor


def family_of_processor(processor: ProcessorMixin) -> str:
    """The model type that a processor belongs to."""
    name = type(processor).__name__
    types = [model_type for model_type in FAMILIES if PROCESSOR_MAPPING_NAMES.get(model_type) == name]
    if not types:
        raise ValueError(f"processor {name} belongs to none of {', '.join(FAMILIES)}; name the family")
    return types[0]


def build_prompt(
    processor: ProcessorMixin, sample: Sample, *, template: str = "rec", family: str | None = None
) -> Prompt:
    """The sample as the model reads it, true boxes moved into the space that `family` (a model type) answers in.

    Without `family` it is the one the processor belongs to.
    """
    family = family or family_of_processor(processor)
    images = [load_image(path, sample.root) for path in sample.images]
    messages, hidden = chat_messages(sample, template), []
    for part in messages[0]["content"]:
        if part["type"] == "text":
            part["text"], found = hide_special(processor, part["text"])
            hidden += found
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    try:
        inputs = processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=False)
        inputs = spell_out(processor, dict(inputs), hidden)
    except ValueError as error:  # an aspect ratio above 200, or more image marks than images
        raise BadSample(f"{sample.source}: the processor refuses it: {error}") from error
    answer, image_size, input_size = sample.answer, None, None
    if images:
        image_size, input_size = images[0].size, _input_size(processor, inputs, images[0].size)
        check_boxes(sample, image_size)
    if sample.has_boxes:
        if not images:
            raise BadSample(f"{sample.source}: boxes without an image; name one or choose rewards that read no boxes")
        answer = move_answer_boxes(answer, lambda box: to_model_box(box, image_size, input_size, family))
    return Prompt(inputs, answer, sample, image_size, input_size)


def hide_special(processor: ProcessorMixin, text: str) -> tuple[str, list[str]]:
    """(text, found): the text of a data file with each special token that it spells replaced by the padding token.

    A question that holds `<|im_end|>` or `<|image_pad|>` must neither end the turn nor stand for an image. Which
    strings are special, tokenizer and processor say. `spell_out` puts them back, as text, once everything is tokens.
    (transformers 5.23 has sanitize_control_tokens: it raises on InternVL's image token in a text, and takes apart added
    tokens that are not special, <think> for one, where a template writes them.)
    """
    tokenizer = processor.tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {value for name, value in vars(processor).items() if name.endswith("_token") and value}
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    found = pattern.findall(text)
    return (pattern.sub(tokenizer.pad_token, text) if found else text), found


def spell_out(processor: ProcessorMixin, inputs: dict[str, Tensor], hidden: list[str]) -> dict[str, Tensor]:
    """`inputs` with the tokens of the hidden strings, read as text, where `hide_special` left the padding token."""
    if not hidden:
        return inputs
    tokenizer, ids = processor.tokenizer, inputs["input_ids"]
    places = ids[0] == tokenizer.pad_token_id
    if places.sum() != len(hidden):  # a chat template that writes the padding token itself
        raise ValueError(
            f"the text spells the special tokens {hidden}, and they cannot be told from those of the prompt"
        )
    # The first character by itself: the rest is no special token, whatever the tokenizer's rules are.
    pieces = [tokenizer([text[0], text[1:]], add_special_tokens=False)["input_ids"] for text in hidden]
    pieces = [torch.tensor(first + rest) for first, rest in pieces]
    repeats = torch.ones_like(ids[0])
    repeats[places] = torch.tensor([len(piece) for piece in pieces])
    longer = {
        key: value.repeat_interleave(repeats, 1) if value.shape == ids.shape else value for key, value in inputs.items()
    }
    longer["input_ids"][0, places.repeat_interleave(repeats)] = torch.cat(pieces)
    return longer


def blank_prompt(processor: ProcessorMixin) -> Prompt:
    """A prompt of one small black image: a rank without images adds it to a row, so that all ranks run the tower."""
    sample = Sample("blank", "", "", ("",), "", False, "blank")
    text = processor.apply_chat_template(chat_messages(sample, "plain"), add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Image.new("RGB", (32, 32))], return_tensors="pt", add_special_tokens=False)
    return Prompt(dict(inputs), "", sample, None, None)


def _input_size(processor: ProcessorMixin, inputs: dict, image_size: tuple[int, int]) -> tuple[int, int]:
    if "image_grid_thw" not in inputs:  # tiles: their boxes are in 0..1000 and need no input size
        return image_size
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    patch = processor.image_processor.patch_size
    return columns * patch, rows * patch


def to_model_box(
    box: list[float], image_size: tuple[int, int], input_size: tuple[int, int], family: str
) -> list[float]:
    """A box [x1, y1, x2, y2] of the original image in the space `family` answers in; sizes are (width, height)."""
    width, height = (1000, 1000) if family_of(family).box_space == "thousand" else input_size
    x, y = width / image_size[0], height / image_size[1]
    return [box[0] * x, box[1] * y, box[2] * x, box[3] * y]


def to_image_box(
    box: list[float], image_size: tuple[int, int], input_size: tuple[int, int], family: str
) -> list[float]:
    """The way back: a box the model answered, in pixels of the original image."""
    width, height = (1000, 1000) if family_of(family).box_space == "thousand" else input_size
    x, y = image_size[0] / width, image_size[1] / height
    return [box[0] * x, box[1] * y, box[2] * x, box[3] * y]


def eos_token_ids(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    """Every id that ends an answer: the tokenizer's and those of the generation config (Qwen has two)."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return sorted({*ids, processor.tokenizer.eos_token_id})


def banned_token_ids(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    """Ids a completion may not hold: vision tokens, and rows of the head that stand for no token.

    One drawn image token makes the next forward fail: image features and image tokens no longer match.
    """
    size = model.get_output_embeddings().out_features
    known = set(processor.tokenizer.get_vocab().values())
    vision = [
        value
        for name, value in vars(model.config).items()
        if name.endswith("_token_id") and name.startswith(("image", "video", "vision"))
    ]
    marks = [
        token
        for token in ("<img>", "</img>", "<|begin_of_image|>", "<|end_of_image|>")
        if token in processor.tokenizer.get_vocab()
    ]
    vision += processor.tokenizer.convert_tokens_to_ids(marks)
    return sorted(
        {*(i for i in range(size) if i not in known), *(i for i in vision if isinstance(i, int) and i < size)}
    )


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
