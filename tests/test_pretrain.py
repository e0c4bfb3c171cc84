"""Pretraining: heads beside the trunk, memory that does not grow with them, byte tokens, and resuming."""

from __future__ import annotations

import io
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import random_tokens, tiny_model
from kinds import settings
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, TrainingArguments

from mtpd.cli import main
from mtpd.data import stdlib
from mtpd.data.models import load_model, trunk_fingerprint
from mtpd.heads import build_heads, configure_heads, load_heads, start_heads
from mtpd.pretrain.muon import muon_and_adamw
from mtpd.pretrain.pretrain import PretrainModel
from mtpd.recipe import load_pretrain_recipe
from mtpd.trunk import Trunk

ROOT = Path(__file__).parents[1]
SMALL = [
    "model={model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
    "data.row_length=32",
    "train.micro_batch_rows=2",
    "train.logging_steps=1",
    "data.held_out_rows=2",
]


def joint(depth: int, block: str = "linear") -> PretrainModel:
    trunk = Trunk(tiny_model("llama"))
    given = {**settings("linear", depth=max(1, depth)), "parallel": {"block": block}}
    heads: Any = None
    if depth:
        heads = build_heads(trunk, configure_heads(given, trunk, vocabulary=0, fingerprint=""))
        start_heads(heads, trunk, "random", lambda: ())
    return PretrainModel(trunk, heads)


