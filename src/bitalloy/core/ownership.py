"""Who works where: the lock of a folder of results, and temporary files whose names tell which process made them.

The lock is the kernel's, so it is gone with its process however that ends. Temporary files are not: `sweep` removes
those of processes of this machine that have ended, and leaves those of running ones and of other machines.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

PARTIAL = ".partial"
"""Ending of a file that is being written; one that a killed process left behind is of no use."""
SCRATCH, ELSEWHERE = "scratch-", "bitalloy-"
"""How the names of temporary folders begin: inside a folder of results, and in the system's own temporary folder."""
_TOKEN = secrets.token_hex(4)
"""Tells this process from an earlier one with the same number, as of the first process of every container."""
_HOST = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:40] or "_"
_OWNER = re.compile(r"(?P<host>[A-Za-z0-9._]+)\+(?P<pid>\d{1,10})\+(?P<token>[0-9a-f]{8})-")
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""Errors by which a file system tells that it knows no locks; work goes on without one there."""
_FAR = 1 << 30
"""Byte of the file that is locked where locks are of bytes, and keep others from reading these."""


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """The process that holds a lock."""

    host: str
    pid: int
    since: str
    """Time at which it took the lock, e.g. `2026-01-31 12:00:00 UTC`."""
    command: str

    def told(self) -> str:
        """Name the process in words."""
        return f"process {self.pid} on {self.host}, since {self.since}: {self.command}"


class HeldError(Exception):
    """Another process holds the lock; `owner` is None where it is not known."""

    def __init__(self, owner: Owner | None) -> None:
        super().__init__(owner.told() if owner is not None else "a process that did not say its name")
        self.owner = owner


class Lock:
    """The lock of a file, shared by all that ask for it inside this process.

    Args:
        path: an existing file, into which the owner is written while it holds the lock.
    """

    _held: dict[Path, tuple[int, int]] = {}  # noqa: RUF012  of the process: file -> descriptor and number of holders
    _guard = threading.Lock()

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()

    @staticmethod
    def held() -> tuple[Path, ...]:
        """List the files whose locks this process holds."""
        return tuple(Lock._held)

    def take(self) -> bool:
        """Take the lock, and tell whether this process did not hold it before.

        Raises:
            HeldError: another process holds it.
            OSError: the file cannot be opened for writing.
        """
        with Lock._guard:
            descriptor, holders = Lock._held.get(self._path, (-1, 0))
            if not holders:
                descriptor = os.open(self._path, os.O_RDWR)
                try:
                    _lock(descriptor)
                except OSError as error:
                    if error.errno not in _UNSUPPORTED:
                        owner = _owner_in(descriptor)
                        os.close(descriptor)
                        raise HeldError(owner) from error
                _rewrite(descriptor, msgspec.json.encode(_this_process()))
            Lock._held[self._path] = descriptor, holders + 1
            return not holders

    def give(self) -> None:
        """Give the lock back, which is free when all that took it have done so."""
        with Lock._guard:
            descriptor, holders = Lock._held.pop(self._path)
            if holders > 1:
                Lock._held[self._path] = descriptor, holders - 1
                return
            with suppress(OSError):  # a full disk
                _rewrite(descriptor, b"")
            os.close(descriptor)


def mark() -> str:
    """Return what begins the names of temporary files of this process: host, process and a random number."""
    return f"{_HOST}+{os.getpid()}+{_TOKEN}-"


@contextmanager
def temporary(folder: Path | None = None) -> Iterator[Path]:
    """Make a folder that is removed at the end of the block.

    Args:
        folder: where it is made; None for the system's own folder of temporary files. It is swept before.
    """
    place = make_temporary(folder)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def make_temporary(folder: Path | None = None) -> Path:
    """Make a temporary folder, see `temporary`, which whoever asked for it removes."""
    if folder is not None:
        sweep(folder.glob(f"{SCRATCH}*+*+*-*"))
        return Path(tempfile.mkdtemp(prefix=SCRATCH + mark(), dir=folder))
    sweep_root()
    return Path(tempfile.mkdtemp(prefix=ELSEWHERE + mark()))


def temporary_root() -> Path:
    """Return the system's own folder of temporary files."""
    return Path(tempfile.gettempdir())


def sweep_root() -> None:
    """Remove what processes left in the system's own folder of temporary files that are no more."""
    sweep(temporary_root().glob(f"{ELSEWHERE}*+*+*-*"))


def sweep(paths: Iterable[Path]) -> None:
    """Remove those of some temporary files and folders whose process is no more; what names no process has none."""
    for path in list(paths):  # all are found before the first is gone
        found = _OWNER.search(path.name)
        if found is None or _is_gone(found["host"], int(found["pid"]), found["token"]):
            discard(path)


def discard(path: Path) -> None:
    """Remove a file or folder as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _is_gone(host: str, pid: int, token: str) -> bool:
    if host != _HOST:
        return False
    return token != _TOKEN if pid == os.getpid() else not _runs(pid)


def _runs(pid: int) -> bool:
    """Tell whether there is a process of a number on this machine."""
    if sys.platform == "win32":  # where `os.kill` ends processes
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x00100000, False, pid)  # SYNCHRONIZE
        if handle:
            ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _this_process() -> Owner:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    words = [Path(sys.argv[0]).name.replace("__main__.py", "bitalloy") or "python", *sys.argv[1:]] if sys.argv else []
    command = " ".join(words)[:500].encode(errors="replace").decode()
    return Owner(host=socket.gethostname(), pid=os.getpid(), since=since, command=command)


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _rewrite(descriptor: int, data: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, data)


def _owner_in(descriptor: int) -> Owner | None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        return msgspec.json.decode(os.read(descriptor, 1 << 16), type=Owner)
    except (OSError, ValueError):  # not written yet, or damaged; msgspec's errors are of this type
        return None
