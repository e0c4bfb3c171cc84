"""Speed of a server under load, as an acceptance file has it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from mtpd.decode.counts import shares


class Load(BaseModel):
    """Speed of a server with so many requests at a time, and what it counted of its drafts."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    concurrency: int = Field(ge=1)
    tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)
    drafts: int = Field(ge=0)
    """Rounds of drafting, by the server's own count."""
    accepted: list[int]
    """Of them, those whose first k + 1 drafts were all accepted."""
    plain_tokens: int | None = Field(default=None, ge=0)
    """Of a server without drafts, asked the same; null where there was none."""
    plain_seconds: float | None = Field(default=None, ge=0)

    @property
    def speed(self) -> float:
        """Tokens/s."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def plain_speed(self) -> float | None:
        """Tokens/s without drafts."""
        return self.plain_tokens / self.plain_seconds if self.plain_tokens and self.plain_seconds else None

    @property
    def tau(self) -> float:
        """Tokens a round, by the server's own count."""
        return 1.0 + sum(shares(self.accepted, [self.drafts] * len(self.accepted)))

    def speed_with(self, drafts: int) -> float | None:
        """Tokens/s to be expected with fewer drafts a round, or none.

        A pass is taken to last the longer the more it drafts, in a straight line between what was measured with all
        drafts and with none.
        """
        if self.plain_speed is None or not self.drafts:
            return None
        depth = len(self.accepted)
        with_all = self.tau / self.speed
        without = 1 / self.plain_speed
        tau = 1.0 + sum(shares(self.accepted[:drafts], [self.drafts] * drafts))
        return tau / (without + drafts / depth * (with_all - without))
