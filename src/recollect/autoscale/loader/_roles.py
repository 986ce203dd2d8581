"""Which of a graph's tensors belong to nodes, which to edges."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

from recollect.autoscale.loader._attributes import Path, leaves, spelled, whole_numbers
from recollect.autoscale.loader._checks import STRUCTURE, check_data, check_nodes, structure_of
from recollect.autoscale.loader._probe import Declarations

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["Kind", "Role", "Roles", "roles_of"]

Kind = Literal["node", "edge", "index", "graph"]
"""A row for each node; a row for each edge; entries that are nodes; or neither of them."""

# Names of torch_geometric's conventions that must have a row for each, and names that have one if the size agrees.
_NODE_NAMES = frozenset({
    "x", "feat", "pos", "y", "batch", "node_type", "n_id", "train_mask", "val_mask", "test_mask", "node_order",
})  # fmt: skip
_EDGE_NAMES = frozenset({"edge_attr", "edge_weight", "edge_type", "e_id"})
_LIKE_NODES = re.compile(r"node_.+|.+_mask|z|normal|.+_pe|(x|feat|pos|y)(_.+|\d+)")
_LIKE_NUMBERS = re.compile(r".*idx.*|(.+_)?nodes?")
_LIKE_PAIRS = re.compile(r"(.+_)?edges?")
_COUNTS = re.compile(r"(num|n)_.+")
_BOUNDS = re.compile(r"(.+_)?ptr")


@dataclass(frozen=True)
class Role:
    """What a tensor belongs to.

    Attributes:
        kind: Of the tensor.
        dim: The dimension along which its rows or entries lie; None: none does, or nothing says which.
        of: If it has a row for each entry of a tensor of nodes, such as ``edge_label_index``: that one's path. Its kind
            is then ``"edge"``.
    """

    kind: Kind
    dim: int | None = 0
    of: Path | None = None


@dataclass(frozen=True)
class Roles:
    """The sizes of a graph, and what its tensors belong to.

    Attributes:
        num_nodes: N.
        num_edges: E.
        structure: ``"edge_index"`` or ``"adj_t"``, whichever it has.
        roles: By path, of each dense tensor but these two.
    """

    num_nodes: int
    num_edges: int
    structure: str
    roles: dict[Path, Role]

    def of_kind(self, kind: Kind, of_edges: bool = True) -> dict[Path, Role]:
        """The tensors of one kind; of ``"edge"`` those of the graph's edges alone, unless told otherwise."""
        return {path: role for path, role in self.roles.items() if role.kind == kind and (role.of is None) == of_edges}


def roles_of(data: Data, kinds: Mapping[str, str] | None = None, edges_alone: bool = False) -> Roles:
    """Count nodes and edges and sort all other tensors of ``data`` by what they belong to; `permute` has the rules.

    With ``edges_alone``, what may be of nodes by chance does not matter, and counts as of the graph.

    Raises:
        TypeError: ``data`` is no graph, rows of nodes or edges are not in a dense tensor, or ``adj_t`` is not in sparse
            CSR form.
        ValueError: There are no edges, or both forms of them; a size does not fit; a kind cannot be decided.
    """
    check_data(data)
    attributes: dict[str, Any] = data.to_dict()
    name, structure = structure_of(attributes)
    for key in _NODE_NAMES | _EDGE_NAMES:
        if key not in (kinds or {}):
            _check_tensor(key, attributes.get(key))
    num_nodes, num_edges = _sizes(data, attributes, name, structure)
    found = dict(leaves({key: value for key, value in attributes.items() if key not in STRUCTURE}))
    if name == "edge_index":
        check_nodes("edge_index", structure, num_nodes)
    declared = Declarations(data, num_nodes, _NODE_NAMES)
    doubtful = {num_edges} if edges_alone else {num_nodes, num_edges}
    sorter = _Sorter(found, num_nodes, num_edges, declared, dict(kinds or {}), doubtful, edges_alone)
    roles = {path: role for path, value in found.items() if (role := sorter(path, value)) is not None}
    return Roles(num_nodes, num_edges, name, roles)


