"""What a GPU would find wrong, and what it would wait for, on a pretended one."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SIZES, TOKENS, random_heads, tiny_model
from kinds import random_kind, settings
from pretend_cuda import CUDA, Counts, OnDevice, pretended_cuda
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from mtpd.alignment import IGNORED
from mtpd.data import models
from mtpd.data.disk_store import DiskStore
from mtpd.data.models import load_model, resolve_device
from mtpd.data.packing import Sample, pack
from mtpd.data.store import stored_states
from mtpd.decode.chances import Chances
from mtpd.decode.engine import Engine
from mtpd.decode.planner import Planner
from mtpd.decode.text import Request
from mtpd.errors import UserError
from mtpd.heads import Heads, build_heads, configure_heads, copy_heads, save_heads, start_heads
from mtpd.losses.fused import multi_depth_loss
from mtpd.losses.settings import LossSettings
from mtpd.recipe import parse_recipe
from mtpd.run import new_heads
from mtpd.run.session import with_fitting_defaults
from mtpd.train.arguments import training_arguments
from mtpd.train.joint_trunk import FullTrunk
from mtpd.train.model import DistillModel
from mtpd.train.optimizer_state import save_state
from mtpd.trunk import Trunk, Unembedding


@pytest.fixture
def gpu() -> Iterator[Counts]:
    with pretended_cuda() as counts:
        yield counts


def on_gpu(name: str = "llama", **options: Any) -> Trunk:
    return Trunk(tiny_model(name, **options), tokens=TOKENS).to(CUDA)


def test_the_pretended_device_keeps_the_rules(gpu: Counts) -> None:
    """Fault: a harness that lets everything pass, counts nothing, or stays behind."""
    there, here = torch.arange(6.0, device="cuda"), torch.arange(6.0)
    assert isinstance(there, OnDevice)
    assert there.device == CUDA
    gpu.reset()
    assert torch.equal((there * 2 + here.new_tensor(1.0)).cpu(), here * 2 + 1)
    assert (gpu.syncs["_to_copy"], gpu.launches["mul"], gpu.launches["add"]) == (1, 1, 1)
    for mixed in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: there.index_put_((here.long(),), here),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    gpu.reset()
    assert there[there > 2].tolist() == [3.0, 4.0, 5.0]
    assert there.sum().item() == 15.0
    assert gpu.syncs.total() == 3
    layer = nn.Linear(6, 2).to(CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(there).dtype == torch.bfloat16


def test_nothing_of_the_pretended_device_is_left() -> None:
    """Fault: tests after it run on a device that is not there."""
    with pretended_cuda():
        pass
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    weight = nn.Linear(2, 2)
    before = weight.weight
    assert weight.double().weight is before
    assert torch.autograd.grad(before.sum(), before)[0].device.type == "cpu"


@pytest.mark.parametrize("form", ["cp", "decoder", "linear"])
def test_heads_behind_shared_layers_start(form: str, gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: layers that run again are given positions of the host."""
    trunk = on_gpu()
    chosen = settings(form, depth=2) | {"shared_layers": 1}
    heads = build_heads(trunk, configure_heads(chosen, trunk, vocabulary=0, fingerprint=""))
    recipe = parse_recipe({"model": "tiny", "heads": {"kind": heads.config.kind, "shared_layers": 1}})
    rows = pack([Sample.of(str(n), list(range(3, 9)), list(range(9, 30))) for n in range(8)], row_length=64)
    session: Any = type("Session", (), {"recipe": recipe, "trunk": trunk})
    batches = new_heads.fitting_batches(session, rows, None)
    assert {tensor.device for batch in batches for tensor in batch.values()} == {CUDA}
    start_heads(heads, trunk, None, lambda: batches)


class Steps:
    """A training step of heads on the device: packed rows in, loss and gradients out."""

    def __init__(self, trunk: Trunk, heads: Heads) -> None:
        depth = heads.depth
        self.model = DistillModel(trunk, heads.to(CUDA).train(), LossSettings((0.3,) * depth, (0.5,) * depth, top_n=20))
        ids = torch.randint(3, TOKENS, (2, 48), generator=torch.Generator().manual_seed(0))
        positions = torch.cat([torch.arange(20), torch.arange(28)]).expand(2, -1)
        labels = ids.where(positions > 4, IGNORED)
        self.batch = [each.to(CUDA) for each in (ids, labels, positions.contiguous())]

    def __call__(self) -> Tensor:
        return self.model(*self.batch)["loss"]


