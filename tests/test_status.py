"""Where a run is, by made-up files: whole, half written, dead, and from a real run."""

import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from kl_f8_train import units
from kl_f8_train.__main__ import main
from kl_f8_train.errors import MissingInputError, RunFailedError
from kl_f8_train.run import curves, status
from kl_f8_train.run_dir import read_rows

NOW = 1_900_000_000.0
SETTINGS = {
    "name": "x",
    "stop_iteration": 2000,
    "global_batch": 8,
    "init": {"iteration": 1000},
    "log": {"every": 10},
    "checkpoint": {"every": 100},
    "adversarial": {"start_iteration": 1200},
}


def row(iteration: int, **values: float) -> dict[str, float]:
    """A log row of a healthy adversarial run."""
    return {
        "iteration": iteration,
        "reconstruction_loss": 1000 / iteration,
        "decoder_gradient_norm": 5.0,
        "discriminator_loss": 0.8,
        "logits_real": 0.4,
        "logits_fake": -0.3,
        "adversarial_factor": 1.0,
        "adaptive_weight": 20.0,
        "adaptive_weight_clamped": 0.0,
        "bad_updates": 0.0,
        "skipped_images": 0.0,
        "images_per_second": 40.0,
        "data_wait_share": 0.02,
        "images_a": 8.0 * (iteration - 1000),
        **values,
    }


