"""`mtpd report` on a run with a tiny random model: the page itself, and the page in a browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_cli_eval import SHORT, measure

from mtpd.cli import main
from mtpd.evaluate.acceptance import Acceptance
from mtpd.report.samples import read_samples

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
"""Programs that open the report; Debian has the first as a package."""


@pytest.fixture
def run(finished_run: Path) -> Path:
    return finished_run


class Page(HTMLParser):
    """Numbers, texts and drafted tokens of a report, as the browser's document has them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: dict[tuple[str, str], list[float]] = {}
        self.summary: dict[str, str] = {}
        self.depths: list[int] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self._suite = ""
        self._summary: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.addresses += [given[key] for key in ("src", "href", "action", "data") if key in given]
        self._suite = given.get("data-suite", self._suite)
        if "data-value" in given:
            self.values.setdefault((self._suite, given["data-ratio"]), []).append(float(given["data-value"]))
        if "data-depth" in given:
            self.depths.append(int(given["data-depth"]))
        self._summary = given.get("data-summary")

    def handle_data(self, data: str) -> None:
        if self._summary is not None:
            self.summary.setdefault(self._summary, data)
            self._summary = None


def browser() -> str:
    """A headless browser, or a skip that says what is missing."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (apt-get install chromium-headless-shell)")
    return found


PROBE = """<pre id="probe"></pre><script>
const wide = document.documentElement.scrollWidth;
const colour = getComputedStyle(document.body).backgroundColor;
const texts = [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect());
const out = (r, box) => r.left < box.left - 1 || r.right > box.right + 1;
const cut = [...document.querySelectorAll('svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return box.width ? [...svg.querySelectorAll('text')].filter(t => out(t.getBoundingClientRect(), box)) : [];
}).map(t => t.textContent);
const shown = document.querySelector('[data-summary=tau]').innerText;
document.getElementById('probe').textContent = JSON.stringify({
  wide, inner: window.innerWidth, colour, cut, shown, charts: document.querySelectorAll('svg').length,
  loaded: performance.getEntriesByType('resource').length, texts: texts.length });
