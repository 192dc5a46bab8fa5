"""The whole chain in minutes on a CPU: stand-in for kl-f8 -> ft-EMA -> ft-MSE -> table and strip.

Photographs: those that scikit-image ships (public domain or CC0). Three train, two are held out.
Stand-ins, named as such: a small network trained here in kl-f8's place, ST-LPIPS in LPIPS' place.
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from kl_f8_train import config, images
from kl_f8_train.config import Config
from kl_f8_train.core.discriminator import Discriminator, initialize
from kl_f8_train.core.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.data.loading import IterationSampler, PositionDataset, loader, open_data
from kl_f8_train.data.pack import pack
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.files import atomic_path, write_json, write_text
from kl_f8_train.publish import export
from kl_f8_train.run.train import train
from kl_f8_train.score import evaluate, report, scores
from kl_f8_train.units import duration
from kl_f8_train.weights import pretrained, weight_file

TRAINING = ("astronaut.png", "coffee.png", "hubble_deep_field.jpg")
HELD_OUT = ("chelsea.png", "rocket.jpg")
BASE, STAGE_A, STAGE_B = 800, 300, 300  # iterations of each part, at length 1
EARLY = 5  # iterations of the base after which the first line says how long it will take
STAGE_B_RECIPE = (  # what ft_mse.yaml changes in ft_ema.yaml
    "loss.pixel=mse",
    "loss.perceptual_weight=0.1",
    "adversarial=null",
)


def demo(
    run_dir: Path,
    training: str | None = None,
    held_out: Path | None = None,
    length: float = 1.0,
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Runs the chain below `run_dir` and returns the table's rows, also in table.json.

    `training` names shards and `held_out` a folder in place of scikit-image's photographs;
    `length` multiplies the iterations. A finished part is not run again. Raises MissingInputError
    without the demo's dependencies, UsageError for a length or settings that leave a part without
    iterations or discriminator, RunFailedError if a part was interrupted.
    """
    began = time.perf_counter()
    base_end, a_end, b_end = _ends(length)
    if _recipe([*overrides, f"stop_iteration={base_end}"]).adversarial is None:
        raise UsageError(
            "adversarial=null: the demo's first part trains a discriminator; leave it out"
        )
    if training is None:
        training = str(_pack_photographs(run_dir))
        held_out = held_out or run_dir / "held_out"
    if held_out is None:
        raise MissingInputError("--training without --held-out: name a folder of photographs")
    _require_folder(held_out)
    common = [f"data.sources={training}", *overrides]

    say("1 of 4: a small autoencoder and discriminator, the stand-in for kl-f8")
    base = run_dir / "base" / "model.ckpt"
    if not base.is_file():
        train_base(_recipe([*common, f"stop_iteration={base_end}", f"init.weights={base}"]), base)

    say("2 of 4: stage A, L1 + perceptual + adversarial (ft-EMA's recipe)")
    stage_a = _recipe(
        [*common, f"init.weights={base}", f"run_dir={run_dir}/ft_ema", f"stop_iteration={a_end}"]
    )
    _run(stage_a)

    say("3 of 4: stage B, MSE + 0.1 perceptual (ft-MSE's recipe), from stage A's EMA")
    stage_b = _recipe(
        [
            *common,
            *STAGE_B_RECIPE,
            "name=demo_ft_mse",
            f"init.weights={run_dir}/ft_ema",
            f"run_dir={run_dir}/ft_mse",
            f"stop_iteration={b_end}",
        ]
    )
    _run(stage_b)

    say("4 of 4: export, and scores of five models on held-out photographs")
    exports = {s.name: export.export(Path(s.run_dir), force=True) for s in (stage_a, stage_b)}
    models = {
        "base (stand-in for kl-f8)": (base, "ema", base_end),
        "ft-EMA": (exports["demo_ft_ema"] / "demo_ft_ema-ema-pruned.safetensors", "ema", a_end),
        "ft-EMA, raw weights": (run_dir / "ft_ema", "raw", a_end),
        "ft-MSE": (exports["demo_ft_mse"] / "demo_ft_mse-ema-pruned.safetensors", "ema", b_end),
        "ft-MSE, raw weights": (run_dir / "ft_mse", "raw", b_end),
    }
    rows = _score(models, held_out, run_dir)
    page = report.write(run_dir / "evaluation")
    say(
        f"\ndone in {time.perf_counter() - began:.0f} s; pictures: {run_dir}/strip.png, {page}\n"
        "next: your own photographs, docs/quickstart.md"
    )
    return rows


