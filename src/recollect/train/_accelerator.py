"""Devices that torch has and Fabric does not know."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators.accelerator import Accelerator
from lightning_fabric.plugins import CheckpointIO, MixedPrecision
from lightning_fabric.strategies.single_device import SingleDeviceStrategy

__all__ = ["fabric_on"]


class _TorchAccelerator(Accelerator):
    """Torch's current accelerator, of which one device is used."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing: torch initialises it with the first tensor."""

    def teardown(self) -> None:
        """Nothing."""

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """Return them."""
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Return the current one."""
        device = torch.accelerator.current_accelerator()
        return [] if device is None else [device]

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Return whether torch has it."""
        return torch.accelerator.is_available()

    @staticmethod
    def name() -> str:
        """Return what it is called here."""
        return "torch"


def fabric_on(device: torch.device, precision: Any, checkpoints: CheckpointIO) -> Fabric:
    """Return Fabric on one device of torch's current accelerator.

    Args:
        device: one of it.
        precision: as Fabric's; ``"16-mixed"`` is none.
        checkpoints: how they are written.
    """
    strategy = SingleDeviceStrategy(device, accelerator=_TorchAccelerator())
    if precision != "bf16-mixed":
        return Fabric(strategy=strategy, devices=1, precision=precision, plugins=[checkpoints])
    return Fabric(strategy=strategy, devices=1, plugins=[checkpoints, MixedPrecision(precision, device.type)])
