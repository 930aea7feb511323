"""The two regimes of a group: `sample_completions` draws it, `completion_logprobs` scores it.

Both read each prompt once. Scoring lays a group out in one packed row, [prompt | c1 | ... | cG]: every completion sees
the prompt and itself, and its positions go on from the prompt's, so images and question enter the model once instead of
G times and nothing is padded. Drawing runs the same row without completions (`prefill`), keeps each prompt's keys and
values once, and decodes all completions together (`decode`), dropping sequences as they finish.

Sampling is by hand, not `generate`'s: a checkpoint's generation_config (top_k, repetition penalty, a near-greedy
temperature) would leak into it, and log-probs must be those of the distribution drawn from.
Left out: beams, stop strings, continuous batching.

Shapes: B prompts, G completions per prompt, P prompt tokens, C completion tokens, S tokens of a packed row,
R sequences being decoded, V vocabulary, A position axes (3 in Qwen's and GLM's rotary embedding, 1 elsewhere).
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence

from model import attention
from model.attention import GroupCache, RowLayout, attend_row, no_mask, row_layout, shared_prefix
from model.logprobs import linear_logits, linear_logprobs

PREFILL_TOKENS = 4096  # prompts prefilled in one row; its activations are what this bounds
# Of a prompt's tensors, these describe its tokens and are rebuilt for a row; all others (pixels, grids) are joined.
TOKEN_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
IMAGE_FEATURES = "image_features"  # what `see_images` puts in the place of the pixels


@dataclass(frozen=True)
class PackedRow:
    inputs: dict[str, Tensor]  # the model's forward arguments, attention apart: input_ids [1, S], positions, pixels
    layout: RowLayout  # where prompts and completions stand
    next_positions: Tensor  # [A, B] position of the first token after each prompt
    predictors: Tensor  # [T] index in the row of the state that predicts each completion token
    targets: Tensor  # [T] those tokens: prompt by prompt, completion by completion


def pack_row(model: nn.Module, prompts: Sequence[dict], completions: Sequence[Sequence[Tensor]]) -> PackedRow:
    """Lays prompts and their completions out in one row that a plain causal model scores correctly."""
    device = next(model.parameters()).device
    prompt_lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    layout = row_layout(prompt_lengths, [[len(ids) for ids in answers] for answers in completions], device)
    ids, positions, nexts, predictors = [], [], [], []
    for prompt, answers, (_, middle, _) in zip(prompts, completions, layout.groups, strict=True):
        prompt_positions = token_positions(model, prompt).to(device)  # [A, P]
        # max + 1, not P: image tokens share positions, so an image-heavy prompt ends at a position far below P.
        next_position = prompt_positions.max() + 1
        nexts.append(next_position.expand(len(prompt_positions)))
        ids.append(prompt["input_ids"][0].to(device))
        positions.append(prompt_positions)
        start = middle
        for answer in answers:
            steps = torch.arange(len(answer), device=device)
            ids.append(answer.to(device))
            positions.append((next_position + steps).expand(len(prompt_positions), -1))
            # The first token is predicted by the prompt's last state, the others by the one before them.
            predictors.append(torch.where(steps == 0, middle - 1, start + steps - 1))
            start += len(answer)
    ids = torch.cat(ids)
    inputs = {
        "input_ids": ids[None],
        "position_ids": model_positions(torch.cat(positions, 1)[:, None]),
        **joined_features(prompts, device),
    }
    return PackedRow(
        inputs, layout, torch.stack(nexts, 1), torch.cat([layout.places[:0], *predictors]), ids[layout.places]
    )


def token_positions(model: nn.Module, prompt: dict) -> Tensor:
    """Positions [A, P] of a prompt's tokens, images laid out in the plane where the family does so."""
    ids, grid, types = prompt["input_ids"], prompt.get("image_grid_thw"), prompt.get("mm_token_type_ids")
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(ids.shape[1])[None]
    if types is None:
        if grid is not None:  # transformers would fall back to 1-D positions in silence: off by 0.1 in the logits
            raise ValueError(
                "a prompt with image_grid_thw lacks mm_token_type_ids: pass all that the processor returned"
            )
        types = torch.zeros_like(ids)
    return model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid)[0][:, 0]


