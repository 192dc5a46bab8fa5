"""Wrong inputs, from a mistyped key to a hostile pickle: what is said, the exit code, the time.

Each case is a command in a process forked from a server that has imported everything, in a folder
with a tiny run and its broken relatives. A message says what, where, got, expected and the remedy:
a case names the fragments that do, `|` between them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import ranks
import runs
import samples
import torch
from safetensors.torch import save_file

from kl_f8_train.weights import weight_file

TRAIN = " ".join(("train", "demo", *runs.TINY, "stop_iteration=101"))
INPUTS = "data.sources=shards init.weights=model.ckpt run_dir=new"
EVALUATE = "evaluate model.ckpt --perceptual st_lpips_alex --size 48"
USAGE, MISSING, FAILED = 2, 3, 4
CONFIG_SECONDS, OTHER_SECONDS = 3.0, 10.0  # of CPU, after imports
MANY_LINES = 30  # the longest lists every setting of a recipe
FILE_BYTES = 20_000  # what a full disk takes


class Case(NamedTuple):
    """A command, and what must come of it."""

    command: str
    code: int
    said: str
    hidden: str = ""  # packages that are not installed
    full: bool = False  # no file can grow beyond FILE_BYTES


def train(
    changes: str, code: int, said: str, inputs: str = INPUTS, hidden: str = "", full: bool = False
) -> Case:
    """`train` of the tiny recipe with `changes`; a later setting overrides an earlier one."""
    return Case(f"{TRAIN} {inputs} {changes}", code, said, hidden, full)


# --- the cases ------------------------------------------------------------------------------

RECIPES = {
    "syntax": "name: [1, 2\nrun_dir: x\n",
    "tab": "model:\n\tch: 128\n",
    "twice": "seed: 1\nseed: 2\n",
    "list": "- name\n- run_dir\n",
    "empty": "",
    "binary": "\x00\x01\x02",
    "unknown": "optimizer:\n  learning_rat: 1.0\n",
    "type": "global_batch: many\n",
    "section": "optimizer: 3\n",
    "brace": "data:\n  sources:\n    a: {00000..00009}.tar\n",
    "interpolation": "name: ${nowhere}\n",
    "sources": "data:\n  sources: 3\n",
    "null": "null: 3\n",
    "latin": "name: M\xe4rz\n",
    "optional": "seed: null\n",
    "several": "seed: abc\noptimizer: {learning_rate: fast}\ndata: {crop: 7}\nfoo: 1\n",
}

CONFIG = {
    "recipe syntax": Case("train syntax.yaml", USAGE, "line 1|expected ',' or ']'|Fix the line"),
    "recipe tab": Case("train tab.yaml", USAGE, "tab.yaml|line 2|indent with spaces"),
    "recipe twice": Case("train twice.yaml", USAGE, "duplicate key seed|line 2"),
    "recipe list": Case("train list.yaml", USAGE, "expected keys and values|got a list"),
    "recipe empty": Case("train empty.yaml", USAGE, "no value yet|run_dir=...|stop_iteration=..."),
    "recipe binary": Case("train binary.yaml", USAGE, "not readable YAML|control characters"),
    "recipe unknown": Case("train unknown.yaml", USAGE, "unknown.yaml|optimizer.learning_rate"),
    "recipe type": Case("train type.yaml", USAGE, "type.yaml: global_batch|'many'|expected int"),
    "recipe section": Case("train section.yaml", USAGE, "section.yaml: optimizer=3|group|.betas"),
    "recipe brace": Case("train brace.yaml", USAGE, "brace.yaml|line 3|quote|braces"),
    "recipe interpolation": Case("train interpolation.yaml", USAGE, "'nowhere' not found|name"),
    "recipe sources": Case("train sources.yaml", USAGE, "data.sources: got 3|one entry per source"),
    "recipe latin": Case("train latin.yaml", USAGE, "latin.yaml|byte 7 is not UTF-8; save it as"),
    "recipe weights": Case(
        "train cut.safetensors", USAGE, "it is a weight file|init.weights=cut.saf"
    ),
    "recipe optional": Case("train optional.yaml", USAGE, "seed: got null; expected int: seed of"),
    "recipe null": Case("train null.yaml", USAGE, "null.yaml|Incompatible key type"),
    "recipe folder": Case("train shards", MISSING, "shards: is a directory; give|ft_ema, ft_mse"),
    "near recipe": Case("train singel_gpu", MISSING, "ft_mse|; did you mean single_gpu?"),
    "recipe name": Case("config show ft_emaa", MISSING, "ft_emaa: no such file|ft_ema, ft_mse"),
    "unknown key": train(
        "optimizer.learning_rat=1", USAGE, "unknown key|'optimizer.learning_rate'?"
    ),
    "unknown section": train("optimiser.eps=1", USAGE, "unknown key|'optimizer.eps'?"),
    "a section": train("optimizer=1", USAGE, "optimizer=1|group of settings|optimizer.eps"),
    "not a number": train("optimizer.learning_rate=fast", USAGE, "=fast: expected a number"),
    "not whole": train("global_batch=1.5", USAGE, "global_batch=1.5: expected a whole number"),
    "exponent": train("global_batch=1e3", USAGE, "global_batch=1e3: expected a whole number"),
    "no number": train("optimizer.learning_rate=nan", USAGE, "=nan: expected a number above 0"),
    "negative": train("seed=-1", USAGE, "seed=-1: expected 0 or more"),
    "large seed": train("seed=9223372036854775808", USAGE, "seed=9223372036854775808: expected 0"),
    "large batch": train("global_batch=99999999999999999999999", USAGE, "at most 1,000,000"),
    "large stop": train("stop_iteration=1000000000", USAGE, "above 0, at most 999,999,999"),
    "many workers": train("data.workers=100000", USAGE, "=100000: expected 0 or more, at most 256"),
    "many blocks": train("model.num_res_blocks=1000000", USAGE, "above 0, at most 64"),
    "many levels": train("compute.checkpoint_levels=99", USAGE, "0 or more, at most 2"),
    "no levels": train("model.ch_mult=[]", USAGE, "model.ch_mult=[]: expected 1 to 8 numbers"),
    "early start": train("adversarial.start_iteration=-5", USAGE, "=-5: expected 0 or more"),
    "bad share": train("data.max_bad_share=5", USAGE, "=5.0: expected a number above 0, at most 1"),
    "null run_dir": train(
        "run_dir=null", USAGE, "run_dir=null: cannot be null; expected directory"
    ),
    "null weights": train("init.weights=null", USAGE, "weights=null: cannot be null; expected"),
    "null sources": train("data.sources=null", USAGE, "sources=null: cannot be null; expected"),
    "braces": train("data.sources={}", USAGE, "data.sources is empty|data.sources=SHARDS"),
    "speed's name": train(
        "data.sources.per_second=shards", USAGE, "per_second: metrics.csv has|another name"
    ),
    "json": train("--json", USAGE, "--json: a training prints no JSON; give --dry-run"),
    "not one of": train("loss.pixel=l2", USAGE, "loss.pixel=l2: expected one of l1, mse"),
    "not a switch": train("data.flip=maybe", USAGE, "data.flip=maybe: expected true or false"),
    "empty value": train("global_batch=", USAGE, "global_batch=: expected a whole number"),
    "empty weights": train("init.weights=", USAGE, "init.weights is empty: expected file"),
    "empty run_dir": train("run_dir=", USAGE, "run_dir is empty: expected directory"),
    "no groups": train(
        "model.norm_num_groups=0", USAGE, "model.norm_num_groups=0: expected a number above 0"
    ),
    "several wrong": train(
        "seed=abc sed=1 global_batch=many data.crop=33 compute.per_device_batch=3",
        USAGE,
        "wrong settings:\n  seed=abc: expected a whole|key 'sed'. Did|=many: |  data.crop=33: ",
    ),
    "recipe several": Case(
        "train several.yaml sed=1",
        USAGE,
        "seed: got 'abc'|learning_rate: got 'fast'|key 'foo'|key 'sed'|run_dir=...|data.crop=7: ",
    ),
    "several to show": Case("config show demo seed=abc data.crop=x", USAGE, "seed=abc: |crop=x: "),
    "several to time": Case("benchmark demo seed=abc data.crop=33", USAGE, "seed=abc: |crop=33: "),
    "several for doctor": Case(
        "doctor demo seed=abc run_dir=x data.crop=33 data.sources=no",
        USAGE,
        "3 problems:|1. seed=abc: |2. wrong settings:\n|data.crop=33: |3. data.sources=no: ",
    ),
    "missing value": Case("train ft_ema run_dir=new", USAGE, "no value yet|init.weights=..."),
    "no key": train("=5", USAGE, "'=5': expected key=value, such as seed=1"),
    "per device": train(
        "compute.per_device_batch=3", USAGE, "batch=3 does not divide|[1, 2, 4] do"
    ),
    "processes": train("compute.devices=3", USAGE, "batch=4 does not divide over 3|[1, 2, 4]"),
    "source weights": train(
        "data.sources=shards,tiles data.sources.tiles.weight=2", USAGE, "tiles 2.66667|change the"
    ),
    "no sources": train("data.sources=", USAGE, "data.sources is empty|data.sources=SHARDS"),
    "below null": train(
        "adversarial=null adversarial.weight=1", USAGE, "is null in this|in the file"
    ),
    "stand-in": train("loss.allow_stand_in=false", USAGE, "st_lpips_alex|loss.allow_stand_in=true"),
    "ends before": train(
        "init.iteration=2000", USAGE, "=101 lies before init.iteration=2000|later"
    ),
    "betas": train("optimizer.betas=0.5", USAGE, "optimizer.betas=[0.5]: expected two numbers"),
    "decay": train("ema.decay=1", USAGE, "ema.decay=1.0: expected 0 or more, below 1"),
    "crop": train("data.crop=33", USAGE, "data.crop=33: expected a multiple of 2"),
    "larger crop": train(
        "data.shorter_side=16", USAGE, "=16 is smaller than data.crop=32|at least"
    ),
    "groups": train("model.ch=33", USAGE, "model.ch=33: expected a multiple of"),
    "flag": train("--fast", USAGE, "unrecognized arguments: --fast"),
    "near verb": Case("trian", USAGE, "invalid choice: 'trian'|; did you mean train?"),
    "near choice": Case("config shwo", USAGE, "; did you mean show?"),
    "verb": Case("finetune", USAGE, "invalid choice: 'finetune'|'train'"),
    "diff": Case(
        "config diff ft_ema", USAGE, "config diff: expected 2 recipes, got 1|such as ft_ema"
    ),
    "config": Case("config explain", USAGE, "'explain'|schema"),
    "demo length": Case("demo --length -1", USAGE, "--length: got -1, expected a number above 0"),
    "demo short": Case(
        "demo --length 0.0001 --run-dir d", USAGE, "--length 0.0001: leaves a part|expected 0.01"
    ),
    "demo long": Case("demo --length 1e300 --run-dir d", USAGE, "--length 1e+300|to 100,000"),
    "demo null": Case("demo adversarial=null --run-dir d", USAGE, "adversarial=null: the|leave"),
    "demo key": Case("demo seeed=1 --run-dir d", USAGE, "unknown key 'seeed'|'seed'?"),
    "benchmark": Case("benchmark demo --iterations 0", USAGE, "--iterations 0: expected 1 or more"),
    "index filter": Case("index shards --filter width~256", USAGE, "'width~256': expected FIELD"),
    "index workers": Case("index shards --workers 0", USAGE, "got 0, expected a whole number"),
    "index cache": Case("index shards --cache-gib -1", USAGE, "got -1, expected a number above 0"),
    "pack shard": Case("pack tiles packed --per-shard 0", USAGE, "0 images in each|1 to 10,000"),
    "pack workers": Case("pack tiles packed --workers 0", USAGE, "got 0, expected a whole number"),
    "fetch": Case("fetch clip", USAGE, "fetch clip: unknown network; expected vgg or inception"),
    "same name": Case("evaluate a.ckpt a/a.ckpt --images tiles", USAGE, "same name|NAME=WEIGHTS"),
    "size": Case(
        "evaluate model.ckpt --images tiles --size 7", USAGE, "--size 7: expected at least"
    ),
    "limit": Case("evaluate a --images tiles --limit 0", USAGE, "--limit: got 0, expected"),
    "device": Case("evaluate a --images tiles --device tpu", USAGE, "got tpu, expected cpu, cuda"),
    "dtype": Case("export run --dtype float8", USAGE, "'float8'|bfloat16"),
    "average": Case("export run --average run --raw", USAGE, "--average|--raw|leave out"),
}

WEIGHTS = {
    "nowhere": Case(
        "inspect nowhere.ckpt", MISSING, "nowhere.ckpt: no such file; expected a weight"
    ),
    "cut ckpt": Case("inspect cut.ckpt", MISSING, "cut.ckpt (|bytes) is broken or cut short|again"),
    "cut": Case("inspect cut.safetensors", MISSING, "100,000 bytes) is broken or cut short|again"),
    "random": Case(
        "inspect random.bin", MISSING, "not a weight file: expected|got a file that begins"
    ),
    "broken link": Case("inspect link.ckpt", MISSING, "it is a link to gone.ckpt, which does not"),
    "circle": Case("inspect circle.ckpt", MISSING, "it is a link to circle.ckpt, which does not"),
    "home": Case("inspect ~/vae.ckpt", MISSING, "no shell has replaced its ~: write /"),
    "setting home": Case(
        "doctor demo init.weights=~/vae.ckpt run_dir=x", MISSING, "no shell has replaced its ~"
    ),
    "address": Case("inspect https://x.org/vae.ckpt", MISSING, "an address: download the file"),
    "long name": Case(f"inspect {'x' * 300}", MISSING, "File name too long, so that it cannot"),
    "other folder": Case("inspect directory/of", MISSING, "nor a diffusers folder|of/sdxl_vae.pt"),
    "part": Case("inspect directory/a-00001-of-00002.safetensors", MISSING, "give their folder"),
    "no bytes": Case(
        "inspect empty.ckpt", MISSING, "expected .safetensors|got an empty file|again"
    ),
    "pointer": Case("inspect text.ckpt", MISSING, "expected .safetensors|git lfs pull"),
    "web page": Case(
        "inspect html.safetensors", MISSING, "got a web page; download the file itself"
    ),
    "hostile": Case("inspect hostile.ckpt", MISSING, "asks to run|system|refused|as .safetensors"),
    "script": Case(
        "inspect script.pt", MISSING, "script.pt: a TorchScript program, expected weights"
    ),
    "a list": Case("inspect list.pt", MISSING, "holds a list, not a state dict"),
    "folder": Case(
        "inspect directory", MISSING, "directory: neither a run|nor a diffusers|give one"
    ),
    "lora": Case(
        "inspect lora.safetensors", MISSING, "holds lora_up.weight|expected encoder.*|give"
    ),
    "hub id": Case("inspect owner/name", MISSING, "owner/name|no answer|Download its"),
    "export nowhere": Case(
        "export nowhere.ckpt", MISSING, "nowhere.ckpt: no such directory or checkpoint; check"
    ),
    "export lora": Case(
        "export lora.safetensors", MISSING, "not a training checkpoint|expected a run"
    ),
    "export model": Case("export model.ckpt", MISSING, "not a training checkpoint|expected a run"),
    "export hostile": Case("export hostile.ckpt", MISSING, "asks to run|refused"),
    "export newer": Case("export newer", MISSING, "its configuration|lookahead"),
    "init nowhere": train(
        "init.weights=no.ckpt", MISSING, "init.weights=no.ckpt: no such|expected"
    ),
    "near base": Case("inspect kl_f8_mni", MISSING, "OWNER/NAME; did you mean kl_f8_mini?"),
    "near weights": train("init.weights=modle.ckpt", MISSING, "; did you mean model.ckpt?"),
    "init cut": train("init.weights=cut.ckpt", MISSING, "cut.ckpt (|is broken or cut short|again"),
    "init hostile": train(
        "init.weights=hostile.ckpt", MISSING, "hostile.ckpt: the file asks to run"
    ),
    "init tiles": train("init.weights=tiles", MISSING, "tiles: neither a run directory|give one"),
    "init wide": train(
        "init.weights=wide.ckpt", MISSING, "is (64, 3, 3, 3), expected (32, 3|model.*"
    ),
    "init part": train(
        "init.weights=part.safetensors", MISSING, "missing decoder.up.0|expected (32,)"
    ),
    "init nan": train(
        "init.weights=nan.ckpt", MISSING, "nan.ckpt: 120 tensors are not finite|another"
    ),
    "no iteration": train(
        "init.weights=plain.safetensors init.iteration=null",
        USAGE,
        "iteration; give init.iteration",
    ),
    "discriminator": train(
        "adversarial.n_layers=1", MISSING, "model.ckpt: its discriminator|n_layers"
    ),
    "resume broken": train(
        "run_dir=broken_run", MISSING, "none of which can|in broken_run|Move them"
    ),
    "resume newer": train("run_dir=newer", MISSING, "lookahead|none of which can be read"),
    "resume other": train(
        "run_dir=run global_batch=8", USAGE, "global_batch: 4 -> 8|--allow-changes"
    ),
    "inject into a VAE": Case(
        "inject run model.ckpt --out o", MISSING, "first_stage_model.*|give one"
    ),
    "inject into folder": Case("inject run directory --out o", USAGE, "directory is a folder|copy"),
    "inject nowhere": Case(
        "inject no.ckpt full.safetensors --out o", MISSING, "weights no.ckpt: no such file"
    ),
    "evaluate no weights": Case(
        "evaluate no.ckpt --images tiles", MISSING, "weights no.ckpt: no such file"
    ),
    "inject wide": Case(
        "inject wide.ckpt full.safetensors --out o", MISSING, "does not fit|expected"
    ),
    "evaluate part": Case(
        "evaluate part.safetensors --images tiles", MISSING, "missing decoder.up"
    ),
    "vgg nowhere": Case(
        "evaluate model.ckpt --images tiles --vgg no.pth",
        MISSING,
        "--vgg no.pth: no such file; expected VGG16's features|fetch",
    ),
    "vgg wrong": Case(
        "evaluate model.ckpt --images tiles --vgg plain.safetensors", MISSING, "VGG16|fetch vgg"
    ),
    "vgg absent": train(
        "loss.perceptual=lpips_vgg",
        MISSING,
        "VGG16's features not found|fetch|loss.perceptual_weights=FILE",
    ),
    "inception wrong": Case(
        f"{EVALUATE} --images tiles --inception plain.safetensors", MISSING, "does not hold|fetch"
    ),
}

DATA = {
    "no shards": train(
        "data.sources=no/{00..09}.tar", MISSING, "no file is named like no/{00..09}.tar; check"
    ),
    "few shards": train(
        "data.sources=shards/{000..099}.tar", MISSING, " of 100 files are missing (shards/0"
    ),
    "bad pattern": train(
        "data.sources=shards/{00..", MISSING, "shards/{00.. is not a pattern|expected"
    ),
    "no match": train(
        "data.sources=shards/*.tgz", MISSING, "no file is named like shards/*.tgz|check"
    ),
    "cut shard": train("data.sources=cut_shards", MISSING, "0.tar is broken: unexpected end|=skip"),
    "empty tar": train("data.sources=empty_tar", MISSING, "=empty_tar: no image is left|pack"),
    "text as tar": train(
        "data.sources=text_tar", MISSING, "text_tar/0.tar is not a tar but|begins with|repair them"
    ),
    "empty folder": train(
        "data.sources=directory", MISSING, "no shards and no images|expected .tar"
    ),
    "not images": train(
        "data.sources=not_images", MISSING, "not a readable image|check not_images"
    ),
    "small images": train(
        "data.crop=64", MISSING, "48 x 48 pixels, smaller|data.crop to 48 or|data.shorter_side=64"
    ),
    "binary list": train("data.sources=binary.txt", MISSING, "binary.txt is not a list|expected"),
    "empty list": train("data.sources=empty.txt", MISSING, "empty.txt lists no shards: expected"),
    "many shards": train(
        "data.sources=shards/{000000000..999999999}.tar",
        MISSING,
        "1,000,000,000 shards, expected 1,0",
    ),
    "list file": train("data.sources=text.txt", MISSING, "2 of 2 files are missing (a.tar, b.tar)"),
    "not indexed": train(
        "data.sources=http://127.0.0.1:9/0.tar", MISSING, "not indexed|kl-f8-train index http"
    ),
    "index dir": train(
        "data.index_dir=model.ckpt", FAILED, "cannot be written in model.ckpt|data.index_dir"
    ),
    "filter field": train(
        "data.sources.shards.filters=wdth>=1", USAGE, "no image has|'wdth'|width"
    ),
    "filter all": train("data.sources.shards.filters=width>=99", MISSING, "dropped 36|loosen"),
    "filter number": train(
        "data.sources.shards.filters=width>=--", USAGE, "got --, expected a number"
    ),
    "filter folder": train(
        "data.sources=tiles data.sources.tiles.filters=width>=1", USAGE, "plain folder|pack"
    ),
    "near source": train(
        "data.sources=./shrads",
        MISSING,
        "train: data.sources=./shrads: no such file or folder|; did you mean shards?",
    ),
    "several inputs": train(
        "init.weights=no.ckpt data.sources=tils,no/*.tar log.pictures=nowhere log.pictures_every=1",
        MISSING,
        "train: 4 inputs are missing:\n  init.weights=no.ckpt: no such|data.sources=tils: no such|"
        "did you mean tiles?|named like no/*.tar|log.pictures: no images in nowhere: no such",
    ),
    "to resume": train(
        "run_dir=run init.weights=gone data.sources=no", MISSING, "train: data.sources=no: no such"
    ),
    "named source": train("data.sources={} data.sources.x=no", MISSING, "x.shards=no: no such"),
    "near pictures": train(
        "log.pictures=tils log.pictures_every=1", MISSING, "no such folder|; did you mean tiles?"
    ),
    "pictures a file": train(
        "log.pictures=model.ckpt log.pictures_every=1",
        MISSING,
        "in model.ckpt: not a folder; expected one of photographs\n",
    ),
    "pictures": train(
        "log.pictures=no log.pictures_every=1", MISSING, "images in no: no such folder"
    ),
    "refused": Case(
        "index http://127.0.0.1:9/0.tar --cache-dir c --index-dir i",
        FAILED,
        "refused|Check the address",
    ),
    "scheme": Case(
        "index ftp://h/0.tar --index-dir i", USAGE, "cannot fetch from ftp; expected http"
    ),
    "index nowhere": Case(
        "index nowhere", MISSING, "nowhere: no such file or folder|check the path"
    ),
    "index cut": Case(
        "index cut_shards --index-dir i", MISSING, "1 of 1 shard is broken|download them"
    ),
    "evaluate nowhere": Case(
        "evaluate model.ckpt --images no", MISSING, "--images no: no such file or folder"
    ),
    "evaluate empty": Case(
        f"{EVALUATE} --images directory", MISSING, "no images in directory|expected"
    ),
    "evaluate junk": Case(
        f"{EVALUATE} --images not_images", MISSING, "no image of not_images can|0.jpg"
    ),
    "pack nowhere": Case("pack nowhere o", MISSING, "nowhere: no such folder; expected"),
    "pack empty": Case("pack directory o", MISSING, "no images in directory: expected .jpg"),
    "pack shards": Case("pack tiles text_tar", USAGE, "text_tar already holds|name an empty"),
    "pack manifest": Case("pack tiles bad_manifest", USAGE, "pack.json is not the list|another"),
    "pack other": Case("pack not_images shards", USAGE, "20 there, 1000 asked for|Name another"),
    "card run": Case("card run", MISSING, "run/export.json: no such file; give"),
    "card of a run": Case("card mine", MISSING, "no such file; give its export, mine/export"),
    "push of a run": Case("push mine me/vae", MISSING, "give its export, mine/export"),
    "card scores": Case("card export --scores no.json", MISSING, "no.json: no such file|evaluate"),
    "card junk": Case("card export --scores text.ckpt", MISSING, "text.ckpt is not JSON|expected"),
    "card others": Case(
        "card export --scores other.json", MISSING, "no hashes of weights|run that again"
    ),
    "card old": Case("card bad_export", MISSING, "export.json is of an older version|again"),
    "status": Case("status directory", MISSING, "not a run directory yet|config.yaml"),
    "status file": Case(
        "status model.ckpt", MISSING, "model.ckpt: no such directory; |it is a file"
    ),
    "status nowhere": Case("status nowhere", MISSING, "nowhere: no such directory; give"),
    "status junk": Case(
        "status bad_config", MISSING, "not a run's configuration|no keys and values"
    ),
    "demo": Case(
        "demo --training shards --run-dir d", MISSING, "without --held-out: name a folder"
    ),
    "demo held out": Case(
        "demo --training shards --held-out no --run-dir d", MISSING, "--held-out no: no such folder"
    ),
    "demo training": Case(
        "demo --training no --held-out tiles --run-dir d", MISSING, "--training no: no such|check"
    ),
    "export images": Case("export run --images no --out x", MISSING, "--images no: no such folder"),
    "doctor": Case("doctor demo init.weights=no run_dir=new", MISSING, "no: no such file|NO GO"),
}

MACHINE = {
    "run_dir a file": train(
        "run_dir=model.ckpt", FAILED, "cannot write in model.ckpt: it is a file; name another"
    ),
    "run_dir below": train("run_dir=model.ckpt/run", FAILED, "Not a directory; make room|another"),
    "export exists": Case("export run --out export", USAGE, "exists; nothing was written|--force"),
    "export file": Case(
        "export run --out model.ckpt", FAILED, "cannot write in model.ckpt|another"
    ),
    "inject exists": Case(
        "inject run full.safetensors --out full.safetensors", USAGE, "exists; nothing|--force"
    ),
    "pack tar": Case(
        "pack tiles new.tar", USAGE, "got new.tar, the name of a file; expected a dir"
    ),
    "pack file": Case("pack tiles model.ckpt", FAILED, "cannot write to model.ckpt: |another"),
    "evaluate file": Case(
        f"{EVALUATE} --images tiles --out model.ckpt",
        USAGE,
        "--out model.ckpt: is a file|directory",
    ),
    "evaluate below": Case(
        f"{EVALUATE} --images tiles --out model.ckpt/x", FAILED, "cannot write in model.ckpt/x"
    ),
    "html folder": Case("status run --html .", USAGE, "--html .: names no file; expected one"),
    "html": Case("status run --html no/x.html", FAILED, "--html no/x.html: cannot be|name a file"),
    "index file": Case(
        "index shards --index-dir model.ckpt", FAILED, "cannot be written in model.ckpt"
    ),
    "cache file": Case(
        "index http://127.0.0.1:9/0.tar --cache-dir model.ckpt", FAILED, "model.ckpt|bytes are free"
    ),
    "full": train("", FAILED, "cannot write|bytes are free|Make room", full=True),
    "full export": Case("export run --out y", FAILED, "cannot write|Make room", full=True),
    "full inject": Case("inject run full.safetensors --out o", FAILED, "File too large", full=True),
    "full pack": Case("pack tiles y2", FAILED, "File too large", full=True),
    "no GPU": train("compute.accelerator=cuda", USAGE, "torch sees 0 GPUs|compute.accelerator=cpu"),
    "few GPUs": train("compute.accelerator=cuda compute.devices=2", USAGE, "2 processes|fix"),
    "benchmark GPU": Case("benchmark demo compute.accelerator=cuda", USAGE, "no GPU here; fix"),
    "evaluate GPU": Case(
        "evaluate model.ckpt --images tiles --device cuda", USAGE, "no GPU here; fix"
    ),
    "stlpips": train("", MISSING, "pip install stlpips-pytorch", hidden="stlpips_pytorch"),
    "fidelity": Case(
        f"{EVALUATE} --images tiles --inception plain.safetensors",
        MISSING,
        "pip install torch-fidelity",
        "torch_fidelity torch_fidelity.feature_extractor_inceptionv3",
    ),
    "demo stlpips": Case(
        "demo --run-dir d2", MISSING, "pip install stlpips-pytorch", "stlpips_pytorch"
    ),
    "hub": Case("inspect owner/name", MISSING, "pip install huggingface_hub", "huggingface_hub"),
    "fsspec": Case(
        "index gs://b/0.tar --index-dir i", MISSING, "nothing here reads gs://|pip", "gcsfs fsspec"
    ),
}

CASES = {**CONFIG, **WEIGHTS, **DATA, **MACHINE}


def test_there_are_many():
    assert len(CASES) == len(CONFIG) + len(WEIGHTS) + len(DATA) + len(MACHINE) > 60


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(world, name):
    case = CASES[name]
    if (
        name in ("no GPU", "few GPUs", "benchmark GPU", "evaluate GPU")
        and torch.cuda.is_available()
    ):
        pytest.skip("there is one")
    code, output, seconds = answer(world, case.command, case.hidden, case.full)
    assert code == case.code, output
    for fragment in case.said.split("|"):
        assert fragment in output
    check_wording(output)
    assert seconds < (CONFIG_SECONDS if name in CONFIG else OTHER_SECONDS)
    assert not (world / "hostile_was_here").exists()


def check_wording(output: str) -> None:
    """What holds of every message."""
    for foreign in ("Traceback", "unexpected ", "PosixPath(", "<class", "object at", ".py"):
        assert foreign not in output.replace("unexpected end", "").replace("unexpected main", "")
    assert not re.search(r"0x[0-9a-f]{6,}", output)
    message = re.search(r"^(kl-f8-train( \w+)?: |NO GO)(.|\n)*", output, re.MULTILINE)
    assert message, output
    assert len(message[0].splitlines()) <= MANY_LINES
    assert max(map(len, message[0].splitlines())) < 500


def hear_sigint() -> None:
    """A shell's background jobs, and so their children, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupted_while_it_loads(world):
    command = [sys.executable, "-m", "kl_f8_train", "doctor", "demo"]
    process = subprocess.Popen(
        command,
        cwd=world,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_sigint,
    )
    assert process.stdout is not None
    assert process.stdout.read(11) == "loading ..."
    process.send_signal(signal.SIGINT)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 130
    assert "Traceback" not in output


