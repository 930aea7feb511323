"""Checkpoints: written whole or not at all, readable by any number of ranks, never pickled.

A checkpoint is a Hugging Face directory (the weights in the compute dtype) plus the training state: for each rank a
safetensors file with its rows of the fp32 masters, of the optimizer's moments and of a reference that follows the
policy, and one JSON. Any number of ranks can read it, because a shard is a range of rows.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers.utils import cached_file

from infra.parallel import World, all_gather, all_sum
from infra.protocol import EVALUATION_FILE
from model.lora import adapted_layers, save_adapter
from model.vlm import counted_pixels, trainable

SHARD_SIZE = "5GB"  # of a weights file, as on the hub; more weights are several files and an index
# A safetensors file under another name: vLLM and SGLang load every *.safetensors of a directory as weights.
STATE_FILE = "state-{:05d}.training"
# The other files of a Hugging Face VLM directory; copied, so that other engines find what they expect.
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.model",
    "added_tokens.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


class SaveFailed(Exception):
    """A checkpoint could not be written; what was there before is unchanged."""


@dataclass(frozen=True)
class Packaging:
    """What a checkpoint holds besides tensors."""

    source: str  # the model that training began with; its tokenizer and processor files are copied
    dtype: torch.dtype  # of the weights files
    pixels: tuple[int, int]  # the pixel budget (least, most) of the training, for the processor's config
    evaluation: dict  # what the run evaluates under, for eval.py: evaluation.json
    reference: dict[str, Tensor] = field(default_factory=dict)  # this rank's part of a reference that follows


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: dict,
    world: World,
    packaging: Packaging,
) -> None:
    """Writes model and training state beside `directory`, then renames: the checkpoint is whole or not there.

    `state` goes into trainer.json. If one rank cannot write, all ranks raise SaveFailed.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    with _all_or_none(world, partial):
        if world.first:
            for left in directory.parent.glob(".*.partial"):  # of a run that died while saving
                shutil.rmtree(left, ignore_errors=True)  # on NFS a file that somebody reads keeps its directory
            partial.mkdir(parents=True)
    adapters = bool(adapted_layers(model))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapters)
    weights = model.state_dict() if world.mesh is None else get_model_state_dict(model, options=options)
    with _all_or_none(world, partial):
        if _shard_index(world) is not None:
            path = partial / STATE_FILE.format(_shard_index(world))
            save_file(_finite(_training_tensors(model, optimizers, packaging.reference)), path)
            _finish_file(path)
        if world.first:
            if adapters:
                trained = {name: weights[name] for name, _ in trainable(model)}
                save_adapter(partial, model, trained, packaging.source)
            else:
                _save_weights(partial, model, weights, packaging.dtype)
            pixels = counted_pixels(model.config.model_type, packaging.pixels)
            copy_side_files(packaging.source, partial, pixels)
            (partial / EVALUATION_FILE).write_text(json.dumps(packaging.evaluation, indent=1))
            (partial / "trainer.json").write_text(json.dumps({**state, "num_shards": world.num_shards}, indent=1))
            for path in partial.iterdir():  # the rename must not reach the disk before the files
                _finish_file(path)
            sync_file(partial)
    with _all_or_none(world, partial):
        if world.first:
            if directory.exists():
                remove_directory(directory)
            partial.rename(directory)
            sync_file(directory.parent)


@contextmanager
def _all_or_none(world: World, partial: Path) -> Iterator[None]:
    """Waits for all ranks at its end; if one could not write, the partial directory goes and all raise SaveFailed."""
    reason = ""
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        reason = f"{error} (rank {world.rank})"
    if all_sum({"failed": float(bool(reason))}, world)["failed"] == 0:
        return
    reasons = all_gather([reason] if reason else [], world)
    if world.first:
        shutil.rmtree(partial, ignore_errors=True)  # the next save removes what stays now
    raise SaveFailed("; ".join(reasons))


