"""Both norms, forward and backward, on every engine: one small call, one that fits the cache, one that does not."""

import numpy as np

SHAPES = [(1, 4096), (512, 768), (4096, 4096)]
ENGINES = ["cpu", "reference"]


class _Norms:
    params = (ENGINES, SHAPES)
    param_names = ("engine", "shape")
    timeout = 120

    def setup(self, engine, shape):
        import rmsnorm_np as rn

        if engine == "reference" and shape == SHAPES[-1]:
            raise NotImplementedError("the reference is not for large arrays")
        rng = np.random.default_rng(0)
        self.x, self.dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        self.weight = rng.uniform(0.5, 1.5, shape[1]).astype(np.float32)
        self.y, self.dx = np.zeros_like(self.x), np.zeros_like(self.x)  # zeros, not empty: the pages must be there
        self.forward = getattr(rn, self.op)
        self.backward = getattr(rn, self.op + "_backward")
        self.time_forward(engine, shape)  # compiles
        self.time_backward(engine, shape)

    def time_forward(self, engine, shape):
        self.forward(self.x, self.weight, backend=engine)

    def time_forward_into_out(self, engine, shape):
        self.forward(self.x, self.weight, out=self.y, backend=engine)

    def time_backward(self, engine, shape):
        self.backward(self.dy, self.x, self.weight, backend=engine)

    def time_backward_into_out(self, engine, shape):
        self.backward(self.dy, self.x, self.weight, out=self.dx, backend=engine)


class RMSNorm(_Norms):
    op = "rms_norm"


class LayerNorm(_Norms):
    op = "layer_norm"