def model_positions(positions: Tensor) -> Tensor:
    """Positions [A, R, S] as the model's forward takes them: [3, R, S], or [R, S] where there is one axis."""
    return positions if len(positions) > 1 else positions[0]


def joined_features(prompts: Sequence[dict], device: torch.device) -> dict:
    """Pixels, grids and the like of all prompts, joined in the order of their images in the row."""
    keys = dict.fromkeys(key for prompt in prompts for key in prompt if key not in (*TOKEN_KEYS, IMAGE_FEATURES))
    joined = {key: torch.cat([prompt[key] for prompt in prompts if key in prompt]).to(device) for key in keys}
    seen = [prompt[IMAGE_FEATURES] for prompt in prompts if IMAGE_FEATURES in prompt]
    if seen:
        images, *levels = map(_joined, zip(*seen, strict=True))
        joined["mm_encoder_outputs"] = {"image": SimpleNamespace(pooler_output=images, deepstack_features=levels)}
    return joined


def _joined(parts: Sequence) -> Tensor | tuple:  # a family gives one tensor or one per image
    return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(image for part in parts for image in part)


# ---- the ways through the model ------------------------------------------------------------------------------------
# Each is a root forward: FSDP gathers and frees parameters around the module it wraps, and a call past it would find
# shards. `parallel.shard_model` registers them as methods; on a bare model they are called as they stand here.


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
    """What the tower makes of a prompt's images: what enters the text, and what deeper layers add (Qwen3-VL)."""
    seen = model.model.get_image_features(**images, return_dict=True)
    return seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())


