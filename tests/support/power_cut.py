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
    "openat,open,creat,close,dup,dup2,dup3,lseek,read,pread64,write,pwrite64,writev,pwritev,sendfile,copy_file_range,"
    "truncate,ftruncate,fallocate,rename,renameat,renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,"
    "fdatasync,sync,syncfs"
)
_LINE = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)")
_PAGE = 4096

Tree: TypeAlias = "dict[str, bytes | Tree]"
"""A directory's content: name → content of a file, or directory."""


class _File:
    """An inode. ``pending``: (offset, data) of writes and (length, None) of truncations that no sync covers."""

    def __init__(self, content: bytes = b"") -> None:
        self.durable = bytearray(content)
        self.now = bytearray(content)
        self.pending: list[tuple[int, bytes | None]] = []

    def change(self, offset: int, data: bytes | None) -> None:
        _apply(self.now, offset, data)
        self.pending.append((offset, data))


class _Directory:
    """``pending``: changes of names that no sync covers; one rename is in the lists of both its directories."""

    def __init__(self) -> None:
        self.durable: dict[str, _Node] = {}
        self.now: dict[str, _Node] = {}
        self.pending: list[_Rename] = []


_Node: TypeAlias = _File | _Directory


@dataclass(eq=False)
class _Rename:
    """Names that change together: (directory, name, what it is from now on)."""

    names: list[tuple[_Directory, str, _Node | None]]


@dataclass
class _Handle:
    node: _Node
    position: int = 0
    appends: bool = False


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        content.extend(bytes(offset - len(content)))
    else:
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data


@dataclass(frozen=True)
class Cut:
    """The power fails after system call ``number``, ``call``."""

    number: int
    call: str
    said: bytes
    """Standard output up to then."""
    _root: _Directory = field(repr=False)

    def disks(self, rng: random.Random, count: int = 3) -> Iterator[Tree]:
        """``count`` disks that the cut may leave. Consume them before the next cut."""
        for index in range(count):
            yield _survivors(self._root, (None, True)[index] if index < 2 else rng)


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
                    yield Cut(number, f"{name}({', '.join(arguments)[:120]})", bytes(replay.said), replay.root)
        yield Cut(len(self.calls), "end", bytes(replay.said), replay.root)

    def order(self, *interesting: str) -> list[str]:
        """``name path`` of the successful calls of these names below the directory, in their order."""
        below = f"<{self.directory}/"
        found = []
        for name, arguments, _ in self.calls:
            if name in interesting and arguments and (below in arguments[0] or str(self.directory) in arguments[-1]):
                path = arguments[-1].strip('"') if name.startswith(("rename", "unlink")) else arguments[0]
                found.append(f"{name} {path.rpartition('/')[2].rstrip('>')}")
        return found


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
        for line in lines:
            match = _LINE.match(line)
            if match is None:
                continue
            pid, resumed, name, rest = match.groups()
            if rest.endswith(" <unfinished ...>"):
                unfinished[pid] = rest.removesuffix(" <unfinished ...>")
                continue
            text = unfinished.pop(pid, "") + rest if resumed else rest
            inside, _, result = text.rpartition(") = ")
            yield resumed or name, _decoded(inside.rstrip()), result


def _decoded(arguments: str) -> list[str]:
    """The arguments of a call. Strings and paths, which strace wrote as hexadecimal, as latin-1 text."""
    if "[{iov_base" in arguments:
        head, _, vectors = arguments.partition(", [")
        data = "".join(re.findall(r'iov_base="([^"]*)"', vectors))
        arguments = f'{head}, "{data}", {vectors.rpartition("], ")[2]}'
    return [re.sub(r"(?:\\x[0-9a-f]{2})+", _unhex, part) for part in arguments.split(", ")]


def _unhex(match: re.Match[str]) -> str:
    return bytes.fromhex(match[0].replace("\\x", "")).decode("latin-1")


