"""Recipes: what is read, what is refused, and whether the message leads to the mend."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

import pytest

from mtpd.errors import UserError
from mtpd.recipe import Recipe, dump, load_pretrain_recipe, load_recipe, loss_weights, recipe_schema
from mtpd.recipe.rules import OWNED_ARGUMENTS
from mtpd.recipe.sections import SCHEDULERS, TrainRecipe
from mtpd.recipe.text import keys_of

RECIPES = Path(__file__).parents[1] / "recipes"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def refusal(*overrides: str, path: Path | None = None) -> str:
    """The message about a recipe that must be refused: one line."""
    with pytest.raises(UserError) as error:
        load_recipe(path, ["model=demo", *overrides])
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_output_follows_the_name_of_the_file(tmp_path: Path) -> None:
    """Fault: two recipes write into one run directory and resume each other."""
    path = write(tmp_path, "model: demo\n")
    assert load_recipe(path).output == Path("runs/mine")
    assert load_recipe(path, ["output=elsewhere/run"]).output == Path("elsewhere/run")
    assert load_recipe(write(tmp_path, "model: demo\noutput: there\n")).output == Path("there")
    assert load_recipe(None, ["model=demo"]).output == Path("runs/default")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=3e-4", "learning_rate", 3e-4),  # YAML 1.1 reads this as text
        ("train.learning_rate=1E-3", "learning_rate", 1e-3),
        ("train.learning_rate=.001", "learning_rate", 1e-3),
        ("train.epochs=2", "epochs", 2.0),
        ("train.top_n=10_000", "top_n", 10_000),
        ("train.max_steps=-1", "max_steps", -1),
        ("train.weights=[0.1, 0.2, 0.3, 1]", "weights", [0.1, 0.2, 0.3, 1.0]),
        ("train.weights=null", "weights", None),
        ("train.weights=", "weights", None),
        ("train.report_to=[tensorboard]", "report_to", ["tensorboard"]),
    ],
)
def test_override_values_are_yaml(override: str, key: str, value: object) -> None:
    """Fault: a number, list or null on the command line arrives as text, or as another number."""
    assert getattr(load_recipe(None, ["model=demo", override]).train, key) == value


@pytest.mark.parametrize("name", ["no", "2024", "1e3", "2024-01-01", "true"])
def test_text_stays_text(name: str) -> None:
    """Fault: a datasets configuration called `no` or `2024` becomes false or a number."""
    recipe = load_recipe(None, ["model=demo", "data.prompts=org/set", f"data.subset={name}"])
    assert recipe.data.subset == name


def test_overrides_win_over_the_file_and_keep_the_rest(tmp_path: Path) -> None:
    """Fault: an override replaces its whole section, and the other keys of the file are lost."""
    path = write(tmp_path, "model: demo\nheads:\n  depth: 3\n  init: random\n")
    recipe = load_recipe(path, ["heads.depth=2", "heads.depth=5"])
    assert (recipe.heads.depth, recipe.heads.init) == (5, "random")


def test_both_spellings_of_a_key_say_the_same(tmp_path: Path) -> None:
    """Fault: a dotted key replaces its section, or silently loses against it."""
    path = write(tmp_path, "heads.depth: 3\nmodel: demo\nheads:\n  init: random\n")
    assert load_recipe(path).heads == load_recipe(None, ["model=demo", "heads.depth=3", "heads.init=random"]).heads
    assert "heads.init: is written twice" in refusal(path=write(tmp_path, "heads.init: random\nheads: {init: random}"))
    assert "model has no keys" in refusal(path=write(tmp_path, "model: demo\nmodel.name: x\n"))


def test_keys_of_ones_own_hold_yaml_anchors(tmp_path: Path) -> None:
    """Fault: a recipe with anchors is refused, or an override of one place of an anchor changes the others."""
    path = write(tmp_path, "x-w: &w {decay: 0.2}\nmodel: demo\ntrain:\n  <<: *w\n  epochs: 2\n")
    assert (load_recipe(path).train.decay, load_recipe(path).train.epochs) == (0.2, 2.0)
    path = write(tmp_path, "x-t: &t [{prompts: a.jsonl}]\nmodel: demo\ndata.given: *t\n")
    assert load_recipe(path).data.given[0].prompts == "a.jsonl"
    assert "y-w: unknown recipe key" in refusal(path=write(tmp_path, "y-w: 1\nmodel: demo\n"))
    assert "train.x-w: unknown recipe key" in refusal(path=write(tmp_path, "train.x-w: 1\nmodel: demo\n"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.limit=1e20", "an integer from 1 to 1000000000, or null, in digits"),
        ("data.limit=100000000000000000000", "an integer from 1 to 1000000000, or null"),
        ("train.max_steps=100000000000000000000", "an integer from -1 to 1000000000"),
    ],
)
def test_numbers_that_nothing_has(override: str, message: str) -> None:
    """Fault: a count beyond 64 bits is accepted, and overflows somewhere much later."""
    assert message in refusal("model=demo", override)


def test_recipes_that_come_with_mtpd_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an installed package has no recipes, a name depends on the folder, or the error offers what is missing."""
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo") == load_recipe(RECIPES / "demo.yaml")
    assert load_recipe("llama-3.1-8b").output == Path("runs/llama-3.1-8b")
    Path("demo").write_text("model: tiny\n")
    assert (load_recipe("demo").model, load_recipe("./demo").model) == ("demo", "tiny")
    Path("smoke.yaml").write_text("model: demo\n")
    assert (load_recipe("smoke").model, load_recipe("smoke.yaml").model) == ("tiny", "demo")
    assert "no such file; accepted: demo, the recipe that comes with mtpd" in refusal(path=Path("recipes/demo.yaml"))
    assert "did you mean smoke?" in refusal(path=Path("smok"))


