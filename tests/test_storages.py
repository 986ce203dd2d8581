"""Which storages belong to tensors that somebody keeps."""

import gc

import torch

from recollect._storages import is_kept, moment, note_kept, storages_of


def keys_of(tensor):
    return tuple(storage._cdata for storage in storages_of(tensor))


def test_kept_is_what_was_noted_before_and_as_long_as_it_lives():
    before = moment()
    tensor = torch.eye(3).to_sparse()
    keys = keys_of(tensor)
    assert len(keys) == 2
    assert not is_kept(keys, moment())
    note_kept(tensor)
    assert moment() > before
    assert not is_kept(keys, before)
    assert all(is_kept((key,), moment()) for key in keys)
    assert not is_kept(keys_of(torch.ones(3)), moment())
    assert not is_kept((), moment())
    del tensor
    gc.collect()
    assert not is_kept(keys, moment())
