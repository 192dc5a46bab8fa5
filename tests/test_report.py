"""The report: its pictures by the numbers, its page in a real browser."""

import json
import re
import time
from pathlib import Path

import browser
import evaluations
import numpy as np
import pytest
import runs
import samples
import torch

from kl_f8_train import images
from kl_f8_train.__main__ import main
from kl_f8_train.errors import MissingInputError
from kl_f8_train.score import report

WIDTHS = (400, 1400)
needs_chromium = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A written report of three models on eight images, with a comparison."""
    directory = evaluations.write(tmp_path_factory.mktemp("plain"))
    report.write_comparison(directory, "kl-f8", "ft-MSE")
    report.write(directory)
    return directory


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The same with names that try to break the page."""
    directory = evaluations.write(tmp_path_factory.mktemp("odd names"), evaluations.ODD, pictured=5)
    report.write_comparison(directory, *evaluations.ODD[:2])
    report.write(directory)
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """5,000 images, three models, no pictures; some scores infinite, some not measured."""
    directory = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    rows = [
        {"model": name, "image": f"{number:05d}.jpg", "psnr": round(float(value), 3), "ssim": 0.5}
        for name in evaluations.MODELS
        for number, value in enumerate(random.normal(25, 4, 5000))
    ]
    rows[17] |= {"psnr": float("inf")}
    del rows[23]["psnr"]
    evaluations.write_tables(directory, rows, evaluations.MODELS)
    report.write(directory)
    return directory


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """One browser for all tests."""
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def read(path: Path) -> torch.Tensor:
    return images.decode(path.read_bytes())


# --- pictures -------------------------------------------------------------------------------


def test_error_maps_have_one_scale():
    picture = torch.zeros(3, 1, 4, dtype=torch.uint8)
    errors = torch.tensor([0, 24, 48, 255], dtype=torch.uint8).expand(3, 1, 4)
    colours = report.error_map(picture, errors)[:, 0].T.tolist()
    assert colours == [list(report.RAMP[i]) for i in (0, 2, 4, 4)]


def test_the_most_different_region_is_found_and_enlarged():
    a = torch.zeros(3, 64, 64, dtype=torch.uint8)
    b, c = a.clone(), a.clone()
    b[:, 40:56, 8:24] = 200
    c[:, 0:16, 0:16] = 20
    box = report.most_different([a, b, c])
    assert box == (40, 8, 16, 16)
    enlarged = report.zoom(b, box)
    assert enlarged.shape == (3, 64, 64)
    assert enlarged.unique().tolist() == [200]
    steps = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    assert torch.equal(report.zoom(steps, (0, 0, 4, 4))[:, ::4, ::4], steps)


def test_a_long_label_stays_in_its_column():
    picture = torch.zeros(3, 8, 64, dtype=torch.uint8)
    columns = [("a label much wider than its column", [picture]), ("b", [picture])]
    label = report.strip(columns)[:, :20]
    assert label[:, :, 62:68].min() == 255  # nothing is written across the gap
    assert label[:, :, :60].min() == 0


def test_pictures_are_written_without_loss(plain):
    items = json.loads((plain / "pictures.json").read_text())
    item, name = items[0], "ft-MSE"
    file = Path(item["models"][name]).name
    x, y = read(plain / item["input"]), read(plain / item["models"][name])
    assert torch.equal(read(plain / "errors" / file), report.error_map(x, y))
    others = [read(plain / path) for path in item["models"].values()]
    assert torch.equal(read(plain / "zooms" / file), report.zoom(y, report.most_different(others)))
    strip = read(plain / "strip.png")
    assert torch.equal(strip[:, 24:280, :256], x)
    assert torch.equal(strip[:, 24:280, -256:], y)
    assert not list(plain.rglob("*.part")) + list(plain.rglob("*.jpg"))


# --- the page, as text ------------------------------------------------------------------------


def test_names_are_escaped_everywhere(odd):
    text = (odd / "report.html").read_text(encoding="utf-8")
    assert '<b>"x' not in text
    assert '<b>\\"x' not in text
    assert text.count("<script") == 2
    assert "<i>html" not in text
    assert "<!--" not in text


def test_nothing_points_outside(plain):
    text = (plain / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]+\.", text)
    for link in re.findall(r"""(?:href|src)=['"]([^'"#]+)""", text):
        assert link == "data:," or (plain / link).is_file()


