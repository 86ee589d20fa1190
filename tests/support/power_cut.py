"""Power cuts at every system call of a program: recorded with strace, replayed as what the disk may hold.

::

    @needs_strace
    def test_a_power_cut_loses_nothing(tmp_path):
        recording = record([sys.executable, "-c", PROGRAM, str(tmp_path / "live")], tmp_path / "live")
        for cut in recording.cuts():
            for number, disk in enumerate(cut.disks(random.Random(cut.number), 3)):
                lay_out(disk, tmp_path / f"cut_{cut.number}_{number}")
                ...  # open that directory; everything that ``cut.said`` acknowledges must be there

``PROGRAM`` works in the directory (which exists; what is in it before counts as synced), and writes a line to its
standard output, unbuffered, after each thing that must survive from then on. It is one process; threads are fine.

What a cut leaves: data that a completed fsync or fdatasync of the file covers, and names that an fsync of their
directory covers. Of everything else anything may be there: the first disk of a cut has none of it, the second all, the
others a random choice of single writes (each also in part, by pages), lengths and names. A rename is atomic.
"""

import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest

STRACE = shutil.which("strace")
needs_strace = pytest.mark.skipif(STRACE is None, reason="strace is not installed (apt-get install strace)")

_CALLS = (
    "openat,open,creat,close,dup,dup2,dup3,lseek,read,write,pwrite64,writev,pwritev,sendfile,copy_file_range,"
    "truncate,ftruncate,fallocate,rename,renameat,renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,"
    "fdatasync"
)
_LINE = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)")
_PAGE = 4096

Tree: TypeAlias = "dict[str, bytes | Tree]"
"""A directory's content: name → content of a file, or directory."""


class _Node:
    """An inode. Its content: bytes of a file, or name → inode of a directory."""

    def __init__(self, before: "bytes | dict[str, _Node]") -> None:
        self.before = before
        self.now: Any = _copy(before)


def _copy(content: Any) -> Any:
    return dict(content) if isinstance(content, dict) else bytearray(content)


def _apply(content: Any, at: Any, value: Any) -> None:
    """Writes ``value`` into a file at an offset (None: cuts or grows it to that length), or gives a name to an inode
    (None: to nothing)."""
    if isinstance(content, dict):
        content.pop(at, None)
        content |= {} if value is None else {at: value}
    else:
        content.extend(bytes(max(0, at - len(content))))
        content[at : None if value is None else at + len(value)] = value or b""


@dataclass(eq=False)
class _Change:
    """What one system call did: (inode, offset or name, value), of a rename two of them."""

    parts: list[tuple[_Node, Any, Any]]
    durable: bool = False

    def kept(self, choice: random.Random | bool | None) -> Iterator[tuple[_Node, Any, Any]]:
        """What is there after a cut. ``choice``: of what is not synced, nothing (None), all (True), or random parts."""
        node, at, value = self.parts[0]
        if self.durable or choice is True:
            yield from self.parts
        elif isinstance(choice, random.Random) and isinstance(value, bytes):
            pages = range(0, len(value), _PAGE)
            yield from ((node, at + page, value[page : page + _PAGE]) for page in pages if choice.random() < 0.6)
        elif isinstance(choice, random.Random) and choice.random() < 0.5:
            yield from self.parts


@dataclass
class _Handle:
    node: _Node
    position: int = 0
    appends: bool = False


@dataclass(frozen=True)
class Cut:
    """The power fails after system call ``number``, ``call``."""

    number: int
    call: str
    said: bytes
    """Standard output up to then."""
    _replay: "_Replay" = field(repr=False)

    def disks(self, rng: random.Random, count: int = 3) -> Iterator[Tree]:
        """``count`` disks that the cut may leave. Consume them before the next cut."""
        for index in range(count):
            yield self._replay.disk((None, True)[index] if index < 2 else rng)


