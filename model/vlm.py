"""Loading a model with its processor, and turning a sample into the prompt that the model reads.

A prompt is whatever the processor returns: `input_ids` plus tensors that are joined along their first dimension.
Left out: video, and code that a checkpoint brings along (transformers has every supported model type itself).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, PROCESSOR_MAPPING_NAMES

from data import IMAGE_MARK, BadSample, Sample, chat_messages, check_boxes, load_image, move_answer_boxes
from model.attention import use_shared_prefix
from model.families import (  # noqa: F401, some for others to import from here
    DECODER_LAYERS,
    FAMILIES,
    MAX_PIXELS,
    MIN_PIXELS,
    counted_pixels,
    family_of,
    to_image_box,
    to_model_box,
)
from model.linear_attention import use_shared_states
from model.lora import base_of, is_adapter, load_adapter
from model.mlp import use_lean_mlps
from model.norms import fuse_norms
from model.packing import layer_problem
from model.vision import use_segments

VISION_MARKS = ("<img>", "</img>", "<|begin_of_image|>", "<|end_of_image|>")  # vision tokens that no config names


@dataclass(frozen=True, eq=False)
class Prompt(Mapping[str, Tensor]):
    """What the processor returns for one sample, as a mapping that rollout.py reads, and the truth beside it."""

    inputs: dict[str, Tensor]  # input_ids [1, P], pixel_values, image_grid_thw, ...
    answer: str  # the truth, its boxes in the space the model answers in
    sample: Sample
    image_size: tuple[int, int] | None  # (width, height) of the first image
    input_size: tuple[int, int] | None  # the same after the processor has resized it
    opening: str = ""  # what the chat template has begun the answer with: "<think>\n" for some models

    def answer_text(self, completion: str) -> str:
        """The whole answer, which rewards read: without its opening a thought would only end."""
        return self.opening + completion

    def __getitem__(self, key: str) -> Tensor:
        return self.inputs[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)


# ---- loading -------------------------------------------------------------------------------------------------------


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_pixels: int = MAX_PIXELS,
    min_pixels: int = MIN_PIXELS,
    freeze_vision: bool = False,
    gradient_checkpointing: bool = False,
    empty: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model, on the CPU and in eval mode, and its processor.

    `empty` leaves the weights out (meta tensors); `parallel.shard_model` fills them from the rank that has them.
    """
    config = load_config(name_or_path)
    options = {"dtype": dtype, "attn_implementation": "sdpa", "trust_remote_code": False}
    if empty:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, **options)
    else:
        # Never a pickled checkpoint: reading one may run code.
        model = AutoModelForImageTextToText.from_pretrained(name_or_path, use_safetensors=True, **options)
    use_own_layers(model)
    if freeze_vision:
        for name in vision_modules(model):
            model.get_submodule(name).requires_grad_(False)
    if gradient_checkpointing:
        checkpoint_activations(model)
    return model.eval(), load_processor(name_or_path, max_pixels=max_pixels, min_pixels=min_pixels)


def use_own_layers(model: PreTrainedModel) -> None:
    """Gives the model attention over a shared prompt, and layers that compute what theirs do in fewer kernels."""
    use_shared_prefix(model)
    use_shared_states(model)
    use_segments(model.get_submodule(family_of(model.config.model_type).vision_blocks))
    use_lean_mlps(model)
    fuse_norms(model)


def load_any(name_or_path: str, **options) -> tuple[PreTrainedModel, ProcessorMixin]:
    """What load_model returns, for a model or for the directory of an adapter, which is put on its base."""
    if not is_adapter(name_or_path):
        return load_model(name_or_path, **options)
    model, processor = load_model(base_of(name_or_path), **options)
    load_adapter(model, Path(name_or_path))
    return model.eval(), processor


def load_config(name_or_path: str) -> PreTrainedConfig:
    """The config of a model; raises ValueError if its type or its attention is not supported."""
    try:
        # Read as JSON first, so that the message for an unsupported type is ours.
        family_of(PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type", ""))
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)  # None asks at the terminal
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model {name_or_path}: no directory here, and the hub does not give it: {reason}") from error
    if reason := layer_problem(config.get_text_config()):
        raise ValueError(f"model {name_or_path} {reason}")
    return config


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turns gradient checkpointing on."""
    if hasattr(model, "activation_checkpointing_enable"):  # since transformers 5.23, which deprecates the older name
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def vision_modules(model: PreTrainedModel) -> list[str]:
    """Names of the vision tower and of its projector."""
    family = family_of(model.config.model_type)
    return [family.vision, family.projector] if family.projector else [family.vision]


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of all that is trained."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


# ---- processors ----------------------------------------------------------------------------------------------------


class _ImageOnly:
    """Mixed into a processor class, leaves out its video part: video processors need torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]


def image_only(processor_class: type) -> type:
    """The processor class without its video part: it works with and without torchvision."""
    return type(processor_class.__name__, (_ImageOnly, processor_class), {})


