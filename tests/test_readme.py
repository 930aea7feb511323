"""README.md and docs/: what they name exists, their tables are those of the code, and their examples run."""

import ast
import importlib
import json
import re
import shlex
import sys
import threading
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from helpers import options, run

import sft
import toy
import train
from infra import config as options_of
from infra.config import EvalConfig, SftConfig, TrainConfig
from infra.options import build_parser, parse_options
from infra.plugins import check_plugin
from infra.runlog import LOGS, read_rows
from metrics.summary import summarize
from model.families import FAMILIES
from rewards import REWARDS

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
README, TRAINING, METRICS = PAGES["README.md"], PAGES["docs/training.md"], PAGES["docs/metrics.md"]
COMMANDS = {"train.py": TrainConfig, "sft.py": SftConfig, "eval.py": EvalConfig}
FOLDERS = ("model", "infra", "metrics", "toy", "tools", "tools/findings")
# Options of torchrun and srun, and one that every command has.
FOREIGN = set("standalone nnodes nproc_per_node rdzv_backend rdzv_endpoint nodes ntasks-per-node help".split())
# Options of the tools that parse their own: card, findings, memory and rehearse.
FOREIGN |= set(
    "tokens sequences prompts profile quick jobs output_dir gpus completion_tokens image_tokens sizes".split()
)


def section(page, title):
    """The text from a heading to the next one of its level or above."""
    level = title.split(" ")[0]
    start = page.index(f"\n{title}\n") + len(title) + 2
    end = re.compile(rf"^#{{1,{len(level)}}} ", re.M).search(page, start)
    return page[start : end.start() if end else len(page)]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.S | re.M)


