"""Time on 1 to many GPUs, by a roofline: pure arithmetic on counts, data-sheet rates and shares.

    products    = max(FLOP / (peak x PRODUCT_SHARE), their bytes / memory's rate)
    micro-batch = max(products + other bytes / (memory's rate x MEMORY_SHARE), host)
    reduction   = 2 (n - 1) / n x reduced bytes / link rate      (ring all-reduce, n GPUs)
    iteration   = micro-batches x micro-batch + optimizers and EMA, by their bytes
                  + what of the reduction the last backward pass does not hide + saving
    images / s  = global batch / iteration

Source of the ring's factor: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for
clusters of workstations", 2009. The link is the slowest on the ring: within a node the GPUs' own,
across nodes one network adapter. Roofline: Williams, Waterman and Patterson, "Roofline: an
insightful visual performance model for multicore architectures", 2009.
"""

from dataclasses import dataclass, replace

import torch

from kl_f8_train.check import cost
from kl_f8_train.divisors import divisor_up_to
from kl_f8_train.settings import Config

PRODUCT_SHARE = 0.6  # of the peak rate that convolutions are assumed to reach
MEMORY_SHARE = 0.8  # of memory's rate that other kernels are assumed to reach
HOST_SECONDS = 0.015  # of Python a micro-batch: 10 to 20 ms with kernels that do nothing
BACKWARD = 0.5  # of a micro-batch's time, behind which its gradients are reduced
BUCKET_BYTES = 25 * 2**20  # DDP's: the last one has nothing to hide behind
COPY_RATE = 3.2e9  # bytes/s: 0.96 GB copied to the host in 0.3 s of a CPU, while training waits
WRITE_RATE = 0.26e9  # bytes/s: 0.96 GB hashed and written in 3.75 s, while training goes on
GPUS_PER_NODE = 8
GPU_COUNTS = (1, 8, 16, 64)
IMAGE_BYTES = 100_000  # assumed size of a training JPEG
NVLINK_3, NVLINK_4, PCIE_4 = 300e9, 450e9, 32e9  # bytes/s in one direction: half the data sheets'
HDR, NDR, ETHERNET_100 = 25e9, 50e9, 12.5e9  # 200, 400 and 100 Gbit/s


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, in its maker's figures."""

    name: str
    torch_name: str  # part of torch.cuda.get_device_name()
    flops: float  # bfloat16 tensor cores, dense, accumulating in float32, per second
    tf32: float  # the same in TF32
    float32: float  # without tensor cores
    memory_bytes: float  # the maker's GB as 1e9 bytes: at most what torch finds
    memory_rate: float  # bytes/s
    link: float  # to the other GPUs of a node, bytes/s in one direction
    network: float  # between nodes, assumed: what such machines are usually sold with
    source: str

    @property
    def room_bytes(self) -> float:
        """Bytes for tensors: the memory less the share of CUDA and its allocator."""
        return self.memory_bytes - cost.HEADROOM_BYTES

    def product_rate(self, kind: torch.dtype, precision: str) -> float:
        """Peak FLOP/s of products in `kind`; a recipe in "float32" leaves TF32 off."""
        if kind == torch.bfloat16:
            return self.flops
        return self.float32 if precision == "float32" else self.tf32


GPUS = (
    Gpu(
        *("A100 SXM 80 GB", "A100", 312e12, 156e12, 19.5e12, 80e9, 2.039e12),
        *(NVLINK_3, HDR, "NVIDIA A100 data sheet"),
    ),
    Gpu(
        *("H100 SXM", "H100", 989e12, 494e12, 67e12, 80e9, 3.35e12),
        *(NVLINK_4, NDR, "NVIDIA H100 data sheet"),
    ),
    Gpu(
        *("H200 SXM", "H200", 989e12, 494e12, 67e12, 141e9, 4.8e12),
        *(NVLINK_4, NDR, "NVIDIA H200 data sheet"),
    ),
    Gpu(
        *("L40S", "L40S", 362e12, 183e12, 91.6e12, 48e9, 0.864e12),
        *(PCIE_4, ETHERNET_100, "NVIDIA L40S data sheet"),
    ),
    Gpu(
        *("RTX 4090", "RTX 4090", 165e12, 82.6e12, 82.6e12, 24e9, 1.008e12),
        *(PCIE_4, ETHERNET_100, "NVIDIA Ada white paper"),
    ),
    Gpu(
        *("RTX 3090", "RTX 3090", 71e12, 35.6e12, 35.6e12, 24e9, 0.936e12),
        *(PCIE_4, ETHERNET_100, "NVIDIA GA102 white paper"),
    ),
)


