"""The command line: that it sees what is wrong, says so, and fits the screen. Times are never asserted."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import rmsnorm_np as rn
from rmsnorm_np import _backends, cli
from rmsnorm_np.cli import ahead, bench, checks, info, inputs, peers, plot, report, timing
from rmsnorm_np.cpu import limit


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
            itertools.product(("RMSNorm", "pRMSNorm", "LayerNorm"), names)
        )
        assert {gradient["verdict"] for gradient in layer["gradients"]} == {"right"}


def test_check_steps_are_counted(small):
    steps = []
    checks.check(steps.append)
    assert len(steps) == checks.count_steps()


def test_a_wrong_gradient_fails_the_check(small, wrong_backward, capsys):
    assert cli.main(["check"]) == 1
    assert "FAILED: first, last" in capsys.readouterr().out


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


# Drawing


def drawn(render, *data, width):
    out = io.StringIO()
    render(Console(file=out, width=width, highlight=False), *data)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_screen(small, width):
    slow = timing.Ratio(99.4, 98.7, 99.9)
    times = [
        report.NormTime(norm.label, direction, place, (rows, 576), 0.9984, 0.0998, slow, 123e9, slow)
        for place, rows in report.ROWS.items()
        for direction in report.ARRAYS_MOVED
        for norm in inputs.NORMS
    ]
    text = drawn(report.render, checks.check(ignore), times, width=width)
    assert "…" not in text  # how rich says that something did not fit
    assert max(map(len, text.splitlines())) <= width
    assert text.endswith("All checks passed.\n")


@pytest.mark.parametrize("width", [80, 100])
def test_bench_fits_the_screen(width):
    entries = tuple(
        bench.Entry(name, (0.999,), 0.999, 12.3e9, timing.Ratio(10.4, 9.97, 11.9), 219.99)
        for name in (bench.OURS, bench.OURS_INTO, bench.LIMIT, *cli.PEERS)
    )
    cases = [bench.Case("LayerNorm", "forward+backward", "bfloat16", (131072, 4096), entries)]
    text = drawn(bench.render, cases, "cpu", width=width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


# Timing


@pytest.mark.parametrize(("warm_seconds", "turns"), [(0.25, "aabb"), (0.004, "ab")])
def test_interleave_takes_turns_and_leaves_the_first_call_out(monkeypatch, warm_seconds, turns):
    clock = itertools.count()  # a second passes between any two looks at the clock
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = timing.interleave(
        contenders, rounds=4, turn_seconds=0.0, warm_seconds=warm_seconds, budget_seconds=0.0, min_rounds=2
    )
    assert found == {name: timing.Timing((1.0, 1.0)) for name in "ab"}  # the budget was spent after two rounds
    # to begin with one call and one to estimate; then a turn with its warm-up, or without where the call is long
    assert "".join(calls) == "aabb" + turns * 2


def test_interleave_runs_all_rounds_within_its_budget():
    found = timing.interleave({"a": lambda: None}, rounds=5, turn_seconds=1e-4, budget_seconds=100.0)
    assert len(found["a"].seconds) == 5


def test_ratio_compares_rounds_not_medians():
    slower, faster = timing.Timing((2.0, 30.0, 4.0)), timing.Timing((1.0, 10.0, 1.0))
    assert timing.ratio(slower, faster) == timing.Ratio(3.0, 2.0, 4.0)


def test_times_are_measured_for_each_norm_and_place(small, monkeypatch):
    results = {}

    def once(contenders, **options):
        results.update((name, call()) for name, call in contenders.items())
        return {name: timing.Timing((1.0,)) for name in contenders}

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
    assert times[0].bandwidth == 2 * 3 * 40 * 4
    assert times[3].bandwidth == 3 * 3 * 40 * 4
    # What was timed last is the gradient by x, and not by dy: a norm does not change when its input is scaled.
    x = np.tile(small[-1].x, (2, 1)).astype(np.float64)
    for backend in ("reference", "cpu"):
        terms = results["RMSNorm" + backend].dx * x
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


def test_bench_on_a_gpu_says_what_is_missing(monkeypatch):
    def missing(x, backend):
        raise ImportError(f"backend {backend!r} needs numba-cuda: pip install")

    monkeypatch.setattr(_backends, "select", missing)
    with pytest.raises(SystemExit, match="backend 'cuda' needs numba-cuda: pip install"):
        cli.main(["bench", "--backend", "cuda"])


def test_interleave_takes_another_clock():
    asked = []

    def measure(call, calls):
        asked.append(calls)
        return 0.25

    timings = timing.interleave({"a": int}, rounds=3, turn_seconds=1.0, measure=measure)
    assert timings["a"].seconds == (0.25,) * 3
    assert asked == [1, 4, 4, 4]  # how long one takes, then as many as fill the turn


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("norm", [inputs.RMS_NORM, inputs.LAYER_NORM], ids=lambda norm: norm.op)
@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_peers_compute_what_we_do(norm, dtype, rng):
    """Those peers that are installed: a contender that computes something else would make the comparison a lie."""
    dtype = inputs.dtype_named(dtype)
    x, dy = (rng.standard_normal((3, 40)).astype(dtype) for _ in range(2))
    weight = rng.uniform(0.5, 1.5, 40).astype(dtype)
    # numbers of size 4, off by less than the rounding of a few steps in the type itself
    tolerance = 64 * float(np.spacing(np.ones((), dtype)))
    y = norm.forward(x, weight, 1e-6, "reference").astype(np.float64)
    grads = norm.backward(dy, x, weight, 1e-6, "reference")[:2]
    for _, call in peers.calls(peers.Problem(norm.op, "forward", x, weight, dy, 1e-6), threads=1):
        np.testing.assert_allclose(peers.as_numpy(call()), y, rtol=0, atol=tolerance)
    for _, call in peers.calls(peers.Problem(norm.op, "forward+backward", x, weight, dy, 1e-6), threads=1):
        for got, expected in zip(call(), grads, strict=True):
            np.testing.assert_allclose(peers.as_numpy(got), expected.astype(np.float64), rtol=0, atol=tolerance)


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


def test_plot_draws_a_line_for_each_contender(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`, not with `test`")
    entries = [bench.Entry(name, (1.0,), 1.0, 2e9, timing.Ratio(1, 1, 1), None) for name in ("rmsnorm_np", "limit")]
    cases = [
        bench.Case(norm.label, "forward", "bfloat16", (rows, 8), tuple(entries))
        for norm in bench.NORMS
        for rows in (4, 2)
    ]
    assert plot.lines(cases[:2]) == {name: [(32, 2.0), (64, 2.0)] for name in ("rmsnorm_np", "limit")}
    plot.draw(cases, str(tmp_path / "picture.svg"))
    picture = (tmp_path / "picture.svg").read_text()
    assert "<!-- RMSNorm, forward -->" in picture
    assert "<!-- LayerNorm, forward -->" in picture


def test_info_prints_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["rmsnorm_np"] == rn.__version__
    assert found["cpu"]["threads"] >= 1
    assert found["engines"]["reference"] == found["engines"]["cpu"] == "available"


def test_info_names_what_is_missing(monkeypatch):
    def refuse(name):
        if name == "rmsnorm_np.cuda":
            raise ImportError("no such thing")

    monkeypatch.setattr(info, "import_module", refuse)
    assert info.engines()["cuda"].startswith("not available: needs numba-cuda")
    assert info.engines()["cpu"] == "available"


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


# The second compiler


def test_compiling_ahead_ends_its_process(monkeypatch):
    started = []
    popen = ahead.subprocess.Popen

    def wait_for_input(command, **options):
        started.append(
            popen([command[0], "-c", "import sys; sys.stdin.read()"], stdin=ahead.subprocess.PIPE, **options)
        )
        return started[0]

    monkeypatch.setattr(ahead, "_would_help", lambda: True)
    monkeypatch.setattr(ahead.subprocess, "Popen", wait_for_input)
    with ahead.compiling(["float64"]):
        assert started[0].poll() is None
    assert started[0].returncode != 0  # killed; it would end with 0 when its input is closed


def test_ahead_compiles_only_what_it_is_told(monkeypatch):
    done = []
    monkeypatch.setattr(checks, "check_engine", lambda norm, activation, dtype: done.append((norm.op, dtype.name)))
    monkeypatch.setattr(checks, "check_gradients", lambda norm, activation, backend: done.append((norm.op, backend)))
    ahead.main(["bfloat16"])
    assert done == [("rms_norm", "bfloat16"), ("rms_norm", "bfloat16"), ("layer_norm", "bfloat16")]
