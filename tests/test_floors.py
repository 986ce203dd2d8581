"""Who may import whom: floors of the package, from the ground up, and arrows that only point down.

Every import statement counts, also those inside functions and under ``TYPE_CHECKING``.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import recollect

SOURCE = Path(recollect.__file__).parent


@dataclass(frozen=True)
class Floor:
    """What one package, or one module, directly below ``recollect`` may import.

    Attributes:
        below: parts of recollect, beside itself.
        packages: from elsewhere, beside the standard library and torch.
    """

    below: frozenset[str] = frozenset()
    packages: frozenset[str] = frozenset()


def floor(below: str = "", packages: str = "") -> Floor:
    return Floor(frozenset(below.split()), frozenset(packages.split()))


APPLICATION = "hydra omegaconf yaml lightning_fabric rich matplotlib sklearn tensorboard"

# A part that is not here yet has its place all the same; a part without a place fails.
FLOORS = {
    "_torch": floor(),
    "_arguments": floor(),
    "_devices": floor(),
    "_parameters": floor(),
    "_modules": floor(),
    "_heap": floor(),
    "_transfer": floor("_devices"),
    "_storages": floor("_torch"),
    "_util": floor("_torch"),
    "_ledger": floor("_storages _torch"),
    "memory": floor("_heap _ledger _storages"),
    "_verdicts": floor("_torch _transfer"),
    "frames": floor("_arguments _devices _storages _torch _transfer _util _verdicts"),
    "distributed": floor("_arguments"),
    "autogram": floor("_devices _parameters _torch _transfer _verdicts distributed"),
    "aggregation": floor("_devices _transfer"),
    "messages": floor("_devices _storages _torch"),
    "invertible": floor("_arguments _devices _parameters _torch _verdicts frames"),
    "reversible": floor("_arguments _parameters _torch _util frames invertible messages"),
    "data": floor("", "numpy torch_geometric sklearn ogb"),
    "autoscale": floor(
        "_arguments _devices _modules _parameters _torch _transfer _util _verdicts frames messages data distributed",
        "torch_geometric pymetis kaminpar",
    ),
    "models": floor(
        "_arguments _devices _parameters frames messages invertible reversible autoscale", "torch_geometric"
    ),
    "outofcore": floor(
        "_torch _util _arguments _devices _modules _transfer _verdicts autogram distributed frames messages "
        "reversible autoscale models"
    ),
    "budget": floor("_arguments _storages _torch _util memory frames invertible reversible"),
    "testing": floor("_arguments _parameters frames invertible reversible"),
    "__init__": floor("_parameters _storages _ledger memory frames budget"),
    "train": floor(
        "__init__ _devices _util memory frames autogram aggregation invertible reversible autoscale models data "
        "outofcore budget distributed",
        APPLICATION,
    ),
    "cli": floor("__init__ train"),
    "__main__": floor("cli"),
}
# Names that users of another package look for here. They stand above all parts, and no part imports them.
ALIASES = {"autoscale/models.py": "models"}
PARTS = sorted({path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in SOURCE.rglob("*.py")})


@dataclass(frozen=True)
class Import:
    """One import statement's target, and where it stands."""

    module: str
    file: Path
    line: int

    @property
    def part(self) -> str | None:
        """The part of recollect that is imported, if any."""
        package, *rest = self.module.split(".")
        if package != "recollect":
            return None
        return rest[0] if rest and is_part(rest[0]) else "__init__"

    def __str__(self) -> str:
        return f"{self.file.relative_to(SOURCE)}:{self.line} imports {self.module}"


