"""What is published: the files of wheel and sdist, and what their metadata and the package's page say."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = "https://code.example/recollect"
TAG = f"v{PROJECT['version']}"


@dataclass(frozen=True)
class Built:
    """A wheel's files, and its metadata."""

    files: frozenset[str]
    metadata: Message

    @property
    def page(self) -> str:
        return self.metadata.get_payload(decode=True).decode()


def build(root: Path, folder: Path, repository: str, *targets: str) -> list[Path]:
    environment = {**os.environ, "RECOLLECT_REPOSITORY": repository}
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), *targets]
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True)
    return sorted(folder.iterdir())


def read(wheel: Path) -> Built:
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        (metadata,) = (name for name in files if name.endswith(".dist-info/METADATA"))
        return Built(frozenset(files), message_from_bytes(archive.read(metadata)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist, as from a repository whose address is known."""
    sdist, wheel = sorted(build(ROOT, tmp_path_factory.mktemp("dist"), REPOSITORY), key=lambda path: path.suffix)
    return wheel, sdist


@pytest.fixture(scope="module")
def wheel(built: tuple[Path, Path]) -> Built:
    return read(built[0])


@pytest.fixture(scope="module")
def package_page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("package_page", ROOT / "tools" / "package_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    source = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "recollect").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    info = f"torch_recollect-{PROJECT['version']}.dist-info"
    assert wheel.files - source == {
        f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }
    assert source - wheel.files == set()
    assert {"recollect/py.typed", "recollect/train/presets.csv"} <= wheel.files


def test_a_wheel_from_the_sdist_is_the_same(built, wheel, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    (again,) = build(unpacked, tmp_path / "dist", REPOSITORY, "-t", "wheel")
    assert read(again).files == wheel.files
    assert read(again).metadata.as_bytes() == wheel.metadata.as_bytes()


def test_the_sdist_holds_what_the_checks_need_and_nothing_of_this_machine(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml"} <= names
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode == 0:  # a clone
        other = subprocess.run(
            ["git", "ls-files", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        known = {*tracked.stdout.splitlines(), *other.stdout.splitlines(), "PKG-INFO"}
        assert names - known == set()
        assert {name for name in known if name.startswith(("src/", "tests/", "bench/", "docs/"))} - names == set()


def test_metadata(wheel):
    trove_classifiers = pytest.importorskip("trove_classifiers")
    assert wheel.metadata["Name"] == "torch-recollect"
    assert wheel.metadata["License-Expression"] == "MIT"
    classifiers = wheel.metadata.get_all("Classifier")
    assert [name for name in classifiers if name not in trove_classifiers.classifiers] == []
    minors = [int(name.rpartition(".")[2]) for name in classifiers if re.search(r"Python :: 3\.\d+$", name)]
    assert minors == list(range(11, 15))
    assert wheel.metadata["Requires-Python"] == f">=3.{minors[0]}"
    assert wheel.metadata["Description-Content-Type"].startswith("text/markdown")


def test_the_changelog_and_the_citation_have_the_version_and_one_date():
    version = re.escape(PROJECT["version"])
    found = re.search(rf"^## \[{version}\] - (\d{{4}}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\ndate-released: {found[1]}\n" in citation


def test_addresses_follow_from_that_of_the_repository(wheel):
    addresses = dict(line.split(", ") for line in wheel.metadata.get_all("Project-URL"))
    assert set(addresses) == {"Repository", "Documentation", "Changelog", "Issues"}
    assert addresses.pop("Repository") == REPOSITORY
    assert all(address.startswith(f"{REPOSITORY}/") for address in addresses.values())


def test_links_of_the_page_lead_to_files_of_the_tag(wheel):
    links = re.findall(r"\]\(([^)]+)\)", wheel.page)
    assert [link for link in links if not link.startswith("https://")] == []
    own = [link.removeprefix(REPOSITORY) for link in links if link.startswith(REPOSITORY)]
    paths = [re.fullmatch(rf"/(?:blob|raw)/{re.escape(TAG)}/([^#]+)(?:#.*)?", link)[1] for link in own]
    relative = re.findall(r"\]\((?!https:)([^)#]+)", (ROOT / "README.md").read_text())
    assert paths == relative
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_without_an_address_the_page_has_no_dead_link(tmp_path):
    built = read(*build(ROOT, tmp_path, "", "-t", "wheel"))
    assert built.metadata.get_all("Project-URL") is None
    assert [link for link in re.findall(r"\]\(([^)]+)\)", built.page) if not link.startswith("https://")] == []
    assert "`recollect.reversible`, `recollect.invertible`, `recollect.checkpoint`: docs/depth.md" in built.page


def test_which_links_are_changed(package_page):
    text = """[a `b`](docs/a.md#c), ![d](e.svg), [f](https://g.example/h.md), [i](#j)

```python
x = [k](l.md)
```
[m
n](o.md)"""
    changed = package_page.page(text, REPOSITORY, "v1")
    assert changed == (
        text.replace("docs/a.md", f"{REPOSITORY}/blob/v1/docs/a.md")
        .replace("e.svg", f"{REPOSITORY}/raw/v1/e.svg")
        .replace("o.md", f"{REPOSITORY}/blob/v1/o.md")
    )
    assert package_page.page(text, "", "v1") == (
        text.replace("[a `b`](docs/a.md#c)", "a `b`").replace("![d](e.svg)", "").replace("[m\nn](o.md)", "m\nn")
    )
