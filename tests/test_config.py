import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import samples
import yaml

from kl_f8_train import config
from kl_f8_train.__main__ import main
from kl_f8_train.errors import MissingInputError, UsageError
from kl_f8_train.rules import micro_batch, nearest, source_shares
from kl_f8_train.settings import SETTINGS, VALUES, Model, Source, to_dict

FT_EMA = samples.CONFIGS / "ft_ema.yaml"
ORIGINS = ("card", "original", "inferred", "open", "yours")


def refused(*overrides: str, name: str = "ft_ema") -> str:
    with pytest.raises(UsageError) as caught:
        samples.recipe(name, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def refused_file(tmp_path: Path, text: str) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        config.load(file, samples.YOURS)
    assert caught.value.exit_code == 2
    return str(caught.value)


def edited(tmp_path: Path, old: str, new: str) -> Path:
    """ft_ema.yaml with one replacement."""
    text = FT_EMA.read_text()
    assert text.count(old) == 1
    file = tmp_path / "edited.yaml"
    file.write_text(text.replace(old, new))
    return file


def flat(values: dict, prefix: str = "") -> dict:
    leaves = {}
    for key, value in values.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


# --- the shipped recipes --------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(samples.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    settings = config.load(path, samples.YOURS)
    assert settings.init.weights == "model.ckpt"
    assert settings.data.sources["photos"].shards == "/data/photos"


@pytest.mark.parametrize(
    ("name", "start", "stop", "pixel", "weight"),
    [("ft_ema", 246803, 560001, "l1", 1.0), ("ft_mse", 560001, 840001, "mse", 0.1)],
)
def test_published_numbers(name, start, stop, pixel, weight):
    settings = samples.recipe(name)
    assert (settings.init.iteration, settings.stop_iteration) == (start, stop)
    assert (settings.global_batch, settings.data.crop) == (192, 256)
    assert (settings.loss.pixel, settings.loss.perceptual_weight) == (pixel, weight)
    assert settings.loss.perceptual == "lpips_vgg"
    assert settings.init.select == "ema"
    assert settings.model == Model(
        ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2, z_channels=4, embed_dim=4
    )


@pytest.mark.parametrize("name", ["ft_ema", "ft_mse"])
def test_every_number_names_its_origin(name):
    """On its line, in the comment block above, or on the line of the group that it is in."""
    lines = (samples.CONFIGS / f"{name}.yaml").read_text().splitlines()
    above, group, numbers, nameless = "", "", 0, []
    for line in lines:
        setting, _, comment = line.partition("#")
        if not setting.strip():
            above = f"{above} {comment}" if comment else ""
            continue
        if not line.startswith(" "):
            group = comment
        value = setting.partition(":")[2]
        if re.search(r"\d", value):
            numbers += 1
            words = re.findall(r"\w+", f"{comment} {above} {group}".lower())
            if not set(ORIGINS) & set(words):
                nameless.append(line)
        above = ""
    assert numbers >= 15
    assert nameless == []


def test_the_recipes_differ_only_where_the_card_says():
    changed = {
        line.split(":")[0]
        for line in config.differences(samples.recipe("ft_ema"), samples.recipe("ft_mse"))
    }
    assert {key for key in changed if not key.startswith("adversarial")} == {
        "name",
        "init.iteration",
        "loss.pixel",
        "loss.perceptual_weight",
    }


# --- what is refused, and how it is said ----------------------------------------------------


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("seeed=3", "seed"),
        ("--seeed=3", "seed"),
        ("loss.pixl=l1", "loss.pixel"),
        ("pixel=l1", "loss.pixel"),
        ("learning_rate=1e-4", "optimizer.learning_rate"),
        ("optimizer.learning_rat=1e-4", "optimizer.learning_rate"),
        ("optimiser.learning_rate=1e-5", "optimizer.learning_rate"),
        ("optimiser.learning_rat=1e-5", "optimizer.learning_rate"),
        ("data.learning_rate=1e-5", "optimizer.learning_rate"),
        ("init.weight=model.ckpt", "init.weights"),
        ("logs.every=10", "log.every"),
        ("shards=/d", "data.sources.NAME.shards"),
        ("adversarail=null", "adversarial"),
        ("data.sources.photos.weigth=2", "data.sources.photos.weight"),
    ],
)
def test_unknown_key_on_the_command_line(override, meant):
    message = refused(override)
    assert override.lstrip("-").split("=")[0] in message
    assert f"Did you mean '{meant}'?" in message


