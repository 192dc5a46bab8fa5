"""Lightning's trainer, of which a run uses the launch, DDP and the loop; the rest is off."""

import inspect
import logging
import warnings
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from kl_f8_train.errors import UsageError
from kl_f8_train.launch import SRUN, TORCHRUN, launched, left_over
from kl_f8_train.lifetime import announce_to_ranks
from kl_f8_train.run.callback import say_once
from kl_f8_train.run.watchdog import longest_wait
from kl_f8_train.settings import Config
from kl_f8_train.units import counted

FEW_GPUS = {  # launcher -> the remedy
    SRUN: "each task must see all of its node's: srun --gpus-per-node, not --gpus-per-task or "
    "--gpu-bind",
    "": "fix the driver, or start fewer processes (without a launcher: compute.devices), or give "
    "compute.accelerator=cpu",
}


def build_trainer(config: Config, callbacks: list[Any]) -> Trainer:
    """A trainer over the processes that the launcher started, or of this machine's GPUs.

    Raises UsageError if they do not fit the GPUs here.
    """
    compute = config.compute
    accelerator = compute.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count()
    launcher, local, nodes = launched(compute.num_nodes)
    per_node = local or compute.devices or (gpus if accelerator == "cuda" else 1)
    nodes = nodes or compute.num_nodes or 1
    world = nodes * per_node
    if accelerator == "cuda" and not 0 < per_node <= gpus:
        wanted = f"{counted(per_node, 'process', 'es')} with a GPU each" if per_node else "GPUs"
        raise UsageError(
            f"wanted {wanted}, but torch sees {counted(gpus, 'GPU', 's')} here; "
            f"{FEW_GPUS.get(launcher, FEW_GPUS[''])}"
        )
    if local and compute.devices not in (None, local):
        say_once(
            f"{local} processes here, as the launcher started them; compute.devices="
            f"{compute.devices} is for a start without one"
        )
    if accelerator == "cuda" and gpus > per_node:
        say_once(f"using {per_node} of {gpus} GPUs here: one for each process the launcher started")
    if note := left_over():
        say_once(f"note: {note}")
    cluster = _cluster(launcher)
    if world > 1:
        announce_to_ranks()
        say_once(f"waiting for {world} processes at {cluster.main_address}:{cluster.main_port}")
    trainer = Trainer(
        accelerator=accelerator,
        devices=per_node,
        num_nodes=nodes,
        strategy=DecoderDDP(config) if world > 1 else "auto",
        plugins=[cluster],
        precision="32-true",  # the finetuner autocasts by itself
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    # Signals are for `Signals` alone: Lightning would end a run on SIGTERM without a checkpoint,
    # and send a flag of its own before each iteration and read it from the device.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


# Buffers are never broadcast. torch renamed the argument in 2026, and warns of the old name on
# every rank; the new one still broadcasts buffers once at the start, but DDP here has none.
NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if NEW_NAME else "broadcast_buffers": False}


class DecoderDDP(DDPStrategy):
    """DDP over the decoder, on the training's own stream."""

    def __init__(self, config: Config) -> None:
        super().__init__(
            timeout=longest_wait(config.compute.timeout_minutes),
            # Gradients lie in DDP's buckets: without it there would be a second copy of them.
            gradient_as_bucket_view=True,
            **NO_BUFFERS,
        )

    def _setup_model(self, model: torch.nn.Module) -> DistributedDataParallel:
        """On the stream of the training: Lightning's own would make it wait in each iteration."""
        return DistributedDataParallel(
            model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs
        )


def _cluster(launcher: str) -> ClusterEnvironment:
    if launcher == TORCHRUN:
        return TorchElasticEnvironment()
    if launcher == SRUN:
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()  # an installed srun does not mean that this runs under SLURM


def quiet_lightning() -> None:
    """Hides what Lightning logs and warns of: the run reports by itself."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")