def make_run(
    folder: Path, rows: list[dict[str, float]], saved: tuple[int, ...] = (), age: float = 10.0
) -> Path:
    """A run directory whose newest file was written `age` seconds before NOW."""
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    if rows:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(columns)]
        lines += [",".join(f"{row[c]:.8g}" if c in row else "" for c in columns) for row in rows]
        (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    for iteration in saved:
        (run / "checkpoints" / f"iteration-{iteration:09d}.safetensors").write_bytes(b"x")
    for path in run.rglob("*"):
        os.utime(path, (NOW - age, NOW - age))
    return run


def test_a_run_that_goes_on(tmp_path):
    rows = [row(i) for i in range(1010, 1510, 10)]
    found = status.read_status(make_run(tmp_path, rows, (1400, 1500)), NOW)
    assert found.state == "seems to be running"
    assert (found.iteration, found.start_iteration, found.stop_iteration) == (1500, 1000, 2000)
    assert found.done_share == 0.5
    assert found.images_per_second == 40
    assert found.seconds_left == 500 * 8 / 40
    assert found.end_date == status._date(NOW + 100)
    assert (found.checkpoint_iteration, found.checkpoint_age_seconds) == (1500, 10)
    assert found.warnings == []
    losses = found.losses["reconstruction_loss"]
    assert losses["recent"] == pytest.approx(sum(1000 / i for i in range(1460, 1510, 10)) / 5)
    assert losses["first"] > losses["before"] > losses["recent"]


def test_a_run_that_died(tmp_path):
    found = status.read_status(make_run(tmp_path, [row(1010)], age=7260.0), NOW)
    assert found.state == "silent for 2 h 1 min"
    assert found.checkpoint is None
    assert "end, if resumed now" in status.facts(found)


def claiming(run: Path) -> "subprocess.Popen[str]":
    """A process that has the claim of a run, until its stdin ends."""
    program = (
        "import sys; from pathlib import Path; from kl_f8_train.run_dir import claimed\n"
        f"with claimed(Path({str(run)!r})):\n"
        "    print('claimed', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True)
    assert process.stdout.readline() == "claimed\n"
    return process


def test_the_claim_tells_running_from_stopped(tmp_path):
    run = make_run(tmp_path, [row(1010)])
    with claiming(run) as process:
        assert status.read_status(run, NOW).state == "running"
        assert "end" in status.facts(status.read_status(run, NOW))
        process.kill()
    found = status.read_status(run, NOW)
    assert found.state == "stopped 10 s ago; the same command starts it over (no checkpoint yet)"
    (run / "checkpoints" / "iteration-000001010.safetensors").write_bytes(b"x")
    assert status.read_status(run, NOW).state.endswith("; the same command resumes it")
    assert "end, if resumed now" in status.facts(found)


@pytest.mark.parametrize("rows", [[], [row(1010)]], ids=["new", "resumed"])
def test_a_claim_newer_than_the_last_log_row_is_a_start(tmp_path, rows):
    run = make_run(tmp_path, rows, (1000,) if rows else ())
    with claiming(run) as process:
        os.utime(run / ".claim", (NOW, NOW))
        found = status.read_status(run, NOW)
        assert found.state == "starting (before its first log line)"
        assert "end, if resumed now" not in status.facts(found)
        process.stdin.close()
    os.utime(run / ".claim", (NOW, NOW))
    assert status.read_status(run, NOW).state.startswith("stopped 0 s ago")


def test_a_start_without_config_is_named(tmp_path):
    run = make_run(tmp_path, [])
    (run / "config.yaml").unlink()
    (run / "failure.json").write_text('{"message": "of the start before", "passing": false}')
    with claiming(run) as process:
        with pytest.raises(MissingInputError, match="is starting"):
            status.read_status(run, NOW)
        process.stdin.close()


@pytest.mark.parametrize(
    ("age", "state"),
    [
        (0, "seems to be starting (before its first log line)"),
        (600, "seems to be starting (before its first log line)"),
        (3600, "silent for 1 h 0 min"),
    ],
)
def test_a_claim_of_another_host_is_judged_by_its_age(tmp_path, age, state):
    """Its lock may not show here."""
    run = make_run(tmp_path, [row(1010)], age=7200)
    (run / ".claim").write_text("process 7 on some-other-host\n")
    os.utime(run / ".claim", (NOW - age, NOW - age))
    assert status.read_status(run, NOW).state == state
    (run / ".claim").write_text("")  # an orderly end
    os.utime(run / ".claim", (NOW - age, NOW - age))
    assert status.read_status(run, NOW).state.startswith("stopped")


def test_a_resuming_run_has_its_claim_before_torch_is_imported(tmp_path, monkeypatch):
    run = make_run(tmp_path, [row(1010)])
    seen = []

    def train(*_: object) -> int:
        seen.append((run / ".claim").read_text())
        return 0

    monkeypatch.setitem(sys.modules, "kl_f8_train.run.train", SimpleNamespace(train=train))
    given = ["init.weights=kl_f8_mini", f"data.sources={run}", f"run_dir={run}"]
    assert main(["train", "ft_ema", *given]) == 0
    assert seen[0].startswith(f"process {os.getpid()} on ")
    assert (run / ".claim").read_text() == ""


def test_silence_is_judged_by_the_interval_of_the_log(tmp_path):
    """10 iterations of 8 images at 0.1 images/s: a line comes every 800 s."""
    slow = [row(1010, images_per_second=0.1)]
    found = status.read_status(make_run(tmp_path, slow, age=3900.0), NOW)
    assert found.state == "seems to be running"


def test_a_run_that_ended(tmp_path):
    run = make_run(tmp_path, [row(2000)], (1900, 2000), age=1e6)
    found = status.read_status(run, NOW)
    assert (found.state, found.done_share, found.seconds_left) == ("ended", 1.0, 0.0)


def test_a_run_that_has_only_begun(tmp_path):
    found = status.read_status(make_run(tmp_path, []), NOW)
    assert found.state == "seems to be starting"
    assert (found.iteration, found.images_per_second, found.end_date) == (None, None, None)
    assert status.html(tmp_path / "run", found, NOW)


def test_the_start_is_worked_out_from_the_images_where_the_recipe_does_not_say(tmp_path):
    run = make_run(tmp_path, [row(1050), row(1100)])
    (run / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "init": {"iteration": None}}))
    assert status.read_status(run, NOW).start_iteration == 1000


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_half_written_last_line_is_left_out(tmp_path, cut):
    run = make_run(tmp_path, [row(1010), row(1020), row(1030)])
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text[:-cut])
    assert status.read_status(run, NOW).iteration == 1020


def test_odd_bytes_cells_and_columns_are_left_out(tmp_path):
    run = make_run(tmp_path, [row(1010)])
    with (run / "metrics.csv").open("ab") as file:
        file.write(b"\0\0\xff\xfe,,,\n")
        file.write(b"1020,nan,x" + b",1" * 50 + b"\n")
    found = read_rows(run / "metrics.csv")
    assert [r["iteration"] for r in found] == [1010, 1020]
    assert "reconstruction_loss" not in found[1]