def test_nothing_is_meant_by_a_key_that_is_like_none():
    message = refused("optimizer.foo=1")
    assert "unknown key 'optimizer.foo'; optimizer has learning_rate, betas, eps, " in message
    assert refused("seed.x=1").endswith("; seed has no keys below it")


@pytest.mark.parametrize(
    ("old", "new", "meant"),
    [
        ("  pixel: l1 ", "  pixl: l1 ", "loss.pixel"),
        ("global_batch: 192", "global_bach: 192", "global_batch"),
        ("  sources: ???", "  sources: {a: {shard: /a}}", "data.sources.a.shards"),
    ],
)
def test_unknown_key_in_the_file(tmp_path, old, new, meant):
    with pytest.raises(UsageError, match=re.escape(f"Did you mean '{meant}'?")) as caught:
        config.load(edited(tmp_path, old, new), samples.YOURS)
    assert "edited.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=abc", "a whole number"),
        ("global_batch=1e3", "a whole number"),
        ("model.ch=1.5", "a whole number"),
        ("optimizer.learning_rate=fast", "a number"),
        ("optimizer.betas=a", "a number"),
        ("second_forward=yes", "true or false"),
        ("adversarial=0.5", "adversarial.weight"),
        ("seed", "key=value"),
        ("=3", "key=value"),
    ],
)
def test_wrong_type_on_the_command_line(override, said):
    message = refused(override)
    assert override in message
    assert said in message


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("seed: 0 ", "seed: zero ", "seed"),
        ("seed: 0 ", "seed: 1.5 ", "seed"),
        ("second_forward: false", "second_forward: 7.5", "second_forward"),
        ("  betas: [0.5, 0.9] ", "  betas: 0.5 ", "optimizer.betas"),
        ("  pixel: l1 ", "  pixel: l2 ", "loss.pixel"),
        ("adversarial:\n", "adversarial: 3\nlog:\n", "weight"),
    ],
)
def test_wrong_type_in_the_file(tmp_path, old, new, key):
    with pytest.raises(UsageError, match=re.escape(key)):
        config.load(edited(tmp_path, old, new), samples.YOURS)


def test_enumerations_list_their_values():
    assert "l1, mse" in refused("loss.pixel=l2")
    assert "Did you mean 'bfloat16'?" in refused("precision=bfloat")
    assert "Did you mean 'float32'?" in refused("precision=fp32")
    assert "Did you mean 'cuda'?" in refused("compute.accelerator=gpu")
    assert "Did you mean 'auto'?" in refused("log.wandb=online")
    assert "Did you mean 'l1'?" in refused("loss.pixel=L1")
    assert "Did you mean 'skip'?" in refused("data.bad_shards=skipp")


def test_missing_values_are_listed_with_their_meaning():
    with pytest.raises(UsageError) as caught:
        config.load(FT_EMA)
    message = str(caught.value)
    assert all(key in message for key in ("run_dir=", "init.weights=", "data.sources="))
    assert "directory of the run" in message


def test_a_recipe_has_no_hidden_defaults(tmp_path):
    message = refused_file(tmp_path, "name: x\n")
    for key in ("global_batch", "optimizer.learning_rate", "ema.decay", "loss.pixel", "data.crop"):
        assert f"{key}=" in message


@pytest.mark.parametrize("text", ["seed: 3\nseed: 4\n", "seed: 3\nema:\n  decay: 1\n  decay: 2\n"])
def test_duplicate_key(tmp_path, text):
    assert "duplicate key" in refused_file(tmp_path, text)


def test_tab(tmp_path):
    assert "tab" in refused_file(tmp_path, "ema:\n\tdecay: 0.5\n")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "name: ${oops}\n", "a: [1\n", "\0"])
def test_not_a_recipe(tmp_path, text):
    assert "recipe.yaml" in refused_file(tmp_path, text)


