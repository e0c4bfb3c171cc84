"""What a server says of the drafts of one answer.

vLLM lists the rounds (`metrics.speculative_decoding`, with `--per-request-spec-decode-metrics detailed`). SGLang counts
them by how many drafts were accepted (`sglext.spec_tokens_details`). llama.cpp gives two sums (`timings`), which are
enough where a round has one draft. Of a server that is asked one prompt at a time, the counters before and after say
the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtpd.decode.counts import Counts
from mtpd.evaluate.engine_counters import EngineCounters


@dataclass(frozen=True)
class Told:
    """Rounds of one answer.

    Attributes:
        rounds: drafted and accepted of each, in their order; None where only sums are known.
        drafts: how many rounds drafted.
        accepted: rounds whose first k + 1 drafts were all accepted.
        tokens: of the answer, by the server's own count; None where it does not say.
        by_depth: whether `accepted` is by depth, and not the sum over all of them.
    """

    rounds: list[tuple[int, int]] | None
    drafts: int
    accepted: list[int]
    tokens: int | None = None
    by_depth: bool = True

    def counts(self, prompt: int, written: int, depth: int) -> Counts:
        """The counts of a text by mtpd's rule, or where rounds have no order, of all its rounds.

        Args:
            prompt: tokens of the prompt.
            written: tokens of the text.
            depth: drafts of a round.
        """
        if self.rounds is None:
            sums = [*self.accepted, *[0] * depth][:depth]
            # Each pass writes what it accepts and one token more; drafts behind the end of a text are not in it.
            passes = max(1 + self.drafts, written - sum(sums))
            return Counts(depth, written, passes, [self.drafts] * depth, sums)
        counts = Counts(depth)
        counts.start(prompt)
        # Passes without drafts, if there were any, wrote what the rounds did not.
        alone = max(0, written - 1 - sum(accepted + 1 for _, accepted in self.rounds))
        counts.tokens += alone
        counts.forwards += alone
        known = 1 + alone
        for drafted, accepted in self.rounds:
            if known >= written:
                break
            counts.round(accepted, room=written - known, drafted=drafted)
            known += accepted + 1
        return counts


def told_by_answer(answer: Mapping[str, Any]) -> Told | None:
    """What an answer says; None where it says nothing."""
    tokens = _at(answer, "usage", "completion_tokens")
    tokens = tokens if isinstance(tokens, int) else None
    of_vllm = _at(answer, "metrics", "speculative_decoding")
    drafted, accepted = (_numbers(_at(of_vllm, f"per_step_{name}")) for name in ("drafted", "accepted"))
    if drafted is not None and accepted is not None and len(drafted) == len(accepted):
        depth = max(drafted, default=0)
        sums = [sum(each > k for each in accepted) for k in range(depth)]
        return Told(list(zip(drafted, accepted, strict=True)), len(drafted), sums, tokens)
    # Index n: rounds of which n drafts were accepted.
    histogram = _numbers(_at(answer, "sglext", "spec_tokens_details", "spec_correct_drafts_histogram"))
    if histogram:
        return Told(None, sum(histogram), [sum(histogram[k + 1 :]) for k in range(len(histogram) - 1)], tokens)
    timings = answer.get("timings")
    if isinstance(timings, Mapping) and isinstance(timings.get("predicted_n"), int):
        counted = [timings.get(name, 0) for name in ("draft_n", "draft_n_accepted")]
        if _numbers(counted) is not None:
            return Told(None, counted[0], counted[1:], timings["predicted_n"], by_depth=False)
    return None if tokens is None else Told(None, 0, [], tokens, by_depth=False)


def told_by_counters(counted: EngineCounters) -> Told:
    """What counters say of the only answer between two readings."""
    return Told(None, counted.drafts or 0, counted.accepted, counted.tokens)


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _numbers(value: Any) -> list[int] | None:
    if not isinstance(value, Sequence) or not all(type(each) is int and each >= 0 for each in value):
        return None
    return list(value)
