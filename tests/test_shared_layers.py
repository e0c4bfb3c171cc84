"""Heads behind adapted copies of the trunk's last layers: trained, saved, measured and decoded as all heads are."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from architectures import SIZES, plain_text, random_tokens
from kinds import random_kind, settings
from test_decode_sampling import chi_square, small_world
from test_evaluate import both
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from mtpd.alignment import IGNORED
from mtpd.cli import main
from mtpd.data.disk_store import DiskStore
from mtpd.data.models import load_model
from mtpd.data.packing import Sample, pack
from mtpd.data.store import store_key
from mtpd.decode.chances import Chances
from mtpd.decode.engine import Engine
from mtpd.decode.planner import Planner
from mtpd.decode.sampling import SampledDrafts, Sampling
from mtpd.decode.text import Request
from mtpd.errors import MtpdError, UserError
from mtpd.formats.export import unfit
from mtpd.formats.layouts import LAYOUTS
from mtpd.heads import Heads, HeadsConfig, Readout, build_heads, configure_heads, load_heads, save_heads, start_heads
from mtpd.heads.shared_layers.heads import SharedLayerHeads
from mtpd.heads.shared_layers.start import initialise
from mtpd.losses.settings import LossSettings
from mtpd.train.model import DistillModel
from mtpd.trunk import Trunk

LAYERS, LIMIT = 5, 16
FORMS = ("cp", "btree-full", "decoder", "medusa")


@functools.cache
def deep() -> Trunk:
    """A trunk of five layers. No test may change it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(SIZES | {"num_hidden_layers": LAYERS}))
    return Trunk(LlamaForCausalLM(config).eval(), tokens=120)


def shared(trunk: Trunk, form: str, layers: int, *, depth: int = 3, std: float = 0.25) -> SharedLayerHeads:
    """Heads with random weights and adapters, in eval mode."""
    chosen = settings(form, depth=depth) | {"shared_layers": layers}
    heads = build_heads(trunk, configure_heads(chosen, trunk, vocabulary=0, fingerprint=""))
    assert isinstance(heads, SharedLayerHeads)
    heads.inner.load_state_dict(random_kind(trunk, form, depth=depth, std=std).state_dict())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in heads.adapters.parameters():
            parameter.normal_(std=std, generator=generator)
    return heads.eval()


@functools.cache
def text_of(trunk: Trunk, length: int) -> tuple[list[int], list[int]]:
    prompt = random_tokens(length, seed=length)
    return prompt.tolist(), plain_text(trunk, prompt, GenerationConfig(max_new_tokens=LIMIT))


def logits_along(trunk: Trunk, heads: Heads, ids: Tensor, positions: Tensor) -> Tensor:
    states = trunk.states(ids, position_ids=positions, before_last=heads.shared_layers)[1]
    along = heads.along(trunk, states, ids, position_ids_BT=positions)
    return torch.stack([along.logits(depth, torch.arange(ids.numel())) for depth in range(1, heads.depth + 1)])


def taught(trunk: Trunk, heads: Heads, prompt: list[int], text: list[int], steps: int) -> Heads:
    """Heads that draft some tokens of a text right."""
    ids = torch.tensor([prompt + text])
    labels = torch.tensor([[IGNORED] * len(prompt) + text])
    positions = torch.arange(ids.shape[1])[None]
    model = DistillModel(trunk, heads.train(), LossSettings((1.0,) * heads.depth, (0.0,) * heads.depth))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    for _ in range(steps):
        model(ids, labels, positions)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return heads.eval()


@pytest.mark.parametrize("before_last", [1, 3])
def test_a_trunk_in_two_parts(trunk: Trunk, before_last: int) -> None:
    """Fault: layers of another kind, mask or number in the upper part; an embedding that is scaled twice."""
    ids = random_tokens(2, 24)
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    if trunk.recurrent:
        positions = torch.arange(24).expand(2, -1)
    whole, below = trunk.states(ids, position_ids=positions, before_last=before_last)
    torch.testing.assert_close(whole, trunk.hidden(ids, position_ids=positions))
    assert not torch.equal(whole, below)


@pytest.mark.parametrize("form", FORMS)
def test_new_adapters_add_nothing(form: str) -> None:
    """Fault: adapters that begin with weights; heads that read the states below them, or those of another document."""
    trunk = deep()
    plain, ids = random_kind(trunk, form), random_tokens(2, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)]).expand(2, -1)
    for layers in (1, 4, LAYERS):
        heads = shared(trunk, form, layers)
        changed = logits_along(trunk, heads, ids, positions)
        initialise(heads, seed=3)
        torch.testing.assert_close(
            logits_along(trunk, heads, ids, positions), logits_along(trunk, plain, ids, positions)
        )
        assert (changed - logits_along(trunk, plain, ids, positions)).abs().max() > 0.1


