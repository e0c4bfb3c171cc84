"""`mtpd inspect`: which heads a directory has, and which engines can serve it."""

from __future__ import annotations

from pathlib import Path

from mtpd.formats.export import unfit
from mtpd.formats.exported_run import open_run
from mtpd.formats.family import Family
from mtpd.formats.find_heads import Native, NoHeads, find_heads, layer_shapes
from mtpd.formats.importing import open_checkpoint, read_imported
from mtpd.formats.layout import ENGINES, Layout
from mtpd.formats.layouts import LAYOUTS, layout_of
from mtpd.formats.model_card import read_says


def inspect(name: str, *, family: str | None = None, base: str | None = None) -> list[str]:
    """Describes a run directory, an export or a checkpoint, one fact a line.

    Raises:
        UserError: it is none of them, or its heads are not whole.
    """
    path = Path(name).expanduser()
    if (path / "recipe.yaml").is_file() and (path / "heads").is_dir():
        return _run(path)
    imported = read_imported(path) if path.is_dir() else None
    if imported is not None:
        return [
            f"{name}: {imported['heads']} heads of family {imported['family']}, imported from {imported['source']}",
            f"mtpd cannot compute them: {imported['cannot_run']}; `mtpd graft` moves them to another base",
        ]
    says = read_says(path) if path.is_dir() else None
    layout = layout_of(says) if says else None
    if layout is not None and layout.checked is not None:
        return _export(layout)
    checkpoint = open_checkpoint(name)
    # Of exports without their base, `mtpd.json` says which it is.
    apart = says is not None and not layer_shapes(checkpoint, without=set())
    other = open_checkpoint(str(says["base"])) if says and apart else open_checkpoint(base) if base else None
    try:
        native = find_heads(checkpoint, family=family or (layout.family if layout else None), base=other)
    except NoHeads as found:
        if layout is not None or family is not None:
            raise
        return [str(found), f"train heads for it: mtpd distill model={name}"]
    lines = _heads(native)
    if layout is not None:
        lines += _export(layout)
    return lines


def _export(layout: Layout) -> list[str]:
    engines = [engine for engine in ENGINES if engine in layout.serve]
    return [
        f"export of mtpd, layout {layout.name}: {layout.about}",
        f"loaded by: {', '.join(engines) or 'no engine by itself'}",
    ]


def _heads(native: Native) -> list[str]:
    family = native.family
    sizes = sum(tensor.size for tensor in native.raw.values())
    checkpoint = native.checkpoint
    return [
        f"{checkpoint.shown}: {native.count} MTP head{'s' * (native.count > 1)}, family {family.name} ({family.title})",
        f"declared by: {native.key or 'no key of the config'}",
        f"tensors: {len(native.raw)}, {sizes / 1e6:.1f} MB, such as {next(iter(native.raw))}",
        *_conventions(family),
        f"base: {native.model_type}, {native.base.layers} layers, "
        + (
            f"quantised ({native.base.quantisation.get('quant_method')})"
            if native.base.quantisation
            else "in 16 or 32 bits"
        ),
        f"served by: {', '.join(family.engines) or 'no engine by itself'}",
        f"in mtpd: {'runs' if native.cannot_run is None else 'does not run: ' + native.cannot_run}",
    ]


def _conventions(family: Family) -> list[str]:
    first = "[embedding, hidden]" if family.order == "embedding" else "[hidden, embedding]"
    handed = {"after": "after the head's norm", "before": "before the head's norm", "raw": "without a norm"}
    return [
        f"projection of {first}; base's state {family.hidden} the final norm; handed on {handed[family.recycled]}; "
        f"norms store {'the gain' if family.norm == 'plain' else 'the gain less 1'}"
        + "; embedding at position 0 zeroed"
        * family.zeroes_first,
    ]


def _run(path: Path) -> list[str]:
    run = open_run(path)
    blocks = "one shared block" if run.recycles else f"{run.blocks} blocks"
    lines = [
        f"{path}: run of mtpd for {run.model} ({run.model_type}), depth {run.depth}, {blocks}",
    ]
    imported = read_imported(path)
    if imported is not None:
        lines.append(f"imported from {imported['source']}, family {imported['family']}")
    for name, layout in LAYOUTS.items():
        reason = unfit(run, layout)
        lines.append(f"export --to {name}: " + ("fits" if reason is None else f"no, {reason}"))
    return lines