def _ends(length: float) -> tuple[int, ...]:
    """The iterations at which the three parts end. Raises UsageError if one has none."""
    parts = [round(part * length) for part in (BASE, STAGE_A, STAGE_B)]
    if not min(parts) or sum(parts) > config.ITERATIONS:
        raise UsageError(
            f"--length {length:g}: leaves a part of the demo without iterations, or gives more "
            f"than {config.ITERATIONS:,}; expected 0.01 to 100,000"
        )
    return tuple(itertools.accumulate(parts))


def _require_folder(held_out: Path) -> None:
    """Before the minutes of training that end with scores on it."""
    if not held_out.is_dir():
        raise MissingInputError(f"--held-out {held_out}: no such folder; give photographs")


def train_base(settings: Config, path: Path) -> None:
    """Trains autoencoder and discriminator together and saves them in the original's layout.

    First L1 on small crops, which is quick, then the original's recipe: L1 + perceptual +
    1e-6 KL + 0.5 x adaptive x adversarial.
    """
    torch.manual_seed(settings.seed)
    model = AutoencoderKL(**asdict(settings.model))
    assert isinstance(model.quant_conv, torch.nn.Conv2d)
    assert model.quant_conv.bias is not None
    model.quant_conv.bias.data[settings.model.embed_dim :] = -8.0  # a sharp posterior learns sooner
    assert settings.adversarial is not None
    discriminator = Discriminator(settings.adversarial.ndf, settings.adversarial.n_layers)
    initialize(discriminator, settings.seed)
    network = pretrained.build(settings.loss.perceptual)
    optimizer = Adam(model.parameters(), 1e-3, (0.9, 0.99))
    disc_optimizer = Adam(discriminator.parameters(), 2e-4, (0.5, 0.9))
    logvar = torch.zeros(())
    stop = settings.stop_iteration
    turn = round(0.75 * stop)

    say(f"its first {turn:,} iterations: L1 alone, on crops of 32 pixels")
    began = time.perf_counter()
    for iteration, (x, noise) in enumerate(_base_batches(settings, 0, turn, crop=32, batch=8)):
        pixel = (x - model.decode(model.encode(x).sample(noise))).abs().mean()
        optimizer.zero_grad()
        pixel.backward()
        optimizer.step()
        _tell(iteration, range(turn), pixel, began)

    say(f"the other {stop - turn:,}: with perceptual and adversarial terms, on larger crops")
    began = time.perf_counter()
    optimizer.param_groups[0]["lr"] = 4e-4
    rest = _base_batches(settings, turn, stop, settings.data.crop, settings.global_batch)
    for iteration, (x, noise) in enumerate(rest, start=turn):
        posterior = model.encode(x)
        y = model.decode(posterior.sample(noise))
        nll, terms = reconstruction_loss(
            x, y, network(x, y), pixel="l1", perceptual_weight=1.0, logvar=logvar
        )
        g = generator_loss(discriminator(y))
        at_last_layer = [
            torch.autograd.grad(term, model.last_layer, retain_graph=True)[0] for term in (nll, g)
        ]
        weight = 0.5 * adaptive_weight(at_last_layer[0], at_last_layer[1])
        optimizer.zero_grad()
        (nll + 1e-6 * posterior.kl().mean() + weight * g).backward()
        optimizer.step()
        disc_optimizer.zero_grad()
        discriminator_loss(discriminator(x), discriminator(y.detach())).backward()
        disc_optimizer.step()
        _tell(iteration, range(turn, stop), terms["pixel_loss"], began)

    state = {
        **model.state_dict(),
        "loss.logvar": logvar,
        **{f"loss.discriminator.{k}": v for k, v in discriminator.state_dict().items()},
    }
    weight_file.write_torch(path, {"epoch": 0, "global_step": stop, "state_dict": state})


