"""What files of people may hold: read as meant, or refused in one line. 10,000 cases, the same ones each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtpd.data.prompts import Prompt, load_prompts, read_row
from mtpd.errors import MtpdError
from mtpd.evaluate.acceptance import Acceptance
from mtpd.files import sealed
from mtpd.heads import CONFIG, HeadsConfig, read_config
from mtpd.recipe import Recipe, dump, load_recipe, parse_recipe
from mtpd.recipe.text import to_yaml


def cases(count: int) -> Any:
    """So many cases, drawn the same way each time, with no limit on the time of one."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def refusal(act: Any) -> tuple[Any, str | None]:
    """What a reader gives, or why it refuses; nothing else may come out of it."""
    try:
        return act(), None
    except MtpdError as error:
        said = str(error)
    assert said.strip()
    # The command line shows it as one line whatever is in it; it has to say something about each.
    return None, said


WORDS = st.text(max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from(["builtin", "tiny", "auto", "trunk", "given", "disk", "chain", "", "4", "nan", "~", "a.jsonl"])
    | WORDS
)
ANYTHING = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(WORDS, SCALARS | st.lists(SCALARS), max_size=2)


def leaves(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Dotted keys of a recipe with their part of the schema."""
    found = {}
    for name, part in schema["properties"].items():
        inner = schema["$defs"].get(part.get("$ref", "").rpartition("/")[2])
        if inner is None:
            found[name] = part
            continue
        for key, leaf in leaves({**inner, "$defs": schema["$defs"]}).items():
            found[f"{name}.{key}"] = leaf
    return found


LEAVES = leaves(Recipe.model_json_schema())


def near(part: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a key of the schema may well accept, and its neighbours."""
    kinds: list[st.SearchStrategy[Any]] = []
    for each in part.get("anyOf", [part]):
        if "enum" in each:
            kinds.append(st.sampled_from(each["enum"]))
        match each.get("type"):
            case "integer":
                kinds.append(st.integers(each.get("minimum", 0) - 1, each.get("maximum", 600) + 1))
            case "number":
                kinds.append(st.floats(-0.5, 3.0))
            case "boolean":
                kinds.append(st.booleans())
            case "string":
                kinds.append(st.sampled_from(["builtin", "rows.jsonl", "org/name", "cpu", "x"]) | WORDS)
            case "null":
                kinds.append(st.none())
            case "array":
                kinds.append(st.lists(st.floats(0, 1) | st.integers(0, 20) | WORDS, max_size=3))
    return st.one_of(kinds) if kinds else ANYTHING


KEYS = st.sampled_from(sorted(LEAVES)).filter(lambda key: key != "train.arguments")


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe with some keys set, mostly to what they accept."""
    values: dict[str, Any] = {"model": "tiny"}
    for key in draw(st.lists(KEYS, max_size=6, unique=True)):
        values[key] = draw(near(LEAVES[key]) if draw(st.integers(0, 9)) else ANYTHING)
    if not draw(st.integers(0, 9)):
        values[draw(WORDS)] = draw(ANYTHING)
    return values


@cases(2500)
@given(values=recipes())
def test_recipes(values: dict[str, Any]) -> None:
    """Fault: a value that breaks a rule with a traceback, or a recipe that changes when it is written and read."""
    sections: dict[str, Any] = {}
    for key, value in values.items():
        *path, name = key.split(".")
        place = sections
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                return
        place[name] = value
    recipe, said = refusal(lambda: parse_recipe(sections))
    if recipe is None:
        assert "accepted" in said or "unknown" in said or "did you mean" in said, said
    else:
        assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@cases(1500)
@given(text=st.one_of(recipes().map(to_yaml), st.text(max_size=40), st.binary(max_size=40)), cut=st.integers(0, 200))
def test_recipe_files(text: str | bytes, cut: int, tmp_path_factory: Any) -> None:
    """Fault: a file that is no YAML, no text or cut off ends in a traceback."""
    path = Path(tmp_path_factory.getbasetemp()) / "fuzz-recipe.yaml"
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    path.write_bytes(content[: len(content) - cut % 7])
    recipe, _ = refusal(lambda: load_recipe(path))
    if recipe is not None:
        path.write_text(dump(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe


@cases(1500)
@given(overrides=st.lists(st.tuples(KEYS | WORDS, ANYTHING), max_size=3), raw=st.lists(WORDS, max_size=1))
def test_overrides(overrides: list[tuple[str, Any]], raw: list[str]) -> None:
    """Fault: a word on the command line that ends in a traceback."""
    said = [f"{key}={value}" for key, value in overrides]
    refusal(lambda: load_recipe(None, ["model=tiny", *said, *raw]))


MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": WORDS}) | ANYTHING
FIELDS = {
    "prompt": WORDS | st.lists(MESSAGE, max_size=3) | ANYTHING,
    "completion": WORDS | st.lists(MESSAGE, max_size=2) | ANYTHING,
    "messages": st.lists(MESSAGE, max_size=4) | ANYTHING,
    "turns": st.lists(WORDS, max_size=3) | ANYTHING,
    "text": WORDS | ANYTHING,
    "id": SCALARS,
    "family": SCALARS,
    "category": SCALARS,
    "reference": SCALARS,
}
ROWS = st.fixed_dictionaries({}, optional=FIELDS) | ANYTHING


@cases(2000)
@given(row=ROWS)
def test_rows_of_prompts(row: Any) -> None:
    """Fault: a row of an odd form becomes a prompt without text, or ends in a traceback."""
    prompt, said = refusal(lambda: read_row(row, place="rows.jsonl:7", default_id="rows-6"))
    if prompt is None:
        assert said.startswith("rows.jsonl:7")
    else:
        assert isinstance(prompt, Prompt)
        assert isinstance(prompt.text, str)
        assert len(prompt.fingerprint) == 12


@cases(500)
@given(rows=st.lists(ROWS.map(json.dumps) | WORDS, max_size=4), tail=st.binary(max_size=6))
def test_files_of_prompts(rows: list[str], tail: bytes, tmp_path_factory: Any) -> None:
    """Fault: a line that is no JSON, or no text, ends in a traceback."""
    path = Path(tmp_path_factory.getbasetemp()) / "fuzz-rows.jsonl"
    path.write_bytes("\n".join(rows).encode("utf-8", "surrogatepass") + b"\n" + tail)
    prompts, said = refusal(lambda: load_prompts(str(path)))
    assert (prompts is None) == (said is not None)
    if prompts is not None:
        assert len({prompt.id for prompt in prompts}) == len(prompts)


def counts(depth: int, number: Any) -> Any:
    fields: dict[str, Any] = {
        "prompts": number,
        "tokens": number,
        "forwards": number,
        "seconds": st.floats(-1, 9) | SCALARS,
        "drafted": st.lists(number, min_size=depth, max_size=depth),
        "accepted": st.lists(number, min_size=depth, max_size=depth),
    }
    return st.fixed_dictionaries(fields, optional={"control": ANYTHING, "rows": ANYTHING, "settings": ANYTHING})


COUNT = st.integers(-1, 9)
SUITES = st.dictionaries(WORDS, counts(2, COUNT) | counts(1, COUNT | SCALARS) | ANYTHING, max_size=2)
FILES = st.fixed_dictionaries(
    {"schema": st.sampled_from([1, 2, 3]), "mode": st.sampled_from(["offline", "decoded", "x"]), "suites": SUITES},
    optional={"trunk": WORDS, "heads": WORDS, "sampling": ANYTHING, "versions": ANYTHING, "sha256": WORDS},
)


@cases(1000)
@given(content=FILES | ANYTHING, seal=st.booleans())
def test_acceptance_files(content: Any, seal: bool, tmp_path_factory: Any) -> None:
    """Fault: impossible counts that are read as a measurement, or a file that changes when it is saved again."""
    path = Path(tmp_path_factory.getbasetemp()) / "fuzz-acceptance.json"
    if isinstance(content, dict):
        content = {"trunk": "t", "heads": "h", **content}
    path.write_text(json.dumps(sealed(content) if seal and isinstance(content, dict) else content))
    found, said = refusal(lambda: Acceptance.load(path))
    if found is None:
        assert str(path) in said
        return
    total = found.total()
    assert all(0 <= car <= 1 for car in total.car)
    found.save(path)
    assert Acceptance.load(path) == found


HEADS = st.fixed_dictionaries(
    {"depth": st.integers(-1, 5), "hidden_size": st.integers(-1, 64), "source_layers": st.lists(COUNT, max_size=5)},
    optional={
        "kind": st.sampled_from(["chain", "parallel", "medusa", "circuit", "x"]),
        "shared": st.booleans() | SCALARS,
        "blocks": st.lists(COUNT, max_size=5),
        "adapters": st.lists(COUNT, max_size=5),
        "parallel": st.just({"block": "linear"}) | ANYTHING,
        "circuit": st.just({"structure": "hmm"}) | ANYTHING,
        "weights": WORDS,
        "trunk": WORDS,
    },
)


@cases(1000)
@given(content=HEADS | ANYTHING, seal=st.booleans())
def test_configs_of_heads(content: Any, seal: bool, tmp_path_factory: Any) -> None:
    """Fault: a config that no heads can have ends in a traceback, or is accepted."""
    folder = Path(tmp_path_factory.getbasetemp()) / "fuzz-heads"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(sealed(content) if seal and isinstance(content, dict) else content))
    config, said = refusal(lambda: read_config(folder))
    if config is None:
        assert "no readable heads here" in said
        return
    assert HeadsConfig.model_validate_json(config.model_dump_json()) == config
    assert len(config.block_of) == config.depth
    if config.kind == "chain":
        assert config.merged().depth == config.depth
