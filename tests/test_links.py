"""Links and hints: what a page links to is there, its anchor too, and what a message says to install exists."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import recollect

ROOT = Path(__file__).parents[1]
SOURCE = Path(recollect.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    """Its links to other places of the repository."""
    found = re.findall(r"\]\(([^()\s]+)\)", prose(page))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)(?: +#+)?$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        repeats = sum(1 for known in found if known == name or re.fullmatch(rf"{re.escape(name)}-\d+", known))
        found.add(f"{name}-{repeats}" if repeats else name)
    return found


def dead(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    wrong = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = sorted(
    {*FRONT, *((page.parent / link.split("#")[0]).resolve() for page in FRONT for link in links(page) if ".md" in link)}
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert dead(page) == []


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# The `first` part: a, b\n\n## Same\n\n## Same\n\n[a](#the-first-part-a-b) [b](#same-1) [c](#same-2)\n"
        "[d](page.md#same) [e](page.md#other) [f](gone.md) [g](https://h.example/i)\n```\n[j](k.md)\n```\n"
    )
    assert dead(page) == ["#same-2", "page.md#other", "gone.md"]


def texts(node: ast.AST) -> Iterator[str]:
    """The strings of a module, with `{}` for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from texts(child)


def arguments(module: ast.Module, function: str, keyword: str | None = None) -> Iterator[str]:
    """What a function is called with in a module: the constant of a keyword, or the first one by position."""
    for call in ast.walk(module):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == function:
            given = [word.value for word in call.keywords if word.arg == keyword] if keyword else call.args[:1]
            yield from (value.value for value in given if isinstance(value, ast.Constant))


MODULES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
# `recollect info` fills in an extra of the metadata, and `require` what it is called with, which is looked at below.
FILLED = {"cli.py": "torch-recollect[{}]", "data/_foreign.py": "torch-recollect[{}]", "autoscale/_require.py": "{}{}"}


def test_hints_name_extras_that_exist():
    hints = []
    for file, module in MODULES.items():
        for text in texts(module):
            for command in re.findall(r"pip install (?:--[\w-]+ )*[\"']?([^\s\"',;]+)", text):
                known = command == FILLED.get(file) or re.fullmatch(r"torch-recollect(?:\[(.*)\])?", command)
                assert known, f"{file}: pip install {command}"
                if command != FILLED.get(file):
                    extras = re.findall(r"[\w-]+", command.partition("[")[2])
                    assert [extra for extra in extras if extra not in EXTRAS] == [], f"{file}: {command}"
                hints.append(command)
    assert {"torch-recollect[train]", "torch-recollect[graph]", *FILLED.values()} <= set(hints)


def test_what_is_filled_into_hints_exists():
    extras = {extra for module in MODULES.values() for extra in arguments(module, "require", "extra")}
    assert {"graph", "ogb", "train"} <= extras <= set(EXTRAS)
    packages = {
        name.partition(".")[0].replace("_", "-")
        for file, module in MODULES.items()
        if file.startswith("autoscale/")
        for name in arguments(module, "require")
    }
    required = {re.match(r"[\w-]+", line)[0] for extra in EXTRAS.values() for line in extra}
    assert {"pymetis", "kaminpar", "torch-geometric"} <= packages <= required