def test_warm_up_rows_count_apart(tmp_path):
    warm = [{k: v for k, v in row(1000).items() if k != "decoder_gradient_norm"}] * 3
    run = make_run(tmp_path, [*warm, row(1010), row(1020)])
    found = status.read_status(run, NOW)
    assert found.warmup_rows == 3
    (curve,) = re.findall(r'aria-label="Logits.*?</svg>', status.html(run, found, NOW))
    assert curve.count("polyline") == 2
    assert len(curve.split('points="')[1].split('"')[0].split()) == 2


def test_rows_without_finite_losses_are_no_warm_up(tmp_path):
    bare = {"iteration": 1010, "images_per_second": 40.0, "bad_updates": 10.0}
    found = status.read_status(make_run(tmp_path, [bare, {**bare, "iteration": 1020}]), NOW)
    assert found.warmup_rows == 0
    assert "discriminator warm-up" not in status.facts(found)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"adaptive_weight_clamped": 0.5}, "clamped in 50 %"),
        ({"discriminator_loss": 0.01, "logits_real": 3, "logits_fake": -3}, "has won"),
        ({"discriminator_loss": 1.0, "logits_real": 0.001, "logits_fake": 0}, "does not separate"),
        ({"bad_updates": 2}, "2 updates left out as not finite, the last by iteration 1,010"),
        ({"skipped_images": 7}, "7 images could not be used"),
        ({"data_wait_share": 0.4}, "40 % of the time is spent waiting for data"),
    ],
)
def test_warnings(tmp_path, changes, warning):
    run = make_run(tmp_path, [row(i, **changes) for i in range(1010, 1310, 10)], (1200,))
    (found,) = status.read_status(run, NOW).warnings
    assert warning in found
    assert warning in status.html(run, status.read_status(run, NOW), NOW)


def test_a_clamped_weight_beside_a_good_discriminator_is_no_fault(tmp_path):
    good = {"discriminator_loss": 0.25, "logits_real": 1.4, "logits_fake": -1.2}
    rows = [row(i, adaptive_weight_clamped=0.4, **good) for i in range(1010, 1310, 10)]
    assert status.read_status(make_run(tmp_path, rows, (1200,)), NOW).warnings == []


def test_bad_images_are_counted_as_files(tmp_path):
    run = make_run(tmp_path, [row(i, skipped_images=70) for i in range(1010, 1310, 10)], (1200,))
    (run / "skipped-0.txt").write_text("a/1.jpg: broken\na/2.jpg: broken\na/1.jpg: broken\n")
    (run / "skipped-1.txt").write_text("a/2.jpg: broken\na/3.jpg: gone: for good\n")
    assert "3 images could not be used" in status.read_status(run, NOW).warnings[0]