class Wide(TorchDispatchMode):
    """The most tensors with one element for each position and token that live at a time."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.live, self.peak = elements, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_iter(output):
            if isinstance(leaf, Tensor) and leaf.numel() >= self.elements:
                if leaf.untyped_storage().data_ptr() in given:
                    continue
                self.live += 1
                self.peak = max(self.peak, self.live)
                weakref.finalize(leaf.untyped_storage(), self._gone)
        return output

    def _gone(self) -> None:
        self.live -= 1


@pytest.mark.parametrize("block", ["linear", "decoder"])
def test_memory_of_logits_does_not_grow_with_heads(block: str) -> None:
    """Fault: logits of one head that are still held while those of the next are made."""
    ids = random_tokens(2, 100)
    peaks = {}
    for depth in (1, 6):
        model = joint(depth, block)
        # One element for each position that has a target, even of the deepest head.
        with Wide(2 * 90 * 128) as wide:
            model(ids)["loss"].backward()
        peaks[depth] = wide.peak
    assert 0 < peaks[6] == peaks[1]


@pytest.mark.parametrize("block", ["linear", "decoder", "unembedding"])
def test_gradients_are_those_of_the_whole_sum(block: str) -> None:
    """Fault: a head whose gradient does not reach the trunk, or is counted twice; a target moved by one."""
    model = joint(3, block)
    ids = random_tokens(2, 20)
    model(ids)["loss"].mul(2.0).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    hidden = model.model.model(input_ids=ids).last_hidden_state
    positions = torch.arange(20).expand(2, -1)
    assert model.heads is not None
    if block == "unembedding":
        every = [model.model.lm_head(hidden), *(head(hidden) for head in model.heads.layers)]
    else:
        states = [hidden, *model.heads(model._trunk[0], hidden, ids, position_ids_BT=positions)]
        every = [model.model.lm_head(state) for state in states]
    total = torch.zeros(())
    for k, logits in enumerate(every):
        logits = logits[:, : 19 - k]
        total = total + torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, k + 1 :].flatten())
    (2.0 * total).backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert names == set(found)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("schedule", [1.0, 0.5])
def test_muon_steps_on_layers_and_adamw_on_the_rest(schedule: float) -> None:
    """Fault: a parameter that neither optimizer steps on, or both; a norm that decays; a rate that one alone gets."""
    model, other = joint(2), joint(2)
    other.load_state_dict(model.state_dict())
    args = TrainingArguments("unused", learning_rate=1e-2, weight_decay=0.1, adam_beta2=0.95, use_cpu=True)
    optimizer = muon_and_adamw(model, model._trunk[0].decoder.layers, args)
    matrices = [each for name, each in other.named_parameters() if re.search(r"model\.layers\..*_proj", name)]
    assert len(matrices) == 7 * len(model._trunk[0].decoder.layers)
    rest = [each for each in other.parameters() if all(each is not matrix for matrix in matrices)]
    rate = {"lr": 1e-2 * schedule}
    adamw: dict[str, Any] = {"fused": True, "betas": (0.9, 0.95), **rate}
    plain: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", **rate),
        torch.optim.AdamW([each for each in rest if each.ndim > 1], weight_decay=0.1, **adamw),
        torch.optim.AdamW([each for each in rest if each.ndim < 2], weight_decay=0.0, **adamw),
    ]
    for group in optimizer.param_groups:
        group["lr"] *= schedule
    ids = random_tokens(2, 20)
    for _ in range(2):
        for whole, steppers in ((model, [optimizer]), (other, plain)):
            whole.zero_grad()
            whole(ids)["loss"].backward()
            for each in steppers:
                each.step()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_run_resumes_and_is_a_trunk(optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a resumed run that differs from one without a break; a checkpoint or heads that nothing can load."""
    common = ["pretrain", *SMALL, "heads.depth=2", "dtype=float32", "train.save_steps=2", "train.max_steps=4"]
    common += [f"train.optimizer={optimizer}"]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"line {i} " * 9}) for i in range(40)))
    common += [f"data.texts={texts}", f"data.held_out={texts}"]
    assert main([*common, f"output={tmp_path / 'whole'}"]) == 0
    # As an interruption after the second step leaves it.
    assert main([*common, f"output={tmp_path / 'parts'}"]) == 0
    for path in (tmp_path / "parts" / "checkpoint-4").iterdir():
        path.unlink()
    (tmp_path / "parts" / "model" / "model.safetensors").unlink()
    assert main([*common, f"output={tmp_path / 'parts'}"]) == 0
    whole, tokenizer = load_model(str(tmp_path / "whole" / "model"), dtype="float32")
    parts, _ = load_model(str(tmp_path / "parts" / "model"), dtype="float32")
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other), name
    load_heads(tmp_path / "whole" / "heads", Trunk(whole), fingerprint=trunk_fingerprint(whole))
    # One token a byte, and the bytes come back.
    text = "für 😀\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert AutoTokenizer.from_pretrained(tmp_path / "whole" / "model").decode(ids) == text
    capsys.readouterr()
    assert main([*common, f"output={tmp_path / 'whole'}", "seed=1"]) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err

    # Circuits and parallel heads start from the heads that were trained beside it.
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"line {i} ", "completion": "line " * 4}) for i in range(12)))
    run = ["distill", f"model={tmp_path / 'whole' / 'model'}", "dtype=float32", f"data.prompts={prompts}"]
    run += ["data.responses=given", "data.held_out_count=2", "data.row_length=64", "train.max_steps=1", "heads.depth=2"]
    run += [
        "evaluation.max_new_tokens=6",
        "evaluation.decode_prompts=1",
        f"heads.source={tmp_path / 'whole' / 'heads'}",
    ]
    for kind, words in {"circuit": ["train.loss=ce"], "parallel": ["heads.parallel.block=linear"]}.items():
        assert main([*run, f"output={tmp_path / kind}", f"heads.kind={kind}", *words]) == 0
    assert main([*run, f"output={tmp_path / 'no'}", "heads.kind=parallel"]) == 2
    assert "accepted: at least 2 parallel heads of block decoder" in capsys.readouterr().err


def test_a_model_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an end while the model is written leaves half a folder, which is loaded, or costs the one there was."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"line {i} " * 9}) for i in range(20)))
    words = ["pretrain", *SMALL, "dtype=float32", "train.max_steps=1", f"data.texts={texts}", f"data.held_out={texts}"]
    words.append(f"output={tmp_path / 'run'}")

    def end(self: Any, folder: Any) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(ByT5Tokenizer, "save_pretrained", end)
            there = (tmp_path / "run" / "model").exists()
            assert main(words) == 130
            assert (tmp_path / "run" / "model").exists() == there
        assert main(words) == 0
        assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= {
            path.name for path in (tmp_path / "run" / "model").iterdir()
        }
    assert not list((tmp_path / "run").glob(".*"))


