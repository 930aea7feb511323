"""What differs between model families, in one table, and what is done to a model before anything runs on it.

Whatever a processor returns passes through unopened: it is `input_ids` plus tensors that are joined along their first
dimension. No class per family, no test of a path: the model type comes from the checkpoint's config.
Left out: video, models whose text attention is not plainly causal (Gemma 3, PaliGemma).

The README's table of families names the source of each box space, and what is assumed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, PROCESSOR_MAPPING_NAMES

from data import BadSample, Sample, chat_messages, check_boxes, load_image, move_answer_boxes
from model.attention import use_shared_prefix

MAX_PIXELS = 1_003_520  # 1,280 image tokens at 28 x 28; the hub's configs say 12.8 million, 16,384 tokens an image
DECODER_LAYERS = "model.language_model.layers"


@dataclass(frozen=True)
class Family:
    box_space: str  # "pixels" of the resized image, or "thousand": 0..1000 on both axes
    vision: str  # the vision tower
    vision_blocks: str  # its blocks, each sharded by itself
    frames: int = 1  # what its processor counts each pixel of an image in the budget
    # Modules between tower and language model, as a regular expression; in InternVL they stand beside the tower.
    projector: str = r"model\.visual\.(merger|deepstack_merger_list\.\d+|downsample)"


# A new family is one row, and one entry in test_families.py.
FAMILIES = {
    "qwen2_vl": Family("thousand", "model.visual", "model.visual.blocks"),
    "qwen2_5_vl": Family("pixels", "model.visual", "model.visual.blocks"),
    "qwen3_vl": Family("thousand", "model.visual", "model.visual.blocks"),
    "qwen3_vl_moe": Family("thousand", "model.visual", "model.visual.blocks"),
    "internvl": Family(
        "thousand",
        "model.vision_tower",
        "model.vision_tower.encoder.layer",
        projector=r"model\.multi_modal_projector",
    ),
    "glm4v": Family("thousand", "model.visual", "model.visual.blocks", frames=2),
}
REFUSED = {
    "gemma3": "tokens of an image see each other both ways and some layers see a window only; a packed row is causal",
    "paligemma": "the prompt sees itself both ways; a packed row is causal",
    "internvl_chat": "the checkpoint brings its own code; take the one converted for transformers, named ...-hf",
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
    if model_type in REFUSED:
        raise ValueError(f"model type {model_type!r} is not supported: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {model_type!r} is not supported: one of {', '.join(FAMILIES)}; "
            "a new one is a row in vlm.FAMILIES if its text attention is causal and the images of several prompts join"
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
    trust_remote_code: bool = False,
    empty: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model, on the CPU and in eval mode, and its processor with the pixel budget applied.

    `empty` leaves the weights out (meta tensors): `parallel.shard_model` fills them from the rank that has them.
    """
    # Read as JSON: an unsupported checkpoint is refused before any code that it brings could run.
    family_of(PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type", ""))
    # Never left at None, which asks at the terminal, in every process.
    remote = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name_or_path, **remote)
    layers = {*(getattr(config.get_text_config(), "layer_types", None) or [])}
    if layers - {"full_attention"}:
        raise ValueError(
            f"{name_or_path}: layers of {', '.join(sorted(layers))}; a packed row is causal without a window, "
            "so only full_attention is supported"
        )
    options = {"dtype": dtype, "attn_implementation": "sdpa", **remote}
    if empty:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, **options)
    else:
        # Never a pickled checkpoint: reading one can run code.
        model = AutoModelForImageTextToText.from_pretrained(name_or_path, use_safetensors=True, **options)
    use_shared_prefix(model)
    if freeze_vision:
        for name in vision_modules(model):
            model.get_submodule(name).requires_grad_(False)
    if gradient_checkpointing:
        checkpoint_activations(model)
    return model.eval(), load_processor(name_or_path, max_pixels=max_pixels, min_pixels=min_pixels, **remote)


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
    """The processor class without its video part, which works with and without torchvision."""
    return type(processor_class.__name__, (_ImageOnly, processor_class), {})


def load_processor(
    name_or_path: str, *, max_pixels: int = MAX_PIXELS, min_pixels: int = 3136, trust_remote_code: bool = False
) -> ProcessorMixin:
    """The checkpoint's processor, padding on the left and with this pixel budget.

    Transformers picks the image processor: torchvision's where that is installed, else Pillow's.
    """
    remote = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name_or_path, **remote)
    if type(config) in PROCESSOR_MAPPING:  # image_only with torchvision too: a directory may lack the video part
        processor = image_only(PROCESSOR_MAPPING[type(config)]).from_pretrained(name_or_path, **remote)
    else:
        processor = AutoProcessor.from_pretrained(name_or_path, **remote)
    if has_pixel_budget(processor):
        # Assigned after loading: given to from_pretrained, `size` is overridden by the config's max_pixels in silence.
        least, most = counted_pixels(config.model_type, (min_pixels, max_pixels))
        processor.image_processor.size = {"shortest_edge": least, "longest_edge": most}
    processor.tokenizer.padding_side = "left"
    return processor


