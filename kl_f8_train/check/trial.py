"""The part of `doctor` that tries one iteration: its gradients, its time and its memory."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kl_f8_train import images
from kl_f8_train.check import benchmark
from kl_f8_train.check.findings import Report
from kl_f8_train.core import machine
from kl_f8_train.core.batch import Batch
from kl_f8_train.core.losses import generator_loss, reconstruction_loss
from kl_f8_train.core.model import FROZEN
from kl_f8_train.core.step import Finetuner
from kl_f8_train.data import identity
from kl_f8_train.data.loading import PositionDataset, collate, open_data
from kl_f8_train.errors import RunFailedError
from kl_f8_train.rules import micro_batch
from kl_f8_train.run.start import adopt
from kl_f8_train.settings import Config
from kl_f8_train.units import counted, memory
from kl_f8_train.units import speed as rate

FEW_IMAGES = 2  # of the gradient audit, and of the trial iteration without a GPU
PATIENCE_SECONDS = 60.0  # a trial iteration that took longer is not run a second time


def try_iteration(
    report: Report, config: Config, finetuner: Finetuner, world: int, allow_changes: bool
) -> None:
    """Audits the gradients of a real batch, then runs and times an iteration on it."""
    report.facts |= {"start_iteration": finetuner.iteration, "warmup": finetuner.warmup_left}
    device = benchmark.find_device(config)
    cuda = device.type == "cuda"
    micro = micro_batch(config, world)
    count = micro if cuda else min(micro, FEW_IMAGES)
    plan, sources = open_data(config, report.detail)
    adopt(finetuner, identity.of_data(sources), config.run_dir, allow_changes)
    dataset = PositionDataset(plan, sources, config)
    first = finetuner.iteration * config.global_batch
    batch = collate([dataset[first + slot] for slot in range(count)]).to(device)
    finetuner.to(device)
    finetuner.perceptual.to(device)
    # As later in the run: the discriminator takes part, whatever comes first.
    finetuner.run_state.warmup_left = 0
    if config.adversarial is not None:  # with everything that it will cost
        start = config.adversarial.start_iteration
        finetuner.run_state.iteration = max(finetuner.iteration, start)
    try:
        with torch.compiler.set_stance("force_eager"):  # each term's backward pass keeps the graph
            audit = gradient_audit(finetuner, batch.first(FEW_IMAGES))
        report.facts["gradient_audit"] = audit
        for name, norm in audit.items():
            report.detail(f"gradient norm at decoder.conv_out.weight: {name} {norm:.4g}")
        seconds, cold = _timed_iteration(finetuner, batch)
    except RuntimeError as error:
        if not (cuda and machine.is_out_of_memory(error)):
            raise
        raise RunFailedError(
            f"out of GPU memory with {counted(count, 'image', 's')}: {error}\n"
            "Halve compute.per_device_batch (the global batch stays, by accumulation)"
        ) from error
    threads = counted(torch.get_num_threads(), "thread", "s")
    name = benchmark.device_name(device) if cuda else f"this CPU, {threads}"
    most = benchmark.peak_memory(device)
    report.facts |= {
        "device": name,
        "seconds_per_image": seconds / count,
        "cold_iteration": cold,
        "memory_bytes": most,
    }
    note = " (the first, cold iteration; later ones are quicker)" if cold else ""
    tried = f"{count} of {micro} images" if count < micro else counted(count, "image", "s")
    report.detail(
        f"{tried} in {seconds:.2f} s{note} on {name}: "
        f"{rate(count / seconds)}; memory at most {memory(most)}"
    )
    if not cuda:
        report.remark("time and memory were measured on this machine's CPU, not on a GPU")
    _check_gradients(finetuner, audit)
    _check_workers(report, config, count / seconds)


def gradient_audit(finetuner: Finetuner, batch: Batch) -> dict[str, float]:
    """Norm of each loss term's gradient at the decoder's last layer.

    The perceptual term with its weight, the adversarial one before its adaptive weight.
    """
    config, model = finetuner.config, finetuner.autoencoder
    dtype = model.last_layer.dtype
    x = images.to_float(batch.images).to(dtype)
    autocast = torch.autocast(x.device.type, torch.bfloat16, config.precision == "bfloat16")
    with torch.no_grad(), autocast:
        latents = model.encode(x).sample(batch.noise[0].to(dtype))
    with autocast:
        y = model.decode(latents).to(dtype)
        logits = None if finetuner.discriminator is None else finetuner.discriminator(y)

    def nll(name: str, weight: float) -> Tensor:
        # nll is linear in its weights: with all others 0 it is this term alone.
        alone = {f"{key}_weight": weight * (key == name) for key in config.loss.weights}
        distance = finetuner.perceptual(x, y) if name == "perceptual" else y.new_zeros(1)
        logvar = finetuner.logvar.detach()
        return reconstruction_loss(x, y, distance.to(dtype), pixel="l1", logvar=logvar, **alone)[0]

    weights = {name: weight for name, weight in config.loss.weights.items() if weight}
    both = {"l1", "mse"} <= weights.keys()
    terms = {
        "pixel" if name in ("l1", "mse") and not both else name: nll(name, weight)
        for name, weight in weights.items()
    }
    if logits is not None:
        terms["adversarial"] = generator_loss(logits.to(dtype))
    return {
        name: float(torch.autograd.grad(term, model.last_layer, retain_graph=True)[0].norm())
        for name, term in terms.items()
    }


def _timed_iteration(finetuner: Finetuner, batch: Batch) -> tuple[float, bool]:
    """Seconds of the second iteration; of the first, and True, if that took too long for two.

    A first iteration that compiles says nothing about the others.
    """
    device = batch.images.device
    run = benchmark.iteration_of(finetuner, device)
    seconds: list[float] = []
    for _ in range(2):
        benchmark.reset_peak(device)  # neither the audit's memory nor the compiler's
        seconds.append(benchmark.timed(run, batch, device))
        if seconds[-1] > PATIENCE_SECONDS and not machine.compiles(finetuner.config.compute):
            break
    return seconds[-1], len(seconds) == 1


def _check_gradients(finetuner: Finetuner, audit: Mapping[str, float]) -> None:
    """Raises RunFailedError for a term without a gradient, and for a frozen part with one."""
    wrong = [f"{name} {norm:g}" for name, norm in audit.items() if not 0 < norm < math.inf]
    model = finetuner.autoencoder
    for part in FROZEN:
        for name, parameter in getattr(model, part).named_parameters():
            if parameter.grad is not None:
                wrong.append(f"{part}.{name} has a gradient, though frozen")
    if wrong:
        raise RunFailedError(
            f"gradient audit: {'; '.join(wrong[:5])}; expected every term above 0 and finite, and "
            "none in encoder and quant_conv. Check init.weights, the images, and precision=float32"
        )


def _check_workers(report: Report, config: Config, wanted: float) -> None:
    """Compares one loader process with what the device takes."""
    slowest = min(entry["images_per_second_per_worker"] for entry in report.facts["data"].values())
    workers = math.ceil(wanted / slowest)
    report.detail(
        f"data: {counted(workers, 'loader process', 'es')} can keep it busy; "
        f"data.workers={config.data.workers}"
    )
    if workers > max(1, config.data.workers):
        report.remark(f"data.workers={config.data.workers} is too few; {workers} would do")
