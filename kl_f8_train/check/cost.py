"""What an iteration costs in arithmetic and memory, computed from the configuration alone.

A convolution with i inputs, o outputs and t taps takes 2 i o t operations an output pixel, in the
forward pass, and again for the gradient of its weight and of its input. Attention over L positions
takes 4 L^2 C forward and 10 L^2 C backward, as torch.utils.flop_counter counts it. Everything else
(normalisation, activations, optimizers, EMA) is below a thousandth and left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kl_f8_train.config import Config, Model

GIB = 2**30
HEADROOM_BYTES = 2 * GIB  # CUDA's context and the allocator's losses, assumed
VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
PERCEPTUAL_PARAMETERS = {"lpips_vgg": 14_716_160, "st_lpips_alex": 2_470_848}
# Kept for the backward pass, in bytes a pixel and image, measured by saved_tensors_hooks.
PERCEPTUAL_BYTES = {"lpips_vgg": 2440, "st_lpips_alex": 1409}
# float32, or under CUDA's autocast: normalisation and swish keep float32, the convolution bfloat16.
ELEMENT_BYTES = {"float32": 4.0, "bfloat16": 10 / 3}


@dataclass(frozen=True)
class Layer:
    """A convolution, or attention's products, on a square of `side` output pixels."""

    inputs: int
    outputs: int
    taps: int
    side: int
    normed: bool = False  # normalisation, and mostly swish, before it
    kept: float = 1.0  # copies of its input that the backward pass needs, per output pixel
    computed: float = 1.0  # share of the taps that takes arithmetic
    backward: float = 2.0  # cost of both gradients, in forward passes
    vectors: int = 1  # parameters per output channel beside the weight: bias, BatchNorm
    learned: bool = True

    @property
    def flops(self) -> float:
        """Of the forward pass, for one image."""
        return 2.0 * self.inputs * self.outputs * self.taps * self.computed * self.side**2

    @property
    def parameters(self) -> int:
        """Weight, bias, and the normalisation before it."""
        if not self.learned:
            return 0
        norm = 2 * self.inputs if self.normed else 0
        return self.inputs * self.outputs * self.taps + self.vectors * self.outputs + norm

    @property
    def kept_elements(self) -> float:
        """Numbers of one image that the backward pass needs."""
        return self.inputs * self.side**2 * self.kept


# --- arithmetic -----------------------------------------------------------------------------


def flops_per_image(config: Config) -> float:
    """The least an iteration takes for one image: every pass once, no gradient that nobody uses.

    Without recomputation by activation checkpointing; see `recomputed_flops`.
    """
    return sum(flops_by_phase(config).values())


def flops_by_phase(config: Config) -> dict[str, float]:
    """Operations of one image's encode, decode, losses, backward and discriminator."""
    encode = _forward(encoder_layers(config))
    decoder = decoder_layers(config)
    decode = _forward(decoder)
    perceptual = _forward(perceptual_layers(config))
    phases = {
        "encode": encode,
        "decode": decode,
        "losses": 3 * perceptual,  # target, reconstruction, gradient of the reconstruction
        "backward": sum(layer.backward * layer.flops for layer in decoder)
        - decoder[0].flops,  # the latents need no gradient
    }
    if config.adversarial is not None:
        layers = discriminator_layers(config)
        once = _forward(layers)
        phases["losses"] += 2 * once + 2 * decoder[-1].flops  # and the last layer's two gradients
        phases["discriminator"] = 2 * (3 * once - layers[0].flops)
        if config.second_forward:
            phases["discriminator"] += encode + decode
    return phases


def recomputed_flops(config: Config) -> float:
    """What activation checkpointing adds for one image: its levels' residual blocks once more."""
    return sum(
        _forward(block)
        for level, blocks, _ in _up_levels(config)
        for block in blocks
        if level < config.compute.checkpoint_levels
    )


def _forward(layers: list[Layer]) -> float:
    return sum(layer.flops for layer in layers)


# --- memory ---------------------------------------------------------------------------------


def parameters(config: Config) -> dict[str, int]:
    """How many numbers each network has, quant_conv and post_quant_conv included."""
    networks = {
        "encoder": encoder_layers(config),
        "decoder": decoder_layers(config),
        "discriminator": discriminator_layers(config),
    }
    return {
        **{name: sum(layer.parameters for layer in layers) for name, layers in networks.items()},
        "perceptual": PERCEPTUAL_PARAMETERS[config.loss.perceptual],
    }