def _save_weights(directory: Path, model: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    if model.config.tie_word_embeddings:  # transformers drops a tied head by its shared storage, which the cast ends
        weights.pop("lm_head.weight", None)
    # not safetensors by hand: it maps names back to the hub's
    model.save_pretrained(directory, state_dict=weights, max_shard_size=SHARD_SIZE)
    _set_config_dtype(directory / "config.json", dtype)


def _finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors; raises if one holds NaN or infinity, which must not replace a good checkpoint."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    return tensors


def remove_directory(directory: Path) -> None:
    """Renames a checkpoint, then removes it: if that is interrupted, the rest does not pass for a whole one."""
    doomed = directory.with_name(f".{directory.name}.old.partial")
    directory.rename(doomed)
    shutil.rmtree(doomed)


def sync_file(path: Path) -> None:
    """Waits until a file, or the list of names in a directory, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text_safely(path: Path, text: str) -> None:
    """Writes a small file beside `path`, then renames it: a process killed in between leaves the old file."""
    fresh = path.with_name(f".{path.name}.partial")
    fresh.write_text(text, encoding="utf-8")
    sync_file(fresh)
    fresh.rename(path)


def _finish_file(path: Path) -> None:
    """Gives a file the permissions of any new file and waits until it is on the disk.

    safetensors writes 0600, which colleagues on a shared disk cannot read.
    """
    mask = os.umask(0o022)  # only setting the mask tells what it was
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    sync_file(path)


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    """Writes the dtype of the weights files into config.json; save_pretrained writes that of the masters."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n")


def copy_side_files(source: str, directory: Path, pixels: tuple[int, int]) -> None:
    """Copies the tokenizer, processor and chat template files of a model, and sets the processor's pixel budget."""
    for name in SIDE_FILES:
        path = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if path is not None:
            shutil.copyfile(path, directory / name)
    for name in ("preprocessor_config.json", "processor_config.json"):  # the hub's layout, and that of transformers 5
        if (path := directory / name).exists():
            config = json.loads(path.read_text())
            images = config.get("image_processor", config)
            if "longest_edge" in images.get("size", {}) or "max_pixels" in images:
                least, most = pixels  # so that inference resizes images as training did
                images |= {"size": {"shortest_edge": least, "longest_edge": most}}
                images |= {key: value for key, value in (("min_pixels", least), ("max_pixels", most)) if key in images}
                path.write_text(json.dumps(config, indent=2) + "\n")


def load_training_state(
    directory: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], world: World
) -> dict:
    """Restores the masters and moments of a checkpoint, however many ranks wrote it; returns its JSON."""
    path = directory / "trainer.json"
    if not path.is_file():
        raise ValueError(f"{directory}: no training state (trainer.json); resume from a directory of OUT/checkpoints")
    try:
        state = json.loads(path.read_text())
        files = [_open_state(directory / STATE_FILE.format(shard)) for shard in range(state["num_shards"])]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): remove {directory} to resume from the checkpoint before it"
        ) from None
    _check_fit(directory, files, model, optimizers)
    names = set(files[0].keys())
    with torch.no_grad():
        for name, parameter in trainable(model):
            local_part(parameter).copy_(_read_rows(files, f"master.{name}", parameter, world))
            for optimizer in optimizers:
                for key in [key for key in names if key.startswith("moment.") and key.endswith(f":{name}")]:
                    _restore_moment(optimizer, parameter, key, files, world)
    return state


def load_reference_values(directory: Path, model: nn.Module, values: dict[str, Tensor], world: World) -> None:
    """Restores the values of a reference that follows, however many ranks wrote them."""
    state = json.loads((directory / "trainer.json").read_text())
    files = [_open_state(directory / STATE_FILE.format(shard)) for shard in range(state["num_shards"])]
    for name, parameter in trainable(model):
        values[name].copy_(_read_rows(files, f"reference.{name}", parameter, world))


def _open_state(path: Path):
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is missing or cut off ({error}): remove {path.parent} to resume from the checkpoint before it"
        ) from None