# --- the world they are in ------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(folder):
    """A folder with photographs, shards, weights, a finished run, its export, and broken ones."""
    runs.make_weights(folder / "wide.ckpt", ch=64)
    for command in (f"{TRAIN} {INPUTS} run_dir=run", "export run --out export"):
        code, text, _ = answer(folder, command)
        assert code == 0, text
    _break_weights(folder)
    _break_data(folder)
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text, encoding="latin-1")
    return folder


class _Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_was_here",)


def _break_weights(here: Path) -> None:
    whole = (here / "model.ckpt").read_bytes()
    newest = next((here / "run" / "checkpoints").glob("*.safetensors"))
    (here / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (here / "cut.safetensors").write_bytes(newest.read_bytes()[:100_000])
    (here / "random.bin").write_bytes(np.random.RandomState(0).bytes(4096))
    (here / "empty.ckpt").touch()
    (here / "text.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (here / "html.safetensors").write_text("<!DOCTYPE html><html>404</html>")
    torch.save({"state_dict": _Hostile()}, here / "hostile.ckpt")
    with warnings.catch_warnings(action="ignore"):  # it is deprecated, and in old files
        torch.jit.script(torch.nn.Linear(2, 2)).save(here / "script.pt")
    torch.save([torch.zeros(2)], here / "list.pt")
    (here / "directory" / "of").mkdir(parents=True)
    (here / "directory" / "of" / "sdxl_vae.pt").touch()
    (here / "link.ckpt").symlink_to("gone.ckpt")
    (here / "circle.ckpt").symlink_to("circle.ckpt")
    model = weight_file.load_autoencoder(here / "model.ckpt").state_dict()
    save_file(model, here / "plain.safetensors")
    save_file(model, here / "directory" / "a-00001-of-00002.safetensors")
    save_file({"lora_up.weight": torch.zeros(2, 2)}, here / "lora.safetensors")
    part = {key: value for key, value in model.items() if not key.startswith("decoder.up.")}
    save_file(part, here / "part.safetensors")
    save_file({f"first_stage_model.{k}": v for k, v in model.items()}, here / "full.safetensors")
    torch.save({"state_dict": {k: v * torch.nan for k, v in model.items()}}, here / "nan.ckpt")
    shutil.copytree(here / "run", here / "broken_run")
    for file in (here / "broken_run" / "checkpoints").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:5000])
    contents = weight_file.read(here / "run")
    values = json.loads(contents.metadata["config"])
    values["optimizer"]["lookahead"] = 5  # a setting of a later version
    metadata = {**contents.metadata, "config": json.dumps(values)}
    file = here / "newer" / "checkpoints" / contents.path.name
    weight_file.write_safetensors(file, contents.tensors, metadata)
    shutil.copytree(here / "export", here / "mine" / "export")
    (here / "bad_config").mkdir()
    (here / "bad_config" / "config.yaml").write_text("- 1\n")


