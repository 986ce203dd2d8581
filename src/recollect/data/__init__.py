"""Graphs by name, ready to train on.

``load(name)`` returns one graph with its features, labels and split, whatever its origin:

* embedded or generated, so that they need no file and no network: ``digits``, ``karate``, ``sbm``;
* read by torch_geometric's own dataset classes: the citation graphs ``cora``, ``citeseer`` and ``pubmed``,
  ``amazon-computers`` and ``amazon-photo``, ``coauthor-cs`` and ``coauthor-physics``, ``wikics``, the heterophilous
  graphs, ``reddit``, ``flickr``, ``yelp`` and ``ppi``;
* read by ogb: ``ogbn-arxiv``, ``ogbn-products`` and ``ogbn-proteins``.

``from_file(path)`` reads a graph of one's own, ``describe(graph)`` tells what was understood.

No file is trusted. Pickles of the citation graphs are read as arrays, dictionaries and lists, processed files as
tensors, and nothing that a file says is run.

Raw files lie under ``root`` in the folders where torch_geometric and ogb put them. Nothing is fetched unless
``download=True`` is asked for: the upstream downloaders do not all verify certificates, so fetching is a decision of
the user. What is missing is named in the error, with the folder it belongs in.

What torch_geometric and ogb compute from raw files is kept: in their own ``processed`` folder beside the
raw files if that place may be written and holds no such folder yet, else in the user's cache
(``$XDG_CACHE_HOME/recollect``, by default ``~/.cache/recollect``). A folder without write permission bits
is never written into, not even by the superuser. Results appear whole or not at all.

torch_geometric, scikit-learn and ogb are imported when a graph that needs them is loaded, not before.
"""

import importlib
from typing import TYPE_CHECKING, Any

from recollect.data._dataset import GraphDataset
from recollect.data._describe import describe
from recollect.data._errors import (
    InvalidFileError,
    InvalidRawFilesError,
    MissingDependencyError,
    MissingRawFilesError,
    UnknownDatasetError,
)
from recollect.data._registry import load, names

if TYPE_CHECKING:
    from recollect.data.files import from_data, from_file

__all__ = [
    "GraphDataset",
    "InvalidFileError",
    "InvalidRawFilesError",
    "MissingDependencyError",
    "MissingRawFilesError",
    "UnknownDatasetError",
    "describe",
    "from_data",
    "from_file",
    "load",
    "names",
]


def __getattr__(name: str) -> Any:
    """Import what needs NumPy when it is asked for: the rest of the package needs torch alone."""
    if name in ("from_data", "from_file"):
        return getattr(importlib.import_module("recollect.data.files"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