def _base_batches(
    settings: Config, start: int, stop: int, crop: int, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in [-1, 1] and posterior noise of the iterations start .. stop - 1."""
    data = replace(settings.data, crop=crop)
    settings = replace(settings, data=data, global_batch=batch)
    sampler = IterationSampler(start, stop, 0, batch, 0, 1)
    for item in loader(PositionDataset(*open_data(settings, say), settings), sampler, 1):
        yield images.to_float(item.images), item.noise[0]


def _tell(iteration: int, part: range, pixel: Tensor, began: float) -> None:
    """Early, and every 50 iterations: how far, and how long to the end of this part."""
    done = iteration + 1 - part.start
    if done == EARLY or (iteration + 1) % 50 == 0:
        left = (len(part) - done) * (time.perf_counter() - began) / done
        say(
            f"iteration {iteration + 1:,} of {part.stop:,} | L1 {float(pixel.detach()):.4f} | "
            f"{duration(left)} left of this part"
        )


def _recipe(overrides: Sequence[str]) -> Config:
    return config.load(config.find_recipe("demo"), list(overrides))


def _run(settings: Config) -> None:
    code = train(settings)
    if code:
        raise RunFailedError(f"{settings.name} was interrupted (exit code {code}); run demo again")


def _score(
    models: dict[str, tuple[Path, str, int]], held_out: Path, run_dir: Path
) -> list[dict[str, Any]]:
    """Scores every model on the same photographs; writes table.json, table.md and strip.png."""
    named = [(name, path, select) for name, (path, select, _) in models.items()]
    result = evaluate.evaluate(
        named,
        str(held_out),
        run_dir / "evaluation",
        size=128 if held_out.parent == run_dir else 256,
        perceptual_name="st_lpips_alex",
    )
    assert result is not None
    rows: list[dict[str, Any]] = []
    for name, (_, _, iteration) in models.items():
        row: dict[str, Any] = {"model": name, "iteration": iteration, "images": result["images"]}
        for metric, value in result["models"][name].items():
            if value is not None:
                row |= {f"{metric}_mean": value["mean"], f"{metric}_std": value["std"]}
        rows.append(row)
    write_json(run_dir / "table.json", rows)
    write_text(run_dir / "table.md", scores.table(result) + "\n")
    with atomic_path(run_dir / "strip.png") as temporary:
        images.to_pil(_strip(run_dir / "evaluation")).save(temporary, format="PNG")
    say("stand-ins: base was trained here and is not kl-f8; ST-LPIPS is not LPIPS.")
    return rows


def _strip(evaluation: Path) -> Tensor:
    """The first pictures of an evaluation, the input and each EMA beside it."""
    columns: dict[str, list[Tensor]] = {}
    for entry in json.loads((evaluation / "pictures.json").read_text(encoding="utf-8"))[:6]:
        shown = {"input": entry["input"], **entry["models"]}
        for name, file in shown.items():
            if "raw" not in name:
                picture = images.decode((evaluation / file).read_bytes())
                columns.setdefault(name.split(" (")[0], []).append(picture)
    return report.strip([*columns.items()])


def _pack_photographs(run_dir: Path) -> Path:
    """Tiles scikit-image's photographs: training tiles into shards, the others into a folder."""
    try:
        import skimage.data
    except ImportError as error:
        raise MissingInputError(
            "the demo's photographs come with scikit-image: pip install scikit-image"
        ) from error
    source = Path(skimage.data.__file__).parent
    tiles, out = run_dir / "tiles", run_dir / "shards"
    if not any(out.glob("*.tar")):
        say("tiles of scikit-image's photographs, and shards of them")
        for name in TRAINING:  # few photographs hold few colours: exchange the channels
            for channels in ((0, 1, 2), (1, 2, 0), (2, 1, 0)):
                _tile(source / name, tiles, stride=96, channels=channels)
        for name in HELD_OUT:
            _tile(source / name, run_dir / "held_out", stride=128)
        pack(tiles, out, per_shard=100)
    return out


def _tile(
    file: Path, folder: Path, stride: int, size: int = 128, channels: Sequence[int] = (0, 1, 2)
) -> None:
    """Cuts a photograph into PNG squares, its colour channels in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = images.decode(file.read_bytes())[list(channels)]
    order = "".join("rgb"[channel] for channel in channels)
    for top in range(0, picture.shape[1] - size + 1, stride):
        for left in range(0, picture.shape[2] - size + 1, stride):
            tile = picture[:, top : top + size, left : left + size]
            images.to_pil(tile).save(folder / f"{file.stem}-{order}-{top:04d}-{left:04d}.png")


def say(message: str) -> None:
    """Prints at once."""
    print(message, flush=True)
