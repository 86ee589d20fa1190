"""Power cuts at every system call of a program: recorded with strace, replayed as what the disk may hold.

The program works in a directory (what is in it before counts as synced), and writes a line to its standard output,
unbuffered, after each thing that must survive from then on. It is one process; threads are fine.

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
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, TypeAlias

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


def _copy(content: Any) -> Any:
    return dict(content) if isinstance(content, dict) else bytearray(content)


class _Node:
    """An inode of a tree or file that the disk holds. Its content: bytes, or name → inode."""

    def __init__(self, content: Any) -> None:
        is_tree = isinstance(content, dict)
        self.before: Any = {name: _Node(entry) for name, entry in content.items()} if is_tree else content
        self.now = _copy(self.before)


def _apply(content: Any, at: Any, value: Any) -> None:
    """Writes ``value`` into a file at an offset (None: cuts or grows it to that length), or gives a name to an inode
    (None: to nothing)."""
    if isinstance(content, dict):
        content.pop(at, None)
        content |= {} if value is None else {at: value}
    else:
        content.extend(bytes(max(0, at - len(content))))
        content[at : None if value is None else at + len(value)] = value or b""


Part: TypeAlias = tuple[_Node, Any, Any]
"""(inode, offset or name, value): what a system call did, of a rename two of them."""


def _kept(parts: Sequence[Part], choice: random.Random | bool) -> Iterator[Part]:
    """What is there after a cut of what is not synced. ``choice``: nothing, all, or random parts."""
    node, at, value = parts[0]
    if isinstance(choice, bool):
        yield from parts if choice else ()
    elif isinstance(value, bytes):
        pages = range(0, len(value), _PAGE)
        yield from ((node, at + page, value[page : page + _PAGE]) for page in pages if choice.random() < 0.6)
    elif choice.random() < 0.5:
        yield from parts


class Recording:
    """The calls of a program: name, arguments and result of each. While ``cuts`` are made, also the last one."""

    def __init__(self, directory: Path, before: Tree, calls: list[tuple[str, list[str], str]]) -> None:
        self.calls = calls
        self.number, self.call, self.said = 0, "", b""
        self._base, self._root = str(directory), _Node(before)
        self._open: dict[str, SimpleNamespace] = {}
        self._changes: list[SimpleNamespace] = []

    def cuts(self, step: int = 1) -> Iterator[Self]:
        """Once: one after every ``step``-th call that changes anything or says something, and one at the end. Each is
        this recording: the power fails after call ``number``, ``call``; ``said`` is the standard output up to then."""
        changes = 0
        for self.number, (name, arguments, result) in enumerate(self.calls):  # noqa: B020
            self.call = f"{name}({', '.join(arguments)[:120]})"
            if self._replay(name, arguments, result):
                changes += 1
                if changes % step == 0:
                    yield self
        self.call = "end"
        yield self

    def disks(self, rng: random.Random, count: int = 3) -> Iterator[Tree]:
        """``count`` disks that the cut may leave."""
        for choice in [False, True, *[rng] * (count - 2)]:
            contents: dict[_Node, Any] = {}
            for change in self._changes:
                for node, at, value in change.parts if change.durable else _kept(change.parts, choice):
                    _apply(contents.setdefault(node, _copy(node.before)), at, value)
            yield _tree(self._root, contents)

    def _replay(self, name: str, arguments: list[str], result: str) -> bool:
        """Do what the call did. True: a power cut from here on may leave something else."""
        number = _number(arguments[0])
        handle = self._open.get(number)
        match name:
            case "open":
                return self._opened(*arguments[:2], _number(result))
            case "close":
                self._open.pop(number, None)
            case "lseek" | "read":
                if handle is not None:
                    handle.position = int(result) + (handle.position if name == "read" else 0)
            case "write" if number == "1":
                self.said += arguments[1].encode("latin-1")[: int(result)]
                return True
            case "write" | "pwrite64" if handle is not None:
                written = arguments[1].encode("latin-1")[: int(result)]
                if name == "pwrite64":
                    return self._change((handle.node, int(arguments[3]), written))
                at = len(handle.node.now) if handle.appends else handle.position
                handle.position = at + len(written)
                return self._change((handle.node, at, written))
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
                node = old.now[old_name] if old else _Node(b"")
                return self._change(*[(new, new_name, node)] * bool(new), *[(old, old_name, None)] * bool(old))
            case "mkdir" | "unlink" | "rmdir":
                parent, last = self._place(arguments[0])
                return parent is not None and self._change((parent, last, _Node({}) if name == "mkdir" else None))
            case _:
                assert not any(self._base in argument for argument in arguments), f"{name} is not modelled"
        return False

    def _change(self, *parts: Part) -> bool:
        for node, at, value in parts:
            _apply(node.now, at, value)
        self._changes += [SimpleNamespace(parts=parts, durable=False)] if parts else []
        return bool(parts)

    def _opened(self, path: str, flags: str, number: str) -> bool:
        self._open.pop(number, None)
        parent, name = self._place(path)
        if parent is None:
            return False
        node = parent.now.get(name) if name else parent
        created, cut = node is None, "O_TRUNC" in flags
        if created:
            self._change((parent, name, node := _Node(b"")))
        elif cut:
            self._change((node, 0, None))
        self._open[number] = SimpleNamespace(node=node, position=0, appends="O_APPEND" in flags)
        return created or cut

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


def record(command: Sequence[str], directory: Path, **environment: str) -> Recording:
    """Run ``command`` to its end (it must succeed), and record what it does below ``directory``."""
    before = _tree_of(directory)
    with tempfile.NamedTemporaryFile(dir="/tmp", suffix=".strace") as log:
        options = ["-f", "-y", "-qq", "-xx", "-z", "-s", str(2**25), "-e", f"trace={_CALLS}", "-o", log.name]
        whole = [str(STRACE), *options, *command]
        subprocess.run(whole, env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL)
        return Recording(directory.resolve(), before, list(_parsed(Path(log.name))))


def lay_out(disk: Tree, directory: Path) -> Path:
    """Write a disk to a directory that does not exist yet."""
    directory.mkdir()
    for name, content in disk.items():
        if isinstance(content, dict):
            lay_out(content, directory / name)
        else:
            (directory / name).write_bytes(content)
    return directory


def _tree_of(directory: Path) -> Tree:
    return {path.name: _tree_of(path) if path.is_dir() else path.read_bytes() for path in directory.iterdir()}


def _tree(node: _Node, contents: dict[_Node, Any]) -> Any:
    found = contents.get(node, node.before)
    return {name: _tree(entry, contents) for name, entry in found.items()} if isinstance(found, dict) else bytes(found)


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
            words = (word.strip('"').encode() for word in inside.rstrip().split(", "))  # strings are hexadecimal
            yield _plain(resumed or name, [word.decode("unicode_escape") for word in words], result)


def _plain(name: str, arguments: list[str], result: str) -> tuple[str, list[str], str]:
    """``renameat`` and its like, each of whose paths is relative to the directory before it, as ``rename``."""
    if name == "creat" or not name.endswith(("at", "at2")):
        return name, arguments, result
    count = 4 if name.startswith(("rename", "link")) else 2
    bases = [Path(directory.partition("<")[2].rstrip(">")) for directory in arguments[0:count:2]]
    paths = [str(base / path) for base, path in zip(bases, arguments[1:count:2], strict=True)]
    return name.removesuffix("2").removesuffix("at"), [*paths, *arguments[count:]], result


def _number(argument: str) -> str:
    return argument.partition("<")[0].strip()