def state_bytes(config: Config) -> int:
    """What stays in memory, in float32: networks, EMA, gradients and Adam's two moments."""
    count = parameters(config)
    trained = count["decoder"] + count["discriminator"]
    return 4 * (sum(count.values()) + count["decoder"] + 3 * trained)


def reduced_bytes(config: Config) -> int:
    """What each process sends and receives once an iteration, as float32 gradients."""
    count = parameters(config)
    return 4 * (count["decoder"] + count["discriminator"])


def activation_bytes(config: Config, batch: int, element_bytes: float | None = None) -> float:
    """The decoder's activations for `batch` images, kept from its forward to its backward pass.

    For bfloat16 the eager CUDA figure, 10/3 bytes a number on average; a compiled network keeps
    less, the CPU's autocast 2. Tested against the tensors that torch saves.
    """
    elements = 0.0
    for level, blocks, upsample in _up_levels(config):
        elements += _kept(upsample)
        for block in blocks:
            recomputed = level < config.compute.checkpoint_levels
            elements += block[0].inputs * block[0].side ** 2 if recomputed else _kept(block)
    return batch * (elements + _kept(_around_levels(config))) * _bytes(config, element_bytes)


def peak_bytes(config: Config, batch: int, element_bytes: float | None = None) -> float:
    """The most that an iteration holds for micro-batches of `batch`, without allocator's overhead.

    Either at the end of the perceptual forward pass, or in the backward pass through a residual
    block at full resolution, with three maps of its gradients.
    """
    pixels = config.data.crop**2
    perceptual = PERCEPTUAL_BYTES[config.loss.perceptual] * pixels
    _, blocks, _ = list(_up_levels(config))[-1]
    widest = 3 * blocks[0][0].inputs * pixels
    again = _kept(blocks[0]) if config.compute.checkpoint_levels else 0.0
    working = max(perceptual, (again + widest) * _bytes(config, element_bytes))
    kept = activation_bytes(config, batch, element_bytes)
    return state_bytes(config) + kept + batch * working


