"""EvaByte's layout: eight output heads of bytes in one matrix, on a small model whose code comes with it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

import mtpd
from mtpd.cli import main
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance
from mtpd.heads.parallel.output_heads import OutputHeads

CODE = '''
"""Stands in for EvaByte's own code: Llama's layers below an output matrix of several heads."""
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class StandInConfig(LlamaConfig):
    model_type = "evabyte"


class StandIn(LlamaForCausalLM):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.num_pred_heads * config.vocab_size, bias=False)
        self.post_init()

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        every = output.logits.unflatten(-1, (self.config.num_pred_heads, self.config.vocab_size))
        output.logits = every[..., 0, :]
        return output
'''
V, D, HEADS = 320, 32, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in EvaByte's layout."""
    folder = tmp_path_factory.mktemp("evabyte") / "model"
    folder.mkdir()
    (folder / "modeling_standin.py").write_text(CODE)
    spec: Any = importlib.util.spec_from_file_location("modeling_standin", folder / "modeling_standin.py")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = module.StandInConfig(vocab_size=V, num_pred_heads=HEADS, max_position_embeddings=1024, **sizes)
    model = module.StandIn(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    model.save_pretrained(folder)
    ByT5Tokenizer(extra_ids=V - 259).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {
        "AutoConfig": "modeling_standin.StandInConfig",
        "AutoModelForCausalLM": "modeling_standin.StandIn",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_imported_heads_compute_what_the_matrix_says(checkpoint: Path, tmp_path: Path) -> None:
    """Fault: rows of another head or of another order, a main head that picks from later tokens, code run unasked."""
    run = tmp_path / "run"
    assert main(["import", str(checkpoint), "-o", str(run)]) == 0
    with pytest.raises(UserError, match="trust_remote_code"):
        mtpd.load(run, dtype="float32")
    run = tmp_path / "trusted"
    assert main(["import", str(checkpoint), "-o", str(run), "--trust-remote-code"]) == 0
    model = mtpd.load(run, dtype="float32", device="cpu")
    heads = model.heads
    assert isinstance(heads, OutputHeads)
    assert heads.depth == HEADS - 1
    ids = model.tokenizer("def main(", return_tensors="pt")["input_ids"]
    hidden = model.trunk.hidden(ids)
    matrix = load_file(checkpoint / "model.safetensors")["lm_head.weight"]
    every = (hidden[0] @ matrix.T).view(-1, HEADS, V)
    torch.testing.assert_close(model.trunk.unembedding(hidden)[0], every[:, 0])
    columns = torch.zeros(len(hidden[0]), HEADS, dtype=torch.long)
    for depth in range(1, HEADS):
        found = heads.depth_logits(depth, hidden[0], columns, heads.encode_window(hidden[0], columns))
        torch.testing.assert_close(found, every[:, depth])
    settings: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    plain = model.trunk.model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings), plain)
    chain = mtpd.load(run, dtype="float32", drafting={"depth": 3})
    assert torch.equal(chain.generate(ids, **settings), plain)
    assert len(chain.acceptance.drafted) == 3


def test_native_heads_are_trained(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: native heads that start elsewhere, or a kind that the user has to know."""
    run = tmp_path / "run"
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"def f{n}(x):\n    return x + {n} * {n}\n"}) + "\n" for n in range(10))
    )
    words = [
        *("distill", f"model={checkpoint}", f"output={run}", "heads=native", "dtype=float32", "device=cpu"),
        *(f"data.prompts={texts}", "data.responses=given", "data.held_out_count=2", "data.row_length=256"),
        *("train.max_steps=3", "train.micro_batch_rows=1"),
        *("evaluation.prompts_limit=2", "evaluation.max_new_tokens=8", "evaluation.decode_prompts=1"),
    ]
    assert main([*words, "trust_remote_code=true", "heads.kind=chain"]) == 2
    assert f"heads.kind: chain is not what {checkpoint} has; accepted: parallel" in capsys.readouterr().err
    assert main([*words, "trust_remote_code=true"]) == 0
    before, after = (load_file(run / name / "model.safetensors") for name in ("heads-before", "heads"))
    whole = load_file(checkpoint / "model.safetensors")["lm_head.weight"].view(HEADS, V, D)
    for index in range(HEADS - 1):
        name = f"layers.{index}.weight"
        assert torch.equal(before[name], whole[1 + index])
        assert not torch.equal(before[name], after[name])
    assert Acceptance.load(run / "acceptance.json").total().prompts == 2


def test_a_matrix_of_another_size(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: rows cut where no head begins."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][: 7 * V].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    assert main(["inspect", str(folder)]) == 0
    assert "does not run: its output matrix is 2240 x 32, not 8 x 320 rows of 32" in capsys.readouterr().out
    assert main(["distill", f"model={folder}", "heads=native", "--dry-run"]) == 2
