"""The package's own figures: sizes, names, imports, and what one iteration passes through.

    python tests/benchmarks/house.py            # a second: the files alone
    python tests/benchmarks/house.py --way      # and a run of three iterations, traced

The way of a batch is traced: every function of the package that runs from the end of one iteration
to the end of the next, on shards, in two micro-batches, with the adversarial term and with loaders
in the same process. A function counts with all its lines. Callbacks of `run/`, what they alone
call, layers of networks, and what the iteration before has cached do not count.
"""

import argparse
import ast
import contextlib
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = Path(__file__).parents[2] / "kl_f8_train"
CALLBACKS = f"{PACKAGE}/run/"
LIMIT = 60  # lines of a function, apart from the parser
PARSER = "build_parser"
LAYERS = ("core/model.py", "core/perceptual.py", "core/discriminator.py")
NOT_LAYERS = {  # of those files
    *("from_moments", "sample", "kl", "encode", "decode", "decode_at_last_layer", "last_layer"),
    "autocast",
}
RECIPE = (
    *("data.crop=64", "data.workers=0", "global_batch=4", "compute.per_device_batch=2"),
    *("log.pictures_every=0", "stop_iteration=3", "init.iteration=0"),
    *("adversarial.start_iteration=0", "adversarial.warmup_iterations=0"),
)
Modules = dict[str, tuple[Path, ast.Module]]


def modules() -> Modules:
    """Dotted name below the package -> its file and syntax tree."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): (
            path,
            ast.parse(path.read_text(encoding="utf-8")),
        )
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.stem != "__init__"
    }


def lines_of(node: ast.stmt) -> int:
    """Lines of a definition, without its decorators."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def longest_functions(found: Modules) -> list[tuple[int, str]]:
    """(lines, module:function), the longest first, without the parser."""
    functions = [
        (lines_of(node), f"{name}:{node.name}")
        for name, (_, tree) in found.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name != PARSER
    ]
    return sorted(functions, reverse=True)


def imported(found: Modules) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    graph: dict[str, set[str]] = {}
    for name, (_, tree) in found.items():
        names = {
            f"{node.module}.{alias.name}".removeprefix("kl_f8_train.")
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        graph[name] = {one for one in found if any(f"{n}.".startswith(f"{one}.") for n in names)}
    return graph


def floors(graph: dict[str, set[str]]) -> int:
    """Modules on the longest way down."""
    height: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in height:
            height[name] = 1 + max(map(floor, graph[name]), default=0)
        return height[name]

    return max(map(floor, graph))


def repeated_names(found: Modules) -> dict[str, list[str]]:
    """Public names that several modules define at their top level, and where."""
    homes: dict[str, list[str]] = defaultdict(list)
    for module, (_, tree) in found.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                homes[node.name].append(module)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    homes[ast.unparse(target)] += [module]
    public = {name: where for name, where in homes.items() if not name.startswith("_")}
    return {name: where for name, where in sorted(public.items()) if len(where) > 1}


def unused_names(found: Modules) -> list[str]:
    """Functions and classes at a top level that nothing in the package names."""
    used: set[str] = set()
    for _, tree in [*found.values(), (None, ast.parse((PACKAGE / "__init__.py").read_text()))]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.ImportFrom):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value.rpartition(".")[2])
    return [
        f"{module}:{node.name}"
        for module, (_, tree) in found.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in used
    ]


# --- the way of a batch ---------------------------------------------------------------------


def traced_way() -> dict[str, dict[str, int]]:
    """File -> function -> lines, of all that one iteration of a small run passes through."""
    sys.path.insert(0, str(PACKAGE.parent))
    from pytorch_lightning import Callback

    from kl_f8_train import config, shipped
    from kl_f8_train.data.pack import pack
    from kl_f8_train.run import train
    from kl_f8_train.settings import Config

    called: set[tuple[str, int]] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and is_ours(frame) and not by_callback(frame):
            called.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    def is_ours(frame: FrameType) -> bool:
        return frame.f_code.co_filename.startswith(str(PACKAGE))

    def by_callback(frame: FrameType | None) -> bool:
        """Whether a callback of `run/` called it, perhaps by way of others."""
        while (frame := frame and frame.f_back) and "lightning" not in frame.f_code.co_filename:
            if frame.f_code.co_filename.startswith(CALLBACKS):
                return True
        return False

    class Tracer(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            sys.setprofile(note if module.run_state.iteration == 1 else None)

    build = train.build_trainer

    def with_tracer(recipe: Config, callbacks: list[Any]) -> Any:
        return build(recipe, [*callbacks, Tracer()])

    train.build_trainer = with_tracer  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        pack(shipped.TRAINING, Path(name) / "shards", per_shard=20)
        places = [f"data.sources={name}/shards", f"run_dir={name}/run"]
        train.train(config.load(config.find_recipe("demo"), [*places, *RECIPE]))
    return _counted(called)


def _counted(called: set[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """The lines of the functions that begin at these places and are of the way."""
    way: dict[str, dict[str, int]] = defaultdict(dict)
    for path, tree in modules().values():
        file = path.relative_to(PACKAGE).as_posix()
        for name, node in _functions(tree):
            begins = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            layer = file in LAYERS and not NOT_LAYERS & {name, name.rpartition(".")[2]}
            if (str(path), begins) in called and not layer and not file.startswith("run/"):
                way[file][name] = lines_of(node) + node.lineno - begins
    return way


def _functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    """Functions and methods with their classes' names."""
    found = [(node.name, node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    for outer in tree.body:
        if isinstance(outer, ast.ClassDef):
            inner = [node for node in outer.body if isinstance(node, ast.FunctionDef)]
            found += [(f"{outer.name}.{node.name}", node) for node in inner]
    return found


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", action="store_true", help="trace an iteration, too")
    found = modules()
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path, _ in found.values()]
    graph = imported(found)
    long = longest_functions(found)
    repeated, unused = repeated_names(found), unused_names(found)
    print(f"{sum(lengths):,} lines in {len(found)} modules")
    print(f"a module: median {statistics.median(lengths):.0f}, longest {max(lengths)}")
    print(
        f"a function: longest {long[0][0]} ({long[0][1]}), {sum(n > LIMIT for n, _ in long)}",
        end="",
    )
    print(f" over {LIMIT}, without the parser")
    print(
        f"imports a module {sum(map(len, graph.values())) / len(graph):.1f}, floors {floors(graph)}"
    )
    print(f"names in several modules: {len(repeated)}: {', '.join(repeated)}")
    print(f"named nowhere in the package: {', '.join(unused) or 'none'}")
    if parser.parse_args().way:
        way = traced_way()
        for file, functions in way.items():
            print(f"  {file} {sum(functions.values())}: {', '.join(functions)}")
        total = sum(sum(functions.values()) for functions in way.values())
        print(f"the way of a batch: {total} lines in {len(way)} files")


if __name__ == "__main__":
    main()