def test_says_what_was_not_measured_and_why(plain):
    text = (plain / "report.html").read_text(encoding="utf-8")
    assert "Not measured: rFID (no &lt;Inception&gt; weights: fetch them)." in text
    assert "rFID on fewer than 2,048 images is biased" in text
    assert "data-label='rFID'" not in text  # no column that says so again for each model
    assert "ST-LPIPS" not in text.replace("ST-LPIPS (stand-in, not LPIPS)", "")


def test_tells_protocol_weights_and_hashes(plain):
    text = (plain / "report.html").read_text(encoding="utf-8")
    scores = json.loads((plain / "scores.json").read_text())
    assert scores["images_sha256"] in text
    for entry in scores["weights"].values():
        assert entry["sha256"] in text
        assert f"iteration {entry['iteration']:,}" in text
    assert "11 x 11 Gaussian window" in text
    assert "torch 2.15.0, numpy 2.4.6" in text
    assert "All models share one encoder, bit for bit." in text


def test_colour_and_sharpness_are_seen_against_the_base(plain):
    text = (plain / "report.html").read_text(encoding="utf-8")
    section = text[text.index("id='shifts'") :]
    scores = json.loads((plain / "scores.json").read_text())["models"]
    against = scores["ft-MSE"]["red_shift"]["mean"] - scores["kl-f8"]["red_shift"]["mean"]
    assert f"{against:+.2f} to base" in section
    ratio = scores["ft-MSE"]["sharpness"]["mean"] / scores["kl-f8"]["sharpness"]["mean"]
    assert f"{ratio:.0%} of the base" in section


def test_an_old_comparison_is_not_shown(tmp_path):
    directory = evaluations.write(tmp_path, count=4, pictured=1)
    report.write_comparison(directory, "kl-f8", "ft-EMA")
    assert "Is ft-EMA better than kl-f8?" in report.write(directory).read_text()
    with (directory / "per_image.csv").open("a") as file:
        file.write("kl-f8,new.png,20.0\n")
    assert "Is ft-EMA better" not in report.write(directory).read_text()


def test_one_model_and_no_pictures_are_enough(tmp_path):
    directory = evaluations.write(tmp_path, names=("only",), count=2, pictured=0)
    (directory / "pictures.json").unlink()
    text = report.write(directory).read_text()
    assert "1 VAE on 2 images" in text
    assert "Pairwise wins" not in text


def test_a_model_may_be_named_input(tmp_path):
    directory = evaluations.write(tmp_path, names=("input", "ft"), count=1, pictured=1)
    report.write(directory)
    assert read(directory / "strip.png").shape[2] == 3 * 256 + 2 * 4
    assert {path.name[5] for path in (directory / "errors").iterdir()} == {"a", "b"}


def test_evaluate_writes_the_report_and_the_comparison(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(10):
        data = samples.encode(samples.noise_picture(number, 64, 64), "PNG")
        (tmp_path / "photos" / f"{number}.png").write_bytes(data)
    weights = runs.make_weights(tmp_path / "model.ckpt")
    out = tmp_path / "out"
    arguments = [f"a={weights}", f"b={weights}", "--images", str(tmp_path / "photos")]
    arguments += ["--size", "64", "--out", str(out), "--compare", "a", "b"]
    assert main(["evaluate", *arguments]) == 0
    printed, progress = capsys.readouterr()
    verdict = "No clear difference between b and a in PSNR: +0.00 dB [0.00, 0.00]"
    assert 0 < printed.index(verdict) < printed.index("| model |")  # the verdict first
    assert printed.splitlines()[-1] == f"report: {out / 'report.html'}"  # nothing must follow
    assert progress.splitlines()[0].startswith("1 of 10 images, ")  # without a terminal
    assert progress.splitlines()[-1].startswith("10 of 10 images, ")
    assert "Is b better than a?" in (out / "report.html").read_text(encoding="utf-8")
    verdicts = json.loads((out / "comparison.json").read_text())["verdicts"]
    assert {"psnr", "ssim", "sharpness"} <= {verdict["metric"] for verdict in verdicts}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"per_image\.csv: no such file"):
        report.write(tmp_path)
    directory = evaluations.write(tmp_path / "a", count=1, pictured=1)
    (directory / "pictures" / "0000-b.png").unlink()
    with pytest.raises(MissingInputError, match=r"pictures\.json names it"):
        report.write(directory)


