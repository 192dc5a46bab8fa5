"""Time on 1 to many GPUs, by formula: pure arithmetic on counts, data-sheet rates and one share.

    compute     = flops per image x images per GPU / (peak x share)
    reduction   = 2 (n - 1) / n x reduced bytes / link rate      (ring all-reduce, n GPUs)
    iteration   = compute + reduction                            (no overlap counted)
    images / s  = global batch / iteration

Source of the ring's factor: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for
clusters of workstations", 2009. The link is the slowest on the ring: within a node the GPUs' own,
across nodes one network adapter.
"""

from dataclasses import dataclass

from kl_f8_train.check import cost
from kl_f8_train.config import Config

SHARE = 0.25  # of the peak rate that training is assumed to reach
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
    memory_bytes: float
    link: float  # to the other GPUs of a node, bytes/s in one direction
    network: float  # between nodes, assumed: what such machines are usually sold with
    source: str

    @property
    def room_bytes(self) -> float:
        """What CUDA and its allocator leave of the memory."""
        return self.memory_bytes - cost.HEADROOM_BYTES


GPUS = (
    Gpu("A100 SXM 80 GB", "A100", 312e12, 80e9, NVLINK_3, HDR, "NVIDIA A100 data sheet"),
    Gpu("H100 SXM", "H100", 989e12, 80e9, NVLINK_4, NDR, "NVIDIA H100 data sheet"),
    Gpu("H200 SXM", "H200", 989e12, 141e9, NVLINK_4, NDR, "NVIDIA H200 data sheet"),
    Gpu("L40S", "L40S", 362e12, 48e9, PCIE_4, ETHERNET_100, "NVIDIA L40S data sheet"),
    Gpu("RTX 4090", "RTX 4090", 165e12, 24e9, PCIE_4, ETHERNET_100, "NVIDIA Ada white paper"),
    Gpu("RTX 3090", "RTX 3090", 71e12, 24e9, PCIE_4, ETHERNET_100, "NVIDIA GA102 white paper"),
)


@dataclass(frozen=True)
class Workload:
    """What one stage asks of a machine."""

    name: str
    iterations: int
    global_batch: int
    flops_per_image: float  # forward and backward
    reduced_bytes: float  # gradients, each iteration
    checkpoint_bytes: float

    @property
    def images(self) -> int:
        """Over the whole stage."""
        return self.iterations * self.global_batch


def workload(config: Config, iterations: int, name: str = "") -> Workload:
    """The iterations of a configuration, by `cost`'s counts."""
    return Workload(
        name=name or config.name,
        iterations=iterations,
        global_batch=config.global_batch,
        flops_per_image=cost.flops_per_image(config),
        reduced_bytes=cost.reduced_bytes(config),
        checkpoint_bytes=checkpoint_bytes(config),
    )


def checkpoint_bytes(config: Config) -> int:
    """A training checkpoint: networks, EMAs, and Adam's two moments, in float32."""
    count = cost.parameters(config)
    trained = count["decoder"] + count["discriminator"]
    averages = len(config.ema.decays) * count["decoder"]
    return 4 * (count["encoder"] + averages + 3 * trained)


@dataclass(frozen=True)
class Prediction:
    """One workload on a number of GPUs."""

    gpus: int
    images_per_gpu: float  # in an iteration
    compute_seconds: float
    reduction_seconds: float
    images_per_second: float
    days: float


def seconds_per_image(work: Workload, gpu: Gpu, share: float = SHARE) -> float:
    """On one GPU, at a share of its peak rate."""
    return work.flops_per_image / (gpu.flops * share)


def reduction_seconds(reduced_bytes: float, gpus: int, rate: float) -> float:
    """A ring all-reduce: every GPU sends and receives 2 (n - 1) / n of the bytes."""
    return 2 * (gpus - 1) / gpus * reduced_bytes / rate


def predict(work: Workload, image_seconds: float, gpus: int, gpu: Gpu | None) -> Prediction:
    """From the seconds of an image on one GPU; an unknown kind has links that cost nothing."""
    compute = image_seconds * work.global_batch / gpus
    reduction = 0.0
    if gpu is not None:
        link = gpu.link if gpus <= GPUS_PER_NODE else min(gpu.link, gpu.network)
        reduction = reduction_seconds(work.reduced_bytes, gpus, link)
    iteration = compute + reduction
    return Prediction(
        gpus=gpus,
        images_per_gpu=work.global_batch / gpus,
        compute_seconds=compute,
        reduction_seconds=reduction,
        images_per_second=work.global_batch / iteration,
        days=work.iterations * iteration / 86400,
    )


def find_gpu(device_name: str) -> Gpu | None:
    """The known kind whose name torch gives; a PCIe card counts as its SXM kin."""
    return next((gpu for gpu in GPUS if gpu.torch_name in device_name), None)
