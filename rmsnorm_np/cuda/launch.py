"""How a call is cut into blocks, threads and vectors, from its shape and dtypes alone, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rmsnorm_np.cuda.words import BYTES, ITEMSIZE, words_of
from rmsnorm_np.ops.operation import Operation, Totals

if TYPE_CHECKING:
    from rmsnorm_np.cuda.kernel import Capability

WARP = 32
MAX_TEAM = 512  # threads: they may have 128 registers each; 1024 have 64, and spill
BLOCK = 128  # threads at least: teams smaller than this share a block
PIECE_TEAM = 256  # threads for a piece of a split row
RARE_TEAM = 256  # threads for a row out of range

# Vectors of x per thread. More of them are more bytes in flight and fewer threads to sum over, at four registers each.
FORWARD_TRIPS = 4
FORWARD_WARP_TRIPS = 8  # one warp needs no barrier: worth more vectors per thread
FORWARD_LONG_TRIPS = 8  # 32 registers for the row; 64 KB of it in a block
BOTH_SUMS_VECTORS = 1024  # of half types: beyond, 512 threads of 128 registers keep a third of the sums in memory
BACKWARD_TRIPS = 4  # a vector of half floats is 4 registers of x, 4 of dy, 4 of weight, 8 of dweight, 8 of dbias
BACKWARD_WORDS = 60  # of a thread's rows, columns and sums, for other operations than norms

# Vectors of a row whose sums need the rounding error of every product. A vector's sum in plain float32 is off by half
# an ULP or so; over as many vectors as this, a fifth of that is left.
SHORT = WARP

# dweight and dbias: each block leaves a partial sum, over enough rows that writing and reading it again is little
# against reading the rows. As many blocks as fit on this many multiprocessors, an H100's: one more would work alone at
# the end. A constant, so that no result depends on the GPU.
MULTIPROCESSORS = 132
SPLIT_THREADS = 512  # of a multiprocessor, at work on pieces of rows
ROWS_PER_CHUNK = 16
RARE_BLOCKS = 4 * MULTIPROCESSORS  # that look for rows out of range
SLICES = (32, 8)  # of the partial sums, added side by side by the warps of a block: where they are many, where few
MANY_TASKS = 64

ROUNDS_TO_BFLOAT16 = (8, 0)  # GPUs from this compute capability on


class Kinds(NamedTuple):
    """What a call computes: an operation, and the dtypes of its arrays, None for one that is absent.

    columns.weight_offset: whether there is one. totals: whether. first_k: fewer than n elements are in the RMS.
    scales: `elements.RowScales`, None where rows have none. reduced: what sums come to is told from outside.
    """

    operation: Operation
    reads: Any
    columns: Any
    writes: Any
    totals: Totals
    first_k: bool = False
    scales: Any = None
    reduced: bool = False

    @property
    def about(self) -> str:
        """The dtype of what the rows are about: what is kept, or else the first array that is read."""
        keep = self.operation.keep
        name: str = (keep and getattr(self.writes, keep)) or self.reads[0]
        return name

    @property
    def names(self) -> list[str]:
        """The dtypes of all that is read."""
        return [name for name in (*self.reads, *self.columns[:-1], self.about) if name]

    @property
    def work(self) -> str:
        """How to compute.

        ======  ============================  ===========================================================
        single  16-bit floats                 float32
        pair    float32                       float32 in pairs, where rounding errors matter
        double  those beside a float64        float64: the product of two float32 is exact
        exact   float64                       float64 in pairs
        ======  ============================  ===========================================================

        What is written counts, and what the rows are about. "pair" is also for 16-bit floats of operations for which
        float32 is not enough (`Operation.singles`). Rows with a scale are "double" in place of both: pairs of float32
        have too few digits to round to the nearest number of 8 bits, and to the nearest scale. So are those whose sums
        are reduced: no row of them can be run once more, as it is not known what sums others have of it.
        """
        results = (self.about, *self.writes)
        if "float64" in results:
            return "exact"
        if "float64" in self.names or self.scales or self.reduced:
            return "double"
        return "pair" if "float32" in results or not self.operation.singles else "single"

    @property
    def marks(self) -> bool:
        """Whether rows may leave the range: those of float16 alone cannot, where nothing is computed but the norm; and
        none of 16 or 32 bits that is computed in float64. Those whose sums are reduced stay what they are.
        """
        if self.reduced or (self.scales and "float64" not in self.names):
            return False
        return not self.operation.singles or any(name != "float16" for name in self.names)


@dataclass(frozen=True)
class Plan:
    """All that a kernel is compiled for: what it computes, on what, and its shape in threads."""

    kinds: Kinds
    aligned: bool  # all vectors begin at multiples of their size
    capability: Capability  # of the GPU
    split: bool  # a team has a piece of a row, not all of it
    team: int  # threads that share a row or a piece
    teams: int  # per block
    trips: int  # vectors of x per thread
    full: bool  # the vectors are exactly as many as the row has: nothing to check
    work: str  # see `Kinds.work`
    rare: bool = False  # for rows out of range

    @property
    def backward(self) -> bool:
        """Whether blocks take many rows, and sum over them."""
        return self.kinds.operation.share is not None

    @property
    def marks(self) -> bool:
        """Whether rows may leave the range."""
        return self.kinds.marks

    @property
    def reduced(self) -> bool:
        """Whether pieces leave their sums, and a row is computed from what these come to elsewhere."""
        return self.kinds.reduced

    @property
    def native_bfloat16(self) -> bool:
        """Whether the GPU rounds to bfloat16 by itself."""
        return self.capability >= ROUNDS_TO_BFLOAT16

    @property
    def short(self) -> bool:
        """Whether so few numbers are summed that their rounding errors do not cancel out."""
        return not self.split and self.team * self.trips <= SHORT

    @property
    def lanes(self) -> int:
        """Elements of a vector."""
        return BYTES // ITEMSIZE[self.kinds.about]

    @property
    def block(self) -> int:
        """Threads of a block."""
        return self.team * self.teams

    @property
    def length(self) -> int:
        """Elements that a team has room for."""
        return self.team * self.trips * self.lanes

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor is to have room for; 0 for as many as it has.

        Measured on an H200. Backward: 384 threads, of 168 registers, for half types, where the sums of weights and
        biases leave 256; 512 for others. A few of the registers go to memory for it. With what the compiler chose by
        itself, bfloat16 had .80 of a copy's speed instead of .93. Forward: the compiler's choice, but in large blocks
        of float32, where it left one of two places empty, and for pieces, which it gave the same 64 registers on older
        GPUs, but kept a number in memory for it.
        """
        if self.split:
            return 0 if self.backward else 3
        if not self.backward:
            large = self.block > BLOCK and ITEMSIZE[self.kinds.about] == 4
            return 1024 // self.block if self.work == "pair" and large else 0
        sums = sum(1 for there in self.kinds.totals if there)
        if self.work == "single":
            return max(1, (256 if sums > 1 else 384) // self.block)
        threads = 384 if sums > 1 and self.work in ("double", "exact") else 512
        if self.work == "exact" and len(self.kinds.operation.stages) > 1:  # pairs of float64, twice: 128 registers more
            threads -= 128
        return max(1, threads // self.block)

    @property
    def demanded(self) -> int:
        """The same, as the compiler is told. That for capability 10.0 and more spills hundreds of bytes for it."""
        return self.resident if self.capability < (10, 0) else 0

    @property
    def registers(self) -> int:
        """Registers that a thread may have for so many blocks to fit a multiprocessor."""
        return min(255, 65536 // self.block // max(1, self.demanded) // 8 * 8)


def team_shape(vectors: int, trips: int, warp_trips: int, long_trips: int) -> tuple[int, int] | None:
    """(team, trips) for a row of this many vectors, None for a row that one team cannot hold.

    The smallest team that holds the row in `trips` vectors per thread: a power of two within a warp, so that teams
    fill the warp; else as many warps as the row needs.
    """
    for team in (1, 2, 4, 8, 16, WARP):
        for count in range(1, (warp_trips if team == WARP else trips) + 1):
            if vectors <= team * count:
                return team, count
    for largest in (MAX_TEAM // 2, MAX_TEAM):  # two blocks to a multiprocessor, if need be with more vectors per thread
        for most in range(trips, long_trips + 1):
            team = -(-vectors // (most * WARP)) * WARP
            if team <= largest:
                return team, -(-vectors // team)
    return None


def plan_for(n: int, kinds: Kinds, aligned: bool, capability: Capability) -> Plan:
    """The plan for rows of n elements, however many: a row has the same bits in any batch."""
    lanes = BYTES // ITEMSIZE[kinds.about]
    vectors = -(-n // lanes)
    trips = FORWARD_TRIPS
    if kinds.operation.share is None:
        held = [kinds.about] if kinds.operation.keep else [name for name in kinds.reads if name]
        trips, *more = (
            max(1, most * BYTES // 4 // sum(words_of(name, lanes) for name in held))
            for most in (FORWARD_TRIPS, FORWARD_WARP_TRIPS, FORWARD_LONG_TRIPS)
        )
        shape = team_shape(vectors, trips, *more)
    else:
        trips = _backward_trips(kinds, lanes)
        shape = team_shape(vectors, trips, trips, trips)
        if kinds.work == "single" and all(kinds.totals) and vectors > BOTH_SUMS_VECTORS:
            shape = None
    split = shape is None or kinds.reduced
    team, trips = (PIECE_TEAM, trips) if shape is None else shape
    team = max(team, WARP) if split else team  # sums of pieces are those of whole warps
    teams = BLOCK // team if team <= WARP and not split else 1  # warps of one row meet at barriers of the whole block
    full = n % (team * trips * lanes) == 0
    return Plan(kinds, aligned, capability, split, team, teams, trips, full, kinds.work)


def _backward_trips(kinds: Kinds, lanes: int) -> int:
    """Vectors of a thread: wider arrays than x, wider sums and more of both take more registers."""
    read = [words_of(name, lanes) for name in kinds.reads if name]
    if kinds.work == "double":
        return 1
    if kinds.operation.singles:
        return BACKWARD_TRIPS // 2 if max(read) * 4 > BYTES else BACKWARD_TRIPS
    size = 2 if kinds.work == "exact" else 1
    kept = [name for name in (*kinds.columns[:-1], *kinds.totals) if name]
    return max(1, min(BACKWARD_TRIPS, BACKWARD_WORDS // (sum(read) + len(kept) * lanes * size)))


def rare_plan(plan: Plan) -> Plan:
    """The plan for the rows that leave the range in another: a block takes a row a vector at a time.

    Rows of 32 bits and less are in the range of float64 whatever they hold.
    """
    work = "exact" if plan.work == "exact" else "double"
    return Plan(plan.kinds, plan.aligned, plan.capability, True, RARE_TEAM, 1, 1, False, work, True)
