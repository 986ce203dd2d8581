"""Layers of known kinds with every option that changes their sums: norms, convolutions, embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._member import Member, member


class Images(Member):
    """`body` on a batch of small images, and what it returns flat."""

    batch_dims = (0, None)
    size: tuple[int, ...] = (4, 5, 5)

    def body(self) -> nn.Module:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.body()

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return (self.draw(batch, *self.size),), {}

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)


@member
class LayerNorms(Images):
    """LayerNorm over one and several dimensions, without bias, and without parameters."""

    size = (3, 4)

    def body(self) -> nn.Module:
        shifted = nn.LayerNorm(4, bias=False)
        return nn.Sequential(
            nn.Linear(4, 4), nn.LayerNorm((3, 4)), nn.Linear(4, 4), shifted, nn.LayerNorm(4, elementwise_affine=False)
        )


@member
class RMSNorms(Images):
    """RMSNorm over one and several dimensions."""

    size = (3, 4)

    def body(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.RMSNorm((3, 4)), nn.Linear(4, 4), nn.RMSNorm(4))


@member
class GroupNorms(Images):
    """GroupNorm with one group, several, and as many as channels."""

    def body(self) -> nn.Module:
        norms = [nn.GroupNorm(groups, 4) for groups in (1, 2, 4)]
        return nn.Sequential(*(layer for norm in norms for layer in (nn.Conv2d(4, 4, 2), norm, nn.Tanh())))


@member
class InstanceNorms(Images):
    """InstanceNorm with parameters, in one and two dimensions."""

    def body(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(4, 4, 2), nn.InstanceNorm2d(4, affine=True), nn.Flatten(2), nn.InstanceNorm1d(4, affine=True)
        )


@member
class BatchNormEvaluated(Images):
    """BatchNorm in evaluation mode inside a network in training mode."""

    def body(self) -> nn.Module:
        norm = nn.BatchNorm2d(4)
        norm.training = False
        return nn.Sequential(nn.Conv2d(4, 4, 2), norm, nn.Dropout(0.3), nn.Conv2d(4, 2, 2))


@member
class Conv1dOptions(Images):
    """Conv1d: padding by name, stride, dilation, groups, one position."""

    size = (4, 9)

    def body(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(4, 4, 3, padding="same", dilation=2, groups=2),
            nn.Tanh(),
            nn.Conv1d(4, 6, 4, stride=3, padding=2),
            nn.Conv1d(6, 3, 4, padding="valid"),
        )


@member
class Conv2dGroups(Images):
    """Conv2d: groups, depthwise with a multiplier, and 1 x 1."""

    def body(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 3, 1)
        )


@member
class Conv2dSteps(Images):
    """Conv2d: strides, dilations and paddings that differ by axis, pixels that no kernel sees."""

    size = (2, 8, 9)

    def body(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2)), nn.Conv2d(3, 2, 2)
        )


@member
class Conv2dPaddings(Images):
    """Conv2d: reflected, circular and replicated padding."""

    def body(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(4, 2, 3, padding=(1, 2), padding_mode="reflect"),
            nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(2, 3, 4, stride=2, padding="valid", padding_mode="replicate"),
        )


@member
class Conv3d(Images):
    """Conv3d with a stride and groups."""

    size = (2, 4, 4, 5)

    def body(self) -> nn.Module:
        return nn.Sequential(nn.Conv3d(2, 4, 2, stride=(1, 1, 2), groups=2), nn.Tanh(), nn.Conv3d(4, 2, (2, 1, 2)))


@member
class ConvTranspose(Images):
    """Transposed convolutions: stride, padding on both sides, groups, dilation."""

    size = (4, 3, 3)

    def body(self) -> nn.Module:
        return nn.Sequential(
            nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 2, 2, dilation=2, bias=False),
            nn.Flatten(2),
            nn.ConvTranspose1d(2, 2, 2, stride=2),
        )


@member
class OtherLayers(Member):
    """Layers of torch with parameters that are neither linear nor a norm: PReLU and Bilinear."""

    def __init__(self) -> None:
        super().__init__()
        self.prelu, self.bilinear = nn.PReLU(init=0.3), nn.Bilinear(6, 6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(self.prelu(x), x)