def test_waiting_for_data_is_judged_late_and_more_workers_than_cores_are_not_advised(tmp_path):
    waiting = [row(i, data_wait_share=0.4) for i in range(1010, 1210, 10)]
    assert status.read_status(make_run(tmp_path / "early", waiting[:19]), NOW).warnings == []
    run = make_run(tmp_path / "late", waiting)
    assert status.read_status(run, NOW).warnings[0].endswith("waiting for data: raise data.workers")
    settings = {**SETTINGS, "data": {"workers": os.cpu_count()}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (warning,) = status.read_status(run, NOW).warnings
    assert "40 % of the time" in warning
    assert "raise" not in warning


def test_immense_numbers_are_no_error(tmp_path):
    rows = [row(iteration, data_wait_share=1.7e308) for iteration in range(1010, 1600, 10)]
    warned = " ".join(status.read_status(make_run(tmp_path, rows), NOW).warnings)
    assert "waiting for data" in warned


def test_updates_left_out_are_counted_over_restarts():
    rows = [row(i, bad_updates=n) for i, n in enumerate([0, 1, 1, 3, 0, 0, 2, 2, 1, 1], 1)]
    assert status.left_out(rows) == (3 + 2 + 1, 9)


def test_a_rising_loss_and_a_missing_checkpoint_are_warned_of(tmp_path):
    rows = [row(i, reconstruction_loss=i - 1000) for i in range(1010, 1510, 10)]
    rise, late = status.read_status(make_run(tmp_path, rows, (1100,)), NOW).warnings
    assert "the reconstruction loss rose" in rise
    assert "no checkpoint for 400 iterations" in late


@pytest.mark.parametrize(
    ("psnr", "warned"),  # raw, of docs/healthy-run.md's "rate", "healthy", and "healthy" once more
    [
        ([13.05, 9.45, 11.51, 10.22, 8.86, 9.86, 10.37], [1, 2, 3, 4, 5, 6]),
        ([13.05, 12.95, 13.11, 12.96, 13.89, 13.10, 13.19], []),
        ([13.33, 12.57, 12.84, 12.56, 13.19, 13.03, 12.96], []),
    ],
)
def test_raw_weights_that_have_lost_their_quality_are_warned_of(tmp_path, psnr, warned):
    """At each validation, though the loss, after its leap, falls and the EMA looks well."""
    run = make_run(tmp_path, [row(i) for i in range(1010, 1510, 10)], (1500,))
    lines = [f"{1000 + 25 * i},13.0,{raw}\n" for i, raw in enumerate(psnr)]
    found = []
    for last in range(len(lines)):
        text = "iteration,psnr_ema,psnr_raw\n" + "".join(lines[: last + 1])
        (run / "validation.csv").write_text(text)
        if status.read_status(run, NOW).warnings:
            found.append(last)
    assert found == warned
    if warned:
        (warning,) = status.read_status(run, NOW).warnings
        assert "PSNR fell from 13.1 dB at the start to 10.4: the learning rate may" in warning


def test_a_discriminator_that_does_not_count_yet_is_not_judged(tmp_path):
    idle = {"adversarial_factor": 0.0, "discriminator_loss": 0.0}
    assert status.read_status(make_run(tmp_path, [row(1010, **idle)]), NOW).warnings == []


# --- the page -------------------------------------------------------------------------------


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page)]


def test_the_page_stands_alone_and_its_curves_are_thinned(tmp_path):
    run = make_run(tmp_path, [row(i) for i in range(1001, 1901)], (1900,))
    page = status.html(run, status.read_status(run, NOW), NOW)
    assert not re.search(r"<script|https?://|<link|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    lines = [line for svg in svgs(page) for line in svg.iter("polyline")]
    assert len(lines) >= 9
    assert all(len(line.get("points").split()) == 500 for line in lines)
    assert "discriminator starts: 1,200" in page
    assert all(len(svg.findall("path[@class='mark']")) == 1 for svg in svgs(page))


def test_points_lie_where_they_belong():
    chart = curves.Chart("t", {"a": [(0, 0), (5, 10), (10, 5)]})
    (line,) = ElementTree.fromstring(curves.svg(chart, {}, (0, 10))).iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    left, right = curves.LEFT, curves.WIDTH - curves.RIGHT
    bottom, top = curves.HEIGHT - curves.BOTTOM, curves.TOP
    middle = (left + right) / 2
    assert points == [(left, bottom), (middle, top), (right, (top + bottom) / 2)]


def test_downsampling_keeps_the_mean_and_the_ends():
    points = [(x, float(x % 7)) for x in range(7000)]
    thin = curves.downsample(points, 500)
    assert len(thin) == 500
    assert sum(y for _, y in thin) / 500 == pytest.approx(3.0)
    assert thin[0][0] < 14
    assert thin[-1][0] > 6985


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 1, 0), (101, 140, 0), (-3, 7, 0), (0, 1e-5, 0), (1e-3, 1e4, 1), (0.3, 8, 1), (1, 30, 1)],
)
def test_ticks_are_round_and_inside(low, high, log):
    found = curves.ticks(low, high, bool(log))
    assert 3 <= len(found) <= 7
    assert low <= found[0]
    assert found[-1] <= high * 1.000001
    assert found == pytest.approx([float(f"{tick:.3g}") for tick in found])


