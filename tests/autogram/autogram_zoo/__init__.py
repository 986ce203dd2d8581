"""Tiny networks, one hazard each, and their Gramians by plain autograd.

``MEMBERS`` is the zoo by name. A member says which batch dimensions it allows and draws its own inputs.
"""

from . import (  # noqa: F401  (each puts its members into the zoo)
    _alignment,
    _behaviour,
    _embeddings,
    _frames,
    _functional,
    _layers,
    _outputs,
    _parameters,
    _real,
    _refused,
    _sequences,
    _sharing,
    _unused,
    _wiring,
)
from ._member import (
    MEMBERS,
    Member,
    as_generalised,
    build,
    explicit_gramian,
    explicit_jacobian,
    member,
    relative_error,
    run,
    trained,
)

__all__ = [
    "MEMBERS",
    "Member",
    "as_generalised",
    "build",
    "explicit_gramian",
    "explicit_jacobian",
    "member",
    "relative_error",
    "run",
    "trained",
]
