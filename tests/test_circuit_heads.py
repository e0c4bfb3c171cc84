"""Circuit heads: sampled texts have the model's distribution, and runs are trained and measured by recipe."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from kinds import random_kind
from test_decode_sampling import chi_square, small_world
from torch import Tensor

from mtpd.cli import main
from mtpd.decode.engine import Engine
from mtpd.decode.sampling import SampledDrafts, Sampling
from mtpd.decode.text import Request
from mtpd.heads.circuit.heads import CircuitHeads

SAMPLES = 6000


@pytest.mark.parametrize("form", ["cp", "hmm", "btree"])
def test_sampled_drafts_are_exact(form: str) -> None:
    """Fault: a draft accepted by another probability than that it was drawn with; a kept token not conditioned on."""
    trunk, _ = small_world()
    heads = random_kind(trunk, form, depth=2, std=0.8)
    length, size, prompt = 4, 5, [1, 4]
    sampling = Sampling()
    texts = torch.tensor(list(itertools.product(range(size), repeat=length)))
    whole = torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], dim=1)
    logits = trunk.unembedding(trunk.hidden(whole))[:, len(prompt) - 1 : -1]
    each = sampling.distribution(logits.flatten(0, 1)).view(len(texts), length, size)
    exact = each.gather(2, texts[..., None])[..., 0].double().prod(1)
    found = torch.zeros(size**length)
    engine = Engine(trunk, heads, slots=1000, capacity=len(prompt) + length, choice=SampledDrafts())
    accepted = drafted = 0
    for text in engine.run(Request(prompt, length, seed) for seed in range(SAMPLES)):
        place = 0
        for token in text.tokens:
            place = place * size + token
        found[place] += 1
        counts = text.counts(2)
        accepted, drafted = accepted + counts.accepted[1], drafted + counts.drafted[1]
    assert 0.02 < accepted / drafted < 0.98
    assert chi_square(found, exact) < 4.5


@pytest.mark.parametrize("form", ["cp", "cp-shared", "hmm-tilted"])
def test_evidence_is_the_log_of_the_leaves(form: str) -> None:
    """Fault: a leaf that does not sum to 1; an exponential too large; a token without a column that counts."""
    trunk, _ = small_world()
    heads = random_kind(trunk, form, depth=2, std=4.0 if form == "hmm-tilted" else 0.8)
    assert isinstance(heads, CircuitHeads)
    heads.attach(trunk)
    hidden = trunk.hidden(torch.tensor([[1, 4, 2]])).flatten(0, 1)
    columns = torch.tensor([[0, 1, 2], [4, -1, 3], [2, 2, -1]])
    leaf = heads.leaves.logits(hidden, trunk.unembedding).log_softmax(-1)
    at = columns.clamp_min(0)[:, :, None, None].expand(-1, -1, 3, 1)
    expected = leaf.gather(-1, at).squeeze(-1).where((columns >= 0)[..., None], 0.0)
    found = heads.evidence(hidden, columns)
    assert expected.min() < -10
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("form", ["hmm-tilted", "cp-shared"])
def test_drafts_after_more_training(form: str) -> None:
    """Fault: what was computed for decoding is used after a step of a fused optimizer, which leaves no sign of it."""
    trunk, _ = small_world()
    heads = random_kind(trunk, form, depth=2, std=0.8)
    ids = torch.tensor([[1, 4, 2, 3]])
    positions = torch.arange(4)[None]
    hidden = trunk.hidden(ids)
    found = []
    for _ in range(2):
        with torch.inference_mode():
            along = heads.along(trunk, hidden, ids, position_ids_BT=positions)
            found.append(along.logits(2, torch.arange(4)))
        optimizer = torch.optim.AdamW(heads.train().parameters(), lr=0.3, fused=True)
        for parameter in heads.parameters():
            parameter.grad = torch.ones_like(parameter)
            parameter.grad.flatten()[::2] = -1.0
        optimizer.step()
        heads.eval()
    again = copy.deepcopy(heads)
    with torch.inference_mode():
        for each in (heads, again):
            along = each.along(trunk, hidden, ids, position_ids_BT=positions)
            found.append(along.logits(2, torch.arange(4)))
    assert (found[1] - found[0]).abs().max() > 1e-2
    assert (found[2] - found[1]).abs().max() > 1e-2
    torch.testing.assert_close(found[2], found[3])


def after_two_tokens(target: Tensor, draft: Tensor, *, drops: bool) -> Tensor:
    """Exact distribution [V, V] of the first two tokens that self-speculation writes.

    Args:
        target: p(x_1, x_2) of the main head.
        draft: q(x_1, x_2) of a circuit.
        drops: the shortcut of MTPC's algorithm 2, which drafts the whole window, drops the token behind an accepted
            draft, and drafts its place again. Otherwise x_1 is the main head's own, and the circuit is conditioned on
            it.
    """
    p1, q1 = target.sum(1), draft.sum(1)
    p2, q2 = target / p1[:, None], draft / q1[:, None]
    kept = torch.minimum(p2, q2)
    missing = 1 - kept.sum(1, keepdim=True)
    exact = kept + missing * (p2 - kept) / (p2 - kept).sum(1, keepdim=True)
    if not drops:
        return p1[:, None] * exact
    first = torch.minimum(p1, q1)
    # A first token that is rejected gives way to one from the residual, which the shortcut keeps; what follows is
    # drafted anew and exact. Behind an accepted one, a rejected place is drafted again, from p as a whole.
    return first[:, None] * (kept + missing * p2) + (p1 - first)[:, None] * p2


def test_dropping_the_free_token_is_biased() -> None:
    """Fault: the published shortcut, by which a rejected token's place is drafted again."""
    target = torch.tensor([[0.30, 0.20], [0.05, 0.45]], dtype=torch.float64)
    # A mixture of two components, as a circuit of two places is.
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    one = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    two = torch.tensor([[0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    draft = torch.einsum("j,ja,jb->ab", weights, one, two)
    ours, shortcut = (after_two_tokens(target, draft, drops=drops) for drops in (False, True))
    torch.testing.assert_close(ours, target)
    assert shortcut.sum().item() == pytest.approx(1.0)
    assert (shortcut - target).abs().sum() / 2 > 0.05


@pytest.mark.parametrize(
    "words",
    [
        ["heads.kind=parallel"],
        ["heads.kind=medusa", "train.loss=ce"],
        ["heads.kind=circuit", "heads.circuit.structure=btree", "train.loss=ce", "train.decay=0.9"],
    ],
    ids=lambda words: words[0],
)
def test_runs_by_recipe(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a kind that some step of a run, its plan, or loading it later does not know."""
    common = ["recipes/smoke.yaml", f"output={tmp_path / 'run'}", "data.limit=6", "data.max_new_tokens=12"]
    common += ["evaluation.prompts_limit=2", "evaluation.max_new_tokens=8", "evaluation.decode_prompts=2"]
    common += ["train.max_steps=2", *words]
    assert main(["distill", *common, "--dry-run"]) == 0
    assert "2 heads" in capsys.readouterr().out
    assert main(["distill", *common]) == 0
    config = json.loads((tmp_path / "run" / "heads" / "config.json").read_text())
    assert config["kind"] == words[0].partition("=")[2]
    suite = next(iter(json.loads((tmp_path / "run" / "acceptance-decoded.json").read_text())["suites"].values()))
    assert suite["identical"] == suite["prompts"]
    assert main(["generate", str(tmp_path / "run"), "--prompt", "Hello", "--max-new-tokens", "6"]) == 0


def test_what_only_a_chain_is_accepted_for(tmp_path: Path) -> None:
    """Fault: transformers' own MTP decoding given heads that it cannot build, which fails inside of it."""
    from mtpd.decode.transformers_mtp import mtp_in_transformers
    from mtpd.errors import UserError

    trunk, _ = small_world()
    with (
        pytest.raises(UserError, match=r"use_mtp=True\): heads of kind circuit are not accepted; accepted: chain"),
        mtp_in_transformers(trunk, random_kind(trunk, "cp")),
    ):
        pass
