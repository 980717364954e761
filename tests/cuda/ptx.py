"""Run numba.cuda kernels without a GPU: execute their compiled PTX, thread by thread, on NumPy arrays.

It runs what the compiler produced (vector loads, shuffles, conversions, 32-bit index arithmetic), which
the Numba simulator does not. It also checks what a GPU would not forgive, and counts memory traffic:

    from ptx_run import launch
    stats = launch(kernel, grid, block, (x, w, y, n, eps), cc=(9, 0))   # y is written in place
    stats.array_reads      # per array: 32-byte sectors fetched over its own; 1.0 = each byte fetched once
    stats.access_bytes     # ("ld", 16) -> how many thread loads were 16 bytes wide

`kernel` is a `@cuda.jit` dispatcher or its plain Python function. Arrays are NumPy arrays (C-contiguous
ones are typed 'C', others 'A'); device memory is their own memory. Raises PTXError on an access out of
bounds or misaligned, a barrier that not every thread reaches, a shuffle whose lanes are not all there,
a read of shared memory that nothing wrote, a shared-memory race, and an opcode it does not know.
Speed: about 10 µs per instruction for up to some 10,000 threads at once; keep grids small.
Needs numba-cuda with NVVM (`pip install "numba-cuda[cu13]"`).
"""
from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SHARED_BASE = np.uint64(0x7000_0000_0000_0000)
LOCAL_BASE = np.uint64(0x7100_0000_0000_0000)
U = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES = {
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": "bf16",
}


class PTXError(Exception):
    pass


@dataclass
class Stats:
    """Traffic of one launch. A sector is 32 bytes; `min` counts each touched sector once."""
    sectors_read: int = 0
    sectors_written: int = 0
    sectors_min_read: int = 0
    sectors_min_written: int = 0
    instructions: int = 0                                   # thread instructions
    access_bytes: Counter = field(default_factory=Counter)  # ("ld"|"st", bytes per thread) -> thread count
    opcodes: Counter = field(default_factory=Counter)
    array_reads: list = field(default_factory=list)         # per array argument: sectors fetched / its sectors
    array_writes: list = field(default_factory=list)


