"""The commands on the decoder, and `mtpd.load`, on a run of a tiny model."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import new_heads
from seals import edited

import mtpd
from mtpd.cli import main
from mtpd.data.models import load_model, trunk_fingerprint
from mtpd.decode.drafting import Drafting
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import RANDOM
from mtpd.evaluate.depths import Depth, Depths
from mtpd.files import fingerprint_file
from mtpd.heads import save_heads
from mtpd.recipe import dump, parse_recipe
from mtpd.run.loading import load, write_drafting
from mtpd.trunk import Trunk


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


def test_load(finished: Path) -> None:
    """Fault: heads of a run that are not used, or used with other settings than asked for."""
    model = mtpd.load(finished)
    inputs = model.tokenizer("hello", return_tensors="pt")
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), plain("hello", 20)[0])
    assert len(model.counts[0].drafted) == 3
    assert mtpd.load(finished, depth=2).drafting.depth == 2
    half = load(finished, dtype="bfloat16")
    assert half.trunk.dtype == torch.bfloat16
    assert half.heads is not None
    assert {parameter.dtype for parameter in half.heads.parameters()} == {torch.bfloat16}


def test_load_refuses(run: Path, tmp_path: Path) -> None:
    """Fault: a traceback, or text from heads that belong to another model."""
    with pytest.raises(UserError, match="no such directory|holds no run"):
        load(tmp_path / "nowhere")
    for depth in (0, 4):
        with pytest.raises(UserError, match=f"depth: {depth} is not accepted; accepted: 1 to 3"):
            load(run, depth=depth)
    config = run / "heads" / "config.json"
    right = config.read_text()
    edited(config, trunk="0" * 64)
    with pytest.raises(UserError, match="belong to another trunk"):
        load(run)
    config.write_text(right)
    stored = run / "heads" / "decoding.json"
    stored.write_text('{"depth": 9}')
    with pytest.raises(UserError, match="depth: 9 is not accepted; accepted: 1 to 3"):
        load(run)
    stored.write_text('{"depth": 0}')
    with pytest.raises(UserError, match=r"decoding.json: cannot be read"):
        load(run)
    stored.unlink()
    (run / "heads" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no heads"):
        load(run)


def test_what_was_tuned_is_used(run: Path) -> None:
    """Fault: a depth and threshold that are stored and never read."""
    wanted = Drafting(depth=2, threshold=0.25)
    write_drafting(run / "heads", wanted)
    assert load(run).drafting == wanted
    assert load(run, depth=3).drafting == Drafting(depth=3)


def test_drafts_are_as_many_as_the_run_found_fastest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a run that decodes fastest with two drafts is generated from with all its heads."""
    recipe = (run / "recipe.yaml").read_text()
    assert load(run).drafting.depth == 3
    (run / "recipe.yaml").write_text(recipe.replace("decode_depth: null", "decode_depth: 2"))
    assert load(run).drafting.depth == 2
    arguments = ["generate", str(run), "--max-new-tokens", "8", "--raw", "--prompt", "hello"]
    assert main(arguments) == 0
    assert "up to 2 drafts a round" in capsys.readouterr().err
    rates = (20.0, 30.0, 28.0, 26.0)
    timed = [Depth(depth=k, tokens_per_second=rate, round_ms=1, draft_ms=0) for k, rate in enumerate(rates)]
    found = Depths(prompts=1, max_new_tokens=8, dtype="float32", plain_tokens_per_second=9.0, depths=timed)
    found.save(run / "depths.json")
    assert load(run).drafting.depth == 1
    slower = [each.model_copy(update={"tokens_per_second": 40.0 - each.depth}) for each in timed]
    found.model_copy(update={"depths": slower}).save(run / "depths.json")
    assert load(run).drafting.depth == 1
    write_drafting(run / "heads", Drafting(depth=3, siblings=1))
    assert load(run).drafting == Drafting(depth=3, siblings=1)
    assert main([*arguments, "--depth", "2"]) == 0
    assert "up to 2 drafts a round" in capsys.readouterr().err


def test_generate(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: another text than plain decoding writes, or characters of several tokens torn apart."""
    arguments = ["generate", str(finished), "--max-new-tokens", "40", "--raw"]
    assert main([*arguments, "--prompt", "hello"]) == 0
    shown = capsys.readouterr()
    assert shown.out == plain("hello", 40)[1] + "\n"
    assert "40 tokens in " in shown.err
    assert "tokens/s" in shown.err
    assert "tau" in shown.err
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
    "depth": (["generate", "RUN", "--prompt", "a", "--depth", "0"], "depth: 0 is not accepted; accepted: 1 to 3"),
    "too long": (["generate", "RUN", "--raw", "--prompt", "a" * 5000], "for a context of"),
    "number format": (
        ["generate", "RUN", "--prompt", "a", "--dtype", "int8"],
        "'int8' is not one of 'auto', 'float32'",
    ),
    "no such way": (["bench", "RUN", "--against", "magic"], "--against: magic is not accepted; accepted: plain"),
    "batch": (["bench", "RUN", "--against", "transformers", "--batch", "2"], "takes one prompt at a time"),
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


def test_bench(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: ways that write different texts compared as if they were equal; a result of tuning that is not stored."""
    suite = tmp_path / "suite.jsonl"
    suite.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abc", "hello there", "x")))
    limits = ["--suite", str(suite), "--prompts", "2", "--max-new-tokens", "12", "--runs", "1"]
    assert main(["bench", str(run), *limits, "--against", "plain,transformers,engine", "--tune"]) == 0
    out = capsys.readouterr().out
    for way in ("plain", "transformers", "engine"):
        [line] = [line for line in out.splitlines() if line.startswith(f"{way}: ")]
        assert line.endswith("2 of 2 texts the same")
    assert "bookkeeping" in out
    depths = Depths.load(run / "depths.json")
    assert ([each.depth for each in depths.depths], depths.prompts) == ([0, 1, 2, 3], 2)
    assert depths.heads == fingerprint_file(run / "heads" / "model.safetensors")
    for each in depths.depths:
        assert each.part_ms is not None
        assert each.round_ms == pytest.approx(sum(each.part_ms.values()))
        assert (each.part_ms["drafts"] > 0) == (each.depth > 0)
        assert min(each.part_ms[part] for part in ("trunk", "verification", "bookkeeping")) > 0
    stored = Drafting.model_validate_json((run / "heads" / "decoding.json").read_text())
    found = f"depth {stored.depth}, siblings {stored.siblings}, threshold {stored.threshold:g}"
    assert out.startswith(f"{found}: ")
    assert f"a round: {found}\n" in out
    assert main(["bench", str(run), *limits, "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 at a time" in out
    # The model is random, and a speed-up over generate never stands alone.
    assert RANDOM in out
    assert [line.split(":")[0] for line in out.splitlines() if "mtpd is" in line] == ["plain", "engine"]
