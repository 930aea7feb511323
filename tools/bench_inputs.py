"""What the bench works on, written to disk: a Qwen2.5-VL or Qwen3.5 with random weights, and a workload's samples.

Time and memory do not depend on what a model has learned or on what an image shows.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model.vlm import image_only
from toy.model import CHAT_TEMPLATE, SPECIAL


class Workload(NamedTuple):
    """How much work there is. Each prompt has one square image and 17 words."""

    num_prompts: int  # B
    image_side: int  # image tokens of a side
    group_size: int  # G
    num_tokens: int  # C


WORKLOADS = {  # words and chat template add 24 tokens to the image's: P is 924, 924, 924, 313, 124, 424 and 40
    "image": Workload(1, 30, 8, 64),
    "image128": Workload(1, 30, 8, 128),
    "image256": Workload(1, 30, 8, 256),
    "long": Workload(1, 17, 8, 1024),
    "many": Workload(16, 10, 8, 64),
    "recipe": Workload(16, 20, 8, 256),  # a step of VLM-R1's recipe, on images of 560 x 560 pixels
    "tiny": Workload(2, 4, 3, 6),  # for the tests
}
SIZES = {  # width, MLP, layers, heads, key heads, vocabulary; width, MLP, layers and heads of the vision tower
    "tiny": ((64, 256, 2, 4, 2, 1024), (64, 256, 2, 4)),
    "small": ((256, 1024, 6, 8, 4, 8192), (128, 512, 4, 4)),
    "3b": ((2048, 11008, 36, 16, 2, 151_936), (1280, 3420, 32, 16)),  # Qwen2.5-VL-3B's own
}
HYBRID = "qwen3_5"  # a model of both attention and gated delta nets
MODELS = (*SIZES, HYBRID)  # that the bench can make


def build_config(size: str) -> PreTrainedConfig:
    """The config of a named size; the special tokens have the first ids."""
    return build_hybrid() if size == HYBRID else build_qwen2_5_vl(size)


def build_hybrid() -> Qwen3_5Config:
    """A Qwen3.5 as wide as "small": three of four layers are gated delta nets. Its patches are those of Qwen2.5-VL."""
    ids = {word: number for number, word in enumerate(SPECIAL)}
    return Qwen3_5Config(
        text_config={
            "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "linear_num_key_heads": 4,
            "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1],
                                "partial_rotary_factor": 0.25},
            "max_position_embeddings": 128_000, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "hidden_size": 128, "intermediate_size": 512, "depth": 4, "num_heads": 4, "out_hidden_size": 256,
            "patch_size": 14, "num_position_embeddings": 900,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip


def build_qwen2_5_vl(size: str) -> Qwen2_5_VLConfig:
    """The config of a Qwen2.5-VL of that size."""
    (width, mlp, layers, heads, key_heads, vocabulary), (vision_width, vision_mlp, depth, vision_heads) = SIZES[size]
    ids, head = {word: number for number, word in enumerate(SPECIAL)}, width // heads
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16]}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": key_heads, "rope_parameters": rope,
            "max_position_embeddings": 128_000, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "hidden_size": vision_width, "intermediate_size": vision_mlp, "depth": depth, "num_heads": vision_heads,
            "out_hidden_size": width, "fullatt_block_indexes": [*range(7, depth, 8)] or [depth - 1],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip


def build_processor(config: PreTrainedConfig) -> ProcessorMixin:
    """The family's processor with a tokenizer of the config's vocabulary: the special tokens and w0, w1, w2, ..."""
    vocabulary = config.text_config.vocab_size
    words = [*SPECIAL, "<unk>", *(f"w{number}" for number in range(vocabulary - len(SPECIAL) - 1))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>",
        additional_special_tokens=[word for word in SPECIAL if word not in ("<|im_end|>", "<|endoftext|>")],
    )  # fmt: skip
    family = image_only(PROCESSOR_MAPPING[type(config)])
    return family(Qwen2VLImageProcessorPil(patch_size=14), tokenizer, chat_template=CHAT_TEMPLATE)


def write_model(size: str, folder: Path, device: str) -> None:
    """Writes the model, in bf16 if it is made on a GPU, and its processor as a Hugging Face directory."""
    torch.manual_seed(0)
    config, dtype = build_config(size), torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):  # a CPU would take minutes to draw the weights of 3b
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.save_pretrained(folder)
    build_processor(config).save_pretrained(folder)


def write_data(workload: Workload, path: Path) -> None:
    """Writes a sample for each prompt: an image of noise, and the same words in an order of their own."""
    rng, side, image = np.random.default_rng(0), 28 * workload.image_side, path.with_suffix(".png")
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(image)
    words = [f"w{number}" for number in range(100, 117)]
    questions = [" ".join(rng.permutation(words)) for _ in range(workload.num_prompts)]
    lines = [json.dumps({"image": image.name, "problem": question, "solution": "w100"}) for question in questions]
    path.write_text("\n".join(lines))
