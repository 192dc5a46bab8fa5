"""Fixed photographs at intervals: pictures and scores."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from kl_f8_train import images, output
from kl_f8_train.core import metrics
from kl_f8_train.core.step import Finetuner
from kl_f8_train.files import atomic_path
from kl_f8_train.run.callback import finetuner_of, tolerated
from kl_f8_train.run.outcome import badness
from kl_f8_train.run_dir import VALIDATION_FILE, MetricsFile
from kl_f8_train.settings import Config
from kl_f8_train.units import counted, shortest

ReportScores = Callable[[int, dict[str, float], Path], None]  # of an iteration's row and its strip
KeepBest = Callable[[Trainer, Finetuner], None]  # saves the best checkpoint so far


class Validation(Callback):
    """Fixed photographs at intervals: a strip from the EMA, and scores of EMAs and raw weights.

    Posterior mean, 8-bit reconstructions; a mean over the photographs in each column of
    `validation.csv`. The strips are JPEGs, input beside the EMA's reconstruction. `fixed` is
    side -> uint8 (3, side, side); columns of sides after the first end in it: `psnr_ema_512px`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        start: int,
        fixed: dict[int, list[Tensor]],
        report: ReportScores,
        keep_best: KeepBest | None = None,
        say: output.Say = output.say,
    ) -> None:
        self.folder, self.every, self.fixed = run_dir / "pictures", config.log.pictures_every, fixed
        self.report, self.keep_best, self.say = report, keep_best, say
        self.stop, self.validated = config.stop_iteration, start
        self.table = MetricsFile(run_dir / VALIDATION_FILE, start - 1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates the start; the first time is the longest, as kernels are chosen."""
        if self._is_wanted(trainer):
            count = len(next(iter(self.fixed.values())))
            sizes = ", ".join(f"{size} x {size}" for size in self.fixed)
            self.say(f"validating {counted(count, 'photograph', 's')}, {sizes} pixels ...")
        self.validate(trainer, finetuner_of(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Validates when it is time, and at the end of the run."""
        finetuner = finetuner_of(pl_module)
        if not self.every or finetuner.iteration == self.validated:  # still, after a warm-up
            return
        if finetuner.iteration % self.every == 0 or finetuner.iteration >= self.stop:
            self.validate(trainer, finetuner)

    def validate(self, trainer: Trainer, finetuner: Finetuner) -> None:
        """Writes a row of `validation.csv` and `pictures/iteration-NNNNNNNNN.jpg`."""
        if not self._is_wanted(trainer):
            return
        row: dict[str, float] = {}
        strip: list[Tensor] = []
        with torch.compiler.set_stance("force_eager"):  # too few images to compile graphs for
            for size, originals in self.fixed.items():
                outputs = [reconstruct_fixed(finetuner, image) for image in originals]
                scores = validation_scores(finetuner, originals, outputs)
                if strip:  # a further size
                    row |= {f"{key}_{size}px": score for key, score in scores.items()}
                else:
                    pairs = zip(originals, outputs, strict=True)
                    row, strip = scores, [images.hstack([image, by["ema"]]) for image, by in pairs]
        iteration = self.validated = finetuner.iteration
        path = self.folder / f"iteration-{iteration:09d}.jpg"
        before = min((badness(_numbers(old)) for old in self.table.rows), default=None)
        if self.keep_best and before is not None and badness(row) < before:
            self.keep_best(trainer, finetuner)
        with tolerated():
            self.table.write(iteration, row)
            with atomic_path(path) as temporary:
                images.to_pil(images.vstack(strip)).save(temporary, format="JPEG", quality=92)
            self.report(iteration, row, path)

    def _is_wanted(self, trainer: Trainer) -> bool:
        found = any(self.fixed.values())
        return bool(self.every and found and trainer.is_global_zero)


def _numbers(row: Mapping[str, str]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if value}


@torch.no_grad()
def reconstruct_fixed(finetuner: Finetuner, image: Tensor) -> dict[str, Tensor]:
    """uint8 (3, H, W) -> the same from the posterior mean, by "ema", "raw" and "ema_0.9999", ..."""
    x = images.to_float(image.to(finetuner.device))[None].to(finetuner.autoencoder.last_layer.dtype)
    latents = finetuner.autoencoder.encode(x).mean
    first, *further = finetuner.averages.items()
    outputs = {"ema": _decode(first[1], latents), "raw": finetuner.autoencoder.decode(latents)}
    outputs |= {f"ema_{shortest(decay)}": _decode(part, latents) for decay, part in further}
    return {name: images.to_uint8(output[0]).cpu() for name, output in outputs.items()}


def _decode(average: nn.ModuleDict, latents: Tensor) -> Tensor:
    decoded: Tensor = average["decoder"](average["post_quant_conv"](latents))
    return decoded


@torch.no_grad()
def validation_scores(
    finetuner: Finetuner, originals: list[Tensor], outputs: list[dict[str, Tensor]]
) -> dict[str, float]:
    """PSNR, SSIM and perceptual distance of EMAs and raw weights, means over the photographs.

    And the EMA's shift of colour and saturation, reconstruction minus input, in 8-bit levels.
    """
    row: dict[str, float] = {}
    x = torch.stack(originals)
    for name in outputs[0]:
        y = torch.stack([output[name] for output in outputs])
        x01, y01 = x.double() / 255.0, y.double() / 255.0
        row[f"psnr_{name}"] = float(metrics.psnr(x01, y01).mean())
        row[f"ssim_{name}"] = float(metrics.ssim(x01, y01).mean())
        on_device = [images.to_float(t.to(finetuner.device)) for t in (x, y)]
        row[f"perceptual_{name}"] = float(finetuner.perceptual(*on_device).mean())
        if name == "ema":
            shift = metrics.colour_shift(x01, y01).mean(dim=0)
            row |= {f"{c}_shift_ema": float(v) for c, v in zip(metrics.COLOURS, shift, strict=True)}
    return row