def _bf16_to_f32(u):
    return (u.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _f32_to_bf16(f):
    u = np.ascontiguousarray(f, np.float32).view(np.uint32)
    r = ((u.astype(np.uint64) + 0x7FFF + ((u >> 16) & 1)) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(f), np.uint16(0x7FFF), r)


def as_type(bits, t):
    """Register bits (unsigned array) seen as PTX type t."""
    dt = TYPES[t]
    if dt == "bf16":
        return _bf16_to_f32(bits.astype(np.uint16))
    size = np.dtype(dt).itemsize * 8
    return bits.astype(U[size], copy=False).view(dt) if bits.dtype.itemsize * 8 != size else bits.view(dt)


def to_bits(v, t):
    dt = TYPES[t]
    if dt == "bf16":
        return _f32_to_bf16(v)
    v = np.ascontiguousarray(v, dt)
    return v.view(U[v.dtype.itemsize * 8])


# ---------------------------------------------------------------------------------------------- parsing
def _split_args(s):
    out, depth, cur = [], 0, ""
    for c in s:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            out.append(cur.strip()); cur = ""
        else:
            cur += c
    if cur.strip():
        out.append(cur.strip())
    return out


class Module:
    def __init__(self, ptx):
        text = re.sub(r"//[^\n]*", "", ptx)
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        self.shared, self.shared_size = {}, 0
        self.globals = {}
        for m in re.finditer(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
            al, name, size = int(m[1]), m[2], int(m[3] or 0)
            off = -(-self.shared_size // al) * al
            self.shared[name] = off
            self.shared_size = off + size
        m = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{(.*)\}", text, flags=re.S)
        if not m:
            raise PTXError("no .entry in the PTX")
        if re.search(r"\.func\b", text):
            raise PTXError("calls to .func are not supported: let the compiler inline device functions")
        self.name = m[1]
        self.params = [(p.group(2), p.group(1)) for p in re.finditer(r"\.param\s+\.(\w+)\s+(?:\.ptr\s.*?)?([\w$]+)", m[2])]
        self.local_size = 0
        self.locals, self.code, self.labels = {}, [], {}
        body = m[4]
        for lm in re.finditer(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]\s*;", body):
            off = -(-self.local_size // int(lm[1])) * int(lm[1])
            self.locals[lm[2]] = off
            self.local_size = off + int(lm[3])
        for stmt in re.split(r";|(?<=:)\s*\n", body):
            s = " ".join(stmt.split())
            while (lab := re.match(r"^([$\w]+):\s*", s)):
                self.labels[lab[1]] = len(self.code)
                s = s[lab.end():]
            s = s.strip("{} ") if s in "{}" else s
            s = s.lstrip("} ")
            if s.startswith("{") and not re.match(r"^\{[^}]*\}\s*,", s):
                s = s[1:].strip()
            if not s or s.startswith("."):
                continue
            pred = None
            if (pm := re.match(r"^@(!?)(%\w+)\s+", s)):
                pred = (pm[2], bool(pm[1])); s = s[pm.end():]
            op, _, rest = s.partition(" ")
            self.code.append((op, pred, _split_args(rest)))


# ---------------------------------------------------------------------------------------------- machine
class Machine:
    def __init__(self, module, grid, block, arg_bits, buffers, dynamic_shared=0, max_steps=2_000_000):
        self.m = module
        g, b = [(tuple(v) + (1, 1, 1))[:3] if isinstance(v, (tuple, list)) else (v, 1, 1) for v in (grid, block)]
        nb, nt = int(np.prod(g)), int(np.prod(b))
        self.nt, n = nt, nb * nt
        lane = np.arange(n)
        self.block, self.tid = lane // nt, lane % nt
        t, k = self.tid, self.block
        u32 = lambda a: np.broadcast_to(np.asarray(a, np.uint32), (n,)).copy()
        self.special = {
            "%tid.x": u32(t % b[0]), "%tid.y": u32(t // b[0] % b[1]), "%tid.z": u32(t // (b[0] * b[1])),
            "%ntid.x": u32(b[0]), "%ntid.y": u32(b[1]), "%ntid.z": u32(b[2]),
            "%ctaid.x": u32(k % g[0]), "%ctaid.y": u32(k // g[0] % g[1]), "%ctaid.z": u32(k // (g[0] * g[1])),
            "%nctaid.x": u32(g[0]), "%nctaid.y": u32(g[1]), "%nctaid.z": u32(g[2]),
            "%laneid": u32(t % 32), "%warpid": u32(t // 32), "WARP_SZ": u32(32),
        }
        self.n, self.nb = n, nb
        self.warps_per_block = -(-nt // 32)
        self.warp = self.block * self.warps_per_block + t // 32     # global warp number
        self.lane32 = t % 32
        self.reg, self.params = {}, dict(zip([p for p, _ in module.params], arg_bits))
        self.bufs = sorted(buffers, key=lambda x: x.ctypes.data)    # flat uint8 views
        self.starts = np.array([x.ctypes.data for x in self.bufs], np.uint64)
        self.ends = self.starts + np.array([x.size for x in self.bufs], np.uint64)
        ssize = module.shared_size + dynamic_shared
        self.smem = np.zeros((nb, max(ssize, 1)), np.uint8)
        shape = self.smem.shape
        self.s_written = np.zeros(shape, bool)
        self.s_wtid = np.full(shape, -1); self.s_wep = np.full(shape, -1); self.s_wwep = np.full(shape, -1)
        self.s_rtid = np.full(shape, -1); self.s_rep = np.full(shape, -1); self.s_rwep = np.full(shape, -1)
        self.s_rmany = np.zeros(shape, bool)
        self.bepoch = np.zeros(nb, int); self.wepoch = np.zeros(nb * self.warps_per_block, int)
        self.lmem = np.zeros((n, max(module.local_size, 1)), np.uint8)
        self.voting, self.vote = np.zeros(n, bool), None
        self.stats, self.max_steps = Stats(), max_steps
        self.rsec, self.wsec = [], []
        self.per_buffer = {"ld": np.zeros(len(self.bufs), int), "st": np.zeros(len(self.bufs), int)}

    # -- operands
    def read(self, o, t, act):
        """Operand o as PTX type t for the active lanes."""
        return as_type(self.bits(o, t, act), t)

    def bits(self, o, t, act):
        if o.startswith("%") or o in self.special:
            if o in self.special:
                return self.special[o][act]
            if o not in self.reg:
                raise PTXError(f"register {o} read before it was written")
            return self.reg[o][act]
        k = int(act.sum())
        if o in self.m.shared:
            return np.full(k, self.m.shared[o], np.uint64)
        if o in self.m.locals:
            return np.full(k, self.m.locals[o], np.uint64)
        if (h := re.match(r"^0[fF]([0-9A-Fa-f]{8})$", o)):
            v = np.full(k, int(h[1], 16), np.uint32)
            return v
        if (h := re.match(r"^0[dD]([0-9A-Fa-f]{16})$", o)):
            return np.full(k, int(h[1], 16), np.uint64)
        dt = TYPES.get(t, np.uint64)
        size = 16 if dt == "bf16" else np.dtype(dt).itemsize * 8
        try:
            return np.full(k, int(o, 0) & ((1 << size) - 1), U[size])
        except ValueError:
            raise PTXError(f"operand {o!r} not understood") from None

    def write(self, o, bits, act):
        if o == "_":
            return
        r = self.reg.get(o)
        if r is None or r.dtype != bits.dtype:
            r = self.reg[o] = np.zeros(self.n, bits.dtype) if r is None else r.astype(bits.dtype)
        r[act] = bits

    def pred(self, o, act):
        return self.reg[o][act].astype(bool)

    # -- memory
    def address(self, o, act):
        o = o.strip("[] ")
        base, off = o, 0
        if (p := re.match(r"^(.+?)\s*\+\s*(-?\w+)$", o)):
            base, off = p[1], int(p[2], 0)
        a = self.bits(base, "u64", act).astype(np.uint64)
        return a + np.uint64(off & 0xFFFF_FFFF_FFFF_FFFF)

    def _space(self, space, addr, act, op):
        if space in ("shared", "local", "global"):
            return space, addr
        if addr.size and addr[0] >= LOCAL_BASE:
            return "local", addr - LOCAL_BASE
        if addr.size and addr[0] >= SHARED_BASE:
            return "shared", addr - SHARED_BASE
        return "global", addr

    def _count(self, addr, size, act, kind):
        w = self.warp[act].astype(np.uint64)
        first, last = addr >> np.uint64(5), (addr + np.uint64(size - 1)) >> np.uint64(5)
        secs = np.unique(np.stack([np.r_[w, w], np.r_[first, last]]), axis=1)
        owner = np.searchsorted(self.starts >> np.uint64(5), secs[1], side="right") - 1
        self.per_buffer[kind] += np.bincount(np.maximum(owner, 0), minlength=len(self.bufs))
        if kind == "ld":
            self.stats.sectors_read += secs.shape[1]; self.rsec.append(np.unique(secs[1]))
        else:
            self.stats.sectors_written += secs.shape[1]; self.wsec.append(np.unique(secs[1]))
        self.stats.access_bytes[(kind, size)] += addr.size

    def _global(self, addr, size, op):
        if np.any(addr % np.uint64(size)):
            raise PTXError(f"misaligned {size}-byte access: {op}")
        which = np.searchsorted(self.starts, addr, side="right") - 1
        bad = (which < 0) | (addr + np.uint64(size) > self.ends[which])
        if np.any(bad):
            i = int(np.argmax(bad))
            raise PTXError(f"{op}: access of {size} bytes out of bounds, lane {i} of the active ones, "
                           f"{int(addr[i]) - int(self.ends[max(which[i], 0)])} bytes past the end of buffer {which[i]}")
        return which

    def load(self, space, addr, esize, nvec, act, op):
        """(nvec, lanes) raw elements."""
        space, addr = self._space(space, addr, act, op)
        size = esize * nvec
        if space == "global":
            which = self._global(addr, size, op)
            self._count(addr, size, act, "ld")
            out = np.empty((addr.size, size), np.uint8)
            for b in np.unique(which):
                sel = which == b
                off = (addr[sel] - self.starts[b]).astype(np.int64)
                out[sel] = self.bufs[b][off[:, None] + np.arange(size)]
        else:
            mem, row, off = self._onchip(space, addr, size, act, op, store=False)
            out = mem[row[:, None], off[:, None] + np.arange(size)]
        return np.ascontiguousarray(out).view(U[esize * 8]).T

    def store(self, space, addr, vals, act, op):
        space, addr = self._space(space, addr, act, op)
        raw = np.ascontiguousarray(np.stack(vals, 1)).view(np.uint8).reshape(addr.size, -1)
        size = raw.shape[1]
        if space == "global":
            which = self._global(addr, size, op)
            self._count(addr, size, act, "st")
            for b in np.unique(which):
                sel = which == b
                off = (addr[sel] - self.starts[b]).astype(np.int64)
                self.bufs[b][off[:, None] + np.arange(size)] = raw[sel]
        else:
            mem, row, off = self._onchip(space, addr, size, act, op, store=True, raw=raw)
            mem[row[:, None], off[:, None] + np.arange(size)] = raw

    def _onchip(self, space, addr, size, act, op, store, raw=None):
        off = addr.astype(np.int64)
        mem = self.smem if space == "shared" else self.lmem
        if np.any(off < 0) or np.any(off + size > mem.shape[1]):
            raise PTXError(f"{op}: {space} access out of bounds")
        if np.any(off % size):
            raise PTXError(f"misaligned {size}-byte {space} access: {op}")
        row = self.block[act] if space == "shared" else np.nonzero(act)[0]
        if space == "shared":
            self._race(row, off, size, act, op, store, raw)
        return mem, row, off

    def _race(self, row, off, size, act, op, store, raw):
        tid, ep, wep = self.tid[act], self.bepoch[row], self.wepoch[self.warp[act]]
        def conflict(t, e, we):
            return (t >= 0) & (t != tid) & (e == ep) & ((t // 32 != tid // 32) | (we == wep))
        for j in range(size):
            ix = (row, off + j)
            if conflict(self.s_wtid[ix], self.s_wep[ix], self.s_wwep[ix]).any():
                raise PTXError(f"shared-memory race (write, then {'write' if store else 'read'} by another thread, no barrier): {op}")
            if store:
                many = self.s_rmany[ix] & (self.s_rep[ix] == ep)
                if conflict(self.s_rtid[ix], self.s_rep[ix], self.s_rwep[ix]).any() or \
                        (many & ((self.s_rtid[ix] // 32 != tid // 32) | (self.s_rwep[ix] == wep))).any():
                    raise PTXError(f"shared-memory race (read, then write by another thread, no barrier): {op}")
                key = row * self.smem.shape[1] + off + j
                _, first, cnt = np.unique(key, return_index=True, return_counts=True)
                if (cnt > 1).any():
                    raise PTXError(f"shared-memory race (two threads write one place): {op}")
                self.s_written[ix] = True
                self.s_wtid[ix], self.s_wep[ix], self.s_wwep[ix] = tid, ep, wep
            else:
                if not self.s_written[ix].all():
                    raise PTXError(f"shared memory read before anything was written: {op}")
                key = row * self.smem.shape[1] + off + j
                _, inv, cnt = np.unique(key, return_inverse=True, return_counts=True)
                earlier = (self.s_rep[ix] == ep) & (self.s_rtid[ix] >= 0) & (self.s_rtid[ix] != tid)
                self.s_rmany[ix] = (cnt[inv] > 1) | earlier | (self.s_rmany[ix] & (self.s_rep[ix] == ep))
                self.s_rtid[ix], self.s_rep[ix], self.s_rwep[ix] = tid, ep, wep

    # -- run
    def run(self):
        code, n = self.m.code, self.n
        pc = np.zeros(n, np.int64)
        live = np.ones(n, bool)
        wait = np.zeros(n, bool)
        steps = 0
        with np.errstate(all="ignore"):
            while live.any():
                ready = live & ~wait
                if not ready.any():
                    ready = self._release(live, wait)
                p = pc[ready].min()
                act = ready & (pc == p)
                if p >= len(code):
                    live[act] = False
                    continue
                op, pr, args = code[p]
                steps += 1
                if steps > self.max_steps:
                    raise PTXError("too many steps: an endless loop?")
                pc[act] = p + 1
                if pr is not None:
                    on = np.zeros(n, bool)
                    on[act] = self.pred(pr[0], act) ^ pr[1]
                    act = on
                    if not act.any():
                        continue
                head = op.split(".")[0]
                self.stats.instructions += int(act.sum()); self.stats.opcodes[op] += int(act.sum())
                if head == "bra":
                    pc[act] = self.m.labels[args[0]]
                elif head in ("ret", "exit"):
                    live[act] = False
                elif head in ("bar", "barrier"):
                    if "warp" in op:
                        self.wepoch[np.unique(self.warp[act])] += 1
                    elif ".red." in op:  # bar.red.or.pred d, 0, p
                        if args[1] != "0" or len(args) != 3:
                            raise PTXError("partial barriers are not supported")
                        self.voting[act] = self.pred(args[2].lstrip("!"), act) ^ args[2].startswith("!")
                        self.vote = (args[0], np.any if ".or." in op else np.all)
                        wait |= act
                    elif len(args) > 1:
                        raise PTXError("partial barriers are not supported")
                    else:
                        wait |= act
                        self.vote = None
                elif head in ("trap", "brkpt"):
                    raise PTXError("trap")
                else:
                    getattr(self, "op_" + head, self.unknown)(op, args, act)
        for name, secs in (("sectors_min_read", self.rsec), ("sectors_min_written", self.wsec)):
            setattr(self.stats, name, len(np.unique(np.concatenate(secs))) if secs else 0)
        return self.stats

    def _release(self, live, wait):
        freed = np.zeros(self.nb, bool)
        for b in range(self.nb):
            s = slice(b * self.nt, (b + 1) * self.nt)
            if wait[s].any():
                if not live[s].all() and not wait[s][live[s]].all():
                    raise PTXError("barrier not reached by every thread of the block")
                freed[b] = True
        if not freed.any():
            raise PTXError("deadlock")
        self.bepoch[freed] += 1
        for b in np.nonzero(freed)[0]:
            self.wepoch[b * self.warps_per_block:(b + 1) * self.warps_per_block] += 1
            wait[b * self.nt:(b + 1) * self.nt] = False
            if self.vote:
                mine = np.zeros(self.n, bool)
                mine[b * self.nt:(b + 1) * self.nt] = True
                self.write(self.vote[0], np.full(self.nt, self.vote[1](self.voting[mine])), mine)
        return live & ~wait

    def unknown(self, op, args, act):
        raise PTXError(f"opcode not supported: {op} {', '.join(args)}")

    # -- data movement
    def op_ld(self, op, a, act):
        parts = op.split(".")
        t = parts[-1]
        space = next((s for s in parts if s in ("param", "global", "shared", "local", "const")), "generic")
        nvec = int(next((s[1:] for s in parts if re.fullmatch(r"v[248]", s)), 1))
        if space == "param":
            name = a[1].strip("[]")
            self.write(a[0], np.broadcast_to(self.params[name], (int(act.sum()),)).copy(), act)
            return
        esize = 2 if t == "bf16" else np.dtype(TYPES[t]).itemsize
        vals = self.load(space, self.address(a[1], act), esize, nvec, act, op)
        dst = _split_args(a[0].strip("{}")) if nvec > 1 else [a[0]]
        for d, v in zip(dst, vals):
            v = v.copy()
            if t == "s8":
                v = v.view(np.int8).astype(np.int32).view(np.uint32)
            elif t in ("u8", "b8"):
                v = v.astype(np.uint16)
            self.write(d, v, act)

    op_ldu = op_ld

    def op_st(self, op, a, act):
        parts = op.split(".")
        t = parts[-1]
        space = next((s for s in parts if s in ("global", "shared", "local")), "generic")
        src = _split_args(a[1].strip("{}")) if a[1].startswith("{") else [a[1]]
        esize = 2 if t == "bf16" else np.dtype(TYPES[t]).itemsize
        vals = [self.bits(s, t, act).astype(U[esize * 8]) for s in src]
        self.store(space, self.address(a[0], act), vals, act, op)

    def op_prefetch(self, op, a, act):
        pass

    op_prefetchu = op_membar = op_fence = op_nanosleep = op_applypriority = op_discard = op_prefetch

    def op_cvta(self, op, a, act):
        v = self.bits(a[1], "u64", act).astype(np.uint64)
        base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(op.split(".")[2 if ".to." in op else 1], np.uint64(0))
        self.write(a[0], v - base if ".to." in op else v + base, act)

    def op_mov(self, op, a, act):
        t = op.split(".")[-1]
        if a[1].startswith("{"):
            src = _split_args(a[1].strip("{}"))
            size = int(t[1:]); w = size // len(src)
            out = np.zeros(int(act.sum()), U[size])
            for i, s in enumerate(src):
                if s.startswith("%") and s not in self.reg:  # half of a register that nothing depends on
                    continue
                out |= self.bits(s, f"b{w}", act).astype(U[w]).astype(U[size]) << U[size](w * i)
            self.write(a[0], out, act)
        elif a[0].startswith("{"):
            dst = _split_args(a[0].strip("{}"))
            size = int(t[1:]); w = size // len(dst)
            v = self.bits(a[1], t, act).astype(U[size])
            for i, d in enumerate(dst):
                self.write(d, (v >> U[size](w * i)).astype(U[w]), act)
        elif t == "pred":
            self.write(a[0], self.bits(a[1], "u8", act).astype(bool), act)
        else:
            self.write(a[0], self.bits(a[1], t, act).copy(), act)

    # -- arithmetic
    def _bin(self, op, a, act, f):
        t = op.split(".")[-1]
        if t == "pred":
            x, y = (self.pred(o, act) for o in a[1:3])
            self.write(a[0], f(x, y), act)
            return
        if t in ("f16x2", "bf16x2"):
            self._packed(op, a, act, f); return
        x, y = self.read(a[1], t, act), self.read(a[2], t, act)
        r = f(x, y)
        self.write(a[0], self._finish(r, op, t), act)

    def _finish(self, r, op, t):
        if t in ("f32", "f64", "f16"):
            r = r.astype(TYPES[t])
            if ".ftz" in op and t == "f32":
                r = np.where(np.abs(r) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), r), r)
            if ".sat" in op:
                r = np.clip(np.nan_to_num(r, nan=0), 0, 1).astype(TYPES[t])
        return to_bits(r, t)

    def _packed(self, op, a, act, f):
        t = op.split(".")[-1][:-2]
        xs = [self.bits(o, "b32", act).astype(np.uint32) for o in a[1:]]
        lo = to_bits(np.asarray(f(*[as_type((x & 0xFFFF).astype(np.uint16), t) for x in xs]), np.float32 if t == "bf16" else np.float16), t)
        hi = to_bits(np.asarray(f(*[as_type((x >> 16).astype(np.uint16), t) for x in xs]), np.float32 if t == "bf16" else np.float16), t)
        self.write(a[0], lo.astype(np.uint32) | (hi.astype(np.uint32) << np.uint32(16)), act)

    def op_add(self, op, a, act): self._bin(op, a, act, lambda x, y: x + y)
    def op_sub(self, op, a, act): self._bin(op, a, act, lambda x, y: x - y)
    def op_and(self, op, a, act): self._bin(op, a, act, lambda x, y: x & y)
    def op_or(self, op, a, act): self._bin(op, a, act, lambda x, y: x | y)
    def op_xor(self, op, a, act): self._bin(op, a, act, lambda x, y: x ^ y)

    def op_max(self, op, a, act): self._bin(op, a, act, np.maximum if ".NaN" in op or "f" not in op.split(".")[-1] else np.fmax)
    def op_min(self, op, a, act): self._bin(op, a, act, np.minimum if ".NaN" in op or "f" not in op.split(".")[-1] else np.fmin)

    def op_mul(self, op, a, act):
        parts, t = op.split("."), op.split(".")[-1]
        if "wide" in parts:
            x, y = (self.read(o, t, act).astype(np.int64 if t[0] == "s" else np.uint64) for o in a[1:3])
            if t in ("s16", "u16"):
                r = (x * y).astype(np.int32 if t[0] == "s" else np.uint32)
                self.write(a[0], r.view(np.uint32), act)
            else:
                self.write(a[0], (x * y).view(np.uint64), act)
        elif "hi" in parts:
            x, y = self.read(a[1], t, act), self.read(a[2], t, act)
            size = int(t[1:])
            r = np.array([(int(p) * int(q)) >> size for p, q in zip(x, y)], dtype=object)
            self.write(a[0], np.array([int(v) & ((1 << size) - 1) for v in r], U[size]), act)
        else:
            self._bin(op, a, act, lambda x, y: x * y)

    def op_mad(self, op, a, act):
        parts, t = op.split("."), op.split(".")[-1]
        if t[0] == "f":
            return self.op_fma(op, a, act)
        if "wide" in parts:
            big = "s64" if t[0] == "s" else "u64"
            x, y = (self.read(o, t, act).astype(TYPES[big]) for o in a[1:3])
            self.write(a[0], to_bits(x * y + self.read(a[3], big, act), big), act)
        else:
            x, y, z = (self.read(o, t, act) for o in a[1:4])
            self.write(a[0], to_bits(x * y + z, t), act)

    def op_fma(self, op, a, act):
        t = op.split(".")[-1]
        if t in ("f16x2", "bf16x2"):
            wide = lambda x, y, z: x.astype(np.float32) * y.astype(np.float32) + z.astype(np.float32)
            self._packed(op, a, act, wide); return
        wide = {"f32": np.float64, "f64": np.longdouble, "f16": np.float32, "bf16": np.float64}[t]
        x, y, z = (self.read(o, t, act).astype(wide) for o in a[1:4])
        self.write(a[0], self._finish(x * y + z, op, t) if t != "bf16" else to_bits((x * y + z).astype(np.float32), t), act)

    def op_div(self, op, a, act):
        t = op.split(".")[-1]
        x, y = self.read(a[1], t, act), self.read(a[2], t, act)
        if t[0] == "f":
            r = x / y
        else:
            q = np.where(y != 0, np.abs(x) // np.where(y != 0, np.abs(y), 1), 0)
            r = (np.sign(x) * np.sign(y) * q).astype(TYPES[t]) if t[0] == "s" else q.astype(TYPES[t])
        self.write(a[0], self._finish(r, op, t), act)

    def op_rem(self, op, a, act):
        t = op.split(".")[-1]
        x, y = self.read(a[1], t, act), self.read(a[2], t, act)
        self.write(a[0], to_bits(np.fmod(x, np.where(y == 0, 1, y)).astype(TYPES[t]), t), act)

    def _un(self, op, a, act, f):
        t = op.split(".")[-1]
        self.write(a[0], self._finish(f(self.read(a[1], t, act)), op, t), act)

    def op_sqrt(self, op, a, act): self._un(op, a, act, np.sqrt)
    def op_rsqrt(self, op, a, act): self._un(op, a, act, lambda v: 1 / np.sqrt(v.astype(np.float64)))
    def op_rcp(self, op, a, act): self._un(op, a, act, lambda v: 1 / v)
    def op_abs(self, op, a, act): self._un(op, a, act, np.abs)
    def op_ex2(self, op, a, act): self._un(op, a, act, np.exp2)
    def op_lg2(self, op, a, act): self._un(op, a, act, np.log2)
    def op_tanh(self, op, a, act): self._un(op, a, act, np.tanh)

    def op_neg(self, op, a, act):
        self._un(op, a, act, lambda v: -v)

    def op_not(self, op, a, act):
        t = op.split(".")[-1]
        if t == "pred":
            self.write(a[0], ~self.pred(a[1], act), act)
        else:
            self.write(a[0], ~self.bits(a[1], t, act).astype(U[int(t[1:])]), act)

    def op_shl(self, op, a, act):
        t = op.split(".")[-1]; size = int(t[1:])
        v, s = self.bits(a[1], t, act).astype(U[size]), self.bits(a[2], "u32", act).astype(np.uint64)
        self.write(a[0], np.where(s >= size, U[size](0), v << np.minimum(s, size - 1).astype(U[size])), act)

    def op_shr(self, op, a, act):
        t = op.split(".")[-1]; size = int(t[1:])
        v, s = self.read(a[1], t, act), self.bits(a[2], "u32", act).astype(np.uint64)
        if t[0] == "s":
            r = v >> np.minimum(s, size - 1).astype(v.dtype)
        else:
            r = np.where(s >= size, v.dtype.type(0), v >> np.minimum(s, size - 1).astype(v.dtype))
        self.write(a[0], r.astype(v.dtype).view(U[size]), act)

    def op_clz(self, op, a, act):
        size = int(op.split(".")[-1][1:])
        v = self.bits(a[1], f"b{size}", act)
        self.write(a[0], np.array([size - int(x).bit_length() for x in v], np.uint32), act)

    def op_popc(self, op, a, act):
        v = self.bits(a[1], "b" + op.split(".")[-1][1:], act)
        self.write(a[0], np.array([bin(int(x)).count("1") for x in v], np.uint32), act)

    def op_bfe(self, op, a, act):
        t = op.split(".")[-1]; size = int(t[1:])
        v = self.bits(a[1], t, act).astype(U[size]); p = self.bits(a[2], "u32", act) & 255; ln = self.bits(a[3], "u32", act) & 255
        r = []
        for x, i, c in zip(v, p, ln):
            f = (int(x) >> int(i)) & ((1 << int(c)) - 1)
            if t[0] == "s" and c and f >> (int(c) - 1):
                f |= ((1 << size) - 1) ^ ((1 << int(c)) - 1)
            r.append(f & ((1 << size) - 1))
        self.write(a[0], np.array(r, U[size]), act)

    def op_prmt(self, op, a, act):
        x, y, s = (self.bits(o, "b32", act).astype(np.uint64) for o in a[1:4])
        both = x | (y << np.uint64(32)); out = np.zeros(x.size, np.uint32)
        for i in range(4):
            sel = (s >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> ((sel & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            byte = np.where(sel & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
            out |= (byte << np.uint64(8 * i)).astype(np.uint32)
        self.write(a[0], out, act)

    # -- compare, select, convert
    def op_setp(self, op, a, act):
        parts = op.split("."); t = parts[-1]; c = parts[1]
        x, y = self.read(a[1], t, act), self.read(a[2], t, act)
        unordered = np.isnan(x) | np.isnan(y) if t in ("f16", "f32", "f64", "bf16") else None
        base = c[:-1] if c in ("equ", "neu", "ltu", "leu", "gtu", "geu") else {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(c, c)
        if c == "num": r = ~unordered
        elif c == "nan": r = unordered
        else:
            r = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}[base](x, y)
            if unordered is not None:
                r = r | unordered if c.endswith("u") else r & ~unordered
        if len(a) > 3:
            q = self.pred(a[3].lstrip("!"), act) ^ a[3].startswith("!")
            r = {"and": r & q, "or": r | q, "xor": r ^ q}[next(p for p in parts if p in ("and", "or", "xor"))]
        d = a[0].split("|")
        self.write(d[0].strip(), r, act)
        if len(d) > 1:
            self.write(d[1].strip(), ~r, act)

    def op_selp(self, op, a, act):
        t = op.split(".")[-1]
        x, y = self.bits(a[1], t, act), self.bits(a[2], t, act)
        size = np.dtype(TYPES[t]).itemsize * 8
        self.write(a[0], np.where(self.pred(a[3], act), x.astype(U[size]), y.astype(U[size])), act)

    def op_cvt(self, op, a, act):
        parts = op.split("."); dst, src = parts[-2], parts[-1]
        if dst in ("f16x2", "bf16x2"):
            t = dst[:-2]
            hi, lo = (to_bits(self.read(o, "f32", act).astype(np.float32 if t == "bf16" else np.float16), t) for o in a[1:3])
            self.write(a[0], lo.astype(np.uint32) | (hi.astype(np.uint32) << np.uint32(16)), act)
            return
        x = self.read(a[1], src, act)
        sf, df = src in ("f16", "f32", "f64", "bf16"), dst in ("f16", "f32", "f64", "bf16")
        if df:
            if "rz" in parts and dst == "f32":
                y = x.astype(np.float32)
                over = np.abs(y.astype(np.float64)) > np.abs(x.astype(np.float64))
                y = np.where(over, np.nextafter(y, np.float32(0)), y)
            elif dst == "bf16":
                y = x.astype(np.float32)
            else:
                y = x.astype(TYPES[dst])
            if sf and ("rni" in parts or "rzi" in parts or "rmi" in parts or "rpi" in parts):
                y = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[next(p for p in parts if p in ("rni", "rzi", "rmi", "rpi"))](y)
            if "sat" in parts:
                y = np.clip(np.nan_to_num(y, nan=0), 0, 1)
            self.write(a[0], to_bits(y, dst), act)
        elif sf:
            f = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[next(p for p in parts if p in ("rni", "rzi", "rmi", "rpi"))]
            info = np.iinfo(TYPES[dst])
            v = np.nan_to_num(f(x.astype(np.longdouble)), nan=0)
            self.write(a[0], to_bits(np.clip(v, info.min, info.max).astype(TYPES[dst]), dst), act)
        else:
            y = x.astype(TYPES[dst])
            if "sat" in parts:
                info = np.iinfo(TYPES[dst]); y = np.clip(x.astype(object), info.min, info.max).astype(TYPES[dst])
            if dst in ("s8", "u8"):
                y = y.astype(np.int16 if dst == "s8" else np.uint16); self.write(a[0], y.view(np.uint16), act)
            else:
                self.write(a[0], to_bits(y, dst), act)

    # -- warps
    def op_shfl(self, op, a, act):
        if "sync" not in op:
            raise PTXError("shfl without .sync")
        mode = op.split(".")[2]
        d = a[0].split("|")
        v = np.zeros(self.n, np.uint32)
        v[act] = self.bits(a[1], "b32", act).astype(np.uint32)
        b, c, mask = (self.bits(o, "u32", act).astype(np.int64) for o in a[2:5])
        lane, warp, tid = self.lane32[act], self.warp[act], np.nonzero(act)[0]
        here = np.zeros(self.nb * self.warps_per_block, np.int64)
        np.bitwise_or.at(here, warp, 1 << lane)
        exist = np.zeros_like(here); np.bitwise_or.at(exist, self.warp, 1 << self.lane32)
        if np.any((mask & exist[warp]) & ~here[warp]) or np.any(mask & ~exist[warp] & 0xFFFFFFFF):
            raise PTXError(f"{op}: a lane named in the mask is not here")
        clamp, seg = c & 31, (c >> 8) & 31
        lo = lane & seg; maxl = lo | (clamp & ~seg)
        j = {"bfly": lane ^ b, "up": lane - b, "down": lane + b, "idx": lo | (b & ~seg)}[mode]
        ok = j >= maxl if mode == "up" else j <= maxl
        j = np.where(ok, j, lane)
        src = tid - lane + j
        if np.any(~act[src]):
            raise PTXError(f"{op}: reads a lane that is not active")
        self.write(d[0].strip(), v[src], act)
        if len(d) > 1:
            self.write(d[1].strip(), ok, act)

    def op_vote(self, op, a, act):
        p = self.pred(a[1].lstrip("!"), act) ^ a[1].startswith("!")
        w = self.warp[act]; k = self.nb * self.warps_per_block
        if ".ballot." in op:
            r = np.zeros(k, np.int64); np.bitwise_or.at(r, w, np.where(p, 1 << self.lane32[act], 0))
            self.write(a[0], r[w].astype(np.uint32), act)
        else:
            yes = np.bincount(w, p, k)[w]; tot = np.bincount(w, minlength=k)[w]
            r = yes > 0 if ".any." in op else (yes == tot if ".all." in op else (yes == tot) | (yes == 0))
            self.write(a[0], r, act)

    def op_activemask(self, op, a, act):
        r = np.zeros(self.nb * self.warps_per_block, np.int64)
        np.bitwise_or.at(r, self.warp[act], 1 << self.lane32[act])
        self.write(a[0], r[self.warp[act]].astype(np.uint32), act)

    def op_atom(self, op, a, act):
        raise PTXError(f"atomic operation: {op} (results would depend on the order)")

    op_red = op_atom


# ---------------------------------------------------------------------------------------------- numba
def compile_kernel(kernel, args, cc=(9, 0), fastmath=False):
    """PTX of `kernel` for the types of args."""
    from numba import cuda
    fn = getattr(kernel, "py_func", kernel)
    types = tuple(_type_of(a) for a in args)
    options = {}
    target = getattr(kernel, "targetoptions", {})
    for key in ("fastmath", "opt", "max_registers"):
        if key in target and target[key] is not None:
            options[key] = target[key]
    if fastmath:
        options["fastmath"] = True
    options.pop("max_registers", None)
    ptx, _ = cuda.compile_ptx(fn, types, cc=cc, **options)
    return ptx


def _type_of(a):
    import numba.cuda.types as ct
    from numba.cuda.np import numpy_support
    if isinstance(a, np.ndarray):
        layout = "C" if a.flags.c_contiguous else "F" if a.flags.f_contiguous else "A"
        return ct.Array(numpy_support.from_dtype(a.dtype), a.ndim, layout)
    if isinstance(a, tuple):
        return ct.Tuple([_type_of(v) for v in a])
    if isinstance(a, (bool, np.bool_)):
        return ct.boolean
    if isinstance(a, np.generic):
        return numpy_support.from_dtype(a.dtype)
    return ct.int64 if isinstance(a, int) else ct.float64


def _flatten(args):
    for a in args:
        if isinstance(a, tuple):
            yield from _flatten(a)
        elif isinstance(a, np.ndarray):
            yield from (np.uint64(0), np.uint64(0), np.int64(a.size), np.int64(a.itemsize), np.uint64(a.ctypes.data))
            yield from (np.int64(s) for s in a.shape)
            yield from (np.int64(s) for s in a.strides)
        elif isinstance(a, np.generic):
            yield a
        else:
            yield np.uint8(a) if isinstance(a, bool) else np.int64(a) if isinstance(a, int) else np.float64(a)


def _memory(a):
    lo, hi = np.lib.array_utils.byte_bounds(a)
    import ctypes
    return np.frombuffer((ctypes.c_uint8 * max(hi - lo, 1)).from_address(lo), np.uint8)


def launch(kernel, grid, block, args, *, cc=(9, 0), shared=0, ptx=None):
    """Compile (unless ptx is given) and execute; arrays in args are changed in place. Returns Stats."""
    if ptx is None:
        ptx = compile_kernel(kernel, args, cc)
    module = Module(ptx)
    flat = list(_flatten(args))
    if len(flat) != len(module.params):
        raise PTXError(f"{len(flat)} flattened arguments for {len(module.params)} parameters")
    bits = []
    for v, (_, t) in zip(flat, module.params):
        v = np.asarray(v)
        if v.dtype.kind in "ui" and t in ("u8", "b8", "u16", "u32", "u64", "b16", "b32", "b64", "s32", "s64"):
            size = max(int(t[1:]), 16)
            bits.append(np.array(int(v) & ((1 << size) - 1), U[size]))
        else:
            bits.append(np.array([v]).view(U[v.dtype.itemsize * 8])[0])
    arrays = [a for a in _arrays(args) if a.size]
    mem, seen = [], set()
    for a in arrays:
        m = _memory(a)
        key = (m.ctypes.data, m.size)
        if key not in seen:
            seen.add(key); mem.append(m)
    mem.sort(key=lambda m: (m.ctypes.data, -m.size))
    keep = []
    for m in mem:                                           # a view inside a kept buffer needs no entry
        if not (keep and m.ctypes.data + m.size <= keep[-1].ctypes.data + keep[-1].size):
            keep.append(m)
    machine = Machine(module, grid, block, bits, keep, dynamic_shared=shared)
    stats = machine.run()
    for a in arrays:
        b = int(np.searchsorted(machine.starts, np.uint64(_memory(a).ctypes.data), side="right")) - 1
        total = -(-machine.bufs[b].size // 32)
        stats.array_reads.append(machine.per_buffer["ld"][b] / total)
        stats.array_writes.append(machine.per_buffer["st"][b] / total)
    stats.ptx = ptx
    return stats


def _arrays(args):
    for a in args:
        if isinstance(a, tuple):
            yield from _arrays(a)
        elif isinstance(a, np.ndarray):
            yield a
