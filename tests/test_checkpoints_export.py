"""Exports: transformers decodes with them, engines' layouts hold what they should, and misfits are refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import architectures
import native_checkpoints as native
import pytest
import torch
from conftest import learn
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtpd.cli import main
from mtpd.decode.greedy import generate
from mtpd.errors import MtpdError, UserError
from mtpd.formats.directory import Checkpoint
from mtpd.formats.engines import with_vllm
from mtpd.formats.export import export
from mtpd.formats.find_heads import find_heads
from mtpd.heads import Heads, HeadsConfig, build_heads, load_heads, save_heads
from mtpd.trunk import Trunk

TOKENS = 24


def finished_run(folder: Path, trunk: Trunk, heads: Heads, *, base: Path | None = None) -> Path:
    """A run directory with these heads, and the checkpoint of its model beside it."""
    checkpoint = base or folder / "base"
    if base is None:
        trunk.model.save_pretrained(checkpoint)
    run = folder / "run"
    save_heads(heads, run / "heads")
    shared = str(heads.config.shared).lower()
    (run / "recipe.yaml").write_text(
        f"model: {checkpoint}\noutput: {run}\nheads: {{depth: {heads.depth}, shared: {shared}}}\n"
    )
    return run


def llama_run(folder: Path, *, depth: int = 1, shared: bool = False) -> Path:
    trunk = architectures.tiny_trunk("llama")
    return finished_run(folder, trunk, architectures.random_heads(trunk, depth=depth, shared=shared))


def accepted_by_place(trunk: Trunk, heads: Heads, prompt: list[int], text: list[int]) -> list[int]:
    """For each number n of tokens written, from 1 on, how many drafts after them are the text's own, to its end."""
    ids = torch.tensor([prompt + text])
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        along = heads.along(trunk, trunk.hidden(ids), ids, position_ids_BT=positions)
        # Head k at position t drafts x_{t+k+1}; after n tokens the newest is x_{t+1}, with t = prompt + n - 2.
        rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        drafts = [along.logits(k, rows).argmax(-1).tolist() for k in range(1, heads.depth + 1)]
    found = []
    for written in range(1, len(text)):
        hits = 0
        while hits < heads.depth and written + hits < len(text) and drafts[hits][written - 1] == text[written + hits]:
            hits += 1
        found.append(hits)
    return found


def passes(accepted: list[int], length: int) -> int:
    """Passes of the trunk over a text of `length` tokens, its end token included if it has one.

    The prompt's pass writes one token. A round writes the accepted drafts and one token more, cut off where the text
    ends, at the limit or at its end token; transformers 5.23 drafts as many as there are heads in every round and cuts
    in the same places, so that the last round is never saved: rounds go on until the text is as long as it will be.
    """
    written, count = 1, 1
    while written < length:
        written += min(accepted[written - 1] + 1, length - written)
        count += 1
    return count


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_transformers_decodes_an_export_as_mtpd_does(name: str, depth: int, tmp_path: Path) -> None:
    """Fault: heads that transformers loads wrongly: another text, or other numbers of passes than our counts say."""
    learned = learn(name)
    heads = learned.half
    if depth == 1:
        heads = copy.deepcopy(learned.half)
        heads.shorten(1)
    run = finished_run(tmp_path, learned.trunk, heads)
    layout, _ = export(run, tmp_path / "out", to="transformers")
    assert layout.name == "hf-mtp"
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    prompt = torch.tensor(learned.sample.prompt_ids)
    seen: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(1))
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    text = model.generate(prompt[None], use_mtp=False, max_new_tokens=TOKENS, eos_token_id=None, **options)
    plain = text[0, len(prompt) :].tolist()
    assert len(seen) == TOKENS
    accepted = accepted_by_place(learned.trunk, heads, prompt.tolist(), plain)
    assert passes(accepted, TOKENS) < TOKENS - 1, "some drafts are accepted"
    # Limits that cut rounds off in different places, and an end token.
    end = plain[-3]
    ways = [(limit, None) for limit in (TOKENS, TOKENS - 1, TOKENS - 2, 5, 2)] + [(TOKENS, end)]
    for limit, token in ways:
        length = limit if token is None else plain.index(token) + 1
        seen.clear()
        text = model.generate(prompt[None], max_new_tokens=limit, eos_token_id=token, **options)
        assert text[0, len(prompt) :].tolist() == plain[:length]
        ends = [] if token is None else [token]
        ours, counts = generate(learned.trunk, heads, prompt, max_new_tokens=limit, end_tokens=ends)
        assert list(ours) == plain[:length]
        assert len(seen) == counts.forwards == passes(accepted, length), (limit, token)