@pytest.mark.parametrize("name", ["${oops}", "${", "${env:HOME}"])
def test_interpolation_that_leads_nowhere(name):
    assert "ft_ema.yaml" in refused(f"name={name}")


def test_binary_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(bytes(range(128, 256)))
    with pytest.raises(UsageError, match="not UTF-8; save it as UTF-8"):
        config.load(file)


def test_yaml_cannot_run_code(tmp_path):
    marker = tmp_path / "marker"
    refused_file(tmp_path, f"name: !!python/object/apply:os.mkdir ['{marker}']\n")
    assert not marker.exists()


@pytest.mark.parametrize(("name", "said"), [("absent.yaml", "no such"), ("", "is a directory")])
def test_missing_file(tmp_path, name, said):
    with pytest.raises(MissingInputError, match=said) as caught:
        config.load(tmp_path / name)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("crop", [100, 4, 255])
def test_crop_must_fit_the_latents(crop):
    assert f"data.crop={crop}: expected a multiple of 8" in refused(f"data.crop={crop}")


def test_crop_larger_than_the_resized_image():
    assert "data.shorter_side=128 is smaller than data.crop=256" in refused("data.shorter_side=128")
    for sizes in ("[256,260]", "[256,256]", "100"):
        assert "expected multiples of 8, each once" in refused(f"log.pictures_size={sizes}")


def test_stand_in_needs_consent():
    assert "loss.allow_stand_in=true" in refused("loss.perceptual=st_lpips_alex")
    settings = samples.recipe("ft_ema", "loss.perceptual=st_lpips_alex", "loss.allow_stand_in=true")
    assert settings.loss.perceptual == "st_lpips_alex"


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.learning_rate=0",
        "optimizer.learning_rate=nan",
        "optimizer.betas=0.5,0.9,0.1",
        "ema.decay=1",
        "ema.decay=nan",
        "global_batch=0",
        "global_batch=-8",
        "stop_iteration=0",
        "init.iteration=560002",
        "seed=-1",
        "log.every=0",
        "checkpoint.keep_last=0",
        "data.lanes=0",
        "data.workers=-1",
        "data.sources.photos.weight=0",
        "data.sources.photos.weight=-1",
        "data.sources.photos.weight=nan",
        "data.sources.photos.weight=inf",
        "compute.devices=0",
        "compute.devices=-1",
        "compute.num_nodes=0",
        "compute.per_device_batch=0",
        "compute.per_device_batch=-1",
        "loss.perceptual_weight=-1",
        "loss.perceptual_weight=nan",
        "loss.perceptual_weight=inf",
        "adversarial.weight=-1",
        "adversarial.weight=nan",
        "adversarial.ndf=0",
        "adversarial.n_layers=0",
        "adversarial.warmup_iterations=-1",
        "model.ch=0",
        "model.ch=100",
        "model.ch_mult=[]",
        "model.ch_mult=1,0",
        "model.num_res_blocks=0",
        "model.embed_dim=0",
        "data.sources=",
        "data.sources={}",
        "global_batch=99999999999999999999999",
        "seed=9223372036854775808",
        "stop_iteration=1000000000",
        "data.max_bad_share=5",
        "data.workers=257",
        "data.crop=1000000000",
        "data.sources.photos.weight=1e308",
        "compute.checkpoint_levels=5",
        "compute.timeout_minutes=1e30",
        "adversarial.start_iteration=-5",
        "model.num_res_blocks=1000000",
        "model.ch_mult=" + "1," * 9,
        "model.ch_mult=1,100000",
        "data.sources.per_second=/d",
    ],
)
def test_values_out_of_range(override):
    assert override.split("=")[0].rsplit(".", 1)[-1] in refused(override)


def test_every_number_has_bounds():
    numbers = {
        key for key, found in VALUES.items() if re.search(r"\b(int|float)\b", found.type_name)
    }
    assert {key for key, found in SETTINGS.items() if found.bounds} == numbers


