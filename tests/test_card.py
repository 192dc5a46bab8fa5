"""The model card: only what was measured on these files and what was given, and it is valid."""

import functools
import json
import re
import shutil
from pathlib import Path

import evaluations
import pytest
import runs
import samples
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from kl_f8_train import config
from kl_f8_train.__main__ import main
from kl_f8_train.errors import MissingInputError
from kl_f8_train.facts import FAMILIES
from kl_f8_train.files import file_sha256
from kl_f8_train.publish import card, push
from kl_f8_train.publish.export import export
from kl_f8_train.run.train import train
from kl_f8_train.run_dir import list_checkpoints


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a short run."""
    folder = tmp_path_factory.mktemp("card")
    runs.make_shards(folder)
    runs.make_weights(folder / "model.ckpt")
    settings = ("stop_iteration=101", "name=tiny", "init.iteration=null")  # as the file says
    train(runs.recipe(folder, "run", *settings))
    return export(folder / "run")


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of the export, to write into."""
    return shutil.copytree(exported, tmp_path / "export")


@pytest.fixture(scope="module")
def evaluated(exported, tmp_path_factory) -> Path:
    """An evaluation whose second model is the export, with a strip."""
    directory = evaluations.write(tmp_path_factory.mktemp("scores"), count=4, pictured=0)
    (directory / "strip.png").write_bytes(b"strip")
    values = json.loads((directory / "scores.json").read_text())
    record = json.loads((exported / "export.json").read_text())
    values["weights"]["ft-EMA"]["sha256"] = record["files"]["tiny-ema-pruned.safetensors"]
    (directory / "scores.json").write_text(json.dumps(values))
    return directory


@pytest.fixture
def scores(evaluated, tmp_path) -> Path:
    """A copy of its scores.json, to change."""
    return shutil.copytree(evaluated, tmp_path / "scores") / "scores.json"


def edit(scores: Path, **changes) -> Path:
    """Changes the export's row, or the file's other entries."""
    values = json.loads(scores.read_text())
    row = changes.pop("row", {})
    values["models"]["ft-EMA"] |= row
    scores.write_text(json.dumps(values | changes))
    return scores


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?\n)---\n", text, re.S)[1])


def test_an_export_has_a_card_without_scores_and_without_a_license(exported):
    text = (exported / "README.md").read_text()
    front = front_matter(text)
    assert front["library_name"] == "diffusers"
    assert not {"license", "base_model", "model-index"} & front.keys()
    assert "Not stated. It follows" in text
    assert "Not measured here." in text
    assert "| iterations | 100 -> 101 |" in text
    assert "mse + " in text or "l1 + " in text


def test_it_names_the_base_weights(exported):
    digest = file_sha256(exported.parents[1] / "model.ckpt")
    text = (exported / "README.md").read_text()
    assert f"| base weights | model.ckpt, SHA-256 {digest} |" in text
    record = json.loads((exported / "export.json").read_text())
    older = record | {"base_name": "unknown", "base_sha256": "unknown"}
    assert "| base weights | unknown |" in card.model_card(samples.recipe("demo"), older)


def test_several_sources_have_their_shares(exported):
    record = json.loads((exported / "export.json").read_text())
    alone = ("data.sources=/d/x",)
    several = ("data.sources=/d/x,/d/y", "data.sources.x.weight=3", "global_batch=192")
    assert "| data | x |" in card.model_card(samples.recipe("demo", *alone), record)
    text = card.model_card(samples.recipe("ft_ema", *several), record)
    assert "| data | x (75 %), y (25 %) |" in text


def test_only_kl_f8s_own_shape_is_offered_to_stable_diffusion(exported):
    small = (exported / "README.md").read_text()
    assert "does not fit Stable Diffusion" in small
    assert "ComfyUI" not in small
    record = json.loads((exported / "export.json").read_text())
    full = card.model_card(samples.recipe("ft_ema"), record)
    assert "| ComfyUI | `tiny-ema-pruned.safetensors` | `models/vae/` |" in full
    assert "| AUTOMATIC1111 | `tiny-ema-pruned.safetensors` | `models/VAE/` |" in full
    assert "The encoder is bit for bit the imported one" in full
    assert "4 numbers for each 8 x 8 pixels" in full


