"""What `bench` measures: operations on shapes, and how each contender did. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from rmsnorm_np.cli.timing import Ratio

DIRECTIONS = ("forward", "forward+backward")
OURS = "rmsnorm_np"
OURS_INTO = "rmsnorm_np, out="
LIMIT = "limit"  # the same bytes moved by a loop that hardly computes, or by a copy on the device


@dataclass(frozen=True)
class Entry:
    """How one contender did."""

    contender: str
    seconds: tuple[float, ...]  # per call, one entry a round
    median: float
    bandwidth: float  # bytes a second of those that the operation has to read and write
    against_ours: Ratio  # its time over the time of rmsnorm_np, which allocates its results as peers do
    # The largest error of y; None where y is not returned. In ULP at |y| or |weight|, whichever is larger: where a mean
    # was subtracted, |y| alone can be next to nothing, and any library's error huge beside it.
    ulp: float | None


@dataclass(frozen=True)
class Case:
    """One operation on one shape, and all who took part."""

    norm: str
    direction: str
    dtype: str
    shape: tuple[int, int]
    entries: tuple[Entry, ...]
