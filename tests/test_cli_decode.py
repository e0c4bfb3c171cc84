"""The commands on the decoder, and `mtpd.load`, on a run of a tiny model."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import new_heads
from conftest import Learned
from seals import edited

import mtpd
from mtpd.cli import bench, main
from mtpd.data.models import load_model, trunk_fingerprint
from mtpd.decode.chances import Chances, write_chances
from mtpd.decode.costs import measure_costs
from mtpd.decode.drafting import HEADS, LOOKUP, SOURCES, Drafting
from mtpd.decode.model import Model
from mtpd.decode.planner import Costs
from mtpd.decode.speed import WAYS, compare
from mtpd.decode.stream_text import Session, Shown, settings
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import RANDOM
from mtpd.evaluate.depths import Depths
from mtpd.files import fingerprint_file
from mtpd.heads import save_heads
from mtpd.recipe import dump, parse_recipe
from mtpd.run.loading import load, read_settings
from mtpd.trunk import Trunk

SUMMARY = re.compile(
    r"\d+ tokens in \d+ passes of the model \(tau \d+\.\d\d\); drafts accepted: (?P<drafts>.*); \d+\.\d tokens/s"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as training leaves it."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    recipe = parse_recipe({"model": "tiny", "dtype": "float32", "device": "cpu", "heads": {"depth": 3}})
    (run / "recipe.yaml").write_text(dump(recipe))
    model, _ = load_model("tiny", dtype="float32", device="cpu")
    heads = new_heads(Trunk(model), "copy_last_k", depth=3, fingerprint=trunk_fingerprint(model))
    save_heads(heads, run / "heads")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def plain(prompt: str, tokens: int) -> tuple[Any, str]:
    model, tokenizer = load_model("tiny", dtype="float32", device="cpu")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output: Any = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return output, tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_load(finished: Path, free_drafts: None) -> None:
    """Fault: heads of a run that are not used, or used with other settings than asked for."""
    model = mtpd.load(finished)
    inputs = model.tokenizer("hello", return_tensors="pt")
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), plain("hello", 20)[0])
    assert model.acceptance.sources
    chain = mtpd.load(finished, drafting={"depth": 2})
    assert torch.equal(chain.generate(**inputs, max_new_tokens=20, do_sample=False), plain("hello", 20)[0])
    assert len(chain.counts[0].drafted) == 2
    half = load(finished, dtype="bfloat16")
    assert half.trunk.dtype == torch.bfloat16
    assert half.heads is not None
    assert {parameter.dtype for parameter in half.heads.parameters()} == {torch.bfloat16}


def test_load_refuses(run: Path, tmp_path: Path) -> None:
    """Fault: a traceback, or text from heads that belong to another model."""
    with pytest.raises(UserError, match="no such directory|holds no run"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="depth: 4 is not accepted; accepted: 1 to 3"):
        load(run, drafting={"depth": 4})
    config = run / "heads" / "config.json"
    right = config.read_text()
    edited(config, trunk="0" * 64)
    with pytest.raises(UserError, match="belong to another trunk"):
        load(run)
    config.write_text(right)
    write_chances(run / "heads", Chances(likeliest={"1": (3, 4)}))
    assert load(run).chances.likeliest == {"1": (3, 4)}
    chances = run / "heads" / "chances.json"
    chances.write_text(chances.read_text().replace("[3, 4]", "[4, 4]"))
    with pytest.raises(UserError, match=r"heads/chances\.json: not counts of drafts: it is damaged or was edited"):
        load(run)
    chances.write_text('{"likeliest": 7}')
    with pytest.raises(UserError, match=r"heads/chances\.json: cannot be read; delete it"):
        load(run)
    chances.unlink()
    (run / "heads" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no heads"):
        load(run)


def test_what_drafts_is_read(finished: Path) -> None:
    """Fault: a setting that nobody reads, or that says another thing than it did."""
    assert read_settings("auto") == Drafting() == Drafting(sources=SOURCES, depth=None, sampled=False)
    assert read_settings({"sources": ["lookup"]}) == Drafting(sources=(LOOKUP,))
    assert read_settings({"depth": 2, "sampled": True}) == Drafting(depth=2, sampled=True)
    assert read_settings(Drafting(depth=1)) == Drafting(depth=1)
    assert load(finished, drafting=Drafting(sources=(HEADS,))).sources == [HEADS]


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ("always", "drafting: "),
        ({"sources": ["heads", "tree"]}, "drafting.sources.1: "),
        ({"sources": []}, "drafting.sources: "),
        ({"depth": 0}, "drafting.depth: "),
        ({"tree": 16}, "drafting.tree: "),
        ({"threshold": 0.1, "depth": 2}, "drafting.threshold: "),
    ],
)
def test_unknown_settings_are_one_line(given: Any, where: str, finished: Path) -> None:
    """Fault: a slip that is passed over, or a traceback that does not say what there is."""
    with pytest.raises(UserError) as caught:
        load(finished, drafting=given)
    said = str(caught.value)
    assert said.startswith(where)
    assert said.endswith(
        "; accepted: auto, or a mapping of sources (a list of heads, lookup, corpus), depth and sampled"
    )
    assert "\n" not in said


def test_settings_of_an_earlier_version_are_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: a file that decided how far to draft is read by half, or passed over without a word."""
    load(run)
    assert not caplog.records
    old = run / "heads" / "decoding.json"
    for content in ('{"depth": 2, "threshold": 0.25, "siblings": 1}', "damaged"):
        caplog.clear()
        old.write_text(content)
        assert load(run).drafting == Drafting()
        [record] = caplog.records
        assert record.getMessage().startswith(f"{old}: is of an earlier version and not read: ")
        assert record.getMessage().endswith("delete the file")
        assert "\n" not in record.getMessage()


