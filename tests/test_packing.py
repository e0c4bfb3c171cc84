"""Packed rows: borders, labels, padding, and what is left out."""

from __future__ import annotations

import random

import pytest
import torch

from mtpd.alignment import IGNORED, document_ids
from mtpd.data.packing import Sample, collate, pack
from mtpd.errors import UserError


def test_a_row_by_hand() -> None:
    """Labels shifted here and again at the loss, or positions that run on across a border."""
    rows = pack([Sample.of("a", [10, 11], [1, 2, 3]), Sample.of("b", [12], [4])], row_length=9, pad_token_id=99)
    assert {key: value.tolist() for key, value in rows[0].items()} == {
        "input_ids": [10, 11, 1, 2, 3, 12, 4, 99, 99],
        "labels": [IGNORED, IGNORED, 1, 2, 3, IGNORED, 4, IGNORED, IGNORED],
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 0, 1],
    }
    assert all(value.dtype == torch.long for value in rows[0].values())
    assert (len(rows), rows.documents, rows.response_tokens) == (1, 2, 4)


def test_every_document_is_found_again() -> None:
    """Packing that loses, splits, mixes or repeats documents, or pads within one."""
    draw = random.Random(0)
    samples = [
        Sample.of(str(n), [draw.randrange(100) for _ in range(draw.randint(1, 20))], [n + 100] * draw.randint(1, 20))
        for n in range(1500)
    ]
    rows = pack(samples, row_length=64, pad_token_id=7)
    batch = collate([rows[index] for index in range(len(rows))])
    documents = document_ids(batch["position_ids"])
    found = []
    for row in range(len(rows)):
        for document in range(int(documents[row, -1]) + 1):
            of = documents[row] == document
            ids, labels = batch["input_ids"][row, of].tolist(), batch["labels"][row, of]
            assert batch["position_ids"][row, of].tolist() == list(range(len(ids)))
            if (labels != IGNORED).any():
                found.append((tuple(ids), tuple((labels != IGNORED).tolist())))
            else:
                assert set(ids) == {7}
    assert sorted(found) == sorted((tuple(sample.ids), tuple(sample.response_mask)) for sample in samples)
    # Best fit leaves little room.
    assert len(rows) <= 1.02 * sum(len(sample.ids) for sample in samples) / 64 + 1


def test_long_documents_are_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """A tail that is lost without a word, or a document without response that takes a row."""
    long, prompt_only, short = Sample.of("l", [1], [2] * 9), Sample.of("p", [3] * 8, [4]), Sample.of("s", [5], [6])
    rows = pack([long, prompt_only, short], row_length=4)
    assert (rows.documents, rows.cut, rows.dropped) == (2, 1, 1)
    assert "6 response tokens are left out" in caplog.text
    assert "no response token" in caplog.text
    assert rows[0]["labels"].tolist() == [IGNORED, 2, 2, 2]


def test_nothing_to_train_on_is_an_error() -> None:
    """An empty response mask trains on nothing, silently."""
    for samples in ([], [Sample.of("a", [1, 2], [])], [Sample("a", [1], [True])]):
        with pytest.raises(UserError, match="no response token"):
            pack(samples, row_length=8)


def test_fingerprint_follows_the_content() -> None:
    """A stored hidden state that is taken for another row's."""
    sample = Sample.of("a", [1], [2, 3])
    assert pack([sample], row_length=8).fingerprint == pack([sample], row_length=8).fingerprint
    others = [pack([Sample.of("a", [1, 2], [3])], row_length=8), pack([sample], row_length=9)]
    assert len({rows.fingerprint for rows in others} | {pack([sample], row_length=8).fingerprint}) == 3


def test_turns_of_a_sample() -> None:
    """With several turns the prompt ends at the first response token."""
    sample = Sample("a", [1, 2, 3, 4, 5], [False, True, False, False, True])
    assert (sample.prompt_ids, sample.response_ids) == ([1], [2, 5])
