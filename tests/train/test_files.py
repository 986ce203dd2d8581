from __future__ import annotations

import pytest
import torch

from recollect.train._files import write_text
from recollect.train._surroundings import AtomicCheckpointIO


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("half way")


def test_a_write_that_fails_leaves_the_file_before(tmp_path):
    path = tmp_path / "state.ckpt"
    files = AtomicCheckpointIO()
    files.save_checkpoint({"a": torch.ones(3)}, path)
    with pytest.raises(RuntimeError, match="half way"):
        files.save_checkpoint({"b": torch.zeros(1000), "c": Unpicklable()}, path)
    assert torch.equal(files.load_checkpoint(path, weights_only=True)["a"], torch.ones(3))


def test_what_a_killed_write_left_is_taken_over(tmp_path):
    (tmp_path / ".state.ckpt.partial").write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "state.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["state.ckpt"]


def test_text_is_replaced(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "long text")
    write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
