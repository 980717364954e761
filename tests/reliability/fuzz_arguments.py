"""A coverage-guided fuzz run of everything that judges arguments: `pip install atheris`, then, for ten minutes,

    python tests/reliability/fuzz_arguments.py -max_total_time=600 -max_len=8192 CORPUS_FOLDER

Hypothesis makes calls of the bytes that atheris changes, so what holds for each is said once, in `test_bad_input.py`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import atheris

sys.path[:0] = map(str, Path(__file__).resolve().parents[:3])

# not the kernels' modules: Numba compiles what it finds there
with atheris.instrument_imports(
    include=[
        f"rmsnorm_np.{name}"
        for name in (
            "_arguments",
            "_backends",
            "norms",
            "layer_norms",
            "l2",
            "gated",
            "quantized",
            "jvp",
            "double_backward",
        )
    ]
):
    from rmsnorm_np import _backends

# what is imported above has to be instrumented before these import it
import test_bad_input  # noqa: E402
from calls import SIGNATURES, calls  # noqa: E402
from hypothesis import given, settings  # noqa: E402

warnings.simplefilter("error")
_backends._engines["cpu"] = test_bad_input.NumPyEngine()


@settings(test_bad_input.quiet, database=None)
@given(call=calls(functions=tuple(SIGNATURES)))
def any_call(call):
    """What the fuzzer runs; it ends at the first call that does not hold."""
    test_bad_input.check(call)
    if test_bad_input.seen["calls"] % 10_000 == 0:
        sys.stderr.write(f"{dict(test_bad_input.seen)}\n")


if __name__ == "__main__":
    atheris.Setup(sys.argv, any_call.hypothesis.fuzz_one_input)
    atheris.Fuzz()