def test_what_was_got_is_told():
    assert "model.ch_mult=[]: expected 1 to 8 numbers" in refused("model.ch_mult=[]")
    assert "data.workers=999: expected 0 or more, at most 256" in refused("data.workers=999")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ch_mult: [1, 2, 4, 4]", "ch_mult: [1, [1, 2]]", "model.ch_mult=[1, [1, 2]]: expected a"),
        ("ch_mult: [1, 2, 4, 4]", "ch_mult: [1, null]", "model.ch_mult: got null; expected list"),
        ("betas: [0.5, 0.9]", "betas: 0.5", "optimizer.betas: got 0.5; expected list[float]"),
        ("seed: 0 ", "seed: null ", "seed: got null; expected int: seed of order"),
        ("eps: 1.0e-8", "eps: 1" + "0" * 400, "too large"),
        ("seed: 0 ", "seed: 1" + "0" * 5000, "not readable YAML"),
        ("sources: ???", "sources: {a: [x]}", "data.sources.a: got ['x'], expected shards"),
        ("sources: ???", "sources: {a: null}", "data.sources.a: got null, expected shards"),
        ("run_dir: ???", r'run_dir: "a\0b"', r"run_dir='a\x00b': expected a text without a NUL"),
    ],
)
def test_values_of_the_file_are_told_in_our_words(tmp_path, old, new, said):
    others = [text for text in samples.YOURS if not text.startswith(new.partition(":")[0])]
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        config.load(edited(tmp_path, old, new), others)
    for foreign in ("AnyNode", "Optional", "ListConfig", "subclass"):
        assert foreign not in str(caught.value)


def test_the_demo_is_its_recipe():
    """After `demo`, `train demo` goes on with its stage A: the two name the source alike."""
    stage_a = config.load(config.find_recipe("demo"), ["data.sources=runs/demo/shards"])
    assert config.differences(stage_a, config.load(config.find_recipe("demo"))) == []


# --- values ---------------------------------------------------------------------------------


def test_text_stays_text():
    for text in ("00012", "1e3", "true", "none", "2020-01-01"):
        assert samples.recipe("ft_ema", f"name={text}").name == text


def test_value_may_hold_an_equals_sign():
    assert samples.recipe("ft_ema", "run_dir=a=b").run_dir == "a=b"


def test_dashes_are_accepted():
    assert samples.recipe("ft_ema", "--seed=3").seed == 3


def test_the_last_override_wins():
    assert samples.recipe("ft_ema", "seed=3", "seed=4").seed == 4


def test_numbers_and_lists():
    settings = samples.recipe("ft_ema", "optimizer.betas=[0.1, 0.2]", "optimizer.eps=1e-6")
    assert settings.optimizer.betas == [0.1, 0.2]
    assert settings.optimizer.eps == 1e-6


@pytest.mark.parametrize(
    "key",
    ["name", "run_dir", "init.weights", "data.sources", "data.sources.x", "data.sources.x.shards"],
)
def test_a_text_is_never_null(key):
    assert f"{key}=null: cannot be null; expected " in refused(f"{key}=null")


def test_quotes_around_the_elements_of_a_list_are_left_out():
    settings = samples.recipe("ft_ema", "data.sources=['/data/a', \"/data/b\"]")
    assert [source.shards for source in settings.data.sources.values()] == ["/data/a", "/data/b"]
    settings = samples.recipe("ft_ema", "data.sources.photos.filters=['width >= 64', 'height > 9']")
    assert settings.data.sources["photos"].filters == ["width >= 64", "height > 9"]


