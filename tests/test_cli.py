"""The command line: that it sees what is wrong, says so, and fits the screen. Times are never asserted."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import types
from dataclasses import replace

import numba
import numpy as np
import pytest
from rich.console import Console

import rmsnorm_np as rn
from rmsnorm_np import _backends, cli
from rmsnorm_np.cli import (
    ahead,
    bench,
    cases,
    checks,
    compositions,
    console,
    device,
    family,
    info,
    inputs,
    limit,
    peers,
    plain,
    plot,
    report,
    timing,
)
from rmsnorm_np.cpu import cache


def ignore(description):
    """A step that nobody watches."""


@pytest.fixture
def small(monkeypatch):
    """Two short pieces of the activations, so that a check takes a moment even with uncompiled kernels."""
    pieces = [
        replace(activation, x=activation.x[:3, :40].copy(), weight=activation.weight[:40].copy())
        for activation in inputs.activations()
        if activation.layer in ("first", "last")
    ]
    monkeypatch.setattr(inputs, "LAYERS", {"first": "here", "last": "there"})
    for module in (checks, report):
        monkeypatch.setattr(module, "LAYERS", inputs.LAYERS)
    monkeypatch.setattr(checks, "activations", lambda: pieces)
    monkeypatch.setattr(checks, "GRADIENT_ROWS", 1)
    # each dtype has kernels to compile: CI checks all four, with the installed package
    dtypes = [*checks.dtypes()[:2], checks.dtypes()[-1]]
    monkeypatch.setattr(checks, "dtypes", lambda: dtypes)
    monkeypatch.setattr(ahead, "_would_help", lambda: False)
    return pieces


@pytest.fixture
def wrong_backward(monkeypatch):
    """A CPU engine whose dx is off by 0.1 %."""
    right = rn.rms_norm_backward

    def wrong(*args, backend=None, **options):
        grads = right(*args, backend=backend, **options)
        return grads._replace(dx=(grads.dx * 1.001).astype(grads.dx.dtype)) if backend == "cpu" else grads

    monkeypatch.setattr(rn, "rms_norm_backward", wrong)


# The main job


def test_the_activations_that_come_with_the_package():
    layers = inputs.activations()
    assert [activation.layer for activation in layers] == ["first", "early", "last", "final"]
    for activation in layers:
        assert activation.x.shape == (64, 576)
        assert activation.weight.shape == (576,)
        assert activation.x.dtype == activation.weight.dtype == np.float32
        assert activation.eps == 1e-5
    assert np.abs(layers[2].x).max() > 256  # the square of which is beyond float16: what the data is here to show


@pytest.mark.engine
def test_check_prints_json_and_nothing_else(small, capsys):
    assert cli.main(["check", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert found["passed"] is True
    assert found["times"] == []
    assert [layer["layer"] for layer in found["layers"]] == ["first", "last"]
    names = {dtype.name for dtype in checks.dtypes()}
    for layer in found["layers"]:
        assert {(error["norm"], error["dtype"]) for error in layer["errors"]} == set(
            itertools.product(("RMSNorm", "pRMSNorm", "LayerNorm", "+ RMSNorm"), names)
        )
        assert {gradient["verdict"] for gradient in layer["gradients"]} == {"right"}


@pytest.mark.engine
def test_check_steps_are_counted(small):
    steps = []
    checks.check(steps.append)
    assert len(steps) == checks.count_steps()


@pytest.mark.engine
def test_a_wrong_gradient_fails_the_check(small, wrong_backward, capsys):
    assert cli.main(["check"]) == 1
    assert "FAILED: first, last" in capsys.readouterr().out


@pytest.mark.engine
def test_a_wrong_gradient_is_found_twice(small, wrong_backward):
    for layer in checks.check(ignore):
        assert {error.norm for error in layer.errors if not error.passed} == {"RMSNorm", "pRMSNorm"}
        assert {(gradient.backend, gradient.norm) for gradient in layer.gradients if not gradient.passed} == {
            ("cpu", "RMSNorm"),
            ("cpu", "pRMSNorm"),
        }


def test_a_result_of_nan_is_not_in_bounds():
    assert not checks.Error("RMSNorm", "float32", float("nan"), 0.0, 0.0, 0.51).passed
    assert checks.Error("RMSNorm", "float32", 0.5, 0.5, 0.5, 0.51).passed


def test_naive_float16_loses_the_massive_activations():
    first, last = (a for a in inputs.activations() if a.layer in ("first", "last"))
    assert checks.check_naive(first, np.dtype(np.float16)).lost_rows == 0
    assert checks.check_naive(last, np.dtype(np.float16)).lost_rows == 64
    assert checks.check_naive(last, np.dtype(np.float32)).lost_rows == 0


@pytest.mark.parametrize("norm", inputs.NORMS, ids=lambda norm: norm.label)
def test_plain_numpy_computes_the_same_norms(norm, rng):
    """A contender that computes something else, or in another dtype, would make the comparison a lie."""
    x, dy = rng.standard_normal((2, 5, 40))
    weight = rng.uniform(0.5, 1.5, 40)
    residual, dh = rng.standard_normal((2, 5, 40)) if norm.adds else (None, None)
    y, grads = plain.forward(norm, x, weight, 1e-5, residual), plain.backward(norm, dy, x, weight, 1e-5, dh)
    expected = norm.backward(dy, x, weight, 1e-5, "reference", dh=dh)
    # numbers of size 4, off by the rounding of some ten steps and of a sum of 40 elements
    tolerance = {"rtol": 0, "atol": 64 * 2.0**-52}
    np.testing.assert_allclose(y, norm.forward(x, weight, 1e-5, "reference", residual=residual), **tolerance)
    np.testing.assert_allclose(grads[0], expected[0], **tolerance)
    np.testing.assert_allclose(grads[1], expected[1], **tolerance)
    dy, x, weight, residual, dh = (a if a is None else a.astype(np.float32) for a in (dy, x, weight, residual, dh))
    forward, backward = plain.forward(norm, x, weight, 1e-5, residual), plain.backward(norm, dy, x, weight, 1e-5, dh)
    results = (*forward, *backward) if norm.adds else (forward, *backward)
    assert {result.dtype for result in results} == {np.dtype(np.float32)}


# Drawing


def drawn(render, *data, width):
    out = io.StringIO()
    render(Console(file=out, width=width, highlight=False), *data)
    return out.getvalue()


@pytest.mark.engine
@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_screen(small, width):
    slow = timing.Ratio(99.4, 98.7, 99.9)
    times = [
        report.NormTime(norm.label, direction, place, (rows, 576), 0.0998, 0.0998, 0.0998, slow, slow, 123e9, slow)
        for place, rows in report.ROWS.items()
        for direction in report.DIRECTIONS
        for norm in inputs.NORMS
    ]
    engine = report.Engine("sapphirerapids", 512, 128, "workqueue")
    text = drawn(report.render, engine, checks.check(ignore), times, width=width)
    assert text.startswith("CPU engine: sapphirerapids, 512-bit vectors, 128 threads (workqueue)\n")
    assert "…" not in text  # how rich says that something did not fit
    assert max(map(len, text.splitlines())) <= width
    assert text.endswith("All checks passed.\n")


@pytest.mark.parametrize("width", [80, 100])
def test_bench_fits_the_screen(width):
    entries = tuple(
        cases.Entry(name, (0.999,), 0.999, 12.3e9, timing.Ratio(10.4, 9.97, 11.9), 219.99)
        for name in (cases.OURS, cases.OURS_INTO, cases.LIMIT, "torch compiled", *cli.PEERS)
    )
    four = [
        cases.Case(norm, direction, "bfloat16", (131072, 4096), entries)
        for norm, direction in itertools.product(("RMSNorm", "LayerNorm"), ("forward", "forward+backward"))
    ]
    text = drawn(bench.render, four, "cpu", cli.PEERS, width=width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("GB/s:") == 1  # one legend for all tables
    assert "Not timed" not in text


def test_bench_names_the_peers_that_have_no_kernel():
    entries = tuple(cases.Entry(name, (1.0,), 1.0, 1e9, timing.Ratio(1, 1, 1), None) for name in ("limit", "torch"))
    one = [cases.Case("RMSNorm", "forward", "float64", (2, 40), entries)]
    text = drawn(bench.render, one, "cpu", ["torch", "openvino"], width=80)
    assert text.endswith("Not timed, as they have no float64 kernel for this: openvino.\n\n")


# Timing


# Each is called once; then a turn with its warm-up, in the first round after two calls to estimate how long one takes,
# or where a call is long one call a turn.
@pytest.mark.parametrize(("warm_seconds", "turns"), [(0.25, "aaaabbbb" + "aabb"), (0.004, "ab" + "ab")])
def test_interleave_takes_turns_and_leaves_the_first_call_out(monkeypatch, warm_seconds, turns):
    clock = itertools.count()  # a second passes between any two looks at the clock
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = timing.interleave(
        contenders, rounds=4, turn_seconds=0.0, warm_seconds=warm_seconds, budget_seconds=0.0, min_rounds=2
    )
    assert found == {name: timing.Timing((1.0, 1.0)) for name in "ab"}  # the budget was spent after two rounds
    assert "".join(calls) == "ab" + turns


def test_interleave_does_not_repeat_a_first_call():
    calls = []
    long = {"a": lambda: calls.append("a")}
    timing.interleave(long, rounds=2, turn_seconds=0.0, warm_seconds=0.0, called_before=True)
    assert calls == ["a", "a"]


def test_interleave_runs_all_rounds_within_its_budget():
    found = timing.interleave({"a": lambda: None}, rounds=5, turn_seconds=1e-4, budget_seconds=100.0)
    assert len(found["a"].seconds) == 5


def test_ratio_compares_rounds_not_medians():
    slower, faster = timing.Timing((2.0, 30.0, 4.0)), timing.Timing((1.0, 10.0, 1.0))
    assert timing.ratio(slower, faster) == timing.Ratio(3.0, 2.0, 4.0)


@pytest.mark.engine
def test_times_are_measured_for_each_norm_and_place(small, monkeypatch):
    results = {}

    def once(contenders, **options):
        results.update((name, call()) for name, call in contenders.items())
        seconds = {"cpu": 1.0, "numpy": 5.0, "reference": 100.0}
        return {name: timing.Timing((seconds[name.split(", ")[1]],)) for name in contenders}

    monkeypatch.setattr(report, "activations", lambda: small)
    monkeypatch.setattr(report, "ROWS", {"in cache": 3, "in memory": 6})
    monkeypatch.setattr(report, "interleave", once)
    times = report.measure_times(ignore)
    assert [(time.place, time.direction, time.norm, time.shape[0]) for time in times] == [
        (place, direction, norm.label, rows)
        for place, rows in (("in cache", 3), ("in memory", 6))
        for direction in ("forward", "backward")
        for norm in inputs.NORMS
    ]
    for time in times:
        assert (time.over_numpy.median, time.over_reference.median, time.against_layer_norm.median) == (5, 100, 1)
    assert [time.bandwidth / (3 * 40 * 4) for time in times[:8]] == [2, 2, 2, 4, 3, 3, 3, 4]
    # What was timed last is the gradient by x, and not by dy: a norm does not change when its input is scaled.
    x = np.tile(small[-1].x, (2, 1)).astype(np.float64)
    for way in ("reference", "numpy", "cpu"):
        terms = results[f"RMSNorm, {way}"][0] * x
        # each term rounded once to float32, a few times over for the eps that the law does not know
        assert np.all(np.abs(terms.sum(axis=-1)) <= 4 * 2.0**-24 * np.abs(terms).sum(axis=-1))


# bench, its peers, info, warmup


def test_bench_prints_json(monkeypatch, capsys):
    def count(contenders, **options):
        return {name: timing.Timing((float(place), 2.0 * place)) for place, name in enumerate(contenders, 1)}

    monkeypatch.setattr(bench, "interleave", count)
    assert cli.main(["bench", "--json", "--shapes", "2x40", "--backend", "reference", "--peers"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["peers"] == {}
    cases = json.loads(out)["cases"]
    assert {(case["norm"], case["direction"]) for case in cases} == set(
        itertools.product(("RMSNorm", "LayerNorm"), ("forward", "forward+backward"))
    )
    for case in cases:
        assert [entry["contender"] for entry in case["entries"]] == ["rmsnorm_np", "rmsnorm_np, out=", "limit"]
        assert [entry["against_ours"]["low"] for entry in case["entries"]] == [1.0, 2.0, 3.0]
        if case["direction"] == "forward":
            assert case["entries"][0]["ulp"] <= 0.5
            assert case["entries"][0]["bandwidth"] == 2 * 2 * 40 * 4 / 1.5


def test_bench_takes_no_other_peers(monkeypatch):
    """Nor are they imported: their threads are what one wants to be without."""
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    monkeypatch.setattr(peers.metadata, "version", lambda name: "1")
    asked = []
    for name in ("torch", "torch_compiled", "jax", "onnxruntime", "openvino"):
        monkeypatch.setattr(peers, f"_{name}", lambda problem, threads, name=name: asked.append(name))
    assert peers.versions(["jax"]) == {"jax": "1"}
    assert list(peers.calls(None, 1, ["jax", "torch"])) == []
    assert asked == ["torch", "torch_compiled", "jax"]


# What cannot work is refused before anything is timed.


@pytest.fixture
def refused(monkeypatch, capsys):
    """What `bench` with these arguments is refused for."""

    def measure(*args):
        raise AssertionError("something was timed")

    monkeypatch.setattr(bench, "measure", measure)

    def refusal(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["bench", *arguments])
        assert exit_.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return refusal


def test_bench_on_a_gpu_says_what_is_missing(monkeypatch, refused):
    fake_cuda(monkeypatch, False, "CUDA_ERROR_NO_DEVICE")
    assert refused("--backend", "cuda") == (
        "rmsnorm-np: error: argument --backend: the NVIDIA driver finds no CUDA device\n"
    )


def test_bench_on_a_gpu_refuses_peers(monkeypatch, refused):
    """They would be left out without a word."""
    monkeypatch.setattr(device, "missing", lambda: None)
    assert "argument --peers: they run on the CPU" in refused("--backend", "cuda", "--peers", "torch")


@pytest.mark.parametrize(
    ("asked", "installed", "missing"),
    [(["torch", "jax"], ["jax"], "torch"), (["onnxruntime"], ["onnxruntime"], "onnx")],
)
def test_bench_refuses_peers_that_are_not_installed(monkeypatch, refused, asked, installed, missing):
    monkeypatch.setattr(peers, "find_spec", lambda name: name if name in installed else None)
    assert f"argument --peers: not installed: {missing}; pip install {missing}\n" in refused("--peers", *asked)


def test_bench_compares_with_all_peers_that_are_installed(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: name if name in ("jax", "onnxruntime") else None)
    monkeypatch.setattr(peers.metadata, "version", lambda name: "1")
    assert list(peers.require(None)) == ["jax"]
    assert list(peers.require([])) == []


@pytest.mark.parametrize("name", ["missing/picture.png", "picture.xyz", "picture", "folder.png"])
def test_bench_refuses_a_picture_that_cannot_be_written(tmp_path, refused, name):
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`, not with `test`")
    (tmp_path / "folder.png").mkdir()
    assert f"argument --plot: '{tmp_path / name}': " in refused("--plot", str(tmp_path / name), "--peers")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_bench_leaves_the_picture_alone_until_it_has_measured(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`, not with `test`")
    before = tmp_path / "before.png"
    before.write_text("a picture")
    plot.require(str(before))
    plot.require(str(tmp_path / "new.png"))
    assert before.read_text() == "a picture"
    assert list(tmp_path.iterdir()) == [before]


# How the program ends


def run(code, **options):
    """A process of the command line, in which `code` has set the stage."""
    program = f"import sys\nfrom rmsnorm_np import cli\n{code}\nsys.exit(cli.main())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


LONG_OUTPUT = """
from rmsnorm_np.cli import info
info.collect = lambda: {"cpu": {str(number): "x" * 60 for number in range(5000)}}
sys.argv[1:] = ["info"]
"""
SHORT_OUTPUT = LONG_OUTPUT.replace("5000", "1")  # fits into Python's buffer: written when the program ends


@pytest.mark.parametrize("stage", [LONG_OUTPUT, SHORT_OUTPUT], ids=["long", "short"])
@pytest.mark.parametrize("form", ["", "sys.argv.append('--json')"], ids=["text", "json"])
def test_a_reader_who_has_enough_is_no_failure(stage, form):
    with run(stage + form) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (141, "")


INTERRUPTED = """
import ctypes, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def interrupted(options):
    {interrupt}
    for _ in range(1000):
        time.sleep(0.01)
    return 0
