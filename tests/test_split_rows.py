"""Rows that are split over processes: attention, heads and training are those of whole rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers
from processes import in_fresh_ranks_each
from safetensors.torch import save_file
from sharded_runs import rows_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from mtpd.errors import UserError
from mtpd.parallel.document_attention import LONG, RowAttention, by_documents
from mtpd.parallel.sequence import SharedTrunk, SplitRows, check_split
from mtpd.recipe import parse_recipe
from mtpd.train.optimizer_state import OPTIMIZER, STEP_ROWS
from mtpd.train.rows import RowOrder, TrainingRows
from mtpd.train.step_rows import accumulation
from mtpd.trunk import Trunk

DOCUMENTS = ((37, 8, 19), (64,), (5, 30, 29))
"""Lengths of the documents of three rows; windows end inside of some, and parts too."""
DEPTH = 3


def packed() -> tuple[Tensor, Tensor]:
    """Ids and positions of rows."""
    positions = [torch.cat([torch.arange(length) for length in lengths]) for lengths in DOCUMENTS]
    return architectures.random_tokens(len(DOCUMENTS), 64, seed=3), torch.stack(positions)


def differences(parts: int) -> dict[str, dict[str, float]]:
    """By architecture: how far a rank's part is from that of whole rows, relative to the largest number there."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    split = SplitRows(parts, ahead=DEPTH + 1)
    ids, positions = packed()
    found = {}
    for name in architectures.ARCHITECTURES:
        trunk = architectures.tiny_trunk(name)
        if trunk.config._attn_implementation != "sdpa":
            continue
        heads = architectures.random_heads(trunk, depth=DEPTH)
        groups = [getattr(each, "num_key_value_groups", None) for each in trunk.model.modules()]
        size = ids.shape[1] // parts
        own = slice(split.part * size, (split.part + 1) * size)
        tokens = torch.nn.functional.pad(ids, (0, DEPTH + 1))[:, own.start : own.stop + DEPTH + 1]
        weights = torch.randn(*ids.shape, trunk.hidden_size, generator=torch.Generator().manual_seed(5))
        whole, whole_states, whole_slope = along(trunk, heads, ids, ids, positions, weights)
        with split.attending(trunk.decoder, heads):
            part, states, slope = along(trunk, heads, ids[:, own], tokens, positions[:, own], weights[:, own])
        # Of what ranks lose, the sum is what one process loses; here of each rank that shares these rows.
        torch.distributed.all_reduce(slope)
        slope /= torch.distributed.get_world_size() // parts
        following = torch.nn.functional.pad(whole, (0, 0, 0, DEPTH + 1))[:, own.stop : own.stop + DEPTH + 1]
        found[name] = {
            "trunk": apart(part, whole[:, own]),
            "heads": max(apart(mine, full[:, own]) for mine, full in zip(states, whole_states, strict=True)),
            "gradient": apart(slope, whole_slope),
            "following": float((split.following(part) - following).abs().max() / whole.abs().max()),
            "together": apart(SharedTrunk(trunk, split).hidden(ids, position_ids=positions), whole),
            "in step": float(SharedTrunk(trunk, split).hidden(ids[:1, :1]).shape != (1, 1, trunk.hidden_size)),
            "left": float(
                groups != [getattr(each, "num_key_value_groups", None) for each in trunk.model.modules()]
                or trunk.config._attn_implementation != "sdpa"
            ),
        }
    return found


