"""`mtpd verify`: an exported directory in a real engine, beside mtpd's own decoding of the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtpd.data.models import load_model
from mtpd.data.prompts import load_prompts
from mtpd.data.rendering import render_all
from mtpd.data.rows.left_out import LeftOut
from mtpd.decode.plain import plain_texts
from mtpd.errors import UserError
from mtpd.evaluate.decoded import parted_at_tie
from mtpd.formats.directory import Checkpoint
from mtpd.formats.engines import ENGINES, with_transformers, with_vllm
from mtpd.formats.engines.plugin import PLUGIN
from mtpd.formats.engines.result import Served
from mtpd.formats.find_heads import Native, find_heads
from mtpd.formats.importing import open_checkpoint
from mtpd.formats.layout import Layout
from mtpd.formats.layouts import layout_of
from mtpd.formats.model_card import read_says
from mtpd.formats.noise_check import accepts_less, perturbed
from mtpd.formats.replay import Compared, compared, own_counts
from mtpd.heads import Heads, load_heads
from mtpd.progress import Bar
from mtpd.trunk import Trunk

PERTURBED = 2
"""Prompts that are served with noise for heads."""
AGAIN = 2
"""Prompts that a server gets a second time, when it has their keys and values."""
CONFIDENCE = 1.96
"""Standard deviations of the interval that a difference has to be inside of: 95%."""


@dataclass(frozen=True)
class Verified:
    """Texts, drafts and counts of an engine, beside those of mtpd with the same heads."""

    layout: str
    served: Served
    plain: list[list[int]]
    drafted: list[int]
    accepted: list[int]
    """mtpd's own, over the rounds that the engine's count."""
    ties: int
    """Texts that differ from plain decoding from a tie on: two tokens whose logits agree to rounding."""
    compared: Compared | None
    """Of each draft with mtpd's; None where the engine gives counts alone."""
    perturbed: Served | None

    @property
    def same(self) -> int:
        return sum(a == b for a, b in zip(self.served.texts, self.plain, strict=True))

    @property
    def text_ok(self) -> bool:
        return self.same + self.ties == len(self.plain)

    def position(self, k: int) -> tuple[float, float, tuple[float, float]]:
        """CAR of the engine and of mtpd up to depth k + 1, and the interval of mtpd's."""
        accepted, drafted = self.accepted[k], self.drafted[k]
        return self.served.car[k], accepted / max(1, drafted), interval(accepted, drafted)

    @property
    def acceptance_ok(self) -> bool:
        return all(low <= theirs <= high for theirs, _, (low, high) in map(self.position, range(len(self.served.car))))

    @property
    def perturbation_ok(self) -> bool | None:
        """Whether perturbed heads accept less; None where hardly anything was accepted before, or it was not tried."""
        return None if self.perturbed is None else accepts_less(self.served.car[0], self.perturbed.car[0])

    @property
    def ok(self) -> bool:
        drafts_ok = self.acceptance_ok if self.compared is None else self.compared.ok
        return self.text_ok and drafts_ok and self.perturbation_ok is not False

    def lines(self) -> list[str]:
        """The result, one finding a line."""
        said = [
            f"{self.served.version}, layout {self.layout}: {self.same} of {len(self.plain)} texts are the plain "
            f"model's" + f", {self.ties} part from it at a tie" * bool(self.ties)
        ]
        if self.compared is None:
            said.append("drafts: not compared, the engine gives counts alone; acceptance, of all rounds of a text:")
        else:
            each = zip(self.compared.drafts, self.compared.equal, self.compared.ties, strict=True)
            told = [f"{equal} of {drafts}" + f" and {ties} at a tie" * bool(ties) for drafts, equal, ties in each]
            equal = "EQUAL" if self.compared.ok else "NOT EQUAL"
            said.append(f"drafts, each beside mtpd's, by depth: {', '.join(told)}: {equal}")
        for k in range(len(self.served.car)):
            theirs, ours, (low, high) = self.position(k)
            inside = "inside" if low <= theirs <= high else "OUTSIDE"
            said.append(
                f"CAR_{k + 1}: engine {theirs:.3f} ({self.served.accepted[k]} of {self.served.drafted[k]}), mtpd "
                f"{ours:.3f} ({self.accepted[k]} of {self.drafted[k]}), gap {theirs - ours:+.3f}, "
                f"{inside} the 95% interval {low:.3f} to {high:.3f}"
            )
        if self.perturbed is not None:
            found = {True: "less: the heads are read", False: "NOT LESS: the heads are not read", None: "undecided"}
            said.append(f"perturbed heads: CAR_1 {self.perturbed.car[0]:.3f}, {found[self.perturbation_ok]}")
        return said