def byte_fied(folder: Path) -> Path:
    """The tokenizer of a subword model that was made one of bytes: its format, a token for each byte, and no merges."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = Tokenizer(BPE({"<s>": 0, "</s>": 1, **{byte: 2 + k for k, byte in enumerate(alphabet)}}, []))
    tokens.pre_tokenizer, tokens.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tokenizer", ["bytes", "byte-fied"])
def test_bytes_with_another_architecture(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: byte tokens that work with one architecture or tokenizer alone, from pretraining to what heads write."""
    sizes = "hidden_size: 16, intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 2, head_dim: 8"
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"line {i} " * 9}) for i in range(20)))
    model = f"model={{model_type: gemma3_text, {sizes}, num_key_value_heads: 1, sliding_window: 16}}"
    common = [model, *SMALL[1:], "dtype=float32", "train.max_steps=1", f"data.texts={texts}", f"data.held_out={texts}"]
    common += [f"tokenizer={tokenizer if tokenizer == 'bytes' else byte_fied(tmp_path / 'tokenizer')}"]
    assert main(["pretrain", *common, f"output={tmp_path / 'whole'}"]) == 0
    run = ["distill", f"model={tmp_path / 'whole' / 'model'}", "dtype=float32", f"data.prompts={texts}"]
    run += ["data.held_out_count=2", "data.row_length=128", "data.max_new_tokens=12", "train.max_steps=1"]
    run += ["heads.depth=2", "evaluation.max_new_tokens=6", "evaluation.decode_prompts=0"]
    assert main([*run, f"output={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--raw", "--prompt", "line 1 é", "--max-new-tokens", "8"]) == 0
    plain, loaded = load_model(str(tmp_path / "whole" / "model"), dtype="float32")
    ids = loaded("line 1 é", return_tensors="pt")["input_ids"]
    assert ids.shape[1] - (tokenizer == "bytes") == len("line 1 é".encode())
    text = plain.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert capsys.readouterr().out == loaded.decode(text, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model={hidden_size: 16}", "model.model_type: is missing"),
        ("tokenizer=/nowhere", "tokenizer: /nowhere: no such directory"),
        ("heads.depth=17", "heads.depth: 17 is not accepted; accepted: an integer from 0 to 16"),
        ("model={model_type: llama, vocab_size: 100}", "vocab_size: 100 is less than the tokenizer has"),
    ],
)
def test_refused(word: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a mistake in the recipe that shows as a traceback."""
    assert main(["pretrain", *SMALL, f"output={tmp_path / 'run'}", word]) == 2
    assert message in capsys.readouterr().err


def test_no_code_of_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the Python of somebody else's tokenizer, which runs after a question that a script answers."""
    folder, ran = tmp_path / "tokenizer", tmp_path / "ran"
    folder.mkdir()
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    code = f"from transformers import ByT5Tokenizer\nopen({str(ran)!r}, 'w').close()\nclass Own(ByT5Tokenizer): pass\n"
    (folder / "own.py").write_text(code)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    words = [f"tokenizer={folder}", "train.max_steps=1", "data.row_length=16"]
    assert main(["pretrain", *SMALL, *words, f"output={tmp_path / 'run'}"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not ran.exists()


def test_shipped_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a recipe with a key that was renamed, or of which the heads do not fit the model that it names."""
    recipe = load_pretrain_recipe(ROOT / "recipes" / "bytes-code.yaml")
    AutoConfig.for_model(**recipe.model).save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    words = ["distill", str(ROOT / "recipes" / "bytes-code-heads.yaml"), f"model={tmp_path / 'model'}", "data.limit=40"]
    # The heads that it starts from are those of the pretraining.
    words.append("heads.source=null")
    assert main([*words, "--dry-run"]) == 0
    plan = re.sub(" +", " ", capsys.readouterr().out)
    assert "frozen 10,8" in plan
    # Tilted leaves of eight places, 32 components and 259 tokens; sums of a root and six regions.
    trained = 8 * 259 * (384 + 32) + (32 + 6 * 32 * 32) * (384 + 1)
    assert f"trained {trained:,} parameters" in plan


def test_held_out_modules_are_apart() -> None:
    """Fault: a module that is trained on and measured on."""
    train = {path for path, _ in stdlib.documents(stdlib.SOURCE)}
    held_out = {path for path, _ in stdlib.documents(stdlib.HELD_OUT)}
    assert train
    assert held_out
    assert not {path.split("/")[0] for path in train} & {path.split("/")[0] for path in held_out}
    assert not any("test" in Path(path).parts for path in train | held_out)
