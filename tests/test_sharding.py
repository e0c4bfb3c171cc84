"""Training in several processes: two on the CPU, under DeepSpeed and without it, against one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharded_runs import ADAPTED, BF16, CASES, JOINT, LENGTH, Case, in_ranks, metrics, rows_of, run_case

from mtpd.errors import UserError
from mtpd.parallel import document_attention
from mtpd.parallel.deepspeed_config import DeepSpeedSettings, bucket_elements, load_settings
from mtpd.recipe import DEEPSPEED_PRESETS, parse_recipe
from mtpd.train.rows import RowOrder, TrainingRows
from mtpd.train.step_rows import accumulation

ALONE = {
    "one": Case(None, accumulation=2),
    "one-uneven": Case(None, rows=9, accumulation=2, steps=8),
    "one-tied": Case(None, accumulation=2, steps=6, architecture="qwen2"),
    "one-circuit": Case(None, accumulation=2, steps=4, form="cp-shared", loss="ce"),
    "one-bf16": Case(None, accumulation=2, steps=6, further=BF16),
    "one-extended": Case(None, accumulation=2, steps=4, after=1),
    "one-adapted": Case(None, accumulation=2, steps=4, form="decoder", further=ADAPTED),
    "one-joint": Case(None, accumulation=2, steps=4, further=JOINT),
}
"""What two processes are to repeat."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of one process and of two, made once."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, case in ALONE.items():
        run_case(name, case, folder)
    in_ranks(list(CASES), folder)
    return folder


def heads_of(run: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(run / "heads" / "model.safetensors").items() if tensor.numel()}


def furthest(run: Path, other: Path) -> float:
    """The largest difference of a weight."""
    ours, theirs = heads_of(run), heads_of(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        *((name, "one") for name in ("ddp", "zero1", "zero2", "zero3")),
        *((name, "one-uneven") for name in ("ddp-uneven", "zero3-uneven")),
        ("zero3-tied", "one-tied"),
        ("zero3-circuit", "one-circuit"),
        *((name, "one") for name in ("split", "split-zero3")),
        *((f"split-{name}", f"one-{name}") for name in ("uneven", "tied", "circuit", "extended", "adapted", "joint")),
    ],
)
def test_processes_train_what_one_process_trains(runs: Path, name: str, alone: str) -> None:
    """Fault: rows read twice or never, a loss averaged by process and not by token, accumulation divided by twice.

    Of split rows: tokens or teacher rows of the next part are missing, or its labels are counted twice.
    """
    ours, theirs = metrics(runs / name), metrics(runs / alone)
    assert len(ours) == len(theirs) == CASES[name].steps
    for key in {"loss", "grad_norm", "ce_1", "ce_2", "kl_1", "learning_rate"} & theirs[0].keys():
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-5), key
    # Counts of all processes, and so the same shares.
    for key in {"train_car_1", "train_car_2"} & theirs[0].keys():
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], abs=1e-7)
    assert furthest(runs / name, runs / alone) < 1e-5
    for weights in (runs / alone).glob("trunk-*.safetensors"):
        trained = load_file(runs / name / weights.name)
        for key, tensor in load_file(weights).items():
            torch.testing.assert_close(trained[key], tensor, rtol=0, atol=1e-5)


