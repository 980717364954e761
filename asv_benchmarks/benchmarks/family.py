"""How long the functions beside the norms take: L2 norm, gate, 8 bits, and the derivatives of derivatives."""

import functools
import os

from . import common

IN_MEMORY = "1 call of 8192x4096"
SHAPES = {common.IN_CACHE: common.SHAPES[common.IN_CACHE], IN_MEMORY: (8192, 4096, 1)}
ARRAYS = 8  # of the shape of x, at most: what is read, and what two calls return


class _Family:
    param_names = ("op", "dtype", "shape")
    params = ([], ["float32", "bfloat16"], list(SHAPES))
    rounds = 1
    repeat = 10
    warmup_time = 0.1
    made_for = None

    def setup(self, op, dtype, shape):
        if self.made_for == (op, dtype, shape):
            return  # asv sets up before every sample
        rows, n, self.calls = SHAPES[shape]
        x, dy, weight = common.arrays(rows, n, dtype)
        _skip_without_memory(ARRAYS * x.nbytes)
        self.call = functools.partial(*self.prepared(op, x, dy, weight))
        self.call()  # compiles, and fills the pool of memory
        self.made_for = op, dtype, shape

    def time_call(self, op, dtype, shape):
        for _ in range(self.calls):
            self.call()


def _skip_without_memory(nbytes):
    if hasattr(os, "sysconf") and os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 2 * nbytes:
        raise NotImplementedError("this machine has not enough memory")


class L2Norm(_Family):
    params = (["l2_norm", "l2_norm_backward"], *_Family.params[1:])

    def prepared(self, op, x, dy, weight):
        return common.ours("rmsnorm_np", op), *((dy,) if op.endswith("backward") else ()), x, weight


class Gated(_Family):
    """Both orders; Mamba-2 has the gate first. What is read is x and gate, and dy."""

    ops = ("gated_rms_norm", "gated_rms_norm_backward")
    params = ([*ops, *(f"{op}, gate first" for op in ops)], *_Family.params[1:])

    def prepared(self, op, x, dy, weight):
        name, _, first = op.partition(", ")
        function = functools.partial(common.ours("rmsnorm_np", name), norm_before_gate=not first)
        return function, *((dy,) if name.endswith("backward") else ()), x, x[::-1].copy(), weight


class Quantized(_Family):
    """The op is the format of q."""

    params = (["int8", "float8_e4m3fn", "float8_e5m2"], *_Family.params[1:])

    def prepared(self, op, x, dy, weight):
        return functools.partial(common.ours("rmsnorm_np", "quantized_rms_norm"), dtype=op), x, weight


class Derivatives(_Family):
    """Forward mode, and the gradient of the gradient, along directions of x and weight."""

    ops = ("rms_norm_jvp", "layer_norm_jvp", "rms_norm_double_backward", "layer_norm_double_backward")
    params = (list(ops), *_Family.params[1:])

    def prepared(self, op, x, dy, weight):
        direction, along_weight = x[::-1].copy(), weight[::-1].copy()
        if op.endswith("jvp"):
            return common.ours("rmsnorm_np", op), x, weight, None, direction, along_weight, None
        return common.ours("rmsnorm_np", op), direction, along_weight, None, dy, x, weight
