"""Ours beside plain Hugging Face and TRL on the same work: time, memory, and how near the machine's limit it comes.

`python bench.py` prints one table, on the CPU or on a GPU. Every cell runs in a fresh process, so that its peak is its
own; the ways of a row take turns, and the table shows medians with their spread, since absolute seconds on a shared
machine are noise; a cell of over 10 seconds is measured once. On the CPU seconds are the CPU time of one thread, which
neighbours disturb least; on a GPU wall time. Named models are built from a config with random weights: what is compared
does not depend on what a model has learned. No way ever draws an end token, so that all draw the same number.

On a GPU `draw` and `learn` use the plain bf16 model in one process, without FSDP; `step` is what train.py does, fp32
masters sharded by FSDP2 and bf16 computing, beside TRL's autocast. Repeated rows are learned from a group at a time,
ours in rows of train.py's `row_tokens`. Rewards cost nothing here; `rewards` measures them.
Left out: several processes, other trainers, the KL penalty's reference.
"""

import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from operator import mul
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    TrainerCallback,
)
from transformers.hf_argparser import HfArg
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging

import toy
import toy.model
from data import Sample
from infra.memory import RowBudget
from infra.parallel import process_group, shard_model
from infra.prompts import PromptFeed
from infra.run import make_optimizers
from model.attention import use_shared_prefix
from model.logprobs import linear_logprobs
from model.vlm import (
    DECODER_LAYERS,
    MAX_PIXELS,
    Prompt,
    banned_token_ids,
    blank_prompt,
    build_prompt,
    checkpoint_activations,
    eos_token_ids,
    family_of,
    image_only,
    load_model,
)
from rewards import REWARDS
from rollout import PackedRow, completion_logprobs, pack_row, plan_rows, root_forward, row_logprobs, sample_completions
from train import Config as TrainConfig
from train import train_step

ROWS = {
    "draw": ("ours", "generate on repeated prompts", "generate with num_return_sequences"),
    "learn": ("ours", "ours, dense mask", "repeated rows", "ours, checkpointed", "repeated rows, vision once",
              "repeated rows, checkpointed"),
    "step": ("ours", "TRL", "ours, checkpointed", "TRL, checkpointed"),
    "head": ("ours", "log_softmax of all logits"),
    "rewards": ("ours",),
}  # fmt: skip
FIRST_ONLY = (*ROWS["step"][1:], *ROWS["learn"][3:])  # ways measured on the first workload alone, like all of `step`
LATE = "the time was over"
SLOW = 10  # seconds; a cell that took longer is measured once
# hidden, intermediate, layers, heads, key heads, vocabulary; the same of the vision tower, its blocks for layers
SIZES = {
    "tiny": ((64, 256, 2, 4, 2, 1024), (64, 256, 2, 4)),
    "small": ((256, 1024, 6, 8, 4, 8192), (128, 512, 4, 4)),
    "3b": ((2048, 11008, 36, 16, 2, 151_936), (1280, 3420, 32, 16)),  # Qwen2.5-VL-3B's own
}


@dataclass(frozen=True)
class Workload:
    prompts: int  # B
    side: int  # image tokens a side
    group_size: int  # G
    completion_tokens: int  # C

    @property
    def tokens(self) -> int:
        return self.prompts * self.group_size * self.completion_tokens


WORKLOADS = {  # 24 more tokens, of words and the chat template, make P 924, 924, 313 and 124 in a named model
    "image": Workload(1, 30, 8, 64),
    "image128": Workload(1, 30, 8, 128),
    "long": Workload(1, 17, 8, 1024),
    "many": Workload(16, 10, 8, 64),
    "tiny": Workload(2, 4, 3, 6),  # to see that everything runs
}


