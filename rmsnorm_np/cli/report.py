"""The main job: the inputs, the errors of the engine and of plain NumPy on them, and how long each norm takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.console import Console
from rich.text import Text

from rmsnorm_np.cli import checks, console, plain
from rmsnorm_np.cli.checks import Error, Gradient, LayerCheck, Step
from rmsnorm_np.cli.inputs import LAYER_NORM, LAYERS, NORMS, Array, Norm, activations
from rmsnorm_np.cli.timing import Call, Ratio, interleave, ratio

ROWS = {"in cache": 512, "in memory": 16384}  # 1.2 MB and 38 MB of float32 in, as much out
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Engine:
    """What the CPU engine runs on."""

    processor: str  # as LLVM names it
    vector_bits: int | None
    threads: int
    threading_layer: str


@dataclass(frozen=True)
class NormTime:
    """The time of one norm on the CPU engine, in plain NumPy and with the reference."""

    norm: str
    direction: str  # "forward" or "backward"
    place: str  # a key of ROWS
    shape: tuple[int, int]
    cpu: float  # seconds per call
    numpy: float
    reference: float
    over_numpy: Ratio  # NumPy's time over that of the CPU engine
    over_reference: Ratio
    bandwidth: float  # bytes a second that the CPU engine reads and writes
    against_layer_norm: Ratio  # this norm's time over LayerNorm's, both on the CPU engine


def report(as_json: bool, with_times: bool) -> int:
    """Run the job and print it. The exit code is 1 if a check failed."""
    total = checks.count_steps() + (len(ROWS) * len(DIRECTIONS) if with_times else 0)
    with console.progress(total) as step:
        layers = checks.check(step)
        times = measure_times(step) if with_times else []
    passed = all(layer.passed for layer in layers)
    if as_json:
        console.print_json({"passed": passed, "engine": engine(), "layers": layers, "times": times})
    else:
        render(console.stdout(), engine(), layers, times)
    return 0 if passed else 1


def engine() -> Engine:
    """What the times and errors were measured on."""
    from rmsnorm_np import cpu

    found = cpu.describe()
    return Engine(found["cpu"], found["vector_bits"], found["threads"], found["threading_layer"])


def measure_times(step: Step) -> list[NormTime]:
    """Time the norms three ways, in turn, on the activations of layer `last`, repeated.

    The kernels have been compiled by then: the checks call them with arguments of the same types.
    """
    source = next(activation for activation in activations() if activation.layer == "last")
    measured = []
    for place, rows in ROWS.items():
        x = np.tile(source.x, (rows // len(source.x), 1))
        dy = np.random.default_rng(0).standard_normal(x.shape, dtype=np.float32)
        for direction in DIRECTIONS:
            step(f"time: {direction}, {place}")
            contenders = {
                f"{norm.label}, {way}": call
                for norm in NORMS
                for way, call in _ways(norm, direction, dy, x, source.weight, source.eps).items()
            }
            timings = interleave(contenders, budget_seconds=2.5, called_before=True)
            for norm in NORMS:
                cpu, plain_, reference = (timings[f"{norm.label}, {way}"] for way in ("cpu", "numpy", "reference"))
                measured.append(
                    NormTime(
                        norm.label,
                        direction,
                        place,
                        x.shape,
                        cpu.median,
                        plain_.median,
                        reference.median,
                        ratio(plain_, cpu),
                        ratio(reference, cpu),
                        norm.arrays_moved(direction) * x.nbytes / cpu.median,
                        ratio(cpu, timings[f"{LAYER_NORM.label}, cpu"]),
                    )
                )
    return measured


def _ways(norm: Norm, direction: str, dy: Array, x: Array, weight: Array, eps: float) -> dict[str, Call]:
    if direction == "forward":
        residual = checks.another(x) if norm.adds else None
        return {
            "reference": partial(norm.forward, x, weight, eps, "reference", residual=residual),
            "numpy": partial(plain.forward, norm, x, weight, eps, residual=residual),
            "cpu": partial(norm.forward, x, weight, eps, "cpu", residual=residual),
        }
    dh = checks.another(dy) if norm.adds else None
    return {
        "reference": partial(norm.backward, dy, x, weight, eps, "reference", dh=dh),
        "numpy": partial(plain.backward, norm, dy, x, weight, eps, dh=dh),
        "cpu": partial(norm.backward, dy, x, weight, eps, "cpu", dh=dh),
    }


def render(out: Console, engine: Engine, layers: Sequence[LayerCheck], times: Sequence[NormTime]) -> None:
    """Print the tables."""
    _render_engine(out, engine)
    _render_inputs(out, layers)
    _render_errors(out, layers)
    _render_gradients(out, layers)
    _render_naive(out, layers)
    if times:
        _render_times(out, times)
    failed = [layer.layer for layer in layers if not layer.passed]
    if failed:
        out.print(f"FAILED: {', '.join(failed)}", style="bold red")
    else:
        out.print("All checks passed.", style="bold green")


def _render_engine(out: Console, engine: Engine) -> None:
    width = "vectors of unknown width" if engine.vector_bits is None else f"{engine.vector_bits}-bit vectors"
    threads = f"{engine.threads} thread{'' if engine.threads == 1 else 's'} ({engine.threading_layer})"
    out.print(f"CPU engine: {engine.processor}, {width}, {threads}")
    out.print()


def _render_inputs(out: Console, layers: Sequence[LayerCheck]) -> None:
    drawn = console.table("layer", "position", "rms", "median |x|", "largest |x|", left=2)
    for layer in layers:
        stats = layer.input
        drawn.add_row(layer.layer, LAYERS[layer.layer], *map(_figure, (stats.rms, stats.median, stats.largest)))
    what = "64 tokens of 576 elements, float32: the inputs of four of the 61 norms in SmolLM2-135M."
    console.show(out, "Inputs", drawn, what)


def _render_errors(out: Console, layers: Sequence[LayerCheck]) -> None:
    bounds = {error.dtype: error.bound for error in layers[0].errors}
    drawn = console.table("layer", "norm", *(f"{name}\ny   dx/dw" for name in bounds), left=2)
    for layer in layers:
        for norm in NORMS:
            cells = [_error_cell(error) for error in layer.errors if error.norm == norm.label]
            last = norm is NORMS[-1]
            drawn.add_row(layer.layer if norm is NORMS[0] else "", norm.label, *cells, end_section=last)
    console.show(
        out,
        "Accuracy: CPU engine against the reference, largest error in ULP",
        drawn,
        "+ RMSNorm: add_rms_norm; its sum h counts under y. 0.5 is the exact result, rounded once; float64 is "
        "compared with a reference that is itself rounded. Bounds: "
        + ", ".join(f"{name} {bound:g}" for name, bound in bounds.items())
        + ".",
    )


def _error_cell(error: Error) -> Text:
    text = f"{error.y:.2f}  {max(error.dx, error.dweight):.2f}"
    return Text(text, style="" if error.passed else "bold red")


def _render_gradients(out: Console, layers: Sequence[LayerCheck]) -> None:
    drawn = console.table("layer", "reference", "CPU engine", "tolerance", "verdict")
    for layer in layers:
        reference, cpu = (_worst_gradient(layer, backend) for backend in checks.METHODS)
        verdicts = sorted({gradient.verdict for gradient in layer.gradients})
        drawn.add_row(
            layer.layer,
            f"{reference.error:.0e}",
            f"{cpu.error:.0e} ± {cpu.estimate_error:.0e}",
            f"{cpu.tolerance:.0e}",
            Text(" and ".join(verdicts), style="green" if verdicts == ["right"] else "bold red"),
        )
    console.show(
        out,
        "Gradients: largest relative error of the norms, float64",
        drawn,
        "The reference against the complex step; the CPU engine against adaptive finite differences (± their own "
        "error).",
    )


def _worst_gradient(layer: LayerCheck, backend: str) -> Gradient:
    found = [gradient for gradient in layer.gradients if gradient.backend == backend]
    return max(found, key=lambda gradient: (not gradient.passed, gradient.error))


def _render_naive(out: Console, layers: Sequence[LayerCheck]) -> None:
    names = [naive.dtype for naive in layers[0].naive]
    columns = (f"{name}\n{what}" for name in names for what in ("lost rows", "ULP"))
    drawn = console.table("layer", *columns, "rmsnorm_np\nULP, both")
    for layer in layers:
        cells = []
        for naive in layer.naive:
            lost = f"{naive.lost_rows} of {naive.rows}" if naive.lost_rows else "none"
            ulp = "" if naive.lost_rows == naive.rows else f"{naive.ulp:.2f}"
            cells += [Text(lost, style="red" if naive.lost_rows else ""), Text(ulp)]
        ours = max(error.y for error in layer.errors if error.norm == NORMS[0].label and error.dtype in names)
        drawn.add_row(layer.layer, *cells, f"{ours:.2f}")
    console.show(
        out,
        "Plain NumPy: x / sqrt(mean(x * x) + eps) * weight, every step in x's dtype",
        drawn,
        "Lost rows: the squares overflow, and y is zero. ULP: largest error of y in the rows that are not lost.",
    )


def _render_times(out: Console, times: Sequence[NormTime]) -> None:
    for place in ROWS:
        chosen = [time for time in times if time.place == place]
        drawn = console.table("", "CPU", "GB/s", "NumPy", "speed-up\nover NumPy", "reference", "time /\nLayerNorm")
        for time in chosen:
            if time.norm == NORMS[0].label:
                drawn.add_row(Text(time.direction, style="italic"))
            drawn.add_row(
                time.norm,
                console.seconds(time.cpu),
                console.three_digits(time.bandwidth / 1e9),
                console.seconds(time.numpy),
                console.ratio(time.over_numpy),
                f"{console.seconds(time.reference)} ({console.times(time.over_reference.median)})",
                f"{time.against_layer_norm.median:.2f}",
                end_section=time.norm == NORMS[-1].label,
            )
        rows, n = chosen[0].shape
        console.show(out, f"Speed, {place}: float32, {rows}×{n}, {rows * n * 4 / 1e6:.1f} MB", drawn)
    console.legend(
        out,
        "Medians of interleaved rounds, in brackets their extremes. + RMSNorm: add_rms_norm, the addition of a "
        "residual included. CPU: this package's engine. GB/s: the bytes that it has to read and write, over its time. "
        "NumPy: the norm in plain NumPy, every step in float32. reference: rmsnorm_np.reference, in float64; in "
        "brackets how many times as long as the CPU engine it takes.",
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
