"""The verb on a tiny recipe: one JSON object, figures that hang together, variants in turns."""

import gc
import importlib
import json
import re
import runpy
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import against
import pytest
import samples
import torch
from torch._dynamo.utils import counters

from kl_f8_train import __version__
from kl_f8_train.__main__ import main
from kl_f8_train.check import benchmark, cost
from kl_f8_train.core import machine
from kl_f8_train.core.batch import Batch
from kl_f8_train.core.step import Finetuner
from kl_f8_train.errors import UsageError

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "performance.md").read_text()
TINY = ["model.ch_mult=1,1", "data.crop=32", "precision=float32", "model.ch=32"]


@pytest.mark.slow
def test_json_is_one_object_with_everything():
    """Without weights and shards."""
    arguments = ["-m", "kl_f8_train", "benchmark", "ft_ema", *TINY, "--json", "--iterations", "2"]
    result, said = printed(arguments)
    assert "; 4 more take about " in said
    assert result["flops_per_image"] == pytest.approx(result["flops_floor"], rel=0.02)
    assert result["images_per_second"] > 0
    assert result["peak_memory_bytes"] > 4 * 1_000_000
    assert set(result["phases_ms"]) == set(benchmark.PHASES)
    assert "random images: no data.sources given" in result["notes"]
    first, median, third = result["seconds_quartiles"]
    assert 0 < first <= median <= third
    assert result["iterations"] == 2
    assert result["cpu_seconds"] > 0
    assert result["settings"]["name"] == "ft_ema"
    assert result["settings"]["model"]["ch"] == 32
    assert result["settings"]["compute"]["checkpoint_levels"] == 0
    assert result["versions"] == {"kl_f8_train": __version__, "torch": torch.__version__}


@pytest.mark.slow
def test_against_the_original_order_and_diffusers_modules():
    script = str(ROOT / "tests" / "benchmarks" / "against.py")
    result, said = printed([script, "ft_ema", *TINY, "--iterations", "2"])
    assert re.search(r"a turn of 3 variants takes [\d.]+ s; 2 take about ", said)
    assert [variant["name"].split(",")[0] for variant in result["variants"]] == [
        "ours",
        "the original's order",
        "the same step on diffusers' modules",
    ]
    ours, *others = result["variants"]
    assert ours["ratio"] == 1
    for variant in others:
        expected = ours["images_per_second"] / variant["images_per_second"]
        assert variant["ratio"] == pytest.approx(expected)


