"""Pretraining: gradients of model and heads together, byte tokens, and resuming."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TOKENS, random_tokens, tiny_model
from kinds import settings
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, TrainingArguments

from mtpd import alignment
from mtpd.cli import main
from mtpd.data import stdlib
from mtpd.data.models import load_model, trunk_fingerprint
from mtpd.errors import UserError
from mtpd.heads import build_heads, configure_heads, load_heads, start_heads
from mtpd.heads.circuit.heads import CircuitHeads
from mtpd.heads.logit_heads import LogitHeads
from mtpd.losses.settings import LossSettings
from mtpd.pretrain.muon import muon_and_adamw
from mtpd.pretrain.pretrain import pretrain
from mtpd.pretrain.text import stream_rows
from mtpd.pretrain.trainer import held_out_metrics
from mtpd.recipe import HeadsRecipe, load_pretrain_recipe
from mtpd.train.joint_trunk import FullTrunk
from mtpd.train.model import DistillModel
from mtpd.trunk import Trunk

ROOT = Path(__file__).parents[1]
SMALL = [
    "model={model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
    "data.row_length=32",
    "train.micro_batch_rows=2",
    "train.logging_steps=1",
    "data.held_out_rows=2",
]


def joint(form: str, *, depth: int = 2, loss: LossSettings | None = None, **options: Any) -> DistillModel:
    """A tiny model with heads beside it, all of which is trained."""
    trunk = Trunk(tiny_model("llama"), tokens=TOKENS)
    given = {"kind": "chain", "depth": depth} if form == "chain" else {**settings(form, depth=depth)}
    section = HeadsRecipe.model_validate({key: value for key, value in given.items() if value not in ({}, None)})
    heads = build_heads(trunk, configure_heads(section.model_dump(), trunk, vocabulary=0, fingerprint=""))
    start_heads(heads, trunk, "identity", lambda: (), seed=1)
    with torch.no_grad():
        for each in heads.parameters():
            each.add_(torch.randn(each.shape, generator=torch.Generator().manual_seed(each.numel())) * 0.05)
    loss = loss or LossSettings((0.3,) * depth, (0.5,) * depth)
    return DistillModel(trunk, heads.train(), loss, joint=FullTrunk(trunk, original_teacher=False), **options)


def rows(length: int = 20) -> dict[str, Any]:
    ids = random_tokens(2, length)
    positions = torch.arange(length).expand_as(ids)
    return {"input_ids": ids, "labels": ids, "position_ids": positions, "num_items_in_batch": 1}


def by_hand(model: DistillModel, *, reach: bool = True) -> Tensor:
    """The whole loss from all logits at once, the teacher's without gradient."""
    ids, positions = rows()["input_ids"], rows()["position_ids"]
    trunk, heads, main = model.trunk, model.heads, model.trunk.unembedding.select(None)
    states = trunk.decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    read, length = states if reach else states.detach(), ids.shape[1]
    total = torch.nn.functional.cross_entropy(main(states)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    columns = torch.stack([alignment.target_tokens(ids, k).flatten() for k in range(heads.depth + 1)], dim=1)
    if isinstance(heads, LogitHeads):
        if isinstance(heads, CircuitHeads):
            heads._main = main
        # Behind the end of a row nothing is known of a window.
        for k in range(heads.depth + 1):
            columns.view(*ids.shape, -1)[:, length - k - 1 :, k] = 0
        window = heads.encode_window(read.flatten(0, 1), columns)
        drafts = [
            heads.depth_logits(k, read.flatten(0, 1), columns, window).unflatten(0, ids.shape)
            for k in range(1, heads.depth + 1)
        ]
    else:
        drafts = [main(state) for state in heads(trunk, read, ids, position_ids_BT=positions)]
    for depth, draft in enumerate(drafts, start=1):
        y, places = draft[:, : length - depth - 1].flatten(0, 1), slice(depth, length - 1)
        q = main(states.detach())[:, places].flatten(0, 1).detach().log_softmax(-1)
        ce = torch.nn.functional.cross_entropy(y, ids[:, depth + 1 :].flatten(), reduction="sum")
        kl = (q.exp() * (q - y.log_softmax(-1))).sum()
        total = total + model.settings.alpha[depth - 1] * ce + model.settings.beta[depth - 1] * kl
    return total


@pytest.mark.parametrize("reach", [True, False])
@pytest.mark.parametrize("form", ["chain", "linear", "decoder", "unembedding", "medusa", "cp-shared", "hmm-tilted"])
def test_gradients_are_those_of_the_whole_sum(form: str, reach: bool) -> None:
    """Fault: a kind of heads whose gradient does not reach the trunk or the unembedding, or does where it must not."""
    model = joint(form, trunk_gradient=reach)
    model(**rows())["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    by_hand(model, reach=reach).backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert names <= set(found)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                found[name], parameter.grad, atol=2e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
        elif name in found:
            assert not found[name].any(), name


def test_the_main_head_is_logged_beside_the_heads(tmp_path: Path) -> None:
    """Fault: held-out losses of the wrong head, or shares of accepted drafts of rows that have none."""
    model = joint("chain").eval()
    found = held_out_metrics(model, rows()["input_ids"], dtype=torch.float32)
    ids, trunk = rows()["input_ids"], model.trunk
    main = trunk.unembedding.select(None)
    states = trunk.hidden(ids)
    logits = [
        main(state) for state in [states, *model.heads(trunk, states, ids, position_ids_BT=rows()["position_ids"])]
    ]
    agree = torch.ones(2, 18, dtype=torch.bool)
    for k, each in enumerate(logits):
        loss = torch.nn.functional.cross_entropy(each[:, : 19 - k].flatten(0, 1), ids[:, k + 1 :].flatten())
        assert found[f"ce_{k}"] == pytest.approx(loss.item(), rel=1e-4)
        if k:
            agree = agree[:, : 19 - k] & (each[:, : 19 - k].argmax(-1) == logits[0][:, k:19].argmax(-1))
            assert found[f"car_{k}"] == pytest.approx(agree.sum().item() / 36)


@pytest.mark.parametrize("schedule", [1.0, 0.5])
def test_muon_steps_on_layers_and_adamw_on_the_rest(schedule: float) -> None:
    """Fault: a parameter that neither optimizer steps on, or both; a norm that decays; a rate that one alone gets."""
    model, other = joint("chain"), joint("chain")
    other.load_state_dict(model.state_dict())
    args = TrainingArguments("unused", learning_rate=1e-2, weight_decay=0.1, adam_beta2=0.95, use_cpu=True)
    optimizer = muon_and_adamw(model, [model.trunk.decoder.layers, *model.heads.layers], args)
    layers = [*other.trunk.decoder.layers, *other.heads.layers]
    matrices = [each for layer in layers for each in layer.parameters() if each.ndim == 2]
    assert len(matrices) == 7 * len(model.trunk.decoder.layers) + 2 * (7 + 1)
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
    for _ in range(2):
        for whole, steppers in ((model, [optimizer]), (other, plain)):
            whole.zero_grad()
            whole(**rows())["loss"].backward()
            for each in steppers:
                each.step()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_run_resumes_and_is_a_trunk(optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a resumed run that differs from one without a break; a checkpoint or heads that nothing can load."""
    common = ["pretrain", *SMALL, "heads.depth=2", "dtype=float32", "train.save_steps=2", "train.max_steps=4"]
    common += ["heads.kind=parallel", "heads.parallel.block=linear", "train.loss=ce", "evaluation.steps=2"]
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


def test_rows_without_text_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fault: one odd row ends a run, or is left out without a word."""
    texts = tmp_path / "texts.jsonl"
    rows: list[object] = [
        {"text": "a b c d e f g h"},
        {"question": "Who?", "answer": "He."},
        {"text": " "},
        {"text": "i j k l m n o p"},
        {"body": "x"},
    ]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = stream_rows(ByT5Tokenizer(extra_ids=0), str(texts), row_length=8)
    assert ByT5Tokenizer(extra_ids=0).decode(found.flatten().tolist()) == "a b c d e f g h</s>i j k l m n o p</s>"
    assert "3 of 5 rows cannot be used: 1 conversations (first:" in caplog.text
    assert "texts.jsonl:2: is a conversation; accepted: `text` rows" in caplog.text
    texts.write_text(json.dumps(rows[1]) + "\n")
    for tokenizer in ("bytes", "bpe:300"):
        recipe = load_pretrain_recipe(
            None, [*SMALL, f"data.texts={texts}", f"tokenizer={tokenizer}", f"output={tmp_path / tokenizer[:3]}"]
        )
        with pytest.raises(UserError, match=r"texts\.jsonl holds no texts that can be used; 1 of 1 rows"):
            pretrain(recipe)


def test_held_out_modules_are_apart() -> None:
    """Fault: a module that is trained on and measured on."""
    train = {path for path, _ in stdlib.documents(stdlib.SOURCE)}
    held_out = {path for path, _ in stdlib.documents(stdlib.HELD_OUT)}
    assert train
    assert held_out
    assert not {path.split("/")[0] for path in train} & {path.split("/")[0] for path in held_out}
    assert not any("test" in Path(path).parts for path in train | held_out)