def test_a_recipe_of_the_other_command() -> None:
    """Fault: `mtpd distill bytes-code` lists twenty unknown keys in place of the command that the recipe is for."""
    with pytest.raises(UserError, match="is a recipe of mtpd pretrain"):
        load_recipe("bytes-code")
    with pytest.raises(UserError, match="is a recipe of mtpd distill"):
        load_pretrain_recipe("demo")


def test_a_section_with_all_keys_commented_out_is_absent(tmp_path: Path) -> None:
    """Fault: `train:` with nothing under it is null, and is refused."""
    assert load_recipe(write(tmp_path, "model: demo\ntrain:\n  # epochs: 4\n")).train == TrainRecipe()


@pytest.mark.parametrize(
    "recipe_file",
    sorted(path for path in RECIPES.glob("*.yaml") if path.stem != "bytes-code"),  # one of `mtpd pretrain`
    ids=lambda path: path.stem,
)
def test_shipped_recipes_are_accepted_and_survive_a_dump(recipe_file: Path, tmp_path: Path) -> None:
    """Fault: a shipped recipe has a key that was renamed; the recipe.yaml of a run means something else."""
    recipe = load_recipe(recipe_file)
    assert load_recipe(write(tmp_path, dump(recipe))) == recipe
    text = recipe_file.read_text()
    assert f"mtpd distill {recipe_file.stem}" in text
    assert "last measured" in text
    assert text.index("What people change") < text.index("What they rarely change")


