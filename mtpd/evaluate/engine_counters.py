"""What a serving engine counts of its drafts: the Prometheus counters of vLLM, llama.cpp and SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from mtpd.errors import MtpdError, UserError

STARTED = "process_start_time_seconds"


@dataclass(frozen=True)
class Engine:
    """A serving engine: what it calls its counters, and the option that switches drafts on."""

    name: str
    tokens: str
    drafts: str
    by_position: str
    """Empty where it does not say at which position drafts were accepted."""
    option: str
    request: Mapping[str, bool] = field(default_factory=dict, hash=False)
    """What a request asks for, to be told of the drafts of its answer."""

    @property
    def without_drafts(self) -> str:
        """Says that a server drafts nothing."""
        return f"drafts nothing; accepted: a server that was started with {self.option}"


ENGINES = (
    Engine(
        "vLLM",
        "vllm:generation_tokens_total",
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_accepted_tokens_per_pos_total",
        "--speculative-config",
    ),
    Engine(
        "llama.cpp",
        "llamacpp:tokens_predicted_total",
        "llamacpp:spec_decode_num_drafts_total",
        "llamacpp:spec_decode_num_accepted_tokens_per_pos_total",
        "--spec-type",
    ),
    Engine(
        "SGLang",
        "sglang:generation_tokens_total",
        "sglang:spec_verify_calls_total",
        "",
        "--speculative-algorithm",
        {"return_spec_tokens_details": True},
    ),
)
NEEDED = "vLLM with its statistics on, or llama.cpp or SGLang with --metrics or --enable-metrics"


@dataclass(frozen=True)
class EngineCounters:
    """Counters of a server, of all requests since it started.

    Attributes:
        drafts: rounds of drafting; None where the server drafts nothing.
        accepted: rounds whose first k + 1 drafts were all accepted; empty where it does not say.
        tokens: written in all.
        started: when the process began, in seconds; None where it does not say.
    """

    drafts: int | None
    accepted: list[int]
    tokens: int
    started: float | None
    engine: Engine = ENGINES[0]

    @classmethod
    def read(cls, page: str | None, *, place: str) -> EngineCounters:
        """Reads a page of Prometheus' text format.

        Args:
            page: None where the server has none.
            place: the server, for messages.

        Raises:
            UserError: there are no counters of an engine that is known.
        """
        sums: dict[str, float] = {}
        accepted: dict[int, float] = {}
        try:
            for family in text_string_to_metric_families(page or ""):
                for sample in family.samples:
                    # One line for each engine of a server.
                    sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
                    if any(sample.name == engine.by_position for engine in ENGINES):
                        position = int(sample.labels["position"])
                        accepted[position] = accepted.get(position, 0.0) + sample.value
        except (ValueError, KeyError) as error:
            raise UserError(f"{place}/metrics: cannot be read ({error}); accepted: {NEEDED}") from error
        engine = next((engine for engine in ENGINES if engine.tokens in sums), None)
        if engine is None:
            raise UserError(f"{place}/metrics: has no counters of drafts; accepted: a server of {NEEDED}")
        drafts = int(sums[engine.drafts]) if engine.drafts in sums else None
        counted = [int(accepted[k]) for k in sorted(accepted)]
        return cls(drafts, counted, int(sums[engine.tokens]), sums.get(STARTED), engine)

    def since(self, earlier: EngineCounters, *, place: str) -> EngineCounters:
        """What was counted since an earlier reading.

        Raises:
            MtpdError: the server started again in between.
        """
        pairs = [(self.drafts or 0, earlier.drafts or 0), (self.tokens, earlier.tokens)]
        pairs += zip(self.accepted, earlier.accepted, strict=False)
        again = self.started != earlier.started or len(self.accepted) < len(earlier.accepted)
        if again or any(now < before for now, before in pairs):
            raise MtpdError(f"{place}: its counters fell: it started again while it was measured; nothing is written")
        drafts = None if self.drafts is None else self.drafts - (earlier.drafts or 0)
        accepted = [now - (earlier.accepted[k] if earlier.accepted else 0) for k, now in enumerate(self.accepted)]
        return EngineCounters(drafts, accepted, self.tokens - earlier.tokens, self.started, self.engine)
