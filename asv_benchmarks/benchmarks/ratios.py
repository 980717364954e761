"""Times relative to others' in the same process, in turn: what slows the machine slows both, and the ratio stays.

Lower is better, as asv expects: 1.25 times the limit's time is 0.8 of the bandwidth that there is.
"""

from . import common

ROUNDS = 15  # of all contenders in turn; the value is the median over rounds


def _against_others(shape):
    """Our time over that of others, by (contender, op, direction), as ``python -m rmsnorm_np bench`` measures it."""
    rows, n, _ = common.SHAPES[shape]
    bench = common.ours("rmsnorm_np.cli.bench")
    norms = {norm.label: norm.op for norm in bench.NORMS}
    ratios = {}
    for case in bench.measure([(rows, n)], common.dtype_named("float32"), "cpu", ROUNDS, step=lambda what: None):
        for entry in case.entries:
            ratios[entry.contender, norms[case.norm], case.direction] = 1 / entry.against_ours.median
    return ratios


class _Others:
    params = (["limit", "torch", "torch compiled", "jax", "onnxruntime", "openvino"], common.OPS, common.DIRECTIONS)
    param_names = ("contender", "op", "direction")
    unit = "times its time"

    def setup(self, ratios, contender, op, direction):
        common.skip_without(ratios)
        if contender == "limit":
            common.ours("rmsnorm_np.cli.bench", "LIMIT")
        if (contender, op, direction) not in ratios:
            raise NotImplementedError(f"{contender} was not timed: not installed, or without {op} {direction}")


class InMemory(_Others):
    def setup_cache(self):
        return common.outcome(lambda: _against_others(common.IN_MEMORY))

    def track_against(self, ratios, contender, op, direction):
        return ratios[contender, op, direction]


class LayerNorm:
    """The paper's claim: RMSNorm takes less time than LayerNorm."""

    params = ([common.TINY, common.IN_CACHE, common.IN_MEMORY], common.DIRECTIONS)
    param_names = ("shape", "direction")
    unit = "times RMSNorm's time"

    def setup(self, shape, direction):
        rows, n, _ = common.SHAPES[shape]
        self.timing = common.ours("rmsnorm_np.cli.timing")
        x, dy, weight = common.arrays(rows, n, "float32")
        self.calls = {op: self.call(op, direction, x, dy, weight) for op in common.OPS}

    def call(self, op, direction, x, dy, weight):
        forward = common.ours("rmsnorm_np", op)
        backward = common.ours("rmsnorm_np", f"{op}_backward")
        if direction == "forward":
            return lambda: forward(x, weight)
        return lambda: (forward(x, weight), backward(dy, x, weight))

    def track_layer_norm(self, shape, direction):
        timings = self.timing.interleave(self.calls, rounds=ROUNDS)
        return self.timing.ratio(timings["layer_norm"], timings["rms_norm"]).median
