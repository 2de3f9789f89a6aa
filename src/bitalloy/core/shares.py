"""One part of the jobs: what a process does where others do the rest, without a word between them but stored results.

Jobs of a stage are cut into as many runs of neighbours as there are parts. The kinds of jobs that are shared out are
done by their own part alone. What every part needs before it can go on, such as the ranges of calibration, a part
does itself where no other has stored it yet: its own jobs first, then those of the parts behind it in a ring, so that
parts that run at the same time do little twice, and a part that runs alone lacks nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

NO_PART = 0
"""The part of a process that does no job of the kinds that are shared out, and takes what others stored."""


class RestMissingError(Exception):
    """A stage cannot go on, because results are missing that other parts make.

    Args:
        stage: name of the stage.
        parts: numbers of the parts that lack results, from 1.
        there: number of results that are stored.
        total: number of results of the stage.
    """

    def __init__(self, stage: str, parts: tuple[int, ...], there: int, total: int) -> None:
        super().__init__(f"Stage '{stage}' has {there} of {total} results; parts {parts} are missing.")
        self.stage, self.parts, self.there, self.total = stage, parts, there, total


@dataclass(frozen=True)
class JobShare:
    """The jobs that one of several processes does."""

    part: int
    """Number of the part, from 1; `NO_PART` for a process that does none."""
    parts: int
    kinds: Collection[str]
    """Kinds of jobs that are shared out."""

    def numbers(self, part: int, jobs: int) -> range:
        """Return the numbers of the jobs of a part, from 0, of a stage of so many.

        >>> share = JobShare(1, 3, ("probe",))
        >>> [list(share.numbers(part, 8)) for part in (1, 2, 3)]
        [[0, 1], [2, 3, 4], [5, 6, 7]]
        """
        return range(jobs * (part - 1) // self.parts, jobs * part // self.parts)

    def turns(self, kind: str, jobs: int) -> list[range]:
        """Return the jobs that this part does where they are not stored, in its order, as runs of neighbours."""
        if kind in self.kinds:
            return [] if self.part == NO_PART else [self.numbers(self.part, jobs)]
        first = max(self.part, 1)
        ring = (*range(first, self.parts + 1), *range(1, first))
        return [numbers for part in ring if (numbers := self.numbers(part, jobs))]

    def lacking(self, stored: Sequence[bool]) -> tuple[int, ...]:
        """Return the parts of which a job is not stored.

        >>> JobShare(1, 3, ("probe",)).lacking([True, True, True, False, True, True])
        (2,)
        """
        every = range(1, self.parts + 1)
        return tuple(part for part in every if not all(stored[number] for number in self.numbers(part, len(stored))))