@dataclass(frozen=True)
class Recording:
    directory: Path
    before: Tree
    calls: list[tuple[str, list[str], str]]
    """Name, arguments and result of each."""

    def cuts(self, step: int = 1) -> Iterator[Cut]:
        """One after every ``step``-th call that changes anything or says something, and one at the end."""
        replay = _Replay(self.directory, self.before)
        changes = 0
        for number, (name, arguments, result) in enumerate(self.calls):
            if replay.call(name, arguments, result):
                changes += 1
                if changes % step == 0:
                    yield Cut(number, f"{name}({', '.join(arguments)[:120]})", bytes(replay.said), replay)
        yield Cut(len(self.calls), "end", bytes(replay.said), replay)


def record(command: Sequence[str], directory: Path, **environment: str) -> Recording:
    """Run ``command`` to its end (it must succeed), and record what it does below ``directory``."""
    directory = directory.resolve()
    before = read_tree(directory)
    with tempfile.NamedTemporaryFile(dir="/tmp", suffix=".strace") as log:
        options = ["-f", "-y", "-qq", "-xx", "-z", "-s", str(2**25), "-e", f"trace={_CALLS}", "-o", log.name]
        whole = [str(STRACE), *options, *command]
        subprocess.run(whole, env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL)
        return Recording(directory, before, list(_parsed(Path(log.name))))


def read_tree(directory: Path) -> Tree:
    return {path.name: read_tree(path) if path.is_dir() else path.read_bytes() for path in directory.iterdir()}


def lay_out(disk: Tree, directory: Path) -> Path:
    """Write a disk to a directory that does not exist yet."""
    directory.mkdir()
    for name, content in disk.items():
        if isinstance(content, dict):
            lay_out(content, directory / name)
        else:
            (directory / name).write_bytes(content)
    return directory


def _parsed(log: Path) -> Iterator[tuple[str, list[str], str]]:
    """The calls in the order in which they ended. A sync that began before another thread's write ended is taken to
    cover it: threads that matter wait for each other."""
    unfinished: dict[str, str] = {}
    with log.open(encoding="ascii") as lines:
        for match in filter(None, map(_LINE.match, lines)):
            pid, resumed, name, rest = match.groups()
            if rest.endswith(" <unfinished ...>"):
                unfinished[pid] = rest.removesuffix(" <unfinished ...>")
                continue
            text = unfinished.pop(pid, "") + rest if resumed else rest
            inside, _, result = text.rpartition(") = ")
            yield _plain(resumed or name, [_decoded(part) for part in inside.rstrip().split(", ")], result)


def _decoded(argument: str) -> str:
    """Strings and paths, which strace writes as hexadecimal, as latin-1 text."""
    text = argument[1:-1] if argument.startswith('"') else argument
    return re.sub(r"(?:\\x[0-9a-f]{2})+", _unhex, text)


def _unhex(found: re.Match[str]) -> str:
    return bytes.fromhex(found[0].replace("\\x", "")).decode("latin-1")


def _plain(name: str, arguments: list[str], result: str) -> tuple[str, list[str], str]:
    """``renameat`` and its like, each of whose paths is relative to the directory before it, as ``rename``."""
    if name == "creat" or not name.endswith(("at", "at2")):
        return name, arguments, result
    count = 4 if name.startswith(("rename", "link")) else 2
    bases = [Path(directory.partition("<")[2].rstrip(">")) for directory in arguments[0:count:2]]
    paths = [str(base / path) for base, path in zip(bases, arguments[1:count:2], strict=True)]
    return name.removesuffix("2").removesuffix("at"), [*paths, *arguments[count:]], result