def test_a_dump_keeps_values_that_yaml_could_misread(tmp_path: Path) -> None:
    """Fault: text that looks like a number is written without quotes and comes back as a number."""
    values = {"model": "1e3", "data": {"prompts": "null", "subset": "true", "split": "3e-4"}}
    recipe = Recipe.model_validate({**values, "train": {"learning_rate": 1e-7, "arguments": {"adam_beta2": 0.95}}})
    assert load_recipe(write(tmp_path, dump(recipe))) == recipe


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("heads.dept=4", "did you mean heads.depth?"),
        ("head.depth=4", "did you mean heads?"),
        ("learning_rate=1", "did you mean train.learning_rate?"),
        ("learning_rat=1", "did you mean train.learning_rate or trunk.learning_rate or extend.learning_rate?"),
        ("lr=1e-4", "did you mean train.learning_rate?"),
        ("weight_decay=0.1", "did you mean train.arguments?"),
        ("rows_per_step=2", "did you mean train.micro_batch_rows?"),
        ("per_device_train_batch_size=4", "did you mean train.micro_batch_rows?"),
        ("batch_size=4", "did you mean train.micro_batch_rows?"),
        ("temperature=1", "did you mean data.temperature?"),
        ("warmup=1", "did you mean train.warmup_ratio?"),
        (
            "heads.zzz=1",
            "accepted here: kind, depth, shared, shared_layers, init, source, vocabulary, parallel, circuit",
        ),
        ("data.given=[{prompts: a.jsonl, limt: 3}]", "did you mean data.given.limit?"),
    ],
)
def test_unknown_keys_name_the_nearest(override: str, suggestion: str) -> None:
    """Fault: a misspelt key is ignored, or the message does not lead to the right one."""
    assert suggestion in refusal(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("heads.depth=40", "heads.depth: 40 is not accepted; accepted: an integer from 1 to 16 (command line)"),
        ("heads.depth=0", "heads.depth: 0 is not accepted"),
        ("heads.depth=2.5", "heads.depth: 2.5 is not accepted"),
        ("heads.depth='4'", "heads.depth: '4' is not accepted"),
        ("seed=true", "seed: true is not accepted; accepted: an integer"),
        ("trust_remote_code=yes", "trust_remote_code: yes is not accepted; accepted: true or false"),
        ("dtype=fp16", "dtype: fp16 is not accepted; accepted: auto, float32, bfloat16, float16"),
        ("heads=4", "heads: 4 is not accepted; accepted: a mapping with the keys kind, depth"),
        ("device=CUDA", "device: CUDA is not accepted; accepted: text such as auto, cpu, cuda:0"),
        ("model=null", "model: null is not accepted; accepted: text such as demo"),
        ("train.weights=x", "train.weights: x is not accepted; accepted: a list, each item a number of at least 0"),
        ("train.weights=[-1, 1, 1, 1]", "train.weights"),
        ("data.hidden_states=dsik", "data.hidden_states: dsik is not accepted; accepted: text such as disk, memory"),
        ("train.arguments.save_total_limit=0", "save_total_limit: 0 is not accepted; accepted: an integer of at least"),
        ("train.learning_rate=.inf", "train.learning_rate: .inf is not accepted; accepted: a number above 0"),
        ("train.learning_rate=.nan", "train.learning_rate: .nan is not accepted"),
        ("train.learning_rate=1e999", "train.learning_rate: .inf is not accepted"),
        ("train.max_steps=0", "train.max_steps: 0 is not accepted; accepted: -1"),
        ("train.scheduler=cosinus", "train.scheduler: cosinus is not accepted; accepted: linear, cosine"),
        ("data.given=[{split: train}]", "data.given.0.prompts: is missing"),
        ("data.given=[{prompts: builtin}]", "data.given.0.prompts: builtin is not accepted"),
        ("data.given.0.prompts=x", "data.given"),
        ("data.responses=given", "data.responses: given is not accepted with data.prompts: builtin"),
        ("data.top_p=0.9", "data.top_p: 0.9 does nothing while data.temperature is 0"),
        ("data.max_new_tokens=512", "data.max_new_tokens: 512 does not fit into a row"),
        ("data.subset=main", "data.subset: main does nothing with prompts: builtin"),
        ("train.arguments.learning_rate=1", "accepted: the recipe key train.learning_rate"),
        ("model.name=x", "model has no keys"),
        ("heads=[", "is not YAML"),
        ("heads.depth", "accepted: key=value"),
        ("heads..depth=4", "accepted: key=value"),
    ],
)
def test_wrong_values_name_key_value_and_what_is_accepted(override: str, message: str) -> None:
    """Fault: a wrong value is coerced or passed on, or the message leaves out what is needed to mend it."""
    assert message in refusal(override)


