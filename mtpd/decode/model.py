"""A model with heads, that generates as models of transformers do.

`Model.generate` has the signature and the return types of transformers' own: that one prepares settings,
inputs, logits processors and stopping criteria, and calls back here in the place of its loop.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PretrainedConfig,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    MaxLengthCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto import modeling_auto

from mtpd.decode.chances import Chances
from mtpd.decode.choice import Choice, Greedy
from mtpd.decode.corpus import Corpus
from mtpd.decode.costs import machine_costs
from mtpd.decode.counts import Counts
from mtpd.decode.drafting import CORPUS, HEADS, LOOKUP, Drafting, Source
from mtpd.decode.engine import Engine
from mtpd.decode.hf_processors import Processed, independent
from mtpd.decode.planner import Costs, Planner
from mtpd.decode.sampling import SampledDrafts, Sampling
from mtpd.decode.text import Request, Text
from mtpd.errors import UserError
from mtpd.heads import Heads
from mtpd.trunk import Trunk

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
SLOTS = 64
"""Rows of a call that are decoded at a time; more wait for a slot."""

# Pipelines of transformers log an error for a class that is not in this table, which also has the names of classes
# without a configuration of their own. The key is no model type, so that nothing is ever loaded through it.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mtpd"] = "Model"


class Model:
    """A trunk with its heads.

    Args:
        heads: None generates plainly, with the same engine.
        drafting: what drafts; None is heads and look-up together, as much in each round as pays.
        chances: how often drafts are right; None believes the heads.
        corpus: other texts in which continuations are looked up too.

    Raises:
        UserError: a chain of more drafts than there are heads.
    """

    def __init__(
        self,
        trunk: Trunk,
        heads: Heads | None,
        tokenizer: Any = None,
        drafting: Drafting | None = None,
        chances: Chances | None = None,
        corpus: Corpus | None = None,
    ):
        self.trunk = trunk
        self.chances = chances or Chances()
        self.corpus = corpus
        self._costs: Costs | None = None
        self.heads = heads
        self.tokenizer = tokenizer
        self.drafting = drafting or Drafting()
        depth, deepest = self.drafting.depth, 0 if heads is None else heads.depth
        if depth is not None and heads is not None and depth > deepest:
            raise UserError(f"depth: {depth} is not accepted; accepted: 1 to {deepest}, the heads there are")
        self.counts: list[Counts] = []
        """Of each row of the last call."""

    def __repr__(self) -> str:
        """Say what drafts, how far, and where it runs."""
        parts = [f"{self.trunk.name} of {self.trunk.depth} layers"]
        if self.heads is None:
            parts.append("no heads")
        else:
            heads = "head" if self.heads.depth == 1 else "heads"
            parts += [f"{self.heads.depth} {self.heads.config.kind} {heads}"]
        parts += [f"a chain of {self.depth}" if self.depth else f"drafts of {' and '.join(self.sources) or 'none'}"]
        return f"{type(self).__name__}({', '.join(parts)}, {str(self.dtype).removeprefix('torch.')} on {self.device})"

    @property
    def acceptance(self) -> Counts:
        """Counts of the last call of `generate`, summed over its rows: `tau`, `car`, `ar`, accepted drafts by source.

        `counts` has the same by row.

        Raises:
            UserError: there was no call yet.
        """
        if not self.counts:
            raise UserError("acceptance: nothing was generated yet; call generate(...) first")
        return sum(self.counts[1:], self.counts[0])

    def drafting_with(self, **fields: Any) -> Model:
        """Return a model of the same weights and costs that drafts differently; fields of `Drafting`."""
        other = copy.copy(self)
        other._costs, other.drafting, other.counts = self.costs, Drafting(**fields), []
        return other

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    @property
    def dtype(self) -> torch.dtype:
        return self.trunk.dtype

    @property
    def config(self) -> PretrainedConfig:
        return self.trunk.model.config

    @property
    def generation_config(self) -> GenerationConfig:
        settings: Any = self.trunk.model.generation_config
        return settings

    @property
    def input_modalities(self) -> tuple[str, ...]:
        return ("text",)

    @property
    def output_modalities(self) -> tuple[str, ...]:
        return ("text",)

    def can_generate(self) -> bool:
        """Tell pipelines of transformers that there is `generate`."""
        return True

    def eval(self) -> Model:
        """Return the model: it is in eval mode for good."""
        return self

    def to(self, device: Any) -> Model:
        """Move model and heads to a device.

        Raises:
            UserError: anything else than a device. A dtype is chosen in loading, which keeps rotary tables in float32.
        """
        try:
            where = torch.device(device)
        except (TypeError, RuntimeError) as error:
            raise UserError(
                f"to: {device} is not accepted; accepted: a device such as cuda:0 or cpu (a dtype is chosen in "
                'loading: mtpd.load(run, dtype="float32"))'
            ) from error
        self.trunk.to(where)
        if self.heads is not None:
            # In eval mode anew: what they hold for decoding stays on the old device otherwise.
            self.heads.to(where).eval()
        return self

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """As `generate` of transformers: the same text where it is greedy, the same distribution where it samples.

        Prompts of several lengths are padded on the left. A text ends at the model's context at the latest.

        Raises:
            UserError: text in the place of token ids, a way of generating that drafts cannot serve (beam search,
                contrastive search, another assistant), outputs that are not kept (attentions, hidden states, a cache),
                padding inside of a prompt, or a prompt that fills the context.
        """
        for name in ("assistant_model", "past_key_values", "inputs_embeds", "custom_generate", "negative_prompt_ids"):
            if kwargs.pop(name, None) is not None:
                raise UserError(f"generate: {name} is not accepted; heads draft, and texts begin at their prompts")
        _check_ids(inputs if inputs is not None else kwargs.get("input_ids"))
        config, criteria = self._stop_strings(generation_config, StoppingCriteriaList(stopping_criteria or []), kwargs)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if streamer is not None and ids is not None and len(ids) > 1:
            raise UserError(f"generate: a streamer shows one row, and there are {len(ids)}; accepted: one prompt")

        def decode(model: Any, input_ids: Tensor, **given: Any) -> GenerateDecoderOnlyOutput | Tensor:
            return self._decode(input_ids, streamer=streamer, **given)

        output: Any = self.trunk.model.generate(
            inputs,
            config,
            logits_processor=logits_processor,
            stopping_criteria=criteria,
            streamer=streamer,
            custom_generate=decode,
            **kwargs,
        )
        return output

    def _stop_strings(
        self, config: GenerationConfig | None, criteria: StoppingCriteriaList, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig | None, StoppingCriteriaList]:
        """Stop strings as a criterion: transformers does not pass a tokenizer on to loops that are not its own."""
        strings = kwargs.pop("stop_strings", None) or (config.stop_strings if config is not None else None)
        tokenizer = kwargs.pop("tokenizer", None) or self.tokenizer
        if not strings:
            return config, criteria
        if tokenizer is None:
            raise UserError("generate: stop_strings need a tokenizer; pass tokenizer=...")
        if config is not None:
            config = GenerationConfig.from_dict(config.to_dict() | {"stop_strings": None})
        return config, StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])

    def _decode(
        self,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        settings: Any = generation_config
        _refuse(settings)
        limits = [each.max_length for each in stopping_criteria if isinstance(each, MaxLengthCriteria)]
        ends = {
            int(token)
            for each in stopping_criteria
            if isinstance(each, EosTokenCriteria)
            for token in each.eos_token_id.flatten()
        }
        further = StoppingCriteriaList(
            each for each in stopping_criteria if not isinstance(each, MaxLengthCriteria | EosTokenCriteria)
        )
        room = min(limits) - input_ids.shape[1]
        requests = self._requests(input_ids, attention_mask, room, sample=bool(settings.do_sample))
        choice = self._choice(settings, logits_processor, further, ends)

        def show(text: Text, new: list[int]) -> None:
            if streamer is not None:
                streamer.put(torch.tensor(new))

        texts = list(self.engine(requests, choice=choice, end_tokens=ends, on_tokens=show).run(requests))
        texts.sort(key=lambda text: text.number)
        self.counts = [text.counts(self.depth) for text in texts]
        if streamer is not None:
            streamer.end()
        padding = settings._pad_token_tensor
        sequences = torch.cat([input_ids, _padded(texts, 0 if padding is None else int(padding), input_ids)], dim=1)
        if not settings.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_by_step([text.scores for text in texts]) if settings.output_scores else None,
            logits=_by_step([text.logits for text in texts]) if settings.output_logits else None,
        )

    @property
    def depth(self) -> int:
        """Length of the chain that is drafted in every round; 0 where each round drafts what pays, or nothing."""
        return (self.drafting.depth or 0) if self.heads is not None else 0

    @property
    def sources(self) -> list[Source]:
        """Sources that draft."""
        there = {HEADS: self.heads is not None, LOOKUP: True, CORPUS: self.corpus is not None}
        return [source for source in self.drafting.sources if there[source]]

    def engine(self, requests: list[Request], **settings: Any) -> Engine:
        """Slots for these requests, and drafting as this model does it."""
        slots = settings.pop("slots", min(SLOTS, len(requests)))
        return Engine(
            self.trunk,
            self.heads if self.depth or HEADS in self.sources else None,
            slots=slots,
            capacity=max(len(request.prompt) + request.max_new_tokens for request in requests),
            depth=self.drafting.depth,
            planner=self._planner(settings.get("choice")),
            **settings,
        )

    @property
    def costs(self) -> Costs:
        """Seconds of passes and heads on this machine: those that were measured once, or measured now."""
        if self._costs is None:
            self._costs = machine_costs(self.trunk, self.heads)
        return self._costs

    def measure_costs(self) -> Costs:
        """Measures `costs` anew."""
        self._costs = machine_costs(self.trunk, self.heads, anew=True)
        return self._costs

    def _planner(self, choice: Choice | None) -> Planner | None:
        """Makes the planner of the rounds, unless a chain is wanted; drawn drafts are a chain of heads."""
        if self.depth or not self.sources or (choice is not None and not choice.branches):
            return None
        return Planner(self.chances, self.costs, self.sources, corpus=self.corpus)

    def _requests(self, input_ids: Tensor, mask: Tensor | None, room: int, *, sample: bool) -> list[Request]:
        seeds = torch.randint(2**62, (len(input_ids),)).tolist() if sample else [0] * len(input_ids)
        rows: list[list[int]] = input_ids.tolist()
        starts = [0] * len(rows) if mask is None else (mask.long().cumsum(1) == 0).sum(1).tolist()
        if mask is not None and bool((mask.sum(1) != mask.shape[1] - torch.tensor(starts, device=mask.device)).any()):
            raise UserError("attention_mask: zeros behind the first token of a prompt; accepted: padding on the left")
        context = self.trunk.context
        requests = []
        for row, start, seed in zip(rows, starts, seeds, strict=True):
            prompt = row[start:]
            if not 0 < len(prompt) < context:
                raise UserError(
                    f"prompt of {len(prompt)} tokens: accepted are 1 to {context - 1}, for a context of {context}"
                )
            requests.append(Request(prompt, min(room, context - len(prompt)), seed, padding=row[:start]))
        return requests

    def _choice(
        self, settings: Any, processors: LogitsProcessorList, criteria: StoppingCriteriaList, ends: set[int]
    ) -> Choice:
        scores = bool(settings.return_dict_in_generate and settings.output_scores)
        logits = bool(settings.return_dict_in_generate and settings.output_logits)
        warpers = independent(processors)
        if criteria or scores or logits or warpers is None or (warpers and not settings.do_sample):
            return Processed(
                processors,
                criteria,
                sample=bool(settings.do_sample),
                ends=ends,
                keep_scores=scores,
                keep_logits=logits,
            )
        if not settings.do_sample:
            return Greedy()
        if self.drafting.sampled and self.heads is not None:
            return SampledDrafts(warpers, rows=self.heads.rows())
        return Sampling(warpers)


def _check_ids(inputs: Any) -> None:
    """Raises UserError for what holds no token ids yet, or holds them in a way that leaves their mask behind."""
    if inputs is None or isinstance(inputs, Tensor):
        return
    if isinstance(inputs, Mapping):
        raise UserError("generate: a mapping of inputs is passed by its names: model.generate(**inputs)")
    given = f"{inputs[:20]!r}" if isinstance(inputs, str) else type(inputs).__name__
    raise UserError(
        f"generate: {given} is no tensor of token ids; accepted: "
        'model.generate(**model.tokenizer("text", return_tensors="pt"))'
    )


def _refuse(settings: Any) -> None:
    """Raises UserError for what drafts cannot serve."""
    mode = settings.get_generation_mode()
    if mode not in MODES:
        name = mode.value.replace("_", " ")
        raise UserError(f"generate: {name} is not accepted; accepted: greedy search and sampling")
    if getattr(settings, "use_mtp", None):
        raise UserError("generate: use_mtp is not accepted; the heads draft already")
    if settings.return_dict_in_generate:
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(settings, name):
                raise UserError(f"generate: {name} is not accepted; accepted: output_scores and output_logits")


def _padded(texts: list[Text], padding: int, like: Tensor) -> Tensor:
    width = max(len(text.tokens) for text in texts)
    return like.new_tensor([text.tokens + [padding] * (width - len(text.tokens)) for text in texts])


def _by_step(rows: list[list[Tensor]]) -> tuple[Any, ...]:
    """[rows, V] of each step; zeros where a text had ended."""
    blank = torch.zeros_like(rows[0][0])
    return tuple(
        torch.stack([row[step] if step < len(row) else blank for row in rows]) for step in range(max(map(len, rows)))
    )
