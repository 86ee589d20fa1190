"""Checks posted groups; large ones in a process of its own.

A decoder holds the interpreter for as long as it reads: a group of 27 MB would stop the event loop for 0.2 s, one with
a wrong type, which Python's reader takes apart, for many seconds. A thread would not help.
"""

import asyncio
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from atropos_verl.protocol.schema import CheckedGroup, Refusal, SlowPathError, check_group, json_value, split_list
from atropos_verl.protocol.wire import pack_group, pack_json, pack_stored
from atropos_verl.server.batcher import StoredGroup
from atropos_verl.server.bodies import LARGE, BodyError

SLOW = 64 << 10
"""Bytes from which the second, slow reader and late packing are left to the other process: 10 ms."""
_MANY_PARTS = 16_384
"""Lists, objects and strings from which a body is left to it as well: 10 to 20 ms."""
_MAX_BRACKETS = 1 << 22
"""Lists and objects of a body: each takes 60 bytes and more of memory, of 3 that were sent."""
_MEMORY_BYTES = 8 << 30
"""What the process may take: 16 times the longest body."""
_OUT_OF_MEMORY = (3, -signal.SIGSEGV, -signal.SIGABRT)
"""Exit codes: its own, and those of libraries that do not expect it."""
_SECONDS = 60.0
"""Time for one body, that of a start of the process included."""
_MAX_GROUPS = 1000
_TRIES = 2
_SHOWN_TEXT = 400
_SHOWN_ROWS = 16


@dataclass(frozen=True, slots=True)
class Rules:
    """What a group is checked against."""

    vocab_size: int | None
    environments: int
    strict: bool
    largest: int | None
    """Sequences of a batch that must be exact: a larger group could never be handed out."""
    packs: bool
    """The packed form will be wanted."""


@dataclass(slots=True)
class ExaminedGroup:
    """A group that may be stored, and what is made of its decoded form, which is not kept."""

    checked: CheckedGroup
    glimpse: dict[str, Any]
    """What the live page shows."""
    packed: bytes | None = None


def check_body(body: bytes, is_list: bool, rules: Rules, *, quick: bool = False) -> list[ExaminedGroup]:
    """The groups of a post. Raises ``Refusal``, and if ``quick`` ``SlowPathError`` where a second reading is needed."""
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > _MAX_BRACKETS:
        text = f"the body has {brackets} lists and objects: send at most {_MAX_BRACKETS} in one request"
        raise Refusal("too_many", text)
    if quick and brackets + body.count(b'"') + body.count(b"null") > _MANY_PARTS:
        raise SlowPathError
    groups, parts = [], split_list(body, quick=quick) if is_list else [body]
    if len(parts) > _MAX_GROUPS:
        raise Refusal("too_many", f"the body has {len(parts)} groups: send at most {_MAX_GROUPS} in one request")
    for index, raw in enumerate(parts):
        try:
            checked = check_group(
                raw, vocab_size=rules.vocab_size, environments=rules.environments, strict=rules.strict, quick=quick
            )
            if rules.largest is not None and checked.size > rules.largest:
                text = f"tokens has {checked.size} sequences, but a batch has {rules.largest} and batch_fill is 'exact'"
                raise Refusal("too_large", text, "tokens", value=checked.size, env_id=checked.env_id)
        except Refusal as refusal:
            refusal.group = index if is_list else None
            refusal.value = json_value(refusal.value)  # a large or deep one is not to be sent between processes
            raise
        groups.append(ExaminedGroup(checked, _glimpse(checked)))
    return groups