def along(
    trunk: Trunk, heads: Any, ids: Tensor, tokens: Tensor, positions: Tensor, weights: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """States of the trunk and of each depth, and the gradient of their weighted sum in all that is trained."""
    hidden = trunk.hidden(ids, position_ids=positions)
    states = heads(trunk, hidden, tokens, position_ids_BT=positions)
    heads.zero_grad()
    sum((state * weights).sum() for state in states).backward()
    slope = torch.cat([each.grad.flatten() for each in heads.parameters() if each.grad is not None])
    return hidden, [state.detach() for state in states], slope


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", [name for name in architectures.ARCHITECTURES if name != "gemma2"])
def test_attention_document_after_document(name: str) -> None:
    """Fault: documents see each other, a window is lost, or a batch has the documents of the one before."""
    trunk = architectures.tiny_trunk(name)
    heads = architectures.random_heads(trunk, depth=DEPTH)
    ids, positions = packed()
    weights = torch.randn(*ids.shape, trunk.hidden_size, generator=torch.Generator().manual_seed(5))
    plain = along(trunk, heads, ids, ids, positions, weights)
    fewer = trunk.hidden(ids[1:], position_ids=positions[1:])
    with RowAttention().attending(trunk.decoder, heads):
        assert apart(trunk.hidden(ids[1:], position_ids=positions[1:]), fewer) < 2e-5
        found = along(trunk, heads, ids, ids, positions, weights)
    assert apart(found[0], plain[0]) < 2e-5
    assert max(apart(ours, theirs) for ours, theirs in zip(found[1], plain[1], strict=True)) < 2e-5
    assert apart(found[2], plain[2]) < 2e-5
    assert torch.equal(trunk.hidden(ids, position_ids=positions), plain[0])


def test_long_rows_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a model that attends in a way of its own is trained on something else where rows are long."""
    assert by_documents(architectures.tiny_trunk("llama"), LONG - 1) is None
    assert by_documents(architectures.tiny_trunk("llama"), LONG) is not None
    assert by_documents(architectures.tiny_trunk("gemma2"), LONG) is None
    assert by_documents(odd_trunk("recurrent"), LONG) is None


@pytest.fixture(scope="module")
def compared() -> list[list[dict[str, dict[str, float]]]]:
    """What ranks found: two that share rows, four in two pairs, and four that share rows."""
    runs = in_fresh_ranks_each("test_split_rows", "differences", [(2, [2]), (4, [2]), (4, [4])])
    for run in runs:
        assert run.codes == [0] * len(run.codes), run.errors
    return [run.values for run in runs]


@pytest.mark.parametrize("what", ["trunk", "heads", "gradient", "following", "together"])
def test_parts_are_those_of_whole_rows(compared: Any, what: str) -> None:
    """Fault: attention crosses documents or ends at parts, windows are lost, shared keys are mixed up between ranks."""
    for values in compared:
        for rank in values:
            assert {"llama", "qwen2", "mistral", "gemma3", "smollm3", "qwen3_moe"} <= rank.keys()
            assert {name: found[what] for name, found in rank.items() if not found[what] < 2e-5} == {}


def test_nothing_is_left_of_it(compared: Any) -> None:
    """Fault: decoding or measuring after a step attends over the parts of other ranks, or with other groups."""
    assert not any(
        found["left"] or found["in step"] for values in compared for rank in values for found in rank.values()
    )


def recipe_with(parts: int, **sections: Any) -> Any:
    train = {"sequence_parallel": parts, "deepspeed": "zero2", **sections.pop("train", {})}
    return parse_recipe({"model": "tiny", "train": train, **sections})


def odd_trunk(name: str) -> Trunk:
    sizes = {**architectures.SIZES, "num_key_value_heads": 4}
    experts = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
    configs = {
        "latent": lambda: transformers.DeepseekV3Config(
            **sizes, **experts, **latent, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=3
        ),
        "recurrent": lambda: transformers.Qwen3NextConfig(
            **sizes, **experts, head_dim=8, num_experts=4, layer_types=["linear_attention"] * 2 + ["full_attention"]
        ),
        "sinks": lambda: transformers.GptOssConfig(**sizes, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    }
    return Trunk(AutoModelForCausalLM.from_config(configs[name]()).eval())


@pytest.mark.parametrize(
    ("name", "parts", "expected"),
    [
        ("gemma2", 2, "which attends by eager; accepted: 1, or full and sliding attention by sdpa"),
        ("recurrent", 2, "which attends by linear_attention; accepted: 1"),
        ("sinks", 2, "which attends by eager; accepted: 1"),
        ("latent", 2, "have keys of 8 and values of 6 numbers, which Ulysses cannot exchange; accepted: 1"),
        ("llama", 8, "with 4 attention heads and 2 of keys and values; accepted: 1, 2, 4"),
    ],
)
def test_models_whose_attention_cannot_be_split(name: str, parts: int, expected: str) -> None:
    """Fault: a model is trained on attention to other things than its own, or DeepSpeed fails after the responses."""
    trunk = architectures.tiny_trunk(name) if name in architectures.ARCHITECTURES else odd_trunk(name)
    with pytest.raises(UserError) as caught:
        check_split(recipe_with(parts), trunk, processes=8)
    assert str(caught.value).startswith(f"train.sequence_parallel: {parts} is not accepted for {trunk.name}, ")
    assert expected in str(caught.value)
    check_split(recipe_with(1), trunk, processes=3)


def test_attention_that_transformers_does_not_see() -> None:
    """Fault: a model whose code attends by itself sees only the part of its rank, and nothing says so."""
    trunk = Trunk(architectures.tiny_model("llama"))
    attention: Any = trunk.decoder.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (attention.o_proj(hidden_states), None)
    with pytest.raises(
        UserError, match="whose attention does not go through transformers with its positions; accepted: 1"
    ):
        check_split(recipe_with(2), trunk, processes=2)
    assert trunk.config._attn_implementation == "sdpa"


def test_processes_that_rows_cannot_be_split_over() -> None:
    """Fault: without a launcher, or with three processes, some parts of a row are nowhere."""
    with pytest.raises(UserError, match="train.sequence_parallel: 2 is not accepted with 3 processes; accepted: 1, or"):
        check_split(recipe_with(2), architectures.tiny_trunk("llama"), processes=3)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"train": {"deepspeed": None}}, "is not accepted without DeepSpeed"),
        ({"data": {"row_length": 513}}, "data.row_length: 513 is not accepted with train.sequence_parallel: 2"),
        ({"heads": {"depth": 16}, "data": {"row_length": 32}, "max": 24}, "accepted: a multiple of 2, at least 34"),
        ({"extend": {"to": 40}, "data": {"row_length": 64}, "max": 24}, "and 40 heads; accepted: a multiple of 2"),
        ({"heads": {"kind": "medusa", "shared_layers": 1}}, "heads.shared_layers: 1; accepted: 1"),
        ({"train": {"arguments": {"average_tokens_across_devices": False}}}, "accepted: true"),
        ({"train": {"arguments": {"dataloader_drop_last": True}}}, "train.arguments.dataloader_drop_last"),
        ({"train": {"arguments": {"accelerator_config": {"split_batches": True}}}}, "arguments.accelerator_config"),
    ],
)
def test_recipes_that_cannot_be_split(sections: dict[str, Any], expected: str) -> None:
    """Fault: rows are split in a way in which a head needs more than the next part, or parts come to other ranks."""
    most = sections.pop("max", None)
    if most is not None:
        sections["data"] = {**sections["data"], "max_new_tokens": most}
    with pytest.raises(UserError) as caught:
        recipe_with(2, **sections)
    assert expected in str(caught.value)


def test_parts_of_rows() -> None:
    """Fault: a part comes to the wrong rank, labels are counted in two parts, or another row follows."""
    whole = rows_of(5)
    rows = TrainingRows(whole, multiple=4, parts=2, ahead=3)
    order = list(RowOrder(rows, seed=3, batch=2))
    plain = list(RowOrder(TrainingRows(whole, multiple=4), seed=3))
    assert sorted(order) == list(range(16)) == sorted(range(len(rows)))
    # Two batches of two parts come to two ranks at a time: first parts to one, second parts to the other.
    first, second = ([order[n] for n in range(16) if n // 2 % 2 == rank] for rank in range(2))
    assert [place // 2 for place in first] == plain == [place // 2 for place in second]
    assert {place % 2 for place in first} == {0}
    assert {place % 2 for place in second} == {1}
    for place in range(8):
        parts = [rows[2 * place], rows[2 * place + 1]]
        full = TrainingRows(whole, multiple=4)[place]
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(torch.cat([part[name] for part in parts]), full[name])
        following = [full[name][8:11] for name in ("input_ids", "labels", "position_ids")]
        assert torch.equal(parts[0]["ahead"], torch.stack(following))
        assert parts[1]["ahead"].tolist() == [[0] * 3, [-100] * 3, [0] * 3]
        assert [part["row"] for part in parts] == [place % 5] * 2
        assert [int(part["tokens"]) for part in parts] == [8 * (place < 5)] * 2


def test_steps_of_split_rows_keep_their_rows(tmp_path: Path) -> None:
    """Fault: processes that share rows are counted as if each had rows of its own."""
    recipe = recipe_with(2, train={"micro_batch_rows": 2, "gradient_accumulation": 3})
    assert accumulation(recipe.train, tmp_path, 4, parts=2) == 3
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    save_file({"step": torch.zeros(1)}, checkpoint / OPTIMIZER, metadata={STEP_ROWS: "8"})
    assert [accumulation(recipe.train, tmp_path, count, parts=2) for count in (2, 4, 8)] == [4, 2, 1]
    with pytest.raises(UserError, match="8 rows, and 6 processes have 6 .* accepted numbers of processes: 2, 4, 8$"):
        accumulation(recipe.train, tmp_path, 6, parts=2)
