"""README.md: what it names exists, and its line counts are those of the files."""

import importlib
import re
from pathlib import Path

from model.vlm import FAMILIES

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text()


def test_every_module_is_in_the_file_table_with_its_length():
    stated = {name: int(lines) for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)}
    modules = (
        {path.name for path in HERE.glob("*.py")} - {path.name for path in HERE.glob("test_*.py")} - {"conftest.py"}
    )
    assert stated.keys() == modules
    for name, lines in stated.items():
        assert abs(len((HERE / name).read_text().splitlines()) - lines) <= 0.1 * lines, name


def test_every_test_and_function_the_readme_names_exists():
    tests = "\n".join(path.read_text() for path in HERE.glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name
    for module, path in re.findall(
        r"`(grpo|rewards|rollout|data|vlm|parallel|run|train|eval|sft)\.([A-Z_a-z.]+)`", README
    ):
        if path not in ("py", "jsonl"):
            thing = importlib.import_module(module)
            for part in path.split("."):
                thing = getattr(thing, part)


def test_the_table_of_families_is_that_of_the_code():
    stated = re.findall(r"^\| `(\w+)` \| [^|]+ \| (pixels|thousand) \|", README, re.M)
    assert dict(stated) == {name: family.box_space for name, family in FAMILIES.items()}
    [diff] = re.findall(r"```diff\n(.*?)```", README, re.S)
    code = (HERE / "vlm.py").read_text() + (HERE / "test_families.py").read_text()
    assert all(line[1:] in code for line in diff.splitlines() if '"' in line)


def test_every_option_the_readme_names_exists():
    import eval as evaluation
    import sft
    import toy
    import train
    from tools import bench, prepare

    fields = {
        name for module in (train, sft, evaluation, prepare, bench) for name in module.Config.__dataclass_fields__
    }
    foreign = {
        "standalone",
        "nproc_per_node",
        "nnodes",
        "node_rank",
        "rdzv_backend",
        "rdzv_endpoint",
        "nodes",
        "ntasks",
    }
    for name in re.findall(r"--(\w+)", README):
        assert name in fields | foreign | {"help"}, name
    assert toy.MODEL.is_dir()
