"""The most memory a process ever had. What is not the norm's own stands beside it: the process, its arrays, Numba."""

from . import common


class Memory:
    params = (["float32"], [common.IN_MEMORY])
    param_names = ("dtype", "shape")

    def setup(self, dtype, shape):
        rows, n, _ = common.SHAPES[shape]
        self.forward = common.ours("rmsnorm_np", "rms_norm")
        self.backward = common.ours("rmsnorm_np", "rms_norm_backward")
        self.x, self.dy, self.weight = common.arrays(rows, n, dtype)
        self.forward(self.x[:1], self.weight)  # loads or compiles the kernels with one row
        self.backward(self.dy[:1], self.x[:1], self.weight)

    def peakmem_nothing(self, dtype, shape):
        pass

    def peakmem_forward(self, dtype, shape):
        for _ in range(3):
            self.forward(self.x, self.weight)

    def peakmem_backward(self, dtype, shape):
        for _ in range(3):
            self.backward(self.dy, self.x, self.weight)