</script></body>"""


NARROWEST = 500
"""Chromium opens no window that is narrower, in pixels: narrower pages are shown in a frame."""
FRAME = """<!doctype html><body style="margin: 0"><pre id="probe"></pre>
<iframe id="page" style="border: 0; width: {width}px; height: 900px" srcdoc="{content}"></iframe><script>
const page = document.getElementById('page');
page.onload = () => {{
  document.querySelector('#probe').textContent = page.contentDocument.getElementById('probe').textContent;
}};
</script></body>"""


def opened(page: Path, *, width: int, dark: bool) -> tuple[str, dict[str, Any]]:
    """The document as a browser has it, and what a script inside measured."""
    probed = page.with_name(f"probed-{width}-{dark}.html")
    content = page.read_text().replace("</body>", PROBE)
    if width < NARROWEST:
        content = FRAME.format(width=width, content=html.escape(content))
    probed.write_text(content)
    words = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    words += [f"--window-size={width},900", f"--user-data-dir={page.parent / 'profile'}"]
    words += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [*words, probed.as_uri()], capture_output=True, text=True, check=False, timeout=120, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert found is not None, done.stdout[-500:]
    return done.stdout, json.loads(found[1])


def test_the_report_in_a_browser(run: Path) -> None:
    """Fault: a page that needs the network, shows other numbers than the files hold, or does not fit a phone."""
    browser()
    baseline = run.parent / "base.json"
    assert measure(run, *SHORT, "--limit", "60", "--heads", "heads-before", "-o", str(baseline)) == 0
    assert measure(run, "--against", str(baseline)) in (0, 3, 4)
    assert main(["report", str(run), "--against", str(baseline)]) == 0
    looks = {
        (width, dark): opened(run / "report.html", width=width, dark=dark)
        for width, dark in ((390, False), (1280, False), (1280, True))
    }
    for (width, dark), (_, probe) in looks.items():
        assert probe["wide"] <= probe["inner"], f"at {width} pixels the page is {probe['wide']} wide"
        assert probe["inner"] == width
        assert not probe["cut"], f"at {width} pixels labels are cut off: {probe['cut']}"
        assert probe["loaded"] == 0
        channels = [int(number) for number in re.findall(r"\d+", probe["colour"])[:3]]
        assert (max(channels) < 80) == dark, probe["colour"]

    page = Page(looks[1280, False][0])
    assert not [address for address in page.addresses if address]
    assert not {"link", "img", "iframe"} & set(page.tags)
    held_out, suites = Acceptance.load(run / "acceptance.json"), Acceptance.load(run / "evaluation.json")
    apart = [name for name in held_out.suites if name != "builtin-other"]
    assert page.values["demo", "tau"] == [pytest.approx(suites.suites["demo"].tau)]
    assert page.values["all", "tau"] == [pytest.approx(held_out.total(apart).tau), pytest.approx(suites.total().tau)]
    for k, value in enumerate(suites.suites["demo"].car, 1):
        assert page.values["demo", f"car_{k}"] == [pytest.approx(value)]
    for k, value in enumerate(suites.suites["demo"].ar, 1):
        assert page.values["demo", f"ar_{k}"] == [pytest.approx(value)]
    assert page.values["builtin-other", "car_1"] == [pytest.approx(held_out.suites["builtin-other"].car[0])]
    assert page.values["all", "speed_up"] == [
        pytest.approx(Acceptance.load(run / "acceptance-decoded.json").total().speed_up)
    ]
    # The first row of cards is of the run's own held-out prompts.
    assert page.summary["tau"] == looks[390, False][1]["shown"] == f"{held_out.total(apart).tau:.3f}"
    assert page.summary["car_1"] == f"{held_out.total(apart).car[0]:.3f}"
    assert page.depths == [depth for text in read_samples(run / "samples.json") for depth in text.depths]
    assert page.depths
    # Two sections, each with two charts and one for each suite where there are several, and the training curves.
    assert looks[1280, False][1]["charts"] >= 4 + len(held_out.suites) + 4


def test_the_report_is_whole_without_a_browser(run: Path) -> None:
    """Fault: the report needs more files than a run has, or escapes nothing."""
    (run / "samples.json").write_text(
        json.dumps(
            {
                "schema_version": 1,
                "texts": [{"suite": "x", "id": "1", "prompt": "<b>&", "pieces": ["<script>", "é"], "depths": [0, 2]}],
            }
        )
    )
    assert main(["report", str(run), "-o", str(run.parent / "page.html")]) == 0
    text = (run.parent / "page.html").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    page = Page(text)
    assert page.depths == [0, 2]
    found = Acceptance.load(run / "acceptance.json")
    together = found.total([name for name in found.suites if name != "builtin-other"])
    assert page.summary["tau"] == f"{together.tau:.3f}"
    for name in (
        "samples.json",
        "metrics.jsonl",
        "provenance.json",
        "acceptance-before.json",
        "acceptance-decoded.json",
    ):
        (run / name).unlink()
        assert main(["report", str(run)]) == 0
    (run / "acceptance.json").unlink()
    assert main(["report", str(run)]) == 2


def test_the_report_of_files_of_the_first_schema(run: Path) -> None:
    """Fault: runs from before intervals cannot be shown any more."""
    for name in ("acceptance.json", "acceptance-before.json", "acceptance-decoded.json"):
        content = json.loads((run / name).read_text())
        content["schema"] = 1
        del content["settings"], content["sha256"]
        for suite in content["suites"].values():
            for key in ("rows", "settings", "control"):
                del suite[key]
        (run / name).write_text(json.dumps(content))
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "No paired changes" in text
    assert "no counts by prompt (schema 1)" in text
