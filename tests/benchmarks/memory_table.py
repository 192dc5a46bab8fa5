"""The table of docs/performance.md, computed: python tests/benchmarks/memory_table.py."""

from itertools import product

from kl_f8_train import config, cost

PATHS = ("run_dir=none", "init.weights=none", "data.sources=none", "data.shorter_side=null")
ROW = "| {:>5} | {:>4} | {:8} | {:>6} | {:>6.1f} GiB | {:>7,.0f} |"


def main() -> None:
    """Prints a row for each batch, crop, precision and number of checkpointed levels."""
    for crop, precision, levels, batch in product(
        (256, 512), ("bfloat16", "float32"), (0, 4), (4, 12, 24)
    ):
        settings = config.load(
            "configs/ft_ema.yaml",
            [
                *PATHS,
                f"data.crop={crop}",
                f"precision={precision}",
                f"compute.checkpoint_levels={levels}",
            ],
        )
        memory = cost.peak_bytes(settings, batch) / cost.GIB
        flops = cost.flops_per_image(settings) + cost.recomputed_flops(settings)
        print(ROW.format(batch, crop, precision, levels, memory, flops / 1e9))


if __name__ == "__main__":
    main()