@dataclass(frozen=True)
class Config:
    model: str = HfArg(default="", help="HF directory or hub name; tiny, small or 3b with random weights; "
                                        "3b on a GPU and small on the CPU by default")  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = HfArg(default="auto", help="auto is a GPU where there is one")
    rows: list[str] = HfArg(default_factory=lambda: list(ROWS), help=f"of {', '.join(ROWS)}")
    workloads: list[str] = HfArg(default_factory=lambda: ["image", "long", "many"], help=f"of {', '.join(WORKLOADS)}")
    repeats: int = HfArg(default=3, help="fresh processes per cell")
    minutes: float = HfArg(default=0.0, help="start no cell after these; 0 for 8 on a GPU and 12 on the CPU")
    cell: str = HfArg(default="", help="measure this 'row/workload/way' in this very process and print what came out")

    def __post_init__(self) -> None:
        for given, known in ((self.rows, ROWS), (self.workloads, WORKLOADS)):
            if unknown := set(given) - set(known):
                raise ValueError(f"{', '.join(unknown)}: unknown; choose among {', '.join(known)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda and torch finds none: leave --device out")
        if self.repeats < 1 or self.minutes < 0:
            raise ValueError(f"repeats {self.repeats} and minutes {self.minutes}: at least 1 and 0 are expected")

    @property
    def model_name(self) -> str:
        return self.model or ("3b" if self.cuda else "small")

    @property
    def cuda(self) -> bool:
        return self.device != "cpu" and torch.cuda.is_available()

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda" if self.cuda else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32


# ---- model and prompts ---------------------------------------------------------------------------------------------


def build_processor(vocabulary: int) -> ProcessorMixin:
    """Qwen's processor with its own patches; every id of the vocabulary is a word."""
    words = [*toy.model.SPECIAL, "<unk>"]
    words += [f"w{number}" for number in range(vocabulary - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>",
        additional_special_tokens=[w for w in toy.model.SPECIAL if w not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="left", chat_template=toy.model.CHAT_TEMPLATE,
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(max_pixels=MAX_PIXELS)
    return image_only(Qwen2_5_VLProcessor)(images, tokenizer, chat_template=toy.model.CHAT_TEMPLATE)


def build_config(size: str) -> Qwen2_5_VLConfig:
    """The config of a named size, with the ids of `build_processor`."""
    (hidden, intermediate, layers, heads, key_heads, vocabulary), vision = SIZES[size]
    ids, head = {word: number for number, word in enumerate(toy.model.SPECIAL)}, hidden // heads
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16]}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
            "rope_parameters": rope, "max_position_embeddings": 128_000, "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "hidden_size": vision[0], "intermediate_size": vision[1], "depth": vision[2], "num_heads": vision[3],
            "out_hidden_size": hidden, "fullatt_block_indexes": [*range(7, vision[2], 8)] or [vision[2] - 1],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip


def build_model(config: Config, dtype: torch.dtype) -> tuple[nn.Module, ProcessorMixin]:
    """The model on its device, as vlm.load_model leaves it, and its processor."""
    name = config.model_name
    if name not in SIZES:
        model, processor = load_model(name, dtype=dtype)
        return model.to(config.torch_device), processor
    torch.manual_seed(0)
    with config.torch_device:  # built where it stays: 3b would take minutes on the CPU
        model = AutoModelForImageTextToText.from_config(build_config(name), dtype=dtype, attn_implementation="sdpa")
    use_shared_prefix(model)
    model.generation_config.eos_token_id = model.config.get_text_config().eos_token_id
    return model.eval(), build_processor(SIZES[name][0][-1])


def build_samples(workload: Workload, folder: Path) -> list[Sample]:
    """One per prompt of the workload: an image of noise, and the same words in an order of its own, so one length."""
    rng, size = np.random.default_rng(0), 28 * workload.side
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / "noise.png")
    words = [f"w{number}" for number in range(100, 117)]
    questions = [" ".join(rng.permutation(words)) for _ in range(workload.prompts)]
    image = (str(folder / "noise.png"),)
    return [Sample("bench", text, "[2, 2, 20, 20]", image, "", True, "bench") for text in questions]


@dataclass(frozen=True)
class Work:
    model: nn.Module
    prompts: list[Prompt]
    workload: Workload
    never: list[int]  # ids that are not drawn: end tokens, vision tokens, unused rows of the head


def build_work(config: Config, workload: Workload, folder: Path) -> Work:
    model, processor = build_model(config, config.dtype)
    prompts = [build_prompt(processor, sample, template="plain") for sample in build_samples(workload, folder)]
    return Work(model, prompts, workload, never_drawn(model, processor))


