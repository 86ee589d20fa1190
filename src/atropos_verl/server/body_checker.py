"""Checks posted groups; large ones in a process of its own.

A decoder holds the interpreter for as long as it reads: a group of 27 MB would stop the event loop for 0.2 s, one with
a wrong type, which Python's reader takes apart, for many seconds. A thread would not help.
"""

import asyncio
import gc
import json
import os
import re
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
from atropos_verl.protocol.wire import pack_group
from atropos_verl.server.bodies import LARGE
from atropos_verl.server.store import RequestError

SLOW = 64 << 10
"""Bytes from which the second, slow reader and late packing are left to the other process: 10 ms."""
_MANY_PARTS = 16_384  # lists, objects and strings from which a body is left to it as well: 10 to 20 ms
_MAX_BRACKETS = 1 << 22
"""Lists and objects of a body: each takes 60 bytes and more of memory, of 3 that were sent."""
_MEMORY_BYTES = 8 << 30  # what the process may take: 16 times the longest body
_OUT_OF_MEMORY = (3, -signal.SIGSEGV, -signal.SIGABRT)
"""Exit codes: its own, and those of libraries that do not expect it."""
_SECONDS = 60.0
_MAX_GROUPS = 1000
_ENV_ID = re.compile(rb'"env_id"\s*:\s*"?(\d{1,9})\b')  # inside a string its quotes would be escaped
_TRIES = 2
_SHOWN_TEXT, _SHOWN_ROWS = 400, 16


@dataclass(frozen=True, slots=True)
class Rules:
    """What a group is checked against."""

    vocab_size: int | None
    environments: int
    strict: bool
    largest: int | None
    """Sequences of a batch that must be exact: a larger group could never be handed out."""
    packs: bool


def check_body(body: bytes, is_list: bool, rules: Rules, *, quick: bool = False) -> list[CheckedGroup]:
    """The groups of a post. Raises ``Refusal``, and if ``quick`` ``SlowPathError`` where a second reading is needed."""
    brackets = body.count(b"[") + body.count(b"{")
    _check_number(brackets, _MAX_BRACKETS, "lists and objects")
    if quick and brackets + body.count(b'"') + body.count(b"null") > _MANY_PARTS:
        raise SlowPathError
    groups, parts = [], split_list(body, quick=quick) if is_list else [body]
    _check_number(len(parts), _MAX_GROUPS, "groups")
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
            if refusal.env_id is None and (found := _ENV_ID.findall(raw)):
                refusal.env_id = int(found[-1])
            raise
        checked.glimpse = _glimpse(checked)
        groups.append(checked)
    return groups


def _check_number(number: int, most: int, what: str) -> None:
    if number > most:
        raise Refusal("too_many", f"the body has {number} {what}: send at most {most} in one request")


class BodyChecker:
    """Belongs to the event loop. The process starts with the first large body."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._guard = threading.Lock()  # held while the process is started or ended, in whatever thread
        self._closed = False
        self._pipe: Pipe | None = None
        self.process: subprocess.Popen[bytes] | None = None

    async def check(self, body: bytes, is_list: bool, rules: Rules) -> list[CheckedGroup]:
        """Raises ``Refusal``; ``RequestError`` 503 when the process was killed."""
        if len(body) <= LARGE:
            try:
                return check_body(body, is_list, rules, quick=len(body) > SLOW)
            except SlowPathError:
                pass
        # Who waits may be cancelled: the pipe is the next one's only when its thread has done with it.
        return await asyncio.shield(self._in_turn(body, is_list, rules))

    async def _in_turn(self, *question: Any) -> list[CheckedGroup]:
        async with self._turn:
            return await asyncio.to_thread(self._ask, *question)

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

    def _ask(self, body: bytes, is_list: bool, rules: Rules) -> list[CheckedGroup]:
        for _ in range(_TRIES):
            with self._guard:
                if self._closed:
                    raise RequestError(503, "checker", "this server is stopping; send the group again later")
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
            groups: list[CheckedGroup] = found
            return groups
        raise RequestError(
            503, "checker", "the process that checks large bodies was killed (is memory short?); send it again"
        )

    def _start(self) -> Pipe:
        # Not by multiprocessing, which runs the main module of the program again.
        ours, theirs = socket.socketpair()
        with theirs:
            code = f"from {__name__} import work; work({theirs.fileno()}, {_MEMORY_BYTES})"
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
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


def _answer(body: bytes, is_list: bool, rules: Rules) -> list[CheckedGroup] | Refusal:
    try:
        groups = check_body(body, is_list, rules)
    except Refusal as refusal:
        return refusal
    for group in groups:
        group.packed = pack_group(group) if rules.packs else None
        group.fields = None  # millions of objects are not to be sent between processes
    return groups


def _glimpse(group: CheckedGroup) -> dict[str, Any]:
    """The part of an accepted group that the live page shows: its last message, else its first token ids."""
    fields = group.decoded
    text, messages = f"token ids {fields.tokens[0][:24]}", fields.messages
    if isinstance(messages, list) and messages and messages[0]:  # checked: a list of messages
        said = messages[0][-1]["content"]
        text = f"{messages[0][-1]['role']}: {said if isinstance(said, str) else json.dumps(said)}"
    lengths = [len(row) for row in fields.tokens[:_SHOWN_ROWS]]
    return {"scores": fields.scores[:_SHOWN_ROWS], "lengths": lengths, "text": text[:_SHOWN_TEXT]}
