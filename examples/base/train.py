"""Trains kl_f8_mini, the small base that ships with kl_f8_train, as kl-f8 was trained.

    python examples/base/train.py --shards FOLDER --out runs/base [--held-out FOLDER] [--threads 1]

FOLDER holds WebDataset shards (img2dataset's layout) below it. Photographs whose JSON names the
`source_origin` "mirrored repository" are left out. The same command again resumes: the state is
saved every five minutes, and everything drawn is a function of (seed, iteration).

Most of the time goes to pixels alone (MSE; small crops first, larger ones later, at a rate that
decays). The last phase is kl-f8's own: L1 + perceptual + adversarial, KL weight 1e-6, whose raw
last weights are written, with the discriminator under the original's keys.
"""

import argparse
import io
import json
import math
import os
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Adam

from kl_f8_train.core.discriminator import Discriminator, initialize
from kl_f8_train.core.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.weights import pretrained

MODEL: dict[str, Any] = {
    "ch": 16,
    "ch_mult": (1, 2, 4, 8),
    "num_res_blocks": 1,
    "z_channels": 4,
    "embed_dim": 4,
    "norm_num_groups": 4,
}
NDF = 32
KL_WEIGHT = 1e-6  # as in kl-f8's configuration
SIDES = (256, 320, 384, 512)  # shorter sides at which each photograph is kept in memory
SAVE_SECONDS = 300


@dataclass(frozen=True)
class Phase:
    """A part of the training with one loss and one size of crops."""

    iterations: int
    crop: int
    batch: int
    adversarial: bool
    rate: tuple[float, float]  # at its start and at its end, by half a cosine
    disc_warmup: int = 0  # first iterations in which only the discriminator learns


PHASES = (
    Phase(8_000, crop=64, batch=16, adversarial=False, rate=(2e-3, 1e-3)),
    Phase(2_500, crop=128, batch=8, adversarial=False, rate=(1e-3, 3e-4)),
    Phase(1_000, crop=192, batch=4, adversarial=False, rate=(3e-4, 3e-5)),
    Phase(923, crop=192, batch=4, adversarial=True, rate=(1e-4, 1e-4), disc_warmup=200),
    Phase(77, crop=192, batch=4, adversarial=True, rate=(5e-5, 5e-5)),
)


def photographs(folder: Path) -> list[list[np.ndarray]]:
    """Every photograph below `folder`, at each of SIDES that it has: (H, W, 3) uint8."""
    found = []
    for shard in sorted(folder.rglob("*.tar")):
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as archive:
            for member in archive:
                file = archive.extractfile(member)
                key, _, suffix = member.name.partition(".")
                if file is not None:
                    members.setdefault(key, {})[suffix] = file.read()
        for parts in members.values():
            if json.loads(parts["json"]).get("source_origin") == "mirrored repository":
                continue
            image = Image.open(io.BytesIO(parts["jpg"])).convert("RGB")
            shorter = min(image.size)
            versions = []
            for side in SIDES:
                if side <= shorter:
                    width, height = (round(length * side / shorter) for length in image.size)
                    versions.append(
                        np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
                    )
            found.append(versions)
    return found


def crops(pictures: list[list[np.ndarray]], seed: int, iteration: int, phase: Phase) -> Tensor:
    """Random crops, each mirrored or not, (B, 3, crop, crop) in [-1, 1]."""
    draw = np.random.default_rng([seed, iteration])
    chosen = []
    for _ in range(phase.batch):
        versions = pictures[draw.integers(len(pictures))]
        picture = versions[draw.integers(len(versions))]
        top = draw.integers(picture.shape[0] - phase.crop + 1)
        left = draw.integers(picture.shape[1] - phase.crop + 1)
        crop = picture[top : top + phase.crop, left : left + phase.crop]
        chosen.append(crop[:, ::-1] if draw.random() < 0.5 else crop)
    return torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def at(iteration: int) -> tuple[Phase, int]:
    """The phase of an iteration, and the iteration's place in it."""
    for phase in PHASES:
        if iteration < phase.iterations:
            return phase, iteration
        iteration -= phase.iterations
    raise IndexError("past the end")


def rate(phase: Phase, place: int) -> float:
    """Half a cosine from the phase's first rate to its last."""
    first, last = phase.rate
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * place / phase.iterations))


