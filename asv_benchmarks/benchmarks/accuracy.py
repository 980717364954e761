"""The worst error on activations of a real language model, as ``python -m rmsnorm_np check`` finds it."""

from . import common


class Accuracy:
    params = (
        ["RMSNorm", "pRMSNorm", "LayerNorm", "+ RMSNorm"],
        ["float32", "float64", "float16", "bfloat16"],
        ["y", "dx and dweight"],
    )
    param_names = ("norm", "dtype", "result")
    unit = "ULP"

    def setup_cache(self):
        return common.outcome(self.measure)

    setup_cache.timeout = 600

    def measure(self):
        activations = common.ours("rmsnorm_np.cli.inputs", "activations")()
        norms = common.ours("rmsnorm_np.cli.inputs", "NORMS")
        check_engine = common.ours("rmsnorm_np.cli.checks", "check_engine")
        worst = {}
        for dtype in common.ours("rmsnorm_np.cli.checks", "dtypes")():
            for norm in norms:
                errors = [check_engine(norm, activation, dtype) for activation in activations]
                worst[norm.label, dtype.name, "y"] = max(error.y for error in errors)
                worst[norm.label, dtype.name, "dx and dweight"] = max(max(error.dx, error.dweight) for error in errors)
        return worst

    def setup(self, worst, norm, dtype, result):
        common.skip_without(worst)
        if (norm, dtype, result) not in worst:
            raise NotImplementedError(f"nothing here is exact enough to check {dtype}")

    def track_worst_error(self, worst, norm, dtype, result):
        return worst[norm, dtype, result]
