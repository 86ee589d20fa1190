"""Checks posted groups; large ones in a process of its own.

A decoder holds the interpreter for as long as it reads: a group of 27 MB would stop the event loop for 0.2 s, one with
a wrong type, which Python's reader takes apart, for many seconds. A thread would not help.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

from atropos_verl.protocol.schema import CheckedGroup, Refusal, SlowPathError, check_group, json_value, split_list
from atropos_verl.protocol.wire import pack_group
from atropos_verl.server.bodies import LARGE, BodyError

_SLOW = 64 << 10
"""Bytes from which the second, slow reader is left to the other process: 10 ms."""
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
        self._pipe: Pipe | None = None
        self.process: subprocess.Popen[bytes] | None = None

    async def check(self, body: bytes, is_list: bool, rules: Rules) -> list[ExaminedGroup]:
        """Raises ``Refusal``; ``BodyError`` 503 when the process was killed."""
        if len(body) <= LARGE:
            try:
                return check_body(body, is_list, rules, quick=len(body) > _SLOW)
            except SlowPathError:
                pass
        async with self._turn:
            return await asyncio.to_thread(self._ask, body, is_list, rules)

    def close(self) -> None:
        """End the process. One whose server is gone reads the end of the pipe."""
        if self.process is not None and self._pipe is not None:
            self._pipe.close()
            self._pipe = None
            self.process.kill()
            self.process.wait()

    def _ask(self, body: bytes, is_list: bool, rules: Rules) -> list[ExaminedGroup]:
        for _ in range(_TRIES):
            try:
                pipe = self._pipe or self._started()
                pipe.send((is_list, rules))
                pipe.send_bytes(body)
                found = pipe.recv()
            except (EOFError, OSError):
                self.close()
                continue
            if isinstance(found, Refusal):
                raise found
            groups: list[ExaminedGroup] = found
            return groups
        text = "the process that checks large bodies was killed (is memory short?); send the group again"
        raise BodyError(503, "checker", text)

    def _started(self) -> Pipe:
        # Not by multiprocessing, which runs the main module of the program again.
        ours, theirs = socket.socketpair()
        with theirs:
            command = f"from {__name__} import work; work({theirs.fileno()})"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            words = [sys.executable, "-P", "-c", command]
            self.process = subprocess.Popen(
                words, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self._pipe = Pipe(ours.detach())
        return self._pipe


def work(descriptor: int) -> None:
    """Answers until the server has closed its end, or is gone."""
    pipe = Pipe(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            is_list, rules = pipe.recv()
            body = pipe.recv_bytes()
        except EOFError:
            return
        try:
            answer: Any = check_body(body, is_list, rules)
            for group in answer:
                group.packed = pack_group(group.checked) if rules.packs else None
                group.checked.fields = None
        except Refusal as refusal:
            answer = refusal
        pipe.send(answer)


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
