"""Booleans as bits, against the sum of powers of two."""

import pytest
import torch

from recollect._util._bits import pack_bits, unpack_bits


@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (9,), (3, 0), (3, 5), (2, 16), (2, 3, 17)])
def test_bits_come_back(shape: tuple[int, ...]) -> None:
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = pack_bits(flags)
    assert bits.dtype == torch.uint8
    assert bits.shape == (*shape[:-1], -(-shape[-1] // 8))
    rows = [each[None] if each.dim() == 1 else each.flatten(0, -2) for each in (flags, bits)]
    for row, packed in zip(*rows, strict=True):
        number = sum(2**k for k, flag in enumerate(row.tolist()) if flag)
        assert int.from_bytes(bytes(packed.tolist()), "little") == number
    assert torch.equal(unpack_bits(bits, shape[-1]), flags)
    assert torch.equal(pack_bits(flags.double()), bits)
