"""The whole chain in minutes on a CPU: kl_f8_mini -> ft-EMA -> ft-MSE -> table, strip, report.

The base and the photographs ship with the package (mini/). Stand-ins, named as such: kl_f8_mini in
kl-f8's place, ST-LPIPS in LPIPS'.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kl_f8_train import config, images, shipped
from kl_f8_train.data.pack import pack
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.files import write_json, write_text
from kl_f8_train.output import progress_bar, say
from kl_f8_train.publish import export
from kl_f8_train.run.train import train
from kl_f8_train.score import compare, evaluate, report, scores
from kl_f8_train.score.compare import Verdict, verdict
from kl_f8_train.settings import ITERATIONS, Config
from kl_f8_train.units import duration
from kl_f8_train.weights import weight_file

STAGE_A, STAGE_B = 340, 180  # iterations of each stage, at length 1
STAGE_B_RECIPE = (  # what ft_mse.yaml changes in ft_ema.yaml
    "loss.pixel=mse",
    "loss.perceptual_weight=0.1",
    "adversarial=null",
)
# Which are compared image by image; the last two open the report.
COMPARED = (("base", "ft-EMA"), ("ft-EMA", "ft-MSE"), ("base", "ft-MSE"))


def demo(
    run_dir: Path,
    training: str | None = None,
    held_out: Path | None = None,
    length: float = 1.0,
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Runs the chain below `run_dir` and returns the table's rows, also in table.json.

    `training` names shards and `held_out` a folder in place of the photographs that ship with the
    package; `length` multiplies the iterations. A finished stage is not run again. Raises
    MissingInputError without the demo's dependencies, UsageError for a length or settings that
    leave a stage without iterations, RunFailedError if a stage was interrupted.
    """
    began = time.perf_counter()
    a_end, b_end = _ends(length)
    if _recipe(overrides).adversarial is None:
        raise UsageError("adversarial=null: the demo's stage A is adversarial; leave it out")
    if training is None:
        training = str(pack_photographs(run_dir))
        held_out = held_out or shipped.HELD_OUT
    if held_out is None:
        raise MissingInputError("--training without --held-out: name a folder of photographs")
    common = [f"data.sources={training}", f"log.pictures={held_out}", *overrides]

    say("1 of 3: stage A, L1 + perceptual + adversarial (ft-EMA's recipe), from kl_f8_mini")
    stage_a = _recipe([*common, f"run_dir={run_dir}/ft_ema", f"stop_iteration={a_end}"])
    _run(stage_a)

    say("2 of 3: stage B, MSE + 0.1 perceptual (ft-MSE's recipe), from stage A's EMA")
    stage_b = _recipe(
        [
            *common,
            *STAGE_B_RECIPE,
            "name=demo_ft_mse",
            f"init.weights={run_dir}/ft_ema",
            f"run_dir={run_dir}/ft_mse",
            f"stop_iteration={b_end}",
        ]
    )
    _run(stage_b)

    say("3 of 3: export, and scores of five models and two baselines on held-out photographs")
    models = {"base": (Path(stage_a.init.weights), "ema")}
    for label, stage in (("ft-EMA", stage_a), ("ft-MSE", stage_b)):
        out = export.export(Path(stage.run_dir), force=True)
        models[label] = (out / f"{stage.name}-ema-pruned.safetensors", "ema")
        models[f"{label} raw weights"] = (Path(stage.run_dir), "raw")
    rows = _score(models, held_out, run_dir)
    report.write_comparison(run_dir / "evaluation", *COMPARED[-1])
    page = report.write(run_dir / "evaluation")
    took = duration(time.perf_counter() - began)
    say(
        f"\ndone in {took}; pictures: {run_dir}/strip.png, {page}\n"
        "next: your own photographs, docs/quickstart.md"
    )
    return rows