class _Replay:
    def __init__(self, directory: Path, before: Tree) -> None:
        self.root = _loaded(before)
        self.said = bytearray()
        self._base = str(directory)
        self._open: dict[str, _Handle] = {}

    def call(self, name: str, arguments: list[str], result: str) -> bool:
        """Do what the call did. True: a power cut from here on may leave something else."""
        match name:
            case "open" | "openat" | "creat":
                self._opened(arguments[1:] if name == "openat" else arguments, arguments[0], result)
                return "O_CREAT" in arguments[-2] + arguments[-1] or "O_TRUNC" in arguments[-1]
            case "close":
                self._open.pop(_number(arguments[0]), None)
                return False
            case "dup" | "dup2" | "dup3":
                if (handle := self._handle(arguments[0])) is not None:
                    self._open[_number(result)] = handle
                return False
            case "lseek":
                if (handle := self._handle(arguments[0])) is not None:
                    handle.position = int(result)
                return False
            case "read":
                if (handle := self._handle(arguments[0])) is not None:
                    handle.position += int(result)
                return False
            case "write" | "writev" | "pwrite64" | "pwritev" | "sendfile" | "copy_file_range":
                return self._written(name, arguments, int(result))
            case "truncate" | "ftruncate":
                handle = self._handle(arguments[0]) if name == "ftruncate" else None
                node = handle.node if handle is not None else self._find(arguments[0])
                return self._changed(node, int(arguments[1]), None)
            case "fallocate":
                handle, end = self._handle(arguments[0]), int(arguments[2]) + int(arguments[3])
                grows = handle is not None and isinstance(handle.node, _File) and end > len(handle.node.now)
                return grows and arguments[1] == "0" and self._changed(handle.node, end, None)  # type: ignore[union-attr]
            case "fsync" | "fdatasync":
                handle = self._handle(arguments[0])
                if handle is not None:
                    _sync(handle.node)
                return handle is not None
            case "sync" | "syncfs":
                _sync_all(self.root)
                return True
        return self._renamed(name, arguments)

    # --- files -------------------------------------------------------------------------------------------------------

    def _opened(self, arguments: list[str], directory: str, result: str) -> None:
        self._open.pop(_number(result), None)
        path, flags = self._path(arguments[0], directory), arguments[1]
        parent, name = self._place(path)
        if parent is None:
            return
        node = parent.now.get(name) if name else parent
        if node is None:
            node = _File()
            _rename([(parent, name, node)])
        if isinstance(node, _File) and "O_TRUNC" in flags and node.now:
            node.change(0, None)
        self._open[_number(result)] = _Handle(node, appends="O_APPEND" in flags)

    def _written(self, name: str, arguments: list[str], count: int) -> bool:
        if name in ("write", "writev") and _number(arguments[0]) == "1" and "1" not in self._open:
            self.said += _text(arguments[1])[:count]
            return True
        handle = self._handle(arguments[2 if name == "copy_file_range" else 0])
        if handle is None or not isinstance(handle.node, _File):
            return False
        if name in ("sendfile", "copy_file_range"):
            source = self._handle(arguments[1 if name == "sendfile" else 0])
            assert source is not None and isinstance(source.node, _File), f"{name}: unknown source {arguments}"
            at = (
                source.position
                if arguments[2] == "NULL" or name == "copy_file_range"
                else int(arguments[2].strip("[]"))
            )
            data = bytes(source.node.now[at : at + count])
            source.position = at + count
        else:
            data = _text(arguments[1])[:count]
        if name.startswith("pwrite"):
            return self._changed(handle.node, int(arguments[-1]), data)
        handle.position = len(handle.node.now) if handle.appends else handle.position
        self._changed(handle.node, handle.position, data)
        handle.position += count
        return True

    def _changed(self, node: _Node | None, offset: int, data: bytes | None) -> bool:
        if isinstance(node, _File):
            node.change(offset, data)
        return isinstance(node, _File)

    # --- names -------------------------------------------------------------------------------------------------------

    def _renamed(self, name: str, arguments: list[str]) -> bool:
        at = name.endswith(("at", "at2"))  # then each path has the directory that it is relative to before it
        pairs = [(arguments[0], arguments[1]), (arguments[2], arguments[3])] if at and len(arguments) > 3 else []
        pairs = pairs or [(arguments[0], arguments[1])] if at else [("", path) for path in arguments[:2]]
        count = 2 if name.startswith(("rename", "link")) else 1
        (parent, old), *rest = [self._place(self._path(path, base)) for base, path in pairs[:count]]
        match name.removesuffix("at2").removesuffix("at"):
            case "rename" | "link":
                to, new = rest[0]
                node = parent.now.get(old) if parent is not None else _File()
                changes = [] if to is None else [(to, new, node)]
                if parent is not None and not name.startswith("link"):
                    changes.append((parent, old, None))
            case "mkdir":
                changes = [(parent, old, _Directory())] if parent is not None else []
            case _:
                changes = [(parent, old, None)] if parent is not None else []
        _rename(changes)
        return bool(changes)

    def _handle(self, argument: str) -> _Handle | None:
        return self._open.get(_number(argument))

    def _path(self, argument: str, base: str) -> str:
        path = argument.strip('"')
        return path if path.startswith("/") else os.path.normpath(f"{base.partition('<')[2].rstrip('>')}/{path}")

    def _find(self, argument: str) -> _Node | None:
        parent, name = self._place(argument.strip('"'))
        return None if parent is None else parent.now.get(name)

    def _place(self, path: str) -> tuple[_Directory | None, str]:
        """The directory that holds ``path``, and its name there; (root, "") for the root, (None, "") elsewhere."""
        path = os.path.normpath(path)
        if path == self._base:
            return self.root, ""
        if not path.startswith(f"{self._base}/"):
            return None, ""
        *parents, name = path.removeprefix(f"{self._base}/").split("/")
        directory: Any = self.root
        for parent in parents:
            directory = directory.now[parent]
        return directory, name


