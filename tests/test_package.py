"""The package as a whole: version, public names, type information, metadata."""

import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import recollect

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def modules() -> list[str]:
    """Every module and package, private ones included."""
    found = pkgutil.walk_packages(recollect.__path__, "recollect.")
    return ["recollect", *(module.name for module in found)]


def public_modules() -> list[str]:
    return [name for name in modules() if not any(part.startswith("_") for part in name.split("."))]


def test_version_is_the_same_everywhere():
    assert recollect.__version__ == PROJECT["version"] == importlib.metadata.version("torch-recollect")
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == recollect.__version__


def test_type_information_is_shipped():
    assert files("recollect").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", modules())
def test_all_names_resolve_and_are_listed_once(name):
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    assert [n for n in names if not hasattr(module, n)] == []


@pytest.mark.parametrize("name", public_modules())
def test_public_modules_tell_their_story(name):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip()
    assert getattr(module, "__all__", [])


@pytest.mark.parametrize("name", public_modules())
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(name)
    objects = {n: getattr(module, n) for n in getattr(module, "__all__", [])}
    bare = [
        n for n, value in objects.items() if (inspect.isclass(value) or callable(value)) and not inspect.getdoc(value)
    ]
    assert bare == []


def test_the_named_interface():
    from recollect.memory import peak_memory
    from recollect.models import RevGNN
    from recollect.reversible import GroupAddRev, GroupRevRes

    assert list(inspect.signature(recollect.checkpoint).parameters) == [
        "function", "args", "seed", "enabled", "inverse", "keep", "source", "certify",
        # torch.utils.checkpoint's own
        "use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop",
        "kwargs",
    ]  # fmt: skip
    assert list(inspect.signature(recollect.checkpoint_sequential).parameters) == [
        "functions", "segments", "input", "use_reentrant", "options",
    ]  # fmt: skip
    ported = list(inspect.signature(GroupAddRev).parameters)[:5]
    assert ported == ["conv", "split_dim", "num_groups", "disable", "num_bwd_passes"]
    assert list(inspect.signature(GroupRevRes).parameters)[:2] == ["gnn_module", "groups"]
    assert list(inspect.signature(RevGNN).parameters)[:7] == [
        "in_channels", "hidden_channels", "out_channels", "num_layers", "num_groups", "conv", "dropout",
    ]  # fmt: skip
    assert {"dry_mode", "in_dry_mode", "backward_mode", "in_backward", "eager_release"} <= set(recollect.__all__)
    assert hasattr(peak_memory(), "peak_bytes")


def test_parts_are_imported_when_they_are_asked_for():
    parts = {name.split(".")[1] for name in public_modules() if "." in name} - {"cli"}
    assert set(recollect._PARTS) == parts
    assert parts | set(recollect.__all__) <= set(dir(recollect))
    program = "import recollect, sys\nprint(recollect.autogram.Engine.__name__, 'recollect.train' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Engine", "False"]
    with pytest.raises(AttributeError, match="its parts are aggregation, autogram"):
        recollect.autograms  # noqa: B018


def test_everything_that_is_installed_is_pinned():
    """Each requirement of the extras that ``make`` installs has one exact version, which its bound allows."""
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[normal(name)] = version
    assert pinned["torch"] == "2.13.0"
    assert not [name for name in pinned if name.startswith(("nvidia", "triton", "torchjd", "invtorch", "memcnn"))]
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(r for extra in ("graph", "ogb", "train", "dev") for r in extras[extra])]
    for requirement in wanted:
        name, _, bound = requirement.partition(">=")
        if name.startswith("torch-recollect["):
            continue
        assert numbers(pinned[normal(name)]) >= numbers(bound), requirement


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version)[:3]]
