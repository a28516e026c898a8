"""Unreadable samples: their number is counted, and limited."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from job.cluster import ranks
from job.errors import ConfigError, DataError

log = logging.getLogger(__name__)

SHOWN = 10
"""Unreadable samples that an error names."""


class BadSample(NamedTuple):
    """A sample that cannot be read.

    Attributes:
        part: train, val, test, …
        sample: its id.
        line: its URI and the cause.
    """

    part: str
    sample: int
    line: str


@dataclass(frozen=True)
class BadSampleLimit:
    """Unreadable samples to tolerate: a number over all parts, or a share of the samples of each part.

    Attributes:
        count: number over all parts; None: there is a share.
        share: share of each part, from 0 to below 1.
    """

    count: int | None
    share: Fraction = Fraction(0)

    @classmethod
    def parse(cls, value: int | str, option: str) -> BadSampleLimit:
        """The limit that a user gave as 10 or "0.5%".

        Args:
            value: what the user gave.
            option: its name, for messages.

        Raises:
            ConfigError: it is neither a number nor a share.
        """
        text = str(value).strip()
        if re.fullmatch(r"\d{1,18}", text, re.ASCII):
            return cls(int(text))
        match = re.fullmatch(r"(\d{1,2}(\.\d{1,9})?|\.\d{1,9})\s*%", text, re.ASCII)
        if match is None:
            raise ConfigError(f"{option} must be a number such as 10, or a share below 100% such as 0.5%: {value!r}.")
        return cls(None, Fraction(match[1]) / 100)

    def allowed(self, size: int) -> int:
        """Unreadable samples to tolerate of ``size`` samples."""
        return int(self.share * size) if self.count is None else self.count

    def require_few(self, bad: Mapping[tuple[str, int], str], sizes: Mapping[str, int], option: str) -> None:
        """Raise :class:`~job.errors.DataError` when more samples are unreadable than the limit allows.

        Args:
            bad: the line of each unreadable sample, by part and id.
            sizes: number of samples in each part.
            option: that sets the limit.
        """
        if self.count is not None:
            if len(bad) > self.count:
                raise _too_many(list(bad.values()), "", f"{self.count:,}", option)
            return
        for part, size in sizes.items():
            lines = [line for (its_part, _), line in bad.items() if its_part == part]
            allowed = self.allowed(size)
            if len(lines) > allowed:
                described = f" of {size:,} in {part}" if len(sizes) > 1 else f" of {size:,}"
                raise _too_many(lines, described, f"{allowed:,} ({float(self.share * 100):g}%)", option)


class BadSamples:
    """The unreadable samples of a run, each counted once; iteration yields their lines.

    Args:
        limit: how many are tolerated.
        option: that sets the limit, for messages.
    """

    def __init__(self, limit: BadSampleLimit, option: str) -> None:
        self.limit = limit
        self.option = option
        self._lines: dict[tuple[str, int], str] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._lines.values()))

    def add(self, samples: Iterable[BadSample], sizes: Mapping[str, int]) -> None:
        """Log and count samples.

        Raises:
            DataError: there are too many.
        """
        for part, sample, line in samples:
            if (part, sample) not in self._lines:
                log.warning("bad sample: %s", line)
                self._lines[part, sample] = line
        self.limit.require_few(self._lines, sizes, self.option)

    def share(self, sizes: Mapping[str, int]) -> None:
        """Union with the samples of all ranks; a collective operation.

        Raises:
            DataError: there are too many, on all ranks.
        """
        own_samples = {BadSample(*place, line) for place, line in self._lines.items()}
        # Ranks may have read a sample at different times, with different errors.
        self._lines = {(part, sample): line for part, sample, line in sorted(ranks.union(own_samples), reverse=True)}
        self.limit.require_few(self._lines, sizes, self.option)


def _too_many(lines: list[str], described: str, allowed: str, option: str) -> DataError:
    shown = "\n  ".join(sorted(lines)[:SHOWN])
    return DataError(
        f"{len(lines):,} unreadable image(s){described}, {allowed} allowed:\n  {shown}\n"
        f"Repair or remove them, or allow some by {option}."
    )