def root_forward(model: nn.Module, function):
    """The function as a forward of this model: the registered method where it is sharded."""
    return getattr(model, function.__name__) if isinstance(model, FSDPModule) else partial(function, model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, dropout is off; afterwards every module is in the mode it was in, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def require_mask_support(model: nn.Module) -> None:
    """Refuses attention kernels that read the row's boolean mask wrongly, or not at all."""
    kernel = model.config.get_text_config()._attn_implementation
    if kernel not in ("sdpa", attention.NAME):  # eager adds True as +1, flash ignores a 4-D mask: wrong without error
        raise ValueError(f'attn_implementation is "{kernel}": packed rows need "sdpa"; pass it to from_pretrained')


def row_attention(model: nn.Module, layout: RowLayout) -> dict:
    """The forward arguments of a row's attention: in parts, or by the dense mask where the model's is plain sdpa."""
    if model.config.get_text_config()._attn_implementation == attention.NAME:
        return {"attend": partial(attend_row, layout), "attention_mask": no_mask(layout.places.device)}
    return {"attention_mask": layout.mask}


# ---- images of a frozen tower --------------------------------------------------------------------------------------


def takes_seen_images(model: nn.Module) -> bool:
    """Whether this version of transformers takes images ready-made: 5.23 does, 5.17 would leave them out in silence."""
    return "mm_encoder_outputs" in inspect.signature(type(model.model).forward).parameters


def tower_is_frozen(model: nn.Module) -> bool:
    """Whether nothing but the language model is trained, so that images are seen alike all along a run."""
    text = ("model.language_model.", "lm_head.")
    return all(name.startswith(text) for name, parameter in model.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def see_images(model: nn.Module, prompt: Mapping) -> dict:
    """The prompt's tensors with its images as the tower sees them, so that drawing, reference and learning run it once.

    A version of transformers that cannot take them gets the pixels every time.
    """
    inputs = dict(prompt)
    images = {key: inputs[key] for key in inputs if key not in TOKEN_KEYS}
    if "pixel_values" not in images or not takes_seen_images(model):
        return inputs
    device = next(model.parameters()).device
    del inputs["pixel_values"]
    images = {key: value.to(device) for key, value in images.items()}
    with evaluating(model):
        return {**inputs, IMAGE_FEATURES: root_forward(model, image_features)(images)}


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

    The prompts may be few (a micro-batch, see `plan_rows`): everything given is one forward. With `return_entropies`
    a second list of the same shapes follows.
    """
    require_mask_support(model)
    row = pack_row(model, prompts, completions)
    options = {"temperature": temperature, "banned_ids": tuple(banned_ids)}
    inputs = {**row.inputs, **row_attention(model, row.layout)}
    logprobs, entropies = root_forward(model, row_logprobs)(inputs, row.predictors, row.targets, **options)
    lengths = [[len(answer) for answer in answers] for answers in completions]
    logprobs, entropies = unpack(logprobs, lengths), unpack(entropies, lengths)
    return (logprobs, entropies) if return_entropies else logprobs


def unpack(values: Tensor, lengths: Sequence[Sequence[int]]) -> list[Tensor]:
    """Values [T] of a row's completion tokens as one right-padded [G, C] per prompt."""
    pieces = iter(values.split([length for group in lengths for length in group]))
    empty = values[:0].view(0, 0)  # of a prompt without completions; a view, so that the graph goes on through it
    return [pad_sequence([next(pieces) for _ in g], batch_first=True) if g else empty for g in lengths]


def stack_groups(groups: Sequence[Tensor]) -> Tensor:
    """One right-padded [N, C] of the groups' [G, C]."""
    longest = max(group.shape[1] for group in groups)
    return torch.cat([F.pad(group, (0, longest - group.shape[1])) for group in groups])


def plan_rows(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], row_tokens: int
) -> list[list[tuple[int, list[int]]]]:
    """Cuts groups into rows of at most row_tokens: per row, (prompt, its completions in the row).

    The longest groups are placed first, each into the first row with room, so rows fill. A group longer than a row is
    split and its prompt repeated; one prompt with one completion is a row however long it is.
    """
    pieces = []  # (tokens, prompt, completions)
    for number, (prompt_length, lengths) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
        piece, size = [], prompt_length
        for index, length in enumerate(lengths):
            if piece and size + length > row_tokens:
                pieces.append((size, number, piece))
                piece, size = [], prompt_length
            piece, size = [*piece, index], size + length
        pieces.append((size, number, piece))
    rows, room = [], []
    for size, number, piece in sorted(pieces, key=lambda entry: -entry[0]):
        fits = next((row for row, left in enumerate(room) if size <= left), None)
        if fits is None:
            rows.append([])
            room.append(row_tokens)
            fits = len(rows) - 1
        rows[fits].append((number, piece))
        room[fits] -= size
    return rows


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
) -> list[list[Tensor]] | tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Per prompt, group_size 1-D id tensors that keep their end token; temperature 0 is greedy.

    With `return_logprobs` the tokens' log-probs follow, under the full softmax at this temperature (at 1 if greedy),
    that is before top_k and top_p: what `completion_logprobs` is to reproduce.
    """
    require_mask_support(model)
    banned_ids = torch.as_tensor(list(banned_ids), dtype=torch.long, device=next(model.parameters()).device)
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: it must be at least 0, which is greedy")
    with torch.no_grad(), evaluating(model), shared_prefix(model):
        cache, logits, positions = prefill(model, prompts, group_size)
        pick = partial(
            pick_tokens, temperature=temperature, top_k=top_k, top_p=top_p, banned_ids=banned_ids, generator=generator
        )
        drawn, logprobs, lengths = decode(model, cache, logits, positions, pick, max_new_tokens, eos_ids)
    lengths = lengths.tolist()
    grouped = [
        [
            [values[row, : lengths[row]] for row in range(start, start + group_size)]
            for start in range(0, len(lengths), group_size)
        ]
        for values in (drawn, logprobs)
    ]
    return (grouped[0], grouped[1]) if return_logprobs else grouped[0]


def prefill(model: nn.Module, prompts: Sequence[dict], group_size: int) -> tuple[GroupCache, Tensor, Tensor]:
    """Reads each prompt once: the cache of R = B * G sequences, logits [R, V] and next positions [A, R]."""
    sizes = [prompt["input_ids"].shape[1] for prompt in prompts]
    longest = max(sizes)
    logits, nexts, states = [], [], defaultdict(lambda: ([], []))  # states: layer -> keys and values of each prompt
    for start, stop in _chunks(sizes, PREFILL_TOKENS):
        row = pack_row(model, prompts[start:stop], [[] for _ in range(start, stop)])

        def attend(layer, query, key, value, scale, row=row):
            for kept, new in zip(states[layer], (key, value), strict=True):
                kept += [
                    F.pad(new[0, :, first:end], (0, 0, 0, longest - end + first)) for first, end, _ in row.layout.groups
                ]
            return attend_row(row.layout, layer, query, key, value, scale)

        inputs = {**row.inputs, "attend": attend, "attention_mask": no_mask(row.targets.device)}
        last = torch.tensor([end - 1 for _, end, _ in row.layout.groups], device=row.targets.device)
        logits.append(root_forward(model, next_logits)(inputs, last))
        nexts.append(row.next_positions)
    # Popped, so that the copies are freed layer by layer.
    cache = GroupCache([tuple(map(torch.stack, states.pop(layer))) for layer in sorted(states)], sizes, group_size)
    repeat = partial(torch.repeat_interleave, repeats=group_size)
    return cache, repeat(torch.cat(logits), dim=0), repeat(torch.cat(nexts, 1), dim=1)


def _chunks(sizes: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Consecutive (start, stop) with at most budget tokens each, or one prompt."""
    chunks, start = [], 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or sum(sizes[start : stop + 1]) > budget:
            chunks.append((start, stop))
            start = stop
    return chunks


