"""Names of devices in the settings, as torch writes them: cuda:0, cpu, mps."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, cast

DeviceType = Literal["cuda", "cpu", "mps"]


def device_type(device: str) -> DeviceType:
    """cuda for cuda:1."""
    return cast(DeviceType, device.partition(":")[0])


def read_devices(value: Any) -> Any:
    """Parse devices, separated by commas, or a list of them; `all` becomes an empty tuple.

    Raises:
        ValueError: a device is unknown or given twice, or they are of several types, whose images differ.
    """
    if not isinstance(value, (str, list, tuple)):
        return value
    given = [value] if isinstance(value, str) else cast(Sequence[Any], value)
    devices = tuple(part.strip() for entry in given for part in str(entry).split(",") if part.strip())
    if devices == ("all",):
        return ()
    if not all(re.fullmatch(r"cuda:(0|[1-9]\d{0,2})|cpu|mps", device) for device in devices):
        raise ValueError("must be all, or devices such as cuda:0,cuda:1 or cpu,cpu")
    if len({device_type(device) for device in devices}) > 1:
        raise ValueError("must be devices of one type, because the others would generate other bytes")
    for device, count in Counter(devices).items():
        if count > 1 and device != "cpu":
            raise ValueError(f"has {device} twice; it can run one engine")
    return devices
