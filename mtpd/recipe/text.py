"""Recipes as people write them: YAML, `key=value` overrides, and messages about what is wrong in them.

Nothing here knows what a recipe contains: keys and accepted values come from its JSON schema.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError

from mtpd.errors import UserError

Schema = Mapping[str, Any]

COMMAND_LINE = "command line"
"""Where a value was written, in messages: the name of the recipe file, or this."""
PRIVATE = "x-"
"""Top-level keys of a file that begin so are the author's own: a place for YAML anchors."""

# YAML 1.2's plain scalars. PyYAML's own (1.1) read 3e-4 as text, `no` as false, 1:30 as 90 and 010 as 8.
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?)", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
)
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """Reads plain data only, and refuses a key that is written twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in _KEY_TAGS:
                raise yaml.constructor.ConstructorError(None, None, "a key is not a name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)


for _class in (_Loader, _Dumper):
    for _name, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
    # An empty scalar has no first character; PyYAML looks it up under the empty string.
    _class.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


def read_mapping(path: Path, *, what: str = "recipe", example: str = "mtpd recipe copy demo writes") -> dict[str, Any]:
    """The mapping in a YAML file, without its `x-` keys.

    Args:
        what: the kind of file, named in messages.
        example: of such a file.

    Raises:
        UserError: the file is missing, is no text, no YAML, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", "not UTF-8 text")
        )
        raise UserError(f"{what} file {path}: {reason}; accepted: a YAML file such as {example}") from None
    values = _read_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{what} file {path}: holds {_show(values)}; accepted: lines of the form key: value")
    return {key: value for key, value in values.items() if not str(key).startswith(PRIVATE)}


def _read_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of SafeLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1} column {mark.column + 1}" if mark is not None else ""
        raise UserError(f"{source}:{where} is not YAML: {' '.join(str(problem).split())}") from None
    except ValueError as error:
        raise UserError(f"{source}: is not YAML: {error}") from None


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML that `read_mapping` reads back as equal values, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def nest(written: Mapping[str, Any], schema: Schema, *, source: str) -> dict[str, Any]:
    """Nested mappings from keys of both spellings: `heads: {depth: 4}` and `heads.depth: 4`.

    A section without keys (all of them commented out) counts as absent.

    Raises:
        UserError: a key is written in both spellings, or goes through something that has no keys.
    """
    values: dict[str, Any] = {}
    sections = {name for name, part in schema["properties"].items() if "properties" in _resolve(part, schema)}
    for key, value in sorted(written.items(), key=lambda item: "." in item[0]):
        if value is None and key in sections:
            continue
        place, name = place_of(values, key, source)
        if name in place:
            raise UserError(f"{key}: is written twice ({source})")
        # An anchor stands in several places: an override of one of them must not change the others.
        place[name] = copy.deepcopy(value)
    return values