def decode(
    model: nn.Module,
    cache: GroupCache,
    logits: Tensor,  # [R, V] of the first token
    positions: Tensor,  # [A, R] of the first token
    pick,  # logits -> (ids [R], logprobs [R])
    max_new_tokens: int,
    eos_ids: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token until every row has ended: ids [R, C], log-probs [R, C] and lengths [R], the end token included.

    One host sync per token, the count of rows still alive; finished rows leave once they are a quarter of the batch.
    Ranks end at different steps, which `parallel.drawing` makes harmless.
    """
    step_forward = root_forward(model, next_logits)
    rows = torch.arange(len(logits), device=logits.device)  # where each sequence still decoded is written to
    ends = torch.tensor(list(eos_ids), device=logits.device)
    drawn = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=logits.device)
    logprobs = torch.zeros(len(rows), max_new_tokens, dtype=logits.dtype, device=logits.device)
    lengths = torch.zeros_like(rows)
    alive = torch.ones_like(rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        ids, picked = pick(logits)
        drawn[rows, step], logprobs[rows, step] = ids, picked  # past its end a row writes on; `lengths` cuts that off
        lengths[rows] += alive
        alive = alive & ~torch.isin(ids, ends)
        num_alive = int(alive.sum())
        if num_alive == 0 or step + 1 == max_new_tokens:
            break
        if num_alive <= 0.75 * len(alive):
            keep = alive.nonzero()[:, 0]
            cache.keep(keep)
            rows, ids, alive, positions = rows[keep], ids[keep], alive[keep], positions[:, keep]
        cache.advance()
        inputs = {
            "input_ids": ids[:, None],
            "position_ids": model_positions(positions[..., None]),
            "attend": cache.attend,
            "attention_mask": no_mask(ids.device),
        }
        logits = step_forward(inputs, torch.arange(len(ids), device=ids.device))
        positions = positions + 1
    longest = int(lengths.max())
    return drawn[:, :longest], logprobs[:, :longest], lengths


def pick_tokens(
    logits: Tensor,  # [R, V] fp32
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    banned_ids: Sequence[int] | Tensor = (),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Next ids [R] and their log-probs [R]; temperature 0 takes the most likely."""
    if len(banned_ids):
        logits = logits.index_fill(1, torch.as_tensor(banned_ids, device=logits.device), -1e30)
    logprobs = (logits / (temperature or 1.0)).log_softmax(1)
    if temperature == 0:
        ids = logprobs.argmax(1)
    else:
        # One uniform number per row, looked up in the cumulated probabilities: unlike multinomial it never waits for
        # the device, and an exponential race costs a random number per entry. 150,000 terms want a sum in float64.
        sums = restricted(logprobs, top_k, top_p).exp().cumsum(1, dtype=torch.float64)
        uniform = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device, generator=generator)
        # The first entry whose sum exceeds the number: never one of probability 0, which adds nothing to the sum.
        ids = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)[:, 0].clamp_(max=sums.shape[1] - 1)
    return ids, logprobs.gather(1, ids[:, None])[:, 0]


def restricted(logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Log-probs [R, V] with -inf outside the top_k tokens (0: all) and the smallest set holding top_p probability."""
    if top_k:
        threshold = logprobs.topk(min(top_k, logprobs.shape[1]), dim=1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=1, descending=True)
        probs = ordered.softmax(1)
        outside = probs.cumsum(1) - probs >= top_p  # what stands before a token already holds top_p; the first stays
        logprobs = logprobs.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logprobs