FAMILY_TAGS = {
    "sd": ["stable-diffusion", "stable-diffusion-diffusers", "vae", "autoencoder", "kl-f8"],
    "sdxl": [
        "stable-diffusion",
        "stable-diffusion-xl",
        "stable-diffusion-diffusers",
        "vae",
        "autoencoder",
        "kl-f8",
    ],
    "sd3": [
        "stable-diffusion",
        "stable-diffusion-3",
        "stable-diffusion-diffusers",
        "vae",
        "autoencoder",
    ],
    "flux": ["flux", "flux-diffusers", "vae", "autoencoder"],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fits", [True, False])
def test_tags_and_programs_are_those_of_the_models_that_can_use_it(exported, family, fits):
    record = json.loads((exported / "export.json").read_text())
    record["facts"] = {**FAMILIES[family].facts.stated(), "family": family}
    sixteen = FAMILIES[family].channels == 16
    shape = ["model.z_channels=16", "model.embed_dim=16", "model.quant_conv=false"] * sixteen
    settings = samples.recipe("ft_ema", *shape, *["model.ch=64"] * (not fits))
    text = card.model_card(settings, record)
    expected = FAMILY_TAGS[family] if fits else ["vae", "autoencoder"]
    assert front_matter(text)["tags"] == expected
    assert ("ComfyUI" in text) == fits
    assert ("AUTOMATIC1111" in text) == ("original code" in text) == (fits and not sixteen)
    assert (FAMILIES[family].title in text) == fits
    assert f"`scaling_factor` {FAMILIES[family].facts.scaling_factor}" in text


def test_a_network_of_no_family_has_no_familys_tags(exported):
    record = json.loads((exported / "export.json").read_text())
    small = front_matter((exported / "README.md").read_text())
    assert small["tags"] == ["vae", "autoencoder"]
    other = card.model_card(samples.recipe("ft_ema"), {**record, "facts": {"family": "other"}})
    assert front_matter(other)["tags"] == ["vae", "autoencoder", "kl-f8"]


def test_the_card_describes_no_file_that_is_not_there(exported):
    record = json.loads((exported / "export.json").read_text())
    record["files"] = {"tiny-ema-pruned.ckpt": "0" * 64}
    text = card.model_card(samples.recipe("ft_ema"), record)
    assert "library_name" not in front_matter(text)
    for absent in ("from_pretrained", "ComfyUI", ".safetensors"):
        assert absent not in text.replace(checks(record), "")
    assert "| AUTOMATIC1111 | `tiny-ema-pruned.ckpt` |" in text


def checks(record: dict) -> str:
    return "\n".join(f"- {check}: {outcome}" for check, outcome in record["checks"].items())


def test_the_card_of_half_precision_claims_no_equal_encoder(exported):
    record = json.loads((exported / "export.json").read_text()) | {"dtype": "float16"}
    for settings in (samples.recipe("ft_ema"), config.from_dict(record["config"])):
        text = card.model_card(settings, record)
        assert "The encoder is the imported one rounded to float16, which moves latents" in text
        assert "bit for bit the imported one" not in text


def test_the_verb_writes_the_same_card_as_the_export(folder):
    before = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    assert card.write(folder).read_text() == before


def test_its_snippet_for_diffusers_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)[1], names)
    assert names["vae"].config.latent_channels == 4


def test_measured_numbers_enter_the_index_and_no_others(folder, scores):
    edit(scores, row={"st_lpips": {"mean": 0.5, "std": 0.1}})
    text = card.write(folder, scores, card.Details({"license": "mit"}, "owner/base")).read_text()
    front = front_matter(text)
    (result,) = front["model-index"][0]["results"]
    metrics = {metric["name"]: metric["value"] for metric in result["metrics"]}
    row = json.loads(scores.read_text())["models"]["ft-EMA"]
    assert metrics.keys() == {"PSNR", "SSIM", "LPIPS"}
    assert metrics["PSNR"] == pytest.approx(row["psnr"]["mean"], abs=0.005)
    assert (front["license"], front["base_model"]) == ("mit", "owner/base")
    assert result["dataset"]["name"] == "photographs, 4 images, protocol card"


