"""Acceptance: what is measured offline is what decoding does, and files hold counts that are possible."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TOKENS, greedy_text, random_heads, tiny_trunk
from conftest import Learned, learn
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from mtpd import alignment
from mtpd.data.packing import Sample
from mtpd.decode.chances import Chances
from mtpd.decode.model import Model
from mtpd.errors import UserError
from mtpd.evaluate import decoded as decoded_module
from mtpd.evaluate.acceptance import Acceptance, SuiteCounts
from mtpd.evaluate.decoded import measure_decoded, parted_at_tie
from mtpd.evaluate.intervals import intervals
from mtpd.evaluate.offline import measure_offline
from mtpd.evaluate.run_tables import decoded_table, offline_table, with_total
from mtpd.heads import Heads
from mtpd.losses import kinds
from mtpd.trunk import Trunk

LIMIT = 48


def greedy_samples(name: str, ends: list[int]) -> list[Sample]:
    """Greedy texts of prompts of several lengths, each up to the first end token or the limit."""
    samples = []
    for length in (1, 5, 9, 20):
        prompt, text = greedy_text(name, length, LIMIT)
        end = next((place for place, token in enumerate(text) if token in ends), LIMIT)
        samples.append(Sample.of(str(length), prompt, text[: end + 1], "long" if length > 5 else "short"))
    return samples


def both(trunk: Trunk, heads: Heads, samples: list[Sample], ends: list[int], limit: int = LIMIT) -> list[Any]:
    """Counts measured offline and by decoding, without what only one of the two has."""
    offline = measure_offline(trunk, heads, samples, end_tokens=ends, batch=3, progress=False)
    decoded = measure_decoded(trunk, heads, samples, max_new_tokens=limit, end_tokens=ends, progress=False)
    assert all(suite.identical == suite.prompts for suite in decoded.values())
    assert all(suite.ties == 0 for suite in decoded.values())
    only_one = {
        "seconds",
        "plain_seconds",
        "engine_seconds",
        "identical",
        "ties",
        "tie",
        "expected",
        "expected_rows",
        "control",
    }
    left_out = dict.fromkeys(only_one, True) | {"rows": {"__all__": only_one}}
    return [
        {family: suite.model_dump(exclude=left_out) for family, suite in suites.items()}
        for suites in (offline, decoded)
    ]


@pytest.mark.parametrize("stage", ["untrained", "half", "perfect"])
def test_offline_counts_are_those_of_decoding(learned: Learned, stage: str) -> None:
    """Fault: an offline number that decoding does not reach: other places, another prefix, other room at the end."""
    _, text = greedy_text("llama", 5, LIMIT)
    for ends in ([], [text[11]], [text[30], text[6]], [greedy_text("llama", 9, LIMIT)[1][0]]):
        samples = greedy_samples("llama", ends)
        offline, decoded = both(learned.trunk, getattr(learned, stage), samples, ends)
        assert offline == decoded
    rates = measure_offline(learned.trunk, getattr(learned, stage), [learned.sample], progress=False)["prompts"].car
    assert {"untrained": rates[0] < 0.3, "half": 0.3 < rates[0] < 1.0, "perfect": rates == [1.0] * 3}[stage]


def test_what_follows_an_end_token_does_not_count(learned: Learned) -> None:
    """Fault: places counted offline that decoding never reaches."""
    prompt, text = learned.sample.prompt_ids, learned.sample.response_ids
    end = text[9]
    whole, cut = (
        measure_offline(learned.trunk, learned.half, [sample], end_tokens=[end], progress=False)["prompts"]
        for sample in (learned.sample, Sample.of("cut", prompt, text[: text.index(end) + 1]))
    )
    assert (whole.tokens, whole.drafted, whole.accepted) == (cut.tokens, cut.drafted, cut.accepted)
    assert whole.tokens == text.index(end) + 1


def test_offline_counts_for_every_architecture(name: str, trunk: Trunk) -> None:
    """Fault: an architecture whose caches and whole passes disagree."""
    ends = [greedy_text(name, 9, LIMIT)[1][20]]
    offline, decoded = both(trunk, learn(name).perfect, greedy_samples(name, ends), ends)
    assert offline == decoded
    assert offline["short"]["accepted"][0] > 0


def test_offline_counts_with_a_draft_vocabulary(llama: Trunk) -> None:
    """Fault: columns compared with token ids, or one block for all depths measured as one depth."""
    for heads in (random_heads(llama, vocabulary=torch.arange(1, TOKENS, 2)), random_heads(llama, shared=True)):
        offline, decoded = both(llama, heads, greedy_samples("llama", []), [])
        assert offline == decoded


class Largest(TorchDispatchMode):
    """Remembers the rows of the largest tensor that has a column for each token."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim > 1 and result.shape[-1] == self.columns:
            self.rows = max(self.rows, result.numel() // self.columns)
        return result


@pytest.mark.parametrize("texts", [1, 4])
def test_memory_does_not_grow_with_the_text(learned: Learned, texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: logits of a whole text or batch at once: vocabulary times length numbers."""
    columns = learned.trunk.unembedding.weight.shape[0]
    monkeypatch.setattr("mtpd.evaluate.offline.TILE_BYTES", 4 * columns * 5)
    with Largest(columns) as largest:
        samples = [dataclasses.replace(learned.sample, id=str(number)) for number in range(texts)]
        measure_offline(learned.trunk, learned.half, samples, progress=False)
    assert len(learned.sample.response_ids) > 40
    assert 0 < largest.rows <= 5


@pytest.mark.parametrize("draft", [False, True])
def test_expected_acceptance(learned: Learned, draft: bool) -> None:
    """Fault: Σ min(p, q) over the wrong rows, with padding rows, or with p renormalised to the draft vocabulary."""
    vocabulary = torch.arange(1, TOKENS, 2) if draft else torch.arange(TOKENS)
    heads = random_heads(learned.trunk, vocabulary=vocabulary) if draft else learned.half
    sample = learned.sample
    suite = measure_offline(learned.trunk, heads, [sample], progress=False)["prompts"]
    ids = torch.tensor([sample.ids])
    positions = torch.arange(ids.shape[1])[None]
    labels = torch.where(positions >= len(sample.prompt_ids), ids, alignment.IGNORED)
    hidden = learned.trunk.hidden(ids)
    with torch.no_grad():
        states = heads(learned.trunk, hidden, ids, position_ids_BT=positions)
    main = learned.trunk.unembedding(hidden)[0, :, :TOKENS]
    expected = []
    for k, state in enumerate(states, start=1):
        at = alignment.counted(labels, positions, k)[0].nonzero().squeeze(1)
        assert suite.expected_rows is not None
        assert suite.expected_rows[k - 1] == len(at)
        student = torch.full((len(at), TOKENS), -torch.inf)
        student[:, vocabulary] = learned.trunk.unembedding(state[0, at])[:, vocabulary]
        expected.append(kinds.acceptance(student, main[alignment.teacher_row(at, k)]).mean().item())
    assert suite.expected_acceptance == pytest.approx(expected, rel=1e-4)


def test_texts_shorter_than_a_draft(llama: Trunk) -> None:
    """Fault: a prompt that was answered with a word, or nothing, ends the measurement."""
    for length in (1, 2, 3):
        sample = Sample.of("a", *greedy_text("llama", 5, length))
        offline, decoded = both(llama, random_heads(llama), [sample], [], length)
        assert offline == decoded
        assert offline["prompts"]["tokens"] == length
    suites = measure_offline(llama, random_heads(llama), [Sample.of("a", [4, 5], [])], progress=False)
    assert suites["prompts"].drafted == [0, 0, 0]
    assert suites["prompts"].tau == 1.0
    assert measure_offline(llama, random_heads(llama), [], progress=False) == {}
    assert measure_decoded(llama, random_heads(llama), [], max_new_tokens=4, end_tokens=[], progress=False) == {}


def counts(**changes: Any) -> SuiteCounts:
    values = {"prompts": 2, "tokens": 30, "forwards": 12, "drafted": [10, 10, 8], "accepted": [8, 4, 2]}
    return SuiteCounts.model_validate(values | changes)


def test_ratios_by_hand() -> None:
    """Fault: AR printed as CAR, or tau without the main head's own token."""
    suite = counts(
        seconds=2.0, plain_seconds=5.0, engine_seconds=3.0, expected=[5.0, 2.0, 0.0], expected_rows=[10, 8, 0]
    )
    assert suite.car == pytest.approx([0.8, 0.4, 0.25])
    assert suite.ar == pytest.approx([0.8, 0.5, 0.625])
    assert [math.prod(suite.ar[: k + 1]) for k in range(len(suite.ar))] == pytest.approx(suite.car)
    assert suite.tau == pytest.approx(1 + 0.8 + 0.4 + 0.25)
    assert (suite.speed_up, suite.speed_up_over_engine) == (2.5, 1.5)
    assert suite.expected_acceptance == pytest.approx([0.5, 0.25, 0.0])
    nothing = counts(accepted=[0, 0, 0])
    assert (nothing.car, nothing.ar, nothing.tau) == ([0.0] * 3, [0.0] * 3, 1.0)
    assert (nothing.speed_up, nothing.speed_up_over_engine) == (None, None)


def acceptance(mode: Any = "decoded", **changes: Any) -> Acceptance:
    first = counts(seconds=1.0, plain_seconds=3.0, identical=2, **changes)
    second = counts(prompts=1, accepted=[2, 0, 0], seconds=1.0, plain_seconds=1.0, identical=1)
    return Acceptance(mode=mode, trunk="t", heads="h", suites={"chat": first, "code": second})


def test_totals_are_sums_of_counts() -> None:
    """Fault: a mean of ratios, in which a small suite weighs as much as a large one."""
    total = acceptance().total()
    assert (total.prompts, total.tokens, total.drafted, total.accepted) == (3, 60, [20, 20, 16], [10, 4, 2])
    assert (total.speed_up, total.identical, total.expected) == (2.0, 3, None)
    assert list(with_total(acceptance(), apart=frozenset(["code"]))) == ["chat", "code"]
    three = acceptance().suites | {"more": acceptance().suites["chat"]}
    listed = with_total(acceptance().model_copy(update={"suites": three}), apart=frozenset(["code"]))
    assert list(listed) == ["chat", "more", "all", "code"]
    assert listed["all"].prompts == 2 * three["chat"].prompts


def test_acceptance_file(tmp_path: Path) -> None:
    """Fault: a field that a file loses, or a ratio stored beside the counts that may contradict them."""
    before = acceptance(expected=[1.0, 2.0, 3.0], expected_rows=[3, 3, 3])
    before.save(tmp_path / "acceptance.json")
    assert Acceptance.load(tmp_path / "acceptance.json") == before
    content = json.loads((tmp_path / "acceptance.json").read_text())
    assert set(content) == {
        *("schema", "mode", "sampling", "settings", "trunk", "heads", "heads_trunk", "random_trunk", "versions"),
        *("suites", "loads", "sha256"),
    }
    assert content["schema"] == 4
    assert set(content["suites"]["chat"]) == set(SuiteCounts.model_fields)


def test_files_without_the_engine_are_read(tmp_path: Path) -> None:
    """Fault: a file from before the engine without drafts was timed is refused, or has a speed-up over it."""
    content = acceptance(engine_seconds=2.0).model_dump(mode="json", by_alias=True)
    assert content["suites"]["chat"].pop("engine_seconds") == 2.0
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps(content))
    found = Acceptance.load(path)
    assert found.suites["chat"].speed_up == 3.0
    assert found.suites["chat"].speed_up_over_engine is None
    assert found.total().speed_up_over_engine is None
    assert acceptance(engine_seconds=2.0).suites["chat"].speed_up_over_engine == 2.0


def test_both_baselines_are_timed_in_turns(learned: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: the engine without drafts is not timed, drafts all the same, or always goes last."""
    calls: list[str] = []
    plain, engine = decoded_module.generated, decoded_module.engine_texts

    def plainly(*args: Any, **kwargs: Any) -> Any:
        calls.append("plain")
        return plain(*args, **kwargs)

    def with_engine(model: Model, *args: Any, **kwargs: Any) -> Any:
        calls.append("chain" if model.depth else "+".join(model.sources) or "engine")
        return engine(model, *args, **kwargs)

    monkeypatch.setattr(decoded_module, "generated", plainly)
    monkeypatch.setattr(decoded_module, "engine_texts", with_engine)
    samples = greedy_samples("llama", [])[:3]
    suites = measure_decoded(
        learned.trunk,
        learned.half,
        samples,
        chances=Chances(),
        max_new_tokens=8,
        end_tokens=[],
        progress=False,
    )
    ways = ["plain", "engine", "chain", "lookup", "heads", "heads+lookup"]
    assert [calls[6 * turn : 6 * turn + 6] for turn in (1, 2, 3)] == [
        ways,
        [*ways[1:], ways[0]],
        [*ways[2:], *ways[:2]],
    ]
    for suite in suites.values():
        assert suite.drafters is not None
        assert list(suite.drafters) == ["lookup", "heads", "together"]
        assert all(each.seconds and each.tokens == suite.tokens for each in suite.drafters.values())
    for suite in suites.values():
        for row in suite.rows or []:
            assert None not in (row.plain_seconds, row.engine_seconds)
        assert suite.engine_seconds == pytest.approx(sum(row.engine_seconds or 0 for row in suite.rows or []))
        assert suite.speed_up_over_engine == pytest.approx((suite.engine_seconds or 0) / suite.seconds)


def test_files_of_the_first_schema_are_read(tmp_path: Path) -> None:
    """Fault: files that were written before counts by prompt cannot be read any more."""
    suite = {"prompts": 2, "tokens": 30, "forwards": 12, "drafted": [10, 8], "accepted": [8, 2], "seconds": 1.0}
    suite |= {"plain_seconds": None, "identical": None, "ties": None, "expected": None, "expected_rows": None}
    content = {"schema": 1, "mode": "offline", "sampling": None, "trunk": "t", "heads": "h", "versions": {}}
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps(content | {"suites": {"chat": suite}}))
    found = Acceptance.load(path)
    assert (found.schema_version, found.suites["chat"].rows, found.total().tau) == (1, None, 2.05)
    found.save(path)
    assert Acceptance.load(path) == found


def test_files_without_drafters_are_read(tmp_path: Path) -> None:
    """Fault: a file of schema 2 is refused, or has a tau of drafters that nobody measured."""
    content = acceptance().model_dump(mode="json", by_alias=True) | {"schema": 2}
    for suite in content["suites"].values():
        del suite["drafters"]
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps(content))
    found = Acceptance.load(path)
    assert (found.schema_version, found.total().drafters) == (2, None)
    assert not [name for name in intervals(found)[None] if name.startswith("tau_")]


def test_the_file_has_a_line_for_each_prompt(tmp_path: Path) -> None:
    """Fault: a file of thousands of prompts that no one can read or compare by line."""
    suites = measure_offline(learn("llama").trunk, learn("llama").half, greedy_samples("llama", []), progress=False)
    Acceptance(mode="offline", trunk="t", heads="h", suites=suites).save(tmp_path / "a.json")
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert sum(line.startswith('    {"tokens": ') for line in lines) == 4
    assert Acceptance.load(tmp_path / "a.json").suites == suites


def test_the_control_collapses(learned: Learned) -> None:
    """Fault: acceptance that does not depend on which token is predicted."""
    suite = measure_offline(learned.trunk, learned.perfect, [learned.sample], progress=False)["prompts"]
    assert suite.control is not None
    assert suite.car == [1.0] * 3
    assert suite.control.car[0] < 0.2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"accepted": [11, 4, 2]}, "accepted"),
        ({"accepted": [-1, 4, 2]}, "accepted"),
        ({"accepted": [4, 8, 2]}, "accepted"),
        ({"drafted": [10, 10]}, "drafted"),
        ({"drafted": [8, 10, 10]}, "drafted"),
        ({"prompts": -1}, "prompts"),
        ({"tau": 2.2}, "tau"),
        ({"tokens": "many"}, "tokens"),
    ],
    ids=str,
)
def test_impossible_counts_are_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    """Fault: a report of what cannot have happened."""
    content = acceptance().model_dump(mode="json", by_alias=True)
    content["suites"]["chat"] |= change
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"acceptance.json: not an acceptance file: suites\.chat.*{named}"):
        Acceptance.load(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Fault: a traceback for a file that is missing, cut off, of another schema or not text."""
    path = tmp_path / "acceptance.json"
    with pytest.raises(UserError, match="acceptance.json: cannot be read"):
        Acceptance.load(path)
    acceptance().save(path)
    whole = path.read_bytes()
    for broken in (whole[:-40], b"", whole.replace(b'"schema": 4', b'"schema": 5'), b'{"suites": {}}'):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="not an acceptance file"):
            Acceptance.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        Acceptance.load(path)


def test_tables(tmp_path: Path) -> None:
    """Fault: before and after exchanged, or a suite of other families summed with the rest."""
    before, after = acceptance(accepted=[1, 0, 0]), acceptance()
    console = Console(record=True, width=200, file=(tmp_path / "out").open("w"))
    console.print(offline_table(before, after, apart=frozenset(["code"])))
    console.print(decoded_table(after))
    shown = console.export_text()
    assert "0.10 → 0.80" in shown
    assert "1.10 → 2.45" in shown
    assert "2.00x" in shown


def test_a_tie_is_told_from_a_mistake() -> None:
    """Fault: a wrong token excused as a tie, or a tie reported as a wrong text."""
    trunk = copy.deepcopy(tiny_trunk("llama"))
    prompt = torch.tensor([3, 4, 5])
    ranked = trunk.unembedding(trunk.hidden(prompt[None])[0, -1]).argsort(descending=True).tolist()
    assert not parted_at_tie(trunk, prompt, [ranked[0]], [ranked[-1]])
    assert not parted_at_tie(trunk, prompt, [ranked[0]], [ranked[0]])
    trunk.model.get_output_embeddings().weight.data[ranked[1]] = trunk.unembedding.weight[ranked[0]]
    assert parted_at_tie(trunk, prompt, [ranked[0]], [ranked[1]])
