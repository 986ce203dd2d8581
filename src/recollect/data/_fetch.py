"""Keeping a download from waiting for ever."""

from __future__ import annotations

import contextlib
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

_CONNECT_SECONDS = 5.0
_SILENCE_SECONDS = 60.0


def reach(url: str) -> None:
    """Ask whether a server answers, so that a machine without a network learns it at once.

    Raises:
        OSError: No server answered.
    """
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_CONNECT_SECONDS).close()
    except urllib.error.HTTPError as refusal:  # is an answer
        refusal.close()


@contextlib.contextmanager
def limited_waiting() -> Iterator[None]:
    """Let sockets wait for a minute at most, as the libraries set no limit of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