class Training:
    """Networks, optimizers and the iteration."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.seed, self.iteration, self.seconds = seed, 0, 0.0
        self.model = AutoencoderKL(**MODEL)
        bias = self.model.get_parameter("quant_conv.bias")
        bias.data[MODEL["embed_dim"] :] = -8.0  # a sharp posterior learns sooner
        self.discriminator = Discriminator(NDF)
        initialize(self.discriminator, seed)
        self.perceptual = pretrained.build("st_lpips_alex")
        self.optimizer = Adam(self.model.parameters(), betas=(0.9, 0.99), fused=True)
        self.disc_optimizer = Adam(
            self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.9), fused=True
        )
        self.logvar = torch.zeros(())

    def state(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "disc_optimizer": self.disc_optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        for name in ("model", "discriminator", "optimizer", "disc_optimizer"):
            getattr(self, name).load_state_dict(state[name])

    def step(self, x: Tensor) -> dict[str, float]:
        """One iteration on x, (B, 3, H, W) in [-1, 1]."""
        phase, place = at(self.iteration)
        noise = torch.Generator().manual_seed(self.iteration + self.seed * 10**9)
        warm_up = min(1.0, (self.iteration + 1) / 200)
        self.optimizer.param_groups[0]["lr"] = rate(phase, place) * warm_up
        with torch.autocast("cpu", torch.bfloat16):
            posterior = self.model.encode(x)
        with torch.autocast("cpu", torch.bfloat16):
            shape = posterior.mean.shape
            z = posterior.mean.float() + torch.exp(0.5 * posterior.logvar.float()) * torch.randn(
                shape, generator=noise
            )
            y = self.model.decode(z).float()
        terms = {"mse": float((x - y.detach()).square().mean())}
        if phase.adversarial:
            terms |= self.adversarial_step(x, y, posterior.kl().float().mean(), place, phase)
        else:
            kl = posterior.kl().float().mean() / x[0].numel()
            loss = (x - y).square().mean() + KL_WEIGHT * kl
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        self.iteration += 1
        return terms

    def adversarial_step(
        self, x: Tensor, y: Tensor, kl: Tensor, place: int, phase: Phase
    ) -> dict[str, float]:
        """Autoencoder and discriminator as in latent-diffusion's LPIPSWithDiscriminator."""
        terms = {}
        if place >= phase.disc_warmup:
            nll, _ = reconstruction_loss(
                x, y, self.perceptual(x, y), pixel="l1", perceptual_weight=1.0, logvar=self.logvar
            )
            g = generator_loss(self.discriminator(y))
            grads = [
                torch.autograd.grad(term, self.model.last_layer, retain_graph=True)[0]
                for term in (nll, g)
            ]
            weight = 0.5 * adaptive_weight(grads[0], grads[1])
            self.optimizer.zero_grad()
            (nll + KL_WEIGHT * kl + weight * g).backward()
            self.optimizer.step()
            terms = {"g": float(g.detach()), "weight": float(weight)}
        self.disc_optimizer.zero_grad()
        loss = discriminator_loss(self.discriminator(x), self.discriminator(y.detach()))
        loss.backward()
        self.disc_optimizer.step()
        return terms | {"d": float(loss.detach())}


@torch.no_grad()
def score(model: AutoencoderKL, held_out: Path) -> str:
    """PSNR and mean shift of each channel, in levels, on 256 x 256 pictures, posterior sampled."""
    psnr, shifts, noise = [], [], torch.Generator().manual_seed(0)
    for file in sorted(held_out.glob("*.png")):
        pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB")))
        x = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1.0
        posterior = model.encode(x)
        y = model.decode(posterior.sample(torch.randn(posterior.mean.shape, generator=noise)))
        levels = ((y.clamp(-1, 1) + 1) * 127.5).floor()
        error = (levels - pixels.permute(2, 0, 1)[None].float()) / 255.0
        psnr.append(-10 * math.log10(float(error.square().mean())))
        shifts.append(255.0 * error.mean((0, 2, 3)))
    shift = ", ".join(f"{float(value):+.2f}" for value in torch.stack(shifts).mean(0))
    return f"held out: PSNR {np.mean(psnr):.2f} dB, mean shift of R, G, B {shift} levels"


def save(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def write_base(training: Training, pictures: list[list[np.ndarray]], path: Path) -> None:
    """The original's keys, discriminator included, in fp16, with what a consumer needs to know.

    `scaling_factor` is 1 over the deviation of the latents, as latent-diffusion measures it.
    """
    latents = torch.cat(
        [
            training.model.encode(crops(pictures, training.seed, number, PHASES[-1])).mean.flatten()
            for number in range(32)
        ]
    )
    state = {
        **training.model.state_dict(),
        "loss.logvar": training.logvar,
        **{f"loss.discriminator.{k}": v for k, v in training.discriminator.state_dict().items()},
    }
    metadata = {
        "format": "pt",
        "iteration": str(training.iteration),
        "norm_num_groups": str(MODEL["norm_num_groups"]),
        "scaling_factor": f"{1.0 / float(latents.std()):.4f}",
        "sample_size": "256",
    }
    half = {key: v.half() if v.is_floating_point() else v for key, v in state.items()}
    save_file({key: value.contiguous() for key, value in half.items()}, path, metadata)


def main() -> None:
    """Trains to the end, or goes on where the last call was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    saved = options.out / "state.pt"

    training = Training(options.seed)
    if saved.is_file():
        training.load(torch.load(saved, weights_only=True))
    pictures = photographs(options.shards)
    end = sum(phase.iterations for phase in PHASES)
    print(f"{len(pictures)} photographs; iteration {training.iteration:,} of {end:,}", flush=True)

    log = (options.out / "log.txt").open("a")
    last_save = began = time.monotonic()
    means: list[float] = []
    while training.iteration < end:
        phase, place = at(training.iteration)
        terms = training.step(crops(pictures, options.seed, training.iteration, phase))
        means.append(terms["mse"])
        now = time.monotonic()
        phase_ends = place == phase.iterations - 1
        if training.iteration % 100 == 0:
            psnr = 10 * math.log10(4.0 / np.mean(means[-100:]))
            others = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
            line = f"{training.iteration:,} | {now - began:.0f} s | PSNR of crops {psnr:.2f} | "
            print(line + others, file=log, flush=True)
        if now - last_save > SAVE_SECONDS or phase_ends:
            training.seconds += now - last_save
            save(saved, training.state())
            if phase_ends:
                save(options.out / f"phase_{PHASES.index(phase)}.pt", training.state())
            if options.held_out:
                print(score(training.model, options.held_out), file=log, flush=True)
            last_save = time.monotonic()
    path = options.out / "kl_f8_mini.safetensors"
    write_base(training, pictures, path)
    print(f"{path}: {training.seconds / 3600:.1f} hours", flush=True)


if __name__ == "__main__":
    main()