def never_drawn(model: nn.Module, processor: ProcessorMixin) -> list[int]:
    return sorted({*banned_token_ids(model, processor), *eos_token_ids(model, processor)})


def repeated(prompt: Prompt, times: int, device: torch.device) -> dict[str, Tensor]:
    """The prompt as a batch of so many copies, image included."""
    return {key: value.to(device).repeat(times, *[1] * (value.ndim - 1)) for key, value in prompt.items()}


def plain_attention(model: nn.Module) -> None:
    """Makes text attention transformers' own; ours then reads the dense mask."""
    model.config.get_text_config()._attn_implementation = "sdpa"


# ---- rows of the table ---------------------------------------------------------------------------------------------


def draw(way: str, work: Work) -> None:
    """Groups of completions of exactly completion_tokens each."""
    group, length = work.workload.group_size, work.workload.completion_tokens
    if way == "ours":
        sample_completions(work.model, work.prompts, group, max_new_tokens=length, eos_ids=[], banned_ids=work.never)
        return
    plain_attention(work.model)
    options = {"max_new_tokens": length, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
               "repetition_penalty": 1.0, "suppress_tokens": work.never}  # fmt: skip
    times = group if way == "generate on repeated prompts" else 1
    rows = [repeated(prompt, times, work.model.device) for prompt in work.prompts]  # all of one length: no padding
    batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    drawn = work.model.generate(**batch, num_return_sequences=group // times, **options)
    assert drawn.shape == (group * len(rows), batch["input_ids"].shape[1] + length)


def learn(way: str, work: Work) -> None:
    """Log-probs of the groups and their gradient in every parameter."""
    model, workload = work.model, work.workload
    shape = (workload.prompts, workload.group_size, workload.completion_tokens)
    answers = torch.randint(100, min(50_000, model.config.get_text_config().vocab_size), shape, device=model.device)
    weights = torch.randn(*shape[:2], 1, device=model.device)
    if "ours" not in way or "dense" in way:
        plain_attention(model)
    if "checkpointed" in way and not model.training:
        checkpoint_activations(model.train())
    if "ours" not in way:
        for prompt, group, weight in zip(work.prompts, answers, weights, strict=True):
            (repeated_logprobs(model, prompt, group, vision_once="once" in way) * weight).sum().backward()
        return
    lengths = [prompt["input_ids"].shape[1] for prompt in work.prompts]
    for row in plan_rows(lengths, [[shape[2]] * shape[1]] * shape[0], row_tokens()):
        chosen = [[answers[number, index] for index in indices] for number, indices in row]
        logprobs = completion_logprobs(model, [work.prompts[number] for number, _ in row], chosen)
        loss = [(part * weights[number, indices]).sum() for part, (number, indices) in zip(logprobs, row, strict=True)]
        torch.stack(loss).sum().backward()


def row_tokens() -> int:
    """train.py's default."""
    return int(TrainConfig.__dataclass_fields__["row_tokens"].default)


def repeated_logprobs(model: nn.Module, prompt: Prompt, answers: Tensor, *, vision_once: bool) -> Tensor:
    """Log-probs [G, C] of answers as most trainers compute them: the prompt once per answer, all logits kept."""
    batch = repeated(prompt, len(answers), model.device)
    batch |= {"input_ids": torch.cat([batch["input_ids"], answers], 1)}
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"])}
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(answers)], 1)
    if vision_once:
        if "mm_encoder_outputs" not in signature(model.model.forward).parameters:  # it would be ignored in silence
            raise ValueError(f"transformers {transformers.__version__} takes no mm_encoder_outputs; 5.23 does")
        del batch["pixel_values"]
        features = model.model.get_image_features(
            prompt["pixel_values"].to(model.device), prompt["image_grid_thw"].to(model.device)
        )
        features.pooler_output = tuple(features.pooler_output) * len(answers)
        batch["mm_encoder_outputs"] = {"image": features}
    logits = model(**batch, logits_to_keep=answers.shape[1] + 1).logits
    return logits[:, :-1].log_softmax(-1, dtype=torch.float32).gather(2, answers[..., None])[..., 0]


