"""`mtpd report` on a run with a tiny random model: the page itself, and the page in a browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from seals import edited
from test_cli_eval import SHORT, measure

from mtpd.cli import main
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.depths import Depth, Depths
from mtpd.report.samples import read_samples
from mtpd.report.slices import places_charts

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
        self.rows: dict[str, dict[str, str]] = {}
        """By measurement, the big number of each of its cards."""
        self.tiles: list[str] = []
        """All that each card says."""
        self.labels: list[str] = []
        self.depths: list[int] = []
        self.titles: list[str] = []
        """Of each drafted token."""
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self._suite = ""
        self._row = ""
        self._summary: str | None = None
        self._tile = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.addresses += [given[key] for key in ("src", "href", "action", "data") if key in given]
        self._suite = given.get("data-suite", self._suite)
        if "data-value" in given:
            self.values.setdefault((self._suite, given["data-ratio"]), []).append(float(given["data-value"]))
        self._row = given.get("data-measured", self._row)
        if given.get("class") == "tile":
            self.tiles.append("")
            self._tile = 1
        elif self._tile and tag == "div":
            self._tile += 1
        if "data-label" in given:
            self.labels.append(given["data-label"])
        if "data-depth" in given:
            self.depths.append(int(given["data-depth"]))
            self.titles += [given["title"]] if "title" in given else []
        self._summary = given.get("data-summary")

    def handle_endtag(self, tag: str) -> None:
        self._tile -= tag == "div" and self._tile > 0

    def handle_data(self, data: str) -> None:
        if self._tile:
            self.tiles[-1] += data
        if self._summary is not None:
            self.rows.setdefault(self._row, {})[self._summary] = data
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
const scrolled = [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length;
const shown = document.querySelector('[data-summary=tau]').innerText;
document.getElementById('probe').textContent = JSON.stringify({
  wide, inner: window.innerWidth, colour, cut, shown, scrolled,
  charts: document.querySelectorAll('svg[role=img]').length,
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
        assert not probe["scrolled"], f"at {width} pixels {probe['scrolled']} tables have to be scrolled"
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
    decoded = Acceptance.load(run / "acceptance-decoded.json")
    total = decoded.total([name for name in decoded.suites if name != "builtin-other"])
    assert total.drafters is not None
    assert total.plain_seconds is not None
    rates = {name: each.tokens / (each.seconds or 0) for name, each in total.drafters.items()}
    assert page.values["all", "speed_up"] == [
        pytest.approx(rates["together"] * total.plain_seconds / total.tokens, rel=1e-6)
    ]
    assert page.values["heads and look-up together", "rate"] == [pytest.approx(rates["together"])]
    assert page.values["look-up alone", "rate"] == [pytest.approx(rates["lookup"])]
    for name in ("together", "lookup", "heads"):
        assert page.values["demo", f"tau_{name}"] == [pytest.approx((suites.suites["demo"].drafters or {})[name].tau)]
    assert page.rows["Held-out prompts"]["tau"] == looks[390, False][1]["shown"]
    assert page.rows["Held-out prompts"]["tau"] == f"{held_out.total(apart).tau:.3f}"
    assert page.rows["mtpd eval"]["tau"] == f"{suites.total().tau:.3f}"
    assert page.rows["mtpd eval"]["car_1"] == f"{suites.total().car[0]:.3f}"
    assert page.depths == [depth for text in read_samples(run / "samples.json") for depth in text.depths]
    assert page.depths
    # Two sections, with three charts and one for each suite where there are several, those of positions, and the
    # training curves: loss, cross-entropy and divergence by depth, acceptance in training and beside it, of all and by
    # family, learning rate.
    places = [*places_charts(held_out, apart=["builtin-other"]), *places_charts(suites)]
    assert len(places) == 1
    assert looks[1280, False][1]["charts"] == 6 + len(held_out.suites) + len(places) + 7


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
    # Of a file from before look-up drafted, heads drafted everything.
    assert page.titles == ["heads, 2nd draft of its round"]
    assert "drafted by look-up" not in text
    found = Acceptance.load(run / "acceptance.json")
    together = found.total([name for name in found.suites if name != "builtin-other"])
    assert page.rows["Held-out prompts"]["tau"] == f"{together.tau:.3f}"
    assert [path.name for path in run.parent.glob("page*")] == ["page.html"]
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


def report_of(run: Path) -> Page:
    assert main(["report", str(run)]) == 0
    return Page((run / "report.html").read_text())


def test_cards_say_what_they_were_measured_on(run: Path) -> None:
    """Fault: a card of one measurement in the row of another, or a number that does not say where it comes from."""
    for mode in ("offline", "decoded"):
        assert measure(run, *SHORT, "--limit", "5", "--mode", mode, "--drafts", "1") == 0
    page = report_of(run)
    files = {
        "Held-out prompts": "acceptance.json",
        "Held-out prompts, decoded": "acceptance-decoded.json",
        "mtpd eval": "evaluation.json",
        "mtpd eval, decoded": "evaluation-decoded.json",
    }
    assert list(page.rows) == list(files)
    said: dict[str, int] = {}
    for title, name in files.items():
        found = Acceptance.load(run / name)
        names = [suite for suite in found.suites if suite != "builtin-other"]
        counts = found.total(names)
        assert counts.drafters is not None
        together = counts.drafters["together"]
        assert page.rows[title]["tau_together"] == f"{together.tau:.3f}"
        suites = names[0] if len(names) == 1 else f"{len(names)} suites"
        on = f"{found.mode}, {suites}, {counts.prompts} prompts"
        if found.mode == "decoded":
            assert counts.plain_seconds is not None
            assert counts.engine_seconds is not None
            rate = together.tokens / (together.seconds or 0)
            assert page.rows[title]["rate"] == f"{rate:.1f}"
            over_engine = rate * counts.engine_seconds / counts.tokens
            assert page.rows[title]["speed_up"] == f"{rate * counts.plain_seconds / counts.tokens:.2f}×"
            assert page.rows[title]["speed_up_over_engine"] == f"{over_engine:.2f}×"
            assert "tau" not in page.rows[title]
            said[f"{on}, heads and look-up together"] = 4
        else:
            assert page.rows[title]["tau"] == f"{counts.tau:.3f}"
            assert page.rows[title]["car_1"] == f"{counts.car[0]:.3f}"
            said[f"{on}, {counts.depth} draft{'s' if counts.depth > 1 else ''} a round"] = 4
            said[f"{on}, up to 16 drafts a round in one tree"] = 1
    for text, cards in said.items():
        assert sum(text in tile for tile in page.tiles) == cards, text
    assert len(page.tiles) == sum(said.values())


def test_a_speed_up_never_stands_alone(run: Path) -> None:
    """Fault: a speed-up over generate is shown as if the drafts had gained it, also where nobody timed the engine."""
    page = report_of(run)
    assert page.labels.count("speed-up over generate") == page.labels.count("speed-up over engine without drafts") > 0
    content = json.loads((run / "acceptance-decoded.json").read_text())
    del content["sha256"]
    # As in files from before the engine without drafts was timed, and before look-up drafted.
    for suite in content["suites"].values():
        for part in (suite, *suite["rows"]):
            part["engine_seconds"] = part["drafters"] = None
            part["plain_seconds"] = 9 * part["seconds"]
    (run / "acceptance-decoded.json").write_text(json.dumps(content))
    page = report_of(run)
    assert page.rows["Held-out prompts, decoded"]["speed_up"] == "9.00×"
    assert "speed_up_over_engine" not in page.rows["Held-out prompts, decoded"]
    [tile] = [tile for tile in page.tiles if "speed-up over engine" in tile]
    assert "not in this file" in tile
    text = (run / "report.html").read_text()
    assert "the engine without drafts was not timed" in text
    assert "More than tau is not the drafts" in text


def test_the_report_from_the_run_alone(run: Path) -> None:
    """Fault: texts, loss by depth, hardware, time or the words' meanings need another command, or are missing."""
    provenance = json.loads((run / "provenance.json").read_text())
    samples = json.loads((run / "samples.json").read_text())
    assert samples["heads"] == Acceptance.load(run / "acceptance.json").heads
    held_out = {
        row.id for suite in Acceptance.load(run / "acceptance.json").suites.values() for row in suite.rows or []
    }
    assert {text["id"] for text in samples["texts"]} <= held_out
    assert {text["suite"] for text in samples["texts"]} == set(Acceptance.load(run / "acceptance.json").suites)
    page = report_of(run)
    assert page.depths == [depth for text in samples["texts"] for depth in text["depths"]]
    # What a text says of its tokens is what was counted of it.
    rows = {
        row.id: row for suite in Acceptance.load(run / "acceptance.json").suites.values() for row in suite.rows or []
    }
    drafted = {}
    for each in samples["texts"]:
        drafted[each["id"]] = Counter(pair for pair in zip(each["sources"], each["depths"], strict=True) if pair[0])
        counted = (rows[each["id"]].drafters or {})["together"].sources
        assert drafted[each["id"]] == Counter(
            {(source, depth): n for source, by_depth in counted.items() for depth, n in enumerate(by_depth, 1) if n}
        )
    assert sum(drafted.values(), Counter())
    assert len(page.titles) == sum(sum(each.values()) for each in drafted.values())
    text = (run / "report.html").read_text()
    for shown in (
        provenance["machine"],
        provenance["finished"][:10],
        "8 steps",
        "ce_2",
        "kl_2",
        "Not measured in this",
    ):
        assert shown in text
    words = re.findall("<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", text[text.index('id="words"') :])
    assert [word.partition(",")[0] for word, _ in words] == [
        *("tau", "CAR_k", "look-up", "AR_k", "Σ min(p", "control", "speed-up")
    ]
    assert all(len(meaning) > 60 for _, meaning in words)
    # A repeated call keeps when and where it was finished, and the texts.
    edited(run / "provenance.json", machine="another")
    kept = (run / "samples.json").stat().st_mtime_ns
    assert main(["distill", str(run / "recipe.yaml"), f"output={run}"]) == 0
    again = json.loads((run / "provenance.json").read_text())
    assert (again["machine"], again["finished"]) == ("another", provenance["finished"])
    assert (run / "samples.json").stat().st_mtime_ns == kept


