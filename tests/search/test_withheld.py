"""Standard output of a process while C code prints into it: a real process, real printf."""

from __future__ import annotations

import subprocess
import sys

import pytest

PREPARE = """
import ctypes, os, sys, threading
from bitalloy.search.withheld import withheld
c = ctypes.CDLL(None)
def stray(text): c.printf(b"stray: %s\\n", text)
"""


def printed(code: str) -> str:
    """By a process whose standard output is a pipe, so that C holds back what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + code], capture_output=True, text=True, check=False, timeout=120
    )
    assert not done.stderr
    return done.stdout


def test_lines_of_c_code_are_left_out_only_inside() -> None:
    code = """
stray(b"before")
with withheld(b"stray: "):
    stray(b"inside")
    c.printf(b"another line\\n")
stray(b"after")
"""
    assert printed(code).splitlines() == ["stray: before", "another line", "stray: after"]


def test_nothing_of_other_threads_is_lost() -> None:
    code = """
def speak():
    for i in range(300):
        os.write(1, b"line %d\\n" % i)
speaker = threading.Thread(target=speak)
speaker.start()
while speaker.is_alive():
    with withheld(b"stray: "):
        stray(b"inside")
speaker.join()
"""
    assert sorted(printed(code).splitlines()) == sorted(f"line {i}" for i in range(300))


def test_threads_that_withhold_at_once_leave_standard_output_as_it_was() -> None:
    code = """
before, count = os.fstat(1), len(os.listdir("/proc/self/fd"))
def solve():
    for _ in range(20):
        with withheld(b"stray: "):
            stray(b"inside")
threads = [threading.Thread(target=solve) for _ in range(3)]
for t in threads: t.start()
for t in threads: t.join()
after = os.fstat(1)
print((before.st_dev, before.st_ino) == (after.st_dev, after.st_ino), len(os.listdir("/proc/self/fd")) - count)
"""
    assert printed(code) == "True 0\n"


@pytest.mark.parametrize("what", ["raise ValueError", "sys.exit(0)"])
def test_it_is_put_back_whatever_happens(what: str) -> None:
    code = f"""
try:
    with withheld(b"stray: "):
        stray(b"inside")
        {what}
finally:
    os.write(1, b"there\\n")
    sys.stderr = open(os.devnull, "w")
"""
    assert printed(code) == "there\n"


def test_without_standard_output_it_still_works() -> None:
    code = """
os.close(1)
with withheld(b"stray: "):
    os.write(2, b"")
os.dup2(2, 1)
"""
    assert printed(code) == ""