def test_generate(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: another text than plain decoding writes, or characters of several tokens torn apart."""
    arguments = ["generate", str(finished), "--max-new-tokens", "40", "--raw"]
    assert main([*arguments, "--prompt", "hello"]) == 0
    shown = capsys.readouterr()
    assert shown.out == plain("hello", 40)[1] + "\n"
    assert SUMMARY.fullmatch(shown.err.splitlines()[-1])
    assert shown.err.splitlines()[-1].startswith("40 tokens in ")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert main(arguments) == 0
    assert capsys.readouterr().out == shown.out
    random = ["--prompt", "hello", "--temperature", "1", "--top-p", "0.9", "--seed"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*arguments, *random, seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


MISTAKES = {
    "no run": (["generate", "nowhere", "--prompt", "a"], "nowhere: no such directory"),
    "no prompt": (["generate", "RUN", "--prompt", " "], "prompt: it is empty"),
    "depth": (["generate", "RUN", "--prompt", "a", "--depth", "4"], "depth: 4 is not accepted; accepted: 1 to 3"),
    "source": (
        ["generate", "RUN", "--prompt", "a", "--sources", "tree"],
        "--sources: tree is not accepted; accepted: ",
    ),
    "too long": (["generate", "RUN", "--raw", "--prompt", "a" * 5000], "for a context of"),
    "number format": (
        ["generate", "RUN", "--prompt", "a", "--dtype", "int8"],
        "'int8' is not one of 'auto', 'float32'",
    ),
    "no such way": (["bench", "RUN", "--against", "magic"], "--against: magic is not accepted; accepted: plain"),
    **{
        f"batch of {way}": (
            ["bench", "RUN", "--against", f"plain,{way}", "--batch", "2", *more],
            f"batch: 2 is not accepted with {way}, which takes one prompt at a time; accepted: 1",
        )
        for way, more in (("lookup", []), ("transformers", []), ("assistant", ["--assistant", "tiny"]))
    },
    "no assistant": (["bench", "RUN", "--against", "assistant"], "--assistant: goes with --against assistant"),
    "no suite": (["bench", "RUN", "--suite", "nothing.jsonl"], "nothing.jsonl"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a traceback, or a line that does not say what to change."""
    words, line = MISTAKES[mistake]
    assert main([str(finished) if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err.strip()
    assert line in error
    assert error.count("\n") == 0


def test_chat(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an answer that forgets what was said before, or a talk that does not end."""
    model, tokenizer = load_model("tiny", dtype="float32", device="cpu")
    assert tokenizer.chat_template
    lines = iter(["hi", "and then?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", str(finished), "--max-new-tokens", "12"]) == 0
    shown = capsys.readouterr().out
    messages: list[dict[str, str]] = []
    expected = ""
    for said in ("hi", "and then?"):
        messages.append({"role": "user", "content": said})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        output: Any = model.generate(ids, max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert shown == expected


def test_accepted_drafts_have_the_colour_of_their_source(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, free_drafts: None
) -> None:
    """Fault: a colour or a count of another source; a piece of text that is lost between two colours."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _, text = plain("hello", 90)
    colours = {HEADS: "\x1b[32m", LOOKUP: "\x1b[36m"}
    for sources in ((HEADS,), (LOOKUP,), (HEADS, LOOKUP)):
        words = ["generate", str(finished), "--raw", "--prompt", "hello", "--max-new-tokens", "90"]
        assert main([*words, "--sources", ",".join(sources)]) == 0
        shown = capsys.readouterr()
        assert re.sub(r"\x1b\[\d+m", "", shown.out) == text + "\n"
        found = SUMMARY.fullmatch(shown.err.splitlines()[-1])
        assert found is not None
        for source, colour in colours.items():
            count = re.search(rf"(\d+) from {source}", found["drafts"])
            assert (count is not None) == (source in sources)
            # A character of several tokens is one piece, in the colour of the last of them.
            assert shown.out.count(colour) <= (0 if count is None else int(count[1]))
            assert (shown.out.count(colour) > 0) == (source in sources)


def test_what_is_shown_is_what_was_drafted(finished: Path, free_drafts: None) -> None:
    """Fault: the source of one token is shown at another, above all in the round in which the text ends."""
    session = Session(load(finished), settings(0.0, 1.0, 0))
    for limit in range(60, 66):
        pieces: list[tuple[str, str | None]] = []
        text = session.write(
            list(session.model.tokenizer("hello")["input_ids"]),
            limit,
            show=lambda *shown, pieces=pieces: pieces.append(shown),
        )
        assert len(text.drafted_by()) == len(text.tokens) == limit
        shown = Shown(session.model.tokenizer, None, session.ends)
        expected = []
        for token, (source, _) in zip(text.tokens, text.drafted_by(), strict=True):
            before = shown.text
            shown.put(token, source)
            if len(shown.text) > len(before):
                expected.append((shown.text[len(before) :], source))
        assert pieces[: len(expected)] == expected
        # What is left is the beginning of a character that is not whole.
        assert len(pieces) <= len(expected) + 1
        counts = text.counts(0)
        drafted = [source for source, _ in text.drafted_by() if source is not None]
        assert {source: drafted.count(source) for source in drafted} == {
            source: sum(by_depth) for source, by_depth in counts.sources.items()
        }
        assert counts.forwards == 1 + len(text.rounds)


def suite_of(folder: Path) -> list[str]:
    """Two short prompts for `mtpd bench`."""
    suite = folder / "suite.jsonl"
    suite.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abc", "hello there", "x")))
    return ["--suite", str(suite), "--prompts", "2", "--max-new-tokens", "12", "--runs", "1"]


def test_bench(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: ways that write different texts compared as if they were equal; one that is left out."""
    limits = suite_of(tmp_path)
    ways = [*bench.WAYS]
    assert main(["bench", str(run), *limits, "--against", ",".join(ways), "--assistant", "tiny"]) == 0
    out = capsys.readouterr().out
    for way in ways:
        [line] = [line for line in out.splitlines() if line.startswith(f"{way}: ")]
        assert line.endswith("2 of 2 texts the same"), line
    assert [line.split(":")[0] for line in out.splitlines() if "tokens/s, " in line] == ["mtpd", *ways]
    assert "bookkeeping" in out
    assert re.search(r"^a pass over 1, 8 and 32 tokens takes [\d.]+, [\d.]+, [\d.]+ ms, a head [\d.]+ ms$", out, re.M)
    depths = Depths.load(run / "depths.json")
    assert ([each.depth for each in depths.depths], depths.prompts) == ([0, 1, 2, 3], 2)
    assert depths.heads == fingerprint_file(run / "heads" / "model.safetensors")
    for each in depths.depths:
        assert each.part_ms is not None
        assert each.round_ms == pytest.approx(sum(each.part_ms.values()))
        assert (each.part_ms["drafts"] > 0) == (each.depth > 0)
        assert min(each.part_ms[part] for part in ("trunk", "verification", "bookkeeping")) > 0
    assert main(["bench", str(run), *limits, "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 at a time" in out
    # The model is random, and a speed-up over generate never stands alone.
    assert RANDOM in out
    assert [line.split(":")[0] for line in out.splitlines() if "mtpd is" in line] == ["plain", "engine"]


def test_bench_measures_times_anew(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: `--tune` that takes the times of another day, or times that are measured in every call."""
    monkeypatch.setattr("mtpd.decode.costs.CACHE", tmp_path / "cache")
    measured: list[Costs] = []

    def watched(*args: Any) -> Costs:
        measured.append(measure_costs(*args))
        return measured[-1]

    monkeypatch.setattr("mtpd.decode.costs.measure_costs", watched)
    counts = []
    for further in ([], [], ["--tune"], []):
        assert main(["bench", str(run), *suite_of(tmp_path), *further]) == 0
        counts.append(len(measured))
        said = ", ".join(f"{1000 * measured[-1].of_pass(size):.1f}" for size in (1, 8, 32))
        assert f"a pass over 1, 8 and 32 tokens takes {said} ms" in capsys.readouterr().out
    assert counts == [1, 1, 2, 2]


def test_all_ways_write_the_same_text(learned: Learned, free_drafts: None) -> None:
    """Fault: a way that is fast because it writes something else; counts of the drafts of another way."""
    for heads in (learned.half, learned.perfect):
        model = Model(learned.trunk, heads)
        prompts = [learned.sample.prompt_ids, learned.sample.ids[:9]]
        speeds = compare(
            model, prompts, ways=[*WAYS], max_new_tokens=30, end_tokens=(126,), runs=2, assistant=learned.trunk.model
        )
        assert [*speeds] == [*WAYS]
        response = learned.sample.response_ids
        for way, speed in speeds.items():
            assert speed.texts == [response[:30], response[4:34]], way
            assert (speed.tokens, len(speed.seconds)) == (60, 2)
        drafted = {way: speed.counts.sources for way, speed in speeds.items() if speed.counts is not None}
        assert {way: set(sources) for way, sources in drafted.items() if way not in ("own-lookup", "mtpd")} == {
            "engine": set(),
            "chain": {HEADS},
            "heads": {HEADS},
        }
        assert HEADS not in drafted["own-lookup"]


def test_ways_that_are_refused(learned: Learned) -> None:
    """Fault: a way whose name was misspelt, or whose model is missing, is left out without a word."""
    model = Model(learned.trunk, learned.half)
    prompts = [learned.sample.prompt_ids]
    with pytest.raises(UserError, match="against: look-up is not known; accepted: plain, engine, lookup, "):
        compare(model, prompts, ways=("mtpd", "look-up"))
    with pytest.raises(UserError, match="assistant needs a smaller model .* name it with --assistant"):
        compare(model, prompts, ways=("assistant",))
    for way in ("lookup", "assistant", "transformers"):
        with pytest.raises(UserError, match=f"batch: 2 is not accepted with {way}, .* accepted: 1"):
            compare(model, prompts, ways=("mtpd", way), batch=2)
    with pytest.raises(UserError, match="there are no heads to measure"):
        compare(Model(learned.trunk, None), prompts, ways=("chain",))