@dataclass(frozen=True)
class Workload:
    """The work of one stage."""

    iterations: int
    global_batch: int
    most: int  # images of a micro-batch; a device takes the largest divisor of its share up to it
    precision: str
    one: cost.Work  # of an image, where a device has one micro-batch in an iteration
    several: cost.Work  # and where it has several
    decoder_bytes: float  # of gradients, reduced each iteration beside the backward pass
    discriminator_bytes: float  # reduced after it
    checkpoint_bytes: float
    save_every: int  # iterations

    @property
    def reduced_bytes(self) -> float:
        """Bytes that each process sends and receives in an iteration: float32 gradients."""
        return self.decoder_bytes + self.discriminator_bytes

    def micro_batch(self, gpus: int) -> int:
        """Images that a GPU computes at a time."""
        return divisor_up_to(self.global_batch // gpus, self.most)

    def of_image(self, gpus: int) -> cost.Work:
        """The work of one image on one of so many GPUs."""
        return self.several if self.micro_batch(gpus) * gpus < self.global_batch else self.one


def for_gpus(config: Config) -> Config:
    """The same run on GPUs, of another machine."""
    return replace(config, compute=replace(config.compute, accelerator="cuda"))


def workload(config: Config, iterations: int) -> Workload:
    """The iterations of a configuration, by `cost`'s counts."""
    count = cost.parameters(config)
    return Workload(
        iterations=iterations,
        global_batch=config.global_batch,
        most=config.compute.per_device_batch or 12,
        precision=config.precision,
        one=cost.work(config),
        several=cost.work(config, accumulating=True),
        decoder_bytes=4 * count["decoder"],
        discriminator_bytes=4 * count["discriminator"],
        checkpoint_bytes=checkpoint_bytes(config),
        save_every=config.checkpoint.every,
    )


def checkpoint_bytes(config: Config) -> int:
    """A training checkpoint: the state without gradients and the perceptual network."""
    left_out = 4 * cost.parameters(config)["perceptual"]
    return cost.state_bytes(config) - cost.reduced_bytes(config) - left_out


@dataclass(frozen=True)
class Prediction:
    """One workload on a number of GPUs."""

    gpus: int
    reduction_seconds: float  # of an iteration, what computing does not hide
    images_per_second: float
    days: float


def seconds_per_image(work: Workload, gpu: Gpu, gpus: int = 1) -> float:
    """On one of `gpus`, by the roofline, optimizers and moving average included."""
    image, batch = work.of_image(gpus), work.micro_batch(gpus)
    rates = {kind: gpu.product_rate(kind, work.precision) for kind in image.flops}
    arithmetic = sum(number / rates[kind] for kind, number in image.flops.items()) / PRODUCT_SHARE
    products = max(arithmetic, image.product_bytes / gpu.memory_rate)
    others = image.other_bytes / (gpu.memory_rate * MEMORY_SHARE)
    once = image.once_bytes / (gpu.memory_rate * MEMORY_SHARE)
    return max(products + others, HOST_SECONDS / batch) + once * gpus / work.global_batch


def reduction_seconds(reduced_bytes: float, gpus: int, rate: float) -> float:
    """A ring all-reduce: every GPU sends and receives 2 (n - 1) / n of the bytes."""
    return 2 * (gpus - 1) / gpus * reduced_bytes / rate


def exposed_seconds(work: Workload, image_seconds: float, gpus: int, rate: float) -> float:
    """Seconds of the reduction that the last micro-batch's backward pass does not hide."""
    hidden = BACKWARD * image_seconds * work.micro_batch(gpus)
    decoder = reduction_seconds(work.decoder_bytes, gpus, rate)
    last = reduction_seconds(min(BUCKET_BYTES, work.decoder_bytes), gpus, rate)
    after = reduction_seconds(work.discriminator_bytes, gpus, rate)
    return max(decoder - hidden, last) + after


def saving_seconds(work: Workload, iteration: float) -> float:
    """What an iteration waits for saves: their copies, and each for the one before it."""
    copied = work.checkpoint_bytes / COPY_RATE
    written = work.checkpoint_bytes / WRITE_RATE
    return (copied + max(0.0, written - work.save_every * iteration)) / work.save_every


def predict(work: Workload, image_seconds: float, gpus: int, gpu: Gpu | None) -> Prediction:
    """From the seconds of an image on one GPU; an unknown kind has links that cost nothing."""
    compute = image_seconds * work.global_batch / gpus
    reduction = 0.0
    if gpu is not None:
        link = gpu.link if gpus <= GPUS_PER_NODE else min(gpu.link, gpu.network)
        reduction = exposed_seconds(work, image_seconds, gpus, link)
    iteration = compute + reduction
    iteration += saving_seconds(work, iteration)
    return Prediction(
        gpus=gpus,
        reduction_seconds=reduction,
        images_per_second=work.global_batch / iteration,
        days=work.iterations * iteration / 86400,
    )


def find_gpu(device_name: str) -> Gpu | None:
    """The known kind whose name torch gives; a PCIe card counts as its SXM kin."""
    return next((gpu for gpu in GPUS if gpu.torch_name in device_name), None)