def verify(
    folder: Path,
    *,
    engine: str,
    prompts: str = "builtin-held-out",
    limit: int = 4,
    max_new_tokens: int = 32,
    drafts: int | None = None,
    run: Path | None = None,
    environment: Path | None = None,
    perturb: bool = True,
) -> Verified:
    """Serves an export in float32 and compares texts, drafts and acceptance with mtpd's own.

    Drafts are compared one by one where the engine gives them: transformers, and vLLM with mtpd's plugin on its V1
    runner. Elsewhere acceptance has to lie inside the interval of mtpd's.

    Args:
        folder: what `mtpd export` wrote.
        engine: transformers or vllm.
        prompts: as `data.prompts` of a recipe.
        limit: prompts at most, spread over the source.
        drafts: a round; None is the depth of the export.
        run: the run that was exported; None is where it was then.
        environment: of vLLM; None is one in mtpd's cache, made on first use.
        perturb: also serves the directory with perturbed heads, which must accept less.

    Raises:
        UserError: the engine does not load the export, or the model, the heads or the prompts cannot be read.
    """
    says = read_says(folder)
    assert says is not None, "the command has looked"
    layout = layout_of(says)
    if engine not in layout.serve:
        able = [name for name in ENGINES if name in layout.serve]
        raise UserError(f"--engine {engine}: does not load layout {layout.name}; accepted: {', '.join(able) or 'none'}")
    depth = drafts or int(says["depth"])
    if engine == "vllm" and layout.second_runner and depth > 1 and not torch.cuda.is_available():
        raise UserError(
            f"--drafts: {depth} is not accepted with layout {layout.name} in vLLM on a CPU, which would draft with "
            "the first block at every depth; accepted: 1, a GPU, or mtpd export --to mtpd-vllm"
        )
    model, tokenizer = load_model(str(says["base"]), dtype="float32", device="cpu")
    trunk = Trunk(model)
    native = find_heads(Checkpoint(folder), family=layout.family, base=Checkpoint(folder))
    heads = _as_exported(load_heads(Path(run or says["run"]) / "heads", trunk), native, layout)
    heads.shorten(depth)
    chosen = load_prompts(prompts)
    chosen = chosen[:: max(1, len(chosen) // limit)][:limit]
    left_out = LeftOut()
    texts = [ids for _, ids in render_all(tokenizer, chosen, left_out)]
    left_out.check(len(chosen), source=f"--suite: {prompts}")
    if engine == "vllm":
        texts += texts[:AGAIN]
    spoiled = texts[:PERTURBED] if perturb else []
    plain: list[list[int]] = []
    # Plain and by the engine: texts of about the same cost.
    with (
        Bar(total=2 * len(texts) + len(spoiled), desc="plain", unit="text", leave=False) as bar,
        perturbed(native) if perturb else nullcontext() as copy,
    ):
        for prompt in texts:
            # Drafts of the last round lie past the end.
            text = plain_texts(trunk.model, torch.tensor([prompt]), max_new_tokens=max_new_tokens + depth)
            plain.append(text[0, len(prompt) :].tolist())
            bar.update()
        bar.set_description(engine)
        asked = [(folder, texts), *([(copy.folder, spoiled)] if copy is not None else [])]
        served, *others = _serve(engine, asked, layout, says, max_new_tokens, depth, environment, bar)
    drafted, accepted = own_counts(trunk, heads, texts, plain, length=max_new_tokens, to_the_end=served.rounds is None)
    plain = [text[:max_new_tokens] for text in plain]
    ties = sum(
        theirs != ours and parted_at_tie(trunk, torch.tensor(prompt), ours, theirs)
        for prompt, theirs, ours in zip(texts, served.texts, plain, strict=True)
    )
    drafts_compared = compared(trunk, heads, texts, served)
    return Verified(layout.name, served, plain, drafted, accepted, ties, drafts_compared, others[0] if others else None)


def _as_exported(heads: Heads, native: Native, layout: Layout) -> Heads:
    """Gives the heads with the numbers that the export has, in float32, and the tokens that its engine drafts."""
    if any(heads.config.adapters):
        heads = heads.as_chain(what="verify").merged()
    if not layout.vocabulary:
        heads.vocabulary = heads.get_buffer("vocabulary")[:0]
    written = next(iter(native.raw.values())).dtype
    return heads.to(written).float()


def _serve(
    engine: str,
    asked: Sequence[tuple[Path, Sequence[Sequence[int]]]],
    layout: Layout,
    says: dict[str, Any],
    max_new_tokens: int,
    depth: int,
    environment: Path | None,
    bar: Bar,
) -> list[Served]:
    """Serves prompts with one directory after the other."""
    if engine == "transformers":
        return [
            with_transformers.serve(folder, each, max_new_tokens=max_new_tokens, progress=bar.update)
            for folder, each in asked
        ]
    base = open_checkpoint(str(says["base"])).path.resolve()
    models = [
        with_vllm.Asked(
            str(base if layout.apart else folder.resolve()),
            prompts,
            layout.speculative(str(folder.resolve()), depth),
            dict(says["overrides"]),
            folder / PLUGIN if (folder / PLUGIN).is_dir() else None,
        )
        for folder, prompts in asked
    ]
    python = with_vllm.environment(environment)
    return with_vllm.serve(python, models, max_new_tokens=max_new_tokens, progress=bar.update)


def interval(accepted: int, drafted: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share (J. Am. Stat. Assoc. 22, 1927)."""
    if not drafted:
        return 0.0, 1.0
    share, z2 = accepted / drafted, CONFIDENCE**2
    middle = (share + z2 / (2 * drafted)) / (1 + z2 / drafted)
    half = CONFIDENCE / (1 + z2 / drafted) * math.sqrt(share * (1 - share) / drafted + z2 / (4 * drafted**2))
    # Of none and of all the ends are exact, where rounding would leave the share itself outside.
    return 0.0 if not accepted else middle - half, 1.0 if accepted == drafted else middle + half
