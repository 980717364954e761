"""The instructions of PTX that compute: each on the registers of all threads that are at it."""

from __future__ import annotations

import re

import numpy as np

BITS = {f"{letter}{bits}": bits for letter in "busf" for bits in (8, 16, 32, 64)} | {"bf16": 16}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


class PTXError(Exception):
    """What a GPU would not do, or do wrongly; or what is not known here."""


def split(text):
    """Operands, at the commas that are not in brackets."""
    return [part.strip() for part in re.split(r",\s*(?![^{\[]*[}\]])", text) if part.strip()]


def as_type(bits, kind):
    """Bits of a register as numbers."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(f"u{BITS[kind] // 8}").view(
        FLOATS.get(kind) or f"{'i' if kind[0] == 's' else 'u'}{BITS[kind] // 8}"
    )


def to_bits(values, kind):
    """Numbers as bits of a register."""
    if kind == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> np.uint64(16)).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)
    kind_ = FLOATS.get(kind) or f"{'i' if kind[0] == 's' else 'u'}{BITS[kind] // 8}"
    return np.ascontiguousarray(values).astype(kind_).view(f"u{BITS[kind] // 8}")


def fused(x, y, z):
    """x · y + z, rounded once."""
    if x.dtype == np.float32:
        return (x.astype(np.float64) * y + z.astype(np.float64)).astype(np.float32)
    (x_head, x_tail), (y_head, y_tail) = map(_halves, (x, y))
    wide = z + x_head * y_head  # products of halves are exact, and where this cancels, so are the sums
    exact = ((wide + (x_head * y_tail + x_tail * y_head)) + x_tail * y_tail).astype(np.float64)
    return np.where(np.isfinite(exact), exact, x * y + z)


def flushed(x):
    """Zero in place of what is subnormal, as instructions with .ftz take and give it."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def _halves(a):
    """Two numbers of 27 bits, whose sum is a, in longdouble."""
    head = (a.view(np.uint64) & ~np.uint64(2**27 - 1)).view(np.float64).astype(np.longdouble)
    return head, a - head


