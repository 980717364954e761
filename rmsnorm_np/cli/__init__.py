"""The command line: ``python -m rmsnorm_np``, installed as ``rmsnorm-np``.

Measuring (`checks`, `timing`, `peers`, the functions `measure…` and `collect`) returns plain data; drawing is apart
from it, in `console` and the functions `render…`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

DTYPES = ("float32", "float64", "float16", "bfloat16")
PEERS = ("torch", "jax", "onnxruntime", "openvino")  # names to import, and to install
DEFAULT_SHAPES = ((1, 4096), (512, 768), (8192, 4096))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit code, 1 if a check failed."""
    options = parser().parse_args(arguments, argparse.Namespace(json=False))
    # Imported here, as each loads rich and one of them the whole CPU engine: --help must not wait for that.
    if options.command == "bench":
        from rmsnorm_np.cli.bench import bench

        return bench(
            options.shapes, options.dtype, options.backend, options.rounds, options.json, options.plot, options.peers
        )
    if options.command == "info":
        from rmsnorm_np.cli.info import info

        return info(options.json)
    if options.command == "warmup":
        from rmsnorm_np.cli.info import warmup

        return warmup(options.dtypes or DTYPES, options.json)
    from rmsnorm_np.cli.report import report

    return report(options.json, with_times=options.command is None)


def parser() -> argparse.ArgumentParser:
    """What the command line understands."""
    json = argparse.ArgumentParser(add_help=False)
    # Accepted before and after the command; with a default, the command would reset what came before it.
    json.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON, nothing else, on stdout"
    )
    top = argparse.ArgumentParser(
        prog="rmsnorm-np",
        parents=[json],
        description="Check the norms on activations of a real language model, then time them. "
        "Exit code 1 if a check fails.",
    )
    commands = top.add_subparsers(dest="command", metavar="command", title="instead of all that")
    commands.add_parser("check", parents=[json], help="only check")
    bench = commands.add_parser("bench", parents=[json], help="time against torch, jax and onnxruntime")
    bench.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        default=list(DEFAULT_SHAPES),
        metavar="ROWSxN",
        help="default: " + " ".join(f"{rows}x{n}" for rows, n in DEFAULT_SHAPES),
    )
    bench.add_argument("--dtype", choices=DTYPES, default="float32")
    bench.add_argument("--backend", choices=("cpu", "reference", "cuda"), default="cpu")
    bench.add_argument("--rounds", type=_positive, default=7, help="how often each is timed (default: 7)")
    bench.add_argument("--plot", metavar="FILE", help="draw bandwidth against size, as .png, .svg or .pdf (matplotlib)")
    bench.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        default=list(PEERS),
        help="compare with these only, or with none (default: all installed ones): where cores are few, the threads of "
        "each library slow the others",
    )
    commands.add_parser("info", parents=[json], help="versions, processor, threads, cache folder, engines")
    warmup = commands.add_parser("warmup", parents=[json], help="compile everything now and keep it")
    warmup.add_argument("dtypes", nargs="*", type=_dtype, metavar="DTYPE", help="only these: " + ", ".join(DTYPES))
    return top


def _shape(text: str) -> tuple[int, int]:
    rows, cross, n = text.lower().partition("x")
    if not (cross and rows.isdigit() and n.isdigit() and int(rows) and int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape, expected rows and row length such as 512x768")
    return int(rows), int(n)


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds, expected 1 or more")
    return int(text)


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a dtype, expected one of {', '.join(DTYPES)}")
    return text
