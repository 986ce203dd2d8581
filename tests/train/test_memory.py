from __future__ import annotations

import sys

import pytest
import torch

from recollect.train._memory import _cgroup, _meminfo, available_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says in /proc/meminfo")
def test_what_is_free_is_some_of_what_is_there():
    import os

    free = available_bytes(torch.device("cpu"))
    assert free is not None
    assert 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_meminfo_is_in_kib(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  9 kB\nMemAvailable:    123 kB\n")
    assert _meminfo(file) == 123 * 1024


def test_a_containers_limit_less_what_it_uses_without_file_cache(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 50\n")
    assert _cgroup(tmp_path) == 350


def test_no_limit_is_none(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert _cgroup(tmp_path) is None
    assert _cgroup(tmp_path / "missing") is None
    assert _meminfo(tmp_path / "missing") is None
