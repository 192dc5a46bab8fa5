"""How long indexing takes: python tests/benchmarks/index_scale.py [SHARDS] [IMAGES] [WORKERS]."""

import io
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from kl_f8_train.data.index import build_index
from kl_f8_train.data.shard_cache import ShardCache
from kl_f8_train.data.sources import TarSource


def main(shards: int = 10_000, images: int = 100, workers: int = 2) -> None:
    """Writes synthetic shards (a 100-byte image and its JSON each) and indexes them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = _tar(images)
        locations = [str(root / f"{number:06d}.tar") for number in range(shards)]
        for place in locations:
            Path(place).write_bytes(data)
        cache = ShardCache(root / "cache", 2**30)
        for attempt in ("first time", "again, nothing changed"):
            began = time.perf_counter()
            build_index(locations, root / "index", cache, workers)
            print(f"{attempt}: {time.perf_counter() - began:.1f} s with {workers} processes")
        print("; ".join(TarSource(root / "index", [], cache).describe()))


def _tar(images: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(images):
            for suffix, data in (("jpg", b"x" * 100), ("json", b'{"width": 300, "height": 400}')):
                entry = tarfile.TarInfo(f"{number:09d}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
