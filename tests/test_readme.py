"""README and its neighbours: the code runs, and the commands, options, links and names that they mention exist."""

import difflib
import importlib.util
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

import recollect.data
from forks import Forks
from recollect.cli import main
from recollect.train._config import parse, parse_override

ROOT = Path(__file__).parents[1]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS]
# Pages without code that runs: what they say is said in words, or links to the others.
IN_WORDS = {"docs/index.md", "docs/scale.md", "docs/limits.md", "docs/coming_from/index.md", "docs/recipes/index.md"}
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@dataclass
class Example:
    """A program of a page: a block of Python code, and those behind it that a comment says continue it.

    Attributes:
        needs: packages beside recollect's own, named by a comment before the block.
    """

    page: str
    number: int
    needs: list[str]
    code: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def examples(page: str) -> list[Example]:
    found: list[Example] = []
    pattern = r"(?:^<!-- (continues|needs [\w., ]+) -->\n+)?^```python\n(.*?)^```$"
    for said, code in re.findall(pattern, (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        if said == "continues":
            found[-1].code += code
        else:
            found.append(Example(page, len(found), said.removeprefix("needs ").split(", ") if said else [], code))
    return found


EXAMPLES = [example for page in PAGES for example in examples(page)]


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


@pytest.fixture(scope="module")
def forks():
    """Warnings are errors, but for what torch calls deprecated: functions that torch_geometric scripts on import."""
    parts = [f"recollect.{part}" for part in recollect._PARTS if part != "train"]
    options = ["-W", "error", "-W", "ignore::DeprecationWarning"]
    forks = Forks(["torch._dynamo", *parts], options)
    yield forks
    forks.stop()


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_code_runs(example, tmp_path, forks):
    for package in example.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    program = tmp_path / "example.py"
    program.write_text(f"import torch; torch.manual_seed(0); torch.set_num_threads(1)\n{example.code}")
    if not example.needs:
        codes, log = forks.run([[str(program)]], tmp_path, timeout=600)
        assert codes == [0], log
        return
    # Of other packages' warnings these pages say nothing.
    result = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_there_are_examples():
    assert {example.page for example in EXAMPLES} == {"README.md", *DOCS} - IN_WORDS
    text = "".join(example.code for example in EXAMPLES)
    names = ("GroupAddRev", "RevGNN", "recollect.checkpoint", "recollect.invertible", "ScalableGNN", "Engine")
    assert [name for name in names if name not in text] == []
    assert all(
        re.search(rf"^\s*(import|from) {package}\b", e.code, re.MULTILINE) for e in EXAMPLES for package in e.needs
    )


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


@pytest.mark.parametrize("after", [1, 2])
def test_all_three_take_fewer_than_forty_changed_lines(after):
    """Lines that are taken away and lines that are put there count."""
    before, *rest = [example.code for example in examples("docs/three-axes.md")]
    lines = difflib.unified_diff(before.splitlines(), rest[after - 1].splitlines(), lineterm="")
    changed = [line for line in lines if re.match(r"[+-](?![+-]{2} )", line)]
    assert 10 < len(changed) < 40
