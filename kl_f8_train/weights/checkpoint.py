"""The state of a run as tensors and strings: what a checkpoint holds and how it is restored.

Nothing random is in it: images, crops and noise follow from the seed and the iteration.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Adam

from kl_f8_train import config as configs
from kl_f8_train import facts
from kl_f8_train.averages import module_names
from kl_f8_train.core.hashes import frozen_sha256, tensors_sha256
from kl_f8_train.core.step import Finetuner
from kl_f8_train.core.updates import HostCopy, parameters_of
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError, about
from kl_f8_train.facts import Facts
from kl_f8_train.files import DAMAGED
from kl_f8_train.settings import KL_F8_SHAPES, Config, Model, to_dict
from kl_f8_train.units import are, counted, written
from kl_f8_train.weights import weight_file
from kl_f8_train.weights.names import State, Weights, check_shapes, shapes_of

FORMAT = "kl_f8_train.checkpoint.1"
STATED = {  # metadata of every checkpoint -> its form
    **dict.fromkeys(("iteration", "warmup_left", "ema_updates", "first_iteration"), r"\d{1,18}"),
    "frozen_sha256": "[0-9a-f]{64}",
}
TEXTS = "metadata_sha256"  # JSON: key of the metadata -> hash of its string
OPTIMIZERS = ("decoder", "discriminator")
ALIGNMENT = 64  # bytes: where a copy begins


class HostMemory:
    """Memory that is kept for copy after copy.

    New memory is slow to get: the kernel makes its pages at their first use, in seconds a gigabyte
    where the machine is short of it, and CUDA pins them. Copied to pages that are there, a
    gigabyte takes a fraction of a second.
    """

    def __init__(self) -> None:
        self.block = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int, pinned: bool) -> None:
        """Gets memory for `size` bytes, with its pages; `pinned` if they will come from CUDA."""
        if self.block.numel() < size:
            self.block = torch.empty(0, dtype=torch.uint8)  # the old one first
            self.block = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            self.block.zero_()

    def copy(self, tensors: Mapping[str, Tensor]) -> HostCopy[dict[str, Tensor]]:
        """Contiguous copies, which overwrite those of the call before.

        From CUDA they are only queued, before whatever changes the tensors next.
        """
        on_cuda = any(tensor.is_cuda for tensor in tensors.values())
        self.reserve(sum(room(tensor) for tensor in tensors.values()), on_cuda)
        copied, start = {}, 0
        for name, tensor in tensors.items():
            part = self.block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copied[name] = part.copy_(tensor.detach(), non_blocking=True)
            start += room(tensor)
        return HostCopy(copied, on_cuda)


def room(tensor: Tensor) -> int:
    """Bytes that a copy takes."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after an iteration, in host memory of its own."""

    copies: HostCopy[dict[str, Tensor]]  # they share one block of memory
    metadata: dict[str, str]  # all but the tensors' hashes
    counters: tuple[int, int]  # iteration, warm-up left


def write(state: Snapshot, path: Path) -> Path:
    """Writes a checkpoint atomically, if all is finite and the frozen part is the imported one.

    Raises RunFailedError if not, or if the file cannot be written.
    """
    tensors, frozen = state.copies.read(), state.metadata["frozen_sha256"]
    parts = ((name.partition("."), tensor) for name, tensor in tensors.items())
    now = frozen_sha256({key: tensor for (part, _, key), tensor in parts if part == "autoencoder"})
    if now != frozen:
        raise RunFailedError(
            f"the frozen encoder changed during training (SHA-256 {now[:12]}, imported "
            f"{frozen[:12]}); no checkpoint was written, the last one is untouched"
        )
    _check_finite(tensors)
    metadata = {**state.metadata, **content_sha256(tensors)}
    hashes = {key: _text_sha256(text) for key, text in metadata.items()}
    weight_file.write_plain(path, tensors, {**metadata, TEXTS: json.dumps(hashes)})
    return path


def snapshot(
    finetuner: Finetuner, optimizers: list[Adam], frozen: str, memory: HostMemory
) -> Snapshot:
    """Copies the state to `memory`, over the snapshot before; the networks may change at once."""
    run = finetuner.run_state
    tensors = dict(finetuner.state_dict())
    for name, optimizer in zip(OPTIMIZERS, optimizers, strict=False):
        tensors |= _optimizer_tensors(name, optimizer, finetuner)
    metadata = {
        "format": "pt",
        "kl_f8_train.format": FORMAT,
        "iteration": str(run.iteration),
        "warmup_left": str(run.warmup_left),
        "ema_updates": str(run.ema_updates),
        "first_iteration": str(run.first_iteration),
        "frozen_sha256": frozen,
        **run.base,
        **run.facts.metadata(),
        "changes": "\n".join(run.changes),
        "identity": json.dumps(run.identity),
        "config": json.dumps(to_dict(finetuner.config)),
    }
    return Snapshot(memory.copy(tensors), metadata, (run.iteration, run.warmup_left))


