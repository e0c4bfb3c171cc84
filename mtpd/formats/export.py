"""Writing an export: which layout, the directory, the check of what was written, and its model card."""

from __future__ import annotations

from pathlib import Path

from mtpd.errors import MtpdError, UserError
from mtpd.finished_run import EXPORTED
from mtpd.formats.directory import Checkpoint, new_directory, write_json
from mtpd.formats.exported_run import Run, open_run
from mtpd.formats.find_heads import find_heads
from mtpd.formats.layout import ENGINES, Layout, targets
from mtpd.formats.layouts import LAYOUTS
from mtpd.formats.model_card import CARD, OWN_CARD, about, model_card
from mtpd.formats.read_back import read_back
from mtpd.formats.serving import write_vllm_config
from mtpd.formats.tensors import cast, is_zero


def export(
    path: Path,
    output: Path,
    *,
    to: str,
    depth: int | None = None,
    base: Path | None = None,
    perturb: bool = True,
    untrusted: bool = False,
) -> tuple[Layout, str]:
    """Writes the heads of a run in a layout.

    Args:
        path: the run directory.
        to: a layout, or an engine that one is chosen for.
        depth: how many depths; None is all.
        base: a GGUF file of the base, for layouts that write one.
        perturb: also loads what was written, as it is and with heads made noise, which must accept less.
        untrusted: the run is somebody else's: code that comes with its model is not run, whatever its recipe says.

    Returns:
        The layout, and why it was chosen and what was found when it was read back.

    Raises:
        UserError: the heads do not fit; the message has the alternative.
        MtpdError: what was written does not hold what it should.
    """
    if to not in ENGINES and to not in LAYOUTS:
        raise UserError(f"--to {to}: is not known; accepted: {', '.join(targets())}")
    if output.exists():
        raise UserError(f"output: {output} exists; choose another output, or delete it first")
    run = open_run(path, depth=depth, gguf=base, untrusted=untrusted)
    layout, why = choose(run, to)
    with new_directory(output) as folder:
        layout.write(run, folder)
        if layout.checked is not None:
            why += f"; {layout.checked(run, folder)}"
        else:
            check(run, layout, folder)
        if perturb and layout.checked is None:
            why += f"; {read_back(run, folder, layout)}"
        # A link to a file of the base must not be written through.
        (folder / EXPORTED).unlink(missing_ok=True)
        write_json(folder / EXPORTED, about(run, layout))
        write_vllm_config(run, layout, folder, output)
        card = folder / (OWN_CARD if (folder / CARD).exists() else CARD)
        card.unlink(missing_ok=True)
        card.write_text(model_card(run, layout, output, folder), encoding="utf-8")
    return layout, why


def choose(run: Run, to: str) -> tuple[Layout, str]:
    """The layout of that name, or the first that an engine of that name loads and the run fits.

    Raises:
        UserError: no such layout, or none that fits.
    """
    if to in LAYOUTS:
        reason = unfit(run, LAYOUTS[to])
        if reason:
            raise UserError(f"--to {to}: {reason}")
        return LAYOUTS[to], "as asked for"
    fitting = [layout for layout in LAYOUTS.values() if layout.kind == run.config.kind]
    replace = any(layout.replaces for layout in fitting) and run.base_has_heads
    tried = [layout for layout in fitting if to in layout.serve and layout.replaces == replace]
    if not tried:
        raise UserError(
            f"--to {to}: has no layout for {run.config.kind} heads; accepted: mtpd's own decoding (`mtpd generate`)"
        )
    reasons: dict[str, str] = {}
    for layout in tried:
        reason = unfit(run, layout)
        if reason is None:
            passed = "".join(f"; not {other}: {why}" for other, why in reasons.items())
            return layout, f"{layout.about}{passed}"
        reasons[layout.name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UserError(f"--to {to}: no layout fits this run. {told}")


def unfit(run: Run, layout: Layout) -> str | None:
    """Why a run does not fit a layout, with the alternative; None if it does."""
    if run.config.kind != layout.kind:
        fitting = [name for name, each in LAYOUTS.items() if each.kind == run.config.kind]
        accepted = ", ".join(fitting) or "mtpd's own decoding (`mtpd generate`)"
        return f"the layout is for {layout.kind} heads, and these are {run.config.kind} heads; accepted: {accepted}"
    if run.config.shared_layers:
        return (
            f"the heads read {run.config.shared_layers} adapted layers of the trunk (heads.shared_layers), for which "
            "it has no place; accepted: mtpd's own decoding (`mtpd generate`)"
        )
    if not run.base.files and layout.checked is None:
        able = ", ".join(name for name, each in LAYOUTS.items() if each.checked is not None)
        return f"the base is a file of llama.cpp; accepted: {able}, or a run with the checkpoint that it is of"
    return layout.refused(run)


def check(run: Run, layout: Layout, folder: Path) -> None:
    """Reads the export back: every tensor of the heads, by name and value, none besides, and the files beside them.

    Raises:
        MtpdError: naming what is missing or differs.
    """
    try:
        written = Checkpoint(folder)
        native = find_heads(written, family=layout.family, base=run.base)
    except UserError as error:
        raise MtpdError(f"export {layout.name}: what was written cannot be read back: {error}") from error
    found = native.tensors
    expected = run.heads(run.written if layout.replaces else native.count)
    # Numbers are rounded to the format of what they replace.
    odd = sorted(n for n, t in expected.items() if n in found and not cast(t, found[n].dtype).same(found[n]))
    odd = sorted(set(expected) - set(found)) or odd
    if odd:
        raise MtpdError(f"export {layout.name}: {odd[0]} was not written as it is in {run.path}")
    # A base may have more heads than those that were trained; MiMo's layers have biases, which are zeros elsewhere.
    further = set() if layout.replaces else set(found) - set(expected)
    unexpected = sorted(name for name in further if not (name.endswith(".bias") and is_zero(found[name])))
    if unexpected:
        raise MtpdError(f"export {layout.name}: {unexpected[0]} was written, which {run.path} does not have")
    # A draft model has no words of its own: engines take the base's tokenizer.
    if not layout.apart:
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (run.base.path / file).is_file() and not (folder / file).is_file():
                raise MtpdError(f"export {layout.name}: {file} of the base was not copied")
