"""A folder imports only from those before it, and each heavy library has its few places."""

import ast
import re
import runpy
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kl_f8_train"
ORDER = ("root", "core", "data weights", "run score", "publish check", "top")
TOP = {"arguments", "next_command", "demo", "__main__"}
PLACES = {
    "pytorch_lightning": "core.step run.callback run.compiling run.log run.prefetch run.saving "
    "run.start run.train run.trainer run.validation run.watchdog",
    "omegaconf": "config",
    "webdataset": "data.index",
    "lpips": "core.perceptual",
    "torch_fidelity": "score.inception",
    "safetensors": "weights.weight_file",
    "wandb": "run.tracking",
}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}


def rank(module: str) -> tuple[int, str]:
    """Of the folder of a module: its place in the order, and its name."""
    folder = "top" if module in TOP else module.rpartition(".")[0] or "root"
    return next(i for i, folders in enumerate(ORDER) if folder in folders.split()), folder


def imports(path: Path) -> set[str]:
    """Dotted names of all imports, also those inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def siblings(module: str) -> set[str]:
    """Modules of this package that a module imports."""
    inner = {name.removeprefix("kl_f8_train.") for name in imports(MODULES[module])}
    return {found for found in (m for m in MODULES for n in inner if f"{n}.".startswith(f"{m}."))}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_the_folders_before(module):
    mine, folder = rank(module)
    for other in siblings(module):
        theirs, its_folder = rank(other)
        assert theirs < mine or folder == its_folder, f"{module} imports {other}"


def test_no_module_imports_itself_by_way_of_others():
    order = list(TopologicalSorter({m: siblings(m) for m in MODULES}).static_order())
    assert len(order) == len(MODULES) > 15


@pytest.mark.parametrize("library", PLACES)
def test_library_has_its_places(library):
    users = [m for m in MODULES if any(n.split(".")[0] == library for n in imports(MODULES[m]))]
    assert users == sorted(PLACES[library].split())


def test_the_packages_themselves_import_nothing():
    lazily = {"importlib", "typing.Any"}  # the library's names, when they are first used
    packages = sorted(PACKAGE.rglob("__init__.py"))
    assert [path for path in packages if imports(path) - lazily] == []


def test_the_house_keeps_its_measures():
    """Of `python tests/benchmarks/house.py`, which prints them."""
    house = runpy.run_path(str(PACKAGE.parent / "tests" / "benchmarks" / "house.py"))
    found = house["modules"]()
    (lines, longest), *_ = house["longest_functions"](found)
    assert lines <= house["LIMIT"], longest
    assert house["floors"](house["imported"](found)) <= 12
    repeated = house["repeated_names"](found)
    assert len(repeated) <= 10, repeated
    assert house["unused_names"](found) == []


def test_the_way_of_a_batch_stays_short():
    """What a newcomer reads to follow one iteration, traced in a run of its own."""
    program = PACKAGE.parent / "tests" / "benchmarks" / "house.py"
    command = [sys.executable, str(program), "--way"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    lines, files = map(int, re.search(r"batch: (\d+) lines in (\d+) files", out).groups())
    assert 300 < lines <= 750, out
    assert 5 < files <= 8, out