cli._run = interrupted
"""


@pytest.mark.parametrize(
    "interrupt",
    [
        "signal.raise_signal(signal.SIGINT)",
        # as in a function that LLVM calls back: from there no exception reaches the caller
        "ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))()",
    ],
    ids=["Python", "called back"],
)
def test_ctrl_c_ends_in_silence(interrupt):
    with run(INTERRUPTED.format(interrupt=interrupt)) as process:
        out, error = process.communicate()
    assert (process.returncode, out, error) == (130, "", "")


def test_other_errors_in_callbacks_are_still_reported():
    stage = """
import ctypes
def failing(options):
    ctypes.CFUNCTYPE(None)(lambda: 1 / 0)()
    return 0
cli._run = failing
"""
    with run(stage) as process:
        error = process.communicate()[1]
    assert process.returncode == 0
    assert "ZeroDivisionError" in error


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"rmsnorm-np {rn.__version__}\n"


def test_interleave_takes_another_clock():
    asked = []

    def measure(call, calls):
        asked.append(calls)
        return 0.25

    timings = timing.interleave({"a": int}, rounds=3, turn_seconds=1.0, measure=measure)
    assert timings["a"].seconds == (0.25,) * 3
    assert asked == [1, 1, 4, 4, 4]  # whether it is long, how long one takes, then as many as fill the turn


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("norm", bench.BY_NAME.values(), ids=bench.BY_NAME)
@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_peers_compute_what_we_do(norm, dtype, rng):
    """Those peers that are installed: a contender that computes something else would make the comparison a lie."""
    dtype = inputs.dtype_named(dtype)
    x, dy = (rng.standard_normal((3, 40)).astype(dtype) for _ in range(2))
    weight = rng.uniform(0.5, 1.5, 40).astype(dtype)
    # numbers of size 4, off by less than the rounding of a few steps in the type itself
    tolerance = 64 * float(np.spacing(np.ones((), dtype)))
    residual, dh = (checks.another(x), checks.another(dy)) if norm.adds else (None, None)
    wanted = norm.forward(x, weight, 1e-6, "reference", residual=residual)
    grads = norm.backward(dy, wanted.h if norm.adds else x, weight, 1e-6, "reference", dh=dh)[:2]
    for direction, results in (("forward", wanted if norm.adds else (wanted,)), ("forward+backward", grads)):
        problem = peers.Problem(norm.op, direction, x, weight, dy, 1e-6, residual, dh)
        for _, call in peers.calls(problem, threads=1):
            found = call()
            for got, expected in zip((found,) if len(results) == 1 else found, results, strict=True):
                np.testing.assert_allclose(peers.as_numpy(got), expected.astype(np.float64), rtol=0, atol=tolerance)


def test_bench_of_norms_that_add(monkeypatch, capsys):
    """y and h are both returned, and both arrays that are added count as moved."""
    monkeypatch.setattr(bench, "interleave", lambda calls, **options: {name: timing.Timing((1.0,)) for name in calls})
    arguments = "bench --json --shapes 2x40 --backend reference --peers --norms add_rms_norm add_layer_norm"
    assert cli.main(arguments.split()) == 0
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert [(case["norm"], case["direction"]) for case in cases] == list(
        itertools.product(("+ RMSNorm", "+ LayerNorm"), ("forward", "forward+backward"))
    )
    for case in cases:
        ours, into, _ = case["entries"]
        forward = case["direction"] == "forward"
        assert ours["bandwidth"] == (4 if forward else 8) * 2 * 40 * 4
        assert not forward or max(ours["ulp"], into["ulp"]) <= 0.5


# what is read and written of each, in arrays of x's size: x and y, then dy, x, dx; and so on
MOVED = {
    "l2_norm": (2, 5),
    "gated_rms_norm": (3, 8),
    "quantized_rms_norm": (1.25,),
    "rms_norm_jvp": (3,),
    "rms_norm_double_backward": (10,),
    "layer_norm_jvp": (3,),
    "layer_norm_double_backward": (10,),
}


def test_bench_of_the_functions_beside_the_norms(monkeypatch, capsys):
    monkeypatch.setattr(family, "interleave", lambda calls, **options: {name: timing.Timing((1.0,)) for name in calls})
    arguments = ["bench", "--json", "--shapes", "2x40", "--backend", "reference", "--peers", "--norms", *cli.FAMILY]
    assert cli.main(arguments) == 0
    measured = iter(json.loads(capsys.readouterr().out)["cases"])
    for op in cli.FAMILY:
        for moved, (direction, steps) in zip(MOVED[op], family.FAMILY[op].ways, strict=True):
            case = next(measured)
            assert (case["norm"], case["direction"]) == (family.FAMILY[op].label, direction)
            assert [entry["contender"] for entry in case["entries"]] == ["rmsnorm_np", "rmsnorm_np, out=", "limit"]
            ours, into, lowest = case["entries"]
            assert ours["bandwidth"] == moved * 2 * 40 * 4
            assert lowest["ulp"] is None
            if steps > 1 or op == "quantized_rms_norm":
                assert ours["ulp"] is into["ulp"] is None
            else:
                assert max(ours["ulp"], into["ulp"]) <= 0.5
    assert next(measured, None) is None


def test_the_names_of_the_functions_beside_the_norms():
    """Which --help knows without the engine."""
    assert tuple(family.FAMILY) == cli.FAMILY


def test_bench_on_a_gpu_refuses_functions_beside_the_norms(monkeypatch, refused):
    monkeypatch.setattr(device, "missing", lambda: None)
    message = "argument --norms: l2_norm is timed on the CPU alone"
    assert message in refused("--backend", "cuda", "--norms", "rms_norm", "l2_norm")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op", cli.FAMILY)
@pytest.mark.filterwarnings("ignore")  # PyTorch's own
def test_compositions_compute_what_we_do(op, dtype, monkeypatch, rng):
    pytest.importorskip("torch", reason="PyTorch comes with the extra `torch`, not with `test`")
    monkeypatch.setattr(compositions, "which", lambda name: None)  # to compile them takes minutes
    dtype = inputs.dtype_named(dtype)
    x, dy = (rng.standard_normal((3, 40)).astype(dtype) for _ in range(2))
    arrays = family.arrays_of(x, rng.uniform(0.5, 1.5, 40).astype(dtype), dy)
    tolerance = 64 * float(np.spacing(np.ones((), dtype)))
    for direction, steps in family.FAMILY[op].ways:
        (call,) = compositions.torch_calls(op, direction, arrays, 1e-6, 1).values()
        found = call()
        wanted = family.run(family.FAMILY[op].steps[steps - 1], family.as_float64(arrays), 1e-6, "reference")
        wanted = [a for a in wanted if a is not None]
        for got, want in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
            got, want = peers.as_numpy(got), want.astype(np.float64)
            atol = 1 if op == "quantized_rms_norm" and want.shape == x.shape else tolerance * np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("as_json", [True, False])
def test_check_of_the_functions_beside_the_norms(as_json, monkeypatch, capsys):
    """On the engine that is the reference all is right, and a wrong gradient is found."""
    pieces = [replace(a, x=a.x[:3, :40].copy(), weight=a.weight[:40].copy()) for a in inputs.activations()[1:3]]
    monkeypatch.setattr(family, "activations", lambda: pieces)
    plain = family.run
    wrong = []

    def run(step, arrays, eps, backend):
        results = plain(step, arrays, eps, "reference")
        if backend == "cpu" and step.function in wrong:
            return (results[0], (results[1] * 1.001).astype(results[1].dtype), *results[2:])
        return results

    monkeypatch.setattr(family, "run", run)
    options = ["check", *["--json"] * as_json, "--norms", *cli.FAMILY]
    assert cli.main(options) == 0
    capsys.readouterr()
    wrong += ["gated_rms_norm_backward", "quantized_rms_norm"]
    assert cli.main(options) == 1
    out, _ = capsys.readouterr()
    if as_json:
        errors = json.loads(out)["errors"]
        failed = {(error["function"], error["result"]) for error in errors if error["error"] > error["bound"]}
        assert {("gated_rms_norm_backward", "dgate"), ("quantized_rms_norm", "scale")} <= failed
        assert {function for function, _ in failed} == set(wrong)
    else:
        assert out.endswith("FAILED: gated_rms_norm_backward, quantized_rms_norm\n")


@pytest.mark.engine
def test_check_of_a_function_on_the_engine(capsys):
    assert cli.main(["check", "--norms", "l2_norm"]) == 0
    assert capsys.readouterr().out.endswith("All checks passed.\n")


@pytest.mark.parametrize("size", [4, 8 << 20], ids=["in cache", "streaming"])
def test_the_limit_moves_every_byte(monkeypatch, size):
    """A limit that moves less would look higher than it is."""
    arrays = []
    empty = limit.memory.empty

    def watched(shape, dtype):
        arrays.append(empty(shape, dtype))
        return arrays[-1]

    monkeypatch.setattr(limit.memory, "empty", watched)
    calls = limit.calls(size)
    x, z, y = arrays
    assert x.nbytes >= size
    x[...], z[...], y[...] = 2, 3, 0
    calls["forward"]()
    assert (y == 2).all()
    y[...] = 0
    calls["forward+backward"]()
    assert (y == 5).all()
    arrays.clear()
    calls = limit.calls(size, adds=True)
    x, z, y, residual, h = arrays
    x[...], z[...], residual[...] = 2, 3, 4
    calls["forward"]()
    assert (y == 2).all()
    assert (h == 4).all()
    h[...] = 0
    calls["forward+backward"]()
    assert (y == 9).all()
    assert (h == 4).all()


def test_the_limit_is_not_kept_on_disk(tmp_path, monkeypatch):
    """It would be found again after an edit of what it is compiled from: the digest covers the engine alone."""
    monkeypatch.setattr(cache, "_places", lambda: [tmp_path])
    cache.folder.cache_clear()
    limit._kernel.cache_clear()
    limit.calls(1 << 12)["forward"]()
    cache.folder.cache_clear()
    assert list(tmp_path.iterdir()) == []


def test_plot_draws_a_line_for_each_contender(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`, not with `test`")
    entries = [cases.Entry(name, (1.0,), 1.0, 2e9, timing.Ratio(1, 1, 1), None) for name in ("rmsnorm_np", "limit")]
    measured = [
        cases.Case(norm.label, "forward", "bfloat16", (rows, 8), tuple(entries))
        for norm in bench.NORMS
        for rows in (4, 2)
    ]
    assert plot.lines(measured[:2]) == {name: [(32, 2.0), (64, 2.0)] for name in ("rmsnorm_np", "limit")}
    plot.draw(measured, str(tmp_path / "picture.svg"))
    picture = (tmp_path / "picture.svg").read_text()
    assert "<!-- RMSNorm, forward -->" in picture
    assert "<!-- LayerNorm, forward -->" in picture


def test_info_prints_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["rmsnorm_np"] == rn.__version__
    assert found["cpu"]["threads"] >= 1
    assert found["engines"]["reference"] == found["engines"]["cpu"] == "available"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, "available"),
        ("\nCUDA driver library cannot be found.\nEnsure that ...", "not available: no NVIDIA driver was found"),
        (
            "Call to cuInit results in CUDA_ERROR_NO_DEVICE (100)",
            "not available: the NVIDIA driver finds no CUDA device",
        ),
        ("CUDA is\ndisabled", "not available: the NVIDIA driver does not start: CUDA is disabled"),
        (RuntimeError("no cuInit"), "not available: the NVIDIA driver does not start: no cuInit"),
    ],
    ids=["a GPU", "no driver", "no device", "a driver that fails", "a driver without a function"],
)
def test_info_says_what_cuda_lacks(monkeypatch, error, reason):
    fake_cuda(monkeypatch, error is None, error)
    assert info.engines() == {"reference": "available", "cpu": "available", "cuda": reason}


def test_info_says_what_cuda_lacks_beside_a_driver(monkeypatch):
    fake_cuda(monkeypatch, False, None)
    assert info.engines()["cuda"].startswith("not available: the CUDA toolkit was not found: pip install")


def test_info_says_that_the_package_of_cuda_is_not_installed(monkeypatch):
    def refuse(x, backend):
        raise ImportError("backend 'cuda' needs numba-cuda: pip install")

    monkeypatch.setattr(_backends, "select", refuse)
    assert info.engines()["cuda"] == "not available: backend 'cuda' needs numba-cuda: pip install"


def fake_cuda(monkeypatch, available, error):
    """numba-cuda on a machine where the driver says this."""

    def cuda_error():
        if isinstance(error, Exception):
            raise error
        return error

    fake = types.SimpleNamespace(is_available=lambda: available, cuda_error=cuda_error)
    monkeypatch.setattr(_backends, "select", lambda x, backend: None)
    monkeypatch.setattr(numba, "cuda", fake, raising=False)
    monkeypatch.setitem(sys.modules, "numba.cuda", fake)


def test_info_on_the_screen():
    found = {
        "versions": {"rmsnorm_np": "1", "ml_dtypes": "2"},
        "platform": "Linux",
        "cpu": {"features": ["avx", "xsave"], "vector_bits": 512, "cache": None, "recycled_memory_limit": 512 << 20},
        "peers": {},
    }
    lines = [" ".join(line.split()) for line in drawn(info.render, found, width=80).splitlines()]
    assert lines == [
        *("versions", "rmsnorm_np 1", "ml_dtypes 2", ""),
        *("platform", "Linux", ""),
        *("CPU engine", "features avx", "vector width 512 bits"),
        "compiled kernels not kept, as no folder can be written",
        *("memory kept for reuse 512 MiB", ""),
    ]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (7 << 20, "7 MiB"), (3 << 30, "3 GiB")],
)
def test_bytes_have_a_unit(nbytes, text):
    assert console.size(nbytes) == text


@pytest.mark.skipif(
    not numba.core.registry.cpu_target.target_context.codegen().magic_tuple()[0].startswith("x86_64"),
    reason="the processors are of another kind",
)
@pytest.mark.parametrize(("processor", "bits"), [("x86-64", 128), ("x86-64-v3", 256), ("x86-64-v4", 512)])
def test_the_width_of_vectors_is_that_of_the_code(monkeypatch, processor, bits):
    from rmsnorm_np import cpu

    codegen = numba.core.registry.cpu_target.target_context.codegen()
    triple = codegen.magic_tuple()[0]
    monkeypatch.setattr(type(codegen), "magic_tuple", lambda self: (triple, processor, ""))
    assert cpu._vector_bits() == bits


def test_info_shows_the_word_in_brackets(monkeypatch):
    """Square brackets are markup to rich: [cuda13] would vanish from the advice."""
    text = drawn(info.render, {"engines": {"cuda": 'pip install "rmsnorm_np[cuda13]"'}}, width=80)
    assert "rmsnorm_np[cuda13]" in text


def test_warmup_compiles_what_was_asked_for(monkeypatch, capsys):
    from rmsnorm_np import cpu

    asked = []
    monkeypatch.setattr(cpu, "warmup", lambda dtypes, report: asked.append(list(dtypes)))
    monkeypatch.setattr(cpu, "describe", lambda: {"cache": "/somewhere"})
    assert cli.main(["warmup", "float16"]) == 0
    assert "/somewhere" in capsys.readouterr().out
    assert cli.main(["--json", "warmup"]) == 0
    assert json.loads(capsys.readouterr().out)["cache"] == "/somewhere"
    assert asked == [["float16"], list(cli.DTYPES)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--shapes", "8"], "'8' is not a shape, expected rows and row length such as 512x768"),
        (["bench", "--shapes", "0x8"], "'0x8' is not a shape"),
        (["bench", "--rounds", "0"], "'0' is not a number of rounds, expected 1 or more"),
        (["warmup", "int8"], "'int8' is not a dtype, expected one of float32, float64, float16, bfloat16"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_shapes_are_read():
    options = cli.parser().parse_args(["bench", "--shapes", "1x4096", "512X768"])
    assert options.shapes == [(1, 4096), (512, 768)]


# The second process


def test_the_second_process_is_ended(monkeypatch):
    started = []
    popen = ahead.subprocess.Popen

    def wait_for_input(command, **options):
        assert command[1:] == ["-m", "some.module", "float64"]
        started.append(
            popen([command[0], "-c", "import sys; sys.stdin.read()"], stdin=ahead.subprocess.PIPE, **options)
        )
        return started[0]

    monkeypatch.setattr(ahead, "_would_help", lambda: True)
    monkeypatch.setattr(ahead.subprocess, "Popen", wait_for_input)
    with ahead.running("some.module", "float64"):
        assert started[0].poll() is None
    assert started[0].returncode != 0  # killed; it would end with 0 when its input is closed


@pytest.mark.engine
def test_the_second_process_compiles_what_this_one_checks_last(small, monkeypatch):
    started = []

    def running(module, *names):
        started.append((module, *names))
        return contextlib.nullcontext(lambda: None)

    monkeypatch.setattr(ahead, "running", running)
    checks.check(ignore)
    assert started == [("rmsnorm_np.cli.checks", *(dtype.name for dtype in checks.dtypes()[2:]))]


def test_the_second_process_compiles_only_what_it_is_told(monkeypatch):
    done = []
    monkeypatch.setattr(checks, "check_engine", lambda norm, activation, dtype: done.append((norm.op, dtype.name)))
    monkeypatch.setattr(checks, "check_gradients", lambda norm, activation, backend: done.append((norm.op, backend)))
    checks.compile_for(["bfloat16"])
    assert done == [(norm.op, "bfloat16") for norm in inputs.NORMS]
