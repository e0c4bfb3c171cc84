"""Measures heads and look-up together, and each of them alone, along texts that are known: nothing is decoded.

Rounds are those of the engine, with the texts in the place of the main head's choices and with the trunk's states of
the whole text, computed once. Each round verifies the `NODES` likeliest drafts and asks every head, whatever that
costs: so what is measured depends on neither the machine nor its load.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtpd.data.packing import Sample
from mtpd.decode.chances import Chances
from mtpd.decode.choice import children
from mtpd.decode.corpus import Corpus
from mtpd.decode.drafting import CORPUS, HEADS, LOOKUP, Source
from mtpd.decode.drafts import Drafts
from mtpd.decode.engine import Engine
from mtpd.decode.planner import Planner
from mtpd.decode.text import Request, Text
from mtpd.evaluate.acceptance import DrafterCounts, SuiteCounts
from mtpd.heads import Heads
from mtpd.progress import Bar
from mtpd.trunk import Trunk

NODES = 16
"""Drafts of a round at most."""
DRAFTERS: dict[str, tuple[Source, ...]] = {"lookup": (LOOKUP,), "heads": (HEADS,), "together": (HEADS, LOOKUP, CORPUS)}
SLOTS = 16
"""Texts at a time."""


class _Along:
    """Chooses the tokens of known texts."""

    branches = True

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.texts = texts

    def draft(self, logits: Tensor, texts: Sequence[Text], number: int) -> Tensor:
        raise AssertionError("a planner drafts, which asks no choice")

    def choose(self, logits: Tensor, texts: Sequence[Text], drafts: Drafts | None) -> list[list[int]]:
        """As `mtpd.decode.choice.Choice.choose`."""
        rows = [list[list[int]]([[], []])] * len(texts) if drafts is None else list(drafts.rows())
        new, paths = [], []
        for text, (tokens, parents) in zip(texts, rows, strict=True):
            nodes, column = children(tokens, parents), 0
            written, path = list[int](), list[int]()
            # Behind the end of a text nothing is right.
            for token in [*self.texts[text.number][len(text.tokens) :], -1]:
                written.append(token)
                following = nodes.get((column, token))
                if following is None:
                    break
                column = following
                path.append(column)
            new.append(written)
            paths.append(path)
        if drafts is not None:
            drafts.paths = paths
        return new


class _NoCache:
    """In the place of the trunk's keys and values, where its states are known."""

    def begin(self, *_: Any) -> None: ...

    def go_on(self, *_: Any, **__: Any) -> None: ...

    def move(self, *_: Any) -> None: ...

    def copy_row(self, *_: Any) -> None: ...


class _Walk(Engine):
    """The engine's rounds along known texts.

    Args:
        states: of each text, what heads read at its positions, [T, D].
    """

    def __init__(self, trunk: Trunk, heads: Heads, states: Sequence[Tensor], **settings: Any) -> None:
        super().__init__(trunk, heads, slots=min(SLOTS, len(states)), **settings)
        self.states, self.reading = states, list[Text]()
        self.cache: Any = _NoCache()
        self.unembedding: Any = nn.Identity()
        # What stands in the place of a pass reads which texts are active, and gives what heads read.
        self.graphs = self.tap = None

    def _read_prompts(self, group: list[Text]) -> None:
        self.reading = group
        super()._read_prompts(group)
        self.reading = []

    def _pass(self, tokens: Tensor, positions: Tensor, mask: Any) -> Tensor:
        texts = self.reading or self.active
        known = (self.states[text.number] for text in texts)
        return torch.stack([each[at.clamp_max(len(each) - 1)] for each, at in zip(known, positions, strict=True)])


def drafts_together(trunk: Trunk) -> bool:
    """Whether drafters can be measured: not where layers are shared out over processes, nor with linear attention."""
    return not trunk.partitioned and not trunk.recurrent


