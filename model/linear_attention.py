"""Gated delta nets, the linear attention of Qwen3.5, over a shared prompt: its state is computed once, then built on.

A gated delta net carries a state from token to token. So a completion needs no keys of its prompt, only what the prompt
leaves behind: the recurrent state after its last token, and the last inputs of the short convolution before it. Both
are differentiable, so the gradients of all completions add up in the prompt's.

`use_shared_states` gives the layers a forward that takes the recurrence as the argument `recur`, as attention takes
`attend`; without that argument they are what they were. The recurrence itself is the modelling file's, which takes the
kernels of fla and causal-conv1d where these are installed. Left out: other recurrent layers, such as Mamba's.

Shapes: S tokens of a packed row; n sequences of a batch, c tokens of the longest; B prompts, R sequences decoded;
W the convolution's width, X its channels; V value heads, D their size, K the size of the keys.
"""

from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as kernels  # qwen3_5_moe has the same functions
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

from model.attention import Batch, RowLayout, similar_batches

LAYERS = (Qwen3_5GatedDeltaNet, Qwen3_5MoeGatedDeltaNet)  # alike except for their names


def use_shared_states(model: nn.Module) -> None:
    """Gives the model's gated delta nets a forward that takes `recur`."""
    for layer in delta_nets(model):
        layer.forward = MethodType(delta_net, layer)


def delta_nets(model: nn.Module) -> list[nn.Module]:
    """The model's gated delta nets."""
    return [module for module in model.modules() if isinstance(module, LAYERS)]


def shares_states(model: nn.Module) -> bool:
    """Whether the model has gated delta nets and all of them take `recur`."""
    layers = delta_nets(model)
    return bool(layers) and all("forward" in vars(layer) for layer in layers)


def delta_net(layer: nn.Module, hidden_states: Tensor, *args, recur=None, **options) -> Tensor:
    """The layer's forward: projections, gate and norm as in the modelling file, the recurrence by `recur`.

    recur(layer, inputs of the convolution [b, s, X], log decays [b, s, V], betas [b, s, V]) returns [b, s, V, D].
    """
    if recur is None:
        return type(layer).forward(layer, hidden_states, *args, **options)
    inputs, gate = layer.in_proj_qkv(hidden_states), layer.in_proj_z(hidden_states)
    beta = layer.in_proj_b(hidden_states).sigmoid()
    decay = -layer.A_log.float().exp() * F.softplus(layer.in_proj_a(hidden_states).float() + layer.dt_bias)
    out = recur(layer, inputs, decay, beta)
    out = layer.norm(out.reshape(-1, layer.head_v_dim), gate.reshape(-1, layer.head_v_dim))
    return layer.out_proj(out.reshape(*hidden_states.shape[:2], -1))


# ---- a packed row --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateLayout:
    """How the sequences of a packed row depend on each other's states."""

    prompts: list[Batch]
    completions: list[Batch]
    prompt_order: Tensor  # [B] where each prompt stands among those of the batches
    prompt_of: list[Tensor]  # [n] of each batch of completions: the prompts that they continue
    order: Tensor  # [S] where each token of the row stands among the tokens of all batches, padding included


def state_layout(row: RowLayout) -> StateLayout:
    """The layout of a row's states: every prompt by itself, prompts of similar lengths together."""
    prompts = similar_batches([(first, middle - first) for first, middle, _ in row.groups], row.places.device)
    starts, prompt_order = torch.cat([batch.own[:, 0] for batch in prompts]).sort()
    batches = [*prompts, *row.batches]
    sizes = [batch.own.numel() for batch in batches]
    before = [sum(sizes[:number]) for number in range(len(sizes))]
    order = torch.cat([batch.order + offset for batch, offset in zip(batches, before, strict=True)])
    places = torch.cat([batch.places for batch in batches])
    return StateLayout(
        prompts=prompts,
        completions=row.batches,
        prompt_order=prompt_order,
        prompt_of=[torch.bucketize(batch.own[:, 0].contiguous(), starts) - 1 for batch in row.batches],
        order=order[places.argsort()],
    )


