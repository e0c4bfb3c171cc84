"""`mtpd eval` and `mtpd report` on a run with a tiny random model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtpd.cli import main
from mtpd.data.models import load_model
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.intervals import intervals
from mtpd.evaluate.samples import read_samples

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
"""Programs that open the report; Debian has the first as a package."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, made once. No test may change it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    words = ["distill", "model=tiny", f"output={folder}", "heads.depth=2", "data.limit=16", "data.max_new_tokens=24"]
    words += ["train.max_steps=8", "train.rows_per_step=2", "train.logging_steps=1", "train.learning_rate=3e-3"]
    words += ["evaluation.prompts_limit=14", "evaluation.max_new_tokens=16", "evaluation.decode_prompts=2"]
    words += ["evaluation.steps=4", "evaluation.steps_prompts=7", "evaluation.extra=[builtin-other]"]
    assert main(words) == 0
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def measure(run: Path, *words: str) -> int:
    """`mtpd eval` with the suites' responses kept in the run's parent."""
    return main(["eval", str(run), "--responses", str(run.parent / "responses"), *words])


SHORT = ["--suite", "demo", "--max-new-tokens", "16"]


def error_of(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = measure(run, *words)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "Traceback" not in "".join(lines)
    return code, lines[-1] if lines else ""


def test_an_evaluation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: the file, the tables and the exit code do not belong together, or responses are written twice."""
    file = run.parent / "acceptance.json"
    assert measure(run, *SHORT, "-o", str(file)) == 0
    shown = capsys.readouterr().out
    found = Acceptance.load(file)
    assert (found.mode, found.schema_version, list(found.suites)) == ("offline", 2, ["demo"])
    suite = found.suites["demo"]
    assert suite.rows is not None
    assert (suite.prompts, len(suite.rows)) == (84, 84)
    assert suite.settings is not None
    assert suite.settings["max_new_tokens"] == 16
    assert found.settings == {"dtype": "bfloat16" if "bfloat16" in file.read_text() else "float32", "drafts": 2}
    estimates = intervals(found)[None]
    for name in ("tau", "car_1", "expected_1"):
        assert estimates[name].text() in shown
    assert "control CAR_1" in shown
    kept = {path: path.stat().st_mtime_ns for path in (run.parent / "responses").iterdir()}
    assert measure(run, *SHORT, "-o", str(run.parent / "again.json")) == 0
    assert {path: path.stat().st_mtime_ns for path in (run.parent / "responses").iterdir()} == kept
    assert Acceptance.load(run.parent / "again.json") == found


def test_decoded_and_offline_agree(run: Path) -> None:
    """Fault: the number that CI takes because it is fast is not the one that decoding has."""
    for mode in ("offline", "decoded"):
        words = [*SHORT, "--limit", "6", "--mode", mode, "-o", str(run.parent / f"{mode}.json")]
        # In float32 both, so that no tie falls the other way.
        recipe = run / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("dtype: auto", "dtype: float32"))
        refresh_fingerprint(run)
        assert measure(run, *words) == 0
    offline, decoded = (Acceptance.load(run.parent / f"{mode}.json").suites["demo"] for mode in ("offline", "decoded"))
    assert (offline.drafted, offline.accepted) == (decoded.drafted, decoded.accepted)
    assert decoded.speedup is not None
    assert decoded.identical == 6


def refresh_fingerprint(run: Path) -> None:
    """Heads know the fingerprint of their trunk, which depends on its number format."""
    from mtpd.data.models import trunk_fingerprint

    model, _ = load_model("tiny", dtype="float32")
    for folder in ("heads", "heads-before"):
        path = run / folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"trunk": trunk_fingerprint(model)}))


def test_the_gate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: equal heads fail, damaged ones pass, or a failed gate overwrites the baseline."""
    baseline = run.parent / "baseline.json"
    assert measure(run, *SHORT, "--write-baseline", str(baseline)) == 0
    before = baseline.read_bytes()
    # Suites, lengths and mode follow from the baseline.
    assert measure(run, "--against", str(baseline), "--max-drop", "0.01") == 0
    assert "gate passed" in capsys.readouterr().out
    damage(run)
    code = measure(run, "--against", str(baseline), "--write-baseline", str(baseline))
    assert code == 3
    assert "gate failed" in capsys.readouterr().out
    assert baseline.read_bytes() == before
    assert measure(run, *SHORT, "--limit", "20", "--write-baseline", str(baseline)) == 0
    assert measure(run, "--against", str(baseline)) == 4


def damage(run: Path) -> None:
    path = run / "heads" / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("project.weight")]:
        tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})