@pytest.mark.parametrize("key", ["run_dir", "data.index_dir", "data.cache_dir"])
def test_what_a_shell_would_replace_makes_no_directory_of_that_name(key, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    said = refused(f"{key}=~/here")
    assert f"{key}=~/here: no shell has replaced its ~: write {Path.home()}/here" in said
    said = refused(f"{key}=$SCRATCH/here")
    assert f"{key}=$SCRATCH/here: no shell has replaced its $: write /scratch/me/here" in said
    samples.recipe("ft_ema", f"{key}=./~here")
    samples.recipe("ft_ema", f"{key}=./$RECYCLE.BIN")


def test_null():
    settings = samples.recipe("ft_ema", "adversarial=null", "data.shorter_side=null")
    assert settings.adversarial is None
    assert settings.data.shorter_side is None
    assert "adversarial is null" in refused("adversarial=null", "adversarial.weight=1")
    assert "adversarial is null" in refused("adversarial.weight=1", name="ft_mse")
    assert "or adversarial=null for none" in refused("adversarial=false")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/d/people,/d/places", {"people": "/d/people", "places": "/d/places"}),
        ("[/d/people, /d/places]", {"people": "/d/people", "places": "/d/places"}),
        ("/d/people/{000..099}.tar", {"people": "/d/people/{000..099}.tar"}),
        ("/d/{x,y}/1.tar,/e/z/*.tar", {"x_y": "/d/{x,y}/1.tar", "z": "/e/z/*.tar"}),
        ("/a/same,/b/same", {"same": "/a/same", "same_2": "/b/same"}),
        ("1.tar", {"images": "1.tar"}),
    ],
)
def test_sources_are_named_after_their_directories(text, expected):
    settings = samples.recipe("ft_ema", f"data.sources={text}")
    assert {name: source.shards for name, source in settings.data.sources.items()} == expected
    assert {source.weight for source in settings.data.sources.values()} == {1.0}


def test_a_folder_with_a_comma_in_its_name_is_one_source(tmp_path):
    folder = tmp_path / "Paris, 2019"
    folder.mkdir()
    for text in (f"data.sources={folder}", f"data.sources={folder},/d"):
        shards = [s.shards for s in samples.recipe("ft_ema", text).data.sources.values()]
        assert shards == ([str(folder)] if text.endswith("9") else [*str(folder).split(", "), "/d"])
    recipe = tmp_path / "r.yaml"
    text = (samples.CONFIGS / "ft_ema.yaml").read_text()
    recipe.write_text(text.replace("sources: ???", f"sources: ['{folder}', /d]"))
    found = config.load(recipe, ["run_dir=x", "init.weights=y"]).data.sources.values()
    assert [source.shards for source in found] == [str(folder), "/d"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.sources.x=/d/{000..099}.tar", "data.sources.y=/e"),
        ("data.sources.x.shards=/d/{000..099}.tar", "data.sources.y.shards=/e"),
    ],
)
def test_sources_one_by_one_into_a_recipe_without(overrides):
    """The way that the recipes' headers show."""
    settings = config.load(FT_EMA, [*samples.YOURS[:2], *overrides])
    shards = {name: source.shards for name, source in settings.data.sources.items()}
    assert shards == {"x": "/d/{000..099}.tar", "y": "/e"}


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.sources.x.weight=2", "data.sources.x=/d", "data.sources.y=/e"),
        ("data.sources.x=/d", "data.sources.y=/e", "data.sources.x.weight=2"),
        ("data.sources.x.weight=2", "data.sources.x.shards=/d", "data.sources.y=/e"),
        ("data.sources=/q/x,/q/y", "data.sources.x.weight=2"),
    ],
)
def test_source_weights(overrides):
    settings = config.load(FT_EMA, [*samples.YOURS[:2], *overrides])
    assert {name: s.weight for name, s in settings.data.sources.items()} == {"x": 2.0, "y": 1.0}
    assert source_shares(settings) == {"x": 128, "y": 64}


def test_source_weight_without_shards_is_missing_shards():
    with pytest.raises(UsageError, match=r"data\.sources\.x\.shards"):
        config.load(FT_EMA, [*samples.YOURS[:2], "data.sources.x.weight=2"])


@pytest.mark.parametrize(
    ("new", "names"),
    [
        ("sources: /d/x,/d/y", ["x", "y"]),
        ("sources: [/d/x, '/d/y/{0..9}.tar']", ["x", "y"]),
        ("sources: {x: /d/x, y: {shards: /d/y}}", ["x", "y"]),
    ],
)
def test_sources_in_the_file(tmp_path, new, names):
    file = edited(tmp_path, "sources: ???", new)
    assert list(config.load(file, samples.YOURS[:2]).data.sources) == names


# --- batches --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "images"), [(1, 12), (2, 12), (4, 12), (8, 12), (16, 12), (32, 6)]
)
def test_micro_batch(ranks, images):
    assert micro_batch(samples.recipe(), ranks) == images


