"""Layers with every option that changes their sums."""

import torch
from torch import nn

NORMS = {
    "layer": (lambda: nn.LayerNorm(4), (3, 2, 4)),
    "layer over two": (lambda: nn.LayerNorm((2, 4)), (3, 2, 4)),
    "layer without bias": (lambda: nn.LayerNorm(4, eps=0.1, bias=False), (3, 4)),
    "rms": (lambda: nn.RMSNorm(4), (3, 2, 4)),
    "rms over two": (lambda: nn.RMSNorm((2, 4), eps=0.1), (3, 2, 4)),
    "group": (lambda: nn.GroupNorm(2, 4), (3, 4, 5, 2)),
    "group of one channel": (lambda: nn.GroupNorm(4, 4, eps=0.1), (3, 4, 5)),
    "group without positions": (lambda: nn.GroupNorm(2, 4), (3, 4)),
    "instance 1d": (lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    "instance 2d": (lambda: nn.InstanceNorm2d(4, affine=True, eps=0.1), (3, 4, 5, 2)),
    "instance 3d": (lambda: nn.InstanceNorm3d(2, affine=True), (3, 2, 2, 3, 2)),
    "instance that tracks": (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (3, 4, 5)),
    "instance by running statistics": (lambda: tracked(nn.InstanceNorm1d(4, 0.1, 0.1, True, True)), (3, 4, 5)),
    "batch 1d": (lambda: tracked(nn.BatchNorm1d(4)), (3, 4)),
    "batch 1d of sequences": (lambda: tracked(nn.BatchNorm1d(4, eps=0.1)), (3, 4, 5)),
    "batch 2d": (lambda: tracked(nn.BatchNorm2d(4)), (3, 4, 5, 2)),
    "batch 3d": (lambda: tracked(nn.BatchNorm3d(2)), (3, 2, 2, 3, 2)),
}  # fmt: skip


def tracked(layer):
    """The layer in evaluation, with running statistics of its own."""
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer.eval()


def drawn_norm(name):
    """The layer, with parameters that differ, and an input whose first axis is the batch's."""
    make, shape = NORMS[name]
    layer = make().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer, torch.randn(shape, dtype=torch.float64) * 2 + 1


CONVS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (3, 4, 7)),
    "1d stride": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2), (3, 4, 8)),  # the last element is not seen
    "1d same": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (3, 4, 7)),
    "1d same, uneven": (lambda: nn.Conv1d(4, 6, 4, padding="same", groups=2), (3, 4, 7)),
    "1d valid": (lambda: nn.Conv1d(4, 6, 4, padding="valid"), (3, 4, 7)),
    "2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 3, 5, 6)),
    "2d uneven": (lambda: nn.Conv2d(3, 4, (3, 2), (2, 1), (0, 1), (1, 2)), (3, 3, 6, 5)),
    "2d one by one": (lambda: nn.Conv2d(3, 4, 1, bias=False), (3, 3, 4, 2)),
    "2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 5)),
    "2d whole vectors": (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 3, 5, 6)),
    "2d whole vectors, groups": (lambda: nn.Conv2d(6, 16, 3, groups=2), (3, 6, 5, 5)),
    "2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (3, 4, 5, 5)),
    "2d reflect": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (3, 3, 5, 5)),
    "2d circular": (lambda: nn.Conv2d(3, 4, 3, padding=(0, 2), padding_mode="circular"), (3, 3, 5, 5)),
    "2d replicate, same": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same", padding_mode="replicate"), (3, 3, 5, 5)),
    "3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=(1, 0, 1), groups=2), (3, 2, 2, 3, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (3, 4, 5)),
    "transposed 1d stride": (lambda: nn.ConvTranspose1d(4, 6, 3, 3, 1, output_padding=2), (3, 4, 5)),
    "transposed 1d dilation": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, output_padding=2, dilation=3), (3, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (0, 1), groups=2), (3, 4, 4, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=(1, 2, 1), bias=False), (3, 2, 2, 3, 2)),
}


def drawn_conv(name):
    """The layer and an input [3, C, *]."""
    make, shape = CONVS[name]
    return make().double(), torch.randn(shape, dtype=torch.float64)