def test_the_hubs_own_reader_accepts_the_metadata(folder, scores):
    text = card.write(folder, scores, card.Details({"license": "mit"})).read_text()
    front = front_matter(text)
    name, results = model_index_to_eval_results(front.pop("model-index"))
    data = ModelCardData(**front, model_name=name, eval_results=results)
    assert {result.metric_type for result in data.eval_results} == {"psnr", "ssim", "lpips"}
    assert yaml.safe_load(data.to_yaml())["model-index"][0]["name"] == "tiny"


def test_rfid_enters_the_index_from_2048_images_on(folder, scores):
    few = card.write(folder, edit(scores, row={"rfid": 4.4217})).read_text()
    assert "| 4.42 |" in few
    assert "fid" not in [m["type"] for m in index_metrics(few)]
    many = card.write(folder, edit(scores, images=5000)).read_text()
    assert {"type": "fid", "name": "rFID", "value": 4.42} in index_metrics(many)


def index_metrics(text: str) -> list[dict]:
    return front_matter(text)["model-index"][0]["results"][0]["metrics"]


def test_table_protocol_hashes_and_strip(folder, scores):
    text = card.write(folder, scores).read_text()
    values = json.loads(scores.read_text())
    assert "| model | iteration | rFID | PSNR | SSIM | PSIM | LPIPS |" in text
    assert re.search(r"\| \*\*ft-EMA\*\* \| 560,001 \| not measured \| \d\d\.\d\d \+/- ", text)
    assert "- Not measured: rFID (no &lt;Inception> weights: fetch them).\n" in text
    assert "rFID on fewer than 2,048 images is biased" in text
    assert values["images_sha256"] in text
    assert "| posterior | sampled, seed 0 |" in text
    assert "| versions | torch 2.15.0, numpy 2.4.6 |" in text
    assert (folder / "strip.png").read_bytes() == b"strip"
    assert "input, kl-f8, ft-EMA, ft-MSE](strip.png)" in text
    files = json.loads((folder / "export.json").read_text())["files"]
    assert file_sha256(folder / "README.md") == files.pop("README.md")
    for digest in files.values():
        assert digest in text
    assert "data/photographs" not in text  # paths of one machine stay on it


def test_a_stand_in_has_its_own_column(folder, scores):
    text = card.write(folder, edit(scores, row={"st_lpips": {"mean": 0.5, "std": 0.1}})).read_text()
    assert "| LPIPS | ST-LPIPS (stand-in, not LPIPS) |" in text
    assert "0.5000 +/- 0.1000" in text


def test_published_numbers_stand_apart_and_only_if_asked(folder, scores):
    assert "4.99" not in card.write(folder, scores).read_text()
    text = card.write(folder, scores, card.Details(published=True)).read_text()
    measured, published = text.split("### Published, for orientation")
    assert "Not measured here" in published
    assert "(published) | 4.99 |" in published
    assert "(published)" not in measured
    assert "4.99" not in str(front_matter(text))


def test_scores_of_other_weights_are_refused(folder, scores):
    values = json.loads(scores.read_text())
    values["weights"]["ft-EMA"]["sha256"] = "0" * 64
    scores.write_text(json.dumps(values))
    with pytest.raises(MissingInputError, match="no scores of these weights"):
        card.write(folder, scores)


def other_files(scores: Path, **entry) -> Path:
    """The export's weights are scored as another file."""
    values = json.loads(scores.read_text())
    values["weights"]["ft-EMA"] |= entry
    scores.write_text(json.dumps(values))
    return scores