def test_micro_batch_as_given():
    settings = samples.recipe("ft_ema", "compute.per_device_batch=24")
    assert micro_batch(settings, 8) == 24
    with pytest.raises(UsageError, match=r"per_device_batch=24.*12"):
        micro_batch(settings, 16)


def test_micro_batch_that_does_not_divide():
    with pytest.raises(UsageError, match=r"5 processes; it divides over \[1, 2, 3, 4, 6, 8, 12"):
        micro_batch(samples.recipe(), 5)
    assert "does not divide over 5" in refused("compute.devices=5")
    assert "does not divide over 40" in refused("compute.devices=8", "compute.num_nodes=5")


def test_shares_that_do_not_divide():
    message = refused("data.sources=/d/x,/d/y", "global_batch=7")
    assert "x 3.5, y 3.5" in message
    assert refused("data.sources=/d/x,/d/y", "data.sources.x.weight=1000").count("does not divide")


# --- as data --------------------------------------------------------------------------------


def test_round_trip():
    for name in ("ft_ema", "ft_mse", "demo"):
        shares = ("data.sources=/d/x,/d/y", "data.sources.x.weight=3", "global_batch=192")
        before = samples.recipe(name, *shares)
        values = json.loads(json.dumps(to_dict(before)))
        assert config.from_dict(values) == before
        assert config.from_dict(yaml.safe_load(config.to_yaml(before))) == before


def test_a_setting_that_an_older_version_did_not_have_is_no_change():
    config_now = samples.recipe("ft_mse")
    before = to_dict(config_now)
    del before["model"]["norm_num_groups"]
    assert config.differences(before, config_now) == []
    del before["model"]["ch"]  # it has no default
    assert config.differences(before, config_now) == ["model.ch: (none) -> 128"]


PYTHONS_WORDS = re.compile(r"\b(None|True|False|NoneType|str|bool)\b")


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("seed: null", "seed: got null; expected int"),
        ("seed: true", "seed: got true; expected int"),
        ("seed: [1, null, true]", "seed: got [1, null, true]; expected int"),
        ("seed: abc", "seed: got 'abc'; expected int"),
        ("name: null", "name: got null; expected string"),
        ("name: [a, true]", "name: got ['a', true]; expected string"),
        ("data: {flip: null}", "data.flip: got null; expected true | false"),
        ("init: {iteration: false}", "init.iteration: got false; expected int | null"),
        ("ema: {decay: [0.9, null]}", "ema.decay: got [0.9, null]; expected float"),
        ("optimizer: null", "optimizer: got null; expected a group of settings"),
        ("adversarial: true", "adversarial=true: this is a group of settings"),
        ("data: {sources: {a: null}}", "data.sources.a: got null, expected shards"),
        ("data: {sources: {a: [true]}}", "data.sources.a: got [true], expected shards"),
        ("data: {sources: {a: {shards: x, filters: null}}}", "filters: got null; expected list"),
        ("ema.decay: [0.9, true]", "in a file write ema: {decay: [0.9, true]}"),
        ("data.sources.a.shards: x", "in a file write data: {sources: {a: {shards: x}}}"),
    ],
)
def test_values_are_named_as_a_recipe_has_them(tmp_path, text, got):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        config.resolve(file)
    assert got in str(caught.value)
    assert not PYTHONS_WORDS.search(str(caught.value))


def test_no_screen_of_config_shows_values_of_python(capsys):
    for command in (["diff", "ft_ema", "ft_mse"], ["diff", "ft_ema", "demo"], ["schema"]):
        assert main(["config", *command]) == 0
        shown = capsys.readouterr().out
        assert not PYTHONS_WORDS.search(shown)
    assert "string; no default, a recipe states it" in shown
    assert "true | false; default false" in shown
    assert "list[string]; default []" in shown
    assert "; \n" not in shown
    assert "compute.devices\n    GPUs per node; null: all\n    int | null; default null" in shown


@pytest.mark.parametrize("text", ["null", "None", "NONE", "~", " null "])
def test_null_is_understood_however_it_is_written(text):
    assert samples.recipe("ft_ema", f"data.index_dir={text}").data.index_dir is None
    assert samples.recipe("ft_ema", f"adversarial={text}").adversarial is None