class Instructions:
    """For `ptx.Machine`, which has the registers."""

    def bits(self, operand, bits, active):
        """The operand's bits, of the active threads."""
        kind = f"u{bits // 8}"
        if operand in self.special:
            return self.special[operand][active].astype(kind)
        if operand.startswith("%"):
            if operand not in self.registers:
                raise PTXError(f"{operand} is read before it is written")
            return self.registers[operand][active].astype(kind)
        count = int(active.sum())
        if operand in self.module.shared:
            return np.full(count, self.module.shared[operand], kind)
        if number := re.match(r"^0[fFdD]([0-9A-Fa-f]+)$", operand):
            return np.full(count, int(number[1], 16), kind)
        return np.full(count, int(operand, 0) & ((1 << bits) - 1), kind)

    def value(self, operand, kind, active):
        return as_type(self.bits(operand, BITS[kind], active), kind)

    def predicate(self, operand, active):
        if operand.startswith("!"):
            return ~self.predicate(operand[1:], active)
        return self.registers[operand][active].astype(bool)

    def write(self, register, bits, active):
        if register == "_":
            return
        if register not in self.registers or self.registers[register].dtype != bits.dtype:
            old = self.registers.get(register)
            self.registers[register] = np.zeros(self.n, bits.dtype) if old is None else old.astype(bits.dtype)
        self.registers[register][active] = bits

    def _apply(self, name, operands, active, function):
        kind = name.split(".")[-1]
        if kind == "pred":
            found = function(*(self.predicate(o, active) for o in operands[1:]))
        else:
            found = to_bits(function(*(self.value(o, kind, active) for o in operands[1:])), kind)
        self.write(operands[0], found, active)

    def do_add(self, *a):
        self._apply(*a, np.add)

    def do_sub(self, *a):
        self._apply(*a, np.subtract)

    def do_and(self, *a):
        self._apply(*a, np.bitwise_and)

    def do_or(self, *a):
        self._apply(*a, np.bitwise_or)

    def do_xor(self, *a):
        self._apply(*a, np.bitwise_xor)

    def do_not(self, *a):
        self._apply(*a, np.invert)

    def do_neg(self, *a):
        self._apply(*a, np.negative)

    def do_abs(self, *a):
        self._apply(*a, np.abs)

    def do_copysign(self, *a):
        self._apply(*a, lambda sign, size: np.copysign(size, sign))

    def do_max(self, name, operands, active):
        self._apply(name, operands, active, np.fmax if ".f" in name else np.maximum)

    def do_min(self, name, operands, active):
        self._apply(name, operands, active, np.fmin if ".f" in name else np.minimum)

    def do_mul(self, name, operands, active):
        if ".wide" in name:
            kind = name.split(".")[-1]
            x, y = (self.value(o, kind, active).astype(f"{'i' if kind[0] == 's' else 'u'}8") for o in operands[1:])
            self.write(operands[0], (x * y).view(np.uint64), active)
        elif ".hi" in name:
            self.unknown(name, operands, active)
        else:
            self._apply(name, operands, active, np.multiply)

    def do_mad(self, name, operands, active):
        kind = name.split(".")[-1]
        if ".wide" in name:
            big = kind.replace("32", "64")
            x, y = (self.value(o, kind, active).astype(f"{'i' if kind[0] == 's' else 'u'}8") for o in operands[1:3])
            self.write(operands[0], to_bits(x * y + self.value(operands[3], big, active), big), active)
        else:
            self._apply(name, operands, active, lambda x, y, z: x * y + z)

    def do_fma(self, *a):
        self._apply(*a, fused)

    def do_div(self, name, operands, active):
        if ".f" in name:
            self._apply(name, operands, active, np.divide)
        else:
            self._apply(name, operands, active, lambda x, y: self._quotient(x, y))

    def do_rem(self, *a):
        self._apply(*a, lambda x, y: x - self._quotient(x, y) * y)

    @staticmethod
    def _quotient(x, y):
        """Rounded towards zero."""
        y = np.where(y == 0, 1, y)
        return np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))

    def do_rsqrt(self, *a):
        """To 20 bits or so, as on a GPU; with .ftz, as all are."""
        self._apply(*a, lambda x: (1 / np.sqrt(flushed(x))) * (1 + 2.0**-21))

    def do_rcp(self, *a):
        """To 20 bits or so, as on a GPU; with .ftz, as all are."""
        self._apply(*a, lambda x: flushed((1 / flushed(x)) * (1 + 2.0**-21 * (x.dtype == np.float64))))

    def do_shl(self, name, operands, active):
        self._shift(name, operands, active, np.left_shift)

    def do_shr(self, name, operands, active):
        self._shift(name, operands, active, np.right_shift)

    def _shift(self, name, operands, active, shift):
        kind = name.split(".")[-1]
        value, by = self.value(operands[1], kind, active), self.bits(operands[2], 32, active)
        most = BITS[kind] - 1
        found = shift(value, np.minimum(by, most).astype(value.dtype))
        if kind[0] != "s":
            found = np.where(by > most, value.dtype.type(0), found)
        self.write(operands[0], to_bits(found, kind), active)

    def do_bfi(self, name, operands, active):
        """The low bits of one register put into another."""
        bits = BITS[name.split(".")[-1]]
        low, into, at, count = (
            self.bits(o, bits if j < 2 else 32, active).astype(np.uint64) for j, o in enumerate(operands[1:])
        )
        mask = ((np.uint64(1) << count) - np.uint64(1)) << at
        self.write(operands[0], ((into & ~mask) | ((low << at) & mask)).astype(f"u{bits // 8}"), active)

    def do_prmt(self, name, operands, active):
        """Four bytes of eight, as the digits of a number say."""
        low, high, digits = (self.bits(o, 32, active).astype(np.uint64) for o in operands[1:])
        both, found = low | (high << np.uint64(32)), np.zeros(len(low), np.uint64)
        for j in range(4):
            digit = (digits >> np.uint64(4 * j)) & np.uint64(15)
            if np.any(digit > 7):
                self.unknown(name, operands, active)
            found |= ((both >> (digit * np.uint64(8))) & np.uint64(255)) << np.uint64(8 * j)
        self.write(operands[0], found.astype(np.uint32), active)

    def do_mov(self, name, operands, active):
        kind = name.split(".")[-1]
        if kind == "pred":
            source = operands[1]
            found = self.predicate(source, active) if source[0] in "%!" else np.full(int(active.sum()), source != "0")
            self.write(operands[0], found, active)
            return
        sources, targets = (split(o.strip("{}")) for o in (operands[1], operands[0]))
        part = BITS[kind] // max(len(sources), len(targets))
        value = np.zeros(int(active.sum()), f"u{BITS[kind] // 8}")
        for j, source in enumerate(sources):
            if len(sources) > 1 and source.startswith("%") and source not in self.registers:
                continue  # half of a number of which only the other half is looked at
            bits = self.bits(source, BITS[kind] // len(sources), active).astype(value.dtype)
            value |= bits << value.dtype.type(j * BITS[kind] // len(sources))
        for j, target in enumerate(targets):
            moved = value >> value.dtype.type(j * part) if len(targets) > 1 else value
            self.write(target, moved.astype(f"u{BITS[kind] // len(targets) // 8}"), active)

    def do_setp(self, name, operands, active):
        _, how, *more = name.split(".")
        kind = more[-1]
        x, y = (self.value(o, kind, active) for o in operands[1:3])
        unordered = np.isnan(x) | np.isnan(y) if kind in FLOATS else np.zeros(len(x), bool)
        if how in ("num", "nan"):
            found = unordered if how == "nan" else ~unordered
        else:
            plain = (
                how.removesuffix("u")
                if kind in FLOATS
                else {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how)
            )
            compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
            found = (compare | {"ge": np.greater_equal})[plain](x, y)
            found = found | unordered if plain != how and kind in FLOATS else found & ~unordered
        if len(operands) > 3:
            other = self.predicate(operands[3], active)
            found = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[more[0]](found, other)
        self.write(operands[0], found, active)

    def do_selp(self, name, operands, active):
        x, y = (self.bits(o, BITS[name.split(".")[-1]], active) for o in operands[1:3])
        self.write(operands[0], np.where(self.predicate(operands[3], active), x, y), active)

    def do_cvt(self, name, operands, active):
        target, source = name.split(".")[-2:]
        value = self.value(operands[1], source, active)
        if target not in (*FLOATS, "bf16") and source in FLOATS:
            if ".rzi" not in name:
                self.unknown(name, operands, active)
            value = np.trunc(value)
        self.write(operands[0], to_bits(value.astype(FLOATS[target]) if target in FLOATS else value, target), active)
