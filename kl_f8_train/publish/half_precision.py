"""Does a decoder survive half precision? Its largest activation, and the error of fp16 and bf16.

Half precision is emulated: weights, and what enters and leaves every module, are rounded to the
type, while sums run in float32, as on GPUs. So the answer is the same on any machine, and quick
where the CPU has no half-precision convolutions. What happens inside attention is not rounded.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kl_f8_train import images, shipped
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.errors import RunFailedError
from kl_f8_train.folders import load_sizes
from kl_f8_train.units import counted

LIMIT = torch.finfo(torch.float16).max  # 65504
TRIED = 3  # images
DECODES = ("decoder", "post_quant_conv")


@torch.no_grad()
def measure(model: AutoencoderKL, pictures: list[Tensor]) -> dict[str, Any]:
    """Largest activation and decoding errors, in 8-bit levels against float32, on uint8 images.

    `black` counts the images that decode to inf or NaN in fp16.
    Raises RunFailedError if one does in float32.
    """
    latents = [model.encode(images.to_float(picture[None])).mean for picture in pictures]
    with largest_outputs(model) as largest:
        exact = [model.decode(z) for z in latents]
    if not all(bool(y.isfinite().all()) for y in exact):
        raise RunFailedError("the decoder outputs inf or NaN even in float32; nothing was exported")
    layer = max(largest, key=lambda name: largest[name])
    result: dict[str, Any] = {"largest_activation": largest[layer], "layer": layer}
    for dtype in (torch.float16, torch.bfloat16):
        with _rounded(model, dtype):
            rounded = [model.decode(z) for z in latents]
        black = sum(not bool(y.isfinite().all()) for y in rounded)
        errors = [levels(a, b) for a, b in zip(exact, rounded, strict=True)]
        # NaN and infinity are not JSON: an error that is not finite is stored as null.
        result[str(dtype).removeprefix("torch.")] = {
            "mean": _or_none(sum(mean for mean, _ in errors) / len(errors)),
            "max": _or_none(max(most for _, most in errors)),
            "black": black,
        }
    return result


def describe(result: dict[str, Any]) -> list[str]:
    """Lines for people; a warning among them if fp16 would turn images black."""
    lines = [
        f"half precision, on {result['images']}: largest activation "
        f"{result['largest_activation']:,.4g} ({result['layer']}), fp16 holds {LIMIT:,.0f}"
    ]
    if "rescaled" in result:
        proof = result["rescaled"]
        lines.append(
            f"rescaled by powers of two (the residual stream x {proof['stream']}); the largest "
            f"activation was {proof['before']['largest_activation']:,.4g}; in float32 the same"
            + (" to the bit" if proof["float32_bit_equal"] else "")
        )
    for name in ("float16", "bfloat16"):
        error = result[name]
        if error["mean"] is None:
            lines.append(f"{name}: inf or NaN in {counted(error['black'], 'image', 's')}")
        else:
            lines.append(
                f"{name}: mean {error['mean']:.3f}, max {error['max']:.2f} of 255 levels from fp32"
            )
    if overflows(result):
        lines.append(
            "WARNING: images turn black in fp16; export it with --fp16-safe (a lone file: "
            "kl-f8-train fp16-safe FILE), or run it in fp32 or bf16 (AUTOMATIC1111: "
            "--no-half-vae, ComfyUI: --fp32-vae or --bf16-vae)"
        )
    else:
        lines.append("half precision: safe")
    return lines


def overflows(result: Mapping[str, Any]) -> bool:
    """Whether fp16 turns images black, or is about to."""
    return bool(result["float16"]["black"] or result["largest_activation"] > LIMIT)


def levels(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean and largest difference of two images in [-1, 1], clamped, in 8-bit levels."""
    difference = (one.clamp(-1, 1) - other.clamp(-1, 1)).abs() * 127.5  # 255 levels over [-1, 1]
    return float(difference.mean()), float(difference.max())


def choose_images(folder: Path | None, size: int) -> tuple[str, list[Tensor]]:
    """What they are, and uint8 (3, size, size) images of `folder`, or of the package's photographs.

    Raises MissingInputError if there is none in `folder`.
    """
    chosen = load_sizes(folder or shipped.HELD_OUT, [size], TRIED)[size]
    kind, source = ("image", folder.name) if folder else ("photograph", "the package")
    return f"{counted(len(chosen), kind, 's')} of {source} at {size} x {size}", chosen


def pattern(size: int) -> Tensor:
    """uint8 (3, size, size): waves that grow finer to the right, another colour in each channel."""
    x = torch.linspace(0, 1, size, dtype=torch.float64)
    waves = [(40 * x * x + 3 * shift + 5 * x[:, None] * shift).sin() for shift in range(1, 4)]
    return ((torch.stack(waves) + 1) * 127.5).round().to(torch.uint8)


def largest_outputs(
    model: AutoencoderKL, parts: tuple[str, ...] = DECODES
) -> AbstractContextManager[dict[str, float]]:
    """Inside, every module of these parts notes its largest output, by name."""
    return noted(_modules(model, parts), lambda module, inputs, output: float(output.abs().max()))


@contextmanager
def noted(
    modules: Mapping[str, nn.Module], measured: Callable[[Any, tuple[Tensor, ...], Tensor], float]
) -> Iterator[dict[str, float]]:
    """Inside, the largest `measured(module, inputs, output)` of each module so far, by name."""
    seen: dict[str, float] = {}

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = max(seen.get(name, 0.0), measured(module, inputs, output))

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(hook, name)))
        yield seen


@contextmanager
def _rounded(model: AutoencoderKL, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the decoder's weights and all that enters or leaves its modules are rounded."""
    exact: dict[nn.Parameter, Tensor] = {}  # of the modules that run now: one layer's, not all

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for parameter in module.parameters(recurse=False):
            exact[parameter] = parameter.data
            parameter.data = parameter.data.to(dtype).float()
        return tuple(x.to(dtype).float() for x in inputs)

    def leave(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        for parameter in module.parameters(recurse=False):
            parameter.data = exact.pop(parameter)
        return output.to(dtype).float()

    with ExitStack() as hooks:
        for module in _modules(model, DECODES).values():
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for parameter, values in exact.items():
                parameter.data = values


def _modules(model: AutoencoderKL, parts: tuple[str, ...]) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name.split(".")[0] in parts}


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
