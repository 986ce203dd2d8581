from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings

import pytest

from recollect.data import MissingDependencyError, load
from recollect.data._foreign import foreign_code, require


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("digits", "sklearn.datasets", "train"),
        ("sbm", "torch_geometric.data", "graph"),
        ("karate", "torch_geometric.datasets", "graph"),
        ("cora", "torch_geometric.datasets", "graph"),
        ("tolokers", "torch_geometric.datasets", "graph"),
        ("reddit", "torch_geometric.datasets", "graph"),
        ("ppi", "torch_geometric.datasets", "graph"),
        ("yelp", "torch_geometric.datasets", "graph"),
        ("ogbn-arxiv", "ogb.nodeproppred.dataset_pyg", "ogb"),
    ],
)
def test_missing_library_names_the_extra(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf'{module}.*pip install "torch-recollect\[{extra}\]"'):
        load(name)


def test_a_module_that_does_not_exist_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="'recollect_no_such_module'"):
        require("recollect_no_such_module", extra="graph")


def test_foreign_code_hides_known_warnings_and_prints_only(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(warnings.filters)
    with foreign_code():
        print("noise")  # noqa: T201
        warnings.warn("`torch.jit.script` is deprecated. Use another.", DeprecationWarning, stacklevel=1)
        warnings.filterwarnings("ignore", "something")
        with pytest.raises(DeprecationWarning, match="of our own"):
            warnings.warn("of our own", DeprecationWarning, stacklevel=1)
    assert warnings.filters == before
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(importlib.util.find_spec("ogb") is None, reason="ogb is not installed")
@pytest.mark.parametrize("before", ["pass;", "import outdated;"])
def test_ogb_starts_no_thread_that_asks_for_news(before: str) -> None:
    code = (
        f"{before} import sys, threading; known = sys.modules.get('outdated');"
        "from recollect.data._foreign import require; require('ogb.nodeproppred', extra='ogb');"
        "print(threading.active_count(), sys.modules.get('outdated') is known)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "True"]