def test_an_exported_directory_is_whole(tmp_path: Path) -> None:
    """Fault: a tokenizer left behind, an index that lacks tensors, a card without the figures or the command."""
    trunk = architectures.tiny_trunk("llama")
    native.save_model(trunk.model, tmp_path / "base")
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=2), base=tmp_path / "base")
    export(run, tmp_path / "unmeasured", to="hf-mtp", perturb=False)
    assert "Not measured." in (tmp_path / "unmeasured" / "README.md").read_text()
    counts = {"prompts": 2, "tokens": 30, "forwards": 20, "drafted": [10, 10], "accepted": [6, 3], "seconds": 1.0}
    measured = {"schema": 1, "mode": "decoded", "sampling": None, "trunk": "a", "heads": "b", "versions": {}}
    (run / "acceptance-decoded.json").write_text(json.dumps({**measured, "suites": {"demo": counts}}))
    export(run, tmp_path / "out", to="hf-mtp", perturb=False)
    found = find_heads(Checkpoint(tmp_path / "out"))
    assert (found.family.name, found.count, found.cannot_run) == ("transformers", 2, None)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "base" / file).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| demo | 2 | 0.600 | 0.300 | 1.90 |" in card
    assert "trust_remote_code=True" in card
    assert "depth: 2" in card
    assert "speed-up" not in card
    # With times, both baselines, and never those of more drafts than the export has.
    counts |= {"plain_seconds": 3.0, "engine_seconds": 1.5}
    (run / "acceptance-decoded.json").write_text(json.dumps({**measured, "suites": {"demo": counts}}))
    export(run, tmp_path / "timed", to="hf-mtp", perturb=False)
    card = (tmp_path / "timed" / "README.md").read_text()
    assert "| tau | speed-up over generate | speed-up over engine without drafts |" in card
    assert "| demo | 2 | 0.600 | 0.300 | 1.90 | 3.00x | 1.50x |" in card
    export(run, tmp_path / "shorter", to="hf-mtp", depth=1, perturb=False)
    card = (tmp_path / "shorter" / "README.md").read_text()
    assert "| demo | 2 | 0.600 | 1.60 |" in card
    assert "speed-up" not in card


@pytest.mark.parametrize("form", ["copies", "shared", "adapters"])
def test_extended_heads_are_written_out(form: Any, tmp_path: Path) -> None:
    """Fault: looped depths that are left out or doubled wrongly, adapters that are dropped without a word."""
    trunk = architectures.tiny_trunk("llama")
    heads = architectures.random_heads(trunk, depth=2).extended(trunk, depth=4, form=form, rank=4)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    written = []
    for name, each in (("own", heads), ("merged", heads.merged())):
        (tmp_path / name).mkdir()
        run = finished_run(tmp_path / name, trunk, each)
        export(run, tmp_path / name / "out", to="hf-mtp", perturb=False)
        written.append(Checkpoint(tmp_path / name / "out").tensors)
    own, merged = written
    assert own.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(own[name].load(), tensor.load(), rtol=0, atol=1e-6)


def test_a_trained_trunk_is_exported(tmp_path: Path) -> None:
    """Fault: heads beside the model that they do not belong to."""
    run = llama_run(tmp_path, depth=1)
    model = copy.deepcopy(architectures.tiny_trunk("llama").model)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2.0)
    model.save_pretrained(run / "trunk")
    export(run, tmp_path / "out", to="hf-mtp", perturb=False)
    tensors = Checkpoint(tmp_path / "out").tensors
    assert torch.equal(tensors["model.embed_tokens.weight"].load(), model.model.embed_tokens.weight)


def test_an_export_that_lost_a_tensor_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a layout that writes less than it should, and a directory that looks finished."""
    from mtpd.formats.layouts import hf_mtp

    run = llama_run(tmp_path, depth=1)
    whole = hf_mtp.as_family

    def lossy(*args: Any, **options: Any) -> Any:
        return {name: tensor for name, tensor in whole(*args, **options).items() if "up_proj" not in name}

    monkeypatch.setattr(hf_mtp, "as_family", lossy)
    with pytest.raises(MtpdError, match=r"up_proj\.weight was not written"):
        export(run, tmp_path / "out", to="hf-mtp")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}


def test_mimo_draft_holds_one_block(tmp_path: Path) -> None:
    """Fault: halves of the projection in chain heads' order, biases missing, the base's tensors repeated."""
    run = llama_run(tmp_path, depth=3, shared=True)
    export(run, tmp_path / "out", to="mimo-draft")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    heads = load_file(run / "heads" / "model.safetensors")
    assert all(name.startswith("model.mtp_layers.0.") for name in tensors)
    ours, theirs = heads["layers.0.project.weight"], tensors["model.mtp_layers.0.input_proj.weight"]
    assert torch.equal(theirs[:, :32], ours[:, 32:])
    assert torch.equal(theirs[:, 32:], ours[:, :32])
    assert not tensors["model.mtp_layers.0.self_attn.q_proj.bias"].any()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["num_nextn_predict_layers"]) == (["MiMoForCausalLM"], 1)


def test_adapters_are_merged(tmp_path: Path) -> None:
    """Fault: extended heads exported without what their depths have learned, or with another scale."""
    trunk = architectures.tiny_trunk("llama")
    config = HeadsConfig(depth=4, hidden_size=32, source_layers=[2, 2], blocks=[0, 1, 0, 1], adapters=[0, 0, 2, 3])
    heads = build_heads(trunk, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    run = finished_run(tmp_path, trunk, heads)
    export(run, tmp_path / "out", to="hf-mtp", perturb=False)
    expected = heads.merged().state_dict()
    for name, tensor in find_heads(Checkpoint(tmp_path / "out")).tensors.items():
        torch.testing.assert_close(tensor.load(), expected[name], msg=name)


def test_medusa_goes_out_and_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: Medusa heads under names that no engine knows, or heads that come back as others."""
    trunk = architectures.tiny_trunk("llama")
    heads = build_heads(trunk, HeadsConfig(kind="medusa", depth=2, hidden_size=32, columns=128))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_()
    run = finished_run(tmp_path, trunk, heads)
    native.edit_config(tmp_path / "base", tie_word_embeddings=False)
    (run / "recipe.yaml").write_text(f"model: {tmp_path / 'base'}\noutput: {run}\nheads: {{kind: medusa, depth: 2}}\n")
    assert main(["export", str(run), "--to", "hf-mtp", "-o", str(tmp_path / "no")]) == 2
    assert "for chain heads, and these are medusa heads; accepted: medusa" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "vllm", "-o", str(tmp_path / "out")]) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["1.0.linear.bias"], heads.state_dict()["layers.1.residual.project.bias"])
    assert main(["import", str(tmp_path / "out"), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "back")]) == 0
    back = load_heads(tmp_path / "back" / "heads", trunk).state_dict()
    assert back.keys() == heads.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in heads.state_dict().items())