def printed(arguments: list[str]) -> tuple[dict, str]:
    """The JSON object that a Python program prints, and its stderr."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return json.loads(done.stdout), done.stderr


def test_figures_become_text(tiny, monkeypatch):
    lines, left = [], []

    def largest_batch(*_):
        gc.collect()
        left.extend(part for part in gc.get_objects() if issubclass(type(part), Finetuner))
        return 1

    monkeypatch.setattr(benchmark, "largest_batch", largest_batch)
    config = tiny("demo", *TINY, "compute.per_device_batch=1", "adversarial.n_layers=1")
    result = benchmark.benchmark(config, iterations=1, say=lines.append)
    assert left == []  # the networks that were measured take no room from the largest batch
    text = benchmark.describe(result)
    assert "images/s, 1 at a time; 1 iteration of " in text
    assert "limited by: " in text
    assert "random images: data.sources=" in text  # as a user writes it
    assert re.fullmatch(r"the first iteration took [\d.e-]+ s; 3 more take about \d+ s", lines[1])
    assert len(lines) == 2
    assert [key for key in result if f"`{key}`" not in DOCS] == []


def test_the_documentation_has_the_computed_tables():
    """Anew: python tests/benchmarks/memory_table.py."""
    table = runpy.run_path(str(ROOT / "tests" / "benchmarks" / "memory_table.py"))
    assert table["which_batch"]() in DOCS
    assert "\n".join(table["rows"](measure=False)) in DOCS
    for memory, batch, levels, needed in ((12e9, 12, 0, "7.5 GiB"), (8e9, 12, 2, "5.2 GiB")):
        *found, size = table["choose"](memory)
        assert found == [batch, levels]
        assert f"{size / cost.GIB:.1f} GiB" == needed
        assert needed in DOCS


def test_out_of_memory_says_what_to_change(capsys):
    """More bytes than there are addresses."""
    batch = [f"{key}={10**6}" for key in ("global_batch", "compute.per_device_batch")]
    large = ("data.crop=65536", "data.shorter_side=null")
    assert main(["benchmark", "demo", *TINY, *batch, *large]) == 4
    error = capsys.readouterr().err
    assert "halve compute.per_device_batch" in error
    assert "unexpected" not in error


@pytest.mark.parametrize("script", sorted((ROOT / "tests" / "benchmarks").glob("*.py")), ids=str)
def test_programs_of_benchmarks_import_what_there_is(script):
    """Also those in strings, which run in processes of their own."""
    imports = re.findall(
        r"^from (kl_f8_train[\w.]*) import (\w+)", script.read_text(), re.MULTILINE
    )
    for module, name in imports:
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")


def test_original_order_takes_the_originals_arithmetic():
    """As counted in the original code: 3877 GFLOP at 256 x 256."""
    small = ("data.crop=64", "compute.per_device_batch=1", "global_batch=1")
    config = samples.recipe("ft_ema", *small)
    batch = next(benchmark._random_batches(config, 1))
    counted = benchmark.count_flops(against.original(config, torch.device("cpu")), batch)
    assert counted == pytest.approx(3877e9 / 16, rel=0.02)


def test_diffusers_modules_take_the_plain_arithmetic(tiny):
    config = tiny("ft_ema", "data.crop=64", "compute.per_device_batch=1")
    batch = next(benchmark._random_batches(config, 1))
    counted = benchmark.count_flops(against.on_diffusers(config, torch.device("cpu")), batch)
    plain = cost.flops_per_image(against.plain(config))
    assert counted == pytest.approx(plain, rel=0.01)


def test_diffusers_modules_run_with_our_layout_and_compiled(tiny, monkeypatch):
    eager = partial(machine.compile_each, backend="eager")
    monkeypatch.setattr(machine, "compile_each", eager)
    torch._dynamo.reset()
    counters.clear()
    switches = "compute.channels_last=true", "compute.compile=true"
    config = tiny("ft_mse", *TINY, *switches)
    runs = against.reference_runs(config, torch.device("cpu"), print)
    *_, plain, switched = runs
    assert plain == "the same step on diffusers' modules, float32"
    assert switched == f"{plain}, channels_last, compiled"
    batch = next(benchmark._random_batches(config, 1))
    runs[plain](batch)
    assert machine.compiled_graphs() == 0
    runs[switched](batch)
    assert machine.compiled_graphs() >= 5  # encoder, middle, two levels, norm
    assert benchmark.graph_breaks() == 0
    torch._dynamo.reset()


def test_clock_adds_up_the_parts_of_a_phase(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 3.5])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(times))
    clock = benchmark.Clock(torch.device("cpu"))
    clock.start()
    for phase in ("encode", "decode", "encode"):
        clock(phase)
    assert clock.read() == {"encode": 1500.0, "decode": 2000.0}


def test_recompiles_are_counted_for_what_is_measured(tiny):
    config = tiny("ft_mse", "data.crop=32")
    growing = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    sizes = iter(range(2, 9))
    batches, cpu = benchmark._random_batches(config, 1), torch.device("cpu")
    ours, _ = benchmark.measure(lambda batch: None, batches, cpu, 2)
    other, _ = benchmark.measure(lambda _: growing(torch.zeros(next(sizes))), batches, cpu, 2)
    assert [ours.graphs, other.graphs] == [0, 2]


@pytest.mark.parametrize("largest", [0, 1, 2, 7, 12, 100])
@pytest.mark.parametrize("start", [1, 12])
def test_largest_batch_is_found(largest, start):
    assert cost.largest_that_fits(lambda number: number <= largest, start) == largest


@pytest.mark.parametrize(
    ("wait", "share", "text"),
    [
        (0.3, 0.9, "data: 9% of the time"),
        (0, 0.61, "arithmetic: 61%"),
        (0, 0.59, "arithmetic and memory traffic alike: 59%"),
        (0, 0.41, "arithmetic and memory traffic alike: 41%"),
        (0, 0.39, "memory traffic and launches: 39% of the matmul rate; most time in decode"),
    ],
)
def test_limit_names_what_to_look_at(wait, share, text):
    assert benchmark.limit({"data": wait, "encode": 1, "decode": 2}, share).startswith(text)


@pytest.mark.parametrize(
    ("seconds", "cpu_seconds", "threads", "busy"),
    [(1, 0.9, 1, False), (1, 0.7, 1, True), (1, 1.9, 2, False), (1, 1.5, 2, True)],
)
def test_busy_is_a_quarter_more_than_the_threads_computed(seconds, cpu_seconds, threads, busy):
    assert benchmark.is_busy(seconds, cpu_seconds, threads) is busy


def test_quartiles():
    assert benchmark.quartiles([5, 1, 2, 4, 3]) == [2, 3, 4]
    assert benchmark.quartiles([0.5]) == [0.5, 0.5, 0.5]


def test_cuda_without_a_gpu_is_refused(tiny):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="torch sees no GPU"):
        benchmark.find_device(tiny("ft_ema", "compute.accelerator=cuda"))


def test_only_waits_are_counted_as_waits(monkeypatch):
    """Not that the mode which warns of them is a prototype, of which torch warns with it."""

    def set_mode(mode: str) -> None:
        if mode == "warn":
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet detect all "
                "synchronizing operations (Triggered internally at c10/cuda/CUDAFunctions.cpp:1.)",
                stacklevel=2,
            )

    def run(batch: int) -> None:
        for _ in range(batch):
            warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    for waits in (0, 3):
        assert benchmark.synchronizations(run, waits, torch.device("cuda")) == waits
    assert benchmark.synchronizations(run, 3, torch.device("cpu")) is None


def test_flops_are_counted_as_torch_does(tiny):
    """One convolution, forward and both gradients."""
    layer = torch.nn.Conv2d(4, 8, 3)
    images = torch.zeros(1, 4, 10, 10, requires_grad=True)
    counted = benchmark.count_flops(
        lambda batch: layer(batch.images).sum().backward(), Batch(images, images, [], [])
    )
    assert counted == 3 * 2 * 4 * 8 * 9 * 64