@pytest.mark.parametrize("word", ["true", "on", "True"])
def test_a_name_that_yaml_takes_for_true_keeps_its_spelling_in_yaml(tmp_path, word):
    file = tmp_path / "r.yaml"
    file.write_text(f"name: {word}")
    assert config.resolve(file)["name"] in ("true", "on")


def test_a_list_that_an_older_version_did_not_have_is_no_change():
    now = samples.recipe("ft_mse")
    before = config.to_dict(now)
    del before["data"]["sources"]["photos"]["filters"]
    assert config.differences(before, now) == []


def test_saved_yaml_is_a_recipe(tmp_path):
    before = samples.recipe("ft_mse")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(before))
    assert config.load(file) == before


def test_differences():
    before = samples.recipe()
    after = samples.recipe(
        "ft_ema",
        "loss.pixel=mse",
        "adversarial=null",
        "compute.num_nodes=2",
        "data.workers=9",
        "log.every=7",
        "checkpoint.every=5",
        "run_dir=elsewhere",
    )
    lines = config.differences(before, after)
    assert "loss.pixel: l1 -> mse" in lines
    assert {line.split(":")[0].split(".")[0] for line in lines} == {"loss", "adversarial"}
    (block,) = (line for line in lines if line.startswith("adversarial"))
    assert block.startswith(
        "adversarial: {weight: 0.5, start_iteration: 50001, warmup_iterations: "
    )
    assert block.endswith(", run_before_start: false} -> null")
    with_machine = config.differences(before, after, machine=True)
    assert {"compute.num_nodes: null -> 2", "data.workers: 4 -> 9"} < set(with_machine)
    assert config.differences(before, before, machine=True) == []
    more = samples.recipe("ft_ema", "data.sources=/data/photos,/d/b", "data.workers=9")
    source = "data.sources.b: (none) -> {shards: /d/b, weight: 1.0, filters: []}"
    assert config.differences(before, more) == [source]


def test_schema_explains_every_key():
    settings = samples.recipe("ft_ema", "data.sources=/d/NAME")
    assert VALUES.keys() == set(flat(to_dict(settings)))
    for key, found in VALUES.items():
        assert found.type_name, key
        assert len(found.doc) > 2, key
        assert "<" not in f"{found.type_name} {found.default}", key


def test_resolve_keeps_missing_values_visible():
    values = config.resolve(FT_EMA, ["seed=3"])
    assert values["run_dir"] == values["data"]["sources"] == "???"
    assert (values["seed"], values["global_batch"]) == (3, 192)
    with pytest.raises(UsageError, match="Did you mean 'seed'"):
        config.resolve(FT_EMA, ["seeed=3"])


def test_recipes_are_found_by_name(tmp_path):
    assert config.find_recipe("ft_mse").samefile(samples.CONFIGS / "ft_mse.yaml")
    assert config.find_recipe(str(FT_EMA)) == FT_EMA
    with pytest.raises(MissingInputError, match="ft_msee"):
        config.load(config.find_recipe("ft_msee"))


# --- quickness ------------------------------------------------------------------------------


def test_a_typo_is_told_at_once():
    code = (
        "import sys\n"
        "from kl_f8_train import config\n"
        "from kl_f8_train.errors import UsageError\n"
        f"try: config.load({str(FT_EMA)!r}, ['seeed=3'])\n"
        "except UsageError as error: print(error)\n"
        "print('torch loaded' if 'torch' in sys.modules else 'without torch')\n"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=samples.CONFIGS.parent,
    )
    seconds = time.monotonic() - start
    assert "Did you mean 'seed'?" in done.stdout
    assert "without torch" in done.stdout
    assert seconds < 2.0  # 0.2 s on an idle machine


# --- the name, of which files are called ----------------------------------------------------


