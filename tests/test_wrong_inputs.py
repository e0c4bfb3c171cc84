"""Paths and names that are wrong: refused in one line that names the way out, before anything heavy is imported."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from test_gate import acceptance, rows

from mtpd.cli import main
from mtpd.errors import MtpdError, UserError
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.suites import load_suite
from mtpd.files import write_whole

ROOT = Path(__file__).parents[1]


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line about a command that must be refused as the user's mistake."""
    assert main(words) == 2
    output = capsys.readouterr().err
    assert output.startswith("mtpd: error: "), output
    assert output.count("\n") == 1, output
    return output


def gguf(path: Path, architecture: str = "llama") -> Path:
    """A small .gguf file with a tokenizer's list of texts and one tensor of 4,096 bytes."""
    writer = GGUFWriter(path, architecture)
    writer.add_token_list(["a", "bc", "def"])
    writer.add_context_length(64)
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_folder(folder: Path, **files: str) -> str:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return str(folder)


MODELS: dict[str, tuple[Callable[[Path], str], str]] = {
    "adapter": (
        lambda folder: model_folder(folder / "a", adapter_config__json='{"base_model_name_or_path": "org/base"}'),
        "is an adapter without weights",
    ),
    "tokenizer": (
        lambda folder: model_folder(folder / "a", tokenizer_config__json="{}", tokenizer__json="{}"),
        "holds a tokenizer alone and no config.json",
    ),
    "no weights": (
        lambda folder: model_folder(folder / "a", config__json='{"model_type": "llama"}'),
        "has config.json and no weights",
    ),
    "run directory": (
        lambda folder: model_folder(folder / "a", recipe__yaml="model: tiny\n"),
        "is a run directory; accepted: the model that its recipe.yaml names",
    ),
    "heads": (
        lambda folder: model_folder(folder / "heads", config__json="{}", model__safetensors=""),
        "names no model_type, so it is no model of transformers (heads of mtpd belong to a run directory)",
    ),
    "folder of gguf": (
        lambda folder: str(gguf(Path(model_folder(folder / "a")) / "m.gguf").parent),
        "is a folder of .gguf files; accepted: one of them, such as",
    ),
    "not gguf": (lambda folder: str(shutil.copy(__file__, folder / "m.gguf")), "is no GGUF file"),
    "cut header": (
        lambda folder: cut(gguf(folder / "m.gguf"), 60),
        "is cut off or damaged in its header; download it again",
    ),
    "cut gguf": (lambda folder: cut(gguf(folder / "m.gguf"), -9), " bytes; download it again"),
    "cut path": (lambda folder: str(folder / "x" / "y"), "no such directory"),
}


