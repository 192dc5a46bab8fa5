"""The images of an evaluation: centre crops of a folder or of shards."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from kl_f8_train import images as pixels
from kl_f8_train.data import sources
from kl_f8_train.data.shard_cache import ShardCache
from kl_f8_train.errors import ImageError, MissingInputError
from kl_f8_train.files import cache_dir
from kl_f8_train.folders import ahead
from kl_f8_train.units import printable


@dataclass(frozen=True)
class EvaluatedImage:
    """One image of the set, or why it cannot be used."""

    index: int
    key: str
    image: Tensor | None  # uint8 (3, size, size)
    problem: str = ""
    enlarged: bool = False  # its shorter side was smaller than `size`
    profile: str = ""  # the colour profile it was converted from

    def sha256(self) -> str:
        """Of the name and the pixels."""
        assert self.image is not None
        return hashlib.sha256(self.key.encode() + b"\0" + self.image.numpy().tobytes()).hexdigest()


class ImageSet:
    """A folder or shards as centre crops, each decoded when it is asked for."""

    def __init__(
        self,
        where: str | Path,
        size: int,
        limit: int | None = None,
        warn: Callable[[str], None] = print,
        out: Path | None = None,
    ) -> None:
        """Leaves out what lies below `out`, a former evaluation's pictures.

        Raises MissingInputError if there is none.
        """
        self.where = where = os.fspath(where)
        cache = ShardCache(cache_dir() / "shards", 100 * 2**30)
        self.source = sources.open_source(
            "images", where, [], cache, bad_shards="skip", warn=warn, label=f"--images {where}"
        )
        if out is not None and isinstance(self.source, sources.FolderSource):
            self.source.leave_out(out)
            if not self.source.files:
                raise MissingInputError(f"--images {where}: no images but those of --out {out}")
        self.size = size
        self.ends = np.cumsum(self.source.counts)
        self.count = min(int(self.ends[-1]), limit or int(self.ends[-1]))

    def load(self, index: int) -> EvaluatedImage:
        """The index-th image."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        first = int(self.ends[shard]) - int(self.source.counts[shard])
        key = self.source.name(shard, index - first)
        try:
            found, data = self.source.read(shard, index - first)
            key = printable(found)
            whole, profile = pixels.picture(data)
            image = pixels.crop(pixels.resize_shorter(whole, self.size), self.size)
            small = min(whole.shape[1:]) < self.size
            return EvaluatedImage(index, key, image, enlarged=small, profile=profile)
        except ImageError as error:
            return EvaluatedImage(index, key, None, f"{key}: {error}; left out")

    def stream(self, indices: Iterable[int], threads: int) -> Iterator[EvaluatedImage]:
        """Images in order, decoded some ahead of their use."""
        for loaded in ahead(self.load, indices, threads):
            yield loaded.result()