def _check_fit(directory: Path, files: list, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Refuses a training state whose tensors differ from what is trained here, and names the first differences."""
    saved = [
        {key: tuple(file.get_slice(key).get_shape()) for key in file.keys() if not key.startswith("reference.")}
        for file in files
    ]
    expected, wrong = _expected_shapes(saved[0], model, optimizers), []
    for shard, shapes in enumerate(saved):
        wrong += [f"{key} belongs to nothing trained here" for key in shapes.keys() - expected.keys()]
        for key, whole in expected.items():
            start, stop = _row_range(whole[0], len(files), shard) if whole else (0, 1)
            part = (stop - start, *whole[1:]) if whole else ()
            if key not in shapes:
                wrong.append(f"{key} is missing")
            elif shapes[key] != part and (start < stop or 0 not in shapes[key]):
                wrong.append(f"{key} is {list(shapes[key])} instead of {list(part)}")
    if wrong:
        raise ValueError(
            f"{directory} does not fit what is trained here, {len(wrong)} differences: {'; '.join(wrong[:3])}. Resume "
            "with the model and the options of that run, or start a new run"
        )


def _expected_shapes(saved: dict[str, tuple], model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict:
    """The full shape of every tensor of a training state; an optimizer keeps the same moments for a whole group."""
    names = {id(parameter): (name, tuple(parameter.shape)) for name, parameter in trainable(model)}
    expected = {f"master.{name}": shape for name, shape in names.values()}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        own = dict(names[id(parameter)] for parameter in group["params"])
        kinds = {}
        for key, shape in saved.items():
            kind, _, name = key.partition(":")
            if name in own:
                kinds[kind] = bool(shape)  # a count of steps is a scalar
        expected |= {f"{kind}:{name}": own[name] if whole else () for kind, whole in kinds.items() for name in own}
    return expected


def _restore_moment(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, files: list, world: World
) -> None:
    group = next((g for g in optimizer.param_groups if any(parameter is other for other in g["params"])), None)
    if group is None:
        return
    kind = key.removeprefix("moment.").split(":")[0]
    if not files[0].get_slice(key).get_shape():  # a count of steps, the same on every rank
        device = parameter.device if group.get("fused") else "cpu"  # as AdamW itself does
        optimizer.state[parameter][kind] = files[0].get_tensor(key).to(device)
        return
    moment = torch.zeros_like(parameter)
    local_part(moment).copy_(_read_rows(files, key, parameter, world))
    optimizer.state[parameter][kind] = moment


def _training_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], reference: dict[str, Tensor]
) -> dict[str, Tensor]:
    tensors = {f"reference.{name}": part for name, part in reference.items()}
    for name, parameter in trainable(model):
        tensors[f"master.{name}"] = local_part(parameter)
        for optimizer in optimizers:
            for kind, value in optimizer.state.get(parameter, {}).items():
                tensors[f"moment.{kind}:{name}"] = local_part(value)
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor; a whole one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _read_rows(files: list, key: str, parameter: nn.Parameter, world: World) -> Tensor:
    """This rank's rows of a tensor that was cut into len(files) ranges of rows."""
    rows = parameter.shape[0]
    start, stop = _row_range(rows, world.num_shards, 0 if world.mesh is None else world.mesh["shard"].get_local_rank())
    parts = []
    for shard, file in enumerate(files):
        first, end = _row_range(rows, len(files), shard)
        low, high = max(first, start), min(end, stop)
        if low < high:
            parts.append(file.get_slice(key)[low - first : high - first])
    if not parts:  # fewer rows than ranks: this one holds none
        return local_part(parameter)
    return torch.cat(parts)


def _row_range(rows: int, shards: int, shard: int) -> tuple[int, int]:
    """The rows of a shard as FSDP2 cuts them (torch.chunk): equal parts, rounded up, the last ones shorter or empty."""
    size = -(-rows // shards)
    return min(shard * size, rows), min((shard + 1) * size, rows)


def _shard_index(world: World) -> int | None:
    """The number of the state file that this rank writes; None with HSDP on all but the first replica."""
    if world.mesh is None:
        return 0
    if world.mesh.ndim == 2 and world.mesh["replicate"].get_local_rank() > 0:
        return None
    return world.mesh["shard"].get_local_rank()