def snapshot_bytes(finetuner: Finetuner, optimizers: list[Adam]) -> int:
    """Host memory for a snapshot, at most; of the optimizers also what they will have."""
    moved = [parameter for optimizer in optimizers for parameter in parameters_of(optimizer)]
    held = sum(room(tensor) for tensor in finetuner.state_dict().values())
    return held + sum(2 * room(parameter) + ALIGNMENT for parameter in moved)  # moments and step


def stored_config(contents: weight_file.Contents) -> Config:
    """The configuration a training checkpoint was written with.

    Raises MissingInputError if the file is not a training checkpoint, or a damaged one.
    """
    metadata = contents.metadata
    if metadata.get("kl_f8_train.format") != FORMAT:
        raise MissingInputError(
            f"{contents.path} is not a training checkpoint of this program; expected a run "
            "directory, or a file of its checkpoints/"
        )
    stated = {"first_iteration": "0", **metadata}  # older checkpoints do not state it
    for key, form in STATED.items():
        if not re.fullmatch(form, stated.get(key, "")):
            raise MissingInputError(f"{contents.path}: its {key} is missing or damaged")
    try:
        return configs.from_dict(json.loads(metadata["config"]))
    except (UsageError, *DAMAGED) as error:
        raise MissingInputError(f"{contents.path}: its configuration: {error}") from error


def base(path: Path) -> dict[str, str]:
    """Name and SHA-256 of the file that a run starts from, for its checkpoints."""
    return {"base_name": path.name, "base_sha256": weight_file.sha256(path)}


def stored_base(metadata: dict[str, str]) -> dict[str, str]:
    """Name and SHA-256 of the file a run started from; older checkpoints do not know."""
    return {key: metadata.get(key, "unknown") for key in ("base_name", "base_sha256")}


def stored_facts(contents: weight_file.Contents, config: Config) -> Facts:
    """The facts that a run's base stated; of older checkpoints those that their recipe shows."""
    return facts.combined(contents.facts, _shown_value(config))


def base_facts(contents: weight_file.Contents, weights: Weights, config: Config) -> Facts:
    """What a run keeps of what its base states, with `init.family` where it does not.

    Raises UsageError if the two disagree, or if neither names a family although the shape is one
    that several share; MissingInputError if it states another network than its tensors show.
    """
    published = config.model in KL_F8_SHAPES.values()
    channels = config.model.embed_dim
    stated = weight_file.facts_of(contents, weights)
    shown = _shown_value(config)
    if stated.use_quant_conv not in (None, shown.use_quant_conv):
        raise MissingInputError(
            f"{contents.path}: it states use_quant_conv={written(stated.use_quant_conv)}, against "
            "what its tensors show. Correct its config.json"
        )
    known = facts.settled(contents.path, stated, channels, config.init.family, published)
    return facts.combined(known, shown)


def _shown_value(config: Config) -> Facts:
    model = config.model
    return Facts(norm_num_groups=model.norm_num_groups, use_quant_conv=model.quant_conv)


def stored_changes(metadata: dict[str, str]) -> list[str]:
    """Lines `from iteration N: key: old -> new`: what of the recipe was changed on resuming."""
    return metadata.get("changes", "").splitlines()


def stored_identity(metadata: dict[str, str]) -> dict[str, str]:
    """The identity of the inputs that a checkpoint was made with; older ones have none."""
    try:
        found = json.loads(metadata.get("identity", "{}"))
        return {str(name): str(value) for name, value in found.items()}
    except DAMAGED as error:
        text = "its identity is not a JSON object; the file is damaged"
        raise MissingInputError(text) from error