def load_processor(name_or_path: str, *, max_pixels: int = MAX_PIXELS, min_pixels: int = MIN_PIXELS) -> ProcessorMixin:
    """The checkpoint's processor, which pads on the left and resizes images within this pixel budget.

    Transformers picks the image processor: torchvision's if that is installed, otherwise Pillow's.
    """
    config = load_config(name_or_path)
    # Also with torchvision: a directory may lack the video part.
    processor_class = image_only(PROCESSOR_MAPPING[type(config)])
    processor = processor_class.from_pretrained(name_or_path, trust_remote_code=False)
    if has_pixel_budget(processor):
        # Set after loading: from_pretrained would silently override a given `size` by the config's max_pixels.
        least, most = counted_pixels(config.model_type, (min_pixels, max_pixels))
        processor.image_processor.size = {"shortest_edge": least, "longest_edge": most}
    processor.tokenizer.padding_side = "left"
    return processor


def has_pixel_budget(processor: ProcessorMixin) -> bool:
    """Whether the processor resizes images within a pixel budget; otherwise it cuts them into tiles."""
    size = processor.image_processor.size
    return "shortest_edge" in size and "longest_edge" in size


def describe_processor(processor: ProcessorMixin, box_space: str = "") -> str:
    """A line for the start of a run: the image processor, its pixel budget and the space of the boxes."""
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


# ---- prompts -------------------------------------------------------------------------------------------------------


def build_prompt(
    processor: ProcessorMixin,
    sample: Sample,
    *,
    template: str = "rec",
    family: str | None = None,
    box_space: str | None = None,
) -> Prompt:
    """The sample as the model reads it, with its true boxes in the space that `family` (a model type) answers in.

    By default the family is the one that the processor belongs to; `box_space` overrides the family's space.
    """
    family = family or family_of_processor(processor)
    _refuse_special_tokens(sample, _special_tokens(processor))
    images = [load_image(path, sample.root) for path in sample.images]
    messages = chat_messages(sample, template)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    try:
        inputs = processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=False)
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
            raise BadSample(f"{sample.source}: boxes without an image; name one, or choose rewards that read no boxes")
        answer = move_answer_boxes(answer, lambda box: to_model_box(box, image_size, input_size, family, box_space))
    opening = re.search(r"(<think>\s*)?$", text)[0]
    return Prompt(dict(inputs), answer, sample, image_size, input_size, opening)


def check_special_tokens(processor: ProcessorMixin, samples: Iterable[Sample]) -> None:
    """Refuses a question or an answer that spells a special token: it would end a turn or stand for an image."""
    special = _special_tokens(processor)
    for sample in samples:
        _refuse_special_tokens(sample, special)


def _refuse_special_tokens(sample: Sample, special: re.Pattern[str]) -> None:
    for part, text in (("question", sample.question.replace(IMAGE_MARK, " ")), ("answer", sample.answer)):
        if found := special.search(text):
            raise BadSample(
                f"{sample.source}: the {part} spells {found[0]}, a special token of the model: remove it, or write it "
                "with a space inside"
            )


def _special_tokens(processor: ProcessorMixin) -> re.Pattern[str]:
    """Matches every text that the tokenizer or the processor reads as a special token."""
    special = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    special |= {value for name, value in vars(processor).items() if name.endswith("_token") and value}
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))


def blank_prompt(processor: ProcessorMixin) -> Prompt:
    """A prompt of one small black image; a rank without images adds it to a row, so that all ranks run the tower."""
    sample = Sample("blank", "", "", ("",), "", False, "blank")
    text = processor.apply_chat_template(chat_messages(sample, "plain"), add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Image.new("RGB", (32, 32))], return_tensors="pt", add_special_tokens=False)
    return Prompt(dict(inputs), "", sample, None, None)


def _input_size(processor: ProcessorMixin, inputs: dict, image_size: tuple[int, int]) -> tuple[int, int]:
    if "image_grid_thw" not in inputs:  # tiles: boxes are in 0..1000 and need no input size
        return image_size
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    patch = processor.image_processor.patch_size
    return columns * patch, rows * patch


# ---- token ids -----------------------------------------------------------------------------------------------------


def eos_token_ids(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    """Every id that ends an answer: the tokenizer's, and the ids in the generation config (Qwen has two)."""
    ids = model.generation_config.eos_token_id  # an id, several, or None
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({*ids, processor.tokenizer.eos_token_id} - {None})


def banned_token_ids(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    """Ids that a completion must not hold: vision tokens, and rows of the head that belong to no token.

    One drawn image token would make the next forward fail: there would be more image tokens than image features.
    """
    size, vocabulary = model.get_output_embeddings().out_features, processor.tokenizer.get_vocab()
    banned = set(range(size)) - set(vocabulary.values())
    banned |= {vocabulary[token] for token in VISION_MARKS if token in vocabulary}
    for name, value in vars(model.config).items():
        if name.startswith(("image", "video", "vision")) and name.endswith("_token_id") and isinstance(value, int):
            banned.add(value)
    return sorted(index for index in banned if index < size)