def test_attention_document_after_document(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: long rows are trained on something else than short ones."""
    monkeypatch.setattr(document_attention, "LONG", LENGTH)
    attended = []
    inside = document_attention.RowAttention.attend
    monkeypatch.setattr(
        document_attention.RowAttention, "attend", lambda *args, **kwargs: attended.append(1) or inside(*args, **kwargs)
    )
    for name in ("one", "one-extended", "one-joint"):
        attended.clear()
        run_case(name, ALONE[name], tmp_path)
        assert attended
        assert furthest(tmp_path / name, runs / name) < 1e-5


def test_micro_batches_of_one_process(runs: Path, tmp_path: Path) -> None:
    """Fault: a step of 4 x 1 or 1 x 4 rows is another one than a step of 2 x 2."""
    for name, rows, accumulated in (("4x1", 4, 1), ("1x4", 1, 4)):
        run_case(name, Case(None, micro_batch_rows=rows, accumulation=accumulated), tmp_path)
        assert furthest(tmp_path / name, runs / "one") < 1e-5


@pytest.mark.parametrize("name", ["ddp-resumed", "zero2-resumed", "zero3-resumed", "split-resumed"])
def test_runs_go_on_elsewhere(runs: Path, name: str) -> None:
    """Fault: moments, learning rate or place in the data are lost between one process and two, or between stages."""
    ours, theirs = metrics(runs / name), metrics(runs / "one")
    assert [line["step"] for line in ours] == list(range(11, 21))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs[10:]], rel=1e-5), key
    assert furthest(runs / name, runs / "one") < 1e-5


def test_one_process_goes_on_from_two(runs: Path) -> None:
    """Fault: a checkpoint of a sharded run can only be read by as many processes, or steps change their size."""
    run_case("one-resumed", Case(None, resume="zero3/checkpoint-10", accumulation=1), runs)
    assert [line["step"] for line in metrics(runs / "one-resumed")] == list(range(11, 21))
    assert furthest(runs / "one-resumed", runs / "one") < 1e-5


def test_layers_are_gathered_once_and_only_forward(runs: Path) -> None:
    """Fault: the frozen trunk is gathered again for the backward pass, or is not split; the optimizer has it too."""
    for rank in range(2):
        found = json.loads((runs / "zero3" / f"watched-{rank}.json").read_text())
        assert not found["backward"]
        micro_batches = CASES["zero3"].accumulation
        gathered = [step for step in found["steps"] if step]
        assert len(gathered) == CASES["zero3"].steps, "the trunk runs in each step"
        assert max(max(step.values()) for step in gathered) == micro_batches
        assert all(".layers." in name or ".norm." in name for step in gathered for name in step), (
            "embeddings stay whole"
        )
        assert found["partitioned"] >= found["layers"]
        assert found["share"] == pytest.approx(found["whole"] / 2, rel=0.01)
        # Two moments of half of the heads each.
        trained = sum(tensor.numel() for tensor in heads_of(runs / "zero3").values())
        assert found["state"] == pytest.approx(trained, rel=0.01)
        assert found["restored"]
        assert not found["left"]


def test_checkpoints_hold_whole_heads(runs: Path) -> None:
    """Fault: a checkpoint holds parts, or pickles, or the trunk."""
    for name in ("zero2", "zero3"):
        folder = runs / name / "checkpoint-20"
        saved, final = load_file(folder / "model.safetensors"), heads_of(runs / name)
        assert all(torch.equal(saved[key], final[key]) for key in final)
        moments = load_file(folder / "optimizer.safetensors")
        assert {key.partition("/")[0] for key in moments} == {"exp_avg", "exp_avg_sq", "step"}
        assert all("/heads." in key for key in moments)
        assert not list(folder.glob("global_step*"))


@pytest.mark.parametrize("name", ["zero2-bf16", "split-bf16"])
def test_heads_are_trained_in_float32_beside_a_bfloat16_trunk(runs: Path, name: str) -> None:
    """Fault: DeepSpeed casts the heads to bfloat16, in which small updates are lost; or nothing is computed in it."""
    assert all(tensor.dtype == torch.float32 for tensor in heads_of(runs / name).values())
    ours, theirs = metrics(runs / name), metrics(runs / "one-bf16")
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=2e-3)
    exact = metrics(runs / "one")
    assert ours[0]["loss"] != pytest.approx(exact[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["zero3-measured", "split-measured"])
def test_the_best_heads_of_a_sharded_run(runs: Path, name: str) -> None:
    """Fault: acceptance is measured with heads that have no elements, or the best ones are not put back."""
    run = runs / name
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    measured = [line["eval_tau"] for line in state["log_history"] if "eval_tau" in line]
    assert len(measured) == 2
    best = load_file(Path(state["best_model_checkpoint"]) / "model.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in heads_of(run).items())


def test_an_epoch_has_each_row_once() -> None:
    """Fault: rows are read twice where processes do not divide them, or what fills up has labels."""
    rows = TrainingRows(rows_of(9), multiple=4)
    order = RowOrder(rows, seed=3)
    assert list(order)[:9] != list(range(9))
    assert sorted(order) == list(range(12)) == sorted(range(len(rows)))
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first
    assert [bool((rows[place]["labels"] != -100).any()) for place in range(12)] == [True] * 9 + [False] * 3
    # Their states are those of rows that a store has.
    assert all(rows[place]["row"] < 9 for place in range(12))


def test_steps_keep_their_rows(runs: Path) -> None:
    """Fault: with another number of processes a run goes on with steps of other rows than it began with."""
    one = runs / "one"
    recipe = parse_recipe({"model": "tiny", "train": {"micro_batch_rows": 2, "gradient_accumulation": 3}})
    assert [accumulation(recipe.train, runs / "none", 4), accumulation(recipe.train, one, 1)] == [3, 2]
    assert accumulation(recipe.train, one, 2) == 1
    with pytest.raises(UserError, match="4 rows, and 4 processes have 8 .* accepted numbers of processes: 1, 2$"):
        accumulation(recipe.train, one, 4)


@pytest.mark.parametrize("name", DEEPSPEED_PRESETS)
def test_presets(name: str) -> None:
    """Fault: a preset that DeepSpeed does not accept, with a size left open, or of another stage than its name."""
    settings = load_settings(name)
    assert settings is not None
    assert settings.stage == int(name[4])
    assert settings.offload == (name.partition("-")[2] or "none")
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
    configs = [settings.for_heads(layers, hidden_size=9, own_logits=False)]
    configs += [settings.for_heads(layers, hidden_size=9, own_logits=True)]
    if settings.stage == 3:
        configs.append(settings.for_trunk(layers, hidden_size=9, folder=Path("run/offload")))
        assert configs[-1]["zero_optimization"]["stage3_prefetch_bucket_size"] == 72
    for config in configs:
        assert "auto" not in json.dumps(config["zero_optimization"])
        # DeepSpeed asserts it.
        assert config["zero_optimization"].get("allgather_bucket_size", 0) % 2 == 0
    # Heads that read their parameters outside of their modules cannot be partitioned; nothing of heads is offloaded.
    assert configs[1]["zero_optimization"]["stage"] == min(settings.stage, 2)
    assert "offload_param" not in configs[0]["zero_optimization"]


def test_buckets_have_a_limit() -> None:
    """Fault: buckets as large as a layer of experts, which take more memory than all else."""
    assert bucket_elements(72, hidden_size=9) == 1024
    assert bucket_elements(3_000_000, hidden_size=9) == 3_000_320
    assert bucket_elements(11_500_000_000, hidden_size=7168) == 500_000_768


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda config: config.pop("zero_optimization"), "zero_optimization.stage: None"),
        (lambda config: config["zero_optimization"].update(stage=0), "accepted: 1, 2, 3"),
        (lambda config: config.update(optimizer={"type": "Adam"}), "optimizer: is not accepted here"),
        (lambda config: config.update(bf16={"enabled": True}), "the recipe's dtype"),
        (lambda config: config.update(train_batch_size=32), "train_batch_size: 32"),
        (lambda config: config["zero_optimization"].update(overlap="yes"), "zero_optimization.overlap"),
        (lambda config: config["zero_optimization"].update(offload_param={"device": "cpu"}), "needs stage 3"),
    ],
)
def test_wrong_configurations(tmp_path: Path, change: Callable[[dict[str, Any]], Any], expected: str) -> None:
    """Fault: DeepSpeed's own error comes after the responses were generated, over many lines, from every process."""
    settings = load_settings("zero2")
    assert isinstance(settings, DeepSpeedSettings)
    change(settings.config)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(settings.config))
    with pytest.raises(UserError) as caught:
        load_settings(str(path))
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"train.deepspeed: {path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    """Fault: a missing file or a comma too many ends in a traceback."""
    (tmp_path / "bad.json").write_text('{"zero_optimization": {"stage": 2},}')
    for name in ("bad.json", "none.json"):
        with pytest.raises(UserError, match=f"train.deepspeed: .*{name}: "):
            load_settings(str(tmp_path / name))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"train": {"deepspeed": "zero4"}}, "train.deepspeed: zero4"),
        ({"train": {"deepspeed": "zero2", "arguments": {"optim": "adafactor"}}}, "train.arguments.optim: adafactor"),
        ({"train": {"deepspeed": "zero2"}, "dtype": "float16"}, "dtype: float16"),
        ({"train": {"deepspeed": "zero3"}, "trunk": {"train": "lora"}}, "accepted: null, zero1, zero2"),
        ({"train": {"deepspeed": "zero3-cpu"}, "heads": {"shared_layers": 1}}, "accepted: null, zero1, zero2"),
        ({"train": {"arguments": {"deepspeed": "mine.json"}}}, "the recipe key train.deepspeed"),
        ({"train": {"arguments": {"parallelism_config": {"sp_size": 2}}}}, "train.sequence_parallel"),
        ({"train": {"arguments": {"fsdp": True}}}, "train.arguments.fsdp"),
    ],
)
def test_recipes_that_cannot_be_sharded(values: dict[str, Any], expected: str) -> None:
    """Fault: sequence parallelism or another sharding is accepted, and trains on something else."""
    with pytest.raises(UserError) as caught:
        parse_recipe({"model": "tiny", **values})
    assert expected in str(caught.value)
