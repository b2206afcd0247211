"""report.html: complete, self-contained, and without errors in a real browser, wide and on a phone."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.helpers import SMALL, one_error_line, run

from diffratio_fast import report, train
from diffratio_fast.report.charts import Axis, Series, line_chart, number
from diffratio_fast.report.serve import server
from diffratio_fast.report.style import SCRIPT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)"
)
SECTIONS = (
    "Samples", "Quality", "Nearest training images", "Divergence", "By noise level", "Training",
    "Calibration", "Noise levels", "Time and memory", "Configuration",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("reported") / "run"
    threads = torch.get_num_threads()
    options = ["--eval-every", "4", "--steps", "12", "--ratio-ema-half-life-images", "500"]
    assert train.main([*SMALL, *options, "--run-dir", str(where)]) == 0
    torch.set_num_threads(threads)
    return where


class Page(HTMLParser):
    """The content of a page: its tags, whether they are closed, its references."""

    VOID = frozenset(("meta", "img", "input", "br", "line", "circle", "polyline", "polygon"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID or (tag == "circle" and not self.get_starttag_text().endswith("/>")):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_has_every_part_and_needs_nothing_else(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    for title in SECTIONS:
        assert re.search(f"<h2>{title}", text), title
    sources = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href")]
    assert sources and all(
        source is not None and source.startswith("data:image/png;base64,") for source in sources
    )
    grids = [base64.b64decode(source.partition(",")[2]) for source in sources]  # type: ignore[union-attr]
    for path in (*sorted((finished / "samples").iterdir()), finished / "neighbours.png"):  # words: ok
        assert path.read_bytes() in grids
    assert "http" not in text.replace("http-equiv", "")
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower().replace("nanmean", "")
    assert text.count("<svg") >= 20 and "ratio_weight_decay" in text
    before = (finished / "report.html").read_bytes()
    report.write(finished)
    assert (finished / "report.html").read_bytes() == before


def test_a_denoisers_lines_make_charts_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("preset: digits\nsteps: 4\nlr: 0.001\n")
    logged = {"images_per_second": 9.0, "loss": 0.7, "error": 0.6, "lr": 0.001, "seconds": 5.0}
    lines = [{"step": s, **logged} for s in (2, 4)] + [{"step": 4, "validation_error": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report.write(tmp_path).read_text()
    assert Page(text).open == []
    for title in ("Loss of the denoiser", "Weighted error of the denoiser", "Learning rates"):
        assert title in text
    assert "Jensen" not in text and "Calibration" not in text
    assert "average, validation data: 0.5 at 4" in text


def test_a_page_of_little_is_a_page(tmp_path: Path) -> None:
    """A run that has just started, and one with damaged files."""
    (tmp_path / "config.yaml").write_text("preset: digits\nsteps: 10\ndata: <script>alert(1)</script>\n")
    text = report.write(tmp_path).read_text()
    assert "not finished" in text and "<script>alert" not in text
    line = {"step": 3, "images_per_second": None, "ratio_loss": None, "divergence": None, "seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 4, "rat')
    (tmp_path / "measurements.json").write_text("{")
    assert Page(report.write(tmp_path).read_text()).open == []


def test_charts_put_points_where_they_belong() -> None:
    chart = line_chart("t", [Series("a", [(1, 1), (10, 2), (100, 3)], "s0")], Axis("x", log=True), Axis("y"))
    places = np.array(
        [pair.split(",") for pair in re.search('points="([^"]*)"', chart)[1].split()],  # type: ignore[index]
        float,
    )
    steps = np.diff(places, axis=0)
    np.testing.assert_allclose(steps[0], steps[1], atol=0.2)
    assert steps[0, 0] > 0 > steps[0, 1]  # right and up
    for tick in ("1", "10", "100"):
        assert f">{tick}</text>" in chart
    bad = [(1.0, float("nan")), (-1.0, 2.0), (2.0, None)]
    assert line_chart("t", [Series("a", bad, "s0")], Axis("x", log=True), Axis("y")) == ""  # type: ignore[arg-type]
    flat = line_chart("t", [Series("a", [(1, 5), (2, 5)], "s0")], Axis("x"), Axis("y"))
    assert "nan" not in flat
    many = line_chart("t", [Series("a", [(i, i) for i in range(10_001)], "s0")], Axis("x"), Axis("y"))
    assert len(many) < 20_000 and "10,000: " not in many


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.5, "0.5"), (123456, "1.2e5"), (1234, "1,234"), (0.00012, "0.00012")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) in (text, f"{value:.2g}".replace("e-0", "e-"))


def test_the_command_rebuilds_it(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "report.html").unlink()
    result = run("report", copy, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (copy / "report.html").stat().st_size > 100_000
    assert "not a run directory" in one_error_line(run("report", "nowhere", cwd=tmp_path))


PROBE = """<script>
{
const overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const shown = [...document.querySelectorAll("#grids img")].filter((image) => image.offsetHeight > 0).length;
const broken = [...document.images].filter((image) => image.naturalWidth === 0).length;
const slider = document.getElementById("step");
slider.value = "0";
slider.dispatchEvent(new Event("input"));
document.documentElement.dataset.probe = JSON.stringify({
  overflow, shown, broken, first: document.getElementById("shown").textContent,
  width: document.documentElement.clientWidth,
});
}
</script>"""


def browse(page: Path, folder: Path, width: int, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    return subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-extensions", "--disable-dev-shm-usage", "--enable-logging=stderr",
            f"--user-data-dir={folder}", f"--window-size={width},2000", *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip


def with_probe(text: str) -> str:
    """The page with the probe, added to its policy; the policy allows no other script."""
    script = PROBE.removeprefix("<script>").removesuffix("</script>")
    digest = digest_of(script)
    assert text.count("script-src ") == 1
    return text.replace("script-src ", f"script-src 'sha256-{digest}' ").replace("</body>", PROBE + "</body>")


FRAME = """<!doctype html><html><body style="margin: 0">
<iframe style="border: 0; width: WIDTHpx; height: 2000px" srcdoc="PAGE"></iframe>
<script>
addEventListener("load", () => Object.assign(
  document.documentElement.dataset, document.querySelector("iframe").contentDocument.documentElement.dataset,
));
</script></body></html>"""
"""A window has a minimum width larger than a phone's; a frame does not."""


