"""A command line becomes a config: one frozen dataclass per command, one option per field.

The command line, `--help`, config.json and the code use the same names. Plain argparse on purpose: torch and
transformers take seconds to import, and a mistyped option or `--help` should answer at once.
"""

import argparse
import difflib
import json
import math
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")
USER_ERROR = 2  # exit code of a command that was given something it cannot use


def option(default: Any, help: str, *, least: float | None = None, above: float | None = None) -> Any:
    """A field of a config: its default, its line in `--help`, and the smallest value it may have."""
    metadata = {"help": help, "least": least, "above": above}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(config_field: Any) -> Any:
    """The default of a field of a config."""
    return config_field.default if config_field.default is not MISSING else config_field.default_factory()


def check_bounds(config: Any) -> None:
    """Refuses a number below the bound that its option states."""
    for config_field in fields(config):
        value, bounds = getattr(config, config_field.name), config_field.metadata
        if value is None or isinstance(value, str):  # not given, or a word that stands for a number
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{config_field.name} is {value}: a finite number is expected")
        if bounds["least"] is not None and value < bounds["least"]:
            raise ValueError(f"{config_field.name} is {value}: it must be at least {bounds['least']:g}")
        if bounds["above"] is not None and value <= bounds["above"]:
            raise ValueError(f"{config_field.name} is {value}: it must be above {bounds['above']:g}")


def config_from_command_line(config_class: type[Config], argv: Sequence[str], preset: dict) -> Config:
    """The config that a command line describes; ends the process with one line if the command line is wrong."""
    try:
        return parse_options(config_class, argv, preset=preset)
    except ValueError as error:
        if "--traceback" in argv:
            raise
        if os.environ.get("RANK", "0") == "0":  # under torchrun every process reads the same command line
            print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


def parse_options(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    preset: dict | None = None,
) -> Config:
    """The config that a command line describes; an unknown option is an error.

    Where no --model is given, `preset` (the toy's options) replaces the defaults. With --resume the saved options of
    that run do. A --lora_rank brings its own defaults, which all of these outrank.
    """
    given = _read(config_class, argv)
    if given.get("resume"):
        defaults = _saved_options(Path(given["resume"]), config_class)
        _refuse_another_run(config_class, given, defaults)
    elif "model" in given or given.keys() & {"predictions", "compare"}:
        defaults = {}
    else:
        defaults = dict(preset or {})
        if given.get("mix"):  # it names the data files itself
            defaults = {
                name: value for name, value in defaults.items() if name not in ("data", "image_root", "eval_data")
            }
    recipe = config_class.LORA_DEFAULTS if given.get("lora_rank") else {}
    return config_class(**{**recipe, **defaults, **given})


def _read(config_class: type, argv: Sequence[str]) -> dict:
    """The options that the command line names, converted to their types."""
    parser = build_parser(config_class)
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ValueError(_unknown_option(unknown[0], list(argv), [f"--{entry.name}" for entry in fields(config_class)]))
    return vars(given)


def _unknown_option(word: str, argv: list[str], known: list[str]) -> str:
    if not word.startswith("-"):
        place = argv.index(word) if word in argv else 0
        before = argv[place - 1] if place else "the command"
        hint = "; several data files are described by --mix FILE.json" if before.endswith((".jsonl", ".json")) else ""
        return f"{word!r} after {before!r} belongs to no option: put a text with spaces in quotes{hint}"
    name = word.split("=")[0]
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown option {name}" + (f": did you mean {near[0]}?" if near else ": --help lists all options")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


class _HelpFormatter(argparse.RawTextHelpFormatter):
    """Names in one column, texts in another, without argparse's brackets."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=120)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return action.metavar or ""


def build_parser(config_class: type) -> argparse.ArgumentParser:
    """The argparse parser of a config class; options that are not given are absent from its result.

    `config_class.GROUPS` are the groups in `--help`, in their order: base classes whose docstring is the title.
    """
    description = (config_class.__doc__ or "").strip()
    parser = _Parser(
        prog=getattr(config_class, "PROGRAM", None),  # None: the name of the file
        usage="python %(prog)s [--option value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    hints, added = get_type_hints(config_class), set()
    for group_class in config_class.GROUPS:
        group = parser.add_argument_group(group_class.__doc__.strip().splitlines()[0].rstrip("."))
        for entry in fields(config_class):
            if entry.name in group_class.__annotations__ and entry.name not in added:
                added.add(entry.name)
                group.add_argument(f"--{entry.name}", default=argparse.SUPPRESS, **_argument(entry, hints[entry.name]))
    return parser


def _argument(entry: Any, kind: Any) -> dict:
    """The keywords of add_argument for a field of that type."""
    options = {"help": _help(entry).replace("%", "%%")}
    if get_origin(kind) in (types.UnionType, Union):  # a type or None, which means that it was not given; or a word
        kind, other = get_args(kind)
        if get_origin(other) is Literal:
            [word] = get_args(other)
            return options | {"type": partial(_number_or, word), "metavar": f"N|{word}"}
    if get_origin(kind) is Literal:
        return options | {"choices": get_args(kind), "metavar": "|".join(filter(None, get_args(kind)))}
    if get_origin(kind) is list:
        return options | {"nargs": "+", "type": get_args(kind)[0], "metavar": "A B ..."}
    if kind is bool:
        return options | {"nargs": "?", "const": True, "type": _boolean, "metavar": ""}
    return options | {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


def _help(entry: Any) -> str:
    """The help line of an option, with its default unless that says nothing."""
    default = default_of(entry)
    if default is None or default is False or default in ("", []):
        return entry.metadata["help"]
    told = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    return f"{entry.metadata['help']} (default: {told})"


def _number_or(word: str, text: str) -> int | str:
    try:
        return text if text == word else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor {word}") from None


def _boolean(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


# ---- a run that is resumed -----------------------------------------------------------------------------------------


def _saved_options(run: Path, config_class: type) -> dict:
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --resume takes the output directory of a run")
    try:
        saved = json.loads(path.read_text())["options"]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): start a new run, or write the file again") from None
    except (KeyError, TypeError):
        raise ValueError(f"{path} holds no options: --resume takes the directory of a run, not a checkpoint") from None
    names = {entry.name for entry in fields(config_class)}
    differ = sorted(names ^ set(saved))
    if differ:
        raise ValueError(
            f"{path} was written by another command or another version of this one: {len(differ)} options differ, as "
            f"{', '.join(differ[:3])}; resume it with the command that began it"
        )
    return {**saved, "resume": str(run), "output_dir": str(run)}


def _refuse_another_run(config_class: type, given: dict, saved: dict) -> None:
    """Refuses an option whose value differs from the saved one, unless the class lists it as free to change."""
    for name, value in given.items():
        if name not in config_class.FREE_ON_RESUME and value != saved[name]:
            raise ValueError(
                f"{name} was {saved[name]!r} in the run that is resumed and is {value!r} now: leave it out, or start a "
                "new run"
            )
