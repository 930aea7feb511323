"""The toy's model: a Qwen2.5-VL of 1.1 million parameters, its tokenizer and its processor."""

import re

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model.vlm import image_only
from toy import AT_ONCE, MAX_PIXELS, MIN_PIXELS
from toy.scenes import COLOURS, RELATIONS, SHAPES, SIDE, SIZES

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ANSWER_PARTS = ["<think>", "</think>", "<answer>", "</answer>", '{"bbox_2d": [', "]}", ", "]
# What a detection answer adds, each with the token of the toy whose part it plays there: its embedding starts as that.
# So a label followed by its box looks like a thought followed by its box, which the toy's start has learned to write.
DETECTION_PARTS = {
    "all of: ": "the",
    AT_ONCE: "\n",
    "None": "the",
    "```json\n[": "<answer>",
    "]\n```": "]}",
    '{"label": "': "the",
    '", ': "</think>",
    '"bbox_2d"': "<answer>",
    ": [": '{"bbox_2d": [',
}
WORDS = ["the", "user", "assistant", *SIZES, *COLOURS, *SHAPES, *" ".join(RELATIONS).split()]  # "of" is in it twice
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(*, detection: bool = False) -> PreTrainedTokenizerFast:
    """One token per word (with the space before it), per number up to 64, per tag, and per character of other text."""
    pieces = [*SPECIAL, "<unk>", *ANSWER_PARTS]
    for word in WORDS:
        pieces += [word, f" {word}"]
    pieces += [str(number) for number in range(SIDE + 1)]
    pieces += ["\n", *map(chr, range(32, 127))]  # all that is printable in ASCII
    parts = [*DETECTION_PARTS, *ANSWER_PARTS] if detection else ANSWER_PARTS
    pieces += parts
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))

    tags = "|".join(map(re.escape, parts))
    words = "|".join(dict.fromkeys(WORDS))
    numbers = "|".join(str(number) for number in range(SIDE + 1))
    # A word or a number counts only where it ends: "these" is not "the" and two letters, and 640 is not 64 and 0.
    pattern = rf"{tags}| ?(?:{words})(?![a-z])|(?:{numbers})(?![0-9])|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=[token for token in SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(*, detection: bool = False) -> Qwen2_5_VLProcessor:
    """Qwen's processor with patches of 8 x 8 pixels, of which 2 x 2 become one token: a scene takes 16."""
    images = Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=2, merge_size=2, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS
    )
    return image_only(Qwen2_5_VLProcessor)(images, build_tokenizer(detection=detection), chat_template=CHAT_TEMPLATE)


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, width: int = 128
) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained Qwen2.5-VL of 4 decoder layers and 2 vision blocks; of 1.1 million parameters at a width of 128.

    Heads are 32 wide in the decoder and 24 in the tower whatever the width, which must be a multiple of 32.
    """
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 4,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32,
            "max_position_embeddings": 4096,
            # Prompts are short: at a base of 10 a rotation takes 6 to 54 positions. A head of 32 has 16 rotations,
            # shared out to time, height and width.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 7, 7]},
            "initializer_range": 0.05,  # the usual 0.02 is for layers that are much wider
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": width * 3 // 4,
            "num_heads": width // 32,
            "intermediate_size": width * 3 // 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": SIDE,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0, 1],
            "initializer_range": 0.05,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def with_detection_tokens(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> Qwen2_5_VLForConditionalGeneration:
    """A grounding model that also has the tokens of DETECTION_PARTS; it is changed in place."""
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # Labels have no "the", so their first word lacks the space, a token that grounding has never used.
    alike = DETECTION_PARTS | {colour: f" {colour}" for colour in COLOURS}
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        for new, old in alike.items():
            weight[tokenizer.convert_tokens_to_ids(new)] = weight[tokenizer.convert_tokens_to_ids(old)]
    return model
