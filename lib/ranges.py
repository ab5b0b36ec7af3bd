"""The numbers that flags of train.py and evaluate.py may be, and what is said of others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT32_MAX = 3.4e38


class ConfigError(ValueError):
    """A flag that is unknown, out of range or contradicts another; the message is one line."""


@dataclass(frozen=True)
class Range:
    """The numbers that a flag may be, from `least` to `most`, and how to say so.

    `least` or `most` is itself excluded if `open_below` or `open_above`.
    """

    text: str
    least: float = -math.inf
    most: float = math.inf
    open_below: bool = False
    open_above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and not (
            self.open_below and value == self.least or self.open_above and value == self.most
        )


POSITIVE = Range("at least 1", 1)
NOT_NEGATIVE = Range("0 or more", 0)
ABOVE_ZERO = Range("above 0", 0, open_below=True)
FRACTION = Range("above 0 and at most 1", 0, 1, open_below=True)
FINITE = Range("a finite number", -math.inf, math.inf, open_below=True, open_above=True)
SINGLE_PRECISION = Range("a number of 32 bits", -FLOAT32_MAX, FLOAT32_MAX)
COUNTABLE = Range("a number of 64 bits", -(2**63), 2**63 - 1)


def check_number(
    name: str, value: float, ranges: Sequence[Range], given: str | None = None
) -> None:
    """Checks a number of a flag of train.py or evaluate.py.

    Arguments:
        name: Of the flag.
        value: Of type int or float.
        ranges: In all of which it must be, beside those of what computers count and compute with.
        given: What was given, if there is more than the value.

    Raises:
        ConfigError: if it is in one of them not.
    """
    whole = (COUNTABLE,) if isinstance(value, int) else (FINITE, SINGLE_PRECISION)
    for allowed in (*whole, *ranges):
        if value not in allowed:
            raise ConfigError(f"--{name} must be {allowed.text}; got {given or value}")


def at_most(most: int) -> Range:
    return Range(f"at most {most}", most=most)
