"""A module imports only from lower layers, and each heavy library has its one place."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kl_f8_train"
LAYERS = (
    {"errors", "units", "lifetime"},
    {"config", "images", "model", "discriminator", "losses", "ema", "metrics", "plan"}
    | {"formats", "unpickle", "hub", "compare", "origins", "curves", "nonfinite", "processes"},
    {"checkpoint", "pack", "compute", "cost", "status"},
    {"cache", "scaling", "tracking"},
    {"published", "shards"},
    {"perceptual", "inception"},
    {"data", "scores"},
    {"finetuner", "evaluate", "identity"},
    {"state", "half_precision"},
    {"callbacks", "watchdog", "benchmark", "report", "card"},
    {"train", "export", "inject"},
    {"demo", "doctor"},
    {"__main__"},
)
LAYER = {module: number for number, modules in enumerate(LAYERS) for module in modules}
PLACES = {
    "pytorch_lightning": {"finetuner", "callbacks", "watchdog", "train"},
    "omegaconf": {"config"},
    "webdataset": {"shards"},
    "lpips": {"perceptual"},
    "torch_fidelity": {"inception"},
    "safetensors": {"checkpoint"},
    "wandb": {"tracking"},
    "diffusers": {"benchmark"},  # what --against measures against, if it is installed
}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(module: str) -> set[str]:
    """Dotted names of all imports, also those inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def siblings(module: str) -> set[str]:
    """Modules of this package that a module imports."""
    inner = (name.split(".") for name in imports(module))
    return {name[1] for name in inner if name[0] == PACKAGE.name and len(name) > 1} - {
        "__version__"
    }


def test_every_module_has_a_layer():
    assert len(MODULES) > 15
    assert set(MODULES) <= set(LAYER)
    assert sum(map(len, LAYERS)) == len(LAYER)
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    upwards = {name for name in siblings(module) if LAYER[name] >= LAYER[module]}
    assert upwards == set()


@pytest.mark.parametrize("library", PLACES)
def test_library_has_its_place(library):
    users = {m for m in MODULES if any(name.split(".")[0] == library for name in imports(m))}
    assert users == PLACES[library]


def test_the_package_itself_imports_nothing():
    assert imports("__init__") == set()
