"""A hook of mkdocs: pages of the site that lie outside of docs/, and links between all of them.

Documents link to each other by their places in the repository, so that links work there too. Here a link to a page of
the site leads to that page, and a link to any other file of the repository becomes its name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def _outside() -> dict[str, str]:
    """Documents outside of docs/ with their page on the site."""
    rooms = {
        path.relative_to(ROOT).as_posix(): f"inside/{path.parent.name}.md" for path in ROOT.glob("mtpd/*/README.md")
    }
    return {name: name.lower() for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")} | rooms


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the documents outside of docs/."""
    for source, page in _outside().items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns links between places in the repository into links between pages.

    Raises:
        PluginError: a link leads to no file of the repository.
    """
    pages = _outside()
    here = page.file.src_uri
    source = next((source for source, each in pages.items() if each == here), f"docs/{here}")

    def turned(link: re.Match[str]) -> str:
        image, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / place).exists():
            raise PluginError(f"{source}: {target} leads to nothing")
        found = pages.get(place, place.removeprefix("docs/") if place.startswith("docs/") else None)
        if found is None:
            return text
        return f"{image}[{text}]({posixpath.relpath(found, posixpath.dirname(here) or '.')}{anchor})"

    return LINK.sub(turned, markdown)
