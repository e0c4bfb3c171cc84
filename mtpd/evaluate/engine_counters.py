"""What a serving engine counts of its drafts: vLLM's Prometheus counters."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from mtpd.errors import MtpdError, UserError

DRAFTS = "vllm:spec_decode_num_drafts_total"
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
TOKENS = "vllm:generation_tokens_total"
STARTED = "process_start_time_seconds"
WITHOUT_DRAFTS = "drafts nothing; accepted: a server that was started with --speculative-config"


@dataclass(frozen=True)
class EngineCounters:
    """Counters of a server, of all requests since it started.

    Attributes:
        drafts: rounds of drafting; None where the server drafts nothing.
        accepted: rounds whose first k + 1 drafts were all accepted.
        tokens: written in all.
        started: when the process began, in seconds; None where it does not say.
    """

    drafts: int | None
    accepted: list[int]
    tokens: int
    started: float | None

    @classmethod
    def read(cls, page: str | None, *, place: str) -> EngineCounters:
        """Reads a page of Prometheus' text format.

        Args:
            page: None where the server has none.
            place: the server, for messages.

        Raises:
            UserError: there are no counters of vLLM.
        """
        sums: dict[str, float] = {}
        accepted: dict[int, float] = {}
        try:
            for family in text_string_to_metric_families(page or ""):
                for sample in family.samples:
                    # One line for each engine of a server.
                    sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
                    if sample.name == BY_POSITION:
                        position = int(sample.labels["position"])
                        accepted[position] = accepted.get(position, 0.0) + sample.value
        except (ValueError, KeyError) as error:
            raise UserError(f"{place}/metrics: cannot be read ({error}); accepted: vLLM's counters") from error
        if TOKENS not in sums:
            raise UserError(
                f"{place}/metrics: has no counters of vLLM; accepted: a server of vLLM with its statistics on"
            )
        drafts = int(sums[DRAFTS]) if DRAFTS in sums else None
        return cls(drafts, [int(accepted[k]) for k in sorted(accepted)], int(sums[TOKENS]), sums.get(STARTED))

    def since(self, earlier: EngineCounters, *, place: str) -> EngineCounters:
        """What was counted since an earlier reading.

        Raises:
            MtpdError: the server started again in between.
        """
        pairs = [(self.drafts or 0, earlier.drafts or 0), (self.tokens, earlier.tokens)]
        pairs += zip(self.accepted, earlier.accepted, strict=False)
        if self.started != earlier.started or any(now < before for now, before in pairs):
            raise MtpdError(f"{place}: its counters fell: it started again while it was measured; nothing is written")
        drafts = None if self.drafts is None else self.drafts - (earlier.drafts or 0)
        accepted = [now - (earlier.accepted[k] if earlier.accepted else 0) for k, now in enumerate(self.accepted)]
        return EngineCounters(drafts, accepted, self.tokens - earlier.tokens, self.started)
