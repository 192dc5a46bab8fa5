"""The table of predicted days in docs/performance.md: both published stages on 1 to 64 GPUs.

python tests/benchmarks/scaling_tables.py
"""

from kl_f8_train.check import scaling
from kl_f8_train.config import find_recipe, load
from kl_f8_train.output import markdown_table
from kl_f8_train.settings import Config


def table() -> str:
    """A row for each GPU: its data-sheet rates, and both stages on each number of GPUs."""
    names = ("ft_ema", "ft_mse")
    works = {name: published_workload(load_published(name)) for name in names}
    head = ["GPU", "bf16, tf32, float32 TFLOP/s", "sold with, GB", "GB/s", "link, GB/s"]
    head += ["network, GB/s", "source"]
    stages = [f"{name} on {count}, days" for name in works for count in scaling.GPU_COUNTS]
    rows = [
        (*_rates(gpu), *(cell for work in works.values() for cell in _days(work, gpu)))
        for gpu in scaling.GPUS
    ]
    return markdown_table((*head, *stages), rows)


def load_published(name: str) -> Config:
    """A shipped recipe with placeholders for the user's settings, compiled as on a GPU."""
    yours = ["run_dir=run", "init.weights=model.ckpt", "data.sources=images"]
    yours += ["compute.compile=true"]
    return load(find_recipe(name), yours)


def published_workload(config: Config) -> scaling.Workload:
    """A shipped recipe from its first iteration to its last."""
    assert config.init.iteration is not None
    return scaling.workload(config, config.stop_iteration - config.init.iteration)


def _rates(gpu: scaling.Gpu) -> tuple[str, ...]:
    return (
        gpu.name,
        ", ".join(f"{rate / 1e12:g}" for rate in (gpu.flops, gpu.tf32, gpu.float32)),
        f"{gpu.memory_bytes / 1e9:.0f}",
        f"{gpu.memory_rate / 1e9:,.0f}",
        f"{gpu.link / 1e9:.0f}",
        f"{gpu.network / 1e9:g}",
        gpu.source,
    )


def _days(work: scaling.Workload, gpu: scaling.Gpu) -> list[str]:
    found = [
        scaling.predict(work, scaling.seconds_per_image(work, gpu, count), count, gpu)
        for count in scaling.GPU_COUNTS
    ]
    return [f"{prediction.days:.1f}" for prediction in found]


if __name__ == "__main__":
    print(table())