# --- the page in a browser ----------------------------------------------------------------------


def assert_sound(page, requests_from: int) -> None:
    assert page.problems == []
    schemes = {url.partition(":")[0] for url in page.requests[requests_from:]}
    assert schemes <= {"file", "data"}


@needs_chromium
@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["plain", "odd", "large"])
def test_nothing_overflows(page, request, kind, width, tmp_path):
    begun = len(page.requests)
    page.open(request.getfixturevalue(kind) / "report.html", width, dark=width == 400)
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    outside = page.value(
        "[...document.querySelectorAll('body *')]"
        ".filter((e) => !e.closest('.scroll, nav, .thumbs'))"
        ".filter((e) => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map((e) => e.outerHTML.slice(0, 90))"
    )
    assert outside == []
    tables = "#pictures .scroll" if kind == "odd" else ".scroll"
    cut = f"[...document.querySelectorAll('{tables}')].filter((e) => e.scrollWidth > e.clientWidth)"
    assert width != 400 or page.value(f"{cut}.length") == 0
    broken = "[...document.images].filter((i) => i.src && i.complete && !i.naturalWidth).length"
    assert page.value(broken) == 0
    assert page.value("document.title").startswith("Evaluation: 3 VAEs on")
    shot = page.screenshot(tmp_path / "page.png")
    assert read(shot).shape[2] == width
    assert_sound(page, begun)


@needs_chromium
@pytest.mark.browser
def test_the_slider_moves_by_mouse_touch_and_keys(page, plain):
    page.open(plain / "report.html", 1400)
    clip = "document.getElementById('left-picture').style.clipPath"
    area = page.value("document.getElementById('stage').getBoundingClientRect().toJSON()")
    x, y = page.centre("#stage")
    assert page.value(clip) == "inset(0px 50% 0px 0px)"

    page.mouse("mousePressed", x, y)
    page.mouse("mouseMoved", x + area["width"] / 4, y)
    page.mouse("mouseReleased", x + area["width"] / 4, y)
    assert page.value(clip) == "inset(0px 25% 0px 0px)"
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)  # no button: no dragging
    assert page.value(clip) == "inset(0px 25% 0px 0px)"

    page.touch("touchStart", (x, y))
    page.touch("touchMove", (x - area["width"] / 4, y))
    page.touch("touchEnd")
    assert page.value(clip) == "inset(0px 75% 0px 0px)"

    page.value("document.getElementById('position').focus()")
    page.key("ArrowRight")
    assert page.value(clip) == "inset(0px 74.5% 0px 0px)"
    page.key("Home")
    assert page.value(clip) == "inset(0px 100% 0px 0px)"


@needs_chromium
@pytest.mark.browser
def test_the_slider_shows_both_pictures(page, plain, tmp_path):
    """Left of the boundary are one compared model's pixels, right of it the other's."""
    page.open(plain / "report.html", 1400)
    page.value("document.querySelectorAll('#box, #line, .label').forEach((e) => e.remove())")
    page.wait("[...document.querySelectorAll('#stage img')].every((i) => i.complete)")
    area = page.value("document.getElementById('stage').getBoundingClientRect().toJSON()")
    top = round(area["y"] + page.value("scrollY"))
    left = round(area["x"])
    shot = read(page.screenshot(tmp_path / "page.png"))[:, top : top + 512, left : left + 512]
    item = json.loads((plain / "pictures.json").read_text())[0]
    doubled = [
        read(plain / path).repeat_interleave(2, 1).repeat_interleave(2, 2)
        for path in (item["models"]["kl-f8"], item["models"]["ft-MSE"])
    ]
    assert torch.equal(shot[:, 100:400, 20:250], doubled[0][:, 100:400, 20:250])
    assert torch.equal(shot[:, 100:400, 262:490], doubled[1][:, 100:400, 262:490])