@pytest.mark.parametrize(("form", "layers"), [("cp", 1), ("medusa", 2), ("decoder", 4)])
def test_decoding_and_offline_counts(form: str, layers: int) -> None:
    """Fault: drafts from adapted states of another position, slot or round; texts that change."""
    trunk = deep()
    texts = [text_of(trunk, length) for length in (1, 5, 20)]
    heads = taught(trunk, shared(trunk, form, layers), *texts[1], steps=20)
    # Texts end at different times, and others move into their slots.
    requests = [Request(prompt, LIMIT - 5 * (number % 2)) for number, (prompt, _) in enumerate(texts)]
    for plan in (None, Planner(Chances(), None, nodes=6)):
        for text in Engine(trunk, heads, slots=2, capacity=64, planner=plan).run(requests):
            assert text.tokens == texts[text.number][1][: requests[text.number].max_new_tokens]
    samples = [Sample.of(str(number), *text) for number, text in enumerate(texts)]
    offline, decoded = both(trunk, heads, samples, [], LIMIT)
    assert offline == decoded
    assert sum(suite["accepted"][0] for suite in offline.values()) > 0


def test_sampled_drafts_are_exact() -> None:
    """Fault: verification by the adapted layers instead of the plain ones."""
    trunk, _ = small_world()
    heads = shared(trunk, "cp", 1, depth=2, std=0.8)
    length, size, prompt = 3, 5, [1, 4]
    texts = torch.tensor(list(itertools.product(range(size), repeat=length)))
    whole = torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], dim=1)
    logits = trunk.unembedding(trunk.hidden(whole))[:, len(prompt) - 1 : -1]
    each = Sampling().distribution(logits.flatten(0, 1)).view(len(texts), length, size)
    exact = each.gather(2, texts[..., None])[..., 0].double().prod(1)
    found = torch.zeros(size**length)
    engine = Engine(trunk, heads, slots=1000, capacity=len(prompt) + length, choice=SampledDrafts())
    for text in engine.run(Request(prompt, length, seed) for seed in range(3000)):
        a, b, c = text.tokens
        found[(a * size + b) * size + c] += 1
    assert chi_square(found, exact) < 4.5


def test_gradients_and_what_is_saved(tmp_path: Path) -> None:
    """Fault: gradient in the trunk or none in an adapter; the trunk's layers among the weights, or adapters lost."""
    trunk = deep()
    heads = shared(trunk, "hmm", 2).train()
    ids = random_tokens(2, 20)
    positions = torch.arange(20).expand(2, -1)
    model = DistillModel(trunk, heads, LossSettings((0.5,) * 3, (1.0,) * 3, top_n=20))
    loss = model(ids, ids, positions)["loss"]
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in heads.parameters())
    assert all(parameter.grad is None for parameter in trunk.parameters())
    assert sum(each.numel() for each in heads.adapters.parameters()) == 2 * 16 * (2 * 64 + 2 * 48 + 3 * 80)
    kept = trunk.hidden(ids, position_ids=positions, before_last=2)
    torch.testing.assert_close(model(ids, ids, positions, hidden=kept)["loss"], loss)
    save_heads(heads, tmp_path)
    loaded = load_heads(tmp_path, trunk)
    assert set(loaded.state_dict()) == {f"adapters.{name}" for name in heads.adapters.state_dict()} | {
        f"inner.{name}" for name in heads.inner.state_dict()
    }
    torch.testing.assert_close(
        logits_along(trunk, loaded, ids, positions), logits_along(trunk, heads.eval(), ids, positions)
    )


def test_another_trunk_of_the_same_weights() -> None:
    """Fault: the layers of the trunk that heads were made with, where they are used with one of another precision."""
    trunk = deep()
    heads = shared(trunk, "cp", 2)
    ids, positions = random_tokens(1, 12), torch.arange(12)[None]
    before = logits_along(trunk, heads, ids, positions)
    other = Trunk(LlamaForCausalLM(trunk.model.config).eval(), tokens=120)
    other.model.load_state_dict(trunk.model.state_dict())
    with torch.no_grad():
        other.decoder.layers[-1].mlp.down_proj.weight.mul_(3.0)
    changed = logits_along(other, heads, ids, positions)
    assert (changed - before).abs().max() > 1e-3
    torch.testing.assert_close(logits_along(trunk, heads, ids, positions), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"shared_layers": 6},
            r"shared_layers: 6 is more than the 5 layers of LlamaForCausalLM; accepted: 0 to 5",
        ),
        (
            {"shared_layers": 1, "kind": "chain", "parallel": {}},
            r"shared_layers: 1 is not accepted with heads\.kind: ch",
        ),
    ],
)
def test_bad_values(change: dict[str, Any], message: str) -> None:
    """Fault: a layer that is not there is an index error."""
    chosen = settings("linear") | change
    with pytest.raises(UserError, match=message):
        configure_heads(chosen, deep(), vocabulary=0, fingerprint="")


