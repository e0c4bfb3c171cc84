"""A few texts with what drafted each token, heads or look-up, and how deep, for the report: `samples.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mtpd.data.packing import Sample
from mtpd.decode.chances import Chances
from mtpd.decode.corpus import Corpus
from mtpd.decode.drafting import HEADS, Source
from mtpd.errors import UserError
from mtpd.evaluate.drafters import drafted_together, drafts_together
from mtpd.evaluate.measure import Model
from mtpd.evaluate.offline import Measured, walk_offline
from mtpd.files import read_sealed, sealed, write_whole
from mtpd.heads import Heads

EACH = 2
"""Texts of each suite at most."""
MOST = 10
"""Texts in all."""
PROMPT_CHARACTERS = 1500
"""What is kept of a prompt; long documents are cut in the middle."""


class SampleText(BaseModel):
    """One response, token by token."""

    model_config = ConfigDict(extra="forbid")

    suite: str
    id: str
    prompt: str
    pieces: list[str]
    """Text of each token."""
    depths: list[int]
    """How deep in its round each token was drafted; 0 for the main head's own."""
    sources: list[Source | None] | None = None
    """What drafted each token; in files of schema 1, which lack it, heads alone did."""

    @model_validator(mode="after")
    def _one_for_each_token(self) -> Self:
        if self.sources is None:
            self.sources = _of_heads(self.depths)
        if not len(self.pieces) == len(self.depths) == len(self.sources):
            raise ValueError("pieces, depths and sources differ in length")
        return self


class Samples(BaseModel):
    """Contents of `samples.json`."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 2
    heads: str = ""
    """Fingerprint of the heads that drafted; empty in files from before it was kept."""
    texts: list[SampleText]

    def save(self, path: Path) -> None:
        content = sealed(self.model_dump(mode="json"))
        write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def sample_texts(
    model: Model,
    heads: Heads,
    samples: Mapping[str, Sequence[Sample]],
    *,
    chances: Chances,
    corpus: Corpus | None = None,
    heads_fingerprint: str,
) -> Samples:
    """Walks over a few texts of each suite as decoding would, and says what drafted which token.

    Heads and look-up draft together; a chain of heads does where they cannot (`drafts_together`).
    """
    turns = [
        (suite, members[turn]) for turn in range(EACH) for suite, members in samples.items() if turn < len(members)
    ]
    chosen = [(suite, sample) for suite, sample in turns[:MOST] if sample.response_ids]
    some = [sample for _, sample in chosen]
    drafted: Sequence[Sequence[tuple[Source | None, int]]]
    if drafts_together(model.trunk):
        drafted = drafted_together(model.trunk, heads, some, chances, corpus=corpus, end_tokens=model.ends)
    else:
        walked = walk_offline(model.trunk, heads, some, end_tokens=model.ends, progress=False)
        drafted = [list(zip(_of_heads(each), each, strict=True)) for each in map(token_depths, walked)]
    texts = [_text(*each, by, model.tokenizer) for each, by in zip(chosen, drafted, strict=True)]
    return Samples(heads=heads_fingerprint, texts=texts)


def read_samples(path: Path) -> list[SampleText]:
    """The texts of a `samples.json`; none where there is no such file.

    Raises:
        UserError: the file is none of ours.
    """
    found = _load(path)
    return [] if found is None else found.texts


def belong_to(path: Path, heads: str) -> bool:
    """Whether there is a `samples.json`, and these heads drafted its texts.

    Raises:
        UserError: the file is none of ours.
    """
    found = _load(path)
    return found is not None and found.heads == heads


def _load(path: Path) -> Samples | None:
    if not path.is_file():
        return None
    try:
        return Samples.model_validate(read_sealed(path, refusal="not a file of sample texts"))
    except ValidationError as error:
        raise UserError(f"{path}: not a file of sample texts: {str(error).splitlines()[0]}") from error


def _text(suite: str, sample: Sample, drafted: Sequence[tuple[Source | None, int]], tokenizer: Any) -> SampleText:
    pieces = _pieces(tokenizer, sample.response_ids[: len(drafted)])
    prompt = tokenizer.decode(sample.prompt_ids, skip_special_tokens=True)
    if len(prompt) > PROMPT_CHARACTERS:
        half = PROMPT_CHARACTERS // 2
        prompt = f"{prompt[:half]} … {prompt[-half:]}"
    sources, depths = [source for source, _ in drafted], [depth for _, depth in drafted]
    return SampleText(suite=suite, id=sample.id, prompt=prompt, pieces=pieces, depths=depths, sources=sources)


def _of_heads(depths: Sequence[int]) -> list[Source | None]:
    return [HEADS if depth else None for depth in depths]


def token_depths(measured: Measured) -> list[int]:
    """For each token of the text the head of a chain that drafted it, 0 where it is the main head's own."""
    depths = [0] * measured.counts.tokens
    for before, accepted in measured.rounds:
        for depth in range(1, accepted + 1):
            if before + depth - 1 < len(depths):
                depths[before + depth - 1] = depth
    return depths


def _pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Gives what each token adds to the text: a character of several tokens comes with the last of them."""
    pieces: list[str] = []
    shown = ""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=False)
        whole = text.rstrip("\ufffd") if count < len(tokens) else text
        pieces.append(whole[len(shown) :])
        shown = whole if len(whole) >= len(shown) else shown
    return pieces
