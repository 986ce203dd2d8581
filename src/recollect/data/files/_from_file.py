"""From a file, or a graph in memory, to what can be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from recollect.data._dataset import GraphDataset, Task, assemble
from recollect.data._errors import InvalidFileError
from recollect.data.files._folder import ROLES, SUFFIXES, read_folder, read_tables
from recollect.data.files._formats import READERS, from_mapping
from recollect.data.files._found import Found, as_float32
from recollect.data.files._labels import TASKS, understand
from recollect.data.files._parts import choose_masks

Features = Literal["degree", "embedding"]
EMBEDDING_CHANNELS = 64


def from_file(
    path: str | Path | Mapping[str, str | Path],
    *,
    features: Features | None = None,
    task: Task | Literal["auto"] = "auto",
    split: int = 0,
    undirected: bool = False,
    seed: int = 0,
) -> GraphDataset:
    """Read a graph of one's own. No file is trusted: none can run code.

    * ``.pt``: a ``torch_geometric.data.Data`` or a dictionary of tensors, by `torch.save`.
    * ``.npz``: ``edge_index`` [2, E], or ``edges`` [E, 2], or the four parts of a sparse matrix (``adj_data``,
      ``adj_indices``, ``adj_indptr``, ``adj_shape``); ``x`` [N, F], dense or sparse; ``y``; ``train_mask``,
      ``val_mask`` and ``test_mask`` [N], or [N, S] for S splits.
    * a folder: ``edges.csv`` (source, target and perhaps a weight), ``features.csv`` and ``labels.csv`` (a row for each
      node), perhaps ``split.csv`` (``train``, ``val`` or ``test``); or ``edges.csv`` and ``nodes.csv`` with headers.
      Where nodes have names, the column ``id`` has them. ``.tsv`` stands for tabs, ``.txt`` for white space.
    * ``.graphml``: attributes ``class`` (or ``y``), perhaps ``split``, and numbers, which are features.
    * ``.mat``, up to version 7: ``adj`` (or ``network``), ``features``, ``labels`` (or ``group``). Numbers of nodes
      count from 0, and are refused where none is 0.

    Labels in one column are classes, in several columns zeros and ones of a label each; unknown ones are NaN, or empty
    in a table of several columns. Nodes without a known label are in no part of the split. Without a split one is made,
    60 / 20 / 20 % of each class; with several labels, of the nodes of each rarest label. Multi-label graphs are scored
    by average precision. Weights are ``edge_weight``, and ``edge_attr`` too where the edges have no other features.

    Args:
        path: The file or folder; or the table for each of ``edges``, ``features``, ``labels``, ``split``, ``nodes``.
        features: In the place of the file's own: ``"degree"``, log(1 + d) of in-degree and out-degree, or
            ``"embedding"``, a vector of 64 numbers for each node, which `recollect.train` learns. None: the file's, and
            degrees if it has none.
        task: What labels are, where the file leaves it open.
        split: Which of the file's splits.
        undirected: Whether edges that are there in one direction are joined in the other as well.
        seed: Of a split that is made.

    Returns:
        The graph. ``notes`` tells what was made or not used, ``node_ids`` what the file calls the nodes, and
        ``class_names`` the classes.

    Raises:
        FileNotFoundError: There is no such file.
        InvalidFileError: It cannot be understood; the message says where, and what to write.
        ValueError: An argument is out of its range.
        MissingDependencyError: torch_geometric, scipy or networkx is not installed.

    Example:
        >>> import numpy, tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "graph.npz")
        >>> numpy.savez(path, edge_index=[[0, 1, 2, 3], [1, 2, 3, 0]], x=numpy.eye(4), y=[0, 1, 0, 1])
        >>> from_file(path).num_classes
        2
    """
    _check(features, task)
    if isinstance(path, Mapping):
        found = read_tables(_tables(path), ", ".join(str(file) for file in path.values()))
        return _finish(found, "tables", features, task, split, undirected, seed)
    where = Path(path).expanduser()
    return _finish(_read(where), where.name, features, task, split, undirected, seed)


def from_data(
    data: Any,
    *,
    name: str = "data",
    features: Features | None = None,
    task: Task | Literal["auto"] = "auto",
    split: int = 0,
    undirected: bool = False,
    seed: int = 0,
) -> GraphDataset:
    """Take a ``torch_geometric.data.Data``, or a dictionary of tensors, as `from_file` takes one that was saved.

    Args:
        data: With ``edge_index``, ``y`` and perhaps ``x``, masks and edge features.
        name: Of the graph.
        features: See `from_file`.
        task: See `from_file`.
        split: See `from_file`.
        undirected: See `from_file`.
        seed: See `from_file`.

    Returns:
        The graph, as `from_file` returns it.

    Raises:
        InvalidFileError: It cannot be understood.
        ValueError: An argument is out of its range.

    Example:
        >>> import torch
        >>> from recollect.data import from_data
        >>> ring = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
        >>> graph = from_data({"edge_index": ring, "x": torch.eye(4), "y": torch.tensor([0, 1, 0, 1])}, undirected=True)
        >>> graph.num_classes, graph.data.edge_index.shape
        (2, torch.Size([2, 8]))
    """
    _check(features, task)
    return _finish(from_mapping(data, name), name, features, task, split, undirected, seed)


def _check(features: str | None, task: str) -> None:
    if features is not None and features not in get_args(Features):
        raise ValueError(f"features is {features!r}, but must be degree, embedding, or None for those of the file")
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, but must be one of {', '.join(TASKS)}")


def _read(path: Path) -> Found:
    if "\0" in str(path):
        raise InvalidFileError("the path has a zero character, which no file name can have")
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:  # such as of a name that is too long
        raise InvalidFileError(f"{str(path)[:100]!r} cannot be looked for: {error.strerror}") from error
    if is_folder:
        return read_folder(path)
    suffix = path.suffix.lower()
    if not is_there:
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}: give the path of a graph")
    if not path.is_file():
        raise InvalidFileError(f"{path} is neither a file nor a folder")
    if suffix in SUFFIXES:
        raise InvalidFileError(
            f"{path} is one table, and a graph is several: give the folder with edges{suffix} and labels{suffix}"
        )
    if suffix not in READERS:
        raise InvalidFileError(
            f"{path} has the suffix {suffix!r}; a graph is read from {', '.join(READERS)}, or from a folder with "
            f"edges.csv and labels.csv"
        )
    return READERS[suffix](path)


def _tables(paths: Mapping[str, str | Path]) -> dict[str, Path]:
    files = {}
    for role, path in paths.items():
        file = Path(path).expanduser()
        if role not in ROLES:
            raise ValueError(f"there is no table {role!r}; choose from: {', '.join(ROLES)}")
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {str(file)!r}, which is to hold {role}")
        if file.suffix.lower() not in SUFFIXES:
            raise InvalidFileError(f"{file} must be a table: {', '.join(SUFFIXES)}")
        files[role] = file
    return files


def _finish(
    found: Found, name: str, features: Features | None, task: str, split: int, undirected: bool, seed: int
) -> GraphDataset:
    if found.labels is None:  # of every reader; said for whoever adds one
        raise InvalidFileError(f"{found.source} has no labels")
    labels = understand(found.labels, task, found.source)
    masks, num_splits = choose_masks(found, labels, split, seed, name)
    if undirected:
        _join_back(found)
    edge_index = torch.from_numpy(np.ascontiguousarray(found.edge_index))
    x = _features(found, edge_index, features)
    weight = None if found.edge_weight is None else torch.from_numpy(found.edge_weight)
    edge_attr = found.edge_attr if found.edge_attr is not None or weight is None else weight[:, None].numpy()
    return assemble(
        name,
        x=x,
        edge_index=edge_index,
        y=labels.y,
        masks=(masks[0], masks[1], masks[2]),
        num_classes=len(labels.names),
        task=labels.task,
        metric="accuracy" if labels.task == "multiclass" else "average_precision",
        edge_attr=None if edge_attr is None else torch.from_numpy(edge_attr),
        edge_weight=weight,
        num_splits=num_splits,
        learnt_features=features == "embedding",
        notes=tuple(found.notes),
        node_ids=None if found.ids is None else tuple(found.ids),
        class_names=labels.names,
    )


def _features(found: Found, edge_index: torch.Tensor, features: Features | None) -> torch.Tensor:
    if features is None and found.x is not None:
        if not found.x.shape[1]:
            raise InvalidFileError(
                f"{found.source}: the features have no column; leave them out, or write features=degree"
            )
        return torch.from_numpy(as_float32(found.x, f"{found.source}: x"))
    if features == "embedding":
        generator = torch.Generator().manual_seed(0)
        return torch.randn(found.num_nodes, EMBEDDING_CHANNELS, generator=generator)
    if found.x is None and features is None:
        found.notes.append("no features in the file: degrees are used (features=embedding learns a vector a node)")
    degrees = [torch.bincount(end, minlength=found.num_nodes) for end in (edge_index[1], edge_index[0])]
    return torch.stack(degrees, dim=1).double().log1p()


def _join_back(found: Found) -> None:
    """Add the other direction of the edges that have none."""
    source, target = found.edge_index
    size = found.num_nodes
    lacking = ~np.isin(target * size + source, source * size + target)
    found.edge_index = np.concatenate([found.edge_index, found.edge_index[::-1, lacking]], axis=1)
    for name in ("edge_weight", "edge_attr"):
        values = getattr(found, name)
        if values is not None:
            setattr(found, name, np.concatenate([values, values[lacking]]))
    found.notes.append(f"{int(lacking.sum())} edges were joined in the other direction")
