"""The tables of docs/scaling.md: both published stages on 1 to 64 GPUs, by the shipped recipes.

python tests/benchmarks/scaling_tables.py
"""

from collections.abc import Iterator, Sequence

from kl_f8_train.check import cost, scaling
from kl_f8_train.config import Config, find_recipe, load
from kl_f8_train.output import markdown_table

MICRO_BATCHES = (1, 2, 4, 8, 12, 24)


def tables() -> str:
    """The tables of docs/scaling.md: both published stages, by the shipped recipes."""
    configs = [load_published(name) for name in ("ft_ema", "ft_mse")]
    works = [published_workload(config) for config in configs]
    parts = {
        "The GPUs": gpu_table(),
        "The stages": work_table(works),
        **{f"Predicted speed and days, {work.name}": prediction_table(work) for work in works},
        "Time of the reduction": reduction_table(works),
        "Data and checkpoints": rate_table(works[0], configs[0].checkpoint.every),
        "Memory": memory_table(configs),
    }
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in parts.items())


def load_published(name: str) -> Config:
    """A shipped recipe with something in the user's places."""
    yours = ["run_dir=run", "init.weights=model.ckpt", "data.sources=images"]
    return load(find_recipe(name), yours)


def published_workload(config: Config) -> scaling.Workload:
    """A shipped recipe from its first iteration to its last."""
    assert config.init.iteration is not None
    return scaling.workload(config, config.stop_iteration - config.init.iteration)


def gpu_table() -> str:
    """The kinds of GPU."""
    head = ("GPU", "bf16 peak, TFLOP/s", "memory, GB", "link, GB/s", "network, GB/s", "source")
    rows = [
        (
            gpu.name,
            f"{gpu.flops / 1e12:.0f}",
            f"{gpu.memory_bytes / 1e9:.0f}",
            f"{gpu.link / 1e9:.0f}",
            f"{gpu.network / 1e9:g}",
            gpu.source,
        )
        for gpu in scaling.GPUS
    ]
    return markdown_table(head, rows)


def work_table(works: Sequence[scaling.Workload]) -> str:
    """What the stages ask for."""
    head = (
        "stage",
        "iterations",
        "images",
        "GFLOP an image",
        "reduced an iteration, MB",
        "a checkpoint, GB",
    )
    rows = [
        (
            work.name,
            f"{work.iterations:,}",
            f"{work.images:,}",
            f"{work.flops_per_image / 1e9:,.0f}",
            f"{work.reduced_bytes / 1e6:.1f}",
            f"{work.checkpoint_bytes / 1e9:.2f}",
        )
        for work in works
    ]
    return markdown_table(head, rows)


def prediction_table(work: scaling.Workload) -> str:
    """images/s and days of a stage on every kind and number."""
    head = (work.name, *(f"{count} GPU{'s' * (count > 1)}" for count in scaling.GPU_COUNTS))
    return markdown_table(head, [(gpu.name, *_cells(work, gpu)) for gpu in scaling.GPUS])


def _cells(work: scaling.Workload, gpu: scaling.Gpu) -> Iterator[str]:
    for count in scaling.GPU_COUNTS:
        found = scaling.predict(work, scaling.seconds_per_image(work, gpu), count, gpu)
        yield f"{found.images_per_second:,.0f} images/s, {found.days:.1f} d"


def reduction_table(works: Sequence[scaling.Workload]) -> str:
    """Milliseconds of each iteration's reduction at each rate."""
    counts = [count for count in scaling.GPU_COUNTS if count > 1]
    head = ("link", *(f"{work.name}, {count} GPUs, ms" for work in works for count in counts))
    rows = [
        (
            f"{name}, {rate / 1e9:g} GB/s",
            *(
                f"{1e3 * scaling.reduction_seconds(work.reduced_bytes, count, rate):.1f}"
                for work in works
                for count in counts
            ),
        )
        for name, rate in scaling.RATES.items()
    ]
    return markdown_table(head, rows)


def rate_table(work: scaling.Workload, every: int) -> str:
    """Bytes read and written each second at the predicted speed, a checkpoint every `every`."""
    head = (work.name, "iteration, ms", "images/s", "data, MB/s", "checkpoints, MB/s")
    rows = []
    for gpu in scaling.GPUS[:2]:
        for count in scaling.GPU_COUNTS:
            found = scaling.predict(work, scaling.seconds_per_image(work, gpu), count, gpu)
            iteration = found.compute_seconds + found.reduction_seconds
            rows.append(
                (
                    f"{count} x {gpu.name}",
                    f"{1e3 * iteration:,.0f}",
                    f"{found.images_per_second:,.0f}",
                    f"{found.images_per_second * scaling.IMAGE_BYTES / 1e6:.1f}",
                    f"{work.checkpoint_bytes / (every * iteration) / 1e6:.2f}",
                )
            )
    return markdown_table(head, rows)


def memory_table(configs: Sequence[Config]) -> str:
    """Memory of an iteration for each micro-batch, and whom it fits with 2 GiB to spare."""
    head = ("images per micro-batch", *(f"{config.name}, GB" for config in configs), "fits both")
    rows = []
    for batch in MICRO_BATCHES:
        needed = [cost.peak_bytes(config, batch) for config in configs]
        fits = [gpu.name for gpu in scaling.GPUS if max(needed) <= gpu.room_bytes]
        rows.append(
            (str(batch), *(f"{n / 1e9:.1f}" for n in needed), ", ".join(fits) or "none of these")
        )
    return markdown_table(head, rows)


if __name__ == "__main__":
    print(tables())
