"""Messages between the pool and an engine process, over a private pair of sockets.

A message is a pickle, preceded by its length. Both ends are our own processes and the sockets have no name,
so nothing else can write to them. Images cross as files, never as pixels or tensors.

Match messages and events by keyword, `case Submit(request=request)`: for each positional pattern Python 3.11
keeps a new string in its cache of attributes, and with it a page of memory.
"""

from __future__ import annotations

import pickle
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypergen.errors import PackedError
from hypergen.events import EngineStatus, Event
from hypergen.model_info import ModelInfo
from hypergen.request import GenerationRequest
from hypergen.served_model import ServedModel

_LENGTH = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Start:
    """Pool to engine, the first message.

    Attributes:
        models: to load.
        state_folder: where to keep what outlives the process.
        engines: number of engines, which share the main memory and, on a CPU, its cores.
    """

    models: tuple[ServedModel, ...]
    state_folder: Path | None = None
    engines: int = 1


@dataclass(frozen=True, slots=True)
class Submit:
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Pool to engine: exit now."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Engine to pool: the models are loaded."""

    model_infos: tuple[ModelInfo, ...]
    status: EngineStatus


@dataclass(frozen=True, slots=True)
class LoadFailed:
    reason: str


@dataclass(frozen=True, slots=True)
class EventMessage:
    request_id: str
    event: Event


@dataclass(frozen=True, slots=True)
class Failed:
    request_id: str
    error: PackedError


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Engine to pool, every second: seconds since the last step started, and the status."""

    step_age_s: float
    status: EngineStatus


def send(connection: socket.socket, message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> Any:
    """The next message; None if the other side closed the connection."""
    head = _receive_exactly(connection, _LENGTH.size)
    if head is None:
        return None
    data = _receive_exactly(connection, _LENGTH.unpack(head)[0])
    return None if data is None else pickle.loads(data)


def _receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    received = bytearray()
    while len(received) < size:
        try:
            part = connection.recv(min(size - len(received), 1 << 20))
        except OSError:
            return None
        if not part:
            return None
        received += part
    return bytes(received)