@pytest.mark.parametrize("span", [(1.7e-4, 3.1e-4), (2.01e-4, 2.05e-4), (0.94, 0.96), (1, 2e5)])
def test_no_two_numbers_of_an_axis_look_alike(span):
    chart = curves.Chart("x", {"a": [(1, span[0]), (2, span[1])]})
    drawn = re.findall(r'class="end">([^<]+)</text>', curves.svg(chart, {}, (1, 2)))
    assert len(set(drawn)) == len(drawn) >= 3
    assert "iteration</text>" in curves.svg(chart, {}, (1, 2))


def test_large_numbers_have_no_exponent():
    assert [units.figure(n) for n in (130_912.3, -1873.2, 12.345678, 0.0341249, 0.0)] == [
        *("130,912", "-1,873", "12.35", "0.03412", "0")
    ]
    page = curves.page("t", {}, [], [curves.Chart("x", {"a": [(1, 130_912.3)]})], {}, "")
    assert "e+05" not in page


@pytest.mark.parametrize(
    ("count", "memory", "size"),
    [
        (0, "0 B", "0 B"),
        (1000, "1,000 B", "1 kB"),
        (2**20, "1 MiB", "1.05 MB"),
        (1020 * 2**20, "1,020 MiB", "1.07 GB"),
        (7.33 * 2**30, "7.33 GiB", "7.87 GB"),
        (141 * 2**30, "141 GiB", "151 GB"),
        (2**40, "1,024 GiB", "1.1 TB"),
    ],
)
def test_memory_is_in_powers_of_1024_and_files_in_powers_of_1000(count, memory, size):
    assert (units.memory(count), units.size(count)) == (memory, size)


@pytest.mark.parametrize(
    ("line", "span"),
    [([(1, 0)], (1, 1)), ([(1, 0.1 + 0.2), (2, 0.3)], (1, 2)), ([(1, -4), (1, -4)], (0, 3))],
)
def test_flat_and_single_points_are_drawn(line, span):
    (drawn,) = re.findall(
        r'(?:points|cy)="([^"]*)"', curves.svg(curves.Chart("t", {"a": line}), {}, span)
    )
    heights = {round(float(pair.split(",")[-1])) for pair in drawn.split()}
    assert len(heights) == 1
    assert ElementTree.fromstring(curves.svg(curves.Chart("t", {"a": line}, log=True), {}, span))


def test_names_cannot_break_the_page(tmp_path):
    run = make_run(tmp_path, [row(1010)])
    (run / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "name": "<script>&"}))
    assert "<script>" not in status.html(run, status.read_status(run, NOW), NOW)


# --- the verb -------------------------------------------------------------------------------


def test_status_answers_within_a_second_without_torch(tmp_path):
    run = make_run(tmp_path, [row(i) for i in range(1010, 1510, 10)])
    program = (
        "import sys\n"
        "from kl_f8_train.__main__ import main\n"
        f"assert main(['status', {str(run)!r}, '--json', '--html', {str(run / 'a.html')!r}]) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    assert seconds < 3.0  # about 0.2 s on an idle machine
    assert json.loads(done.stdout)["iteration"] == 1500
    assert (run / "a.html").read_text().endswith("</html>\n")


def test_the_page_is_named(tmp_path, capsys):
    run, page = make_run(tmp_path, [row(1010)]), tmp_path / "a.html"
    assert main(["status", str(run), "--html", str(page)]) == 0
    assert capsys.readouterr().out.endswith(f"\npage: {page}\n")
    assert main(["status", str(run), "--html", str(page), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)
    assert printed.err == f"page: {page}\n"


def test_what_is_no_run_is_told(tmp_path, capsys):
    with pytest.raises(MissingInputError, match="no such directory"):
        status.read_status(tmp_path / "nowhere", NOW)
    with pytest.raises(MissingInputError, match=r"no config\.yaml"):
        status.read_status(tmp_path, NOW)
    run = make_run(tmp_path, [], saved=(1000,))
    with pytest.raises(MissingInputError, match=f"; did you mean {run}"):
        status.read_status(tmp_path, NOW)
    with pytest.raises(MissingInputError, match=f"no such directory.*; did you mean {run}"):
        status.read_status(tmp_path / "runn", NOW)
    (tmp_path / "config.yaml").write_text("stop_iteration: [")
    with pytest.raises(MissingInputError, match="not a run's configuration"):
        status.read_status(tmp_path, NOW)
    assert main(["status", str(tmp_path)]) == 3
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "3"])
def test_damaged_files_of_a_run_do_not_keep_its_status_back(tmp_path, text):
    run = make_run(tmp_path, [row(1010), row(1020)])
    (run / "failure.json").write_text(text)
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS | {"log": {"every": None}}))
    assert status.read_status(run, NOW).iteration == 1020


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path):
    run = make_run(tmp_path, [row(1010)])
    found = status.read_status(run, NOW)
    (tmp_path / "page.html").mkdir()
    with pytest.raises(RunFailedError, match="cannot be written"):
        status.write_html(run, found, NOW, tmp_path / "page.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "run"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"init": {"iteration": "abc"}}, "init.iteration: got 'abc', expected a number"),
        ({"init": 3.5, "log": {"every": []}}, "log.every: got [], expected a number"),
        ({"init": "x"}, "init.iteration: got 'x', expected a number"),
        ({"adversarial": {"start_iteration": "soon"}}, "start_iteration: got 'soon'"),
        ({"stop_iteration": [True]}, "stop_iteration: got [true], expected a number"),
        ({"global_batch": -8}, "global_batch: got -8, expected a number"),
        ({"stop_iteration": float("nan")}, "stop_iteration: got nan, expected a number"),
    ],
)
def test_a_setting_that_is_no_number_is_named(tmp_path, setting, said):
    run = make_run(tmp_path, [row(1010)])
    (run / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, **setting}))
    with pytest.raises(MissingInputError, match=re.escape(said)):
        status.read_status(run, NOW)