HEAD = {"cpu": (2000, 1024, 151_936), "cuda": (8192, 2048, 151_936)}  # tokens, hidden, Qwen's vocabulary
SCORED = 128  # completions


def head_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight and the tokens."""
    tokens, hidden, vocabulary = HEAD[device.type]
    options = {"device": device, "dtype": torch.bfloat16 if device.type == "cuda" else None, "requires_grad": True}
    states, weight = torch.randn(tokens, hidden, **options), torch.randn(vocabulary, hidden, **options)
    return states, weight, torch.randint(vocabulary, (tokens,), device=device)


def head(way: str, states: Tensor, weight: Tensor, ids: Tensor) -> None:
    """Log-probs of tokens from hidden states, and their gradients."""
    if way == "ours":
        logprobs, _ = linear_logprobs(states, weight, ids)
    else:
        logprobs = (states @ weight.t()).log_softmax(-1, dtype=torch.float32).gather(1, ids[:, None])[:, 0]
    logprobs.sum().backward()


def rewards() -> None:
    """Completions with 20 boxes of 4 classes each, scored by od_length."""
    boxes = [[10 * n, 5 * n, 10 * n + 40, 5 * n + 30] for n in range(20)]
    true = [{"bbox_2d": box, "label": f"class {n % 4}"} for n, box in enumerate(boxes)]
    said = [
        {"bbox_2d": [x1 + n % 7, y1, x2, y2 - n % 5], "label": f"class {n % 4}"}
        for n, (x1, y1, x2, y2) in enumerate(boxes)
    ]
    completion, answer = (f"<answer>```json\n{json.dumps(items)}\n```</answer>" for items in (said, true))
    for _ in range(SCORED):
        REWARDS["od_length"](completion, answer)


class Meter:
    """Seconds between start and stop, and the growth of the peak since ready, in MB."""

    def __init__(self, config: Config):
        self.cuda, self.before = config.cuda, 0.0
        if self.cuda:
            torch.cuda.init()

    def ready(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() / 1e6 if self.cuda else self._peak()

    def start(self) -> None:
        self.begin = self._now()

    def stop(self) -> None:
        self.seconds, self.megabytes = self._now() - self.begin, self._peak() - self.before

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if self.cuda else time.process_time()

    def _peak(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def any_reward(completion: str, answer: str) -> float:
    """A number that differs within a group: one of equal rewards would be left out of learning."""
    return zlib.crc32(completion.encode()) / 2**32


def step_ours(config: Config, workload: Workload, folder: Path, meter: Meter, *, checkpointed: bool) -> None:
    """The second of two steps of train.py, in which it prepares the third's prompts."""
    options = TrainConfig(
        data=["bench"], template="plain", beta=0.0, gradient_checkpointing=checkpointed,
        prompts_per_step=workload.prompts, group_size=workload.group_size,
        max_completion_tokens=workload.completion_tokens, rewards=[f"{__file__}:any_reward"],
    )  # fmt: skip
    with process_group(bf16=config.cuda) as world:
        model, processor = build_model(config, torch.float32)
        if checkpointed:
            checkpoint_activations(model)
        policy = shard_model(model, world, compute_dtype=config.dtype)
        ids = {"eos_ids": eos_token_ids(model, processor), "banned_ids": never_drawn(model, processor)}
        feed = PromptFeed(build_samples(workload, folder), processor, options, world, folder / "bad.jsonl", steps=3)
        budget = RowBudget(row_tokens(), may_shrink=False)
        state = (make_optimizers(policy, options), feed, blank_prompt(processor), budget, options, world, ids)
        meter.ready()
        train_step(0, policy, None, processor, *state)
        meter.start()
        figures, _ = train_step(1, policy, None, processor, *state)
        meter.stop()
        assert figures["completion_tokens"] == workload.completion_tokens and not figures["skipped_updates"]


