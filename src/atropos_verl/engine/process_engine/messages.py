"""What the two processes say to each other, and how it is framed. Imports no torch.

A frame is four bytes of length and a msgpack list of messages. The engine's process sends one frame for all that a
decode step brought.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from atropos_verl.errors import (
    AtroposVerlError,
    EngineError,
    EngineStoppedError,
    GenerationRequestError,
    WeightSyncError,
)
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

__all__ = [
    "Abort",
    "Call",
    "Cancel",
    "Channel",
    "Command",
    "Delta",
    "Failed",
    "Fault",
    "Finished",
    "Generate",
    "Go",
    "Held",
    "Hold",
    "LogLine",
    "Ready",
    "Reply",
    "Returned",
    "Start",
    "TensorPlace",
]

_HEADER = struct.Struct("<I")
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (EngineError, EngineStoppedError, GenerationRequestError, WeightSyncError, TimeoutError)
}


class Fault(msgspec.Struct, array_like=True):
    """An exception on its way to the other process."""

    kind: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        kind = type(error).__name__
        if kind in _KINDS:
            return cls(kind, str(error), getattr(error, "param", None))
        if isinstance(error, AtroposVerlError):
            return cls("EngineError", str(error))
        return cls("EngineError", f"{kind}: {error}")

    def to_error(self) -> Exception:
        """Of the same class, with the same message."""
        if self.kind == "GenerationRequestError":
            return GenerationRequestError(self.message, self.param)
        return _KINDS[self.kind](self.message)


# -- to the engine's process -------------------------------------------------------------------------------------------


class Start(msgspec.Struct, tag=True, array_like=True):
    """The first message: what to load. ``dtype`` as torch names it; None: as it is on disk."""

    path: str
    dtype: str | None
    num_threads: int | None
    settings: dict[str, Any]
    """Keyword arguments of ``TransformersEngine``."""


class Generate(msgspec.Struct, tag=True, array_like=True):
    id: int
    request: GenerationRequest
    stream: bool


class Cancel(msgspec.Struct, tag=True, array_like=True):
    ids: list[int]


class Abort(msgspec.Struct, tag=True, array_like=True):
    """Answered by ``Returned`` with whether any request had this ``request_id``."""

    id: int
    request_id: str


class Call(msgspec.Struct, tag=True, array_like=True):
    """Answered by ``Returned`` or ``Failed`` with the same id."""

    id: int
    verb: str
    arguments: list[Any]


class Hold(msgspec.Struct, tag=True, array_like=True):
    """Stop at a token boundary; answered by ``Held`` unless ``Go`` comes first."""

    number: int


class Go(msgspec.Struct, tag=True, array_like=True):
    pass


Command = Start | Generate | Cancel | Abort | Call | Hold | Go


# -- from the engine's process -----------------------------------------------------------------------------------------


class TensorPlace(msgspec.Struct, array_like=True):
    """Where a tensor lies in each of the two buffers."""

    names: list[str]
    """Tied weights have several."""
    is_parameter: bool
    shape: list[int]
    dtype: str
    offset: int
    """Bytes."""


class Ready(msgspec.Struct, tag=True, array_like=True):
    limits: dict[str, Any]
    """Fields of ``EngineLimits``."""
    places: list[TensorPlace]
    nbytes: int
    """Of one buffer."""


class Delta(msgspec.Struct, tag=True, array_like=True):
    id: int
    delta: GenerationDelta


class Finished(msgspec.Struct, tag=True, array_like=True):
    id: int
    generations: list[Generation]


class Returned(msgspec.Struct, tag=True, array_like=True):
    id: int
    value: Any


class Failed(msgspec.Struct, tag=True, array_like=True):
    """``id`` 0: the engine could not be made."""

    id: int
    fault: Fault


class Held(msgspec.Struct, tag=True, array_like=True):
    number: int


class LogLine(msgspec.Struct, tag=True, array_like=True):
    logger: str
    level: int
    message: str


Reply = Ready | Delta | Finished | Returned | Failed | Held | LogLine


# -- the wire ----------------------------------------------------------------------------------------------------------


class Channel:
    """One end of the connection. ``send`` may be called from any thread, ``receive`` from one.

    Args:
        incoming: the union of messages that are received here.
    """

    def __init__(self, connection: socket.socket, incoming: Any) -> None:
        self._socket = connection
        self._reader = connection.makefile("rb", buffering=1 << 18)
        self._decoder = msgspec.msgpack.Decoder(list[incoming])
        self._encoder = msgspec.msgpack.Encoder()
        self._lock = threading.Lock()

    def send(self, messages: Sequence[Any]) -> None:
        """Raises ``OSError`` when the other side is gone."""
        body = self._encoder.encode(messages)
        with self._lock:
            self._socket.sendall(_HEADER.pack(len(body)) + body)

    def receive(self) -> Iterator[list[Any]]:
        """Frames until the other side is gone."""
        while True:
            try:
                header = self._reader.read(_HEADER.size)
                if len(header) < _HEADER.size:
                    return
                (size,) = _HEADER.unpack(header)
                body = self._reader.read(size)
            except ConnectionError:
                return
            if len(body) < size:
                return
            yield self._decoder.decode(body)

    def shut(self) -> None:
        """The other side sees the end; a ``receive`` that waits here ends as well. Idempotent."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was faster
            return

    def close(self) -> None:
        self._reader.close()
        self._socket.close()