def test_all_mistakes_are_named_at_once_with_their_places(tmp_path: Path) -> None:
    """Fault: mistakes show up one run at a time, or a mistake of the command line is looked for in the file."""
    path = write(tmp_path, "model: demo\nseed: x\n")
    message = refusal("heads.depth=40", path=path)
    assert f"seed: x is not accepted; accepted: an integer of at least 0 and below 4294967296 ({path})" in message
    assert "heads.depth: 40 is not accepted; accepted: an integer from 1 to 16 (command line)" in message


def test_weights_of_each_depth_must_be_as_many_as_heads() -> None:
    """Fault: weights are cut or repeated without a word when the depth changes."""
    message = refusal("heads.depth=3", "train.weights=[1, 1]")
    assert "train.weights: [1.0, 1.0] has 2 weights; accepted: null, or a list of 3" in message


def test_a_loss_of_zero_is_refused() -> None:
    """Fault: a run trains on nothing for hours."""
    assert "train.weights: all weights" in refusal("heads.depth=1", "train.loss=kl", "train.weights=[0]")


@pytest.mark.parametrize(
    ("loss", "key", "value", "readers"),
    [
        ("tv", "top_n", "100", "mtp_d, kl, reverse_kl, jsd"),
        ("ce", "teacher_temperature", "0.5", "mtp_d, kl, reverse_kl, jsd, tv, lk, end_to_end_tv"),
    ],
)
def test_keys_that_the_loss_does_not_read_are_refused(
    loss: str, key: str, value: str, readers: str, tmp_path: Path
) -> None:
    """Fault: a setting is tuned that changes nothing."""
    message = refusal(f"train.loss={loss}", f"train.{key}={value}")
    assert f"train.{key}: " in message
    assert f"does nothing with train.loss: {loss}" in message
    assert f"or loss: {readers}" in message
    reader = load_recipe(None, ["model=demo", f"train.loss={readers.split(', ')[0]}", f"train.{key}={value}"])
    (tmp_path / "resolved.yaml").write_text(dump(reader))
    assert load_recipe(tmp_path / "resolved.yaml") == reader


