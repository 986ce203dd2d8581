"""Every public name is tried on the emulated device, or stands here with the reason why not."""

import ast
import importlib
from pathlib import Path

import pytest

PARTS = [
    "recollect", "recollect.aggregation", "recollect.autogram", "recollect.autoscale", "recollect.budget",
    "recollect.data", "recollect.distributed", "recollect.frames", "recollect.invertible", "recollect.memory",
    "recollect.messages", "recollect.models", "recollect.outofcore", "recollect.reversible", "recollect.testing",
    "recollect.train",
]  # fmt: skip

NOT_TRIED = {
    "types, and values without tensors": "Arguments Conflict DRIFT_THRESHOLD Factor GraphData Held Made Partition "
    "PartitionQuality PeakMemory Rule Sharing Transform check_exact described digits_of history_bytes "
    "map_large_blocks Forward",
    "errors in a hook of autograd end the process of the emulation": "FrameError GraphFreedError",
    "errors that do not depend on a device": "HistoryFileError InPlaceError InvalidRunError NonFiniteLossError "
    "OffloadError ReleasedTensorError SharesError TrainingError UsageError",
    "graphs are read into host memory": "GraphDataset InvalidFileError InvalidRawFilesError MissingDependencyError "
    "MissingRawFilesError UnknownDatasetError describe from_data from_file get_data names",
    "notes of steps over a whole graph, which are the CPU's": "check_noted noted",
    "what ranks tell one another, over a group of the CPU": "Ranks",
    "a callback around recollect.plan, in a trainer that does not know the device": "LightningBudget",
    "empties storages by hand, which the emulation cannot": "eager_release",
    "the program, which is called by main": "command",
}


def tried():
    """Return all names and texts that tests of this folder have."""
    found = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        nodes = ast.walk(ast.parse(file.read_text())) if file != Path(__file__) else ()
        for node in nodes:
            match node:
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) | ast.Constant(value=name):
                    found.add(name)
    return found


def names_of(part):
    """Return the public names of a part; weightings have two."""
    names = set(importlib.import_module(part).__all__)
    return {name for name in names if not (name.endswith("Weighting") and name.removesuffix("Weighting") in names)}


@pytest.mark.parametrize("part", PARTS)
def test_every_name_is_tried_or_has_a_reason(part):
    reasons = {name for names in NOT_TRIED.values() for name in names.split()}
    assert names_of(part) - tried() - reasons == set()


def test_reasons_are_of_names_that_there_are_and_that_are_not_tried():
    public = {name for part in PARTS for name in names_of(part)}
    reasons = [name for names in NOT_TRIED.values() for name in names.split()]
    assert len(reasons) == len(set(reasons))
    assert set(reasons) <= public