@pytest.mark.parametrize("name", ["/tmp/here", "../../x", "a/b", "a\\b", "..", ".", " ", "", "-x"])
def test_a_name_is_one_part_of_a_file_name(name):
    assert "name=" in refused(f"name={name}")
    with pytest.raises(UsageError, match="expected one part of a file name"):
        config.from_dict({**to_dict(samples.recipe("ft_ema")), "name": name})


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a\x1bb"])
def test_a_name_has_no_control_characters(name):
    assert f"name={name!r}" in refused(f"name={name}")


@pytest.mark.parametrize("name", ["ft_ema", "mine v1.5 (b)", "größer", "..a"])
def test_other_names_are_taken(name):
    assert samples.recipe("ft_ema", f"name={name}").name == name


def test_a_split_that_does_not_divide_names_the_nearest():
    pair = {"a": Source(shards="a", weight=0.7), "b": Source(shards="b", weight=0.3)}
    recipe = samples.recipe()
    uneven = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=pair))
    with pytest.raises(UsageError, match=r"data.sources.a.weight=134 data.sources.b.weight=58"):
        source_shares(uneven)
    assert nearest({"a": 0.2, "b": 7.8}) == {"a": 1, "b": 7}


@pytest.mark.parametrize("side", ["[512,384]", "[384]", "[100,300]", "[384,400,512]", "x,y"])
def test_ranges_of_sides_that_cannot_be(side):
    with pytest.raises(UsageError, match=r"data\.shorter_side"):
        samples.recipe("ft_ema", "data.crop=256", f"data.shorter_side={side}")


@pytest.mark.parametrize("side", [384, [384, 512]])
def test_a_range_of_sides_is_read_from_both_places(tmp_path, side):
    shown = str(side).replace(" ", "")
    assert samples.recipe("ft_ema", f"data.shorter_side={shown}").data.shorter_side == side
    file = edited(tmp_path, "shorter_side: 384", f"shorter_side: {side}")
    assert config.load(file, samples.YOURS).data.shorter_side == side


@pytest.mark.parametrize(
    ("given", "decay"),
    [
        ("0.999", 0.999),
        ("0", 0.0),
        ("1e-3", 0.001),  # to YAML this is a string
        ("[0.999]", 0.999),
        ("[0.999,0.9999]", [0.999, 0.9999]),
        ("[0, 1e-3, 0.5]", [0.0, 0.001, 0.5]),
    ],
)
def test_a_decay_or_several_are_read_from_both_places(tmp_path, given, decay):
    file = edited(tmp_path, "decay: 0.9999", f"decay: {given}")
    for found in (
        samples.recipe("ft_ema", f"ema.decay={given}"),
        config.load(file, samples.YOURS),
        config.from_dict(to_dict(samples.recipe("ft_ema", f"ema.decay={given}"))),
    ):
        assert found.ema.decay == decay
        kinds = {type(value) for value in found.ema.decays}
        assert kinds == {float}


@pytest.mark.parametrize(
    "given",
    ["[]", "[0.9,0.9]", "[0.9,1]", "[-0.1,0.9]", "[0.9,x]", "[0.9,null]", "[[0.9,0.99]]", "null"],
)
def test_decays_that_cannot_be(tmp_path, given):
    with pytest.raises(UsageError, match=r"ema\.decay"):
        config.load(edited(tmp_path, "decay: 0.9999", f"decay: {given}"), samples.YOURS)
    if "[[" not in given:  # the command line has no nesting
        with pytest.raises(UsageError, match=r"ema\.decay"):
            samples.recipe("ft_ema", f"ema.decay={given}")


def test_the_types_of_unions_are_shown():
    shown = {key: found.type_name for key, found in VALUES.items()}
    assert shown["ema.decay"] == "float | list[float]"
    assert shown["data.shorter_side"] == "int | list[int] | null"


def test_a_file_called_as_a_shipped_recipe_does_not_stand_in_for_missing_numbers(
    tmp_path, monkeypatch
):
    recipe = FT_EMA.read_text().replace("global_batch: 192", "global_batch: ???")
    assert "???" in recipe
    (tmp_path / "mine.yaml").write_text(recipe)
    (tmp_path / "ft_ema").write_text("name: [")
    monkeypatch.chdir(tmp_path)
    (problem,) = config.examine_settings("mine.yaml").problems
    assert "global_batch=...   images" in str(problem)