def test_scores_of_the_exported_checkpoint_are_taken(folder, exported, scores):
    (source,) = list_checkpoints(exported.parent)
    digest = file_sha256(source)
    assert json.loads((folder / "export.json").read_text())["source_sha256"] == digest
    with pytest.raises(MissingInputError, match="no scores of these weights"):
        card.write(folder, other_files(scores, sha256=digest, select="raw"))
    assert "| **ft-EMA** |" in card.write(folder, other_files(scores, select="ema")).read_text()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda v: v.pop("weights"), "no hashes of weights"),
        (lambda v: v.update(weights={"a": {}}), '"models" has no scores of a'),
        (lambda v: v["weights"]["ft-EMA"].pop("sha256"), "no sha256 of ft-EMA"),
        (lambda v: v["weights"]["ft-EMA"].update(iteration="7"), "iteration of ft-EMA"),
        (lambda v: v.update(weights=[]), '"weights" is not an entry for each model'),
        (lambda v: v.update(models=None), '"models" is not an entry for each model'),
        (lambda v: v["models"].pop("ft-EMA"), '"models" has no scores of ft-EMA'),
        (lambda v: v.pop("protocol"), '"protocol" does not name one'),
        (lambda v: v.pop("images"), '"images" is not their number'),
        (lambda v: v.update(unmeasured=[]), '"unmeasured" is not'),
        (lambda v: v.update(warnings=3), '"warnings" is not a list'),
    ],
)
def test_damaged_scores_are_refused(folder, scores, damage, named):
    values = json.loads(scores.read_text())
    damage(values)
    scores.write_text(json.dumps(values))
    with pytest.raises(MissingInputError, match=f"{re.escape(named)}.*kl-f8-train evaluate"):
        card.write(folder, scores)


def test_numbers_that_are_none_enter_neither_index_nor_table(folder, scores):
    row = {"rfid": float("inf"), "psnr": {"mean": float("nan"), "std": 1.0}, "ssim": 0.5}
    text = card.write(folder, edit(scores, row=row, images=5000)).read_text()
    assert {metric["type"] for metric in index_metrics(text)} == {"lpips"}
    assert "| **ft-EMA** | 560,001 | not measured | not measured | not measured |" in text


def test_changed_files_are_refused(folder):
    with (folder / "tiny-ema-pruned.ckpt").open("ab") as file:
        file.write(b"x")
    (folder / "config.yaml").unlink()
    both = r"ckpt was changed after the export\n.*config.yaml is missing since the export; run"
    with pytest.raises(MissingInputError, match=both):
        card.write(folder)
    with pytest.raises(MissingInputError, match=both):
        push.plan_upload(folder, "me/vae")


@pytest.mark.parametrize(
    "content",
    [
        "nope",
        "[]",
        "{}",
        '{"files": 3, "config": {}}',
        '{"files": {"../x": "0"}, "config": {}}',
        '{"files": {"x": 0}, "config": {}}',
        '{"files": {}, "config": {}}',
    ],
)
@pytest.mark.parametrize("verb", [["card"], ["push", "me/vae"]])
def test_a_damaged_export_json_is_refused_by_name(tmp_path, capsys, content, verb):
    (tmp_path / "export.json").write_text(content)
    assert main([verb[0], str(tmp_path), *verb[1:]]) == 3
    said = capsys.readouterr().err
    assert re.search(r"export\.json is (not JSON|not what|of an older version)", said)
    assert "again" in said


@pytest.mark.parametrize("wrong", [None, "x", {"a": 3}, [3]])
@pytest.mark.parametrize(
    "entry",
    ["iteration", "averaged", "changes", "config", "facts", "half_precision", "checks", "card"],
)
def test_an_entry_of_another_type_is_refused_by_name(tmp_path, exported, entry, wrong):
    record = json.loads((exported / "export.json").read_text())
    if isinstance(wrong, type(record.get(entry, {}))):
        wrong = 3
    (tmp_path / "export.json").write_text(json.dumps(record | {entry: wrong}))
    with pytest.raises(MissingInputError, match=r"export\.json is not what `kl-f8-train export`"):
        card.write(tmp_path)


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        ("half_precision.float16", "absent"),
        ("half_precision.float16.mean", "absent"),
        ("half_precision.float16.mean", []),
        ("half_precision.largest_activation", None),
        ("card.license", []),
        ("card.scores", None),
        ("card.scores.models", "absent"),
        ("card.scores.models.ft-EMA.psnr.mean", {}),
        ("card.scores.unmeasured", None),
    ],
)
def test_a_damaged_inner_entry_is_refused_by_name(folder, scores, entry, wrong):
    card.write(folder, scores, card.Details({"license": "mit"}))
    record = json.loads((folder / "export.json").read_text())
    *groups, name = entry.split(".")
    group = functools.reduce(dict.__getitem__, groups, record)
    group[name] = wrong
    if wrong == "absent":
        del group[name]
    (folder / "export.json").write_text(json.dumps(record))
    with pytest.raises(MissingInputError, match=r"export\.json is not what `kl-f8-train export`"):
        card.write(folder)


