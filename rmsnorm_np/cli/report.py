"""The main job: what came in, whether the engine is right, what naive code does, and how long each norm takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.console import Console
from rich.text import Text

from rmsnorm_np.cli import checks, console
from rmsnorm_np.cli.checks import Error, Gradient, LayerCheck, Step
from rmsnorm_np.cli.inputs import LAYERS, NORMS, activations
from rmsnorm_np.cli.timing import Call, Ratio, interleave, ratio

ROWS = {"in cache": 512, "in memory": 16384}  # 1.2 MB and 38 MB of float32 in, as much out
ARRAYS_MOVED = {"forward": 2, "backward": 3}  # x, y; dy, x, dx


@dataclass(frozen=True)
class NormTime:
    """The time of one norm, with the reference and with the CPU engine."""

    norm: str
    direction: str  # "forward" or "backward"
    place: str  # a key of ROWS
    shape: tuple[int, int]
    reference: float  # seconds per call
    cpu: float
    speedup: Ratio
    bandwidth: float  # bytes a second that the CPU engine reads and writes
    against_layer_norm: Ratio  # this norm's time over LayerNorm's, both on the CPU engine


def report(as_json: bool, with_times: bool) -> int:
    """Run the job and print it. The exit code is 1 if a check failed."""
    total = checks.count_steps() + (len(ROWS) * len(ARRAYS_MOVED) if with_times else 0)
    with console.progress(total) as step:
        layers = checks.check(step)
        times = measure_times(step) if with_times else []
    passed = all(layer.passed for layer in layers)
    if as_json:
        console.print_json({"passed": passed, "layers": layers, "times": times})
    else:
        render(Console(highlight=False), layers, times)
    return 0 if passed else 1


def measure_times(step: Step) -> list[NormTime]:
    """Time the three norms on both engines, in turn, on the activations of layer `last`, repeated."""
    source = next(activation for activation in activations() if activation.layer == "last")
    weight, eps = source.weight, source.eps
    measured = []
    for place, rows in ROWS.items():
        x = np.tile(source.x, (rows // len(source.x), 1))
        dy = np.random.default_rng(0).standard_normal(x.shape, dtype=np.float32)
        for direction, arrays in ARRAYS_MOVED.items():
            step(f"time: {direction}, {place}")
            contenders: dict[str, Call] = {}
            for norm in NORMS:
                for backend in ("reference", "cpu"):
                    contenders[norm.label + backend] = (
                        partial(norm.forward, x, weight, eps, backend)
                        if direction == "forward"
                        else partial(norm.backward, dy, x, weight, eps, backend)
                    )
            timings = interleave(contenders, budget_seconds=2.5)
            for norm in NORMS:
                reference, cpu = timings[norm.label + "reference"], timings[norm.label + "cpu"]
                measured.append(
                    NormTime(
                        norm.label,
                        direction,
                        place,
                        x.shape,
                        reference.median,
                        cpu.median,
                        ratio(reference, cpu),
                        arrays * x.nbytes / cpu.median,
                        ratio(cpu, timings["LayerNormcpu"]),
                    )
                )
    return measured


def render(out: Console, layers: Sequence[LayerCheck], times: Sequence[NormTime]) -> None:
    """Print the tables."""
    _render_came(out, layers)
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


def _render_came(out: Console, layers: Sequence[LayerCheck]) -> None:
    drawn = console.table("layer", "where", "rms", "median |x|", "largest |x|", left=2)
    for layer in layers:
        came = layer.came
        drawn.add_row(layer.layer, LAYERS[layer.layer], *map(_figure, (came.rms, came.median, came.largest)))
    console.show(
        out,
        "What came in",
        "64 tokens of 576 numbers, float32, entering four of the 61 norms of SmolLM2-135M.",
        drawn,
    )


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
        "Is it right? CPU engine against the reference, worst error in ULP",
        "0.5 is the exact result rounded once; float64 is compared with a rounded reference. Accepted up to: "
        + ", ".join(f"{name} {bound:g}" for name, bound in bounds.items())
        + ".",
        drawn,
    )


def _error_cell(error: Error) -> Text:
    text = f"{error.y:.2f}  {max(error.dx, error.dweight):.2f}"
    return Text(text, style="" if error.passed else "bold red")


def _render_gradients(out: Console, layers: Sequence[LayerCheck]) -> None:
    drawn = console.table("layer", "reference", "CPU engine", "accepted up to", "verdict")
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
        "Is the gradient the derivative? Relative error, float64, worst of the norms",
        "The reference against the complex step, the CPU engine against adaptive differences (± their own error).",
        drawn,
    )


def _worst_gradient(layer: LayerCheck, backend: str) -> Gradient:
    found = [gradient for gradient in layer.gradients if gradient.backend == backend]
    return max(found, key=lambda gradient: (not gradient.passed, gradient.error))


def _render_naive(out: Console, layers: Sequence[LayerCheck]) -> None:
    names = [naive.dtype for naive in layers[0].naive]
    columns = (f"{name}\n{what}" for name in names for what in ("rows lost", "ULP"))
    drawn = console.table("layer", *columns, "rmsnorm_np\nULP, either")
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
        "What x / sqrt(mean(x * x) + eps) * weight makes of it, all in x's own type",
        "Lost: the squares overflowed and the row came out as zeros. ULP: the worst error in the other rows.",
        drawn,
    )


def _render_times(out: Console, times: Sequence[NormTime]) -> None:
    for place in ROWS:
        chosen = [time for time in times if time.place == place]
        drawn = console.table("", "norm", "reference", "CPU", "GB/s", "faster", "time /\nLayerNorm", left=2)
        for time in chosen:
            drawn.add_row(
                time.direction if time.norm == NORMS[0].label else "",
                time.norm,
                console.seconds(time.reference),
                console.seconds(time.cpu),
                f"{time.bandwidth / 1e9:.1f}",
                console.ratio(time.speedup),
                f"{time.against_layer_norm.median:.2f}",
                end_section=time.norm == NORMS[-1].label,
            )
        rows, n = chosen[0].shape
        console.show(
            out,
            f"How long it takes, {place}: float32, {rows}×{n}, {rows * n * 4 / 1e6:.1f} MB",
            "Median of interleaved rounds, in brackets their extremes. GB/s: what the norm has to read and write.",
            drawn,
        )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