MISFITS = {
    "mimo-draft": (["--to", "mimo-draft"], "one block that is used at every depth.*--depth 1, or hf-mtp"),
    "in-place": (["--to", "in-place"], "has no MTP heads.*accepted: hf-mtp"),
    "sglang": (["--to", "sglang"], "no layout fits this run.*mimo-draft:.*different ones"),
    "unknown": (["--to", "tensorrt"], "'tensorrt' is not one of 'transformers', 'vllm'"),
    "too deep": (["--to", "hf-mtp", "--depth", "4"], "depth: 4 is not accepted; accepted: 1 to 3"),
    "exists": (["--to", "hf-mtp", "-o", "{run}"], "output: .* exists; choose another output"),
}


@pytest.fixture(scope="session")
def three_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three different heads."""
    return llama_run(tmp_path_factory.mktemp("export"), depth=3)


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_refused_by_name(
    case: str, three_heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: heads written into a layout that computes something else, or a refusal without the alternative."""
    words, expected = MISFITS[case]
    options = [word.format(run=three_heads) for word in words]
    if "-o" not in options:
        options += ["-o", str(tmp_path / "out")]
    assert main(["export", str(three_heads), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(expected, lines[0]), lines[0]
    assert list(tmp_path.iterdir()) == []


def test_quantised_bases_keep_heads_out_of_their_quantisation(tmp_path: Path) -> None:
    """Fault: a server that takes the 16-bit heads beside an FP8 base for FP8."""
    run = llama_run(tmp_path, depth=1)
    native.edit_config(
        tmp_path / "base", quantization_config={"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    )
    export(run, tmp_path / "out", to="hf-mtp")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head", "model.layers.3"]
    native.edit_config(tmp_path / "base", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match=r"quant_method: gptq is not supported.*accepted: fp8"):
        export(run, tmp_path / "again", to="hf-mtp")
    assert not (tmp_path / "again").exists()


def test_verify_in_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: acceptance counted otherwise than mtpd counts; perturbed heads that nobody would notice."""
    native.save_model(native.base_model("transformers"), tmp_path / "base")
    trunk = Trunk(native.base_model("transformers"))
    run = finished_run(tmp_path, trunk, architectures.new_heads(trunk, "identity", depth=2), base=tmp_path / "base")
    export(run, tmp_path / "out", to="transformers")
    rows = [json.dumps({"prompt": text}) for text in ("one", "two", "three")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    words = ["--engine", "transformers", "--suite", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "40"]
    code = main(["verify", str(tmp_path / "out"), *words])
    # Libraries say things of their own, which come first.
    said = capsys.readouterr().out.splitlines()[-5:]
    assert "3 of 3 texts are the plain model's" in said[0]
    drafts, equal = re.findall(r"(\d+) of (\d+)", said[1])[0]
    assert drafts == equal
    assert said[1].endswith(": EQUAL")
    for line in said[2:4]:
        theirs, ours = re.findall(r"\((\d+ of \d+)\)", line)
        assert theirs == ours
    assert said[2].startswith("CAR_1: engine 0.")
    assert "perturbed heads: CAR_1" in said[4]
    assert code == 0, said
    assert main(["verify", str(tmp_path / "base"), "--engine", "vllm"]) == 2
    assert "has no mtpd.json" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "out"), "--engine", "vllm"]) == 2
    assert "does not load layout hf-mtp; accepted: transformers" in capsys.readouterr().err


def test_an_environment_of_vllm_is_not_put_anywhere(tmp_path: Path) -> None:
    """Fault: packages installed into a folder of something else."""
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="is no virtual environment; accepted: one with vLLM, or a new folder"):
        with_vllm.environment(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