def _break_data(here: Path) -> None:
    (here / "cut_shards").mkdir()
    first = sorted((here / "shards").glob("*.tar"))[0]
    (here / "cut_shards" / "0.tar").write_bytes(first.read_bytes()[:20_000])
    samples.write_tar(here / "empty_tar" / "0.tar", {})
    (here / "text_tar").mkdir()
    (here / "text_tar" / "0.tar").write_text("404 not found\n" * 100)
    (here / "not_images").mkdir()
    for number in range(40):
        (here / "not_images" / f"{number}.jpg").write_bytes(b"GIF?" * 100)
    (here / "binary.txt").write_bytes(b"\xff\xfe")
    (here / "empty.txt").touch()
    (here / "text.txt").write_text("a.tar\n\nb.tar\n")
    (here / "bad_manifest").mkdir()
    (here / "bad_manifest" / "pack.json").write_text("[]")
    (here / "bad_export").mkdir()
    (here / "bad_export" / "export.json").write_text("{}")
    (here / "other.json").write_text("{}")


def answer(
    here: Path, command: str, hidden: str = "", full: bool = False
) -> tuple[int | None, str, float]:
    """Exit code, output and CPU seconds of a command in `here`."""
    log, seconds = here / "case.log", here / "case.seconds"
    log.unlink(missing_ok=True)
    shutil.rmtree(here / "new", ignore_errors=True)
    given = (here, command.split(), log, seconds, hidden.split(), FILE_BYTES if full else None)
    process = ranks.FORKS.Process(target=ranks.answer, args=given)
    process.start()
    process.join(100)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{command} hangs:\n{log.read_text()}")
    return process.exitcode, log.read_text(), float(seconds.read_text())
