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
    Left(r"^python benchmarks/", "benchmarks take minutes to hours, in a checkout"),
    Left(r"^pytest ", "tests run in a checkout"),
    Left(r"--engine vllm", "vLLM installs an environment of its own; `make verify-vllm`"),
    Left(r"--suite-dir SUITES", "the suites are downloads"),
    Left(r"^mtpd graft .* ORIGINAL", "needs a checkpoint with MTP layers and a fine-tune that lost them"),
    Left(r"^mtpd (inspect PATH|export RUN)", "stands for any path"),
)

CHANGED = (Changed(r"^make demo\b", "mtpd distill demo", "without a checkout's virtual environment"),)

# For `--size small`: what takes long is cut short.
SHORT = "data.max_new_tokens=16 train.max_steps=4 evaluation.prompts_limit=7 evaluation.max_new_tokens=16 "
SHORT += "evaluation.decode_prompts=1"
SHORTENED = (
    Changed(r"^mtpd distill demo\b", rf"\g<0> {SHORT} data.limit=12", "less of all"),
    Changed(r"^mtpd distill my-recipe\.yaml", rf"\g<0> {SHORT}", "less of all"),
    Changed(r"^mtpd pretrain bytes-code[^#]*", r"\g<0> train.max_steps=4 train.compile=false", "fewer steps"),
    Changed(r"^mtpd distill bytes-code-heads\b", r"\g<0> data.limit=40 train.max_steps=4", "fewer steps"),
    Changed(r"gate\.sh demo (\S+) \S+", r"gate.sh smoke \1 baselines/smoke.json", "less of all"),
    Changed(r"^mtpd eval \S+ --suite demo", r"\g<0> --limit 7 --max-new-tokens 32", "fewer prompts"),
    Changed(r"^(mtpd bench .*--prompts) \d+ (--max-new-tokens) \d+", r"\1 1 \2 16", "one text, a shorter one"),
    Changed(r"^mtpd extend runs/demo (?!--to 8)", "mtpd extend runs/small ", "a smaller model: every depth is timed"),
    Changed(r"^mtpd extend \S+ --", r"\g<0>steps 2 --", "fewer steps"),
)

ENDINGS = (Ending(r"^mtpd eval .*--against", (3, 4)),)

# What documents name as the reader's own, and the shell command that puts something there.
STAND_INS = {
    "prompts.jsonl": """seq 100 | sed 's/.*/{"prompt": "What is & times seven?"}/' > prompts.jsonl""",
    "my-checkpoint": "python -c 'from mtpd.data.models import load_model\n"
    'for part in load_model("tiny", dtype="float32", device="cpu"): part.save_pretrained("my-checkpoint")\'',
    "recipe.yaml": "mtpd recipe show demo > recipe.yaml",
    "runs/new": "cp -r runs/demo runs/new",
    "runs/small": "mtpd distill smoke output=runs/small evaluation.decode_prompts=1",
    "runs/shared": "mtpd distill smoke heads.shared=true output=runs/shared",
    "before.json": "cp runs/demo/acceptance-before.json before.json",
    "after.json": "cp runs/demo/acceptance.json after.json",
}

# The model of recipes that documents show as YAML.
MODEL = "demo"