def rows_of_tables(text):
    """The cells of each table row, but for headings and separators."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in row] for row in rows]
    separators = [number for number, row in enumerate(rows) if set("".join(row)) <= set("-:")]
    return [row for number, row in enumerate(rows) if number not in separators and number + 1 not in separators]


def code_in(text):
    return re.findall(r"`([^`]+)`", text)


# ---- names ---------------------------------------------------------------------------------------------------------


def test_every_option_that_is_named_exists():
    known = {entry.name for config in COMMANDS.values() for entry in fields(config)} | FOREIGN
    for path in ROOT.glob("tools/*.py"):
        for thing in vars(importlib.import_module(f"tools.{path.stem}")).values():
            if isinstance(thing, type) and is_dataclass(thing):
                known |= {entry.name for entry in fields(thing)}
    for name, page in PAGES.items():
        assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", page)) <= known, name


def test_every_file_that_is_named_exists():
    examples = {"judge.py", "file.py"}
    for name, page in PAGES.items():
        for path in set(re.findall(r"[\w/]+\.py\b", page)) - examples:
            alone = "/" not in path and any((ROOT / folder / path).is_file() for folder in FOLDERS)  # in the file tree
            assert alone or (ROOT / path).is_file(), f"{name}: {path}"


def test_every_function_that_is_named_exists():
    modules = "|".join([path.stem for path in ROOT.glob("*.py")] + [rf"(?:{'|'.join(FOLDERS)})\.\w+"])
    for name, page in PAGES.items():
        for module, path in re.findall(rf"`({modules})\.([\w.]+)`", page):
            if path not in ("py", "md", "json", "jsonl") and (ROOT / f"{module.replace('.', '/')}.py").is_file():
                resolve(module, path, name)
    for pieces, file, *_ in rows_of_tables(section(README, "## What to copy")):
        for piece in code_in(pieces):
            resolve(code_in(file)[0].removesuffix(".py").replace("/", "."), piece, "README.md")


def resolve(module, path, page):
    thing = importlib.import_module(module)
    for part in path.split("."):
        assert hasattr(thing, part), f"{page}: {module} has no {path}"
        thing = getattr(thing, part)


def test_every_link_leads_somewhere():
    for name, page in PAGES.items():
        text = re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)
        for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), f"{name}: {target}"
            titles = re.findall(r"^#+ (.*)", file.read_text(), re.M) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not anchor or anchor in slugs, f"{name}: {target}"


def test_the_file_tree_is_the_real_one():
    stated, folder = set(), ""
    for indent, path in re.findall(r"^( *)([\w./]+)", blocks(section(README, "## Files"), "")[0], re.M):
        folder = folder if indent else ""
        if path.endswith("/"):
            folder = path
            assert (ROOT / path).is_dir(), path
        else:
            stated.add(folder + path)
    real = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).glob("*.py"))]
    assert stated == {str(path.relative_to(ROOT)) for path in real if path.name != "__init__.py"}


# ---- commands and examples -----------------------------------------------------------------------------------------


def command_lines(page):
    """(script, arguments) of each line of a bash block that runs one of the three commands."""
    found, variables = [], {}
    for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        if assignment := re.match(r'(\w+)="(.*)"$', line):
            variables[assignment[1]] = assignment[2]
        elif command := re.match(r"(?:.*&& )?(?:python|torchrun .*?) ?(train\.py|sft\.py|eval\.py)(.*)", line):
            found.append((command[1], [word for word in shlex.split(command[2]) if word != "..."]))
    return found


def test_every_command_is_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options_of, "check_model", lambda name: None)  # the models are not here
    [mix], [judge, *_] = blocks(TRAINING, "json"), blocks(TRAINING, "python")
    for name, text in {"mix.json": mix, "judge.py": judge, "base.json": "", "val.json": ""}.items():
        Path(name).write_text(text)
    found = [command for page in PAGES.values() for command in command_lines(page)]
    assert len(found) >= 15 and {script for script, _ in found} == COMMANDS.keys()
    for script, argv in found:
        known, unknown = build_parser(COMMANDS[script]).parse_known_args(argv)
        assert not unknown, (script, unknown)
        if "resume" not in known:
            parse_options(COMMANDS[script], argv, preset=toy.PRESETS[script.removesuffix(".py")])


def test_the_block_of_the_test_command_is_where_ci_looks_for_it():
    [block] = re.findall(r"^<!-- test command -->\n```bash\n(.*?)^```", README, re.S | re.M)
    assert block.strip().endswith("python -m pytest -q")


def test_the_judge_is_a_reward_that_can_be_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(blocks(TRAINING, "python")[0])
    check_plugin("judge.py:judge")


def test_the_pseudocode_names_the_functions_of_a_step_in_the_order_of_their_calls(
    checkpoint, scenes, tmp_path, monkeypatch
):
    stated = re.findall(r"# ([\w/]+\.py): ([\w.]+)", section(README, "## The algorithm"))
    called, real_step = [], train.train_step

    def note(frame, event, argument):
        if event == "call":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                called.append((path.relative_to(ROOT).as_posix(), frame.f_code.co_qualname))

    def step(run):
        threading.setprofile(note)  # prompts are built on a thread
        sys.setprofile(note)
        try:
            return real_step(run)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    monkeypatch.setattr(train, "train_step", step)
    run(checkpoint, scenes, tmp_path / "out", "--steps", "1", "--eval_every", "0", "--beta", "0.1")
    assert len(stated) == 12 and [pair for pair in stated if pair not in called] == []
    assert stated == sorted(stated, key=called.index)


def test_the_step_without_the_trainer_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    toy.ensure_data([str(toy.FILES["test"])])
    torch.manual_seed(0)
    [block], names = blocks(section(README, "## What to copy"), "python"), {}
    exec(block, names)
    assert len(names["group"]) == 8 and len(set(names["rewards"])) > 1 and names["figures"]["clamped"] == 0
    assert names["model"].lm_head.weight.grad.any()


def imports_of(path):
    """(files of ours, packages) that a file needs, with those of the files that it imports."""
    ours, packages = set(), set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            file = name.replace(".", "/") + ".py"
            if (ROOT / file).is_file():
                more, their_packages = imports_of(file)
                ours |= {file, *more}
                packages |= their_packages
            elif not (ROOT / name.split(".")[0]).is_dir() and not (ROOT / f"{name.split('.')[0]}.py").is_file():
                packages.add(name.split(".")[0])
    return ours, packages - sys.stdlib_module_names


def test_what_comes_with_a_piece_is_what_it_imports():
    for _, file, needs in rows_of_tables(section(README, "## What to copy")):
        ours, packages = imports_of(code_in(file)[0])
        stated = set(re.sub(r"`[^`]+`", "", needs).replace(";", ",").replace(" ", "").split(",")) - {""}
        assert set(code_in(needs)) == ours, file
        assert stated == packages - {"math_verify"}, file  # rewards.py works without it


def test_a_checkpoint_loads_as_the_page_says(checkpoint, scenes, tmp_path):
    run(checkpoint, scenes, tmp_path / "out", "--steps", "1", "--eval_every", "0")
    path = str(tmp_path / "out" / "checkpoints" / "step-000001")
    names = {}
    for block in blocks(section(PAGES["docs/recovery.md"], "## Loading a checkpoint elsewhere"), "python"):
        exec(block.replace("OUT/best", path), names)
    assert names["model"].config.model_type == "qwen2_5_vl"
    assert names["processor"].tokenizer.get_vocab() == names["tokenizer"].get_vocab()
    assert type(names["processor"].image_processor) is type(names["image_processor"])


# ---- tables --------------------------------------------------------------------------------------------------------


def test_the_table_of_rewards_has_each_with_its_range():
    stated = {code_in(name)[0]: value for name, _, value in rows_of_tables(section(README, "## Rewards"))}
    assert stated.keys() == REWARDS.keys()
    boxes = '[{"bbox_2d": [1, 1, 9, 9], "label": "cat"}, {"bbox_2d": [1, 1, 9, 9], "label": "cat"}]'
    answers = [
        "[1, 1, 9, 9]",
        "[2, 2, 9, 9]",
        '{"bbox_2d": [90, 90, 99, 99]}',
        f"```json\n{boxes}\n```",
        "None",
        "A",
        "7",
    ]
    texts = [f"<think></think><answer>{text}</answer>" for text in answers] + ["", "word " * 900, "so it is " * 900]
    for name, reward in REWARDS.items():
        values = {reward(text, answer) for text in texts for answer in ("[1, 1, 9, 9]", boxes, "None", "A", "yes", "7")}
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", stated[name])]
        if " or " in stated[name]:
            assert values <= set(numbers), name
        else:
            assert min(numbers) <= min(values) and max(values) <= max(numbers), name


def test_the_table_of_families_is_that_of_the_code():
    page = PAGES["docs/families.md"]
    stated = {code_in(name)[0]: space for name, _, space, _ in rows_of_tables(section(page, "## What is supported"))}
    assert stated == {name: family.box_space for name, family in FAMILIES.items()}
    code = (ROOT / "model" / "families.py").read_text() + (ROOT / "tests" / "test_families.py").read_text()
    lines = [line[1:] for line in blocks(page, "diff")[0].splitlines() if '"' in line]
    assert len(lines) == 4 and all(line in code for line in lines)


def without(argv, *names):
    """The command line without these options and their values."""
    places = [argv.index(name) for name in names]
    return [word for place, word in enumerate(argv) if place not in places and place - 1 not in places]


@pytest.fixture(scope="module")
def mixed_run(checkpoint, scenes, tmp_path_factory):
    """The directory of a run of two data files."""
    path = tmp_path_factory.mktemp("mixed")
    entries = [{"file": str(scenes / f"{name}.jsonl"), "image_root": str(scenes)} for name in ("train", "test")]
    (path / "mix.json").write_text(json.dumps(entries))
    argv = options(checkpoint, scenes, path / "out", "--steps", "2", "--mix", str(path / "mix.json"), "--beta", "0.1")
    train.main(parse_options(TrainConfig, [*without(argv, "--data", "--eval_data"), "--eval_every", "0"]))
    return path / "out"


def test_the_glossary_is_what_a_run_writes(mixed_run):
    glossary = section(METRICS, "## metrics.jsonl").split("### What to watch")[0]
    stated = {key for first, _ in rows_of_tables(glossary) for key in code_in(first)}
    written = {key for row in read_rows(mixed_run / "metrics.jsonl") for key in row}
    written = {re.sub(r"^(file|reward)/[^/]+", r"\1/NAME", key) for key in written}
    assert stated == written


def test_the_glossary_of_sft_is_what_its_run_writes(checkpoint, scenes, tmp_path):
    argv = options(checkpoint, scenes, tmp_path / "out", "--steps", "1", "--eval_every", "0")
    sft.main(parse_options(SftConfig, without(argv, "--group_size", "--log_completions_every")))
    [sentence] = re.findall(r"^`sft.py` writes (.*?)\n\n", METRICS, re.S | re.M)
    assert set(code_in(sentence)) == set(read_rows(tmp_path / "out" / "metrics.jsonl")[0])


def test_the_glossary_of_evaluations_is_what_they_write():
    about = {"id": "a", "question": "q", "truncated": False}
    items = [([0.0, 0.0, side, side], "cat") for side in (10.0, 50.0, 200.0)]
    rows = [
        about | {"iou": 0.6, "box": [1, 2, 3, 4]},
        about | {"predicted": items, "true": items, "unread": False},
        about | {"reward": 0.5},
    ]
    stated = {key for first, *_ in rows_of_tables(section(METRICS, "## eval.jsonl")) for key in code_in(first)}
    assert stated == set(summarize(rows))


def test_the_files_that_a_run_writes_are_listed(mixed_run):
    listed = code_in(section(PAGES["docs/recovery.md"], "## What a run writes"))
    names = {*LOGS, *(path.name for path in mixed_run.iterdir() if path.is_file())}
    names |= {path.name for path in (mixed_run / "checkpoints" / "step-000002").iterdir()}
    side_files = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"}
    assert names - side_files - {"generation_config.json"} <= set(listed)