def content_sha256(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Part -> SHA-256; parts are the first words: autoencoder, ema, ema_0_9999, optimizer, ..."""
    parts = sorted({name.split(".", 1)[0] for name in tensors})
    return {f"sha256.{part}": _part_sha256(tensors, part) for part in parts}


def check_content(contents: weight_file.Contents, only: str | None = None) -> None:
    """Compares a training checkpoint's tensors, or one part of them, with their own hashes.

    Raises MissingInputError if they are not those once written.
    """
    for key, stored in contents.metadata.items():  # older files have no hashes
        part = key.removeprefix("sha256.")
        if part == key or only not in (None, part):
            continue
        if stored != _part_sha256(contents.tensors, part):
            raise _changed(contents, part)


def check_metadata(contents: weight_file.Contents) -> None:
    """Compares the strings of a training checkpoint, such as its counters, with their own hashes.

    Raises MissingInputError if one is not what was once written.
    """
    texts = dict(contents.metadata)
    if TEXTS not in texts:
        return  # an older file
    try:
        hashes = dict(json.loads(texts.pop(TEXTS)))
    except DAMAGED:
        hashes = {}
    for key, text in texts.items():
        if hashes.get(key) != _text_sha256(text):
            raise _changed(contents, key)


def _changed(contents: weight_file.Contents, part: str) -> MissingInputError:
    return MissingInputError(
        f"{contents.path}: its {part} does not match its own SHA-256; the disk changed it"
    )


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _part_sha256(tensors: dict[str, Tensor], part: str) -> str:
    return tensors_sha256(
        {name: tensor for name, tensor in tensors.items() if name.split(".", 1)[0] == part}
    )


def restore(finetuner: Finetuner, optimizers: list[Adam], contents: weight_file.Contents) -> str:
    """Puts a checkpoint's state back, strictly; returns the hash of the frozen part.

    Averages are found by their decays (`_averages_of`). Raises MissingInputError if tensors are
    missing, or the frozen part is not what it was.
    """
    tensors, metadata = contents.tensors, contents.metadata
    networks = {k: v for k, v in tensors.items() if not k.startswith("optimizer.")}
    decays = stored_config(contents).ema.decays
    networks = _averages_of(networks, decays, finetuner.config.ema.decays)
    differ = f"{contents.path} does not fit this run's networks"
    remedy = (
        "A run keeps its networks; for others start a new run_dir, with init.weights="
        f"{contents.path}"
    )
    stated = stored_facts(contents, stored_config(contents))
    with about(differ, remedy):
        check_shapes(networks, shapes_of(finetuner.state_dict()))
        check_groups(stated, finetuner.config.model)
    finetuner.load_state_dict(networks, strict=True)
    for name, optimizer in zip(OPTIMIZERS, optimizers, strict=False):
        _restore_optimizer(name, optimizer, finetuner, tensors)
    run = finetuner.run_state
    run.iteration = int(metadata["iteration"])
    run.warmup_left = int(metadata["warmup_left"])
    run.ema_updates = int(metadata["ema_updates"])
    first = finetuner.config.init.iteration  # older checkpoints do not state it
    run.first_iteration = int(metadata.get("first_iteration", first or 0))
    run.base = stored_base(metadata)
    run.facts = stated
    run.changes = stored_changes(metadata)
    run.identity = stored_identity(metadata)
    # After loading: what counts is what the networks hold now.
    frozen = frozen_sha256(finetuner.autoencoder.state_dict())
    if frozen != metadata["frozen_sha256"]:
        raise MissingInputError(f"{contents.path}: its encoder does not match its own hash")
    return frozen


def _averages_of(networks: State, before: list[float], now: list[float]) -> State:
    """The networks with averages of the decays `now`, out of those of the decays `before`.

    A decay that was there keeps its average. A new one starts as a copy of the run's own, the
    first; so does the run's own where its decay is new. Others are dropped.
    """
    if before == now:
        return networks
    held = {decay: f"{name}." for decay, name in module_names(before).items()}
    taken = {k: v for k, v in networks.items() if not k.startswith(tuple(held.values()))}
    for decay, name in module_names(now).items():
        place = held.get(decay, "ema.")
        for key, value in networks.items():
            if key.startswith(place):
                taken[f"{name}.{key.removeprefix(place)}"] = value
    return taken


def check_groups(stated: Facts, model: Model) -> None:
    """Raises MissingInputError if a file states other norms than the recipe's."""
    groups = stated.norm_num_groups
    if groups not in (None, model.norm_num_groups):
        raise MissingInputError(
            f"it states norm_num_groups={groups}, expected {model.norm_num_groups}"
        )


def _check_finite(tensors: dict[str, Tensor]) -> None:
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    # One call for all tensors; the largest magnitude is NaN or infinite if any value is.
    largest = torch._foreach_norm([tensors[name].detach() for name in names], torch.inf)
    bad = [n for n, value in zip(names, largest, strict=True) if not bool(value.isfinite())]
    if bad:
        raise RunFailedError(
            f"{counted(len(bad), 'tensor', 's')} {are(len(bad))} not finite, {bad[0]} first; "
            "no checkpoint was written, the last one is untouched. Lower "
            "optimizer.learning_rate, or try precision=float32"
        )


def _named(optimizer: Adam, finetuner: Finetuner) -> list[tuple[str, Tensor]]:
    """The parameters that an optimizer moves, by their names in the finetuner."""
    names = {id(parameter): key for key, parameter in finetuner.named_parameters()}
    return [(names[id(parameter)], parameter) for parameter in parameters_of(optimizer)]


def _optimizer_tensors(name: str, optimizer: Adam, finetuner: Finetuner) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}.{key}.{entry}": value.detach()
        for key, parameter in _named(optimizer, finetuner)
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(
    name: str, optimizer: Adam, finetuner: Finetuner, tensors: dict[str, Tensor]
) -> None:
    prefix = f"optimizer.{name}."
    if not any(key.startswith(prefix) for key in tensors):
        return  # it had not stepped yet
    for key, parameter in _named(optimizer, finetuner):
        optimizer.state[parameter] = state = {}
        for entry in ("step", "exp_avg", "exp_avg_sq"):
            if (place := f"{prefix}{key}.{entry}") not in tensors:
                raise MissingInputError(f"checkpoint without {place}")
            state[entry] = _laid_out_as(parameter, tensors[place])


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy with the parameter's strides, which the fused Adam walks through (not checked there).

    A number, Adam's step, stays as it is.
    """
    return torch.empty_like(parameter).copy_(value) if value.dim() else value.clone()
