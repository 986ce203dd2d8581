"""A process group, and this process in it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import distributed as dist

__all__ = ["Group", "SharesError"]


class SharesError(ValueError):
    """What ranks were given does not fit together; it is raised on every one of them.

    Example:
        >>> import torch
        >>> from torch import distributed as dist
        >>> from recollect.distributed import Shares, SharesError
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> try:
        ...     Shares(torch.tensor([0, 10, 30]), weights=[1.0])  # two parts
        ... except SharesError as error:
        ...     print(error)
        ... finally:
        ...     dist.destroy_process_group()
        weights are [2], finite and not negative (got [1])
    """


class Group:
    """A process group that is not kept alive.

    Args:
        process_group: of torch.distributed; None: the default group.
        owner: what is made of it, for the error when the group is gone.

    Attributes:
        rank: of this process.
        size: how many there are, R.

    Raises:
        SharesError: this process is not in the group.
        RuntimeError: torch.distributed is not initialized.
    """

    def __init__(self, process_group: Any | None = None, owner: str = "this") -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialized: start the script by torchrun, and call "
                "torch.distributed.init_process_group('gloo') first"
            )
        # A group that outlives its end until the interpreter's ends the process by a signal: so none is kept here.
        self._group = weakref.ref(dist.group.WORLD if process_group is None else process_group)
        self._owner = owner
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise SharesError("this process is not in the process group")

    @property
    def group(self) -> Any:
        """The process group.

        Raises:
            RuntimeError: it was destroyed.
        """
        group = self._group()
        if group is None:
            raise RuntimeError(f"the process group of {self._owner} was destroyed: make others")
        return group

    @property
    def place(self) -> torch.device:
        """On which device small things go from rank to rank: the CPU, where the group has a backend for it."""
        kinds = [backend.split(":")[0] for backend in dist.get_backend_config(self.group).split(",")]
        return torch.device("cpu" if "cpu" in kinds else kinds[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self  # a process group cannot be copied

    def __reduce__(self) -> Any:
        raise TypeError(
            f"the process group of {self._owner} cannot be pickled; save what belongs to it without it, and make it "
            "anew in the processes that load it"
        )
