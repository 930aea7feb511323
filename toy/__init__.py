"""A small world and a small model that train in minutes on two CPU cores: the default of `python train.py`.

Scenes of coloured shapes on a noisy ground (`scenes.py`), questions that mean exactly one of them, boxes as the truth.
Everything is the real thing, only small (`model.py`): the class Qwen2_5_VLForConditionalGeneration, its image
processor, a chat template, a tokenizer, images and JSONL on disk in VLM-R1's format. So the toy takes every path that a
3B model takes.

`weights/` holds the start. SFT on carelessly wide boxes (every side pushed out by 5 to 45%) taught it to answer in
format and to find the object, but not its edges. Imitating wide boxes cannot tighten them; a reward computed from the
true box can.
"""

from pathlib import Path

RESPONSE = "<think>{question}</think><answer>{answer}</answer>"
HOME = Path(__file__).parent
DATA = HOME / "data"
MODEL = HOME / "weights"

# What the entry points take for defaults when no --model is given; their own are VLM-R1's recipe for real models.
_HELD_OUT = [
    str(DATA / f"{name}.jsonl") for name in ("test", "pairs", "relations")
]  # the first picks the best checkpoint
_SHARED = {"template": "plain", "max_completion_tokens": 24, "min_pixels": 16 * 16, "max_pixels": 256 * 256}
_TRAINING = {**_SHARED, "data": [str(DATA / "train.jsonl")], "image_root": [str(DATA)], "eval_data": _HELD_OUT,
             "eval_image_root": [str(DATA)], "row_tokens": "400", "eval_batch_size": 64}  # fmt: skip
PRESETS = {
    "train": {**_TRAINING, "steps": 300, "learning_rate": 3e-4, "beta": 0.0, "eval_every": 100},
    "sft": {**_TRAINING, "steps": 300, "learning_rate": 3e-4, "response": RESPONSE},
    "eval": {**_SHARED, "data": _HELD_OUT[:1], "image_root": [str(DATA)], "batch_size": 64},
}
