"""The documentation as a site: it builds without a warning, needs no network, and has every public name."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import recollect

ROOT = Path(__file__).parents[1]
PARTS = ["recollect", *(f"recollect.{part}" for part in recollect._PARTS)]


class Loaded(HTMLParser):
    """What a page loads, and the anchors that it has."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors.add(given.get("id"))
        if tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and "href" in given and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built as ``make docs`` does."""
    pytest.importorskip("mkdocs", reason="the site needs pip install 'torch-recollect[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def public(part):
    return [f"{part}.{name}" for name in importlib.import_module(part).__all__]


def test_nothing_is_loaded_from_the_network(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        assert [link for link in Loaded(page.read_text()).loaded if re.match(r"(https?:)?//", link)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text()), style


@pytest.mark.parametrize("part", PARTS)
def test_the_reference_has_every_public_name(part, site):
    anchors = Loaded((site / "reference" / part / "index.html").read_text()).anchors
    assert [name for name in public(part) if name not in anchors] == []


# Public classes and functions whose docstring has no example yet. The list only gets shorter.
WITHOUT = {
    "recollect": """
        backward_mode dry_mode eager_release in_backward in_dry_mode
    """,
    "recollect.aggregation": """
        AlignedMTL AlignedMTLWeighting CAGrad CAGradWeighting Conflict Constant ConstantWeighting DualProj
        DualProjWeighting GradVac GradVacWeighting IMTLG IMTLGWeighting Krum KrumWeighting MGDA MGDAWeighting
        Mean MeanWeighting NashMTL NashMTLWeighting PCGrad PCGradWeighting Random RandomWeighting
        ResidualWeighting SDMGrad SDMGradWeighting StatefulWeighting Sum SumWeighting Weighting conflict
    """,
    "recollect.autogram": """
        Blocks Certificate GramianError NoiseScale NotCovered Outer Picked Rows Rule Sharing register_rule
    """,
    "recollect.autoscale": """
        Around AsyncIOPool BlockwiseGNN EvalSubgraphLoader GraphData HistoryFileError Partition
        PartitionQuality SubData SubgraphLoader add_self_loops compute_micro_f1 dropout edge_index_of
        gen_masks get_data history_bytes history_errors load_history_parts metis normalize partition
        partition_quality permute to_adj_t with_weights
    """,
    "recollect.budget": """
        Applied BudgetError BudgetWarning Plan Row find_units
    """,
    "recollect.data": """
        GraphDataset InvalidFileError InvalidRawFilesError MissingDependencyError MissingRawFilesError
        UnknownDatasetError describe from_data load names
    """,
    "recollect.distributed": """
        SharesError
    """,
    "recollect.frames": """
        Add Certificate DriftGauge DriftWarning Forward FrameError GraphFreedError Held InPlaceError Inverse
        Kept Lattice LatticeError OffloadError Own RandomState RebuildError ReleasedTensorError Transform
        backward_mode bits_of check_exact couple couple_by devices_of digits_of dry_mode eager_release
        frames_apply in_backward in_dry_mode keep_everything run_frame run_invertible trial uncouple
        uncouple_by
    """,
    "recollect.invertible": """
        Identity Measured
    """,
    "recollect.memory": """
        PeakMemory map_large_blocks peak_memory tensor_bytes
    """,
    "recollect.messages": """
        Made check_csr convolve described extreme for_targets made_of make_adj_t naming_pairs row_pointers
        rows_of sparse_csr take_made values_of with_weights
    """,
    "recollect.models": """
        APPNP GAT GCN GCN2 GIN PNA PNA_JK PygasReport RevGNN
    """,
    "recollect.reversible": """
        Beside GroupRevRes InvertibleModule
    """,
    "recollect.train": """
        FitResult InvalidRunError NonFiniteLossError TrainingError UsageError command train
    """,
}


@pytest.mark.parametrize("part", PARTS)
def test_every_public_name_has_an_example(part):
    module = importlib.import_module(part)
    values = {name: getattr(module, name) for name in module.__all__}
    documented = {name: value for name, value in values.items() if inspect.isclass(value) or inspect.isroutine(value)}
    without = {name for name, value in documented.items() if ">>>" not in (inspect.getdoc(value) or "")}
    assert without == set(WITHOUT.get(part, "").split())
