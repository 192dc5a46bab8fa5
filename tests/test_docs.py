"""README and docs: their commands run or parse, their links, keys, verbs and modules exist.

A command in a ```bash block runs here, in its document's order, unless a comment says what it
needs: `# needs the network`, `# takes minutes` and the like, behind the command, or on a line of
its own for the rest of the block up to an empty line. Then its words are checked.
"""

import argparse
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import runs
import samples
import torch
from PIL import Image

from kl_f8_train import config, shipped
from kl_f8_train.__main__ import main
from kl_f8_train.arguments import build_parser
from kl_f8_train.run_dir import read_rows
from kl_f8_train.settings import VALUES
from kl_f8_train.weights import weight_file

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")
DOCS = {path.name: path for path in (ROOT / "README.md", *PAGES)}
DOCS["docs/README.md"] = ROOT / "docs/README.md"
MARK = re.compile(r"#.*\b(needs (the network|GPUs|a GPU|a cluster|root)|takes (minutes|hours))\b")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MARKERS = {text.partition(":")[0] for text in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
FOREIGN = {
    "fetcher/bin/img2dataset",
    "docker",
    "export",
    "uv",
    "kubectl",
    "scancel",
    "scontrol",
    "ruff",
    "mypy",
}
NO_SETTINGS = {"model.ckpt", "model.decode", "loss.logvar"}  # that look like some
SHELL = {"tail", "cp"}
# What makes a documented command small: appended to it, by verb and recipe.
SMALL_RUN = (
    *("model.ch=32", "model.ch_mult=[1,1]", "model.num_res_blocks=1"),
    *("loss.perceptual=st_lpips_alex", "loss.allow_stand_in=true", "precision=float32"),
    *("data.shorter_side=48", "data.crop=32", "data.workers=0", "log.every=1"),
    *("global_batch=2", "compute.per_device_batch=1", "compute.accelerator=cpu"),
)
SMALL_STAGE = ("init.iteration=100", "adversarial.ndf=16", "adversarial.n_layers=2")
STEPS = {"single_gpu": 30, "ft_ema": 102}
SMALL_EVALUATION = ("--size", "64", "--perceptual", "st_lpips_alex")
# And what it names: of the text as it stands, to a path that the test has.
PATHS = {
    "/data/": "data/",
    "{00000..09999}": "{00000..00000}",
    "fetcher/bin/python": shlex.quote(sys.executable),
    "python -c": f"{shlex.quote(sys.executable)} -c",
    "configs/ft_ema.yaml": str(ROOT / "configs/ft_ema.yaml"),
}


@dataclass(frozen=True)
class Command:
    """One command line of a document."""

    doc: str
    line: int
    text: str
    marked: bool

    def __str__(self) -> str:
        return f"{self.doc}:{self.line}: {self.text}"


def blocks(doc: str, language: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of each fenced block."""
    text = DOCS[doc].read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if found[1] == language:
            yield text.count("\n", 0, found.start()) + 2, found[2]


def commands(doc: str) -> Iterator[Command]:
    """The commands of a document, continuation lines joined."""
    for first, block in blocks(doc, "bash"):
        sticky, begun = False, ""
        for number, line in enumerate(block.splitlines(), first):
            begun += line
            if begun.endswith("\\"):
                begun = begun[:-1]
                continue
            text, begun = begun.strip(), ""
            marked = bool(MARK.search(text))
            if not text or text.startswith("#"):
                sticky = marked
            else:
                yield Command(doc, number, text, marked or sticky)


ALL = [command for doc in DOCS for command in commands(doc)]
OTHERS = [doc for doc in DOCS if doc not in ("README.md", "data.md", "quickstart.md")]


def words(text: str) -> list[list[str]]:
    """The simple commands of a line: split at |, && and the like, redirections left out."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    simple: list[list[str]] = [[]]
    for token in lexer:
        if set(token) <= set("|&;"):
            simple.append([])
        else:
            simple[-1].append(token)
    return simple


# --- what only parses -----------------------------------------------------------------------


def check_words(line: list[str]) -> None:
    """Raises if a command names a verb, flag, setting, file, extra or marker that is not there."""
    line = line[next(n for n, word in enumerate(line) if not re.match(r"[A-Z_0-9]+=", word)) :]
    program, *rest = line
    if program == "torchrun":
        program, rest = "kl-f8-train", rest[rest.index("kl_f8_train") + 1 :]
    if program == "kl-f8-train":
        check_verb(rest)
    elif program == "python" and rest[0] != "-c":
        script = (ROOT / rest[0]).read_text()
        assert all(flag in script for flag in rest if flag.startswith("--")), rest
    elif program in ("bash", "sbatch"):
        name = next(word for word in rest if not word.startswith("-"))
        assert (ROOT / name).is_file(), name
        check_settings("ft_ema", [word for word in rest[rest.index(name) + 1 :]])
    elif program == "pytest":
        check_pytest(rest)
    elif program in ("pip", "fetcher/bin/pip", "/shared/kl-f8-train/bin/pip"):
        extras = re.findall(r"\[(.*)\]", " ".join(rest))
        known = PROJECT["project"]["optional-dependencies"]
        assert set(",".join(extras).split(",")) <= {"", *known}, rest
    else:
        assert program in FOREIGN or program.startswith("python"), program


def test_lower_bounds_are_those_the_tests_were_run_with():
    lines = (ROOT / "tests/lowest.txt").read_text().splitlines()
    tried = re.findall(r"^([\w-]+)==([\d.]+?)(?:\.0)*$", "\n".join(lines), re.MULTILINE)
    extras = PROJECT["project"]["optional-dependencies"]
    of_users = [extras[name] for name in extras if name not in ("s3", "test")]
    stated = " ".join(sum(of_users, PROJECT["project"]["dependencies"]))
    bounds = re.findall(r"([\w-]+)>=([\d.]+?)(?:\.0)*(?![\d.])", stated)
    assert sorted(bounds) == sorted(tried)


def check_verb(line: list[str]) -> None:
    """Parses a command of ours, and its settings."""
    args, rest = build_parser().parse_known_args(line)
    settings = [*getattr(args, "overrides", []), *rest]
    recipe = "demo" if line[0] == "demo" else getattr(args, "config", None)
    assert recipe or not settings, settings
    if recipe:
        check_settings(recipe, settings)


def check_settings(recipe: str, settings: list[str]) -> None:
    """Resolves a recipe's settings."""
    path = config.find_recipe(recipe)
    config.resolve(path if path.is_absolute() else ROOT / path, settings)


def check_pytest(line: list[str]) -> None:
    """Files, -k and -m of a pytest command."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    before = ""
    for word in line:
        if before == "-k":
            assert word in tests, word
        elif before == "-m":
            markers = {
                text.partition(":")[0]
                for text in PROJECT["tool"]["pytest"]["ini_options"]["markers"]
            }
            assert set(word.split()) <= {"not", "and", "or", *markers}, word
        elif before == "-n":
            assert word.isdigit(), word
        elif not word.startswith("-"):
            assert (ROOT / word.partition("::")[0]).exists(), word
        before = word


@pytest.mark.parametrize("command", [c for c in ALL if c.marked], ids=str)
def test_a_marked_command_is_well_formed(command):
    for simple in words(command.text):
        check_words(simple)


def test_every_unmarked_command_is_one_that_runs_here():
    programs = {"kl-f8-train", "python", "fetcher/bin/python", *SHELL}
    for command in ALL:
        for line in [] if command.marked else words(command.text):
            assert line[0] in programs, f"{command}\nmark what it needs, as at the top of this file"


# --- what runs ------------------------------------------------------------------------------


def small(line: list[str]) -> list[str]:
    """Words of one of our commands, with what makes it small."""
    verb, *rest = line
    if verb == "evaluate":
        return [*line, *SMALL_EVALUATION]
    if verb in ("train", "doctor"):
        name = Path(rest[0]).stem
        stage = SMALL_STAGE if name == "ft_ema" else ()
        return [*line, *SMALL_RUN, *stage, f"stop_iteration={STEPS[name]}"]
    return line


def located(text: str) -> str:
    """A command with paths that the test has."""
    for old, new in PATHS.items():
        text = text.replace(old, new)
    return text


def photographs(folder: Path, count: int) -> None:
    """Small crops of photographs that scikit-image ships."""
    folder.mkdir(parents=True)
    for number in range(count):
        picture = samples.photograph(("astronaut", "chelsea", "coffee")[number % 3])
        part = picture[number : number + 72, 2 * number : 2 * number + 80]
        (folder / f"{number:03d}.jpg").write_bytes(samples.encode(part))


def shard(path: Path, pictures: Path) -> None:
    """A shard as img2dataset writes it, with metadata that all of the documented filters accept."""
    fields = {"aesthetic": 6.0, "pwatermark": 0.1, "punsafe": 0.1}
    members = {}
    for number, file in enumerate(sorted(pictures.iterdir())):
        members[f"{number:09d}.jpg"] = file.read_bytes()
        members[f"{number:09d}.json"] = json.dumps(fields).encode()
    path.parent.mkdir(parents=True)
    samples.write_tar(path, members)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with everything that the documents' commands read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = tmp_path
    photographs(place / "photographs", 6)
    photographs(place / "data/coco/val2017", 3)
    for name in ("aesthetics", "humans"):
        shard(place / f"data/{name}/00000.tar", place / "photographs")
    vae = weight_file.read(runs.make_weights(place / "model.ckpt")).tensors
    full = {f"first_stage_model.{k}": v for k, v in vae.items() if not k.startswith("loss.")}
    weight_file.write_safetensors(
        place / "v1-5.safetensors", {**full, "model.diffusion_model.x": torch.zeros(2)}, {}
    )
    row = {"URL": ["a", "b"], "WIDTH": [400, 300], "HEIGHT": [500, 500]}
    row |= {"pwatermark": [0.1, 0.1], "punsafe": [0.1, 0.1]}
    (place / "metadata").mkdir()
    for name in ("FILE.parquet", "metadata/0.parquet"):
        pq.write_table(pa.table(row), place / name)
    (script,) = (text for _, text in blocks("data.md", "python") if "# filter.py" in text)
    (place / "filter.py").write_text(script)
    return place


def perform(command: Command) -> None:
    """Runs a command: ours in this process, anything else in a shell."""
    text = located(command.text)
    if command.text.startswith("kl-f8-train "):
        (line,) = words(text)
        assert main(small(line[1:])) == 0, command
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("docs", [["README.md", *OTHERS], ["data.md"]], ids=["readme", "data"])
def test_the_unmarked_commands_of_the_documents_run(docs, place, monkeypatch):
    """README comes first: the others read the run that it makes, as their readers would."""
    monkeypatch.chdir(place)
    for command in (command for doc in docs for command in commands(doc)):
        if not command.marked:
            perform(command)
    if "data.md" in docs:
        import pyarrow.parquet as pq

        assert pq.read_table("wanted/0.parquet")["WIDTH"].to_pylist() == [400]


@pytest.mark.slow
def test_the_quickstart_runs_as_it_stands(tmp_path, monkeypatch, capfd):
    """Its commands one after the other; training is stopped by Ctrl-C, and goes on."""
    (tmp_path / "photos").mkdir()
    for path in sorted(shipped.TRAINING.glob("*.jpg"))[:40]:
        picture = Image.open(path)
        picture.thumbnail((90, 90))
        picture.save(tmp_path / "photos" / path.name)
    runs.make_weights(tmp_path / "vae.safetensors", discriminator=False)
    (tmp_path / "ComfyUI/models/vae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    printed = {}
    for command in commands("quickstart.md"):
        if command.marked:
            continue
        if command.text.startswith("kl-f8-train train "):
            stopped = stop(command)
            assert 5 <= stopped < STEPS["single_gpu"]
        perform(command)
        verb = command.text.removeprefix("kl-f8-train ").split()[0]
        printed[verb] = printed.get(verb, "") + capfd.readouterr().out
    assert "30 photographs to train on" in printed["split"]
    assert "10 photographs held out" in printed["split"]
    assert "10 pictures, none of them among the 30 training images" in printed["doctor"]
    assert "GO" in printed["doctor"].splitlines()
    assert f"iterations: {stopped} -> {STEPS['single_gpu']}" in printed["train"]
    assert "state: ended" in printed["status"]
    assert printed["python"] == "0.18215\n"
    assert re.search("(mine|base).* (base|mine) in PSNR", printed["evaluate"])
    assert list(printed)[-4:] == ["export", "python", "cp", "card"]
    (file,) = Path("ComfyUI/models/vae").iterdir()
    assert weight_file.read(file).tensors


@pytest.mark.slow
def test_the_rehearsal_of_the_quickstart_runs_as_it_stands(tmp_path, monkeypatch, capfd):
    """Its commands, not made smaller, on photographs of the package; PSNR is higher after it."""
    for name, source in (("training", shipped.TRAINING), ("held_out", shipped.HELD_OUT)):
        (tmp_path / "parts" / name).mkdir(parents=True)
        for file in sorted(source.iterdir())[:12]:
            shutil.copy(file, tmp_path / "parts" / name)
    monkeypatch.chdir(tmp_path)
    block = [one for one in commands("quickstart.md") if "runs/rehearsal" in one.text]
    for command in block:
        (line,) = words(command.text)
        assert main(line[1:]) == 0
    assert "PSNR" in capfd.readouterr().out
    assert Path("runs/rehearsal/export/mine-ema-pruned.safetensors").is_file()
    assert Path("status.html").is_file()
    assert "mine" in Path("runs/rehearsal/export/README.md").read_text()
    assert weight_file.read("runs/rehearsal").iteration == 12_560
    scores = read_rows(Path("runs/rehearsal/validation.csv"))
    assert scores[-1]["psnr_ema"] > scores[0]["psnr_ema"]


def stop(command: Command) -> int:
    """Starts a run, stops it by SIGINT as Ctrl-C does; the iteration that it saved."""
    (line,) = words(command.text)
    program = [sys.executable, "-m", "kl_f8_train", *small(line[1:])]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for output in running.stdout:
            if output.startswith("iteration 5 of"):
                running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    return int(weight_file.read("runs/mine").metadata["iteration"])


# --- what the text says ---------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def spans(doc: str) -> list[str]:
    """What stands between single backticks, outside of blocks."""
    text = re.sub(r"^```.*?^```$", "", DOCS[doc].read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("doc", DOCS)
def test_links_lead_somewhere(doc):
    links = re.findall(r"\]\((?!https?:)([^)\s]*)\)", DOCS[doc].read_text())
    for link in links:
        name, _, anchor = link.partition("#")
        target = DOCS[doc].parent / name if name else DOCS[doc]
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("doc", DOCS)
def test_settings_named_in_the_text_exist(doc):
    groups = {key.partition(".")[0] for key in VALUES if "." in key}
    for span in spans(doc):
        key = span.partition("=")[0]
        group, dot, _ = key.partition(".")
        if group not in groups or not dot or key in NO_SETTINGS or key.endswith(".*"):
            continue
        if key.startswith("data.sources"):
            key = ".".join(["data.sources.NAME", *(key.split(".")[3:] or ["shards"])])
        assert key in VALUES, f"{doc}: `{span}`"


@pytest.mark.parametrize("doc", DOCS)
def test_commands_named_in_the_text_exist(doc):
    """Verb and flags, and the files of pytest and python commands."""
    parser = build_parser()
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for program, *rest in (span.split() for span in spans(doc) if " " in span):
        if program in verbs.choices:  # as `train --dry-run`
            program, rest = "kl-f8-train", [program, *rest]
        if program == "kl-f8-train":
            flags = {word for word in rest if word.startswith("--")}
            assert rest[0] in {*verbs.choices, "VERB"}, rest
            assert flags <= {*verbs.choices[rest[0]]._option_string_actions}, rest
        elif program == "pytest":
            check_pytest(words(" ".join(rest))[0])
        elif program == "python" and rest[0].endswith(".py"):
            assert (ROOT / rest[0]).is_file(), rest


def test_readme_names_every_verb_and_document():
    text = DOCS["README.md"].read_text()
    (verbs,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert [verb for verb in verbs.choices if not re.search(rf"\b{verb}\b", text)] == []
    table = "".join(re.findall(r"^\| (\*\*.*?) \|", text, re.M))
    assert list(verbs.choices) == re.findall(r"\*\*([\w-]+)\*\*", table)  # --help's order, too
    assert [path.name for path in PAGES if f"(docs/{path.name})" not in text] == []
    listed = re.findall(r"^\| \[[\w.-]+\]\(([\w.-]+)\)", DOCS["docs/README.md"].read_text(), re.M)
    assert sorted(listed) == [path.name for path in PAGES]


def test_every_page_says_of_which_kind_it_is():
    """Below its title, as docs/README.md lists it."""
    parts = re.split(r"^## (.*)$", DOCS["docs/README.md"].read_text(), flags=re.MULTILINE)
    kinds = {
        name: kind.lower()
        for kind, text in zip(parts[1::2], parts[2::2], strict=True)
        for name in re.findall(r"^\| \[([\w-]+\.md)\]", text, re.MULTILINE)
    }
    lines = {name: DOCS[name].read_text().splitlines()[2] for name in kinds}
    wrong = {name for name in kinds if lines[name] != f"[Documentation](README.md) / {kinds[name]}"}
    assert not wrong


def test_contributing_has_every_module():
    rows = re.findall(
        r"^\| `([\w.]+)/?` \|.*\| (.*) \|$", DOCS["contributing.md"].read_text(), re.M
    )
    named = {f"{folder}/{name}" for folder, names in rows for name in re.findall(r"`(\w+)`", names)}
    files = {path.relative_to(ROOT / "kl_f8_train") for path in ROOT.glob("kl_f8_train/**/*.py")}
    assert named == {f"{path.parent}/{path.stem}" for path in files if path.stem != "__init__"}