def cut_tensor(run: Path) -> None:
    path = run / "heads" / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(sorted(tensors)))
    save_file({**tensors, name: tensors[name][:1].clone()}, path, metadata={"format": "pt"})


def other_trunk(run: Path) -> None:
    path = run.parent / "base.json"
    path.write_text(path.read_text().replace('"trunk": "', '"trunk": "0'))


def first_schema(run: Path) -> None:
    path = run.parent / "base.json"
    content = json.loads(path.read_text())
    content["schema"] = 1
    for suite in content["suites"].values():
        suite["rows"] = suite["settings"] = suite["control"] = None
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (cut_tensor, [*SHORT], "tensors missing, unexpected or of another shape"),
        (lambda run: shutil.rmtree(run / "heads"), [*SHORT], "heads: holds no heads"),
        (lambda run: (run / "recipe.yaml").unlink(), [*SHORT], "holds no run"),
        (None, ["--suite", "nothing"], "suite nothing: unknown; accepted: alpaca, ceval"),
        (None, ["--suite", ","], "--suite: names no suite"),
        (None, ["--suite", "demo,demo"], "--suite: demo is named twice"),
        (None, [*SHORT, "--drafts", "3"], "--drafts: 3 is more than there are heads; accepted: 1 to 2"),
        (None, [*SHORT, "--max-drop", "5", "--against", "BASE"], "--max-drop: 5"),
        (None, ["--suite", "demo", "--max-new-tokens", "8", "--against", "BASE"], "max_new_tokens is 16 and 8"),
        (None, ["--mode", "decoded", "--against", "BASE"], "different modes"),
        (None, ["--drafts", "1", "--against", "BASE"], "decoding settings differ: drafts is 2 and 1"),
        (other_trunk, ["--against", "BASE"], "different trunks"),
        (first_schema, ["--against", "BASE"], "no counts by prompt (schema 1)"),
        (
            lambda run: (run.parent / "base.json").write_text('{"schema": 2,'),
            ["--against", "BASE"],
            "not an acceptance file",
        ),
        (None, ["--against", "missing.json"], "missing.json: cannot be read"),
        (lambda run: (run / "provenance.json").write_text("{"), [*SHORT], "cannot be read as a provenance"),
        (
            lambda run: (run / "trained-prompts.safetensors").write_text("x"),
            [*SHORT],
            "not a file of prompt signatures",
        ),
    ],
)
def test_mistakes(
    change: Callable[[Path], Any] | None,
    words: list[str],
    message: str,
    run: Path,
    made: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fault: a traceback, a failure's exit code, or a green gate on files that do not belong together."""
    base = run.parent / "base.json"
    if "BASE" in words:
        cached = made.parent / "base.json"
        if not cached.is_file():
            assert measure(made, *SHORT, "--limit", "60", "-o", str(cached)) == 0
        shutil.copy(cached, base)
    if change is not None:
        change(run)
    code, said = error_of(run, capsys, *[str(base) if word == "BASE" else word for word in words])
    assert code == 2, said
    assert message in said
    assert said.startswith("mtpd: error: ")


def test_prompts_of_the_training_are_flagged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: acceptance on prompts that the heads learned is reported without a word."""
    lines = (run / "responses.jsonl").read_text().splitlines()
    assert len(lines) == 17
    from mtpd.data.prompts import load_prompts

    trained = {prompt.id: prompt.text for prompt in load_prompts("builtin")}
    chosen = [trained[json.loads(line)["id"]] for line in lines[1:4]]
    texts = [chosen[0], chosen[1] + " Thank you.", "What is the colour of a ripe lemon in the evening?"]
    folder = run.parent / "suites"
    folder.mkdir()
    (folder / "mixed.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    file = run.parent / "out.json"
    words = ["--suite", "mixed", "--suite-dir", str(folder), "--max-new-tokens", "8", "-o", str(file)]
    assert measure(run, *words) == 0
    said = capsys.readouterr()
    assert "suite mixed: the run was trained on 2 of its 3 prompts (1 word for word, 1 nearly)" in said.err
    assert "3 (2 trained on)" in said.out
    assert [row.trained for row in Acceptance.load(file).suites["mixed"].rows or []] == ["exact", "near", None]


def test_the_main_head_before_and_after(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a run that trained the trunk too, and lost what the model could, is not told from one that did not."""
    folder = run.parent / "suites"
    folder.mkdir()
    rows = [{"prompt": f"What is {n} + 1?", "reference": f"#### {n + 1}"} for n in range(4)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--suite", "gsm8k", "--suite-dir", str(folder), "--max-new-tokens", "8", "--check-trunk"]
    file = run.parent / "out.md"
    assert measure(run, *words, "--markdown", str(file)) == 0
    first = re.search(r"gsm8k[^\d]+32[^\d]+([\d.]+) → ([\d.]+)[^\d]+0\.000 → 0\.000", capsys.readouterr().out)
    assert first is not None
    assert first[1] == first[2]
    # The same model with other weights, as a run that trains more than heads leaves it.
    model, tokenizer = load_model("tiny")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(run / "trunk")
    tokenizer.save_pretrained(run / "trunk")
    code, said = error_of(run, capsys, *words)
    assert (code, "belong to another trunk" in said) == (2, True)
    from mtpd.data.models import trunk_fingerprint

    for folder_name in ("heads",):
        path = run / folder_name / "config.json"
        changed, _ = load_model(str(run / "trunk"))
        path.write_text(json.dumps(json.loads(path.read_text()) | {"trunk": trunk_fingerprint(changed)}))
    assert measure(run, *words, "--markdown", str(file)) == 0
    line = next(line for line in file.read_text().splitlines() if line.startswith("| gsm8k |") and "→" in line)
    before, after = map(float, re.findall(r"([\d.]+) → ([\d.]+)", line)[0])
    assert before == pytest.approx(float(first[1]), abs=1e-3)
    assert after > 1.5 * before


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
            self.summary[self._summary] = data
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


def opened(page: Path, *, width: int, dark: bool) -> tuple[str, dict[str, Any]]:
    """The document as a browser has it, and what a script inside measured."""
    probed = page.with_name(f"probed-{width}-{dark}.html")
    probed.write_text(page.read_text().replace("</body>", PROBE))
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
    assert page.values["all", "speedup"] == [
        pytest.approx(Acceptance.load(run / "acceptance-decoded.json").total().speedup)
    ]
    assert page.summary["tau"] == looks[390, False][1]["shown"] == f"{suites.total().tau:.3f}"
    assert page.summary["car_1"] == f"{suites.total().car[0]:.3f}"
    assert page.depths == [depth for text in read_samples(run / "samples.json") for depth in text.depths]
    assert page.depths
    # Two sections, with two charts and one for each suite where there are several, and the training curves.
    assert looks[1280, False][1]["charts"] == 4 + len(held_out.suites) + 4


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
    for name in ("page-acceptance-1.png", "page-training.png"):
        assert (run.parent / name).read_bytes().startswith(b"\x89PNG")
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
        del content["settings"]
        for suite in content["suites"].values():
            for key in ("rows", "settings", "control"):
                del suite[key]
        (run / name).write_text(json.dumps(content))
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "No paired changes" in text
    assert "no counts by prompt (schema 1)" in text
