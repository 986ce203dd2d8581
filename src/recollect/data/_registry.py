"""From a name to a graph."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recollect.data._dataset import GraphDataset
from recollect.data._digits import digits
from recollect.data._errors import UnknownDatasetError
from recollect.data._heterophilous import heterophilous
from recollect.data._inductive import ppi, reddit, saint
from recollect.data._karate import karate
from recollect.data._ogb import ogbn
from recollect.data._pitfalls import pitfalls
from recollect.data._planetoid import planetoid
from recollect.data._sbm import sbm
from recollect.data._wikics import wikics

# A loader takes root and seed; its keyword-only parameters are the dataset's options.
_LOADERS: dict[str, Callable[..., GraphDataset]] = {
    "actor": partial(heterophilous, "actor"),
    "amazon-computers": partial(pitfalls, "amazon-computers"),
    "amazon-photo": partial(pitfalls, "amazon-photo"),
    "amazon-ratings": partial(heterophilous, "amazon-ratings"),
    "chameleon": partial(heterophilous, "chameleon"),
    "citeseer": partial(planetoid, "citeseer"),
    "coauthor-cs": partial(pitfalls, "coauthor-cs"),
    "coauthor-physics": partial(pitfalls, "coauthor-physics"),
    "cora": partial(planetoid, "cora"),
    "digits": digits,
    "flickr": partial(saint, "flickr"),
    "karate": karate,
    "minesweeper": partial(heterophilous, "minesweeper"),
    "ogbn-arxiv": partial(ogbn, "ogbn-arxiv"),
    "ogbn-products": partial(ogbn, "ogbn-products"),
    "ogbn-proteins": partial(ogbn, "ogbn-proteins"),
    "ppi": ppi,
    "pubmed": partial(planetoid, "pubmed"),
    "questions": partial(heterophilous, "questions"),
    "reddit": reddit,
    "roman-empire": partial(heterophilous, "roman-empire"),
    "sbm": sbm,
    "squirrel": partial(heterophilous, "squirrel"),
    "tolokers": partial(heterophilous, "tolokers"),
    "wikics": wikics,
    "yelp": partial(saint, "yelp"),
}


def names() -> list[str]:
    """The names that `load` accepts, sorted.

    Returns:
        Names without ``"file"``, which stands for any graph of one's own.

    Example:
        >>> from recollect.data import names
        >>> "cora" in names(), names() == sorted(names())
        (True, True)
    """
    return sorted(_LOADERS)


def load(name: str, root: str | Path | None = None, *, seed: int = 0, **options: object) -> GraphDataset:
    """Load a graph by name, onto the CPU.

    Options, with their defaults:

    * ``digits``: ``k=10``, neighbours that each image chooses;
    * ``sbm``: ``num_nodes=10_000``, ``num_classes=10``, ``average_degree=10.0``, ``homophily=0.8``,
      ``num_features=64``, ``noise=1.0``, ``num_labels=0``;
    * every graph that is read from raw files: ``download=False``, whether to fetch them if they are missing;
    * ``cora``, ``citeseer``, ``pubmed``: ``split="public"``, or ``"full"``, where all nodes outside of
      validation and test are for training;
    * ``file``: a graph of one's own: ``path``, and the other arguments of `from_file`;
    * the heterophilous graphs (``actor``, ``amazon-ratings``, ``chameleon``, ``minesweeper``, ``questions``,
      ``roman-empire``, ``squirrel``, ``tolokers``): ``split=0``, which of the ten published splits;
    * ``wikics``: ``split=0``, which of the twenty published splits;
    * ``amazon-computers``, ``amazon-photo``, ``coauthor-cs``, ``coauthor-physics``: ``split=0``, which of twenty random
      draws of 20 training and 30 validation nodes of each class;
    * ``ogbn-arxiv``: ``undirected=True``, whether citations are joined in both directions.

    Args:
        name: One of `names`, or ``"file"``.
        root: Folder of the raw files, in torch_geometric's and ogb's layout: ``root/Planetoid/Cora/raw``,
            ``root/HeterophilousGraphDataset/tolokers/raw``, ``root/ogbn_arxiv/raw``, ... By default the
            folder that the environment variable ``RECOLLECT_DATA`` names, else ``./data``.
        seed: Of generated graphs (``sbm``), and of a split that is made for a graph of one's own (``file``). All others
            are the same for every seed, their splits included.
        **options: See above.

    Returns:
        The graph, with features, labels and a split.

    Raises:
        UnknownDatasetError: There is no graph of this name.
        TypeError: The graph has no such option.
        ValueError: An option's value is out of its range.
        MissingRawFilesError: Raw files are missing and were not fetched; the message says which go where.
        InvalidRawFilesError: Raw files cannot be read.
        MissingDependencyError: An optional package is not installed.

    Example:
        >>> from recollect.data import load
        >>> graph = load("sbm", num_nodes=100, num_classes=3, seed=1)
        >>> graph.data.x.shape, graph.num_classes
        (torch.Size([100, 64]), 3)
    """
    if name not in _LOADERS and name != "file":
        raise UnknownDatasetError(_unknown(name))
    loader: Callable[..., GraphDataset] = _file if name == "file" else _LOADERS[name]
    allowed = [p.name for p in inspect.signature(loader).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(allowed)):
        raise TypeError(
            f"the dataset {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"its options are: {', '.join(sorted(allowed)) or 'none'}"
        )
    where = Path(root) if root is not None else Path(os.environ.get("RECOLLECT_DATA") or "data")
    with torch.device("cpu"):  # whatever the default device is
        return loader(where.expanduser(), seed, **options)


def _file(
    root: Path,
    seed: int,
    *,
    path: str | Path | Mapping[str, str | Path] | None = None,
    features: Any = None,
    task: Any = "auto",
    split: int = 0,
    undirected: bool = False,
) -> GraphDataset:
    if not path:
        raise ValueError("file: no path is given; give that of a file or folder (on the command line dataset.path=...)")
    from recollect.data.files import from_file

    return from_file(path, features=features, task=task, split=split, undirected=undirected, seed=seed)


def _unknown(name: str) -> str:
    text = f"there is no dataset {name!r}; the datasets are: file (a graph of your own), {', '.join(names())}"
    near = difflib.get_close_matches(str(name).lower().replace("_", "-"), names(), n=1)
    return f"{text} (did you mean {near[0]!r}?)" if near else text
