"""README and its neighbours: the code runs, and the commands, options, links and names that they mention exist."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import recollect.data
from recollect.cli import main
from recollect.train._config import parse, parse_override

ROOT = Path(__file__).parents[1]
PAGES = [
    *["README.md", "CONTRIBUTING.md", "CHANGELOG.md"],
    *["docs/design.md", "docs/depth.md", "docs/gpu.md", "docs/graph.md", "docs/objectives.md", "docs/outofcore.md"],
    *["docs/machines.md", "docs/scale.md"],
]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


EXAMPLES = [(page, code) for page in PAGES for code in blocks("python", (ROOT / page).read_text())]


def commands(program: str) -> list[str]:
    """Arguments of each call of ``program`` in shell blocks of all pages, comments cut off."""
    found = []
    for page in PAGES:
        for block in blocks("sh", (ROOT / page).read_text()):
            for line in block.splitlines():
                name, _, rest = line.split("#")[0].strip().partition(" ")
                if name.removeprefix(".venv/bin/") == program:
                    found.append(rest.strip())
    return found


def test_it_opens_with_the_two_commands():
    first = blocks("sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make train", "make test"]
    assert README.index("```sh") < 30


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_code_runs(number, tmp_path):
    program = tmp_path / "example.py"
    program.write_text(f"import torch; torch.manual_seed(0); torch.set_num_threads(1)\n{EXAMPLES[number][1]}")
    # torch_geometric scripts functions when it is imported, which torch calls deprecated.
    strict = ["-W", "error", "-W", "ignore::DeprecationWarning"]
    result = subprocess.run(
        [sys.executable, *strict, program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_there_are_examples():
    assert {page for page, _ in EXAMPLES} == {
        "README.md",
        *(page for page in PAGES if page.startswith("docs/") and page != "docs/scale.md"),
    }
    text = "".join(code for _, code in EXAMPLES)
    names = ("GroupAddRev", "RevGNN", "recollect.checkpoint", "recollect.invertible", "ScalableGNN", "Engine")
    assert [name for name in names if name not in text] == []


def test_all_pages_are_read():
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} == {page for page in PAGES if "/" in page}


def test_make_has_the_targets():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):(?!=)", makefile, re.MULTILINE))
    named = {arguments.split()[0] for arguments in commands("make")}
    named |= {target for page in PAGES for target in re.findall(r"`make ([a-z]+)", (ROOT / page).read_text())}
    assert {"train", "test", "bench", "format", "clean"} <= named <= targets


def test_recollect_has_the_commands_and_options():
    calls = [arguments.split() for arguments in commands("recollect")]
    for line in commands("make"):
        if match := re.search(r'ARGS="([^"-]*)"', line):
            calls.append([line.split()[0], *match[1].split()])
    assert {call[0] for call in calls} == {"train", "bench", "info"}
    for name, *overrides in calls:
        if name == "train":
            swept, settings = "-m" in overrides, [word for word in overrides if word != "-m"]
            for word in settings:
                assert parse_override(word).is_sweep_override() <= swept
            if not swept:
                parse([word for word in settings if not word.startswith("config=runs/RUN")])
    assert main(["info"]) == 0


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra for line in commands("pip") for group in re.findall(r"\[(.*?)\]", line) for extra in group.split(",")
    }
    assert named
    assert named <= set(extras)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = (ROOT / page).read_text()
    folder = (ROOT / page).parent
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if not link.startswith("https://")]
    paths = re.findall(r"`((?:src|tests|bench)/[\w./-]*|constraints\.txt|pyproject\.toml|CHANGELOG\.md)`", text)
    assert [link for link in links if not (folder / link).exists()] == []
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    text = (ROOT / page).read_text()
    for name in set(re.findall(r"(?<![\w./])recollect((?:\.[A-Za-z_]\w*)+)", text)):
        value = recollect
        for part in name.split(".")[1:]:
            if not hasattr(value, part):
                __import__(f"{value.__name__}.{part}")
            value = getattr(value, part)


def test_numbers_that_can_be_counted():
    assert f"{len(recollect.data.names())} graphs by name" in (ROOT / "CHANGELOG.md").read_text()
    assert {"digits", "karate", "sbm"} <= set(recollect.data.names())


def test_the_same_python_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = project["requires-python"].removeprefix(">=")
    assert f"Python {least} or newer" in README
    assert f"Python {least} or newer" in (ROOT / "Makefile").read_text()