def test_a_decay_beside_a_list_is_refused() -> None:
    """Fault: two ways to weigh depths that multiply without a word."""
    assert "train.decay: 0.6 is not accepted with a list in train.weights" in refusal(
        "train.weights=[1, 1, 1, 1]", "train.decay=0.6"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [\n", "line 2 column 1 is not YAML"),
        ("- model\n", "holds [model]; accepted: lines of the form key: value"),
        ("model: demo\nmodel: tiny\n", "line 2 column 1 is not YAML: key model is written twice"),
        ("heads:\n  depth: 1\n  depth: 2\n", "key depth is written twice"),
        ("model: !!python/object/apply:os.getcwd []\n", "is not YAML: could not determine a constructor"),
        ("1: x\n", "line 1 column 1 is not YAML: a key is not a name"),
        ("{a: b}: x\n", "line 1 column 1 is not YAML: a key is not a name"),
        ("\0", "is not YAML"),
    ],
)
def test_broken_files_are_refused_by_place(text: str, message: str, tmp_path: Path) -> None:
    """Fault: a broken file ends in a parser's traceback, runs code, or half of it is used."""
    path = write(tmp_path, text)
    assert message in refusal(path=path)
    assert str(path) in refusal(path=path)


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    """Fault: a wrong path ends in a traceback."""
    assert refusal(path=tmp_path / "nope.yaml").startswith(f"recipe file {tmp_path}/nope.yaml: no such file")
    assert "is a directory" in refusal(path=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refusal(path=tmp_path / "binary.yaml")


def test_a_model_is_needed() -> None:
    """Fault: some default model is trained when none was named."""
    with pytest.raises(UserError, match="model: is missing; accepted: text such as demo"):
        load_recipe(None)


@pytest.mark.parametrize(
    ("train", "depth", "alpha", "beta"),
    [
        (TrainRecipe(), 1, (0.3,), (1.0,)),
        (TrainRecipe(), 4, (0.3,) * 4, (0.5,) * 4),
        (TrainRecipe(weights=[1.0, 0.5]), 2, (0.3, 0.15), (0.5, 0.25)),
        (TrainRecipe(loss="ce"), 2, (1.0, 1.0), (0.0, 0.0)),
        (TrainRecipe(loss="kl"), 2, (0.0, 0.0), (1.0, 1.0)),
        (TrainRecipe(loss="tv", weights=[1.0, 0.2]), 2, (0.0, 0.0), (1.0, 0.2)),
        (TrainRecipe(loss="ce", decay=0.5), 3, (1.0, 0.5, 0.25), (0.0, 0.0, 0.0)),
        (TrainRecipe(decay=0.5), 2, (0.3, 0.15), (0.5, 0.25)),
    ],
)
def test_loss_weights(train: TrainRecipe, depth: int, alpha: tuple[float, ...], beta: tuple[float, ...]) -> None:
    """Fault: the baselines CE and KL are trained with a leftover of the other term."""
    assert loss_weights(train, depth) == (alpha, beta)


def test_arguments_of_transformers_are_checked_by_name() -> None:
    """Fault: a misspelt argument is found hours later, or one that has a recipe key is set in two places."""
    from dataclasses import fields

    from transformers import TrainingArguments
    from transformers.trainer_utils import SchedulerType

    known = {field.name for field in fields(TrainingArguments)}
    assert set(OWNED_ARGUMENTS) <= known
    assert set(get_args(SCHEDULERS)) <= {scheduler.value for scheduler in SchedulerType}
    assert load_recipe(None, ["model=demo", "train.arguments.adam_beta2=0.95"]).train.arguments == {"adam_beta2": 0.95}
    assert "train.arguments.adam_beta3: unknown" in refusal("train.arguments.adam_beta3=0.95")
    assert "train.arguments.adam_beta2: nan is not accepted" in refusal("train.arguments.adam_beta2=.nan")


def test_owned_arguments_name_recipe_keys() -> None:
    """Fault: a message sends the user to a recipe key that does not exist."""
    values = json.loads(Recipe(model="demo").model_dump_json())
    for key in OWNED_ARGUMENTS.values():
        place = values
        for part in key.split("."):
            place = place[part]


def test_every_key_of_the_schema_is_described() -> None:
    """Fault: a new key is added without saying what it does."""
    schema = recipe_schema()
    for name, part in {"Recipe": schema, **schema["$defs"]}.items():
        assert part["additionalProperties"] is False, name
        for key, field in part["properties"].items():
            assert field.get("description") or "$ref" in field, f"{name}.{key}"


def test_keys_are_few_and_the_common_ones_come_first() -> None:
    """Fault: keys that nobody sets are added again, or files and schema disagree on what people change."""
    tiers = recipe_schema()["tiers"]
    often, rest = tiers["what people change"], tiers["what they rarely change"]
    known = set(keys_of(recipe_schema()))
    assert {*often, *rest} == {key for key in known if not any(other.startswith(f"{key}.") for other in known)}
    assert len(often) + len(rest) <= 82
    for file in RECIPES.glob("*.yaml"):
        if file.stem != "bytes-code":
            parts = file.read_text().split("# What they rarely change")
            first, second = ({line.split(":")[0] for line in part.splitlines() if ": " in line} for part in parts)
            assert known & first <= set(often), file
            assert known & second <= set(rest), file
            assert known & first, file
            assert known & second, file


def test_a_recipe_cannot_be_changed() -> None:
    """Fault: a part of the run changes the recipe, and the recipe.yaml on disk is no longer what ran."""
    with pytest.raises(ValueError, match="frozen"):
        Recipe(model="demo").seed = 3  # type: ignore[misc]


def test_default_numbers_are_finite() -> None:
    """Fault: a default slips past the check that only looks at what is given."""
    numbers = [value for value in TrainRecipe().model_dump().values() if isinstance(value, float)]
    assert numbers
    assert all(map(math.isfinite, numbers))