class _Replay:
    def __init__(self, directory: Path, before: Tree) -> None:
        self.said = bytearray()
        self._root = _node(before)
        self._base = str(directory)
        self._open: dict[str, _Handle] = {}
        self._changes: list[_Change] = []

    def call(self, name: str, arguments: list[str], result: str) -> bool:
        """Do what the call did. True: a power cut from here on may leave something else."""
        handle = self._open.get(_number(arguments[0]))
        match name:
            case "open":
                return self._opened(*arguments[:2], result)
            case "close":
                self._open.pop(_number(arguments[0]), None)
            case "lseek" | "read":
                if handle is not None:
                    handle.position = int(result) + (handle.position if name == "read" else 0)
            case "write" if _number(arguments[0]) == "1":
                self.said += arguments[1].encode("latin-1")[: int(result)]
                return True
            case "write" if handle is not None:
                handle.position = len(handle.node.now) if handle.appends else handle.position
                self._change((handle.node, handle.position, arguments[1].encode("latin-1")[: int(result)]))
                handle.position += int(result)
                return True
            case "pwrite64" if handle is not None:
                return self._change((handle.node, int(arguments[3]), arguments[1].encode("latin-1")[: int(result)]))
            case "sendfile" if handle is None:
                pass  # from there to elsewhere
            case "ftruncate" if handle is not None:
                return self._change((handle.node, int(arguments[1]), None))
            case "fsync" | "fdatasync" if handle is not None:
                for change in self._changes:
                    change.durable |= any(node is handle.node for node, _, _ in change.parts)
                return True
            case "rename":
                (old, old_name), (new, new_name) = map(self._place, arguments[:2])
                node = old.now[old_name] if old else _node(b"")
                parts = [(new, new_name, node)] if new else []
                return self._change(*parts, *([(old, old_name, None)] if old else []))
            case "mkdir" | "unlink" | "rmdir":
                parent, last = self._place(arguments[0])
                return parent is not None and self._change((parent, last, _node({}) if name == "mkdir" else None))
            case _:
                assert not any(self._base in argument for argument in arguments), f"{name} is not modelled"
        return False

    def disk(self, choice: random.Random | bool | None) -> Tree:
        """What a cut leaves. ``choice``: see ``_Change.kept``."""
        contents: dict[_Node, Any] = {}

        def content(node: _Node) -> Any:
            return contents.setdefault(node, _copy(node.before))

        for change in self._changes:
            for node, at, value in change.kept(choice):
                _apply(content(node), at, value)

        def tree(node: _Node) -> Any:
            found = content(node)
            return {name: tree(entry) for name, entry in found.items()} if isinstance(found, dict) else bytes(found)

        whole: Tree = tree(self._root)
        return whole

    def _change(self, *parts: tuple[_Node, Any, Any]) -> bool:
        for node, at, value in parts:
            _apply(node.now, at, value)
        if parts:
            self._changes.append(_Change(list(parts)))
        return bool(parts)

    def _opened(self, path: str, flags: str, result: str) -> bool:
        self._open.pop(_number(result), None)
        parent, name = self._place(path)
        if parent is None:
            return False
        node = parent.now.get(name) if name else parent
        created = node is None
        if created:
            node = _node(b"")
            self._change((parent, name, node))
        elif "O_TRUNC" in flags:
            self._change((node, 0, None))
        self._open[_number(result)] = _Handle(node, appends="O_APPEND" in flags)
        return created or "O_TRUNC" in flags

    def _place(self, path: str) -> tuple[_Node | None, str]:
        """The directory that holds ``path``, and its name there; (root, "") for the root, (None, "") elsewhere."""
        path = os.path.normpath(path)
        if path == self._base:
            return self._root, ""
        if not path.startswith(f"{self._base}/"):
            return None, ""
        *parents, name = path.removeprefix(f"{self._base}/").split("/")
        directory = self._root
        for parent in parents:
            directory = directory.now[parent]
        return directory, name


def _number(argument: str) -> str:
    return argument.partition("<")[0].strip()


def _node(content: Any) -> _Node:
    """Inodes of a tree that the disk holds."""
    is_tree = isinstance(content, dict)
    return _Node({name: _node(entry) for name, entry in content.items()} if is_tree else content)
