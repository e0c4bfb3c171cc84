"""Which printed commands the walk runs otherwise than as they stand, and why. Each entry has to match something.

Patterns are searched in a command as it is printed, with its comment.
"""

from __future__ import annotations

from typing import NamedTuple


class Left(NamedTuple):
    """A command that is not run."""

    pattern: str
    why: str


class Changed(NamedTuple):
    """A command in the place of which another one runs."""

    pattern: str
    by: str
    """What takes the place of what the pattern matches, as `re.sub` has it."""
    why: str


class Ending(NamedTuple):
    """A command that may end with other exit codes than 0; its document has to say them ("exit code 3")."""

    pattern: str
    codes: tuple[int, ...]


HUB = "the model is on a hub, and large"

NOT_RUN = (
    Left(r"^make (test|format)\b", "this is a checkout's, and what runs the walk"),
    Left(r"^(mtpd distill|deepspeed) .*(llama-3.1|mistral-7b|qwen3-(8b|30b))", HUB),
    Left(r"Qwen/", HUB),
    Left(r"data\.prompts=org/dataset", "stands for a data set on the hub"),
    Left(r"^python benchmarks/", "benchmarks take minutes to hours, in a checkout"),
    Left(r"^pytest ", "tests run in a checkout"),
    Left(r"--engine vllm", "vLLM installs an environment of its own; `make verify-vllm`"),
    Left(r"--suite-dir SUITES", "the suites are downloads"),
    Left(r"^mtpd graft .* ORIGINAL", "needs a checkpoint with MTP layers and a fine-tune that lost them"),
    Left(r"\b(model-W4A16|runs/w4a16)\b", "needs a quantised checkpoint, and the package that reads it"),
    Left(r"^mtpd (inspect PATH|export RUN)", "stands for any path"),
)

CHANGED = (Changed(r"^make demo\b", "mtpd distill demo", "without a checkout's virtual environment"),)

# For `--size small`: what takes long is cut short. Of an option that is given twice, the last one counts.
FEW = "evaluation.prompts_limit=5 evaluation.max_new_tokens=16 evaluation.decode_prompts=1"
SHORT = f"data.max_new_tokens=16 train.max_steps=4 {FEW}"
SHORTENED = (
    Changed(r"^mtpd distill demo\b", rf"\g<0> {SHORT} data.limit=12", "less of all"),
    Changed(r"^mtpd distill my-recipe\.yaml", rf"\g<0> {SHORT}", "less of all"),
    Changed(
        r"^mtpd pretrain bytes-code[^#]*",
        r"\g<0> train.max_steps=2 train.compile=false data.texts=texts.jsonl data.held_out=texts.jsonl",
        "less text, which a tokenizer in Python reads byte by byte",
    ),
    Changed(r"^(mtpd pretrain papers/.*)train\.max_steps=\d+", r"\1train.max_steps=2", "less of all"),
    Changed(r"^mtpd distill model=runs/joint/model", rf"\g<0> {FEW}", "fewer prompts"),
    Changed(r"^mtpd distill bytes-code-heads\b", rf"\g<0> data.limit=40 train.max_steps=4 {FEW}", "less of all"),
    Changed(
        r"gate\.sh demo (\S+) \S+",
        r"gate.sh smoke \1 baselines/smoke.json --limit 7 --max-new-tokens 16",
        "less of all",
    ),
    Changed(r"^mtpd eval \S+ --suite demo\S*", r"\g<0> --limit 7 --max-new-tokens 16", "fewer prompts"),
    Changed(r"^mtpd eval runs/demo( --model.*)?$", r"\g<0> --limit 7 --max-new-tokens 16", "fewer prompts"),
    Changed(r"^mtpd eval runs/new --min-tau .*", r"\g<0> --limit 7 --max-new-tokens 16", "fewer prompts"),
    Changed(r"^mtpd generate [^#]*", r"\g<0> --max-new-tokens 16", "a shorter text"),
    Changed(r"^mtpd bench [^#]*", r"\g<0> --prompts 1 --max-new-tokens 8 --runs 1", "one text, a shorter one"),
    Changed(r"^mtpd verify [^#]*", r"\g<0> --limit 1 --max-new-tokens 16", "one text, a shorter one"),
    Changed(
        r"^mtpd extend runs/demo --", "mtpd extend runs/small --steps 2 --", "a smaller model: every depth is timed"
    ),
    Changed(
        r"^python (examples/quickstart\.py)",
        r"""sed 's/data.limit=32/data.limit=8", "data.max_new_tokens=32/' \1 | python -""",
        "fewer prompts",
    ),
)

ENDINGS = (Ending(r"^mtpd eval .*--(against|min-tau)", (3, 4)),)

# What documents name as the reader's own, and the shell command that puts something there.
STAND_INS = {
    "prompts.jsonl": """seq 100 | sed 's/.*/{"prompt": "What is & times seven?"}/' > prompts.jsonl""",
    "texts.jsonl": """seq 2000 | sed 's/.*/{"text": "times_& = lambda x: & * x"}/' > texts.jsonl""",
    "chats.json.gz": "python -c 'import gzip, json\n"
    'chat = lambda i: [{"from": "human", "value": f"What is {i} squared?"}, {"from": "gpt", "value": f"{i * i}"}]\n'
    'gzip.open("chats.json.gz", "wt").write(json.dumps([{"conversations": chat(i)} for i in range(100)]))\'',
    "mails.csv": "(echo subject,body; seq 100 | sed 's/.*/Invoice number &,Invoice & is attached./') > mails.csv",
    "fine-tuned": "python -c 'from mtpd.data.models import load_model\n"
    'model, words = load_model("demo", device="cpu")\n'
    "for each in model.model.layers[-1].parameters(): each.data *= 1.01\n"
    'for part in (model, words): part.save_pretrained("fine-tuned")\'',
    "my-checkpoint": "python -c 'from mtpd.data.models import load_model\n"
    'for part in load_model("tiny", dtype="float32", device="cpu"): part.save_pretrained("my-checkpoint")\'',
    "recipe.yaml": "mtpd recipe show demo > recipe.yaml",
    "runs/new": "cp -r runs/demo runs/new",
    "baselines/history": "mkdir -p baselines/history && cp runs/demo/acceptance.json baselines/history/2026-11-29.json",
    "runs/small": "mtpd distill smoke output=runs/small evaluation.decode_prompts=1 evaluation.max_new_tokens=8",
    "runs/shared": "mtpd distill smoke heads.shared=true output=runs/shared",
    "before.json": "cp runs/demo/acceptance-before.json before.json",
    "after.json": "cp runs/demo/acceptance.json after.json",
}

# The model of recipes that documents show as YAML.
MODEL = "demo"
