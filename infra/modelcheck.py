"""What is missing or damaged in a model directory, told by file before torch is even imported."""

import json
import re
import struct
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def check_model(name: str) -> None:
    """Refuses a path that holds no usable model; a name that may be one on the hub passes."""
    path = Path(name)
    if path.is_symlink() and not path.exists():
        raise ValueError(f"model {name} is a link to {path.readlink()}, which does not exist")
    if path.is_file():
        raise ValueError(f"model {name} is a file: a directory with config.json and *.safetensors is expected")
    if path.is_dir():
        _check_directory(path)
    elif not _may_be_on_the_hub(name):
        hint = "; write the path with / instead of \\" if "\\" in name else ""
        if path.name == "best" and (path.parent / "checkpoints").is_dir():
            hint = f"; nothing has beaten the start of that run yet: give one of {path.parent / 'checkpoints'}"
        raise ValueError(f"model {name}: no such directory{hint}")


def _may_be_on_the_hub(name: str) -> bool:
    """Whether it reads as "owner/name" or "name", and "owner" is no directory here."""
    owner, _, rest = name.rpartition("/")
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None and not (owner and Path(owner).is_dir())


def _check_directory(directory: Path) -> None:
    if (directory / "adapter_config.json").is_file():
        base = _json(directory / "adapter_config.json").get("base_model_name_or_path")
        if not base:
            raise ValueError(f"{directory / 'adapter_config.json'} names no base_model_name_or_path")
        check_model(base)
        _check_weights(directory / "adapter_model.safetensors")
        return
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise ValueError(f"model {directory}: it has no config.json; {_contents(directory)}")
    config = _json(config_path)
    if "options" in config and "model_type" not in config:
        raise ValueError(
            f"model {directory} is the directory of a run: give one of its checkpoints, as {directory}/best"
        )
    if not config.get("model_type"):
        raise ValueError(f"{config_path} names no model_type: it is not the config of a Hugging Face model")
    for kind, names in (("tokenizer", TOKENIZER_FILES), ("processor", PROCESSOR_FILES)):
        if not any((directory / name).is_file() for name in names):
            raise ValueError(f"model {directory}: it has no {kind}; one of {', '.join(names)} is expected")
    index = directory / "model.safetensors.index.json"
    names = {path.name for path in directory.glob("*.safetensors")}
    if index.is_file():
        names = set(_json(index).get("weight_map", {}).values())
    if not names:
        if list(directory.glob("*.bin")):
            raise ValueError(
                f"model {directory}: its weights are pickled (*.bin), which can run code when they are read: convert "
                "them to safetensors"
            )
        raise ValueError(f"model {directory}: it has no weights (*.safetensors); {_contents(directory)}")
    for name in sorted(names):
        _check_weights(directory / name)


def _contents(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    return f"it holds {', '.join(names[:8])}" if names else "it is empty"


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: a JSON object is expected")
    return value


def _check_weights(path: Path) -> None:
    """Refuses a safetensors file that is missing, cut off or no such file, by its header alone."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy or download the model again")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ValueError(f"{path} is damaged: {size:,} bytes without a whole header; copy or download it again")
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: its header is no JSON ({error}); copy or download it again") from None
    if size != 8 + length + end:
        raise ValueError(f"{path} is cut off: {size:,} of {8 + length + end:,} bytes; copy or download it again")