def test_a_trunk_that_changes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: adapters on layers that are trained themselves, whose states no store holds."""
    words = ["heads.kind=parallel", "heads.shared_layers=1", "trunk.train=lora"]
    assert main(["recipe", "check", "recipes/smoke.yaml", *words]) == 2
    assert "heads.shared_layers: 1 is not accepted with trunk.train: lora" in capsys.readouterr().err


def test_starts_are_fitted_to_the_trunks_states() -> None:
    """Fault: a regression on the states below the shared layers, which heads never read."""
    trunk = deep()
    ids = random_tokens(4, 40)
    positions = torch.arange(40).expand(4, -1)
    found = []
    for layers in (0, 2):
        chosen = settings("cp") | {"shared_layers": layers}
        heads = build_heads(trunk, configure_heads(chosen, trunk, vocabulary=0, fingerprint=""))
        hidden = trunk.hidden(ids, position_ids=positions, before_last=layers)
        batch = {"input_ids": ids, "labels": ids, "position_ids": positions, "hidden": hidden}
        start_heads(heads, trunk, "regression", lambda batch=batch: [batch])
        found.append(logits_along(trunk, heads.eval(), ids, positions))
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)
    readout = Readout.of(trunk, None)
    assert readout.main.weight.shape[0] == 120


def test_a_run_by_recipe(tmp_path: Path) -> None:
    """Fault: a step of a run, its store or loading it later that takes other states than these heads read."""
    folder = tmp_path / "run"
    words = ["recipes/smoke.yaml", f"output={folder}", "data.limit=4", "data.max_new_tokens=8", "train.max_steps=2"]
    words += ["evaluation.prompts_limit=1", "evaluation.max_new_tokens=6", "evaluation.decode_prompts=1"]
    words += ["heads.kind=circuit", "heads.circuit.structure=btree", "train.loss=ce", "heads.shared_layers=1"]
    assert main(["distill", *words, "--dry-run"]) == 0
    assert main(["distill", *words]) == 0
    suite = next(iter(json.loads((folder / "acceptance-decoded.json").read_text())["suites"].values()))
    assert suite["identical"] == suite["prompts"]
    assert main(["generate", str(folder), "--prompt", "Hello", "--max-new-tokens", "6"]) == 0
    key = json.loads((folder / "hidden-states" / "index.json").read_text())["key"]
    assert key["layers above (heads.shared_layers)"] == "1"


def test_layers_that_are_not_there_are_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a mistake in the heads shows after the trunk has answered all prompts."""
    words = ["recipes/smoke.yaml", f"output={tmp_path / 'run'}", "heads.kind=medusa", "heads.shared_layers=9"]
    for command in (["distill"], ["data", "store"]):
        assert main([*command, *words]) == 2
        assert "heads.shared_layers: 9 is more than the " in capsys.readouterr().err
    assert not (tmp_path / "run" / "responses.jsonl").exists()


def test_what_no_engine_serves() -> None:
    """Fault: an export without the adapters, which drafts something else than what was trained."""
    config = HeadsConfig(kind="medusa", depth=2, hidden_size=32, columns=128, shared_layers=2, adapter_rank=4)
    run: Any = SimpleNamespace(config=config)
    assert "the heads read 2 adapted layers of the trunk" in str(unfit(run, LAYOUTS["medusa"]))


def test_states_of_other_layers_are_refused(tmp_path: Path) -> None:
    """Fault: a store of the trunk's own states read as those below the shared layers."""
    rows = pack([Sample.of("0", [1, 2], [3] * 20)], row_length=24)
    tokenizer: Any = load_model("tiny", device="cpu")[1]
    keys = [store_key("trunk", tokenizer, ["p"], rows, before_last=layers) for layers in (0, 2)]
    for key, other in (keys, keys[::-1]):
        folder = tmp_path / str(len(key))
        store = DiskStore(folder, deep(), rows, key=key)
        store.put([0], torch.zeros(1, 24, deep().hidden_size))
        store.flush()
        with pytest.raises(MtpdError, match=r"other layers above \(heads\.shared_layers\); delete"):
            DiskStore(folder, deep(), rows, key=other)
