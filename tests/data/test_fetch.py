from __future__ import annotations

import socket
from pathlib import Path

import pytest

from recollect.data._fetch import limited_waiting, reach


def test_an_answer_of_any_kind_is_an_answer(serve: tuple[Path, str]) -> None:
    folder, address = serve
    (folder / "there").touch()
    reach(f"{address}/there")
    reach(f"{address}/not-there")


def test_no_server_is_an_os_error(no_network: None) -> None:
    with pytest.raises(OSError, match="refused"):
        reach("http://example.invalid/file")


def test_time_limit_is_put_back_after_an_error() -> None:
    def fail() -> None:
        with limited_waiting():
            assert socket.getdefaulttimeout() == 60
            raise KeyError

    before = socket.getdefaulttimeout()
    with pytest.raises(KeyError):
        fail()
    assert socket.getdefaulttimeout() == before
