"""The engine's process: ``python -m atropos_verl.engine.process_engine.child SOCKET BUFFER BUFFER``.

The arguments are descriptors that the trainer's process passed on. This process lives as long as the other end of the
socket is open: when the trainer is gone, however it went, the reader sees the end of file and the process ends at once.
Signals of a terminal or a supervisor are the trainer's business; it may want to save first.

Threads: the reader, the engine's own, and two that run what waits for a token boundary (``_control`` in the order in
which it was asked, ``_compute`` beside it).
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from atropos_verl.engine.process_engine import messages as wire
from atropos_verl.errors import EngineStoppedError
from atropos_verl.imports import paused_collection

if TYPE_CHECKING:
    from atropos_verl.engine.process_engine.shared_engine import SharedEngine
    from atropos_verl.types import Generation, GenerationDelta

logger = logging.getLogger(__name__)

_HOLD_TIMEOUT = 3600.0
"""Seconds for a token boundary to come; whoever asked for it has a limit of its own."""


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    faulthandler.enable()
    connection, *buffers = (int(word) for word in sys.argv[1:])
    server = _Server(wire.Channel(socket.socket(fileno=connection), wire.Command), buffers)
    threading.Thread(target=server.read, name="reader", daemon=True).start()
    try:
        server.serve()
    except BaseException:  # noqa: BLE001 - reported, and the process ends
        traceback.print_exc()
    finally:  # without a look at threads that still run
        logging.shutdown()
        sys.stderr.flush()
        os._exit(1)


class _Server:
    """Runs commands on the engine and sends what comes of them."""

    def __init__(self, channel: wire.Channel, buffers: list[int]) -> None:
        self._channel = channel
        self._buffers = buffers
        self._commands: queue.SimpleQueue[wire.Command] = queue.SimpleQueue()
        self._outbox: deque[wire.Reply] = deque()
        self._outbox_lock = threading.Lock()
        self._tickets: dict[int, Any] = {}
        self._control = ThreadPoolExecutor(1, "control")
        self._compute = ThreadPoolExecutor(1, "compute")
        self._hold: int | None = None
        self._engine: SharedEngine

    # -- the reader's thread -----------------------------------------------------------------------------------------

    def read(self) -> None:
        try:
            for frame in self._channel.receive():
                for command in frame:
                    self._commands.put(command)
        except BaseException:
            logger.exception("the engine's process cannot read what the trainer's sends")
            os._exit(1)
        # The trainer closed its end, or is gone: nobody is left to answer. Not an ordinary exit, which would wait for
        # a step that runs.
        os._exit(0)

    # -- the main thread ---------------------------------------------------------------------------------------------

    def serve(self) -> None:
        with paused_collection():  # before it is known what to load
            import torch  # noqa: F401
            from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

            from atropos_verl.engine.process_engine import shared_engine  # noqa: F401

        start = self._commands.get()
        assert isinstance(start, wire.Start)
        try:
            self._engine, ready = self._make(start)
        except Exception as error:
            self._send([wire.Failed(0, wire.Fault.of(error))])
            raise
        self._channel.send([ready])
        while True:
            self._run(self._commands.get())

    def _make(self, start: wire.Start) -> tuple[SharedEngine, wire.Ready]:
        import msgspec
        import torch
        from transformers.utils.logging import disable_progress_bar

        from atropos_verl.engine.process_engine.shared_engine import SharedEngine

        disable_progress_bar()
        handler = _LogToTrainer(self._channel)
        logging.getLogger().addHandler(handler)
        logging.captureWarnings(True)
        logging.getLogger("atropos_verl").setLevel(logging.INFO)
        if start.num_threads is not None:
            torch.set_num_threads(start.num_threads)  # of this thread and those to come
        engine = SharedEngine.from_pretrained(
            start.path,
            dtype=None if start.dtype is None else getattr(torch, start.dtype),
            descriptors=self._buffers,
            num_threads=start.num_threads,
            after_step=self._flush,
            **start.settings,
        )
        engine.gate.pause()  # until the trainer's gate says go
        limits = msgspec.to_builtins(engine.limits)
        return engine, wire.Ready(limits, engine.places, engine.nbytes)

    def _run(self, command: wire.Command) -> None:
        match command:
            case wire.Generate():
                self._generate(command)
            case wire.Cancel(ids):
                self._engine.cancel([self._tickets[number] for number in ids if number in self._tickets])
            case wire.Abort(number, request_id):
                self._answer(number, lambda: self._engine.abort(request_id))
            case wire.Hold(number):
                self._hold = number
                self._control.submit(self._hold_at_boundary, number)
            case wire.Go():
                self._hold = None
                self._engine.gate.resume()
            case wire.Call(number, "stats", _):
                self._answer(number, self._engine.stats)
            case wire.Call(number, verb, arguments):
                worker = self._compute if verb.endswith("logprobs") else self._control
                worker.submit(self._answer, number, lambda: getattr(self._engine, verb)(*arguments))

    def _answer(self, number: int, run: Callable[[], Any]) -> None:
        try:
            reply: wire.Reply = wire.Returned(number, run())
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller in the other process gets it
            reply = wire.Failed(number, wire.Fault.of(error))
        self._send([reply])

    def _hold_at_boundary(self, number: int) -> None:
        if self._hold != number:
            return
        gate = self._engine.gate
        with contextlib.suppress(EngineStoppedError):  # then no step will ever run
            try:
                gate.pause(_HOLD_TIMEOUT)
            except Exception as error:  # noqa: BLE001 - told to go on meanwhile, or no boundary came
                logger.info("hold %d: %s", number, error)
                return
        if self._hold != number:
            gate.resume()  # a hold that came meanwhile has a turn of its own
            return
        self._send([wire.Held(number)])

    # -- requests ----------------------------------------------------------------------------------------------------

    def _generate(self, command: wire.Generate) -> None:
        number = command.id

        def on_delta(delta: GenerationDelta) -> None:
            self._outbox.append(wire.Delta(number, delta))

        def on_done(future: Future[list[Generation]]) -> None:
            self._tickets.pop(number, None)
            error = future.exception()
            self._outbox.append(
                wire.Finished(number, future.result()) if error is None else wire.Failed(number, wire.Fault.of(error))
            )

        try:
            ticket = self._engine.submit(command.request, on_delta if command.stream else None)
        except EngineStoppedError as error:
            self._send([wire.Failed(number, wire.Fault.of(error))])
            return
        self._tickets[number] = ticket
        ticket.future.add_done_callback(on_done)
        if ticket.future.done():  # the step that ended it may have sent what there was already
            self._flush()

    def _flush(self) -> None:
        """Send what a step brought, in one frame."""
        if self._outbox:
            with self._outbox_lock:  # frames leave in the order in which they were filled
                self._send([self._outbox.popleft() for _ in range(len(self._outbox))])

    def _send(self, replies: list[wire.Reply]) -> None:
        # The trainer is gone: the reader sees it as well, and ends this process.
        with contextlib.suppress(OSError):
            self._channel.send(replies)


class _LogToTrainer(logging.Handler):
    """Log records become the trainer's."""

    def __init__(self, channel: wire.Channel) -> None:
        super().__init__()
        self._channel = channel
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._channel.send([wire.LogLine(record.name, record.levelno, self.format(record))])


if __name__ == "__main__":
    main()