def cut(path: Path, size: int) -> str:
    path.write_bytes(path.read_bytes()[:size])
    return str(path)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_no_model(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a directory or file of another kind fails inside of a library, without the way out."""
    make, message = MODELS[kind]
    name = make(tmp_path)
    output = said(["distill", f"model={name}", f"output={tmp_path / 'run'}"], capsys)
    assert f"model {name}: " in output
    assert message in output


def test_a_whole_gguf_file_is_not_called_cut_off(tmp_path: Path) -> None:
    """Fault: the size that a header says is counted wrong, and good files are refused."""
    from mtpd.data.find_model import locate

    assert locate(str(gguf(tmp_path / "m.gguf"))) == (str(tmp_path), True, {"gguf_file": "m.gguf"})


def test_gguf_files_of_an_unknown_architecture_name_the_known_ones(tmp_path: Path) -> None:
    """Fault: the message of transformers leaves open which architectures there are."""
    from mtpd.data.models import load_model

    with pytest.raises(UserError, match=r"no GGUF files of its architecture; accepted: .*llama.*qwen"):
        load_model(str(gguf(tmp_path / "m.gguf", "starship")))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "data.prompts",
            lambda folder: model_folder(folder / "d"),
            "is a folder without data files; accepted:",
        ),
        ("data.prompts", lambda folder: str(folder / "rows.txt"), "rows.txt: no such file; accepted: builtin"),
        ("data.prompts", lambda folder: "prompts.csv", "prompts.csv: no such file; accepted: builtin"),
        ("data.held_out", lambda folder: "nope.jsonl", "data.held_out: nope.jsonl: no such file"),
        ("evaluation.extra", lambda folder: "[nope.jsonl]", "evaluation.extra.0: nope.jsonl: no such file"),
        ("data.given", lambda folder: "[{prompts: nope.jsonl}]", "data.given.0.prompts: nope.jsonl: no such file"),
        ("heads.source", lambda folder: "nope", "heads.source: nope: holds no heads"),
        ("heads.vocabulary", lambda folder: "nope.json", "heads.vocabulary: nope.json: no such file"),
        ("train.deepspeed", lambda folder: "nope.json", "train.deepspeed: nope.json: no such file; accepted: zero1"),
        (
            "train.report_to",
            lambda folder: "[kubeflow]",
            "train.report_to: kubeflow is not installed here; pip",
        ),
        ("train.report_to", lambda folder: "[wandbb]", "train.report_to: wandbb is unknown; accepted: azure_ml"),
        ("output", lambda folder: __file__, "is a file; accepted: a directory"),
        ("output", lambda folder: f"{__file__}/run", f"cannot be made, {__file__} is a file"),
        ("output", lambda folder: "/proc/run", "output: /proc/run cannot be written (/proc: "),
        ("data.hidden_states", lambda folder: __file__, "data.hidden_states: "),
    ],
)
def test_what_a_recipe_names_is_looked_at_first(
    key: str, value: Callable[[Path], str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a wrong path is found after the model was loaded, under the name of another key, or without a way out."""
    words = ["distill", "model=tiny", f"output={tmp_path / 'run'}", f"{key}={value(tmp_path)}"]
    assert message in said(words, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ('["a"]', "expected an object with messages"),
        ('{"prompt": 3}', "`prompt` must be a string"),
        ('{"subject": "a"}', "no known field in ['subject']; accepted are messages"),
        ('{"prompt": "a"', "not a JSON object on one line"),
    ],
)
def test_the_first_prompt_is_looked_at_first(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a file of another form is noticed after the model was loaded."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    assert message in said(["distill", "model=tiny", f"output={tmp_path / 'run'}", f"data.prompts={path}"], capsys)
    assert not (tmp_path / "run").exists()


def test_recipe_check_says_that_a_tracker_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a recipe is called good that ends before its first step."""
    assert "kubeflow is not installed here" in said(["recipe", "check", "smoke", "train.report_to=[kubeflow]"], capsys)


TYPOS = [
    (["distill", "model=./nowhere"], "model ./nowhere: no such directory"),
    (["distill", "model=tiny", "data.prompts=nope.jsonl"], "nope.jsonl: no such file"),
    (["distill", "demo", "heads.depth", "=", "3"], "one recipe file or name, then key=value overrides without spaces"),
    (["distill", "run"], "is a directory; accepted: "),
    (["distill", "model=tiny", "device=gpu"], "device: gpu is not accepted; accepted: auto, cpu, cuda"),
    (["recipe", "copy", "demo", "-o", "run/recipe.yaml/x"], "is a file"),
    (["generate", "run", "--prompt", "x", "--dtype", "fp16"], "'auto', 'float32', 'bfloat16', 'float16'"),
    (["generate", "run", "--prompt", "x", "--sources", "heads,tree"], "--sources: tree is not accepted"),
    (["chat", "run", "--sources", ","], "--sources: nothing is not accepted; accepted: heads, lookup"),
    (["generate", "run", "--prompt", "x", "--depth", "0"], "'--depth': Input should be greater than or equal to 1"),
    (["report", "nowhere"], "nowhere: no such directory"),
    (["report", "run", "--against", "nowhere"], "nowhere: no such file; accepted: an acceptance file"),
    (["data", "vocab", "smoke", "heads.vocabulary=99", "--out", "."], "--out: . is a directory"),
    (["pretrain", "bytes-code", "data.texts=nope.jsonl"], "data.texts: nope.jsonl: no such file; accepted: stdlib"),
    (["eval", "nowhere"], "nowhere: no such directory"),
    (["eval", "run", "--suite", "demoo"], "did you mean demo?"),
    (["eval", "run", "--suite-dir", "nowhere"], "--suite-dir: nowhere: no such folder"),
    (["eval", "run", "--heads", "head"], "accepted here: heads; or finish the run"),
    (["eval", "run", "-o", "."], "--output: . is a directory"),
    (["eval", "run", "--junit", "/proc/x.xml"], "--junit: /proc cannot be written"),
    (["eval", "run", "--against", "run"], "the run has no evaluation.json yet; measure it with mtpd eval"),
    (["eval", "run/heads"], "did you mean "),
    (["extend", "nowhere"], "nowhere: no such directory"),
    (["generate", "nowhere", "--prompt", "x"], "nowhere: no such directory"),
    (["chat", "recipe.yaml"], "no such directory"),
    (["bench", "run", "--against", "fast"], "--against: fast is not accepted; accepted: plain, engine, lookup"),
    (["bench", "run", "--assistant", "tiny"], "--assistant: goes with --against assistant; accepted: both or neither"),
    (["bench", "run", "--sources", "tree"], "--sources: tree is not accepted; accepted: heads, lookup"),
    (["bench", "run", "--suite", "nope.jsonl"], "--suite: nope.jsonl: no such file"),
    (["compare", "run/recipe.yaml", "nowhere"], "nowhere: no such file; accepted: an acceptance file, or the"),
    (["compare", "run", "run"], "the run has no acceptance.json yet; finish it"),
    (["extend", "run"], "--to: is missing; accepted: a number of heads above 2, or --auto"),
    (["extend", "run", "--to", "2"], "extend.to: 2 is not more than the 2 heads there are"),
    (["extend", "run", "--to", "4", "--shared", "--adapters", "4"], "--shared: is not accepted with --adapters"),
    (["extend", "run", "--to", "four"], "Invalid value for '--to'"),
    (["extend", "stage", "--to", "4"], "stage: is a stage of an extension"),
    (["distill", "model=tiny", "--resume", "checkpoint-2"], "--resume: checkpoint-2 is no whole checkpoint of runs/"),
    (["distill", "model=tiny", "--resume", "checkpoint-2", "--fresh"], "checkpoint-2 does nothing with --fresh"),
    (["distill", "model=tiny", "--processes", "2"], "--processes: 2 needs --launcher"),
    (["distill", "model=tiny", "--devices", "2"], "--devices: 2 is only for a plan"),
    (["distill", "model=tiny", "--launcher", "torchrun", "--nodes", "hosts"], "hosts needs --launcher deepspeed"),
    (["distill", "model=tiny", "--launcher", "deepspeed", "--nodes", "hosts"], "--nodes: hosts: no such file"),
    (["distill"], "model"),
    (["data", "store", "smoke", "data.hidden_states=memory"], "memory stores nothing on the disk; accepted: disk"),
    (["data", "vocab", "smoke"], "heads.vocabulary: 0 leaves nothing to count"),
    (["pretrain", "bytes-code", "device=gpu"], "device: gpu is not accepted"),
    (["pretrain"], "model"),
    (["eval", "run", "--suite", ","], "--suite: names no suite"),
    (["eval", "run", "--suite", "demo,demo"], "--suite: demo is named twice"),
    (["eval", "run", "--drafts", "3"], "--drafts: 3 is not accepted; accepted: 1 to 2"),
    (["eval", "run", "--max-drop", "5"], "--max-drop: 5.0 is not accepted"),
    (["eval", "run", "--against", "base.json", "--mode", "decoded"], "in different modes (offline, decoded)"),
    (["eval", "run", "--against", "base.json", "--drafts", "1"], "decoding settings differ: drafts is 2 and 1"),
    (["eval", "run", "--against", "base.json", "--suite", "gsm8k"], "measured on (demo); leave --suite out"),
    (["eval", "run", "--against", "base.json", "--limit", "3"], "suite demo differs: limit is 84 and 3"),
    (["compare", "base.json", "base.json", "--max-drop", "5"], "--max-drop: 5.0 is not accepted"),
    (["compare", "base.json"], "Missing argument 'CANDIDATE'"),
    (["export", "run", "-o", "out"], "Missing option '--to'"),
    (["export", "run", "--to", "hf-mtp"], "Missing option '-o' / '--output'"),
    (["export", "run", "--to", "transfomers", "-o", "out"], "'transfomers' is not one of"),
    (["export", "run", "--to", "hf-mtp", "-o", "run/recipe.yaml/out"], "recipe.yaml is a file"),
    (["export", "run", "--to", "hf-mtp", "-o", "out", "--depth", "3"], "--depth: 3 is not accepted; accepted: 1 to 2"),
    (["export", "nowhere", "--to", "hf-mtp", "-o", "out"], "nowhere: no such directory"),
    (["verify", "out"], "Missing option '--engine'"),
    (["verify", "nowhere", "--engine", "vllm"], "nowhere: no such directory; give the output of mtpd export"),
    (["verify", "run", "--engine", "transformers"], "is a run; export it first: mtpd export"),
    (["verify", "written", "--engine", "vllm"], "--engine vllm: does not load layout hf-mtp; accepted: transformers"),
    (["verify", "written", "--engine", "transformers", "--drafts", "3"], "--drafts: 3 is not accepted; accepted: 1 to"),
    (["verify", "written", "--engine", "transformers", "--environment", "e"], "--environment: e is for --engine vllm"),
    (["verify", "written", "--engine", "transformers", "--run", "nowhere"], "the run that was exported: --run RUN"),
    (["inspect", "./nowhere"], "model ./nowhere: no such directory"),
    (["inspect", "run", "--base", "./nowhere"], "model ./nowhere: no such directory"),
    (["inspect", "run", "--family", "glm"], "glm is not known; accepted: deepseek-v3"),
    (["import", "run", "-o", "run"], "exists; choose another output"),
    (["import", "model.gguf", "-o", "out"], "model model.gguf: has no safetensors files"),
    (["graft", "./nowhere", "--from", "demo", "-o", "out"], "model ./nowhere: no such directory"),
    (["graft", "demo", "--from", "./nowhere", "-o", "out"], "model ./nowhere: no such directory"),
    (["graft", "demo", "-o", "out"], "Missing option '--from'"),
]


def test_typos_are_answered_without_torch(tmp_path: Path) -> None:
    """Fault: half a minute of imports and of loading a model comes before a misspelt word is looked at."""
    for name in ("run", "stage"):
        (tmp_path / name / "heads").mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").write_text("model: tiny\nheads.depth: 2\n")
        (tmp_path / name / "heads" / "model.safetensors").write_bytes(b"")
        config = {"depth": 2, "hidden_size": 8, "source_layers": [0, 0]}
        (tmp_path / name / "heads" / "config.json").write_text(json.dumps(config))
    (tmp_path / "stage" / "stage.json").write_text("{}")
    (tmp_path / "written").mkdir()
    (tmp_path / "written" / "mtpd.json").write_text(
        json.dumps({"layout": "hf-mtp", "run": "run", "engines": ["transformers"]})
    )
    measured = acceptance({"demo": rows(60, 0.5, 0)})
    counts = {"demo": measured.suites["demo"].model_copy(update={"settings": load_suite("demo").settings})}
    measured.model_copy(update={"suites": counts}).save(tmp_path / "base.json")
    code = f"""
        import contextlib, io, json, sys
        from mtpd.cli import main
        for words in {[words for words, _ in TYPOS]!r}:
            with contextlib.redirect_stderr(io.StringIO()) as shown:
                code = main(words)
            heavy = {{"torch", "transformers", "datasets", "trl"}} & set(sys.modules)
            print(json.dumps([code, shown.getvalue(), sorted(heavy)]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [
        (words, answer)
        for (words, message), answer in zip(TYPOS, answers, strict=True)
        if answer[0] != 2 or answer[1].count("\n") != 1 or answer[2] or message not in answer[1]
    ]
    assert wrong == []


def test_runs_are_compared_by_their_acceptance_files(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: `mtpd compare RUN_A RUN_B` wants the names of files inside of the runs."""
    shutil.copytree(finished_run, tmp_path / "other")
    assert main(["compare", str(finished_run), str(tmp_path / "other")]) == 0
    assert "+0.00" in capsys.readouterr().out


def test_baselines_of_a_run_and_of_other_suites(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: `--against RUN` is refused, or a baseline of other suites is refused without the way on."""
    short = ["--limit", "4", "--max-new-tokens", "8", "--responses", str(tmp_path / "kept")]
    assert main(["eval", str(finished_run), "--suite", "demo", *short]) == 0
    capsys.readouterr()
    words = ["eval", str(finished_run), "--against", str(finished_run)]
    assert main([*words, "-o", str(tmp_path / "b.json"), *short]) == 4
    assert Acceptance.load(tmp_path / "b.json").suites.keys() == {"demo"}
    capsys.readouterr()
    assert "measured on (demo); leave --suite out to measure those" in said([*words, "--suite", "gsm8k"], capsys)
    own = finished_run / "acceptance.json"
    assert "which are no suites here; accepted: a file of mtpd eval" in said([*words[:3], str(own)], capsys)


def test_a_finished_run_says_that_nothing_was_left(
    tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: the same command again looks as if it had trained, or a first run says that it did nothing."""
    words = ["distill", str(finished_run / "recipe.yaml"), f"output={finished_run}"]
    content = json.loads((finished_run / "provenance.json").read_text())
    del content["files"], content["sha256"]
    (finished_run / "provenance.json").write_text(json.dumps(content))
    assert main(words) == 0
    assert "nothing was left" not in capsys.readouterr().out
    assert main(words) == 0
    assert "nothing was left to do: the run was finished before; --fresh starts over" in capsys.readouterr().out


def test_a_full_disk_says_how_much_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fault: nobody learns whether a megabyte is missing or a thousand."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MtpdError, match=r"x: cannot write: No space left .* \(2\.0 MB needed, [\d.,]+ MB free\)"):
        write_whole(tmp_path / "x", b"." * 2_000_000)
    assert list(tmp_path.iterdir()) == []