def test_the_report_against_another_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: acceptance of two models drawn side by side, as if one could be compared with the other."""
    assert measure(run, *SHORT, "--limit", "5") == 0
    (run / "report.html").unlink(missing_ok=True)
    baseline = run.parent / "base.json"
    content = json.loads((run / "evaluation.json").read_text())
    del content["sha256"]
    shutil.copy(run / "evaluation.json", baseline)
    assert main(["report", str(run), "--against", str(baseline)]) == 0
    (run / "report.html").unlink()
    refused = []
    baseline.write_text(json.dumps({**content, "trunk": "other"}))
    for words in (
        ["report", str(run), "--against", str(baseline)],
        ["compare", str(baseline), str(run / "evaluation.json")],
    ):
        capsys.readouterr()
        assert main(words) == 2
        refused.append(capsys.readouterr().err.splitlines()[-1])
    assert refused[0] == refused[1]
    assert "measured with different trunks (other, " in refused[0]
    assert not (run / "report.html").exists()
    baseline.write_text(json.dumps({**content, "mode": "decoded"}))
    assert main(["report", str(run), "--against", str(baseline)]) == 2
    assert "has no evaluation-decoded.json" in capsys.readouterr().err


def test_the_report_of_depths(run: Path) -> None:
    """Fault: tokens/s by number of drafts without their baselines, without parts, or of heads that are gone."""
    heads = Acceptance.load(run / "acceptance.json").heads
    parts = {"trunk": 8.0, "drafts": 1.0, "verification": 2.0, "bookkeeping": 0.5}
    found = Depths(
        prompts=2, max_new_tokens=8, dtype="float32", heads=heads, machine="a machine", plain_tokens_per_second=50.0,
        depths=[
            Depth(depth=0, tokens_per_second=80.0, round_ms=10.5, draft_ms=0, part_ms={**parts, "drafts": 0.0}),
            Depth(depth=1, tokens_per_second=100.0, round_ms=11.5, draft_ms=1.0, part_ms=parts, car=0.3),
        ],
    )  # fmt: skip
    found.save(run / "depths.json")
    text = (report_of(run), (run / "report.html").read_text())[1]
    assert "Where the time of a round goes" in text
    for shown in (
        "2.00×</span> transformers' generate and 1.25× the engine without drafts",
        "a machine",
        "1 draft, pass",
    ):
        assert shown in text
    found.model_copy(update={"heads": "gone"}).save(run / "depths.json")
    assert report_of(run)
    assert "Where the time of a round goes" not in (run / "report.html").read_text()


def test_the_report_says_that_the_start_was_kept(run: Path) -> None:
    """Fault: a run whose training made the heads worse reads as one that gained nothing, or as a good one."""
    worse = json.loads((run / "acceptance.json").read_text())
    del worse["sha256"]
    worse["heads"] = "trained"
    for suite in worse["suites"].values():
        suite["drafted"] = suite["accepted"] = [0, 0]
        for row in suite["rows"]:
            row["accepted"], row["places"] = [0 for _ in row["accepted"]], None
        for key in ("drafted", "accepted"):
            suite[key] = [sum(column) for column in zip(*(row[key] for row in suite["rows"]), strict=True)]
    before = json.loads((run / "acceptance.json").read_text())
    del before["sha256"]
    for suite in before["suites"].values():
        for row in suite["rows"]:
            row["accepted"], row["places"] = row["drafted"], None
        suite["accepted"] = [sum(column) for column in zip(*(row["accepted"] for row in suite["rows"]), strict=True)]
    for name, content in (("", before), ("-before", before), ("-trained", worse)):
        (run / f"acceptance{name}.json").write_text(json.dumps(content))
    page = report_of(run)
    text = (run / "report.html").read_text()
    head = re.search('<div class="card (.*?)" id="verdict"><p class="head">(.*?)</p>', text)
    assert head is not None
    assert head[1] == "down"
    assert head[2].startswith("Training made the drafts worse: tau ")
    assert head[2].endswith("The run keeps the heads as they started.")
    assert list(page.rows)[-1] == "Trained heads, not kept"
    assert page.rows["Trained heads, not kept"]["tau"] == "1.000"
