"""The machine: which device to compute on, and how much memory this process has used."""

from __future__ import annotations

import resource

import torch

from quantkit.errors import ConfigError

__all__ = ["peak_memory", "pick_device"]


def peak_memory() -> int:
    """Peak resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N. Raises ConfigError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{name}'", "use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise ConfigError(f"device '{name}' is not supported", "use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device '{name}' is not there: {torch.cuda.device_count()} CUDA devices", "use --device cpu")
    return device