def _number(argument: str) -> str:
    return argument.partition("<")[0].strip()


def _text(argument: str) -> bytes:
    return argument.removeprefix('"').removesuffix('"').encode("latin-1")


def _loaded(tree: Tree) -> _Directory:
    directory = _Directory()
    for name, content in tree.items():
        directory.durable[name] = _loaded(content) if isinstance(content, dict) else _File(content)
    directory.now = dict(directory.durable)
    return directory


def _rename(names: list[tuple[_Directory, str, _Node | None]]) -> None:
    change = _Rename(names)
    for directory, name, node in names:
        _set(directory.now, name, node)
        if change not in directory.pending:
            directory.pending.append(change)


def _set(names: dict[str, _Node], name: str, node: _Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _sync(node: _Node) -> None:
    if isinstance(node, _File):
        node.durable, node.pending = bytearray(node.now), []
        return
    for change in list(node.pending):
        for directory, name, target in change.names:
            _set(directory.durable, name, target)
            directory.pending.remove(change) if change in directory.pending else None


def _sync_all(directory: _Directory) -> None:
    _sync(directory)
    for node in directory.now.values():
        _sync_all(node) if isinstance(node, _Directory) else _sync(node)


def _survivors(root: _Directory, choice: random.Random | bool | None) -> Tree:
    """What a cut leaves of a tree. ``choice``: of what is not synced, nothing (None), all (True), or random parts."""
    names: dict[int, dict[str, _Node]] = {}
    decided: dict[int, bool] = {}

    def kept(change: _Rename) -> bool:
        return decided.setdefault(id(change), choice is True or (choice is not None and choice.random() < 0.5))

    def tree(directory: _Directory) -> Tree:
        found = names.setdefault(id(directory), dict(directory.durable))
        for change in directory.pending:
            for where, name, node in change.names:
                if where is directory and kept(change):
                    _set(found, name, node)
        return {name: tree(node) if isinstance(node, _Directory) else content(node) for name, node in found.items()}

    def content(file: _File) -> bytes:
        result = bytearray(file.durable)
        for offset, data in file.pending:
            if choice is True or data is None:
                if choice is True or (choice is not None and choice.random() < 0.5):
                    _apply(result, offset, data)
            elif choice is not None:
                for start in range(0, len(data), _PAGE):
                    if choice.random() < 0.6:
                        _apply(result, offset + start, data[start : start + _PAGE])
        return bytes(result)

    return tree(root)
