"""The two halves of a step that run the model: `sample_completions` draws, `completion_logprobs` scores.

Both read each prompt once. Scoring lays a group out in one packed row (model/packing.py). Drawing runs the same row
without completions (`prefill`), keeps the keys and values of each prompt once, and decodes all completions together
(`decode`), dropping sequences as they finish.

Sampling is written by hand instead of `generate`: a checkpoint's generation_config (top_k, repetition penalty, a
near-greedy temperature) would leak into it, and log-probs must belong to the distribution that was drawn from.
Left out: beams, stop strings, continuous batching.

Shapes: B prompts, G completions per prompt, P prompt tokens, C completion tokens, T completion tokens of a packed row,
R sequences being decoded, V vocabulary, A position axes (3 in Qwen's and GLM's rotary embedding, 1 elsewhere).
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from model.attention import RowLayout, attend_row, no_mask, shared_prefix
from model.cache import GroupCache
from model.graphs import GraphedStep
from model.linear_attention import LinearStates, state_layout
from model.logprobs import linear_logits, linear_logprobs
from model.packing import (
    IMAGE_FEATURES,
    TOKEN_KEYS,
    model_positions,
    pack_row,
    require_mask_support,
    row_attention,
)
from model.sampling import pick_tokens

PREFILL_TOKENS = 4096  # tokens of a row in prefill; bounds its activations


# ---- the three ways through the model ------------------------------------------------------------------------------


def decoding_forward(model: nn.Module) -> Callable:
    """The function that gives a decoding step's logits; it leaves out FSDP's root if nothing is sharded.

    The root's hooks make other streams wait, which a CUDA graph cannot record.
    """
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return partial(root_forward, model, next_logits) if sharded else partial(next_logits, model)


def row_logprobs(
    model: nn.Module, inputs: dict, predictors: Tensor, targets: Tensor, **options
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [T] of a packed row's completion tokens."""
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[0]
    return linear_logprobs(hidden[predictors], model.get_output_embeddings().weight, targets, **options)


def next_logits(model: nn.Module, inputs: dict, last: Tensor) -> Tensor:
    """fp32 logits of the tokens that follow the given places of the flattened input."""
    hidden = model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    return linear_logits(hidden[last], model.get_output_embeddings().weight)


def image_features(model: nn.Module, images: dict) -> tuple:
    """The tower's output for a prompt's images: what enters the text, and what deeper layers add (Qwen3-VL)."""
    seen = model.model.get_image_features(**images, return_dict=True)
    return seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())


def run_as_forward(model: nn.Module, function: Callable, *arguments: Any, **options: Any) -> Any:
    """function(model, ...); `parallel.shard_model` registers this as a forward method of a sharded model."""
    return function(model, *arguments, **options)


def root_forward(model: nn.Module, function: Callable, *arguments: Any, **options: Any) -> Any:
    """function(model, ...), as a forward of the root module if FSDP shards it.

    FSDP gathers parameters around the forward of the module that it wraps; a call past it would meet shards.
    """
    if isinstance(model, FSDPModule):
        return model.run_as_forward(function, *arguments, **options)
    return function(model, *arguments, **options)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turns dropout off inside the block and restores each module's mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# ---- images of a frozen tower --------------------------------------------------------------------------------------


def takes_image_features(model: nn.Module) -> bool:
    """Whether this version of transformers accepts image features: 5.23 does, 5.17 would silently ignore them."""
    return "mm_encoder_outputs" in inspect.signature(type(model.model).forward).parameters