STEP = {
    "chain": (727, 5),
    "decoder": (694, 5),
    "linear": (460, 2),
    "medusa": (432, 8),
    "cp": (468, 8),
    "hmm": (500, 8),
}
"""Launches and synchronisations of a step without its backward pass, by kind of heads: they may only become fewer."""


@pytest.mark.parametrize("form", STEP)
def test_a_step_of_training(form: str, gpu: Counts) -> None:
    """Fault: tensors of the host in a step, or more launches and points at which the host waits."""
    trunk = on_gpu()
    step = Steps(trunk, random_heads(trunk) if form == "chain" else random_kind(trunk, form))
    step()
    gpu.reset()
    assert step().device == CUDA
    assert (gpu.launches.total() <= STEP[form][0], gpu.syncs.total() <= STEP[form][1]) == (True, True), gpu


LOSSES = {"mtp_d": (244, 1), "kl": (244, 1), "jsd": (280, 1), "lk": (278, 1)}
"""Launches and synchronisations of the fused walk over one block of three depths; they may only become fewer."""


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss(name: str, gpu: Counts) -> None:
    """Fault: a sweep over logits more than there are, or a number that is copied from the host in the walk."""
    weight = torch.randn(TOKENS, 32, device=CUDA)
    students = [torch.randn(64, 32, device=CUDA).requires_grad_() for _ in range(3)]
    settings = LossSettings((0.3,) * 3, (0.5,) * 3, loss=name, top_n=0 if name == "lk" else 20)
    targets = [torch.full((64,), 5, device=CUDA) for _ in students]
    # The last rows have no teacher.
    masks = [(torch.arange(64) < 60).to(CUDA) for _ in students]
    trunk = torch.randn(64, 32, device=CUDA)
    gpu.reset()
    loss, _ = multi_depth_loss(
        students, trunk, Unembedding(weight), targets_P=targets, masks_P=masks, settings=settings
    )
    assert loss.device == CUDA
    found = gpu.launches.total(), gpu.syncs.total()
    assert (found[0] <= LOSSES[name][0], found[1] <= LOSSES[name][1]) == (True, True), (found, gpu.places)


def test_states_go_to_the_disk_while_the_host_goes_on(gpu: Counts, tmp_path: Path) -> None:
    """Fault: the host waits for each row that is kept or read, or a file is written before its states have come."""
    trunk = on_gpu()
    rows = pack([Sample.of(str(n), [n, 1, 2], [n + 3] * 20) for n in range(4)], row_length=24)
    states = torch.randn(4, 24, trunk.hidden_size, device=CUDA)
    store = DiskStore(tmp_path, trunk, rows, key={})
    gpu.reset()
    batch = {"row": [2, 0, 1], "input_ids": torch.zeros(3, 24, dtype=torch.long, device=CUDA)}
    found = stored_states(batch, store, lambda _: states[:3], device=CUDA)
    assert (gpu.launches["copy_"], gpu.syncs.total()) == (1, 0)
    store.flush()
    assert gpu.syncs["synchronize"] == 1
    gpu.reset()
    batch = {"row": [0, 3, 1], "input_ids": torch.zeros(3, 24, dtype=torch.long, device=CUDA)}
    again = stored_states(batch, store, lambda missing: states[3:][: len(missing["input_ids"])], device=CUDA)
    assert not gpu.syncs, gpu.places
    assert torch.equal(again.cpu(), torch.stack([found[1], states[3], found[2]]).cpu())
    store.flush()
    assert torch.equal(DiskStore(tmp_path, trunk, rows, key={})[3], states[3].cpu())


def decoded(trunk: Trunk, heads: Heads | None, gpu: Counts, planner: Planner | None = None) -> tuple[int, int]:
    """Launches and synchronisations of a round at most, while two texts are written."""
    engine = Engine(trunk, heads, slots=2, capacity=64, planner=planner)
    # Kernel by kernel: what graphs take off is in test_cuda_graphs.py.
    engine.graphs = None
    rounds: list[tuple[int, int]] = []
    inside = engine._round

    def counted() -> None:
        gpu.reset()
        inside()
        rounds.append((gpu.launches.total(), gpu.syncs.total()))

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(engine, "_round", counted)
        # Tensors that are wrapped cannot be those of inference mode.
        run: Any = vars(Engine)["run"].__wrapped__
        texts = list(run(engine, [Request(list(range(3, 10)), 12), Request(list(range(20, 40)), 12)]))
    assert [len(text.tokens) for text in texts] == [12, 12]
    return max(launches for launches, _ in rounds), max(syncs for _, syncs in rounds)


