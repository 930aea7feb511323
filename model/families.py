"""What differs between model families, in one table, and the spaces that they write boxes in.

There is no class per family and no test of a path: the model type comes from the checkpoint's config, and everything
that a processor returns passes through unopened. docs/families.md names the source of each box space.

The file imports neither torch nor transformers, so a command can read it before it parses its options.
"""

from collections.abc import Sequence
from dataclasses import dataclass

DECODER_LAYERS = "model.language_model.layers"
MIN_PIXELS = 3136  # 4 image tokens of 28 x 28
MAX_PIXELS = 1_003_520  # 1,280 image tokens; the hub's configs allow 12.8 million pixels, which are 16,384 tokens


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    box_space: str  # "pixels" of the resized image, or "thousand": 0..1000 on both axes
    vision: str  # name of the vision tower's module
    vision_blocks: str  # name of its blocks, which are sharded one by one
    projector: str = ""  # name of the module that leads into the language model, if it is outside the tower
    frames: int = 1  # GLM's processor takes an image for a video of two frames and counts each pixel twice


# A new family is one row here and one case in tests/test_families.py.
FAMILIES = {
    "qwen2_vl": Family("thousand", "model.visual", "model.visual.blocks"),
    "qwen2_5_vl": Family("pixels", "model.visual", "model.visual.blocks"),
    "qwen3_vl": Family("thousand", "model.visual", "model.visual.blocks"),
    "qwen3_vl_moe": Family("thousand", "model.visual", "model.visual.blocks"),
    "qwen3_5": Family("thousand", "model.visual", "model.visual.blocks"),
    "qwen3_5_moe": Family("thousand", "model.visual", "model.visual.blocks"),
    "internvl": Family(
        "thousand", "model.vision_tower", "model.vision_tower.encoder.layer", "model.multi_modal_projector"
    ),
    "glm4v": Family("thousand", "model.visual", "model.visual.blocks", frames=2),
    "glm4v_moe": Family("thousand", "model.visual", "model.visual.blocks", frames=2),
    "glm46v": Family("thousand", "model.visual", "model.visual.blocks", frames=2),
}
REFUSED = {
    "gemma3": "image tokens see each other both ways and some layers see a window only, but a packed row is causal",
    "paligemma": "the prompt sees itself both ways, but a packed row is causal",
    "mistral3": "its processor pads the images of a prompt to one size, so pixels of several prompts cannot be joined",
    "ovis2": "each forward puts trained indicator tokens around the images, which image features alone do not hold",
    "smolvlm": "its processor needs torchvision and num2words, and prompts of different tile counts cannot be joined",
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


def counted_pixels(model_type: str, pixels: tuple[int, int]) -> tuple[int, int]:
    """The least and most pixels of an image as the family's processor counts them."""
    least, most = pixels
    frames = family_of(model_type).frames
    return least * frames, most * frames


# ---- boxes: [x1, y1, x2, y2]; sizes are (width, height) ------------------------------------------------------------


def to_model_box(
    box: Sequence[float],
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    family: str,
    box_space: str | None = None,
) -> list[float]:
    """A box of the original image in the space that `family` (a model type) answers in.

    `input_size` is the size of the image after the processor; `box_space`, "pixels" or "thousand", overrides the
    family's own space.
    """
    return _scaled(box, image_size, _box_frame(input_size, family, box_space))


def to_image_box(
    box: Sequence[float],
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    family: str,
    box_space: str | None = None,
) -> list[float]:
    """The inverse: a box that the model answered, in pixels of the original image."""
    return _scaled(box, _box_frame(input_size, family, box_space), image_size)


def _scaled(box: Sequence[float], before: tuple[int, int], after: tuple[int, int]) -> list[float]:
    """The box when an image of size `before` is resized to `after`."""
    x, y = after[0] / before[0], after[1] / before[1]
    return [box[0] * x, box[1] * y, box[2] * x, box[3] * y]


def _box_frame(input_size: tuple[int, int], family: str, box_space: str | None) -> tuple[int, int]:
    """The size of the whole image in the space of the boxes."""
    frames = {"thousand": (1000, 1000), "pixels": input_size}
    space = box_space or family_of(family).box_space
    if space not in frames:
        raise ValueError(f"box_space {space!r} is unknown: one of {', '.join(frames)}")
    return frames[space]
