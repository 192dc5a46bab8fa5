"""Images a second and core: our data path against a plain webdataset + torchvision pipeline.

    python tests/benchmarks/data_speed.py [--images 400]
    python tests/benchmarks/data_speed.py --memory [--draws 100000]

One process, one thread, CPU time. Both read the same shards: JPEGs of quality 95 whose shorter side
is 512 pixels, cut from photographs that scikit-image ships. Both resize to 384 and crop 256 at
random; ours also draws the noise, the plain one also makes floats.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import skimage
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torchvision import transforms

from kl_f8_train import config
from kl_f8_train.data.loading import PositionDataset, open_data
from kl_f8_train.data.pack import pack

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
NEEDED = 8 * 200  # images a second: 8 GPUs
SETTINGS = (
    *("data.shorter_side=384", "data.crop=256", "model.ch_mult=1,2,4,4"),
    *("global_batch=8", "init.weights=none", "init.iteration=0"),
)


def make_shards(folder: Path, count: int) -> Path:
    """Random cuts of the photographs, 512 x 512 to 512 x 768, as shards of 100 images."""
    root = Path(skimage.__file__).parent / "data"
    pictures = [Image.open(root / name).convert("RGB") for name in PHOTOGRAPHS]
    random = np.random.RandomState(0)
    (folder / "images").mkdir()
    for number in range(count):
        picture = pictures[number % len(pictures)]
        width = random.randint(512, 769)
        scale = random.uniform(0.6, 1.0) * min(picture.height / 512, picture.width / width)
        size = (width * scale, 512 * scale)
        left, top = (
            random.uniform(0, picture.width - size[0]),
            random.uniform(0, picture.height - size[1]),
        )
        box = (left, top, left + size[0], top + size[1])
        cut = picture.resize((width, 512), Image.Resampling.BICUBIC, box)
        buffer = io.BytesIO()
        cut.save(buffer, "JPEG", quality=95)
        (folder / "images" / f"{number:06d}.jpg").write_bytes(buffer.getvalue())
    pack(folder / "images", folder / "shards", per_shard=100, workers=1)
    return folder / "shards"


def our_dataset(shards: Path) -> PositionDataset:
    overrides = [*SETTINGS, f"data.sources={shards}", f"run_dir={shards.parent / 'run'}"]
    settings = config.load(config.find_recipe("demo"), overrides)
    return PositionDataset(*open_data(settings), settings)


def ours(shards: Path) -> Callable[[int], Iterator[Tensor]]:
    """images(count): that many uint8 crops; the noise is drawn, too."""
    dataset = our_dataset(shards)
    return lambda count: (dataset[position].image for position in range(count))


def plain(shards: Path) -> Callable[[int], Iterator[Tensor]]:
    """images(count): that many float crops, the way a tutorial would do it."""
    transform = transforms.Compose(
        [
            transforms.Resize(384, transforms.InterpolationMode.BICUBIC, antialias=True),
            transforms.RandomCrop(256),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]

    def images(count: int) -> Iterator[Tensor]:
        samples = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
        for sample, _ in zip(samples, range(count), strict=False):
            yield transform(sample["jpg"])

    return images


def seconds(images: Callable[[int], Iterator[Tensor]], count: int) -> float:
    """CPU time of the process for `count` images."""
    start = time.process_time()
    for image in images(count):
        assert image.shape == (3, 256, 256)
    return time.process_time() - start


def compare(shards: Path, count: int, rounds: int) -> None:
    """Alternates between the two, after a short warm-up of each; medians over the rounds."""
    pipelines = {"ours": ours(shards), "plain": plain(shards)}
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    for images in pipelines.values():
        seconds(images, min(count, 20))
    for _ in range(rounds):
        for name, images in pipelines.items():
            times[name].append(seconds(images, count))
    for name, measured in times.items():
        rate = count / statistics.median(measured)
        print(
            f"{name:6} {rate:6.0f} images/s/core ({1000 / rate:.2f} ms; {rounds} rounds of {count}:"
            f" {count / max(measured):.0f} to {count / min(measured):.0f});"
            f" {NEEDED / rate:.1f} cores for 8 GPUs x 200 images/s"
        )
    pairs = zip(times["plain"], times["ours"], strict=True)
    print(f"ratio  {statistics.median(b / a for b, a in pairs):.2f}")


def resident_mib() -> float:
    """Memory of this process in RAM, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def memory(shards: Path, draws: int) -> None:
    """Resident memory while `draws` samples are drawn."""
    dataset = our_dataset(shards)
    for position in range(draws + 1):
        dataset[position]
        if position % max(1, draws // 10) == 0:
            print(f"after {position:7,} samples: {resident_mib():.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400, help="different images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="resident memory in place of speed")
    parser.add_argument("--draws", type=int, default=100_000, help="samples for --memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder), args.images)
        if args.memory:
            memory(shards, args.draws)
        else:
            compare(shards, args.images, args.rounds)


if __name__ == "__main__":
    main()
