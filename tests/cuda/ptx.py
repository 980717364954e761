"""Execute a kernel's compiled PTX on the CPU, thread by thread, in NumPy arrays that stand for the GPU's memory.

It runs what the compiler made (vector accesses, shuffles, fused operations), and refuses what a GPU would not forgive:
an access out of bounds or misaligned, a barrier that not all threads of a block reach, a shuffle whose lanes are not
all there, a race in shared memory, shared memory that nothing has written, an instruction that it does not know,
atomics among them.

All threads of a launch that are at the same instruction do it together; those that are behind go first.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from ptx_instructions import BITS, Instructions, PTXError, split

SHARED = np.uint64(0x7000_0000_0000_0000)  # where shared memory seems to lie, for generic addresses
SECTOR = 32  # bytes


class Module:
    """The code of the one kernel in a text of PTX."""

    def __init__(self, text):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
        self.shared, self.shared_size = {}, 0
        for align, name, size in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
            self.shared[name] = -(-self.shared_size // int(align)) * int(align)
            self.shared_size = self.shared[name] + int(size or 0)
        entry = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)(.*?)\{(.*)\}", text, flags=re.S)
        if entry is None or re.search(r"\.func\b|\.local\b", text):
            raise PTXError("expected one kernel without calls and without local memory")
        self.parameters = re.findall(r"\.param\s+\.\w+\s+(?:\.ptr\s.*?)?([\w$]+)", entry[1])
        self.code, self.labels = [], {}
        for statement in re.split(r";|(?<=:)\s*\n", entry[3]):
            self._add(" ".join(statement.split()))

    def _add(self, statement):
        while label := re.match(r"^([$\w]+):\s*", statement):
            self.labels[label[1]] = len(self.code)
            statement = statement[label.end() :]
        statement = statement.lstrip("} ")
        if statement.startswith("{"):
            statement = statement[1:].strip()
        if not statement or statement.startswith("."):
            return
        predicate = re.match(r"^@(!?)(%\w+)\s+", statement)
        if predicate:
            statement = statement[predicate.end() :]
        name, _, rest = statement.partition(" ")
        condition = (predicate[2], bool(predicate[1])) if predicate else None
        self.code.append((name, condition, split(rest)))


class Memory:
    """Arrays of a GPU: what lies outside of them is out of bounds."""

    def __init__(self, arrays):
        self.buffers = sorted((a.reshape(-1).view(np.uint8) for a in arrays if a.size), key=lambda a: a.ctypes.data)
        self.starts = np.array([a.ctypes.data for a in self.buffers], np.uint64)
        self.ends = self.starts + np.array([a.size for a in self.buffers], np.uint64)

    def places(self, address, size, name):
        """(buffer, offset) of each access."""
        if np.any(address % np.uint64(size)):
            raise PTXError(f"misaligned access of {size} bytes: {name}")
        which = np.searchsorted(self.starts, address, side="right") - 1
        if np.any((which < 0) | (address + np.uint64(size) > self.ends[which])):
            raise PTXError(f"access of {size} bytes out of bounds: {name}")
        return which, (address - self.starts[which]).astype(np.int64)


class SharedMemory:
    """Of each block, and who has touched which byte since when, to find races."""

    def __init__(self, blocks, size):
        shape = blocks, max(size, 1)
        self.bytes = np.zeros(shape, np.uint8)
        self.writer, self.reader = np.full(shape, -1), np.full(shape, -1)  # a thread; -2 for several readers
        self.written_at, self.read_at = np.full(shape, -1), np.full(shape, -1)  # how many barriers there had been
        self.barriers = np.zeros(blocks, int)

    def touch(self, block, thread, offset, size, store, name):
        """Note the accesses. Threads of a warp are not taken to wait for each other."""
        if np.any(offset < 0) or np.any(offset + size > self.bytes.shape[1]) or np.any(offset % size):
            raise PTXError(f"shared memory, out of bounds or misaligned: {name}")
        now = self.barriers[block]
        for j in range(size):
            at = block, offset + j
            if np.any((self.written_at[at] == now) & (self.writer[at] != thread)):
                raise PTXError(f"race in shared memory, no barrier after a write: {name}")
            _, inverse, count = np.unique(
                block * self.bytes.shape[1] + offset + j, return_inverse=True, return_counts=True
            )
            several = count[inverse] > 1
            if store:
                if np.any(several) or np.any((self.read_at[at] == now) & (self.reader[at] != thread)):
                    raise PTXError(f"race in shared memory, a write beside another access: {name}")
                self.writer[at], self.written_at[at] = thread, now
            else:
                if np.any(self.written_at[at] < 0):
                    raise PTXError(f"shared memory that nothing has written: {name}")
                more = several | ((self.read_at[at] == now) & (self.reader[at] != thread))
                self.reader[at], self.read_at[at] = np.where(more, -2, thread), now


class Machine(Instructions):
    """One launch: blocks of threads on a memory, with the bits of the arguments."""

    def __init__(self, module, blocks, threads, arguments, memory):
        self.module, self.memory, self.threads, self.blocks = module, memory, threads, blocks
        self.n = blocks * threads
        place = np.arange(self.n)
        self.block, self.thread = place // threads, place % threads
        self.lane, self.warp = self.thread % 32, self.block * -(-threads // 32) + self.thread // 32
        self.special = {"%tid.x": self.thread.astype(np.uint32), "%ctaid.x": self.block.astype(np.uint32)}
        self.registers, self.parameters = {}, dict(zip(module.parameters, arguments, strict=True))
        self.shared = SharedMemory(blocks, module.shared_size)
        self.votes, self.vote = np.zeros(self.n, bool), None
        self.accesses = Counter()  # ("ld" or "st", bytes): threads
        self.sectors = {"ld": Counter(), "st": Counter()}  # of each buffer, by its address: as a warp asks for them

    def run(self, most_steps=200_000):
        pc, alive, waiting = np.zeros(self.n, np.int64), np.ones(self.n, bool), np.zeros(self.n, bool)
        with np.errstate(all="ignore"):
            for _ in range(most_steps):
                ready = alive & ~waiting
                if not ready.any():
                    if not alive.any():
                        return self
                    self._release(alive, waiting)
                    ready = alive & ~waiting
                at = pc[ready].min()
                active = ready & (pc == at)
                if at >= len(self.module.code):
                    alive[active] = False
                    continue
                pc[active] = at + 1
                self._step(*self.module.code[at], active, pc, alive, waiting)
        raise PTXError("too many steps: an endless loop?")

    def _step(self, name, condition, operands, active, pc, alive, waiting):
        if condition is not None:
            holds = np.zeros(self.n, bool)
            holds[active] = self.predicate(condition[0], active) ^ condition[1]
            active = holds
            if not active.any():
                return
        head = name.split(".")[0]
        if head == "bra":
            pc[active] = self.module.labels[operands[0]]
        elif head == "ret":
            alive[active] = False
        elif head == "bar":
            self._arrive(name, operands, active)
            waiting |= active
        else:
            getattr(self, "do_" + head, self.unknown)(name, operands, active)

    def _arrive(self, name, operands, active):
        if name == "bar.sync" and operands == ["0"]:
            self.vote = None
        elif name in ("bar.red.or.pred", "bar.red.and.pred") and operands[1] == "0" and len(operands) == 3:
            self.votes[active] = self.predicate(operands[2], active)
            self.vote = operands[0], np.any if ".or." in name else np.all
        else:
            raise PTXError(f"barrier not known: {name} {operands}")

    def _release(self, alive, waiting):
        for block in range(self.blocks):
            mine = self.block == block
            if not waiting[mine].any():
                continue
            if not waiting[mine].all():
                raise PTXError("a barrier that not all threads of the block reach")
            self.shared.barriers[block] += 1
            waiting[mine] = False
            if self.vote:
                self.write(self.vote[0], np.full(self.threads, self.vote[1](self.votes[mine])), mine)

    def unknown(self, name, operands, active):
        raise PTXError(f"instruction not known: {name} {', '.join(operands)}")

    # -- memory
    def _address(self, operand, active):
        base, _, offset = operand.strip("[] ").partition("+")
        return self.bits(base, 64, active) + np.uint64(int(offset or "0", 0) & 0xFFFF_FFFF_FFFF_FFFF)

    def _access(self, name, operand, size, active, data=None):
        """The bytes that each thread reads, or None where it writes those in data."""
        address, kind = self._address(operand, active), name[:2]
        if ".shared" in name or (address >= SHARED).all():
            offset = address.astype(np.int64) if ".shared" in name else (address - SHARED).astype(np.int64)
            block = self.block[active]
            self.shared.touch(block, self.thread[active], offset, size, data is not None, name)
            at = block[:, None], offset[:, None] + np.arange(size)
            if data is None:
                return self.shared.bytes[at]
            self.shared.bytes[at] = data
            return None
        which, offset = self.memory.places(address, size, name)
        self.accesses[kind, size] += len(address)
        asked = np.unique(np.stack([self.warp[active].astype(np.uint64), address // np.uint64(SECTOR)]), axis=1)[1]
        for sector, count in zip(*np.unique(asked, return_counts=True), strict=True):
            buffer = np.searchsorted(self.memory.starts // np.uint64(SECTOR), sector, side="right") - 1
            self.sectors[kind][int(self.memory.starts[max(buffer, 0)])] += int(count)
        found = np.empty((len(address), size), np.uint8)
        for b in np.unique(which):
            mine = which == b
            at = offset[mine][:, None] + np.arange(size)
            if data is None:
                found[mine] = self.memory.buffers[b][at]
            else:
                self.memory.buffers[b][at] = data[mine]
        return found

    def do_ld(self, name, operands, active):
        bits = BITS[name.split(".")[-1]]
        if ".param" in name:
            value = np.full(int(active.sum()), self.parameters[operands[1].strip("[]")])
            self.write(operands[0], value, active)
            return
        targets = split(operands[0].strip("{}"))
        loaded = self._access(name, operands[1], bits // 8 * len(targets), active)
        values = np.ascontiguousarray(loaded).view(f"u{bits // 8}")
        for j, target in enumerate(targets):
            self.write(target, values[:, j].astype(f"u{max(bits, 16) // 8}"), active)

    def do_st(self, name, operands, active):
        bits = BITS[name.split(".")[-1]]
        values = [self.bits(v, bits, active) for v in split(operands[1].strip("{}"))]
        data = np.ascontiguousarray(np.stack(values, axis=1)).view(np.uint8)
        self._access(name, operands[0], data.shape[1], active, data)

    def do_cvta(self, name, operands, active):
        address = self.bits(operands[1], 64, active)
        if "shared" in name:
            address = address - SHARED if ".to." in name else address + SHARED
        self.write(operands[0], address, active)

    def do_shfl(self, name, operands, active):
        if not name.startswith("shfl.sync.bfly"):
            self.unknown(name, operands, active)
        target, ok = ([*operands[0].split("|"), "_"])[:2]
        distance, _, mask = (self.bits(o, 32, active).astype(np.int64) for o in operands[2:5])
        lane, warp = self.lane[active], self.warp[active]
        here = np.zeros(self.warp.max() + 1, np.int64)
        np.bitwise_or.at(here, warp, 1 << lane)
        if np.any(mask & ~here[warp]):
            raise PTXError(f"{name}: a lane that the mask names is not here")
        values = np.zeros(self.n, np.uint32)
        values[active] = self.bits(operands[1], 32, active)
        source = np.nonzero(active)[0] - lane + (lane ^ distance)
        if np.any((mask >> (lane ^ distance)) & 1 == 0):
            raise PTXError(f"{name}: reads a lane that the mask does not name")
        self.write(target, values[source], active)
        self.write(ok, np.ones(len(source), bool), active)