class BodyChecker:
    """Belongs to the event loop. The process starts with the first large body."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._guard = threading.Lock()
        """Held while the process is started or ended, in whatever thread."""
        self._closed = False
        self._pipe: Pipe | None = None
        self.process: subprocess.Popen[bytes] | None = None

    async def check(self, body: bytes, is_list: bool, rules: Rules) -> list[ExaminedGroup]:
        """Raises ``Refusal``; ``BodyError`` 503 when the process was killed."""
        if len(body) <= LARGE:
            try:
                return check_body(body, is_list, rules, quick=len(body) > SLOW)
            except SlowPathError:
                pass
        groups: list[ExaminedGroup] = await self._in_turn(body, is_list, rules)
        return groups

    async def pack(self, group: StoredGroup) -> bytes:
        """``pack_stored`` of a group of any length; as JSON where the process comes to a bound."""
        try:
            packed: bytes = await self._in_turn(group.raw, False, None)
        except (Refusal, BodyError):
            return pack_json(b"".join(group.json_parts()))
        return packed

    async def _in_turn(self, *question: Any) -> Any:
        async def ask() -> Any:
            async with self._turn:
                return await asyncio.to_thread(self._ask, *question)

        # Whoever waits may be cancelled: the pipe is the next one's only when its thread has done with it.
        return await asyncio.shield(asyncio.ensure_future(ask()))

    def close(self) -> None:
        """End the process, for good. One whose server is gone reads the end of the pipe."""
        self._closed = True
        self._ended()

    def _ended(self) -> int:
        """The exit code of the process, which is killed if it still runs."""
        with self._guard:
            self._pipe = None  # closed with the last reference, which another thread may have
            if self.process is None:
                return 0
            self.process.kill()
            return self.process.wait()

    def _ask(self, body: bytes, is_list: bool, rules: Rules | None) -> Any:
        for _ in range(_TRIES):
            with self._guard:
                if self._closed:
                    raise BodyError(503, "checker", "this server is stopping; send the group again later")
                pipe = self._pipe = self._pipe or self._start()
            try:
                pipe.send((is_list, rules))
                pipe.send_bytes(body)
                found = pipe.recv() if pipe.poll(_SECONDS) else None
            except (EOFError, OSError):
                if self._ended() in _OUT_OF_MEMORY:
                    raise _too_much(body, f"more than {_MEMORY_BYTES} bytes of memory") from None
                continue
            if found is None:
                self._ended()
                raise _too_much(body, f"longer than {_SECONDS:g} s")
            if isinstance(found, Refusal):
                raise found
            return found
        text = "the process that checks large bodies was killed (is memory short?); send the group again"
        raise BodyError(503, "checker", text)

    def _start(self) -> Pipe:
        # Not by multiprocessing, which runs the main module of the program again.
        ours, theirs = socket.socketpair()
        with theirs:
            command = f"from {__name__} import work; work({theirs.fileno()}, {_MEMORY_BYTES})"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            words = [sys.executable, "-P", "-c", command]
            self.process = subprocess.Popen(
                words, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        return Pipe(ours.detach())


def work(descriptor: int, memory: int) -> None:
    """Answers until the server has closed its end, or is gone. Takes ``memory`` bytes beside those of the start."""
    pipe = Pipe(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
    gc.disable()  # JSON has no cycles, and looking for some among millions of lists takes longer than reading them
    while True:
        try:
            is_list, rules = pipe.recv()
            body = pipe.recv_bytes()
            pipe.send(_answer(body, is_list, rules))
        except EOFError:
            return
        except MemoryError:
            os._exit(_OUT_OF_MEMORY[0])
        del body
        gc.collect(0)


def _too_much(body: bytes, what: str) -> Refusal:
    return Refusal("too_large", f"checking {len(body)} bytes takes {what}: send it in several requests")


def _answer(body: bytes, is_list: bool, rules: Rules | None) -> list[ExaminedGroup] | Refusal | bytes:
    """Without ``rules``: the packed form of a group that was checked before."""
    if rules is None:
        return pack_stored(body)
    try:
        groups = check_body(body, is_list, rules)
    except Refusal as refusal:
        return refusal
    for group in groups:
        group.packed = pack_group(group.checked) if rules.packs else None
        group.checked.fields = None
    return groups


def _glimpse(group: CheckedGroup) -> dict[str, Any]:
    """The part of an accepted group that the live page shows: its last message, else its first token ids."""
    fields = group.decoded
    text = f"token ids {fields.tokens[0][:24]}"
    messages = fields.messages
    if isinstance(messages, list) and messages and isinstance(messages[0], list) and messages[0]:
        last = messages[0][-1]
        content = last.get("content")
        said = content if isinstance(content, str) else json.dumps(content)
        text = f"{last.get('role')}: {said[:_SHOWN_TEXT]}"
    lengths = [len(row) for row in fields.tokens[:_SHOWN_ROWS]]
    return {"scores": fields.scores[:_SHOWN_ROWS], "lengths": lengths, "text": text[:_SHOWN_TEXT]}
