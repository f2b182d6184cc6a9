"""A hook of mkdocs: the documents outside docs/ become pages of the site, and links between all of them are adapted.

The documents link to each other by their places in the repository, so that the links work there too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent

#: The page of each document that is not in docs/.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "csrc/README.md": "kernels.md",
    "bench/README.md": "bench.md",
    **{
        f"bench/results/{path.name}": f"measurements/{path.name}"
        for path in (ROOT / "bench" / "results").glob("*.md")
    },
}

LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the documents outside docs/ to the site."""
    for document, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / document).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Make links to documents links to their pages. A link to anything else in the repository becomes its text."""
    own = page.file.src_uri
    document = {page: document for document, page in PAGES.items()}.get(own, f"docs/{own}")

    def adapt(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(document), link["target"]))
        if target in PAGES or target.startswith("docs/"):
            uri = PAGES.get(target, target.removeprefix("docs/"))
            return f"[{link['text']}]({posixpath.relpath(uri, posixpath.dirname(own) or '.')}{link['anchor'] or ''})"
        return link["text"] if (ROOT / target).exists() else link[0]

    return LINK.sub(adapt, markdown)
