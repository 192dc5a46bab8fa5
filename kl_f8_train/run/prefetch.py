"""Remote shards, fetched ahead of their use."""

from collections.abc import Mapping
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from kl_f8_train.data.loading import Plan, upcoming
from kl_f8_train.data.shard_cache import ShardCache
from kl_f8_train.data.sources import ImageSource
from kl_f8_train.run.callback import finetuner_of
from kl_f8_train.transfer import is_remote


class Prefetch(Callback):
    """Fetches the remote shards of the next iterations ahead of their use, on the GPU's node."""

    AHEAD, EVERY = 200, 50  # iterations

    def __init__(self, plan: Plan, sources: Mapping[str, ImageSource], cache: ShardCache) -> None:
        self.plan, self.sources, self.cache = plan, sources, cache
        self.asked = -self.EVERY

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Asks every few iterations; not earlier, as loaders are forked before the first ends."""
        iteration = finetuner_of(pl_module).iteration
        if iteration >= self.asked + self.EVERY:
            self.asked = iteration
            # Each shard that the plan needs is fetched once, before a loader waits for it.
            ahead, rank = range(iteration, iteration + self.AHEAD), trainer.global_rank
            wanted = upcoming(self.plan, self.sources, ahead, rank, trainer.world_size)
            self.cache.prefetch([place for place in wanted if is_remote(place)])