def apply_override(values: dict[str, Any], override: str, schema: Schema) -> str:
    """Sets one `section.key=value` in nested mappings, in place. Gives back the dotted key.

    Raises:
        UserError: there is no `=`, the value is no YAML, or the key goes through something that has no keys.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UserError(f"override {override!r}: is not accepted; accepted: key=value, such as heads.depth=4")
    value = _read_yaml(text, f"override {override}")
    if isinstance(value, bool | int | float) and _only_text(_at(schema, key.split("."))[1], schema):
        value = text
    place, name = place_of(values, key, COMMAND_LINE)
    place[name] = value
    return key


def place_of(values: dict[str, Any], key: str, source: str) -> tuple[dict[str, Any], str]:
    """The mapping that a dotted key lies in (made where it is missing), and its name there."""
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, 1):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{key}: {'.'.join(sections[:depth])} has no keys; give it whole ({source})")
    return values, name


def explain(
    error: ValidationError,
    schema: Schema,
    *,
    source: str,
    overridden: Sequence[str] = (),
    what: str = "recipe",
    synonyms: Mapping[str, str] = MappingProxyType({}),
    refusals: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """One line for all that pydantic found: each key with its value, what is accepted, and where it was written.

    Args:
        synonyms: unknown names with the keys that they mean.
        refusals: unknown keys with what is said about them.
    """
    messages: dict[str, str] = {}
    for item in error.errors():
        if item["type"] == "value_error":
            where = " and ".join(dict.fromkeys([source, *([COMMAND_LINE] if overridden else [])]))
            messages.setdefault("", f"{item['ctx']['error']} ({where})")
            continue
        path, part = _at(schema, item["loc"])
        key = ".".join(map(str, path))
        if item["type"] == "extra_forbidden":
            key = ".".join(map(str, item["loc"]))
            message = refusals.get(key) or f"{key}: unknown {what} key; {_suggest(key, schema, synonyms)}"
        elif item["type"] == "missing":
            message = f"{key}: is missing; accepted: {accepted(part, schema)}"
        else:
            message = f"{key}: {_show(item['input'])} is not accepted; accepted: {accepted(part, schema)}"
            if item["type"] == "int_type" and isinstance(item["input"], float) and item["input"].is_integer():
                message += ", in digits"
        from_override = any(key == name or key.startswith(f"{name}.") for name in overridden)
        messages.setdefault(key, f"{message} ({COMMAND_LINE if from_override else source})")
    return "; ".join(messages.values())


def accepted(part: Schema, schema: Schema) -> str:
    """Says in words what a piece of a JSON schema accepts."""
    part = _resolve(part, schema)
    if "anyOf" in part:
        return ", or ".join(accepted(choice, schema) for choice in part["anyOf"])
    if "enum" in part or "const" in part:
        return ", ".join(part.get("enum", [part.get("const")]))
    if "examples" in part:
        return "text such as " + ", ".join(map(str, part["examples"]))
    match part.get("type"):
        case "integer" | "number" as kind:
            return f"{'an integer' if kind == 'integer' else 'a number'}{_range(part)}"
        case "array":
            return f"a list, each item {accepted(part['items'], schema)}"
        case "object":
            keys = ", ".join(part.get("properties", {}))
            return f"a mapping with the keys {keys}" if keys else "a mapping"
        case "boolean":
            return "true or false"
        case "string":
            return "text" if "minLength" not in part else "text that is not empty"
        case kind:
            return str(kind)


def _range(part: Schema) -> str:
    if "minimum" in part and "maximum" in part:
        return f" from {part['minimum']} to {part['maximum']}"
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    limits = " and ".join(f"{word} {part[name]}" for name, word in words.items() if name in part)
    return f" {limits}" if limits else ""


def similar_key(key: str, schema: Schema, synonyms: Mapping[str, str] = MappingProxyType({})) -> str | None:
    """The key that is meant by one that may be misspelt or lack its section; None where that cannot be told."""
    if key in keys_of(schema):
        return key
    said = _suggest(key, schema, synonyms)
    return said.split()[3].rstrip("?") if said.startswith("did you mean") else None


def _suggest(key: str, schema: Schema, synonyms: Mapping[str, str]) -> str:
    """The nearest known key: a sibling, else the same name in another section, else a similar one there."""
    *sections, name = [part for part in key.split(".") if not part.isdigit()] or [key]
    names = {known: known.split(".")[-1] for known in keys_of(schema)}
    siblings = {last: known for known, last in names.items() if known.split(".")[:-1] == sections}
    found = [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1)]
    found = found or [known for known in [synonyms.get(key) or synonyms.get(name)] if known in names]
    found = found or [known for known, last in names.items() if last == name]
    found = found or [known for known, last in names.items() if len(name) > 1 and name == _initials(last)]
    found = found or [known for known, last in names.items() if difflib.get_close_matches(name, [last], cutoff=0.75)]
    found = found or [known for known, last in names.items() if len(name) > 2 and (name in last or last in name)]
    if found:
        # What most people mean comes first, whatever the order of the sections.
        found.sort(key=lambda known: not known.startswith("train."))
        return f"did you mean {' or '.join(found[:3])}?"
    return f"accepted here: {', '.join(siblings)}"


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def keys_of(schema: Schema, part: Schema | None = None, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of a schema, sections before what is in them."""
    for name, inner in _resolve(part or schema, schema).get("properties", {}).items():
        yield prefix + name
        resolved = _resolve(inner, schema)
        yield from keys_of(schema, resolved.get("items", resolved), f"{prefix}{name}.")


def _at(schema: Schema, location: Sequence[str | int]) -> tuple[list[str | int], Schema]:
    """Follows a path into a schema as far as it leads through keys and lists; gives that part of it too."""
    path: list[str | int] = []
    part: Schema = schema
    for step in location:
        part = _resolve(part, schema)
        if isinstance(step, str) and step in part.get("properties", {}):
            part = part["properties"][step]
        elif isinstance(step, int) and "items" in part:
            part = part["items"]
        else:
            break
        path.append(step)
    return path, part


def _resolve(part: Schema, schema: Schema) -> Schema:
    while "$ref" in part:
        part = schema["$defs"][part["$ref"].rsplit("/", 1)[-1]]
    return part


def _only_text(part: Schema, schema: Schema) -> bool:
    kinds = [_resolve(choice, schema).get("type") for choice in part.get("anyOf", [part])]
    return "string" in kinds and not {"integer", "number", "boolean"} & set(kinds)


def _show(value: Any) -> str:
    """A value as YAML in one line, cut where it is long."""
    try:
        text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    except yaml.YAMLError:
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