@torch.inference_mode()
def measure_drafters(
    trunk: Trunk,
    heads: Heads,
    samples: Sequence[Sample],
    chances: Chances,
    *,
    corpus: Corpus | None = None,
    nodes: int = NODES,
    end_tokens: Collection[int] = (),
    progress: bool = True,
) -> dict[str, dict[str, DrafterCounts]]:
    """Counts of each of `DRAFTERS`, by the id of the sample; samples without a response are left out.

    Args:
        heads: in the trunk's number format and in eval mode.
        samples: prompts with the trunk's own greedy responses.
        chances: how often drafts are right, best counted on other texts.
        corpus: other texts in which continuations are looked up too.
        nodes: drafts of a round at most.
        end_tokens: ids that end a text.
    """
    found: dict[str, dict[str, DrafterCounts]] = {}
    texts = sorted((sample for sample in samples if sample.response_ids), key=lambda sample: len(sample.ids))
    with Bar(total=len(texts), desc="heads and look-up", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(texts), SLOTS):
            some = texts[start : start + SLOTS]
            states = [_states(trunk, heads, sample.ids) for sample in some]
            for name, sources in DRAFTERS.items():
                planner = Planner(chances, None, sources, nodes, corpus)
                for text in _walked(trunk, heads, some, states, planner, end_tokens):
                    counts = text.counts(0)
                    row = DrafterCounts(
                        nodes=nodes, tokens=counts.tokens, forwards=counts.forwards, sources=counts.sources
                    )
                    found.setdefault(some[text.number].id, {})[name] = row
            bar.update(len(some))
    return found


@torch.inference_mode()
def drafted_together(
    trunk: Trunk,
    heads: Heads,
    samples: Sequence[Sample],
    chances: Chances,
    *,
    corpus: Corpus | None = None,
    end_tokens: Collection[int] = (),
) -> list[list[tuple[Source | None, int]]]:
    """Gives source and depth of each token of a few texts, those that have a response.

    None and 0 stand for the main head's own. Arguments are those of `measure_drafters`.
    """
    some = [sample for sample in samples if sample.response_ids]
    states = [_states(trunk, heads, sample.ids) for sample in some]
    planner = Planner(chances, None, DRAFTERS["together"], NODES, corpus)
    texts = _walked(trunk, heads, some, states, planner, end_tokens) if some else ()
    return [text.drafted_by() for text in sorted(texts, key=lambda text: text.number)]


def _walked(
    trunk: Trunk,
    heads: Heads,
    samples: Sequence[Sample],
    states: Sequence[Tensor],
    planner: Planner,
    end_tokens: Collection[int],
) -> Iterable[Text]:
    """Texts with their rounds, in the order in which they end; `number` is the place of the sample."""
    responses = [_to_its_end(sample.response_ids, end_tokens) for sample in samples]
    capacity = max(len(sample.ids) for sample in samples)
    walk = _Walk(trunk, heads, states, capacity=capacity, choice=_Along(responses), planner=planner)
    return walk.run([Request(each.prompt_ids, len(text)) for each, text in zip(samples, responses, strict=True)])


def with_drafters(suite: SuiteCounts, found: Mapping[str, dict[str, DrafterCounts]]) -> SuiteCounts:
    """The counts of a suite with those of `measure_drafters` beside them."""
    rows = [row.model_copy(update={"drafters": found.get(row.id)}) for row in suite.rows or []]
    sums = SuiteCounts.of(rows, suite.depth)
    return suite.model_copy(update={"rows": rows, "drafters": sums.drafters})


def _to_its_end(response: Sequence[int], end_tokens: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(response, start=1) if token in end_tokens), None)
    return list(response[:end])


def _states(trunk: Trunk, heads: Heads, ids: Sequence[int]) -> Tensor:
    """Computes the states that heads read at the positions of a text, [T, D]."""
    tokens = torch.tensor([ids], device=trunk.device)
    positions = torch.arange(len(ids), device=trunk.device)[None]
    _, read = trunk.states(tokens, position_ids=positions, before_last=heads.shared_layers)
    return read[0]