def _check_tensor(name: str, value: Any) -> None:
    """Rows under a name of nodes or edges must be in a tensor, if they are there."""
    if value is not None and not isinstance(value, (Tensor, Mapping)) and not _is_list_of_tensors(value):
        raise TypeError(
            f"data.{name} is a {type(value).__name__}, but must be a tensor with a row for each node or edge: write "
            f"data.{name} = torch.as_tensor(data.{name})"
        )


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, Tensor) for item in value)


def _sizes(data: Data, attributes: Mapping[str, Any], name: str, structure: Tensor) -> tuple[int, int]:
    if name == "edge_index":
        num_nodes = int(data.num_nodes)
        said: tuple[Any, ...] = getattr(structure, "sparse_size", tuple)()  # of an EdgeIndex
        if any(size not in (None, num_nodes) for size in said):
            raise ValueError(f"data.edge_index is of a graph of {list(said)} nodes, but data has {num_nodes} nodes")
        return num_nodes, int(structure.size(1))
    num_nodes, own = int(structure.size(0)), attributes.get("num_nodes")
    if own is not None and int(own) != num_nodes:
        raise ValueError(f"data.adj_t is {list(structure.shape)}, but data.num_nodes is {int(own)}")
    return num_nodes, int(structure.values().size(0))


class _Sorter:
    """Decides for one tensor after the other. The order of the rules is that of `__call__`."""

    def __init__(
        self,
        found: Mapping[Path, Any],
        num_nodes: int,
        num_edges: int,
        declared: Declarations,
        kinds: dict[str, str],
        doubtful: Set[int],
        edges_alone: bool,
    ) -> None:
        self._doubtful, self._edges_alone = doubtful, edges_alone
        self._found, self._declared, self._kinds = found, declared, kinds
        self._sizes = {"node": num_nodes, "edge": num_edges}
        self._indices: dict[Path, int] = {}
        self._check_kinds()
        for path, value in found.items():
            if isinstance(value, Tensor) and self._is_index(path, value):
                self._indices[path] = value.size(-1) if value.dim() else 0

    def __call__(self, path: Path, value: Any) -> Role | None:
        given = self._given(path)
        if not isinstance(value, Tensor):
            if given != "graph":
                self._check_not_rows(path, value)
            if given != "graph" and not self._edges_alone:
                self._check_not_numbers(path, value, told=given == "index")
            return None
        dim, own_dim = self._declared.dim(_name(path), value)
        if given is not None:
            return self._as_told(path, value, given, dim)
        if path in self._indices:
            check_nodes(spelled(path), value, self._sizes["node"])
            return Role("index", dim)
        kind = (self._declared.level(str(path[0])) if len(path) == 1 else None) or self._by_names(path, value, dim)
        if isinstance(kind, Role):
            return kind
        if kind is None and own_dim and dim is not None:
            kind = self._by_declared_dim(path, value, dim)
        if kind is None:
            self._check_not_by_chance(path, value, dim)
            kind = "graph"
        self._check_rows(path, value, kind, dim)
        return Role(kind, dim)

    def _given(self, path: Path) -> str | None:
        """What ``kinds`` says of a tensor, or of a container that it lies in."""
        found = [self._kinds.get(spelled(path[:k])) for k in range(len(path), 0, -1)]
        return next((kind for kind in found if kind is not None), None)

    def _is_index(self, path: Path, value: Tensor) -> bool:
        given = self._given(path)
        if given is not None:
            return given == "index"
        follows = self._declared.increment(_name(path), value)
        if follows == "unclear":
            raise ValueError(
                f"__inc__ of data.{spelled(path)} is {self._sizes['node']}, as many as there are nodes, but does not "
                f"change with their number: say whether its entries are nodes with "
                f"kinds={{{spelled(path)!r}: 'index'}}, or that it holds none with kinds={{{spelled(path)!r}: 'graph'}}"
            )
        return follows == "nodes"

    def _as_told(self, path: Path, value: Tensor, given: str, dim: int | None) -> Role:
        if given == "graph":
            return Role("graph", None)
        if given == "index":
            check_nodes(spelled(path), value, self._sizes["node"])
            clear = value.dim() < 2 or "index" in _name(path) or _name(path) == "face" or dim != 0
            return Role("index", dim if clear else None)
        if given in get_args(Kind):
            self._check_rows(path, value, given, 0 if dim is None else dim)
            return Role(given, 0 if dim is None else dim)  # type: ignore[arg-type]
        group = next((path for path in self._indices if spelled(path) == given), None)
        if group is None:
            raise ValueError(f"kinds[{spelled(path)!r}] is {given!r}, but data.{given} holds no nodes by number")
        self._check_size(path, value, dim, self._indices[group], f"{given}'s entries")
        return Role("edge", 0 if dim is None else dim, group)

    def _by_names(self, path: Path, value: Tensor, dim: int | None) -> Role | Kind | None:
        size = None if dim is None else value.size(dim)
        name, nodes, edges = _name(path), self._sizes["node"], self._sizes["edge"]
        if name in _NODE_NAMES:
            return "node"
        if _BOUNDS.fullmatch(name):
            return "graph"
        group = self._group(path)
        if group is not None and size == self._indices[group]:
            return Role("edge", dim, group)
        if group is not None and spelled(group) == f"{spelled(path)}_index":
            self._check_size(path, value, dim, self._indices[group], f"{spelled(group)}'s entries")
        if name in _EDGE_NAMES:
            return "edge"
        names = [part for part in reversed(path) if isinstance(part, str)]
        if _may_be_numbers(path, value):
            return None
        if size == edges and any("edge" in part for part in names):
            return "edge"
        if size == nodes and any(_LIKE_NODES.fullmatch(part) and "edge" not in part for part in names):
            return "node"
        if value.dtype == torch.bool and nodes != edges and size in (nodes, edges):  # a mask, whatever its name
            return "node" if size == nodes else "edge"
        return None

    def _group(self, path: Path) -> Path | None:
        """The tensor of edges that a name goes with, beside ``edge_index``.

        ``edge_label`` and ``edge_label_time`` go with ``edge_label_index``, and ``edge_attr_2`` with ``edge_index_2``.
        """
        name, best = _name(path), None
        for index in self._indices:
            before, found, after = _name(index).partition("index")
            if not found or "edge" not in before or index[:-1] != path[:-1]:
                continue
            fits = name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
            if fits or name + "_" == before + after:
                best = max(best or index, index, key=lambda path: len(_name(path)))
        return best

    def _by_declared_dim(self, path: Path, value: Tensor, dim: int) -> Kind | None:
        levels: tuple[Kind, Kind] = ("node", "edge")
        fits = [kind for kind in levels if value.size(dim) == self._sizes[kind]]
        if len(fits) == 2:
            self._ask(path, value, "and its class says along which dimension its rows lie, but not whose they are")
        return fits[0] if fits else None

    def _check_not_by_chance(self, path: Path, value: Tensor, dim: int | None) -> None:
        """Rows as many as nodes or edges are no proof; numbers may be those of nodes."""
        sizes = value.shape if value.layout != torch.strided else () if dim is None else (value.size(dim),)
        if any(size in self._doubtful for size in sizes):
            self._ask(path, value, "and nothing but its size says what it belongs to, which may be chance")
        if dim is not None and _may_be_numbers(path, value):
            name = spelled(path)
            raise ValueError(
                f"data.{name} has shape {tuple(value.shape)} and may hold nodes by number, which get new numbers: say "
                f"so with kinds={{{name!r}: 'index'}}, or that it does not with kinds={{{name!r}: 'graph'}}"
            )

    def _ask(self, path: Path, value: Tensor, why: str) -> NoReturn:
        name = spelled(path)
        raise ValueError(
            f"data.{name} has shape {tuple(value.shape)} in a graph of {self._sizes['node']} nodes and "
            f"{self._sizes['edge']} edges, {why}: say what it is with kinds={{{name!r}: 'node'}}, 'edge', 'index' (its "
            "entries are nodes) or 'graph' (neither)"
        )

    def _check_rows(self, path: Path, value: Tensor, kind: str, dim: int | None) -> None:
        if kind in self._sizes:
            self._check_size(path, value, dim, self._sizes[kind], f"the {self._sizes[kind]} {kind}s")

    def _check_size(self, path: Path, value: Tensor, dim: int | None, size: int, whose: str) -> None:
        name = spelled(path)
        if dim is None or value.dim() == 0 or value.size(dim) != size:
            where = "" if not dim else f" along dimension {dim}"
            raise ValueError(
                f"data.{name} has shape {tuple(value.shape)}, but a row is expected{where} for each of {whose}; if it "
                f"belongs to something else, say so with kinds={{{name!r}: 'graph'}} or another kind"
            )
        if value.layout != torch.strided:
            raise TypeError(f"data.{name} has layout {value.layout}, but must be dense: its rows are taken one by one")

    def _check_not_rows(self, path: Path, value: Any) -> None:
        """Rows of anything but tensors would stay in their old order without a word."""
        rows = None if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") else len(value)
        if rows is not None and rows > 1 and rows in self._sizes.values():
            name = spelled(path)
            raise TypeError(
                f"data.{name} is a {type(value).__name__} of {rows} entries, as many as there are "
                f"{'nodes' if rows == self._sizes['node'] else 'edges'}: make it a tensor, delete it, or, if it "
                f"belongs to the graph as a whole, say so with kinds={{{name!r}: 'graph'}}"
            )

    def _check_not_numbers(self, path: Path, value: Any, told: bool) -> None:
        """Nodes by number in anything but tensors would keep their old numbers without a word."""
        for inner, item in whole_numbers(value):
            names = [part for part in (*path, *inner) if isinstance(part, str) and not _COUNTS.fullmatch(part)]
            single = isinstance(item, numbers.Integral)
            alike = any("idx" in name if single else _LIKE_NUMBERS.fullmatch(name) for name in names)
            if not (told or alike or (names and self._declared.increment(names[-1], _LIKE_ONE) != "nothing")):
                continue
            name = spelled(path)
            raise TypeError(
                f"data.{name} is of type {type(value).__name__} and may hold nodes by number, which get new numbers: "
                f"make it a tensor, torch.as_tensor(...), or, if it holds none, say so with kinds={{{name!r}: 'graph'}}"
            )

    def _check_kinds(self) -> None:
        known = {spelled(path[:k]) for path in self._found for k in range(1, len(path) + 1)}
        indices = {name for name in known if "index" in name or self._kinds.get(name) == "index"}
        for name, kind in self._kinds.items():
            if name not in known or kind not in (*get_args(Kind), *indices):
                raise ValueError(
                    f"kinds[{name!r}] is {kind!r}, but kinds must say one of {', '.join(get_args(Kind))}, or the name "
                    f"of a tensor of nodes whose entries it goes with, for attributes of data; it has "
                    f"{', '.join(sorted(known))}"
                )


def _may_be_numbers(path: Path, value: Tensor) -> bool:
    """Whether a tensor, by its type and a name on its path, may hold nodes: one each, or in pairs."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return False
    names = [part for part in path if isinstance(part, str)]
    pairs = value.dim() == 2 and 2 in value.shape and _LIKE_PAIRS.fullmatch(names[-1])
    return bool(pairs) or any(_LIKE_NUMBERS.fullmatch(name) for name in names)


_LIKE_ONE = torch.zeros(1, dtype=torch.int64)


def _name(path: Path) -> str:
    """The innermost name, as torch_geometric asks for the entries of a dictionary."""
    return next(part for part in reversed(path) if isinstance(part, str))
