"""Rules on options and shapes drawn at random."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rule_oracle import check
from torch import nn

FORMS = st.sampled_from([None, (0,)])


@st.composite
def convolutions(draw):
    """A convolution, transposed or not, in one to three dimensions, and an input that it takes."""
    spatial, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=spatial, max_size=spatial)))

    options = {"stride": each(1, 3), "padding": each(0, 2), "dilation": each(1, 2), "groups": groups}
    kernel, size = each(1, 3), each(1, 6)
    into, out = (groups * draw(st.integers(1, 3)) for _ in range(2))
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{spatial}d")
    if transposed:
        steps = zip(options["stride"], options["dilation"], strict=True)
        options["output_padding"] = tuple(draw(st.integers(0, max(pair) - 1)) for pair in steps)
        ends = ((n - 1) * s for n, s in zip(size, options["stride"], strict=True))
        reach = (
            end + d * (k - 1) - 2 * p
            for end, d, k, p in zip(ends, options["dilation"], kernel, options["padding"], strict=True)
        )
        assume(all(n >= 0 for n in reach))
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        lengths = [n + 2 * p for n, p in zip(size, options["padding"], strict=True)]
        needed = [d * (k - 1) + 1 for d, k in zip(options["dilation"], kernel, strict=True)]
        assume(all(n >= k for n, k in zip(lengths, needed, strict=True)))
        assume(options["padding_mode"] == "zeros" or all(p < n for n, p in zip(size, options["padding"], strict=True)))
    batch = draw(st.integers(1, 3))
    return kind(into, out, kernel, **options).double(), torch.randn(batch, into, *size, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(convolutions(), FORMS)
def test_convolutions(drawn, axes):
    layer, x = drawn
    check(layer, x, axes=axes)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=4),
    st.sampled_from(["sum", "mean", "max"]),
    st.sampled_from([None, 1]),
    FORMS,
)
def test_bags(bags, mode, padding, axes):
    layer = nn.EmbeddingBag(5, 2, mode=mode, padding_idx=padding).double()
    index = torch.tensor([entry for bag in bags for entry in bag], dtype=torch.long)
    offsets = torch.tensor([len(bag) for bag in bags]).cumsum(0) - torch.tensor([len(bag) for bag in bags])
    check(layer, index, offsets, axes=axes)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)
def test_recurrent_layers(kind, layers, bias, both, steps, batch, shared):
    layer = kind(2, 3, layers, bias=bias, bidirectional=both, batch_first=True).double()
    axes = None if shared else (0, 1, 1)[: 3 if kind is nn.LSTM else 2]
    check(layer, torch.randn(batch, steps, 2, dtype=torch.float64), axes=axes)
