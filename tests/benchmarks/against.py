"""Our iteration beside the original's order and diffusers' modules, in turns: A B C A B C ...

    python tests/benchmarks/against.py ft_ema data.crop=64 --iterations 9    # takes minutes

Needs no weights and no shards: what is missing is random. In turns, so that a machine that slows
down slows all of them. Prints one JSON object on stdout.
"""

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kl_f8_train import config as configs
from kl_f8_train.check import benchmark
from kl_f8_train.core import machine
from kl_f8_train.core.batch import Batch
from kl_f8_train.core.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)
from kl_f8_train.core.model import Kernels
from kl_f8_train.core.step import Finetuner
from kl_f8_train.images import to_float
from kl_f8_train.output import say
from kl_f8_train.settings import Config
from kl_f8_train.units import counted, duration


@machine.with_remedy()
def compare(config: Config, iterations: int, say: Callable[[str], None] = say) -> dict[str, Any]:
    """Runs all variants in turns and returns their speeds."""
    device = benchmark.find_device(config)
    size = benchmark.batch_size(config, device)
    notes: list[str] = []
    finetuner = benchmark.build_finetuner(config, notes)
    batches = benchmark.open_batches(config, size, notes)
    ours = benchmark.iteration_of(finetuner, device)
    runs = {"ours": ours, **reference_runs(config, device, say)}
    variants = {name: benchmark.Timings(run) for name, run in runs.items()}
    batch = next(batches).to(device)
    for _ in range(benchmark.WARM_UP - 1):
        turn = sum(benchmark.timed(run, batch, device) for run in runs.values())
    say(
        f"a turn of {counted(len(variants), 'variant', 's')} takes {turn:.2g} s; "
        f"{iterations} take about {duration(iterations * turn)}"
    )
    for _ in range(iterations):
        batch = next(batches).to(device)
        # In turns (A B C A B C ...): what slows the machine for a while slows all of them.
        for variant in variants.values():
            variant.add(batch, device)
    return {
        "device": benchmark.device_name(device),
        "precision": config.precision,
        "batch": size,
        "crop": config.data.crop,
        "iterations": iterations,
        "variants": [
            {"name": name, **figures(variant, size, variants["ours"])}
            for name, variant in variants.items()
        ],
        "notes": notes,
    }


def figures(variant: benchmark.Timings, size: int, ours: benchmark.Timings) -> dict[str, float]:
    """Speed, and how much longer it takes than ours: by the clock, and in CPU time.

    On a CPU that others use too, CPU time is the steadier ratio; beside a GPU it says little.
    """
    seconds, our_seconds = (statistics.median(each.seconds) for each in (variant, ours))
    cpu_seconds, our_cpu_seconds = (statistics.median(each.cpu_seconds) for each in (variant, ours))
    return {
        "images_per_second": size / seconds,
        "ratio": seconds / our_seconds,
        "cpu_time_ratio": cpu_seconds / our_cpu_seconds,
    }


def reference_runs(
    config: Config, device: torch.device, say: Callable[[str], None]
) -> dict[str, benchmark.Iteration]:
    """The original's order on our modules, and our step on diffusers' modules.

    Those with the recipe's layout and compilation, too, where ours has them. And our own step in
    float32, where the recipe has another precision.
    """
    exact = replace(config, precision="float32")
    runs: dict[str, benchmark.Iteration] = {}
    if config.precision != "float32":
        runs["ours, float32"] = benchmark.iteration_of(benchmark.build_finetuner(exact, []), device)
    if config.adversarial is not None:
        runs["the original's order, float32"] = original(exact, device)
    else:
        say("no adversarial term: the original's order is left out")
    if importlib.util.find_spec("diffusers") is None:
        say("diffusers is not installed: its variant is left out (pip install diffusers)")
    else:
        name = "the same step on diffusers' modules"
        for precision in dict.fromkeys(("float32", config.precision)):
            peer = plain(replace(config, precision=precision))
            runs[f"{name}, {precision}"] = on_diffusers(peer, device)
        switches = {"channels_last": machine.channels_last, "compiled": machine.compiles}
        on = [switch for switch, is_on in switches.items() if is_on(config.compute)]
        if on:
            runs[", ".join([name, config.precision, *on])] = on_diffusers(config, device)
    return runs


