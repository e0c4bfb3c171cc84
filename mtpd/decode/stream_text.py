"""Writing one text at a time for somebody who reads along."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from mtpd.decode.choice import Choice, Greedy
from mtpd.decode.drafting import Source
from mtpd.decode.model import Model
from mtpd.decode.sampling import Sampling, temperature_and_top_p
from mtpd.decode.text import Request, Text
from mtpd.errors import UserError

Show = Callable[[str, Source | None], None]
"""Called with a piece of text and the source that drafted it; None for the main head's own."""


def settings(temperature: float, top_p: float, seed: int) -> tuple[Choice, int]:
    """Makes the choice of tokens, and the seed of random ones."""
    return (Sampling(temperature_and_top_p(temperature, top_p)) if temperature > 0 else Greedy()), seed


class Session:
    """A model, and how it chooses."""

    def __init__(self, model: Model, chosen: tuple[Choice, int]) -> None:
        self.model = model
        self.choice, self.seed = chosen
        self.ends = _ends(model)

    def warm_up(self) -> None:
        """Does once what only the first text has to wait for."""
        request = Request([self.ends[0] if self.ends else 0], 4)
        list(self.model.engine([request]).run([request]))

    def write(self, prompt: list[int], max_new_tokens: int, *, show: Show | None = None) -> Text:
        """Writes a text, showing pieces as soon as they are known.

        Raises:
            UserError: a prompt that leaves no room in the model's context.
        """
        context = self.model.trunk.context
        if not 0 < len(prompt) < context:
            raise UserError(
                f"prompt of {len(prompt)} tokens: accepted are 1 to {context - 1}, for a context of {context}"
            )
        request = Request(prompt, min(max_new_tokens, context - len(prompt)), self.seed)
        shown = Shown(self.model.tokenizer, show, self.ends)

        def on_tokens(text: Text, new: list[int]) -> None:
            # The last token of a round is the model's own; the others were drafted.
            accepted = text.rounds[-1][2] if text.rounds else 0
            sources = text.sources[len(text.sources) - accepted :]
            for token, source in itertools.zip_longest(new, sources[: len(new)]):
                shown.put(token, source)

        engine = self.model.engine([request], choice=self.choice, end_tokens=self.ends, on_tokens=on_tokens)
        [text] = engine.run([request])
        shown.finish()
        return text


class Shown:
    """Tokens as text: a piece is shown when its characters are whole."""

    def __init__(self, tokenizer: Any, show: Show | None, ends: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.show = show
        self.ends = frozenset(ends)
        self.tokens: list[int] = []
        self.text = ""

    def put(self, token: int, source: Source | None) -> None:
        if token in self.ends:
            return
        self.tokens.append(token)
        whole = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        # A character of several tokens is not there before the last of them.
        if not whole.endswith("�"):
            self._show(whole, source)

    def finish(self) -> None:
        self._show(self.tokenizer.decode(self.tokens, skip_special_tokens=True), None)

    def _show(self, whole: str, source: Source | None) -> None:
        if self.show is not None and len(whole) > len(self.text):
            self.show(whole[len(self.text) :], source)
        self.text = whole


def _ends(model: Model) -> list[int]:
    named: Any = model.generation_config.eos_token_id
    ids = [] if named is None else [named] if isinstance(named, int) else list(named)
    own = model.tokenizer.eos_token_id
    return ids if own is None or own in ids else [*ids, own]
