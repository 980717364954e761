"""Errors of y in ULP, of this library and of the others that are installed: the histograms of the page "Numbers".

``python docs/measurements/errors.py`` writes errors.json beside it. torch, jax, onnxruntime (with onnx) and openvino
take part where they are installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rmsnorm_np import reference
from rmsnorm_np.cli import peers
from rmsnorm_np.cli.inputs import RMS_NORM, activations, dtype_named

EDGES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 1000.0]  # ULP
DTYPES = ("float32", "bfloat16", "float16")


def contenders(problem: peers.Problem) -> dict[str, np.ndarray]:
    """Each one's y, as float64."""
    x, weight, eps = problem.x, problem.weight, problem.eps
    found = {"rmsnorm_np": RMS_NORM.forward(x, weight, eps, "cpu")}
    with np.errstate(over="ignore"):
        found["NumPy, in one line"] = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * weight
    for name, call in peers.calls(problem, threads=1):
        found[name] = call()
    return {name: peers.as_numpy(y) for name, y in found.items()}


def errors(y: np.ndarray, exact: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """|y - exact| of each element in ULP of the dtype; without rows that came out as zeros or not finite."""
    kept = np.isfinite(y).all(axis=-1) & (y != 0).any(axis=-1)
    eps = float(np.spacing(np.ones((), dtype)))
    unit = np.ldexp(eps, np.frexp(np.maximum(np.abs(exact), 2.0**-14))[1] - 1)  # normal numbers of each dtype
    return (np.abs(y - exact) / unit)[kept].ravel()


def measure() -> dict:
    """Histograms by data and dtype."""
    data = {f"SmolLM2, {a.layer}": (a.x, a.weight, a.eps) for a in activations() if a.layer in ("early", "last")}
    rng = np.random.default_rng(0)
    data["normal numbers, n = 4096"] = rng.standard_normal((64, 4096), np.float32), rng.uniform(0.5, 1.5, 4096), 1e-6
    found: dict = {"versions": peers.versions() | {"numpy": np.__version__}, "edges": EDGES, "histograms": []}
    for label, (x, weight, eps) in data.items():
        for name in DTYPES:
            dtype = dtype_named(name)
            x_, w_ = x.astype(dtype), weight.astype(dtype)
            exact = reference.rms_norm(x_.astype(np.float64), w_.astype(np.float64), eps=eps)
            for contender, y in contenders(peers.Problem("rms_norm", "forward", x_, w_, x_, eps)).items():
                off = errors(y, exact, dtype)
                entry = {"data": label, "dtype": name, "contender": contender, "lost": 1 - off.size / exact.size}
                if off.size:
                    share = np.histogram(np.minimum(off, EDGES[-1]), EDGES)[0] / off.size
                    entry |= {"worst": round(float(off.max()), 3), "mean": round(float(off.mean()), 4)}
                    entry["shares"] = [round(float(value), 5) for value in share]
                found["histograms"].append(entry)
    return found


if __name__ == "__main__":
    results = measure()
    lines = ",\n ".join(json.dumps(entry) for entry in results.pop("histograms"))
    text = json.dumps(results)[:-1] + f', "histograms": [\n {lines}\n]}}\n'
    json.loads(text)
    Path(__file__).with_name("errors.json").write_text(text)