def plain(config: Config) -> Config:
    """All switches off."""
    switches = replace(
        config.compute,
        channels_last=False,
        subpixel_upsample=False,
        lean_norm=False,
        perceptual_parts=1,
        checkpoint_levels=0,
        compile=False,
    )
    return replace(config, compute=switches)


def original(config: Config, device: torch.device) -> benchmark.Iteration:
    """The original's training step, as its trainer ran it on our modules in float32.

    Decoder: the encoder is in the graph, and the discriminator's gradients are computed too.
    Discriminator: a second forward pass of everything, LPIPS included. The gradients for the
    adaptive weight are separate backward passes.
    """
    config = plain(config)
    parts = benchmark.build_finetuner(config, []).to(device)
    model, discriminator, network = parts.autoencoder, parts.discriminator, parts.perceptual
    network.to(device)
    assert discriminator is not None
    model.requires_grad_(True)
    optimizer, critic = parts.adams
    logvar = torch.zeros((), device=device)
    pixel, weight = config.loss.pixel, config.loss.perceptual_weight

    def nll_of(x: Tensor, y: Tensor) -> Tensor:
        distance = network(x, y)
        return reconstruction_loss(
            x, y, distance, pixel=pixel, perceptual_weight=weight, logvar=logvar
        )[0]

    @Kernels(config.precision)
    def run(batch: Batch) -> None:
        x = to_float(batch.images) if batch.images.dtype == torch.uint8 else batch.images
        posterior = model.encode(x)
        y = model.decode(posterior.sample(batch.noise[0]))
        nll, g = nll_of(x, y), generator_loss(discriminator(y))
        at_last_layer = [
            torch.autograd.grad(term, model.last_layer, retain_graph=True)[0] for term in (nll, g)
        ]
        optimizer.zero_grad()
        loss = nll + 0.5 * adaptive_weight(at_last_layer[0], at_last_layer[1]) * g
        (loss + 1e-6 * posterior.kl().mean()).backward()
        optimizer.step()
        with torch.no_grad():
            y = model.decode(model.encode(x).sample(batch.noise[-1]))
            nll_of(x, y)
        critic.zero_grad()
        discriminator_loss(discriminator(x), discriminator(y)).backward()
        critic.step()

    return run


def on_diffusers(config: Config, device: torch.device) -> benchmark.Iteration:
    """Our step with diffusers' encoder and decoder in place of ours.

    In the layout of `config`, and compiled, if it says so, in the parts that ours is compiled in.
    """
    from diffusers import AutoencoderKL as Peer

    shape = config.model
    levels = len(shape.ch_mult)
    peer: Any = Peer(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(shape.ch * multiplier for multiplier in shape.ch_mult),
        layers_per_block=shape.num_res_blocks,
        latent_channels=shape.z_channels,
    )
    parts = benchmark.build_finetuner(plain(config), [])
    for name in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        setattr(parts.autoencoder, name, getattr(peer, name))
    settings = replace(parts.config, compute=replace(config.compute, compile=False))
    finetuner = Finetuner(settings, parts.autoencoder, parts.discriminator, parts.perceptual)
    if machine.compiles(config.compute):
        decoder = peer.decoder
        ends = peer.encoder, decoder.mid_block, decoder.conv_norm_out, parts.discriminator
        rest = (part for part in ends if part is not None)
        machine.compile_each([*rest, *decoder.up_blocks, parts.perceptual])
    return benchmark.iteration_of(finetuner, device)


def main() -> None:
    """Compares the variants of a recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="recipe: a YAML file, or a shipped one's name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--iterations", type=int, default=10, help="turns to measure (10)")
    args = parser.parse_intermixed_args()
    recipe = configs.load_without_inputs(configs.find_recipe(args.config), args.overrides)
    print(json.dumps(compare(recipe, args.iterations, partial(say, aside=True)), indent=1))


if __name__ == "__main__":
    main()