def tower_is_frozen(model: nn.Module) -> bool:
    """Whether only the language model is trained, so that an image has the same features all along a run."""
    text = ("model.language_model.", "lm_head.")
    return all(name.startswith(text) for name, parameter in model.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def see_images(model: nn.Module, prompt: Mapping) -> dict:
    """The prompt's tensors with image features in place of pixels: drawing, reference and learning run the tower once.

    If this version of transformers cannot take features, the pixels stay.
    """
    inputs = dict(prompt)
    images = {key: inputs[key] for key in inputs if key not in TOKEN_KEYS}
    if "pixel_values" not in images or not takes_image_features(model):
        return inputs
    device = next(model.parameters()).device
    del inputs["pixel_values"]
    images = {key: value.to(device) for key, value in images.items()}
    with evaluating(model):
        return {**inputs, IMAGE_FEATURES: root_forward(model, image_features, images)}


# ---- scoring -------------------------------------------------------------------------------------------------------


def completion_logprobs(
    model: nn.Module,
    prompts: Sequence[dict],
    completions: Sequence[Sequence[Tensor]],
    *,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    return_entropies: bool = False,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Log-probs of each prompt's completions, [G, C] right-padded with zeros, differentiable, in one packed row.

    Everything given is one forward; `packing.plan_rows` cuts a step into such micro-batches. With `return_entropies` a
    second list of the same shapes follows.
    """
    require_mask_support(model)
    row = pack_row(model, prompts, completions)
    options = {"temperature": temperature, "banned_ids": tuple(banned_ids)}
    inputs = {**row.inputs, **row_attention(model, row.layout)}
    logprobs, entropies = root_forward(model, row_logprobs, inputs, row.predictors, row.targets, **options)
    lengths = [[len(answer) for answer in answers] for answers in completions]
    logprobs, entropies = unpack(logprobs, lengths), unpack(entropies, lengths)
    return (logprobs, entropies) if return_entropies else logprobs


def unpack(values: Tensor, lengths: Sequence[Sequence[int]]) -> list[Tensor]:
    """Values [T] of a row's completion tokens as one right-padded [G, C] per prompt."""
    pieces = iter(values.split([length for group in lengths for length in group]))
    empty = values[:0].view(0, 0)  # for a prompt without completions; a view keeps it in the graph
    return [pad_sequence([next(pieces) for _ in g], batch_first=True) if g else empty for g in lengths]


def stack_groups(groups: Sequence[Tensor]) -> Tensor:
    """One right-padded [N, C] of the groups' [G, C]."""
    longest = max(group.shape[1] for group in groups)
    return torch.cat([F.pad(group, (0, longest - group.shape[1])) for group in groups])


# ---- drawing -------------------------------------------------------------------------------------------------------


def sample_completions(
    model: nn.Module,
    prompts: Sequence[dict],
    group_size: int,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    banned_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
    return_logprobs: bool = False,
    forward: Callable | None = None,
) -> list[list[Tensor]] | tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Per prompt, group_size 1-D id tensors that keep their end token; temperature 0 is greedy.

    With `return_logprobs` the log-probs of the tokens follow, under the full softmax at this temperature (at 1 if
    greedy), before top_k and top_p: the ones that `completion_logprobs` reproduces. `forward(inputs, last)` replaces
    the model's own way to the next logits; `parallel.drawing` gives one for sharded layers. On a GPU each decoding step
    is one launch, unless model/graphs.py has given that up.
    """
    require_mask_support(model)
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: it must be at least 0, which is greedy")
    device, shape = next(model.parameters()).device, (max_new_tokens, len(prompts) * group_size)
    banned_ids = torch.tensor(list(banned_ids), dtype=torch.long, device=device)
    pick = partial(pick_tokens, temperature=temperature, top_k=top_k, top_p=top_p, banned_ids=banned_ids)
    # One number for each token of each completion: what is drawn does not depend on which of them are still there.
    uniforms = torch.zeros(shape, dtype=torch.float64, device=device)
    if temperature:
        uniforms.uniform_(generator=generator)
    ends = torch.tensor(list(eos_ids), device=device)
    on_gpu = device.type == "cuda" and forward is None
    pace = ON_GPU if on_gpu else EVERY_TOKEN
    with torch.no_grad(), evaluating(model), shared_prefix(model):
        read = forward or partial(root_forward, model, next_logits)
        cache, logits, positions = prefill(model, prompts, group_size, read)
        state = Decoding(forward or decoding_forward(model), cache, positions, pick, ends, uniforms)
        drawn, logprobs, lengths = decode(state, logits, pace, graphed=on_gpu)
    lengths = lengths.tolist()
    completions = _grouped(drawn, lengths, group_size)
    return (completions, _grouped(logprobs, lengths, group_size)) if return_logprobs else completions


def _grouped(
    values: Tensor,  # [R, C]
    lengths: Sequence[int],  # of each row
    group_size: int,
) -> list[list[Tensor]]:
    """The rows without their padding, group by group."""
    rows = [row[:length] for row, length in zip(values, lengths, strict=True)]
    return [rows[start : start + group_size] for start in range(0, len(rows), group_size)]


def prefill(
    model: nn.Module, prompts: Sequence[dict], group_size: int, forward: Callable
) -> tuple[GroupCache, Tensor, Tensor]:
    """Reads each prompt once: the cache of R = B * G sequences, logits [R, V] and next positions [A, R]."""
    sizes = [prompt["input_ids"].shape[1] for prompt in prompts]
    states, linear = PromptStates(max(sizes)), LinearStates()
    logits, nexts = [], []
    for start, stop in _chunks(sizes, PREFILL_TOKENS):
        row = pack_row(model, prompts[start:stop], [[] for _ in range(start, stop)])
        device = row.targets.device
        inputs = {
            **row.inputs,
            "attend": partial(states.attend, row.layout),
            "recur": partial(linear.recur_prompts, state_layout(row.layout)),
            "attention_mask": no_mask(device),
        }
        last = torch.tensor([end - 1 for _, end, _ in row.layout.groups], device=device)
        logits.append(forward(inputs, last))
        nexts.append(row.next_positions)
    linear.expand(group_size)
    cache = GroupCache(states.take(), sizes, group_size, linear)
    repeat = partial(torch.repeat_interleave, repeats=group_size)
    return cache, repeat(torch.cat(logits), dim=0), repeat(torch.cat(nexts, 1), dim=1)


class PromptStates:
    """Keys and values of each prompt, collected layer by layer while its row is read."""

    def __init__(self, longest: int):
        self.longest = longest  # tokens of the longest prompt, to which all are padded
        self.layers: dict[int, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))

    def attend(self, layout: RowLayout, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The attention of a row of prompts, whose keys and values are kept."""
        keys, values = self.layers[layer]
        for first, end, _ in layout.groups:
            padding = (0, 0, 0, self.longest - (end - first))
            keys.append(F.pad(key[0, :, first:end], padding))
            values.append(F.pad(value[0, :, first:end], padding))
        return attend_row(layout, layer, query, key, value, scale)

    def take(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values [B, K, P, D] by layer; each layer is freed as it is copied."""
        return {layer: tuple(map(torch.stack, self.layers.pop(layer))) for layer in sorted(self.layers)}


def _chunks(sizes: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Consecutive (start, stop) with at most budget tokens each, or one prompt."""
    chunks, start = [], 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or sum(sizes[start : stop + 1]) > budget:
            chunks.append((start, stop))
            start = stop
    return chunks


@dataclass(frozen=True)
class Pace:
    """How often the host looks at the sequences, and to which sizes it rounds the batch and the own tokens.

    Each look waits for the device, and each new size is a new CUDA graph. A CPU waits for nothing and records nothing.
    """

    look_every: int  # tokens
    narrowest: int  # the own tokens to make room for at least; 0 rounds nothing

    def room(self, tokens: int) -> int:
        """The own tokens to make room for: a power of two if rounded."""
        return max(self.narrowest, 2 ** (tokens - 1).bit_length()) if self.narrowest else tokens

    def batch(self, alive: int) -> int:
        """The sequences to go on with: a power of two if rounded."""
        return 2 ** (alive - 1).bit_length() if self.narrowest else alive


# 256 own tokens of 64 sequences are 0.6 GB at 3B, read in a tenth of the time that the weights take: narrower buffers
# would save less than the graphs cost that they need.
ON_GPU = Pace(look_every=16, narrowest=256)
EVERY_TOKEN = Pace(look_every=1, narrowest=0)


class Decoding:
    """Sequences that are being decoded. What a token changes lies in buffers that stay until the host looks."""

    def __init__(
        self,
        forward: Callable,  # (inputs, last) -> logits [R, V]
        cache: GroupCache,
        positions: Tensor,  # [A, R] of the first token
        pick: Callable,  # (logits, uniform [R]) -> (ids [R], logprobs [R])
        ends: Tensor,  # the ids that end a sequence
        uniforms: Tensor,  # [C, N] in [0, 1), for each token of each sequence
    ):
        self.forward, self.cache, self.pick, self.ends, self.uniforms = forward, cache, pick, ends, uniforms
        self.rows = torch.arange(uniforms.shape[1], device=uniforms.device)  # [R] the output row of each sequence
        self.ids = torch.zeros_like(self.rows)  # [R] the newest tokens
        self.positions = positions.clone()  # [A, R] of the newest tokens
        self.alive = torch.ones_like(self.rows, dtype=torch.bool)  # [R] not ended
        self.step = torch.zeros_like(self.rows[:1])  # [1] the number of the next token
        self.lengths = torch.zeros_like(self.rows)  # [N]
        self.drawn = torch.zeros(uniforms.shape[::-1], dtype=torch.long, device=uniforms.device)  # [N, C]
        self.logprobs = torch.zeros(uniforms.shape[::-1], device=uniforms.device)  # [N, C] fp32

    def write(self, logits: Tensor) -> None:
        """Draws the next token of every sequence. One that has ended keeps writing; `lengths` cuts that off."""
        rows, step = self.rows, self.step.expand_as(self.rows)
        ids, logprobs = self.pick(logits, self.uniforms[step, rows])
        self.drawn[rows, step], self.logprobs[rows, step] = ids, logprobs.to(self.logprobs.dtype)
        self.lengths.index_add_(0, rows, self.alive.long())
        self.alive &= ~torch.isin(ids, self.ends)
        self.ids.copy_(ids)
        self.step += 1

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all sequences but these."""
        index = torch.tensor(rows, device=self.ids.device)
        self.rows, self.ids, self.alive = self.rows[index], self.ids[index], self.alive[index]
        self.positions = self.positions[:, index]
        self.cache.keep(rows)

    def counters(self) -> list[Tensor]:
        """The buffers that a step moves on; what it writes into the others it would write again."""
        counters = [self.ids, self.positions, self.alive, self.step, self.lengths, self.cache.length]
        return [*counters, *self.cache.linear.buffers()]


def decode_step(state: Decoding) -> Tensor:
    """Runs the newest token of every sequence through the model and draws the next; returns the logits [R, V].

    Its shapes are fixed and the host waits for nothing, so a CUDA graph can record it.
    """
    state.cache.begin()
    inputs = {
        "input_ids": state.ids[:, None],
        "position_ids": model_positions(state.positions[..., None]),
        "attend": state.cache.attend,
        "recur": state.cache.linear.recur,
        "attention_mask": no_mask(state.ids.device),
    }
    logits = state.forward(inputs, torch.arange(len(state.ids), device=state.ids.device))
    state.cache.length += 1
    state.positions += 1
    state.write(logits)
    return logits


def decode(
    state: Decoding, logits: Tensor, pace: Pace = EVERY_TOKEN, *, graphed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Decodes from the first token's logits [R, V] until all have ended: ids, log-probs [R, C] and lengths [R].

    The host waits for the device when it looks, never within a token. Finished sequences leave once they are a quarter
    of the batch. Ranks end at different steps, which `parallel.drawing` makes harmless.
    """
    state.write(logits)
    step = GraphedStep(partial(decode_step, state), state.counters) if graphed else partial(decode_step, state)
    done, most = 1, len(state.uniforms)
    while any(alive := state.alive.tolist()) and done < most:
        size, tokens = pace.batch(sum(alive)), min(pace.look_every, most - done)
        moved = size <= 0.75 * len(alive)
        if moved:
            ended_last = sorted(range(len(alive)), key=lambda row: not alive[row])
            state.keep(sorted(ended_last[:size]))  # sequences that have ended fill the batch up
        room = pace.room(done - 1 + tokens)
        if room > state.cache.room:
            state.cache.reserve(room)
            moved = True
        if graphed and moved:
            step.forget()
        for _ in range(tokens):
            step()
        done += tokens
    longest = int(state.lengths.max())
    return state.drawn[:, :longest], state.logprobs[:, :longest], state.lengths