ROUND = {
    "plain": (134, 1),
    "chain": (411, 1),
    "decoder": (361, 1),
    "linear": (174, 1),
    "medusa": (188, 1),
    "cp": (218, 1),
}
"""Launches and synchronisations of a round in which three heads draft a chain; they may only become fewer."""
TREE = {"chain": (531, 4), "decoder": (397, 4), "linear": (207, 4), "medusa": (221, 4), "cp": (248, 4)}
"""The same where heads and look-up draft a tree: the host looks at the candidates of each depth."""


@pytest.mark.parametrize("form", ROUND)
def test_a_round_of_decoding(form: str, gpu: Counts) -> None:
    """Fault: tensors of the host in a round, or more launches and points at which the host waits."""
    trunk = on_gpu()
    heads = None
    if form != "plain":
        heads = random_heads(trunk) if form == "chain" else random_kind(trunk, form)
        heads = heads.to(CUDA).eval()
    planners = [(None, ROUND), (Planner(Chances(), None, nodes=6), TREE)]
    for planner, most in planners[: 1 if heads is None else 2]:
        launches, syncs = decoded(trunk, heads, gpu, planner)
        assert (launches <= most[form][0], syncs <= most[form][1]) == (True, True), (launches, syncs, gpu.places)


def test_experts_of_heads_are_computed_in_the_format_of_autocast() -> None:
    """Fault: experts in float32, without tensor cores, where all else is in 16 bits; no gradient in their weights."""
    torch.manual_seed(0)
    small = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = Qwen3MoeConfig(**SIZES, **small, head_dim=8, experts_implementation="grouped_mm")
    trunk = Trunk(AutoModelForCausalLM.from_config(config).eval(), tokens=TOKENS)
    trunk.check()
    block = trunk.block(2).train()
    hidden = torch.randn(2, 8, 32)
    seen: list[torch.dtype] = []
    inside = torch.nn.functional.grouped_mm

    def watched(left: Tensor, right: Tensor, **options: Any) -> Tensor:
        seen.extend((left.dtype, right.dtype))
        return inside(left, right, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "grouped_mm", watched)
        exact = block(inputs_embeds=hidden, use_cache=False).last_hidden_state
        assert set(seen) == {torch.float32}
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = block(inputs_embeds=hidden, use_cache=False).last_hidden_state
    assert set(seen) == {torch.bfloat16}
    assert (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()
    rounded.float().square().sum().backward()
    weights = {name: parameter for name, parameter in block.named_parameters() if "experts" in name}
    assert weights
    assert all(each.dtype == torch.float32 and each.grad is not None and each.grad.any() for each in weights.values())
    seen.clear()
    joint = FullTrunk(trunk, original_teacher=False, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(torch.nn.functional, "grouped_mm", watched)
        joint.states(torch.arange(8)[None], torch.arange(8)[None]).float().sum().backward()
    assert set(seen) == {torch.bfloat16}
    joint._finish()
    assert trunk.config._experts_implementation == "grouped_mm"


def test_a_copy_of_heads_is_in_16_bits_from_the_beginning() -> None:
    """Fault: heads twice in float32 on each device whenever they are measured; a copy that shares weights."""
    trunk = Trunk(tiny_model("llama"), tokens=TOKENS)
    heads = random_heads(trunk, shared=True)
    wanted = copy.deepcopy(heads).to(torch.bfloat16)
    found = copy_heads(heads, torch.bfloat16)
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert [p.dtype for p in found.parameters()] == [p.dtype for p in wanted.parameters()]
    assert {id(p) for p in found.parameters()}.isdisjoint(map(id, heads.parameters()))
    assert all(parameter.dtype == torch.float32 for parameter in heads.parameters())


def test_files_of_weights_are_written_without_a_copy_in_memory(tmp_path: Path) -> None:
    """Fault: a checkpoint takes the memory of all heads once more, in each process."""
    trunk = Trunk(tiny_model("llama"), tokens=TOKENS)
    heads = random_heads(trunk)
    heads.layers[0].register_buffer("large", torch.zeros(4_000_000))
    state = {"a": {"exp_avg": torch.zeros(4_000_000), "step": 3}}
    tracemalloc.start()
    save_heads(heads, tmp_path)
    save_state(state, tmp_path / "optimizer.safetensors", step_rows=4)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000, "16 MB are written, twice"
    tracemalloc.stop()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as far as PyTorch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def test_a_device_is_found_without_memory_on_it(many: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: each of eight processes takes half a gigabyte of the first GPU before it turns to its own."""

    def taken(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("memory is taken")

    monkeypatch.setattr(torch, "empty", taken)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cuda") == torch.device("cuda")
    with pytest.raises(UserError, match=r"device: cuda:2 is not usable here \(PyTorch sees 2 of them\)"):
        resolve_device("cuda:2")


def test_the_device_of_a_recipe_is_the_one_that_trains(many: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: responses are written on the GPU of the recipe, and heads trained on the first one."""
    current: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    recipe = parse_recipe({"model": "tiny", "device": "cuda:1"})
    found = training_arguments(recipe, dtype=torch.float32, device=torch.device("cuda:1"))
    assert (found.device, found.n_gpu) == (torch.device("cuda:1"), 1)
    assert torch.device(current[-1]) == torch.device("cuda:1")


def test_weights_go_straight_to_their_device(many: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: eight processes have a model of 65 GB each in main memory before any of them has it on its GPU."""
    for part in load_model("tiny", dtype="float32", device="cpu"):
        part.save_pretrained(tmp_path)
    asked: dict[str, Any] = {}
    inside = AutoModelForCausalLM.from_pretrained

    def load(place: str, *, device_map: Any = None, **options: Any) -> Any:
        asked["device_map"] = device_map
        return inside(place, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: self)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    load_model(str(tmp_path), dtype="bfloat16", device="cuda:1")
    assert asked["device_map"] == {"": torch.device("cuda:1")}
    load_model(str(tmp_path), dtype="bfloat16", device="cpu")
    assert asked["device_map"] is None


def test_decoding_in_16_bits_is_the_default_of_a_gpu(many: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a model that fits the GPU once is loaded a second time at twice the size, when all training is done."""
    recipe = parse_recipe({"model": "tiny"})
    assert with_fitting_defaults(parse_recipe({"model": "tiny", "device": "cpu"})).evaluation.dtype == "float32"
    there = parse_recipe({"model": "tiny", "device": "cuda"})
    assert with_fitting_defaults(there).evaluation.dtype == "trunk"
    assert with_fitting_defaults(there.model_copy(update={"dtype": "float32"})).evaluation.dtype == "float32"
    own = parse_recipe({"model": "tiny", "device": "cuda", "evaluation": {"dtype": "float32"}})
    assert with_fitting_defaults(own) is own
    assert recipe.evaluation.dtype == "float32"


def test_a_gpu_that_cannot_be_used_is_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: a driver that is too old, or a wheel without CUDA, and the run goes on for days on a CPU."""
    for part in load_model("tiny", dtype="float32", device="cpu"):
        part.save_pretrained(tmp_path)
    (tmp_path / "driver").touch()
    models._warn_of_unusable_gpu.cache_clear()
    assert resolve_device("auto").type == "cpu"
    assert not caplog.text, "a machine without GPU is no surprise"
    monkeypatch.setattr(models, "NVIDIA", tmp_path / "driver")
    models._warn_of_unusable_gpu.cache_clear()
    resolve_device("auto")
    resolve_device("auto")
    said = "has an NVIDIA GPU that cannot be used (this PyTorch is built without CUDA)"
    assert caplog.text.count(said) == 1
    with pytest.raises(UserError, match="device: cuda is not usable here .this PyTorch is built without CUDA."):
        resolve_device("cuda")
    load_model(str(tmp_path))
    monkeypatch.setattr(models, "LARGE", 1000)
    with pytest.raises(UserError, match="device: auto is the CPU, since the GPU of this machine cannot be used"):
        load_model(str(tmp_path))
    assert load_model(str(tmp_path), device="cpu")
    models._warn_of_unusable_gpu.cache_clear()