@in_browser
@pytest.mark.parametrize("width", [1200, 390], ids=["wide", "phone"])
def test_it_renders_in_a_browser_without_errors(finished: Path, tmp_path: Path, width: int) -> None:
    text = with_probe((finished / "report.html").read_text())
    framed = tmp_path / "framed.html"
    framed.write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", html.escape(text)))
    result = browse(framed, tmp_path / "profile", 1200, "--dump-dom")
    assert "CONSOLE" not in result.stderr, result.stderr
    outer = re.search(r"^<!DOCTYPE html>\s*<(html[^>]*)>", result.stdout)
    assert outer is not None and 'data-ready="yes"' in outer[1]
    printed = re.search('data-probe="([^"]*)"', outer[1])
    assert printed is not None
    probe = json.loads(html.unescape(printed[1]))
    assert probe == {"overflow": 0, "shown": 1, "broken": 0, "first": "step 4", "width": width}


@in_browser
def test_a_screenshot_shows_a_page(finished: Path, tmp_path: Path) -> None:
    width = 800
    picture = tmp_path / "page.png"
    browse(finished / "report.html", tmp_path / "profile", width, f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (2000, width, 3)
    paper = (pixels == pixels[1, 1]).all(-1)
    assert 0.02 < 1 - paper.mean() < 0.9  # not empty, but mostly background
    assert len(np.unique(pixels[::3, ::3].reshape(-1, 3), axis=0)) > 50


def digest_of(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@in_browser
def test_a_script_error_would_be_noticed(finished: Path, tmp_path: Path) -> None:
    broken, script = tmp_path / "broken.html", SCRIPT.replace('"use strict";', '"use strict"; missing();')
    text = (finished / "report.html").read_text().replace(SCRIPT, script)
    broken.write_text(text.replace(digest_of(SCRIPT), digest_of(script)))
    result = browse(broken, tmp_path / "profile", 600, "--dump-dom")
    assert "missing is not defined" in result.stderr and 'data-ready="yes"' not in result.stdout


@in_browser
def test_the_browser_refuses_every_other_script(finished: Path, tmp_path: Path) -> None:
    injected = tmp_path / "injected.html"
    script = "<script>document.documentElement.dataset.injected = 'yes';</script>"
    injected.write_text((finished / "report.html").read_text().replace("</body>", script + "</body>"))
    result = browse(injected, tmp_path / "profile", 600, "--dump-dom")
    assert "Content Security Policy" in result.stderr
    assert 'data-ready="yes"' in result.stdout and "data-injected" not in result.stdout


def test_the_first_screen_answers(finished: Path, tmp_path: Path) -> None:
    text = (finished / "report.html").read_text()
    first = text.partition('class="first"')[2].partition("</section>")[0]
    assert "Finished at step 12." in first and "times the distance of real training images" in first
    assert first.count('class="tile"') == 3 and 'class="spark"' in first
    running = tmp_path / "run"
    shutil.copytree(finished, running)
    (running / "summary.json").unlink()
    assert "Step 12 of 12 (100%), not finished." in report.write(running).read_text()


def test_several_runs_are_compared(finished: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("ratio_lr: 0.002", "ratio_lr: 0.004"))
    result = run("report", finished, other, "--out", "both.html", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "both.html").read_text()
    assert Page(text).open == []
    for part in ("Results", "Over steps", "Over time", "Newest samples", "<td>ratio_lr</td>", "0.004"):
        assert part in text, part
    assert "<td>beta1</td>" not in text
    serving = run("report", finished, other, "--serve", cwd=tmp_path)
    assert "--serve shows one run" in one_error_line(serving)


def test_the_live_view_serves_the_present_report_on_loopback(finished: Path) -> None:
    with server(finished, 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{serving.server_port}"
        with urllib.request.urlopen(f"http://{address}/", timeout=30) as answer:
            assert b'http-equiv="refresh"' in (content := answer.read()) and b"Finished" in content
        for path, host in (("/config.yaml", address), ("/", "evil.example")):
            request = urllib.request.Request(f"http://{address}{path}", headers={"Host": host})
            with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
                urllib.request.urlopen(request, timeout=30)
        serving.shutdown()
