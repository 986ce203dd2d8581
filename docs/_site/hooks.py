"""What the site has beyond ``docs/``: the files that pages link to, and a page of reference for each public module.

Links in pages are those of the repository, so that they hold there too. Here they are followed to files outside of
``docs/``, which become pages (Markdown, Python, folders) or are copied, and are rewritten to where those are.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
# Read from the source, so that a new part of the library has its page of reference at once.
PARTS = re.compile(r"^_PARTS = (\(.*?^\))", re.MULTILINE | re.DOTALL)
PROJECT = {"README.md": "README", "CONTRIBUTING.md": "Contributing", "CHANGELOG.md": "Changelog"}


def parts() -> list[str]:
    """Return the public modules: ``recollect`` itself and its parts."""
    found = PARTS.search((ROOT / "src/recollect/__init__.py").read_text())
    assert found is not None
    return ["recollect", *(f"recollect.{name}" for name in sorted(ast.literal_eval(found[1])))]


def place(path: str) -> str:
    """Return where a file or folder of the repository is in the site, as a source of mkdocs."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in PROJECT:
        return f"project/{path.lower()}"
    if (ROOT / path).is_dir():
        return f"{path}/index.md"
    return path.removesuffix(".py") + ".md" if path.endswith(".py") else path


def target(path: str, link: str) -> str | None:
    """Return the file or folder of the repository that a link in the page at ``path`` leads to, if it is one."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return found if not found.startswith("..") and (ROOT / found).exists() else None


def page_of(path: str) -> str | None:
    """Return the Markdown of a file or folder of the repository; None for one that is copied as it is."""
    source = ROOT / path
    if source.is_dir():
        names = sorted(file.name for file in source.iterdir() if file.is_file())
        return f"# {path}\n\n" + "".join(f"- [{name}]({name})\n" for name in names if not name.startswith("_"))
    if path.endswith(".py"):
        text = source.read_text()
        return f"# {path}\n\n```python\n{text}```\n"
    return source.read_text() if path.endswith(".md") else None


def reached(pages: list[str]) -> list[str]:
    """Return what is linked from pages, and from what they link to, outside of ``docs/``."""
    waiting, found = list(pages), []
    while waiting:
        path = waiting.pop()
        # Links of a folder's page are relative to what is in it.
        here = f"{path}/" if (ROOT / path).is_dir() else path
        for link, _ in LINK.findall(FENCE.sub("", page_of(path) or "")):
            new = target(here, link)
            if new is not None and not new.startswith("docs/") and new not in found:
                found.append(new)
                waiting.append(new)
    return sorted(found)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to, from page to page, the reference, and both to the navigation."""
    outside = reached([*PROJECT, *(f"docs/{file.src_uri}" for file in files.documentation_pages())])
    for path in sorted({*PROJECT, *outside}):
        options = {"inclusion": InclusionLevel.NOT_IN_NAV if path.startswith("bench") else InclusionLevel.UNDEFINED}
        text = page_of(path)
        where = {"content": text} if text is not None else {"abs_src_path": str(ROOT / path)}
        file = File.generated(config, place(path), **where, **options)
        file.origin = f"{path}/" if (ROOT / path).is_dir() else path  # type: ignore[attr-defined]
        files.append(file)
    for part in parts():
        files.append(File.generated(config, f"reference/{part}.md", content=f"# {part}\n\n::: {part}\n"))

    examples = [path for path in outside if path.startswith("examples/")]
    config.nav += [
        {"Reference": [{part: f"reference/{part}.md"} for part in parts()]},
        {"Examples": [place("examples"), *({Path(path).stem: place(path)} for path in examples)]},
        {"Project": [{title: place(path)} for path, title in PROJECT.items()]},
    ]
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Rewrite the repository's links to the site's."""
    path = getattr(page.file, "origin", f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri) or "."

    def follow(match: re.Match[str]) -> str:
        found = target(path, match[1])
        return match[0] if found is None else posixpath.relpath(place(found), here) + (match[2] or "")

    pieces = FENCE.split(markdown)
    return "".join(piece if piece.startswith("```") else LINK.sub(follow, piece) for piece in pieces)