@needs_chromium
@pytest.mark.browser
def test_images_and_sides_are_chosen(page, odd):
    page.open(odd / "report.html", 1400)
    items = json.loads((odd / "pictures.json").read_text())
    page.click("#thumbs button:nth-child(5)")
    assert page.value("document.getElementById('picture-name').textContent") == items[4]["image"]
    before = page.value("document.getElementById('right-picture').src")
    page.click("#swap")
    assert page.value("document.getElementById('left-picture').src") == before
    page.value("(right.value = 2, right.dispatchEvent(new Event('change')))")
    assert page.value("document.getElementById('right-label').textContent") == evaluations.ODD[1]
    assert page.value("document.querySelectorAll('#columns img').length") == 7
    page.click("#body tr:nth-child(4) td button")
    assert page.value("document.getElementById('picture-name').textContent") == items[3]["image"]


@pytest.mark.parametrize(
    ("compared", "added", "opened"),
    [
        (("kl-f8", "ft-EMA"), {}, "ft-EMA"),
        (("ft-MSE", "kl-f8"), {}, "kl-f8"),
        ((), {}, "ft-MSE"),
        ((), {"ft-MSE": {"baseline": True}}, "ft-EMA"),
        ((), {"ft-MSE": {"latent_noise": 0.1}, "ft-EMA": {"baseline": True}}, "kl-f8"),
    ],
)
def test_the_page_opens_on_what_was_finetuned(tmp_path, compared, added, opened):
    directory = evaluations.write(tmp_path / "scores", count=3)
    values = json.loads((directory / "scores.json").read_text())
    for name, record in added.items():
        values["weights"][name] |= record
    (directory / "scores.json").write_text(json.dumps(values))
    if compared:
        report.write_comparison(directory, *compared)
    text = report.write(directory).read_text()
    data = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', text, re.S)[1])
    assert data["models"][data["opened"]] == opened


@needs_chromium
@pytest.mark.browser
def test_worst_median_and_best_have_pictures(page, plain):
    page.open(plain / "report.html", 1400)
    titles = "[...document.querySelectorAll('#extremes h3')].map((e) => e.textContent)"
    chosen = "document.getElementById('extreme-model')"
    assert page.value(f"{chosen}.selectedOptions[0].textContent") == "ft-MSE"  # the compared one
    worst, _, best = page.value(titles)
    assert (worst[:9], best[:8]) == ("Worst: 25", "Best: 31")
    page.value(f"({chosen}.value = 0, {chosen}.dispatchEvent(new Event('change')))")
    worst, _, best = page.value(titles)
    assert (worst[:9], best) == ("Worst: 28", "Best: \u221e")
    page.value(
        "(e => (e.value = 2, e.dispatchEvent(new Event('change'))))"
        "(document.getElementById('extreme-metric'))"
    )
    scores = [float(title.split(": ")[1]) for title in page.value(titles)]
    assert scores == sorted(scores, reverse=True)  # lower is better
    assert page.value("document.querySelectorAll('#extremes .triple img').length") == 9


@needs_chromium
@pytest.mark.browser
def test_five_thousand_rows_sort_and_turn_at_once(page, large):
    begun = time.perf_counter()
    page.open(large / "report.html", 1400)
    column = "[...document.querySelectorAll('#body td:nth-child(2)')].map((e) => e.textContent)"
    assert len(page.value(column)) == 100
    assert time.perf_counter() - begun < 5

    script = "(() => { const t = performance.now(); sortBy(0); return performance.now() - t; })()"
    assert page.value(script) < 1000  # 15 ms on an idle machine
    page.value("sortBy(-1)")
    page.click("#head th:nth-child(2) button")
    values = page.value(column)
    assert page.value("document.querySelector('#head th:nth-child(2)').ariaSort") == "ascending"
    assert [float(v) for v in values] == sorted(float(v) for v in values)

    page.click("#head th:nth-child(2) button")
    values = page.value(column)
    assert values[0] == "\u221e"
    numbers = [float(v) for v in values[1:]]
    assert numbers == sorted(numbers, reverse=True)

    page.click("#next")
    text = page.value("document.getElementById('page').textContent")
    assert text == "101 to 200 of 5,000"
    page.value("(table.page = 49, drawTable())")
    assert page.value(column)[-1] == "not measured"  # last, whichever way it is sorted
    page.click("#head th:nth-child(2) button")
    page.value("(table.page = 49, drawTable())")
    assert page.value(column)[-2:] == ["\u221e", "not measured"]

    page.click("#find")
    page.send("Input.insertText", text="0412")
    names = page.value(column.replace("nth-child(2)", "first-child"))
    assert sorted(names) == ["00412.jpg", *(f"0412{digit}.jpg" for digit in range(10))]
