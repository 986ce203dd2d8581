"""One thread that does what it is given, in order."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

__all__ = ["Worker"]

_NAME = "recollect-io"
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _end(executor: ThreadPoolExecutor) -> None:
    """Let the thread finish what it was given, and wait for that; but not in it, where garbage may be collected too."""
    executor.shutdown(wait=not threading.current_thread().name.startswith(_NAME))


class Worker:
    """A thread that starts with its first job, and ends with :meth:`close`, with this object or with the process.

    In each case it first does all that it was given.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None

    def submit(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Let the thread call a function after all that was submitted before."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix=_NAME)
            self._finalizer = weakref.finalize(self, _end, self._executor)
        return self._executor.submit(function, *args, **kwargs)

    def close(self) -> None:
        """Wait until all is done, and end the thread; another job starts another one."""
        if self._executor is not None:
            self._finalizer()
            self._executor = None