def largest_batch(config: Config, room_bytes: float, element_bytes: float | None = None) -> int:
    """Images per micro-batch that fit into `room_bytes`, by `peak_bytes`."""
    first, second = (peak_bytes(config, batch, element_bytes) for batch in (0, 1))
    return max(0, int((room_bytes - first) // (second - first)))


def largest_divisor(
    config: Config, share: int, room_bytes: float, element_bytes: float | None = None
) -> int:
    """The largest divisor of `share`, a device's images of an iteration, that fits as micro-batch.

    0 if not even one image fits.
    """
    most = min(share, largest_batch(config, room_bytes, element_bytes))
    return max((n for n in range(1, most + 1) if share % n == 0), default=0)


def _bytes(config: Config, element_bytes: float | None) -> float:
    return ELEMENT_BYTES[config.precision] if element_bytes is None else element_bytes


def _kept(layers: list[Layer]) -> float:
    return sum(layer.kept_elements for layer in layers)


# --- the networks' layers -------------------------------------------------------------------


def encoder_layers(config: Config) -> list[Layer]:
    """Encoder and quant_conv."""
    model, side = config.model, config.data.crop
    layers = [Layer(3, model.ch, 9, side)]
    previous = model.ch
    for level, width in enumerate(_widths(model)):
        for _ in range(model.num_res_blocks):
            layers += _residual(previous, width, side)
            previous = width
        if level < len(model.ch_mult) - 1:
            side //= 2
            layers.append(Layer(width, width, 9, side))
    layers += _middle(previous, side)
    layers.append(Layer(previous, 2 * model.z_channels, 9, side, normed=True))
    return [*layers, Layer(2 * model.z_channels, 2 * model.embed_dim, 1, side)]


def decoder_layers(config: Config) -> list[Layer]:
    """post_quant_conv and decoder: the trained part."""
    before, after = _around_levels(config)[:-1], _around_levels(config)[-1]
    layers = list(before)
    for _, blocks, upsample in _up_levels(config):
        layers += [layer for block in (*blocks, upsample) for layer in block]
    return [*layers, after]


def perceptual_layers(config: Config) -> list[Layer]:
    """The perceptual network's convolutions on one image (its heads, once a pair, left out)."""
    crop = config.data.crop
    if config.loss.perceptual == "st_lpips_alex":
        return _alex_layers(crop)
    layers, previous = [], 3
    for depth, stage in enumerate(VGG):
        for width in stage:
            layers.append(Layer(previous, width, 9, crop // 2**depth))
            previous = width
    return layers


def _alex_layers(crop: int) -> list[Layer]:
    """ST-LPIPS' convolutions, its blurring ones (one input each) among them."""

    def blurred(side: int) -> int:  # 3 x 3 at every other pixel, with two reflected ones around
        return (side + 1) // 2 + 1

    first = crop - 6  # 11 x 11 with two pixels around
    pooled = blurred(first) - 2  # each pooling takes 3 x 3, too, with nothing around
    second = blurred(pooled)
    third = blurred(second - 2)
    return [
        Layer(3, 64, 121, first),
        Layer(1, 64, 9, blurred(first)),
        Layer(1, 64, 9, second),
        Layer(64, 192, 25, second),
        Layer(1, 192, 9, third),
        Layer(192, 384, 9, third),
        Layer(384, 256, 9, third),
        Layer(256, 256, 9, third),
    ]


def discriminator_layers(config: Config) -> list[Layer]:
    """The PatchGAN's convolutions; none without an adversarial term."""
    if config.adversarial is None:
        return []
    layers, previous, side = [], 3, config.data.crop
    depth = config.adversarial.n_layers
    for level in range(depth + 1):
        side = side // 2 if level < depth else side - 1
        width = config.adversarial.ndf * min(2**level, 8)
        layers.append(Layer(previous, width, 16, side, vectors=2 if level else 1))
        previous = width
    return [*layers, Layer(previous, 1, 16, side - 1)]


def latent_side(config: Config) -> int:
    """Latents per side: crop / 8 for kl-f8."""
    return int(config.data.crop // 2 ** (len(config.model.ch_mult) - 1))


def _widths(model: Model) -> list[int]:
    return [model.ch * multiplier for multiplier in model.ch_mult]


def _residual(inputs: int, outputs: int, side: int) -> list[Layer]:
    layers = [Layer(width, outputs, 9, side, normed=True, kept=3) for width in (inputs, outputs)]
    shortcut = [Layer(inputs, outputs, 1, side, kept=0)]  # its input is the norm's
    return [*layers, *shortcut] if inputs != outputs else layers


def _middle(channels: int, side: int) -> list[Layer]:
    """Residual block, attention (query, key, value, products, output), residual block."""
    block = _residual(channels, channels, side)
    query = Layer(channels, channels, 1, side, normed=True, kept=2)
    key = value = Layer(channels, channels, 1, side, kept=0)
    products = Layer(side**2, channels, 2, side, kept=0, backward=2.5, learned=False)
    output = Layer(channels, channels, 1, side, kept=5)  # with query, key, value
    return [*block, query, key, value, products, output, *block]


def _around_levels(config: Config) -> list[Layer]:
    """The decoder's layers before its levels, and the last one behind them."""
    model, side = config.model, latent_side(config)
    top = _widths(model)[-1]
    return [
        Layer(model.embed_dim, model.z_channels, 1, side),
        Layer(model.z_channels, top, 9, side),
        *_middle(top, side),
        Layer(model.ch, 3, 9, config.data.crop, normed=True, kept=3),
    ]


def _up_levels(config: Config) -> Iterator[tuple[int, list[list[Layer]], list[Layer]]]:
    """(level, its residual blocks, its upsampling), from the lowest resolution to the highest."""
    widths, side = _widths(config.model), latent_side(config)
    share, kept = (4 / 9, 1 / 4) if config.compute.subpixel_upsample else (1.0, 1.0)
    previous = widths[-1]
    for level in reversed(range(len(widths))):
        width = widths[level]
        inputs = [previous] + [width] * config.model.num_res_blocks
        blocks = [_residual(channels, width, side) for channels in inputs]
        side *= 2
        doubling = Layer(width, width, 9, side, kept=kept, computed=share)
        yield level, blocks, [doubling] if level else []
        previous = width
