"""What `make docs` needs beside docs/: pages that lie elsewhere in the repository, and their links. A hook of mkdocs."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Where a page lies in the repository, and in the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "examples/tiny-hunyuan/README.md": "tiny-hunyuan.md",
}
# Files that pages point at and that are no pages: they go along as they are.
CARRIED = (
    *("LICENSE", "CITATION.cff", "examples/quantize.py", "examples/evaluate.py", "examples/generate_text.py"),
    *("examples/tour.ipynb", "examples/demo.py", "examples/tiny-hunyuan/train.py"),
)
_LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in ELSEWHERE.items():
        files.append(File.generated(config, target, content=_body((ROOT / source).read_text("utf-8"))))
    for source in CARRIED:
        files.append(File.generated(config, f"files/{source}", abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the repository -> as they are in the site. Those that lead nowhere stay, and end the build."""
    homes = {target: source for source, target in ELSEWHERE.items()}
    folder = posixpath.dirname(homes.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def moved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        if path in ELSEWHERE:
            path = ELSEWHERE[path]
        elif path in CARRIED:
            path = f"files/{path}"
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        else:
            path = link[1]
        return f"]({path}{link[2] or ''})"

    return _LINK.sub(moved, markdown)


def _body(text: str) -> str:
    """Without the fields that stand before a model's card."""
    return text.split("---\n", 2)[2] if text.startswith("---\n") else text
