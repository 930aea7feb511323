"""A group in one packed row, [prompt | c1 | ... | cG]: every completion sees the prompt and itself.

The positions of each completion continue from those of the prompt, so images and question enter the model once instead
of G times, and nothing is padded. Several groups may share a row.

Shapes: B prompts, G completions per prompt, P prompt tokens, S tokens of a packed row, T tokens of its completions,
A position axes (3 in Qwen's and GLM's rotary embedding, 1 elsewhere).
"""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from model import attention
from model.attention import RowLayout, attend_row, no_mask, row_layout
from model.linear_attention import delta_nets, recur_row, shares_states, state_layout

# These tensors of a prompt describe its tokens and are rebuilt for a row; all others (pixels, grids) are joined.
TOKEN_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
IMAGE_FEATURES = "image_features"  # the key under which `rollout.see_images` replaces the pixels


@dataclass(frozen=True)
class PackedRow:
    """One row of prompts and completions, ready for the model."""

    inputs: dict[str, Tensor]  # the model's forward arguments except attention: input_ids [1, S], positions, pixels
    layout: RowLayout  # where prompts and completions stand
    next_positions: Tensor  # [A, B] position of the first token after each prompt
    predictors: Tensor  # [T] index in the row of the state that predicts each completion token
    targets: Tensor  # [T] the completion tokens: prompt by prompt, completion by completion


class Piece(NamedTuple):
    """Completions of one prompt that share a row."""

    prompt: int
    completions: list[int]


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


def row_attention(model: nn.Module, layout: RowLayout) -> dict:
    """The forward arguments that keep a row's completions apart, in attention and in layers that carry a state.

    Attention is computed in parts, or by the dense mask where the model's is plain sdpa.
    """
    arguments = {"recur": partial(recur_row, state_layout(layout))} if shares_states(model) else {}
    if model.config.get_text_config()._attn_implementation == attention.NAME:
        return arguments | {"attend": partial(attend_row, layout), "attention_mask": no_mask(layout.places.device)}
    return arguments | {"attention_mask": layout.mask}


def require_mask_support(model: nn.Module) -> None:
    """Refuses a model that a packed row would score wrongly, for its attention, its layers or its head."""
    text = model.config.get_text_config()
    kernel = text._attn_implementation
    if kernel not in ("sdpa", attention.NAME):  # eager adds True as +1, flash ignores a 4-D mask: wrong without error
        raise ValueError(f'attn_implementation is "{kernel}": packed rows need "sdpa"; pass it to from_pretrained')
    if not isinstance(getattr(model, "model", None), nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no decoder named `model`, as GPT-2 has none: take a model that is built like "
            "Llama or Qwen"
        )
    if "position_ids" not in inspect.signature(type(model.model).forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no position_ids, which each completion of a row counts anew")
    if reason := layer_problem(text) or state_problem(model) or head_problem(model):
        raise ValueError(f"{type(model).__name__} {reason}")


def layer_problem(text: PreTrainedConfig) -> str:
    """What keeps the decoder's layers from a packed row, by its config; empty if nothing does."""
    types = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if types is None and window:  # Mistral names no types: every layer has the window
        types = ["sliding_attention"]
    if unknown := {*(types or [])} - {"full_attention", "linear_attention"}:
        return (
            f"has layers of {', '.join(sorted(unknown))}: a packed row is causal without a window, so only "
            "full_attention and Qwen3.5's linear_attention are supported"
        )
    return ""


def state_problem(model: nn.Module) -> str:
    """Why a state would run on from one completion into the next; empty if none does."""
    if shares_states(model):
        return ""
    if delta_nets(model):
        return "has gated delta nets: call use_shared_states of model/linear_attention.py on the model"
    types = getattr(model.config.get_text_config(), "layer_types", None) or []
    if "linear_attention" in types or getattr(model, "_is_stateful", False):
        return "carries a state from token to token, which would run on from one completion into the next"
    return ""


def head_problem(model: nn.Module) -> str:
    """What the model does to its logits beyond a product with the head's weight; empty if nothing."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return "has no linear head"
    if head.bias is not None:
        return "has a head with a bias: log-probs are computed from a head's weight alone"
    # logit_scale (Cohere), logits_scaling (Granite), final_logit_softcapping (Gemma 2), lm_head_multiplier (Falcon H1)
    for name, value in vars(model.config.get_text_config()).items():
        of_head = re.search("logit|soft_?cap|lm_head", name) and "router" not in name
        if of_head and type(value) in (int, float) and value != 1:
            return f"has {name} = {value} in its config: log-probs are computed from plain logits"
    return ""


def plan_rows(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], row_tokens: int
) -> list[list[Piece]]:
    """Cuts groups into rows of at most row_tokens tokens.

    The longest pieces are placed first, each into the first row with room, so rows fill. A group longer than a row is
    split and its prompt repeated; one prompt with one completion is a row however long it is.
    """
    pieces = []  # (tokens, piece)
    for number, (prompt_length, lengths) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
        chosen, size = [], prompt_length
        for index, length in enumerate(lengths):
            if chosen and size + length > row_tokens:
                pieces.append((size, Piece(number, chosen)))
                chosen, size = [], prompt_length
            chosen, size = [*chosen, index], size + length
        pieces.append((size, Piece(number, chosen)))
    rows, room = [], []
    for size, piece in sorted(pieces, key=lambda entry: -entry[0]):
        row = next((row for row, left in enumerate(room) if size <= left), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_tokens)
        rows[row].append(piece)
        room[row] -= size
    return rows
