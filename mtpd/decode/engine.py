"""Decoding in rounds, many texts at a time: the heads draft, one pass of the trunk verifies.

A round: the heads draft K tokens for each row; one pass of the trunk over the newest token and the
drafts gives the main head's logits after each of them; the longest prefix of drafts that the main head
agrees with is accepted, and a token of its own follows (Stern et al., arXiv 1811.03115). Without drafts
a round is a plain step. Drafts may be a tree (`mtpd.decode.drafts`): then a path of it is accepted.

Each text lies in a slot (see `mtpd.slots`). Texts that are being written occupy the first slots; where
one ends, the last one moves into its slot and the next prompt gets the free one. What a row writes does
not depend on the others, but for rounding.

Shape legend: N active rows, Q positions of a pass, D hidden size, V vocabulary rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtpd.decode.chances import REACH
from mtpd.decode.choice import Choice, Greedy
from mtpd.decode.drafting import HEADS
from mtpd.decode.drafts import Drafts
from mtpd.decode.graphs import Graphs
from mtpd.decode.planner import BEAM, MOST, Planner
from mtpd.decode.text import Request, Text
from mtpd.errors import UserError
from mtpd.heads import Heads
from mtpd.packed_modules import faster, faster_logits
from mtpd.slots import Bounded, Newest, SlotCache, Span, Tensors, on_device, rounded
from mtpd.trunk import Tap, Trunk

PREFILL_TOKENS = 2048
"""Prompts are read together up to about this many tokens a pass, padding included."""
LIMITS = (256, 1024)
"""Positions that attention in a graph reads: 256, 512, or multiples of 1,024. More graphs would have less to read."""


class Engine:
    """Slots for texts that are decoded together.

    Args:
        heads: None decodes plainly.
        slots: how many texts at a time.
        capacity: tokens of the longest text, prompt included.
        depth: heads draft a chain of so many tokens in every round; None is as many as there are heads.
        choice: how tokens are chosen from logits.
        end_tokens: ids that end a text; the one that does is part of it.
        on_tokens: called with a text and its new tokens after each round; True ends the text.
        before_pass: called before each pass of the trunk.
        planner: chooses the drafts of each round, of heads and look-up together, in the place of `depth`.

    Raises:
        UserError: a depth that the heads do not have.
    """

    def __init__(
        self,
        trunk: Trunk,
        heads: Heads | None = None,
        *,
        slots: int,
        capacity: int,
        depth: int | None = None,
        choice: Choice | None = None,
        end_tokens: Collection[int] = (),
        on_tokens: Callable[[Text, list[int]], bool | None] | None = None,
        before_pass: Callable[[], None] | None = None,
        planner: Planner | None = None,
    ) -> None:
        deepest = heads.depth if heads is not None else 0
        if depth is not None and heads is not None and not 1 <= depth <= deepest:
            raise UserError(f"depth: {depth} is not accepted; accepted: 1 to {deepest}, the heads there are")
        self.deepest = deepest
        self.planner = planner
        self.depth = min(depth or deepest, deepest) if planner is None else max(deepest, REACH)
        self.choice = choice or Greedy()
        self.device = trunk.device
        # Layers that are fetched when they compute have no weights to be packed, and are watched by their own modules.
        self.decoder: Any = trunk.decoder if trunk.partitioned else faster(trunk.decoder)
        self.before_pass = before_pass
        self.tap: Tap | None = None
        if heads is not None and heads.shared_layers:
            self.tap = Tap(self.decoder, trunk.depth - heads.shared_layers)
            self.decoder = self.tap.decoder
        self.slots = slots
        self.capacity = capacity
        self.ends = frozenset(end_tokens)
        self.on_tokens = on_tokens
        # Drafts, and paths that heads go on from, may lie past the longest text; one place belongs to no position.
        self.beyond = (self.depth if planner is None else max(MOST, BEAM * deepest)) + 1
        room = capacity + self.beyond
        self.cache = SlotCache(trunk.config, slots=slots, capacity=room, dtype=trunk.dtype, device=trunk.device)
        self.drafter = heads.drafter(trunk, slots=slots, capacity=room) if heads is not None else None
        if self.drafter is not None and heads is not None:
            self.drafter.independent = heads.independent
        self.unembedding = faster_logits(trunk, trunk.unembedding)
        # Heads read prompts to the deepest of them, however few draft.
        self.tokens = torch.zeros(slots, room + deepest + 2, dtype=torch.long, device=trunk.device)
        self.graphs = Graphs.of(trunk)
        # What passes read of a round: where texts end; tokens, parents and depths of nodes; from where these move.
        self.ends_at = torch.zeros(slots, dtype=torch.long, device=trunk.device)
        self.nodes = torch.zeros(slots, 3, MOST, dtype=torch.long, device=trunk.device)
        self.sources = torch.zeros(slots, MOST, dtype=torch.long, device=trunk.device)
        self.active: list[Text] = []
        # How many tokens of each text the round before has written, that `tokens` does not have yet.
        self.unwritten = 0

    @torch.inference_mode()
    def run(self, requests: Iterable[Request]) -> Iterator[Text]:
        """Texts in the order in which they end."""
        waiting = deque(Text(request, number) for number, request in enumerate(requests))
        self.active, self.unwritten = [], 0
        while waiting or self.active:
            yield from self._begin(waiting)
            if self.active:
                self._round()
                yield from self._leave()

    def _begin(self, waiting: deque[Text]) -> Iterator[Text]:
        """Gives free slots to waiting texts, reads their prompts, and writes the first token of each."""
        # Reading a few prompts together costs hardly more than reading one.
        if len(self.active) > self.slots - max(1, self.slots // 8):
            return
        while waiting and len(self.active) < self.slots:
            group: list[Text] = []
            width = 0
            while waiting and len(self.active) + len(group) < self.slots:
                width = max(width, len(waiting[0].request.prompt))
                if group and width * (len(group) + 1) > PREFILL_TOKENS:
                    break
                group.append(waiting.popleft())
            self._read_prompts(group)
            yield from self._leave()

    def _read_prompts(self, group: list[Text]) -> None:
        device = self.device
        first = len(self.active)
        lengths = [len(text.request.prompt) for text in group]
        width = max(lengths)
        for text, length in zip(group, lengths, strict=True):
            assert length + text.request.max_new_tokens <= self.capacity, "a text longer than its slot"
        padded = [[*text.request.prompt, *[0] * (width - len(text.request.prompt))] for text in group]
        span = Span([0] * len(group), width, device, first_row=first)
        prompts = on_device(padded, device)
        span.write(self.tokens, prompts)
        self.cache.begin(span)
        if self.before_pass is not None:
            self.before_pass()
        hidden = self._pass(prompts, span.positions, mask=None)
        last = on_device(lengths, device) - 1
        rows = torch.arange(len(group), device=device)
        logits = self.unembedding(hidden[rows, last][:, None])
        self.active += group
        new = self.choice.choose(logits, group, None)
        self.tokens[rows + first, last + 1] = on_device([tokens[0] for tokens in new], device)
        for text, tokens in zip(group, new, strict=True):
            self._write(text, tokens)
        if self.drafter is not None:
            self.drafter.begin(span, self._read_by_heads(hidden), self.tokens, [length + 1 for length in lengths])

    def _round(self) -> None:
        """Drafts, verifies, and writes the accepted tokens of all active rows."""
        newest = self.places([text.newest for text in self.active], [text.last(self.unwritten) for text in self.active])
        self.unwritten = 0
        drafts = None if self.drafter is None and self.planner is None else self._draft(newest)
        hidden, *tapped = self.verify(newest, 1 if drafts is None else 1 + drafts.tokens.shape[1], drafts)
        new = self.choice.choose(self.unembedding(hidden), self.active, drafts)
        depth = 0 if drafts is None else drafts.depth
        if tapped:
            [hidden] = tapped
        if drafts is not None and drafts.parents is not None:
            hidden = self._compact(newest, drafts.paths, hidden)
        if self.drafter is not None:
            longest = min(1 + depth, hidden.shape[1])
            self.drafter.read(newest.span(longest), hidden[:, :longest])
        self.unwritten = max(map(len, new))
        for row, (text, tokens) in enumerate(zip(self.active, new, strict=True)):
            if drafts is not None:
                of = None if drafts.sources is None else drafts.sources[row]
                text.sources += [HEADS if of is None else of[column - 1] for column in drafts.paths[row]]
            text.rounds.append((len(text.tokens), depth, len(tokens) - 1))
            self._write(text, tokens)

    def places(
        self, positions: Sequence[int], written: Sequence[Sequence[int]] = (), *, beyond: int | None = None
    ) -> Newest:
        """Says where a round goes on.

        Args:
            positions: of the newest token of each row.
            written: of each row as many of its newest tokens, which take the place of the drafts of the round before.
            beyond: positions that passes read or write from the newest token on; None: those of a round.
        """
        count = len(written[0]) if written else 0
        graphs = None if self.graphs is None or self.graphs.refused else self.graphs
        # Rows of a graph that have no text begin theirs, which nothing reads.
        rows = len(positions) if graphs is None else min(rounded(len(positions), 1, 8), self.slots)
        lists = [[end, *(written[row] if count else [])] for row, end in enumerate(positions)]
        # All that a round needs of the host comes in one copy.
        copied = on_device(lists + [[0] * (1 + count)] * (rows - len(lists)), self.device)
        bounded = None
        if graphs is not None:
            self.ends_at[:rows] = copied[:, 0]
            end = max(positions) + (self.beyond if beyond is None else beyond)
            bounded = Bounded(self.ends_at[:rows], min(rounded(end, *LIMITS), self.cache.capacity), graphs)
        newest = Newest(positions, self.device, copied[: len(lists), 0], bounded)
        if count:
            newest.span(count, 1 - count).write(self.tokens, copied[: len(lists), 1:])
        return newest

    def verify(self, newest: Newest, width: int, drafts: Drafts | None) -> Tensors:
        """Runs the trunk over the newest token of each row and the drafts behind it.

        Args:
            width: of the pass; without a tree it reads that many tokens of each text.

        Returns:
            Hidden states [N, Q, D]; where heads read states of a layer below, those too.
        """
        if self.before_pass is not None:
            self.before_pass()
        tree = drafts if drafts is not None and drafts.parents is not None else None
        if tree is not None and newest.bounded is not None:
            self.nodes[: len(newest), :, : width - 1] = tree.layout()

        def forward(at: Newest | Bounded) -> Tensors:
            span = at.span(width)
            if tree is None:
                hidden = self._pass(span.read(self.tokens), span.positions, self.cache.go_on(span))
            else:
                nodes = tree if isinstance(at, Newest) else Drafts.of(self.nodes[span.rows, :, : width - 1])
                assert nodes.depths is not None
                read = torch.cat([at.span(1).read(self.tokens), nodes.tokens], dim=1)
                positions = span.positions[:, :1] + nn.functional.pad(nodes.depths, (1, 0))
                mask = self.cache.go_on(span, positions=positions, seen=nodes.seen())
                hidden = self._pass(read, positions, mask)
            return (hidden,) if self.tap is None else (hidden, self.tap.seen)

        return newest.run(("trunk", width, tree is not None), forward)

    def _compact(self, newest: Newest, paths: list[list[int]], hidden: Tensor) -> Tensor:
        """Puts what was computed for accepted drafts where a chain has it: behind the newest token, without gaps.

        Returns:
            Hidden states [N, 1 + n, D] in that order; n is at least the length of the longest path.
        """
        if all(path == list(range(1, 1 + len(path))) for path in paths):
            return hidden
        count = min(newest.width(max(map(len, paths)), least=4), hidden.shape[1] - 1)
        rows = paths + [[]] * (newest.rows - len(paths))
        columns = on_device([[*path, *range(1 + len(path), 1 + count)] for path in rows], self.device)
        self.sources[: len(rows), :count] = columns

        def move(at: Newest | Bounded) -> Tensors:
            start = at.on_device[:, None]
            row = torch.arange(len(start), device=self.device)[:, None]
            target = start + torch.arange(1, 1 + count, device=self.device)
            self.cache.move(row, start + self.sources[: len(start), :count], target)
            return ()

        newest.run(("move", count), move)
        order = nn.functional.pad(columns[: len(paths)], (1, 0))
        return hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[2]))

    def _draft(self, newest: Newest) -> Drafts | None:
        """Drafts the tokens that the round verifies."""
        if self.planner is not None:
            return self.planner.draft(self.drafter, self.deepest, self.tokens, newest, self.active)
        assert self.drafter is not None

        def choose(logits: Tensor, number: int) -> Tensor:
            return self.choice.draft(logits, self.active, number)

        depth = self.drafter.draft(self.tokens, newest, self.depth, choose)
        return Drafts.chain(newest.span(depth).read(self.tokens, steps=1).clone())

    def _pass(self, tokens: Tensor, positions: Tensor, mask: Tensor | dict[str, Tensor] | None) -> Tensor:
        """The trunk's hidden states [N, Q, D] of tokens [N, Q]."""
        hidden: Tensor = self.decoder(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden

    def _read_by_heads(self, hidden: Tensor) -> Tensor:
        """States [N, Q, D] of the last pass that heads read: after the final norm, or before their shared layers."""
        return hidden if self.tap is None else self.tap.seen

    def _write(self, text: Text, new: list[int]) -> None:
        """Appends tokens, up to the first that ends the text."""
        new = new[: text.room]
        end = next((place for place, token in enumerate(new, start=1) if token in self.ends), None)
        new = new[:end]
        text.tokens += new
        # A choice may have ended it already.
        text.ended = text.ended or end is not None or not text.room
        if self.on_tokens is not None and self.on_tokens(text, new):
            text.ended = True

    def _leave(self) -> Iterator[Text]:
        """Frees the slots of texts that have ended; the last row moves into each hole."""
        for slot in range(len(self.active) - 1, -1, -1):
            text = self.active[slot]
            if not text.ended:
                continue
            if self.planner is not None:
                self.planner.forget(text)
            last = self.active.pop()
            if last is not text:
                self.active[slot] = last
                length = last.newest + 1
                self.cache.copy_row(len(self.active), slot, length)
                self.tokens[slot, :length] = self.tokens[len(self.active), :length]
                if self.drafter is not None:
                    self.drafter.copy_row(len(self.active), slot, length)
            yield text
