"""Whether glibc maps large blocks, counted by glibc itself."""

import subprocess
import sys

import pytest

COUNT = """
import ctypes, torch
from recollect.memory import map_large_blocks

class Info(ctypes.Structure):  # of mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks".split()
                + ["fordblks", "keepcost"]]

info = ctypes.CDLL(None).mallinfo2
info.restype = Info

def mapped(mebibytes):
    before = info().hblks
    tensor = torch.empty(mebibytes << 20, dtype=torch.uint8)
    return info().hblks - before

large = torch.empty(16 << 20, dtype=torch.uint8)
del large  # from here on glibc puts blocks of this size into its heap
print(mapped(8), map_large_blocks(1 << 20), mapped(15))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is a C library of Linux")
def test_large_blocks_are_mapped():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True)
    if "mallinfo2" in done.stderr:
        pytest.skip("this C library is not glibc, or an old one")
    assert done.stdout.split() == ["0", "True", "1"], done.stderr
