"""The part of `doctor` that looks at inputs: weights, images, validation pictures, wandb."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from kl_f8_train import facts, images
from kl_f8_train.check import overlap
from kl_f8_train.check.findings import WARNING, Report, silent
from kl_f8_train.data.loading import PositionDataset, open_data
from kl_f8_train.data.sources import FolderSource, ImageSource
from kl_f8_train.errors import ImageError, MissingInputError
from kl_f8_train.rules import side_range
from kl_f8_train.run.paths import start_checks
from kl_f8_train.run.start import check_model
from kl_f8_train.run.tracking import wandb_reachable
from kl_f8_train.run_dir import list_checkpoints
from kl_f8_train.settings import Config, Data
from kl_f8_train.transfer import is_remote
from kl_f8_train.units import are, counted, printable, size
from kl_f8_train.units import speed as rate
from kl_f8_train.weights import checkpoint, weight_file
from kl_f8_train.weights.names import Weights

SMALL_FOLDER = 500  # photographs; all of them are decoded
SAMPLE = 32  # images of each local source that are decoded; of a remote one, REMOTE_SAMPLE
REMOTE_SAMPLE = 2


def check_weights(report: Report, config: Config) -> None:
    """Reads the newest checkpoint, or the base, as `train` would, and compares its shape."""
    found = list_checkpoints(Path(config.run_dir))
    if found:
        held = counted(len(found), "checkpoint", "s")
        report.detail(f"{config.run_dir} holds {held}: this run would resume")
    else:
        for check in start_checks(config):
            check()
    paths = found or [Path(config.init.weights)]
    contents, weights = _first_readable(report, paths, config.init.select, config.init.prefix)
    start = contents.iteration
    if not found and config.init.iteration is not None:
        start = config.init.iteration
    report.facts["start_iteration"] = start
    digest = weight_file.sha256(contents.path)
    shown = weight_file.report(contents, weights)
    report.facts["weights"] = {"sha256": digest, **shown}
    report.detail(weight_file.describe(shown))
    report.detail(f"{size(contents.path.stat().st_size)}, SHA-256 {digest}")
    if not found and contents.iteration not in (None, start):
        report.remark(
            f"init.iteration={start} is taken, although {contents.path.name} says "
            f"{contents.iteration:,}"
        )
    if not found:
        check_model(config, contents, weights.autoencoder)
        stated = checkpoint.base_facts(contents, weights, config)
        report.facts["weights"]["facts"] = stated.stated()
        report.detail(f"family: {facts.described(stated.family, stated)}")


def _first_readable(
    report: Report, paths: list[Path], select: str, prefix: str | None
) -> tuple[weight_file.Contents, Weights]:
    """The weights of the first file that can be read, as `train` would take it."""
    for path in paths[:-1]:
        try:
            return weight_file.read_weights(path, select, prefix)
        except MissingInputError as error:
            report.remark(f"{error}; the checkpoint before it would be taken")
    return weight_file.read_weights(paths[-1], select, prefix)


def check_source(report: Report, config: Config, name: str) -> None:
    """Opens one source, reads its first shard, and decodes a sample as training would."""
    alone = replace(config.data, sources={name: config.data.sources[name]})
    plan, sources = open_data(replace(config, data=alone), report.detail)
    source = sources[name]
    for line in source.describe():
        report.detail(line)
    # The first shard, unless filters leave nothing of it.
    first = int(source.counts.argmax() if source.counts[0] == 0 else 0)
    place = source.location(first)
    report.detail(f"first shard {place}: {_describe_image(source, first, 0)}")
    dealt = plan.plans[name].lanes * plan.plans[name].lane_length  # in a pass, none twice
    count = min(plan.batch * 4, dealt, REMOTE_SAMPLE if is_remote(place) else SAMPLE)
    dataset = PositionDataset(plan, sources, config)
    began = time.perf_counter()
    for position in range(count):
        dataset[position]
    speed = count / (time.perf_counter() - began)
    places = [plan.locate(position)[1:] for position in range(count)]
    of = counted(count, "sampled image", "s")
    if isinstance(source, FolderSource) and len(source.files) <= SMALL_FOLDER:
        places = [(0, number) for number in range(len(source.files))]
        of = f"all {counted(len(places), 'image', 's')}"
    bad, profiles, small = _look_at(source, places, config.data)
    report.facts.setdefault("data", {})[name] = {
        "images": int(source.counts.sum()),
        "shards": len(source.counts),
        "sampled": len(places),
        "unusable": len(bad),
        "enlarged": small,
        "colour_profiles": dict(profiles),
        "images_per_second_per_worker": speed,
        "checked": of,
        "about": "; ".join(source.describe()),
    }
    report.detail(f"{len(bad)} of {of} cannot be used; {rate(speed)} in one process")
    if bad:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        report.remark(f"{name}: {len(bad)} of {of} cannot be used, as {name}/{bad[0]}{more}")
    if profiles:
        named = ", ".join(f"{number} {profile}" for profile, number in profiles.most_common(3))
        report.detail(f"{profiles.total()} of {len(places)} are converted to sRGB from: {named}")
    if small:
        side = _largest_side(config.data)
        report.remark(
            f"{name}: {small} of {of} {are(small)} smaller than data.shorter_side={side}, "
            f"and would be enlarged; leave such out (in shards: data.sources.{name}.filters="
            f"'width >= {side}, height >= {side}'), or lower data.shorter_side"
        )


def _look_at(
    source: ImageSource, places: Iterable[tuple[int, int]], data: Data
) -> tuple[list[str], Counter[str], int]:
    """Why images cannot be used, the colour profiles of the others, and how many are enlarged."""
    side = _largest_side(data)
    bad: list[str] = []
    profiles: Counter[str] = Counter()
    small = 0
    for shard, sample in places:
        key = source.name(shard, sample)
        try:
            key, encoded = source.read(shard, sample)
            pixels, profile = images.picture(encoded)
            images.crop(images.resize_shorter(pixels, side) if side else pixels, data.crop)
        except ImageError as error:
            bad.append(f"{printable(key)}: {error}")
        else:
            small += min(pixels.shape[1:]) < side
            profiles.update([profile] * bool(profile))
    return bad, profiles, small


def _largest_side(data: Data) -> int:
    """The shorter side that images are resized to at most; 0 if they are not."""
    return max(side_range(data) or (0,))


def _describe_image(source: ImageSource, shard: int, sample: int) -> str:
    """Name and size of an image, or why it cannot be used."""
    try:
        key, data = source.read(shard, sample)
        found = images.picture(data)
    except ImageError as error:
        return f"{source.name(shard, sample)} cannot be used: {error}"
    height, width = found.pixels.shape[1:]
    profile = f", {found.profile}" if found.profile else ""
    return f"{printable(key)}, {width} x {height} pixels, {size(len(data))}{profile}"


def check_overlap(report: Report, config: Config, pictures: Path) -> None:
    """Notes validation pictures that are also trained on, as they are or nearly so."""
    found = overlap.find(pictures, open_data(config, silent)[1])
    report.facts["validation"] = asdict(found)
    report.detail(str(found))
    if found.common:
        one, other = next(iter(found.common.items()))
        verb = "is a training image" if len(found.common) == 1 else "are training images"
        most = 2 * len(found.common) > found.pictures
        loss = "the scores say less about others"
        if most:
            loss = "the validation's scores then say nothing about other photographs"
        report.remark(
            f"{WARNING * most}{len(found.common)} of "
            f"{counted(found.pictures, 'validation picture', 's')} {verb}, as {one} = {other}: "
            f"{loss}; `kl-f8-train split` separates them, near-duplicates included"
        )


def check_wandb(report: Report, config: Config) -> None:
    """Whether wandb would be online."""
    outcome: str = config.log.wandb
    if outcome == "auto":
        outcome = "online" if wandb_reachable() else "offline: its server does not answer"
    report.facts["wandb"] = outcome
    report.detail(outcome)
