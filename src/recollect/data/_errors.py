"""What can go wrong between a name and a graph, one class per thing that the user can do about it."""


class UnknownDatasetError(ValueError):
    """There is no graph of this name: choose one of the names in the message.

    Example:
        >>> from recollect.data import UnknownDatasetError, load
        >>> try:
        ...     load("kora")
        ... except UnknownDatasetError as error:
        ...     print(str(error).partition("(did")[2])
         you mean 'cora'?)
    """


class MissingRawFilesError(FileNotFoundError):
    """The raw files are not there, or could not be fetched: put them where the message says.

    Example:
        >>> import tempfile
        >>> from recollect.data import MissingRawFilesError, load
        >>> try:
        ...     load("cora", root=tempfile.mkdtemp())
        ... except MissingRawFilesError as error:
        ...     print("ind.cora.x" in str(error))
        True
    """


class InvalidRawFilesError(ValueError):
    """The raw files are there but cannot be read: replace them.

    Example:
        >>> import os, tempfile
        >>> from recollect.data import InvalidRawFilesError, load
        >>> root = tempfile.mkdtemp()
        >>> raw = os.path.join(root, "Planetoid", "Cora", "raw")
        >>> os.makedirs(raw)
        >>> for part in ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index"):
        ...     with open(os.path.join(raw, f"ind.cora.{part}"), "w") as file:
        ...         _ = file.write("no pickle")
        >>> try:
        ...     load("cora", root=root)
        ... except InvalidRawFilesError as error:
        ...     print("ind.cora." in str(error))
        True
    """


class InvalidFileError(ValueError):
    """A file of one's own graph cannot be understood: change it as the message says.

    Example:
        >>> import torch
        >>> from recollect.data import InvalidFileError, from_data
        >>> try:
        ...     from_data({"edge_index": torch.tensor([[0, 5], [5, 0]]), "x": torch.eye(2), "y": torch.tensor([0, 1])})
        ... except InvalidFileError as error:
        ...     print(str(error).partition(":")[2].partition(",")[0])
         edge_index names the node 5
    """


class MissingDependencyError(ImportError):
    """An optional package is not installed: install the extra that the message names.

    Example:
        >>> import sys
        >>> from unittest.mock import patch
        >>> from recollect.data import MissingDependencyError, load
        >>> try:
        ...     with patch.dict(sys.modules, {"ogb.nodeproppred.dataset_pyg": None}):  # as if ogb were not installed
        ...         load("ogbn-arxiv")
        ... except MissingDependencyError as error:
        ...     print("torch-recollect[ogb]" in str(error))
        True
    """