def _ends(length: float) -> tuple[int, int]:
    """The iterations at which the stages end. Raises UsageError if one has none."""
    parts = [round(part * length) for part in (STAGE_A, STAGE_B)]
    base = base_iteration()
    if not min(parts) or base + sum(parts) > ITERATIONS:
        raise UsageError(
            f"--length {length:g}: leaves a part of the demo without iterations, or gives more "
            f"than {ITERATIONS:,}; expected 0.01 to 100,000"
        )
    return base + parts[0], base + sum(parts)


def base_iteration() -> int:
    """The iteration that kl_f8_mini's file states."""
    iteration = weight_file.read(shipped.WEIGHTS).iteration
    assert iteration is not None
    return iteration


def _recipe(overrides: Sequence[str]) -> Config:
    return config.load(config.find_recipe("demo"), list(overrides))


def _run(recipe: Config) -> None:
    code = train(recipe)
    if code:
        raise RunFailedError(f"{recipe.name} was interrupted (exit code {code}); run demo again")


def _score(
    models: Mapping[str, tuple[Path, str]], held_out: Path, run_dir: Path
) -> list[dict[str, Any]]:
    """Scores every model on the same photographs; writes table.json, table.md and strip.png."""
    with progress_bar("image") as progress:
        result = evaluate.evaluate(
            [(name, path, select) for name, (path, select) in models.items()],
            str(held_out),
            run_dir / "evaluation",
            perceptual_name="st_lpips_alex",
            with_baselines=True,
            progress=progress,
        )
    assert result is not None
    rows: list[dict[str, Any]] = []
    for name, measured in result["models"].items():
        iteration = result["weights"][name]["iteration"]
        row: dict[str, Any] = {"model": name, "iteration": iteration, "images": result["images"]}
        for metric, value in measured.items():
            if isinstance(value, Mapping):
                row |= {f"{metric}_mean": value["mean"], f"{metric}_std": value["std"]}
        rows.append(row)
    write_json(run_dir / "table.json", rows)
    write_text(run_dir / "table.md", scores.table(result) + "\n")
    report.save_png(run_dir / "strip.png", _strip(run_dir / "evaluation"), sync=True)
    for line in _findings(run_dir / "evaluation"):
        say(line)
    say("stand-ins: base is kl_f8_mini, not kl-f8; ST-LPIPS is not LPIPS.")
    return rows


def _findings(evaluation: Path) -> list[str]:
    """What got better and what did not, by the paired intervals."""
    rows = compare.read_image_scores(evaluation / "per_image.csv")
    found: list[Verdict] = []
    for metric in ("psnr", "st_lpips"):
        values = compare.per_image(rows, metric)
        found += [verdict(metric, a, b, *compare.paired(values, a, b)) for a, b in COMPARED]
    lines = [f"  {one.text}" for one in found]
    failed = [one for one in found if one.a == "base" and one.verdict != "better"]
    if failed:
        named = ", ".join(dict.fromkeys(one.b for one in failed))
        lines.append(
            f"NOT shown by this run: {named} is not better than the base in every one of these "
            "metrics; more iterations (--length 4) or photographs may show it"
        )
    return [compare.HEADING, *lines]


def _strip(evaluation: Path) -> Tensor:
    """Pictures of an evaluation, spread over the list: the input and each EMA beside it."""
    columns: dict[str, list[Tensor]] = {}
    entries = json.loads((evaluation / "pictures.json").read_text(encoding="utf-8"))
    step = max(1, len(entries) // report.STRIP_ROWS)
    for entry in entries[::step][: report.STRIP_ROWS]:
        shown = {"input": entry["input"], **entry["models"]}
        for name, file in shown.items():
            if "raw" not in name:
                picture = images.decode((evaluation / file).read_bytes())
                columns.setdefault(name, []).append(picture)
    return report.strip([*columns.items()])


def pack_photographs(run_dir: Path) -> Path:
    """The training photographs of the package as shards."""
    out = run_dir / "shards"
    if not any(out.glob("*.tar")):
        pack(shipped.TRAINING, out, per_shard=100)
    return out
