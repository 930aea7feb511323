"""LoRA by hand: low-rank adapters on the language model's linear layers, saved in PEFT's format, and merged.

A linear layer becomes a LoRALinear in place: its class changes, and lora_A and lora_B join its weight. So the base
keeps its Hugging Face names, and with the adapters off it is the base model bit for bit. The KL penalty takes that as
its reference: no second model is loaded. `python -m tools.merge CHECKPOINT OUT` writes a model that plain transformers
loads. Left out: DoRA, rank-stabilised scaling, quantised bases, several adapters, adapters on embeddings and head.

Shapes: r rank, lora_A [r, in], lora_B [out, r].
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "base_model.model."  # PEFT puts it before the names of the model that it wraps
# Settings of PEFT under which the same tensors mean another model.
UNSUPPORTED = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "modules_to_save"
)  # fmt: skip
# The decoder's layers in a vision-language model and in a plain language model. The name of a layer alone would not do:
# GLM's vision tower has layers that are named like its decoder's.
DECODER = re.compile(r"model\.(language_model\.)?layers\.\d+\.")


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / r) B A dropout(x)

    add_adapters makes one out of a linear layer by changing its class: the weight stays where it is, under its name.
    """

    lora_A: nn.Parameter  # [r, in]
    lora_B: nn.Parameter  # [out, r]
    lora_alpha: float
    lora_dropout: float
    lora_on: bool

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        base = super().forward(x)
        if not self.lora_on:
            return base
        low = F.linear(F.dropout(x, self.lora_dropout, self.training), self.lora_A.to(x.dtype))
        return base + F.linear(low, self.lora_B.to(x.dtype)) * self.lora_scale


def choose_layers(model: nn.Module, targets: Sequence[str] = ()) -> list[str]:
    """Full names of the decoder's linear layers that the targets name, as q_proj does; of all layers without targets.

    The head is never among them: it is multiplied in blocks as a bare weight, which an adapter would not see.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and DECODER.match(name)]
    ends = [name.rpartition(".")[2] for name in linear]
    for target in targets:
        if target not in ends:
            raise ValueError(
                f"lora_targets: {target!r} is no linear layer of the decoder; choose from {', '.join(sorted({*ends}))}"
            )
    return [name for name, end in zip(linear, ends, strict=True) if not targets or end in targets]


def add_adapters(
    model: nn.Module, layers: Sequence[str], *, rank: int, alpha: float, dropout: float = 0.0, seed: int = 0
) -> None:
    """Puts fp32 adapters on these layers; the model computes what it did, since B is zero. A is drawn as in PEFT."""
    generator = torch.Generator().manual_seed(seed)
    for name in layers:
        layer = model.get_submodule(name)
        layer.__class__ = LoRALinear
        first, second = torch.empty(rank, layer.in_features), torch.zeros(layer.out_features, rank)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
        layer.lora_A = nn.Parameter(first.to(layer.weight.device))
        layer.lora_B = nn.Parameter(second.to(layer.weight.device))
        layer.lora_alpha, layer.lora_dropout, layer.lora_on = alpha, dropout, True


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Turns the model into its base, in eval mode, inside the block; a model without adapters stays as it is."""
    layers, training = adapted_layers(model), model.training
    for layer in layers.values():
        layer.lora_on = False
    if layers:
        model.eval()
    try:
        yield
    finally:
        model.train(training)
        for layer in layers.values():
            layer.lora_on = True


# ---- files ---------------------------------------------------------------------------------------------------------


def save_adapter(directory: Path, model: nn.Module, trained: dict[str, Tensor], base: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; `trained` holds the tensors by name in the model."""
    layers = adapted_layers(model)
    one = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "r": one.lora_A.shape[0],
        "lora_alpha": one.lora_alpha,
        "lora_dropout": one.lora_dropout,
        "target_modules": list(layers),  # full names, see DECODER
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        re.sub(r"\.lora_([AB])$", r".lora_\1.weight", PREFIX + name): value.contiguous()
        for name, value in trained.items()
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def is_adapter(name_or_path: str) -> bool:
    """Whether this is a directory with an adapter in PEFT's format."""
    return (Path(name_or_path) / "adapter_config.json").is_file()


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Puts the adapter in such a directory on its base model."""
    config = json.loads((directory / "adapter_config.json").read_text())
    found = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append("bias")
    if config["peft_type"] != "LORA" or found:
        raise ValueError(
            f"{directory}: a {config['peft_type']} adapter with {', '.join(found) or 'no further settings'}: only "
            "plain LoRA is read here; merge it with PEFT"
        )
    saved = load_file(directory / "adapter_model.safetensors")
    names = {key: re.sub(r"(\.lora_[AB])\.weight$", r"\1", key.removeprefix(PREFIX)) for key in saved}
    layers = dict.fromkeys(name.rpartition(".lora_")[0] for name in names.values() if name.endswith(("_A", "_B")))
    known = dict(model.named_modules())
    if foreign := [name for name in layers if not isinstance(known.get(name), nn.Linear)]:
        raise ValueError(
            f"{directory}: {foreign[0]} is no linear layer of the base {config['base_model_name_or_path']}"
        )
    add_adapters(
        model, list(layers), rank=config["r"], alpha=config["lora_alpha"], dropout=config.get("lora_dropout", 0.0)
    )
    parameters = dict(model.named_parameters())
    for key, name in names.items():
        if name not in parameters or parameters[name].shape != saved[key].shape:
            raise ValueError(
                f"{directory}: {key} {list(saved[key].shape)} fits nothing in {config['base_model_name_or_path']}: is "
                "that the base it was trained on? adapter_config.json names it"
            )
        parameters[name].data.copy_(saved[key])


def base_of(name_or_path: str) -> str:
    """The model that the adapter in a directory belongs to."""
    return json.loads((Path(name_or_path) / "adapter_config.json").read_text())["base_model_name_or_path"]


# ---- merging -------------------------------------------------------------------------------------------------------


def merge_adapters(model: nn.Module) -> None:
    """Adds each adapter to its weight, W + (alpha / r) B A in fp32, and removes it from the layer."""
    for layer in adapted_layers(model).values():
        change = layer.lora_B.data.float() @ layer.lora_A.data.float()
        layer.weight.data.copy_(layer.weight.data.float() + layer.lora_scale * change)
        del layer.lora_A, layer.lora_B
        layer.__class__ = nn.Linear
