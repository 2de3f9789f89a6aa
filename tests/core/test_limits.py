"""Amounts of memory, what is refused beyond the limit, and the watch on what is in use."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bitalloy.core import limits
from bitalloy.core.errors import BitalloyError, DataError

GROWS = """
import sys
from bitalloy.cli.guard import end_for_memory
from bitalloy.core.limits import limited, watched
from bitalloy.core.ownership import make_temporary
from bitalloy.core.store import claimed
with limited(300_000_000), claimed("run") as store, watched(end_for_memory):
    print(make_temporary(store.cache), flush=True)
    import subprocess
    child = subprocess.Popen(["sleep", "100"])
    print(child.pid, flush=True)
    held = []
    while True:
        held.append(b"1" * 10_000_000)
"""


@pytest.mark.parametrize(
    ("text", "wanted"), [("8GB", 8e9), ("1.5 gb", 1.5e9), ("20MB", 2e7), ("1KB", 1000), ("999999999999TB", sys.maxsize)]
)
def test_amounts_of_memory(text: str, wanted: float) -> None:
    assert limits.memory_bytes(text) == int(wanted)


@pytest.mark.parametrize(
    "text", ["", "8", "GB", "-1GB", "0GB", "0%", "101%", "nan%", "8 bytes", "1e3GB", "٣GB", "9" * 400]
)
def test_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(BitalloyError, match=r"--memory-limit is '.*' *; expected an amount of memory, such as 8GB"):
        limits.memory_bytes(text)


def test_the_limit_is_that_of_the_call_or_of_the_environment_or_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.delenv(limits.VARIABLE, raising=False)
    assert 0 < limits.memory_limit() <= 0.8 * total
    assert limits.memory_bytes("50%") <= total / 2
    monkeypatch.setenv(limits.VARIABLE, "3GB")
    assert limits.memory_limit() == 3_000_000_000
    with limits.limited(5):
        assert limits.memory_limit() == 5
        with limits.limited(None):
            assert limits.memory_limit() == 5
    assert limits.memory_limit() == 3_000_000_000
    monkeypatch.setenv(limits.VARIABLE, "much")
    with pytest.raises(BitalloyError, match="BITALLOY_MEMORY_LIMIT is 'much'"):
        limits.memory_limit()


def test_what_is_refused_tells_the_limit_and_one_that_is_enough() -> None:
    with limits.limited(1_000_000):
        limits.refuse_beyond(1_000_000, "It is large", DataError)
        limits.refuse_beyond(250_000, "It is large", DataError, divisor=4)
        with pytest.raises(DataError) as refused:
            limits.refuse_beyond(2_340_000, "It is large", DataError)
        with pytest.raises(DataError, match=r"the limit is 250\.0KB, a 4th of"):
            limits.refuse_beyond(250_001, "It is large", DataError, divisor=4)
    told = str(refused.value)
    assert "It is large, which takes 2.3MB; the limit is 1.0MB" in told
    assert limits.memory_bytes(told.rstrip(".").rpartition("such as ")[2]) >= 2_340_000


def test_archives_are_refused_by_what_they_unpack_to(tmp_path: Path) -> None:
    path = tmp_path / "zeros.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(5_000_000))
    assert path.stat().st_size < 10_000
    with limits.limited(1_000_000), pytest.raises(DataError, match=r"holds 5000000 bytes when it is unpacked"):
        limits.refuse_contents(path, DataError)
    (tmp_path / "long").write_bytes(bytes(2_000_000))
    with limits.limited(1_000_000), pytest.raises(DataError, match="is read as a whole"):
        limits.refuse_contents(tmp_path / "long", DataError)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory in use is read from /proc")
def test_a_command_that_needs_more_memory_ends_with_one_line_its_files_and_its_children(tmp_path: Path) -> None:
    words = [sys.executable, "-c", GROWS]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=60)
    folder, child = done.stdout.split()
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert "of memory are in use; the limit is 300.0MB" in done.stderr
    assert not Path(folder).exists()
    assert not Path(f"/proc/{child}").is_dir() or _is_zombie(int(child))


def _is_zombie(process: int) -> bool:
    return ") Z " in Path(f"/proc/{process}/stat").read_text()