def test_odd_names_do_not_break_the_card(folder, scores):
    text = scores.read_text().replace('"ft-MSE"', json.dumps("a|b <i>`c`\n## d"))
    scores.write_text(text)
    written = card.write(folder, scores).read_text()
    assert "| a\\|b &lt;i>\\`c\\` ## d | 840,001 |" in written


def test_the_verb_by_its_command_line(folder, scores, tmp_path, capsys):
    own = tmp_path / "My-License.txt"
    own.write_text("You may.")
    assert main(["card", str(folder), "--scores", str(scores), "--license-file", str(own)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "copied strip.png, photographs of the evaluation (--no-pictures leaves it out)",
        f"{folder / 'README.md'}",
        f"next: kl-f8-train push {folder} OWNER/NAME",
    ]
    front = front_matter((folder / "README.md").read_text())
    assert [front[k] for k in ("license", "license_name", "license_link")] == [
        "other",
        "my-license",
        "LICENSE",
    ]
    assert (folder / "LICENSE").read_text() == "You may."


def test_no_pictures_copies_none_and_removes_an_earlier_copy(folder, scores, capsys):
    command = ["card", str(folder), "--scores", str(scores)]
    assert main(command) == 0
    assert (folder / "strip.png").is_file()
    capsys.readouterr()
    assert main([*command, "--no-pictures"]) == 0
    assert not (folder / "strip.png").exists()
    assert scores.with_name("strip.png").is_file()
    assert "strip.png" not in (folder / "README.md").read_text()
    assert "strip.png" not in (folder / "export.json").read_text()
    assert "copied" not in capsys.readouterr().out
    (folder / "strip.png").write_bytes(b"somebody's own")
    assert main([*command[:2], "--no-pictures"]) == 0
    assert (folder / "strip.png").read_bytes() == b"somebody's own"


# --- again, into the same folder -------------------------------------------------------------


def test_what_lies_in_the_export_already_is_taken(folder, scores, capsys):
    for name in ("scores.json", "strip.png"):
        shutil.copy(scores.with_name(name), folder)
    (folder / "LICENSE").write_text("You may.")
    command = ["card", str(folder), "--scores", str(folder / "scores.json")]
    command += ["--license-file", str(folder / "LICENSE")]
    assert [main(command), main(command)] == [0, 0]
    assert (folder / "LICENSE").read_text() == "You may."
    text = (folder / "README.md").read_text()
    assert "](strip.png)" in text
    files = json.loads((folder / "export.json").read_text())["files"]
    for name in ("strip.png", "LICENSE"):
        assert file_sha256(folder / name) == files[name]
        assert f"| `{name}` | `{files[name]}` |" in text


def test_what_was_told_before_stays(folder, scores, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("You may.")
    card.write(folder, scores, card.Details(base_model="owner/base"))
    measured = index_metrics((folder / "README.md").read_text())
    text = card.write(folder, None, card.Details(card.license_fields(None, own)), own).read_text()
    assert front_matter(text)["base_model"] == "owner/base"
    assert index_metrics(text) == measured
    assert "](strip.png)" in text
    assert card.write(folder).read_text() == text
    assert (
        front_matter(card.write(folder, None, card.Details({"license": "mit"})).read_text())[
            "license"
        ]
        == "mit"
    )
    (folder / "strip.png").write_bytes(b"of another evaluation")
    assert "strip.png" not in card.write(folder).read_text()
    assert "data/photographs" not in (folder / "export.json").read_text()
