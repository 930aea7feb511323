"""What differs between model families, in one table.

There is no class per family and no test of a path: the model type comes from the checkpoint's config, and everything
that a processor returns passes through unopened. docs/families.md names the source of each box space.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

DECODER_LAYERS = "model.language_model.layers"


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    box_space: str  # "pixels" of the resized image, or "thousand": 0..1000 on both axes
    vision: str  # name of the vision tower's module
    vision_blocks: str  # name of its blocks, which are sharded one by one
    frames: int = 1  # GLM's processor takes an image for a video of two frames and counts each pixel twice
    # The modules between tower and language model, as a regular expression; InternVL has them outside the tower.
    projector: str = r"model\.visual\.(merger|deepstack_merger_list\.\d+|downsample)"


# A new family is one row here and one case in tests/test_families.py.
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
    "gemma3": "image tokens see each other both ways and some layers see a window only, but a packed row is causal",
    "paligemma": "the prompt sees itself both ways, but a packed row is causal",
    "internvl_chat": "the checkpoint brings its own code; take the one converted for transformers, named ...-hf",
}


def family_of(model_type: str) -> Family:
    """The row of a model type; raises ValueError for one that is not supported."""
    if model_type in REFUSED:
        raise ValueError(f"model type {model_type!r} is not supported: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {model_type!r} is not supported: one of {', '.join(FAMILIES)} is expected; docs/families.md "
            "says what a new one needs"
        )
    return FAMILIES[model_type]


# ---- modules -------------------------------------------------------------------------------------------------------


def projector_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that carry the tower's output to the language model."""
    pattern = family_of(model.config.model_type).projector
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]


def vision_modules(model: PreTrainedModel) -> list[str]:
    """Names of the vision tower and of its projector."""
    return [family_of(model.config.model_type).vision, *projector_modules(model)]


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter or module of that name is one of these modules or inside one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


# ---- box spaces ----------------------------------------------------------------------------------------------------


def to_model_box(
    box: list[float],
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    family: str,
    box_space: str | None = None,
) -> list[float]:
    """A box [x1, y1, x2, y2] of the original image in the space that `family` answers in; sizes are (width, height).

    `box_space`, "pixels" or "thousand", overrides the family's own.
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
    """The inverse: a box that the model answered, in pixels of the original image."""
    width, height = _box_frame(input_size, family, box_space)
    x, y = image_size[0] / width, image_size[1] / height
    return [box[0] * x, box[1] * y, box[2] * x, box[3] * y]


def _box_frame(input_size: tuple[int, int], family: str, box_space: str | None) -> tuple[int, int]:
    """Width and height of the whole image in the space of the boxes."""
    frames = {"thousand": (1000, 1000), "pixels": input_size}
    space = box_space or family_of(family).box_space
    if space not in frames:
        raise ValueError(f"box_space {space!r} is unknown: one of {', '.join(frames)}")
    return frames[space]