def step_trl(config: Config, workload: Workload, folder: Path, meter: Meter, *, checkpointed: bool) -> None:
    """The second of two steps of TRL's trainer, a group per micro-batch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 1:
                meter.start()

        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                meter.stop()

    model, processor = build_model(config, torch.float32)
    plain_attention(model)
    records = [
        {"prompt": [{"role": "user", "content": sample.question}], "images": [Image.open(sample.images[0])]}
        for sample in build_samples(workload, folder)
    ]
    options = GRPOConfig(
        output_dir=str(folder), use_cpu=not config.cuda, bf16=config.cuda, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, max_steps=2, learning_rate=1e-6, lr_scheduler_type="constant",
        optim="adamw_torch", weight_decay=0.0, beta=0.0, loss_type="grpo", temperature=1.0, top_k=0,
        per_device_train_batch_size=workload.group_size, gradient_accumulation_steps=workload.prompts,
        num_generations=workload.group_size, max_completion_length=workload.completion_tokens,
        gradient_checkpointing=checkpointed, generation_kwargs={"suppress_tokens": never_drawn(model, processor)},
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, processing_class=processor, args=options, train_dataset=Dataset.from_list(records),
        reward_funcs=lambda completions, **_: [float(number) for number in range(len(completions))],
        callbacks=[Watch()],
    )  # fmt: skip
    meter.ready()
    trainer.train()


# ---- limits of the machine -----------------------------------------------------------------------------------------


def causal_pairs(prompt: int, group_size: int, completion: int) -> int:
    """(query, key) pairs of a group in a packed row."""
    return prompt * (prompt + 1) // 2 + group_size * (completion * prompt + completion * (completion + 1) // 2)


def matrix_size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def learn_flops(model: nn.Module, prompts: Sequence[Prompt], workload: Workload) -> float:
    """What learning needs, forward and twice that backward, whatever a way repeats or recomputes.

    Counted: each weight matrix times the tokens it sees, at 6 a weight and token (the head sees completions only, the
    vision tower's merger image tokens, its blocks patches), and attention's two products over visible pairs.
    """
    text, vision = model.config.get_text_config(), model.config.vision_config
    visual = model.get_submodule(family_of(model.config.model_type).vision)
    lengths, patches = [p["input_ids"].shape[1] for p in prompts], [len(p["pixel_values"]) for p in prompts]
    dense = matrix_size(model.get_submodule(DECODER_LAYERS)) * (sum(lengths) + workload.tokens)
    dense += model.get_output_embeddings().weight.numel() * workload.tokens
    dense += (matrix_size(visual.blocks) + matrix_size(visual.patch_embed)) * sum(patches)
    dense += matrix_size(visual.merger) * sum(patches) // vision.spatial_merge_size**2
    pairs = sum(causal_pairs(length, workload.group_size, workload.completion_tokens) for length in lengths)
    attention = pairs * text.num_hidden_layers * text.hidden_size
    full, window = len(vision.fullatt_block_indexes), (vision.window_size // vision.patch_size) ** 2
    keys = [full * count + (vision.depth - full) * min(window, count) for count in patches]  # of a patch in all blocks
    attention += sum(map(mul, patches, keys)) * vision.hidden_size
    return 6 * dense + 12 * attention


def draw_bytes(model: nn.Module, prompts: Sequence[Prompt], workload: Workload) -> float:
    """What decoding has to read: per token of all sequences every weight once, each prompt's keys and values once, and
    those of the sequences' own tokens so far."""
    text, steps = model.config.get_text_config(), workload.completion_tokens
    weights = matrix_size(model.get_submodule(DECODER_LAYERS)) + model.get_output_embeddings().weight.numel()
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    prompt_tokens = sum(prompt["input_ids"].shape[1] for prompt in prompts)
    own = workload.prompts * workload.group_size * steps * (steps + 1) // 2
    return next(model.parameters()).element_size() * (steps * (weights + prompt_tokens * token) + own * token)


def rates(config: Config) -> dict[str, float]:
    """FLOP/s of an 8192^3 product in bf16, and bytes/s read and written by a copy."""
    meter, found = Meter(config), {}
    a, b, c = torch.randn(3, 8192, 8192, device=config.torch_device, dtype=torch.bfloat16)
    buffers = torch.empty(2, 2**31, dtype=torch.uint8, device=config.torch_device)
    for name, function, amount in (
        ("flops", lambda: torch.mm(a, b, out=c), 2 * 8192**3),
        ("bytes", lambda: buffers[1].copy_(buffers[0]), buffers.numel()),
    ):
        function()
        meter.start()
        for _ in range(50):
            function()
        meter.stop()
        found[name] = 50 * amount / meter.seconds
    return found


# ---- answers -------------------------------------------------------------------------------------------------------


def sdpa_kernels(config: Config, work: Work) -> dict[str, str]:
    """Which kernels take the dense mask of a row as full as train.py's, forward and backward, and what they need."""
    text = work.model.config.get_text_config()
    row = packed_row(work, max(1, row_tokens() // 1500) if config.cuda else 1)
    mask = row.layout.mask
    shape = (1, text.num_attention_heads, mask.shape[-1], text.hidden_size // text.num_attention_heads)
    states = [torch.randn(shape, device=mask.device, dtype=config.dtype, requires_grad=True) for _ in range(3)]
    taken, found = SDPBackend(torch._fused_sdp_choice(*states, mask)).name, []
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        meter = Meter(config)
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                meter.ready()
                for _ in range(2):
                    meter.start()
                    F.scaled_dot_product_attention(*states, mask).sum().backward()
                    meter.stop()
            found.append(f"{name} {1e3 * meter.seconds:.1f} ms and {meter.megabytes:,.0f} MB")
        except RuntimeError as error:  # the answer: this kernel does not
            found.append(f"{name} {'out of memory' if isinstance(error, torch.OutOfMemoryError) else 'refuses'}")
    return {"text": f"{taken} on {shape}; forward and backward of a layer: {', '.join(found)}"}


def packed_row(work: Work, groups: int = 1) -> PackedRow:
    """So many copies of the first prompt's group."""
    answers = torch.full((work.workload.group_size, work.workload.completion_tokens), 100)
    return pack_row(work.model, work.prompts[:1] * groups, [list(answers)] * groups)


def flex_attention(config: Config, work: Work) -> dict[str, str]:
    """Seconds of a row in a sharded, checkpointed model with FlexAttention, which transformers compiles."""
    row, seconds, meter = packed_row(work), [], Meter(config)
    mask, size = row.layout.mask[0, 0], row.layout.mask.shape[-1]
    blocks = create_block_mask(lambda _, __, q, k: mask[q, k], None, None, size, size, device=str(mask.device))
    work.model.config.get_text_config()._attn_implementation = "flex_attention"
    checkpoint_activations(work.model.train())
    with process_group(bf16=True) as world:
        policy = shard_model(work.model, world, compute_dtype=torch.bfloat16)
        for _ in range(2):
            meter.start()
            inputs = {**row.inputs, "attention_mask": blocks}
            logprobs, _ = root_forward(policy, row_logprobs)(inputs, row.predictors, row.targets)
            logprobs.sum().backward()
            meter.stop()
            seconds.append(meter.seconds)
    return {"text": f"yes: {seconds[0]:.1f} s at first, then {seconds[1]:.3f} s, {size} tokens through model small"}


def draw_gap(config: Config, work: Work) -> dict[str, str]:
    """|log-prob while drawing - while learning| over all tokens of the workload."""
    group, length = work.workload.group_size, work.workload.completion_tokens
    options = {"max_new_tokens": length, "eos_ids": [], "banned_ids": work.never, "return_logprobs": True}
    gaps = []
    for prompt, ids, before in zip(
        work.prompts, *sample_completions(work.model, work.prompts, group, **options), strict=True
    ):
        with torch.no_grad():
            [after] = completion_logprobs(work.model, [prompt], [ids], banned_ids=work.never)
        gaps.append((torch.stack(before) - after).abs())
    gaps = torch.stack(gaps)
    return {"text": f"mean {gaps.mean():.2g}, largest {gaps.max():.2g}, {gaps.numel():,} tokens in {config.dtype}"}


# ---- cells ---------------------------------------------------------------------------------------------------------

ANSWERS = {
    "sdpa": ("sdpa with the dense mask takes", sdpa_kernels),
    "flex": ("FlexAttention compiles under FSDP2 and gradient checkpointing", flex_attention),
    "gap": ("|draw - train| of log-probs, plain model", draw_gap),
}


def measure(config: Config) -> dict:
    """What came out of config.cell in this process."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    row, name, way = config.cell.split("/")
    if row == "rates":
        return rates(config)
    workload, meter, work = WORKLOADS.get(name), Meter(config), None
    config = replace(config, model="small") if way == "flex" else config
    with tempfile.TemporaryDirectory() as folder:
        if row == "step":
            function = step_ours if way.startswith("ours") else step_trl
            function(config, workload, Path(folder), meter, checkpointed="checkpointed" in way)
            return {"seconds": meter.seconds, "megabytes": meter.megabytes, "count": workload.tokens}
        if row not in ("head", "rewards"):
            work = build_work(config, workload, Path(folder))
    if row == "answers":
        return ANSWERS[way][1](config, work)

    inputs = head_inputs(config.torch_device) if row == "head" else ()  # no part of the growth, like any model

    def run(workload: Workload | None) -> None:
        if row == "head":
            head(way, *inputs)
        elif row == "rewards":
            rewards()
        else:
            {"draw": draw, "learn": learn}[row](way, replace(work, workload=workload))

    meter.ready()
    short = workload and replace(workload, completion_tokens=2)
    if config.cuda:
        run(workload if row == "learn" else short)  # in full: the first pass of a size waits for its memory
    elif row != "head":  # half a minute of plain products
        run(short)
    meter.start()
    run(workload)
    meter.stop()
    result = {"seconds": meter.seconds, "megabytes": meter.megabytes}
    if work is None:
        return {**result, "count": SCORED if row == "rewards" else HEAD[config.torch_device.type][0]}
    result["count"] = workload.tokens
    if work.model.config.model_type == "qwen2_5_vl":  # what another family needs is not counted
        result["need"] = {"draw": draw_bytes, "learn": learn_flops}[row](work.model, work.prompts, workload)
    return result


def report(config: Config, pipe) -> None:
    """Sends what came out, or the error's type and first line."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # TRL prints
    try:
        pipe.send(measure(config))
    except Exception as error:  # an empty cell, with its reason under the table
        pipe.send({"error": f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"})


def run_cell(config: Config, cell: str, seconds: float) -> dict:
    """The same in a fresh process, which is killed after so many seconds."""
    # A server that has imported everything forks the processes; on a GPU each starts anew, since CUDA cannot be forked.
    context = multiprocessing.get_context("spawn" if config.cuda else "forkserver")
    context.set_forkserver_preload(["bench"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(replace(config, cell=cell), sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else {"error": f"killed after {seconds:.0f} s: {LATE}"}
    except EOFError:
        return {"error": "the process died, for want of memory perhaps"}
    finally:
        process.kill()
        process.join()


def plan_cells(config: Config) -> list[str]:
    """row/workload/way of the table's lines, in their order."""
    cells = []
    for row in config.rows:
        names = ["-"] if row in ("head", "rewards") else config.workloads[:1] if row == "step" else config.workloads
        ways = [(name, way) for name in names for way in ROWS[row] if name == names[0] or way not in FIRST_ONLY]
        cells += [f"{row}/{name}/{way}" for name, way in ways]
    return cells


def place(cell: str) -> int:
    """Of the cell's way among those of its row: all first ways are measured first, so a budget cuts the others'."""
    row, _, way = cell.split("/")
    return ROWS[row].index(way)


def main(config: Config) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if not config.cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if config.cell:
        print(json.dumps(measure(config), indent=1))
        return
    minutes = config.minutes or (8 if config.cuda else 12)
    deadline = time.monotonic() + 60 * minutes

    def start(cell: str) -> dict:
        left = deadline - time.monotonic()
        return run_cell(config, cell, min(left, 600)) if left > 0 else {"error": LATE}

    rates = start("rates/-/-") if config.cuda else {}
    names = [name for name in ANSWERS if config.cuda or name != "flex"]
    answers = {ANSWERS[name][0]: start(f"answers/{config.workloads[0]}/{name}") for name in names}
    cells, results = plan_cells(config), {}
    for cell in tqdm(sorted(cells, key=place) * config.repeats):
        runs = results.setdefault(cell, [])
        if not runs or ("error" not in runs[0] and runs[0]["seconds"] < SLOW):
            result = start(cell)
            if not runs or "error" not in result:  # a repeat that had no time left is no error
                runs.append(result)
    medians = {cell: median(results[cell]) for cell in cells}
    print("\n".join([*headline(config, rates, answers, medians), "", *table(medians, results, rates)]))
    reasons = defaultdict(list)
    for cell in cells:
        if not medians[cell]:
            reasons[results[cell][0]["error"]].append(cell)
    for reason, empty in reasons.items():
        print(f"- empty: {'; '.join(empty)}: {reason}")
    if any(place(cell) == 0 for reason, empty in reasons.items() if not reason.endswith(LATE) for cell in empty):
        raise SystemExit("ours failed, see above")


def median(runs: list[dict]) -> dict:
    """The middle of each number over the runs; nothing of an empty cell."""
    return {} if "error" in runs[0] else {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def share(cell: str, found: dict, rates: dict) -> str:
    """What the work needs at least, over what the machine could have done in the cell's time."""
    if "need" not in found or "flops" not in rates:
        return ""
    kind, name = ("bytes", "of bandwidth") if cell.startswith("draw") else ("flops", "MFU")
    return f"{found['need'] / found['seconds'] / rates[kind]:.1%} {name}"


def headline(config: Config, rates: dict, answers: dict, medians: dict) -> list[str]:
    """The run in a few lines, and the questions that come before the table."""
    device = torch.cuda.get_device_name() if config.cuda else "one CPU thread"
    clock = "wall" if config.cuda else "the process's CPU"
    lines = [
        f"{time.strftime('%B %Y')}; {device}; torch {torch.__version__}, transformers {transformers.__version__}; "
        f"model {config.model_name}, {config.dtype}; {clock} seconds, medians of at most {config.repeats} processes."
    ]
    for name in config.workloads:
        w = WORKLOADS[name]
        sizes = f"{w.prompts} prompt(s) of {w.side}x{w.side} image tokens and 17 words"
        lines.append(f"`{name}`: {sizes}, G {w.group_size}, C {w.completion_tokens}.")
    if "flops" in rates:
        lines.append(f"- measured limits: {rates['flops'] / 1e12:,.0f} TFLOP/s, {rates['bytes'] / 1e9:,.0f} GB/s")
    lines += [f"- {question}: {found.get('text') or found['error']}" for question, found in answers.items()]
    for cell, found in medians.items():
        if found and place(cell) == 0 and cell.startswith(("draw", "learn")):
            rows = (w := WORKLOADS[cell.split("/")[1]]).prompts * w.group_size
            speed = f"{found['count'] / found['seconds']:,.0f} tokens/s with {rows} rows"
            lines.append(f"- {cell}: {speed} {share(cell, found, rates)}".rstrip())
    return lines


def table(medians: dict, results: dict, rates: dict) -> list[str]:
    """Markdown, a line per cell."""
    columns = ("row", "workload", "way", "seconds (spread)", "times ours", "peak growth MB", "times ours", "per second")
    lines = [f"| {' | '.join(columns)} | of the limit |", "|---" * (len(columns) + 1) + "|"]
    for cell, found in medians.items():
        row, name, way = cell.split("/")
        if not found:
            lines.append(f"| {row} | {name} | {way} | | | | | | |")
            continue
        seconds, ours = sorted(run["seconds"] for run in results[cell]), medians[f"{row}/{name}/ours"]
        spread = f"{seconds[0]:.3f} to {seconds[-1]:.3f}" if len(seconds) > 1 else "once"
        ratios = [f"{found[key] / ours[key]:.1f}" if ours.get(key) else "" for key in ("seconds", "megabytes")]
        lines.append(
            f"| {row} | {name} | {way} | {found['seconds']:.3f} ({spread}) | {ratios[0]} | {found['megabytes']:,.0f} "
            f"| {ratios[1]} | {found['count'] / found['seconds']:,.0f} | {share(cell, found, rates)} |"
        )
    return lines


if __name__ == "__main__":
    main(HfArgumentParser(Config, allow_abbrev=False).parse_args_into_dataclasses(look_for_args_file=False)[0])