def has_pixel_budget(processor: ProcessorMixin) -> bool:
    """Whether images are resized under a budget, which `size` holds the Qwen way; otherwise they are cut into tiles."""
    size = processor.image_processor.size
    return "shortest_edge" in size and "longest_edge" in size


def counted_pixels(model_type: str, pixels: tuple[int, int]) -> tuple[int, int]:
    """Least and most pixels of an image as the family's processor counts them: GLM's takes it for a video of two."""
    frames = family_of(model_type).frames
    return pixels[0] * frames, pixels[1] * frames


def describe_processor(processor: ProcessorMixin, box_space: str = "") -> str:
    """A line for the start of a run: who reads the images, within which pixels, and where boxes live."""
    family, images = family_of(family_of_processor(processor)), processor.image_processor
    size = images.size
    if has_pixel_budget(processor):
        pixels = f"{size['shortest_edge'] // family.frames:,} to {size['longest_edge'] // family.frames:,} pixels each"
    else:
        pixels = f"in tiles of {size['width']} x {size['height']}, to which the pixel budget does not apply"
    space = {"pixels": "pixels of the resized image", "thousand": "0..1000"}[box_space or family.box_space]
    return f"images: {type(images).__name__} of {type(processor).__name__}, {pixels}; boxes: {space}"


def family_of_processor(processor: ProcessorMixin) -> str:
    """The model type that a processor belongs to."""
    name = type(processor).__name__
    types = [model_type for model_type in FAMILIES if PROCESSOR_MAPPING_NAMES.get(model_type) == name]
    if not types:
        raise ValueError(f"processor {name} belongs to none of {', '.join(FAMILIES)}; name the family")
    return types[0]


def build_prompt(
    processor: ProcessorMixin,
    sample: Sample,
    *,
    template: str = "rec",
    family: str | None = None,
    box_space: str | None = None,
) -> Prompt:
    """The sample as the model reads it, true boxes moved into the space that `family` (a model type) answers in.

    Without `family` it is the one the processor belongs to; `box_space` overrides the family's.
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
        raise BadSample(
            f"{sample.source}: the processor refuses it: {error}; crop or replace the image, or drop the sample"
        ) from error
    answer, image_size, input_size = sample.answer, None, None
    if images:
        image_size, input_size = images[0].size, _input_size(processor, inputs, images[0].size)
        check_boxes(sample, image_size)
    if sample.has_boxes:
        if not images:
            raise BadSample(f"{sample.source}: boxes without an image; name one or choose rewards that read no boxes")
        answer = move_answer_boxes(answer, lambda box: to_model_box(box, image_size, input_size, family, box_space))
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
    box: list[float],
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    family: str,
    box_space: str | None = None,
) -> list[float]:
    """A box [x1, y1, x2, y2] of the original image in the space `family` answers in; sizes are (width, height).

    `box_space`, "pixels" or "thousand", overrides the family's.
    """
    width, height = _box_frame(input_size, family, box_space)
    x, y = width / image_size[0], height / image_size[1]
    return [box[0] * x, box[1] * y, box[2] * x, box[3] * y]


def to_image_box(
    box: list[float],
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    family: str,
    box_space: str | None = None,
) -> list[float]:
    """The way back: a box the model answered, in pixels of the original image."""
    width, height = _box_frame(input_size, family, box_space)
    x, y = image_size[0] / width, image_size[1] / height
    return [box[0] * x, box[1] * y, box[2] * x, box[3] * y]


def _box_frame(input_size: tuple[int, int], family: str, box_space: str | None) -> tuple[int, int]:
    """Width and height of the whole image in the space that boxes live in."""
    frames = {"thousand": (1000, 1000), "pixels": input_size}
    space = box_space or family_of(family).box_space
    if space not in frames:
        raise ValueError(f"box_space {space!r} is unknown: one of {', '.join(frames)}")
    return frames[space]


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


def projector_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that take what the tower sees to the language model."""
    pattern = family_of(model.config.model_type).projector
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]


def vision_modules(model: PreTrainedModel) -> list[str]:
    """Names of the vision tower and of its projector."""
    return [family_of(model.config.model_type).vision, *projector_modules(model)]


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter or module of that name is one of these modules or inside one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