def test_a_run_of_thousands_of_years(tmp_path):
    run = make_run(tmp_path, [row(1010, images_per_second=1e-9)])
    assert status.read_status(run, NOW).end_date == "after the year 9999"


@pytest.mark.parametrize("place", ["", "."])
def test_a_page_needs_a_file(tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(make_run(tmp_path, [row(1010)]))
    assert main(["status", ".", "--html", place]) == 2
    assert "--html .: names no file; expected one" in capsys.readouterr().err


def test_the_page_shows_the_latest_photographs_newest_first(tmp_path):
    run = make_run(tmp_path, [row(i) for i in range(1001, 1101)], (1100,))
    (run / "pictures").mkdir()
    for iteration in (1000, 1025, 1050, 1075, 1100):
        (run / "pictures" / f"iteration-{iteration:09d}.jpg").write_bytes(b"jpeg")
    page = status.html(run, status.read_status(run, NOW), NOW)
    titles = re.findall(r"<figcaption>Iteration ([\d,]+): input, reconstruction", page)
    assert titles == ["1,100", "1,075", "1,050"]
    assert page.count('src="data:image/jpeg;base64,anBlZw=="') == 3


def test_shares_are_in_percent_and_photographs_fill_their_cards(tmp_path):
    rows = [row(i, data_wait_share=0.01164) for i in range(1010, 1510, 10)]
    run = make_run(tmp_path, rows, (1500,))
    page = status.html(run, status.read_status(run, NOW), NOW)
    assert "Share of time waiting for data, %" in page
    assert "data_wait_share <b>1.2 %</b>" in page
    (curve,) = re.findall(r'aria-label="Share of time waiting.*?</svg>', page)
    assert ">1.2</text>" in curve  # its axis, too
    assert re.search(r"img \{[^}]* width: 100%; height: auto", page)


def test_the_page_has_the_numbers_of_the_lines(tmp_path):
    rows = [row(1000 + i, reconstruction_loss=1 / i) for i in range(1, 101)]
    run = make_run(tmp_path, rows, (1100,))
    found = status.read_status(run, NOW)
    lately = f"{found.losses['reconstruction_loss']['recent']:.4g}"
    assert f"reconstruction_loss: {lately} lately" in "\n".join(status.describe(found))
    assert f"reconstruction_loss <b>{lately}</b>" in status.html(run, found, NOW)


@pytest.mark.parametrize(
    ("value", "text"), [(1813.4, "1,813"), (99.94, "99.9"), (3.149, "3.15"), (0.042, "0.042")]
)
def test_speeds_have_three_digits_and_no_exponent(value, text):
    assert units.speed(value) == f"{text} images/s"