def is_part(name: str) -> bool:
    return (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file()


def imports_of(path: Path) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, path, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative: the package that holds the file, or one further up
                package = path.relative_to(SOURCE.parent).parent.parts
                base = package[: len(package) - node.level + 1]
                module = ".".join((*base, *filter(None, [module])))
            if module == "recollect":  # from recollect import frames: a part, or a name of the package itself
                for alias in node.names:
                    yield Import(f"recollect.{alias.name}", path, node.lineno)
            else:
                yield Import(module, path, node.lineno)


def files_of(part: str) -> list[Path]:
    folder = SOURCE / part
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [SOURCE / f"{part}.py"]
    return [path for path in files if path.relative_to(SOURCE).as_posix() not in ALIASES]


def imports_from(part: str) -> list[Import]:
    return [found for path in files_of(part) for found in imports_of(path)]


def test_every_part_has_a_floor():
    assert set(PARTS) <= set(FLOORS)
    assert {"frames", "reversible", "models", "data", "train", "cli", "memory"} <= set(PARTS)


def test_arrows_point_only_down():
    order = list(FLOORS)
    for part, allowed in FLOORS.items():
        assert all(order.index(other) < order.index(part) for other in allowed.below)
    for sideways in ("invertible", "autoscale", "autogram"):
        assert not FLOORS[sideways].below & {"invertible", "autoscale", "autogram"}


@pytest.mark.parametrize("part", PARTS)
def test_imports_stay_on_lower_floors(part):
    allowed = FLOORS[part].below | {part}
    wrong = [str(found) for found in imports_from(part) if found.part is not None and found.part not in allowed]
    assert wrong == []


@pytest.mark.parametrize("part", PARTS)
def test_imports_from_elsewhere(part):
    allowed = FLOORS[part].packages | {"recollect", "torch"} | sys.stdlib_module_names
    wrong = [str(found) for found in imports_from(part) if found.module.split(".")[0] not in allowed]
    assert wrong == []


def test_private_modules_stay_in_their_part():
    wrong = []
    for part in PARTS:
        for found in imports_from(part):
            inner = found.module.split(".")[2:]
            # What lies in _util is everybody's.
            if found.part not in (None, part, "_util") and any(name.startswith("_") for name in inner):
                wrong.append(str(found))
    assert wrong == []


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_only_hand_on_and_are_imported_by_nobody(alias):
    tree = ast.parse((SOURCE / alias).read_text())
    assert all(isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign) for node in tree.body)
    assert {found.part for found in imports_of(SOURCE / alias)} == {alias.split("/")[0], ALIASES[alias]}
    module = "recollect." + alias.removesuffix(".py").replace("/", ".")
    assert not [str(found) for part in PARTS for found in imports_from(part) if found.module == module]


def test_no_circles_between_parts():
    graph = {part: {found.part for found in imports_from(part)} - {None, part} for part in PARTS}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises a CycleError that names the circle
    assert order.index("frames") < order.index("reversible") < order.index("models") < order.index("train")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("recollect", f"{APPLICATION} recollect.train torch_geometric ogb"),
        ("recollect.frames", f"{APPLICATION} recollect.train torch_geometric ogb"),
        ("recollect.reversible", f"{APPLICATION} recollect.train torch_geometric ogb"),
        ("recollect.memory", f"{APPLICATION} recollect.train torch_geometric ogb"),
        ("recollect.models", f"{APPLICATION} recollect.train ogb"),
        ("recollect.data", f"{APPLICATION} recollect.train ogb"),
        ("recollect.cli", f"{APPLICATION} recollect.train torch_geometric ogb"),
    ],
)
def test_what_an_import_brings_along(module, unwanted):
    # `import torch` may load some of these itself if they are installed: only what comes after it is recollect's.
    program = f"""
import sys, torch
before = set(sys.modules)
import {module}
brought = set(sys.modules) - before
assert {module!r} in brought
print(*sorted(name for name in brought for bad in {unwanted.split()!r} if (name + ".").startswith(bad + ".")))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_the_reader_of_imports_sees_all_forms(tmp_path, monkeypatch):
    package = tmp_path / "recollect"
    (package / "frames").mkdir(parents=True)
    path = package / "frames" / "_x.py"
    path.write_text(
        "import torch.nn, rich\nfrom recollect import models\nfrom recollect import checkpoint\n"
        "from ..data import load\nfrom . import _y\ndef f():\n    from recollect.train import train\n"
    )
    (package / "models").mkdir()
    (package / "data").mkdir()
    (package / "train").mkdir()
    monkeypatch.setitem(globals(), "SOURCE", package)
    found = list(imports_of(path))
    assert {i.module for i in found} == {
        "torch.nn", "rich", "recollect.models", "recollect.checkpoint", "recollect.data", "recollect.frames",
        "recollect.train",
    }  # fmt: skip
    assert {i.part for i in found} == {None, "models", "__init__", "data", "frames", "train"}
