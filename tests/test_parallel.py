"""Heads of other kinds than the chain: trained, saved, measured and decoded through what all kinds share."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from architectures import greedy_text, random_tokens, tiny_trunk
from kinds import FORMS, random_kind, settings
from test_decode import tree_of_heads
from test_evaluate import both, greedy_samples

from mtpd import alignment
from mtpd.alignment import IGNORED
from mtpd.decode.chances import Chances
from mtpd.decode.engine import Engine
from mtpd.decode.planner import Planner
from mtpd.decode.text import Request
from mtpd.errors import UserError
from mtpd.evaluate.offline import measure_offline
from mtpd.heads import Batch, Heads, Readout, configure_heads, load_heads, save_heads, start_heads
from mtpd.heads.logit_heads import LogitHeads
from mtpd.losses import kinds, reference
from mtpd.losses.settings import LossSettings
from mtpd.train.model import DistillModel
from mtpd.trunk import Trunk

LIMIT = 24


def batch(trunk: Trunk, *, length: int = 21) -> Batch:
    """Two packed rows: two documents in each, prompts at their beginnings."""
    ids = random_tokens(2, length, seed=3)
    positions = torch.cat([torch.arange(9), torch.arange(length - 9)]).expand(2, -1)
    labels = ids.clone()
    labels[:, :3] = IGNORED
    labels[0, 9:11] = IGNORED
    return Batch(ids, labels, positions, trunk.hidden(ids, position_ids=positions))


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("form", "small"), [*((form, False) for form in FORMS), ("decoder", True), ("medusa", True), ("hmm", True)]
)
def test_decoding_and_offline_counts(llama: Trunk, form: str, small: bool) -> None:
    """Fault: drafts from a state or a cache of another position; texts that change; offline counts of other drafts."""
    vocabulary = torch.arange(2, 110) if small else None
    heads = random_kind(llama, form, vocabulary=vocabulary)
    # Ends cut the texts short: they would take as long again.
    ends = [greedy_text("llama", 9, 48)[1][33]]
    samples = greedy_samples("llama", ends)
    if not small:
        heads = taught(llama, form, heads)
    offline, decoded = both(llama, heads, samples, ends)
    assert offline == decoded
    if not small:
        assert sum(suite["accepted"][0] for suite in offline.values()) > 1


def taught(trunk: Trunk, form: str, heads: Heads, steps: int = 25) -> Heads:
    """Heads that draft some tokens of the texts right."""
    prompt, text = greedy_text("llama", 5, 48)
    ids = torch.tensor([prompt + text])
    labels = torch.tensor([[IGNORED] * len(prompt) + text])
    positions = torch.arange(ids.shape[1])[None]
    model = DistillModel(trunk, heads.train(), LossSettings((1.0,) * heads.depth, (0.0,) * heads.depth))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels, positions)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    return heads.eval()


def test_texts_in_slots(llama: Trunk, form: str) -> None:
    """Fault: a row that gets the state, the cache or the tokens of another, above all when texts end and move."""
    heads = taught(llama, form, random_kind(llama, form), steps=12)
    prompts = [greedy_text("llama", length, LIMIT) for length in (1, 5, 9, 20)]
    requests = [Request(prompt, LIMIT - 5 * (number % 2)) for number, (prompt, _) in enumerate(prompts)]
    for plan in (None, tree_of_heads(6), Planner(Chances(), None)):
        engine = Engine(llama, heads, slots=2, capacity=64, planner=plan)
        for text in engine.run(requests):
            assert text.tokens == prompts[text.number][1][: requests[text.number].max_new_tokens]


@pytest.mark.parametrize("form", ["medusa", "cp", "cp-shared", "hmm", "hmm-tilted"])
@pytest.mark.parametrize("loss", ["ce", "mtp_d", "tv", "lk", "end_to_end_tv", "jsd"])
def test_loss_in_pieces(llama: Trunk, form: str, loss: str) -> None:
    """Fault: a term or a gradient lost between pieces; a teacher row or a mask of another position."""
    heads = random_kind(llama, form, vocabulary=torch.arange(2, 110)).train().double()
    trunk = Trunk(copy.deepcopy(llama.model).double(), tokens=llama.tokens)
    rows = batch(trunk)
    readout = Readout.of(trunk, heads.rows())
    alpha = (1.0, 0.9, 0.81) if loss == "ce" else ((0.3, 0.2, 0.1) if loss == "mtp_d" else (0.0,) * 3)
    beta = (0.0,) * 3 if loss == "ce" else (0.5, 0.4, 0.3)
    chosen = LossSettings(alpha, beta, loss=loss, top_n=20 if loss == "mtp_d" else 0)
    total, sums = heads.loss(trunk, rows, readout, chosen)
    total.backward()
    found = {name: parameter.grad.clone() for name, parameter in heads.named_parameters() if parameter.grad is not None}

    heads.zero_grad()
    assert isinstance(heads, LogitHeads)
    hidden = rows.hidden.flatten(0, 1)
    columns = torch.stack([readout.columns[rows.tokens(k)] for k in range(4)], dim=1)
    seen = heads.encode_window(hidden, columns)
    terms, accepted = [], []
    for k in range(1, 4):
        at = rows.counted(k).nonzero().squeeze(1)
        y = heads.depth_logits(k, hidden, columns, seen)[at]
        z = (readout.main if chosen.true_probabilities else readout.draft)(hidden[alignment.teacher_row(at, k)])
        ce = reference.cross_entropy(y, columns[at, k])
        terms.append(alpha[k - 1] * ce.sum())
        if loss != "ce":
            value = reference.divergence(y, z, chosen, columns_M=readout.rows)
        if loss == "end_to_end_tv":
            accepted.append(torch.ones(len(hidden), dtype=value.dtype).index_put((at,), 1 - value))
        elif loss != "ce":
            terms.append(beta[k - 1] * value.sum())
        torch.testing.assert_close(sums.cross_entropy[k - 1], ce.sum(), atol=1e-4, rtol=1e-4)
    if accepted:
        masks = torch.stack([rows.counted(k) for k in range(1, 4)])
        terms.append(kinds.end_to_end_tv(torch.stack(accepted), masks, chosen.depth_weights).sum())
    expected = torch.stack(terms).sum()
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    for name, parameter in heads.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().sum() > 0:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_saved_and_loaded(llama: Trunk, form: str, tmp_path: Path) -> None:
    """Fault: a part of the configuration that is not written, so that other heads are built around the weights."""
    heads = random_kind(llama, form)
    save_heads(heads, tmp_path)
    # A trunk that does not say how many of its rows are tokens, as it is while a run is loaded.
    loaded = load_heads(tmp_path, Trunk(llama.model))
    assert loaded.config == heads.config
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("form", FORMS)
def test_starts_draft_like_the_main_head(form: str) -> None:
    """Fault: a start that is not what it says: heads that pass the state on have to draft the main head's own token."""
    trunk = tiny_trunk("llama")
    heads = random_kind(trunk, form)
    start_heads(heads, trunk, "identity", lambda: ())
    rows = batch(trunk)
    along = heads.along(trunk, rows.hidden, rows.input_ids, position_ids_BT=rows.position_ids)
    at = rows.counted(1).nonzero().squeeze(1)
    logits = along.logits(1, at)
    main = trunk.unembedding.select(None)(rows.hidden.flatten(0, 1)[at])
    torch.testing.assert_close(logits.log_softmax(-1), main.log_softmax(-1), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("form", ["decoder", "linear", "cp", "cp-shared"])
def test_regression_start_is_better_than_identity(form: str) -> None:
    """Fault: a fit of other positions than those that heads are asked for, or a map that is put in transposed."""
    trunk = tiny_trunk("llama")
    texts = [greedy_text("llama", length, 48) for length in (1, 5, 9, 20)]
    width = max(len(prompt) + len(text) for prompt, text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    labels, positions = torch.full_like(ids, IGNORED), torch.arange(width).expand(len(texts), -1)
    for row, (prompt, text) in enumerate(texts):
        whole = torch.tensor(prompt + text)
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    hidden = trunk.hidden(ids, position_ids=positions)
    rows = {"input_ids": ids, "labels": labels, "position_ids": positions, "hidden": hidden}
    chosen = LossSettings((1.0,) * 3, (0.0,) * 3)
    losses = {}
    for start in ("identity", "regression"):
        heads = random_kind(trunk, form)
        start_heads(heads, trunk, start, lambda: [rows])
        with torch.no_grad():
            loss, _ = heads.loss(trunk, Batch(ids, labels, positions, hidden), Readout.of(trunk, None), chosen)
        losses[start] = float(loss)
    assert losses["regression"] < 0.9 * losses["identity"]


def test_fewer_heads_draft_the_same(llama: Trunk, form: str) -> None:
    """Fault: heads of which the first ones draft otherwise once the last are left out."""
    heads = random_kind(llama, form)
    samples = greedy_samples("llama", [])
    rows = batch(llama)
    whole = heads.along(llama, rows.hidden, rows.input_ids, position_ids_BT=rows.position_ids)
    at = rows.counted(2).nonzero().squeeze(1)
    expected = whole.logits(2, at).argmax(-1)
    heads.shorten(2)
    fewer = heads.along(llama, rows.hidden, rows.input_ids, position_ids_BT=rows.position_ids)
    assert fewer.depth == 2
    assert torch.equal(fewer.logits(2, at).argmax(-1), expected)
    assert len(measure_offline(llama, heads, samples, progress=False)["short"].drafted) == 2


REFUSED = {
    "full leaves": ("cp", {"vocabulary": 0}, 10**9, "leaves: full needs .* GB .* accepted: shared"),
    "key of another kind": (
        "linear",
        {"circuit": {"rank": 4}},
        0,
        "heads.circuit.rank: 4 does nothing with .* parallel",
    ),
    "key of chains": ("linear", {"shared": True}, 0, "heads.shared: true does nothing with heads.kind: parallel"),
    "two starts": ("linear", {"source": "x", "init": "identity"}, 0, "heads.init: identity does nothing with heads.so"),
    "components of ff": (
        "ff",
        {"circuit": {"structure": "ff", "components": 2}},
        0,
        "components: 2 .* accepted: 1, or",
    ),
    "rank of full leaves": ("cp", {"circuit": {"leaves": "full", "rank": 4}}, 0, "rank: 4 does nothing with leaves: f"),
    "start of a block": ("residual", {"init": "regression"}, 0, "heads.init: regression .* residual; accepted: iden"),
    "start of a circuit": ("cp", {"init": "copy_last"}, 0, "heads.init: copy_last .* circuit heads; accepted: regr"),
    "start of medusa": ("medusa", {"init": "copy_last"}, 0, "heads.init: copy_last .* medusa heads; accepted: iden"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(llama: Trunk, name: str) -> None:
    """Fault: a mistake that shows after hours as a lack of memory, or never."""
    form, change, columns, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        configure_heads({**settings(form), **change}, llama, vocabulary=columns, fingerprint="")


def test_options_that_nothing_would_read(llama: Trunk) -> None:
    """Fault: training that is said to be compiled, or to keep less in memory, and is not."""
    heads = random_kind(llama, "cp")
    settings = LossSettings((1.0,) * 3, (0.0,) * 3)
    with pytest.raises(UserError, match=r"train.checkpoint_blocks: true .* kind circuit; accepted: false"):
        DistillModel(llama, heads, settings, checkpoint_blocks=True)
    rows = batch(llama)
    with pytest.raises(UserError, match=r"train.compile: true does nothing for heads of kind circuit; accepted: false"):
        DistillModel(llama, heads, settings, compiled=True)(rows.input_ids, rows.labels, rows.position_ids)
