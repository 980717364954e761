"""How long the norms take. A value is the time of a whole sample: of as many calls as its shape says."""

import functools

from . import common


class _Speed:
    param_names = ("op", "engine", "dtype", "shape")
    rounds = 1  # the gate asks for more
    repeat = 10
    warmup_time = 0.1
    made_for = None

    def setup(self, op, engine, dtype, shape):
        if self.made_for == (op, engine, dtype, shape):
            return  # asv sets up before every sample; new arrays would be other pages, and in other caches
        rows, n, self.calls = common.SHAPES[shape]
        x, dy, weight = self.on_device(*common.arrays(rows, n, dtype))
        forward = common.ours("rmsnorm_np", op)
        backward = common.ours("rmsnorm_np", f"{op}_backward")
        self.forward = functools.partial(forward, x, weight, backend=engine)
        self.backward = functools.partial(backward, dy, x, weight, backend=engine)
        self.forward()  # compiles, and fills the pool of memory
        self.backward()
        self.made_for = op, engine, dtype, shape

    def on_device(self, *arrays):
        return arrays

    def wait(self):
        pass

    def time_forward(self, op, engine, dtype, shape):
        for _ in range(self.calls):
            self.forward()
        self.wait()

    def time_backward(self, op, engine, dtype, shape):
        for _ in range(self.calls):
            self.backward()
        self.wait()


class Float32(_Speed):
    params = (common.OPS, ["cpu"], ["float32"], list(common.SHAPES))


class OtherTypes(_Speed):
    """In cache, where arithmetic and conversions are what takes the time."""

    params = (common.OPS, ["cpu"], ["float64", "float16", "bfloat16"], [common.IN_CACHE])


class Residual(_Speed):
    """The norm of x + residual. Its setup is its own: asv drops the history of benchmarks whose setup has changed."""

    params = (["add_rms_norm"], ["cpu"], ["float32"], list(common.SHAPES))

    def setup(self, op, engine, dtype, shape):
        if self.made_for == (op, engine, dtype, shape):
            return
        forward = common.ours("rmsnorm_np", op)
        backward = common.ours("rmsnorm_np", f"{op}_backward")
        rows, n, self.calls = common.SHAPES[shape]
        x, dy, weight = common.arrays(rows, n, dtype)
        residual, dh = x[::-1].copy(), dy[::-1].copy()
        self.forward = functools.partial(forward, x, residual, weight, backend=engine)
        self.backward = functools.partial(backward, dy, dh, self.forward().h, weight, backend=engine)
        self.backward()
        self.made_for = op, engine, dtype, shape


class Apart(_Speed):
    """Rows along the middle axis, as channels in (batch, channels, positions): beside the contiguous rows."""

    params = (common.OPS, ["cpu"], ["float32", "bfloat16"], ["1 call of 8x256x3136"])

    def setup(self, op, engine, dtype, shape):
        if self.made_for == (op, engine, dtype, shape):
            return
        forward = common.ours("rmsnorm_np", op)
        backward = common.ours("rmsnorm_np", f"{op}_backward")
        outer, n, inner, self.calls = 8, 256, 3136, 1
        x, dy, _ = common.arrays(outer * n, inner, dtype)
        x, dy = x.reshape(outer, n, inner), dy.reshape(outer, n, inner)
        weight = common.arrays(1, n, dtype)[2]
        self.forward = functools.partial(forward, x, weight, axis=1, backend=engine)
        self.backward = functools.partial(backward, dy, x, weight, axis=1, backend=engine)
        self.forward()
        self.backward()
        self.made_for = op, engine, dtype, shape


class Objects(_Speed):
    """Calls of an object that keeps its weight: small ones, where Python is what takes the time."""

    params = (["RMSNorm", "LayerNorm"], ["cpu"], ["float32"], list(common.SHAPES)[:2])

    def setup(self, op, engine, dtype, shape):
        if self.made_for == (op, engine, dtype, shape):
            return
        rows, n, self.calls = common.SHAPES[shape]
        x, dy, weight = common.arrays(rows, n, dtype)
        norm = common.ours("rmsnorm_np", op)(weight)
        self.forward = functools.partial(norm, x)
        self.backward = functools.partial(norm.backward, dy, x)
        self.forward()
        self.backward()
        self.made_for = op, engine, dtype, shape


class Reference(_Speed):
    params = (common.OPS, ["reference"], ["float32"], [common.IN_CACHE])


class Cuda(_Speed):
    params = (common.OPS, ["cuda"], ["float32", "float16"], [common.IN_MEMORY])

    def on_device(self, *arrays):
        common.theirs("numba_cuda")
        cuda = common.theirs("numba.cuda")
        if not cuda.is_available():
            raise NotImplementedError("there is no GPU")
        self.wait = cuda.synchronize
        return [cuda.to_device(array) for array in arrays]