def recur_row(layout: StateLayout, layer: nn.Module, inputs: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The recurrence over a packed row: every prompt from nothing, every completion from where its prompt ended."""
    out, contexts, states = recur_prompts(layout, layer, inputs, decay, beta)
    for batch, prompts in zip(layout.completions, layout.prompt_of, strict=True):
        out.append(_run(layer, batch, (inputs, decay, beta), contexts[prompts], states[prompts])[0])
    return torch.cat(out)[layout.order][None]


def recur_prompts(
    layout: StateLayout, layer: nn.Module, inputs: Tensor, decay: Tensor, beta: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The prompts' outputs [n * c, V, D] by batch, and what they leave: contexts [B, W - 1, X], states [B, V, K, D]."""
    parts = [_run(layer, batch, (inputs, decay, beta)) for batch in layout.prompts]
    out, contexts, states = (list(part) for part in zip(*parts, strict=True))
    return out, torch.cat(contexts)[layout.prompt_order], torch.cat(states)[layout.prompt_order]


def _run(
    layer: nn.Module,
    batch: Batch,
    row: tuple[Tensor, Tensor, Tensor],  # inputs [1, S, X], decay [1, S, V], beta [1, S, V]
    context: Tensor | None = None,  # [n, W - 1, X]
    state: Tensor | None = None,  # [n, V, K, D]
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of sequences from their states on: outputs [n * c, V, D], and the contexts and states at their ends."""
    inputs, decay, beta = (values[0, batch.own] for values in row)
    width = layer.conv_kernel_size - 1
    inputs = F.pad(inputs, (0, 0, width, 0)) if context is None else torch.cat([context, inputs], 1)
    mixed = kernels.causal_conv1d_fn(
        inputs.transpose(1, 2), layer.conv1d.weight.squeeze(1), layer.conv1d.bias, activation=layer.activation
    )
    # Padding leaves the state as it is: the decay is exp(0) and nothing is written.
    decay, beta = (values.masked_fill(batch.padding[..., None], 0) for values in (decay, beta))
    out, state = kernels.torch_chunk_gated_delta_rule(
        *_heads(layer, mixed[:, :, width:]),
        g=decay,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    lengths = (~batch.padding).sum(1, keepdim=True)
    last = lengths + torch.arange(width, device=lengths.device)  # of the inputs, which begin with the context
    return out.flatten(0, 1), inputs.take_along_dim(last[..., None], 1), state


def _heads(layer: nn.Module, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [b, s, heads, size] of what the convolution returns, [b, X, s]."""
    query, key, value = mixed.transpose(1, 2).split([layer.key_dim, layer.key_dim, layer.value_dim], -1)
    size = layer.head_k_dim
    return query.unflatten(-1, (-1, size)), key.unflatten(-1, (-1, size)), value.unflatten(-1, (-1, layer.head_v_dim))


# ---- decoding ------------------------------------------------------------------------------------------------------


class LinearStates:
    """What gated delta nets carry while drawing, in buffers that a decoding step updates in place.

    By the number of the layer: the last inputs of the convolution [R, X, W - 1], and the recurrent states [R, V, K, D].
    """

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def recur_prompts(
        self, layout: StateLayout, layer: nn.Module, inputs: Tensor, decay: Tensor, beta: Tensor
    ) -> Tensor:
        """The recurrence over a row of prompts; what they leave joins that of the rows before."""
        out, contexts, states = recur_prompts(layout, layer, inputs, decay, beta)
        ends = contexts.transpose(1, 2), states
        if layer.layer_idx in self.layers:
            ends = tuple(map(torch.cat, zip(self.layers[layer.layer_idx], ends, strict=True)))
        self.layers[layer.layer_idx] = ends
        return torch.cat(out)[layout.order][None]

    def expand(self, group_size: int) -> None:
        """Gives every sequence of a group its own copy of what the prompt left."""
        self.layers = {
            number: tuple(part.repeat_interleave(group_size, 0) for part in layer)
            for number, layer in self.layers.items()
        }

    def keep(self, rows: Tensor) -> None:
        """Drops all sequences but these."""
        self.layers = {number: tuple(part[rows] for part in layer) for number, layer in self.layers.items()}

    def buffers(self) -> list[Tensor]:
        """All that a decoding step updates in place."""
        return [part for layer in self.layers.values() for part in layer]

    def recur(self, layer: nn.Module, inputs: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        """The recurrence [R, 1, V, D] at the newest token of every sequence."""
        contexts, states = self.layers[layer.layer_idx]
        mixed = kernels.causal_conv1d_update(  # moves the contexts on, in place
            inputs.transpose(1, 2), contexts, layer.conv1d.weight.squeeze(1), layer.conv1d.bias, layer.activation
        )
        out, after = kernels.torch_recurrent_gated_delta_rule(
            *_heads(layer, mixed),
            g=decay,
            beta=beta,
            initial_state=states,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        states.copy_(after)
        return out
