"""LoRA by hand: low-rank adapters on the language model's linear layers, saved as PEFT saves them, and merged.

A linear layer becomes a LoRALinear where it stands: its class changes, lora_A and lora_B join its weight. So the base
keeps its Hugging Face names, and with the adapters off it is the base model bit for bit, which is the reference of the
KL penalty: no second model is loaded. `python lora.py merge CHECKPOINT OUT` writes what plain transformers loads.
Left out: DoRA, rank-stabilised scaling, quantised bases, several adapters, adapters on embeddings and head.

Shapes: r rank, lora_A [r, in], lora_B [out, r].
"""

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from model.vlm import DECODER_LAYERS, load_model, projector_modules

PREFIX = "base_model.model."  # before the names of a model that PEFT has wrapped
# Settings of PEFT under which the same tensors mean another model.
UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / r) B A dropout(x)"""

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
    """Names of the linear layers that `targets` mean: every one of the decoder layers where there are none.

    A target is a regular expression for a whole name, or for its end within the decoder layers (q_proj). The head is
    never one: it is multiplied in chunks, as a bare weight, which would pass an adapter by.
    """
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    inside = rf"{re.escape(DECODER_LAYERS)}\.\d+\."
    if not targets:
        return [name for name in linear if re.match(inside, name)]
    chosen = set()
    for target in targets:
        matched = [name for name in linear if re.fullmatch(rf"(?:{inside}(?:.*\.)?)?(?:{target})", name)]
        if not matched:
            ends = sorted({name.rpartition(".")[2] for name in linear if re.match(inside, name)})
            raise ValueError(
                f"lora_targets: {target!r} matches no linear layer; those of the decoder layers are {', '.join(ends)}; "
                "for others give a regular expression of the whole name (the head takes no adapter)"
            )
        chosen.update(matched)
    return [name for name in linear if name in chosen]


def add_adapters(
    model: nn.Module, layers: Sequence[str], *, rank: int, alpha: float, dropout: float = 0.0, seed: int = 0
) -> None:
    """Puts fp32 adapters on these layers of the model, which computes what it did: B is zero; A is drawn as in PEFT."""
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
    """The layers with an adapter, by name; none where LoRA is off."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within, the model is its base, in eval mode; a model without adapters stays as it is."""
    layers, training = adapted_layers(model), model.training
    for layer in layers.values():
        layer.lora_on = False
    model.train(training and not layers)
    try:
        yield
    finally:
        model.train(training)
        for layer in layers.values():
            layer.lora_on = True


# ---- files ---------------------------------------------------------------------------------------------------------


def save_adapter(directory: Path, model: nn.Module, trained: dict[str, Tensor], base: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors of the `trained` tensors, by their names in the model.

    What is trained beside adapters is the projector: PEFT calls that modules_to_save. vLLM takes none: merge first.
    """
    layers = adapted_layers(model)
    one = next(iter(layers.values()))
    whole = [name for name in projector_modules(model) if any(key.startswith(f"{name}.") for key in trained)]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "r": one.lora_A.shape[0],
        "lora_alpha": one.lora_alpha,
        "lora_dropout": one.lora_dropout,
        "target_modules": list(layers),  # whole names: GLM's tower has layers that are named as its decoder's
        "modules_to_save": whole or None,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {re.sub(r"\.lora_([AB])$", r".lora_\1.weight", PREFIX + name): value for name, value in trained.items()}
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip


def is_adapter(name_or_path: str) -> bool:
    """Whether this is a directory with an adapter in PEFT's format, ours or another's."""
    return (Path(name_or_path) / "adapter_config.json").is_file()


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Puts the adapter of such a directory on its base model, and what was trained beside it in place."""
    config = json.loads((directory / "adapter_config.json").read_text())
    found = [name for name in UNSUPPORTED if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if config["peft_type"] != "LORA" or found:
        raise ValueError(
            f"{directory}: an adapter of type {config['peft_type']} with {found or 'nothing else'}: only plain LoRA is "
            "read here; merge it with PEFT"
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


def load_any(name_or_path: str, **options) -> tuple[PreTrainedModel, ProcessorMixin]:
    """`vlm.load_model`, which also takes an adapter's directory: its base is loaded and the adapter put on."""
    if not is_adapter(name_or_path):
        return load_model(name_or_path, **options)
    model, processor = load_model(base_of(name_or_path), **options)
    load_adapter(model, Path(name_or_path))
    return model.eval(), processor


def base_of(name_or_path: str) -> str:
    """The model that an adapter's directory belongs to."""
    return json.loads((Path(name_or_path) / "adapter_config.json").read_text())["base_model_name_or_path"]


# ---- merging -------------------------------------------------------------------------------------------------------


def merge_adapters(model: nn.Module) -> None:
    """Adds each adapter to its weight, W + (alpha / r) B A in fp32, and takes it off the layer."""
    for layer in adapted_layers(model).values():
        merged = layer.weight.data.float() + layer.lora_scale * (layer.lora_B.data @ layer.lora_A.data).float()
        layer.weight.data.copy_(merged)
        del layer.lora_A, layer.lora_B
        layer.__class__ = nn.Linear


def merge(checkpoint: str, out: str) -> None:
    """Writes base plus adapter as a Hugging Face directory, in the base's dtype; it is whole or not there."""
    source, target = Path(checkpoint), Path(out)
    if not is_adapter(checkpoint):
        raise ValueError(f"{source}: no adapter_config.json: a directory of OUT/checkpoints of a LoRA run is expected")
    if target.exists():
        raise ValueError(f"{target} exists: name a directory that does not")
    model, processor = load_any(checkpoint, dtype=torch.float32)
    merge_adapters(model)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(AutoConfig.from_pretrained(base_of(checkpoint)).dtype or torch.float32).save_pretrained(partial)
    if not (source / "tokenizer_config.json").exists():  # an adapter of PEFT's own
        processor.save_pretrained(partial)
    for path in source.iterdir():  # tokenizer, processor, chat template: all but the adapter and the training state
        if path.is_file() and not path.name.startswith(("adapter_", "state-", "trainer.json")):
            shutil.copyfile(path, partial / path.name)
    partial.rename(target)


def main(argv: list[str]) -> None:
    if len(argv) != 3 or argv[0] != "merge":
        raise SystemExit("usage: python lora.py merge CHECKPOINT OUT    write base and adapter as one model")
    merge(argv[1], argv[2])


if __name__ == "__main__":
    main(sys.argv[1:])
