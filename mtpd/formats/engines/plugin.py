"""The plugin `mtpd-vllm`, a distribution of its own: where it lies, and vLLM finding it without an installation."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

PLUGIN = "plugin"
"""The folder of the plugin in an export."""


def plugin_folder() -> Path:
    """Gives the plugin's folder: in the installed package, or `plugins/vllm` of the source tree."""
    here = Path(__file__).resolve()
    installed = here.parent / "shipped"
    return installed if installed.is_dir() else here.parents[3] / "plugins" / "vllm"


def lay_out(source: Path, folder: Path) -> None:
    """Puts a plugin into a folder as `pip install` does, for a process that has the folder in its PYTHONPATH."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project["name"].replace("-", "_"), project["version"]
    shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{entry} = {value}" for entry, value in entries.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
