"""The command line: ``python -m rmsnorm_np``, installed as ``rmsnorm-np``.

Measuring (`checks`, `timing`, `peers`, the functions `measure…` and `collect`) returns plain data; drawing is apart
from it, in `console` and the functions `render…`.
"""

from __future__ import annotations

import _thread
import argparse
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import rmsnorm_np as rn
from rmsnorm_np.cli.inputs import DTYPES
from rmsnorm_np.cli.peers import PEERS

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
FAMILY = (
    "l2_norm", "gated_rms_norm", "quantized_rms_norm", "rms_norm_jvp", "rms_norm_double_backward", "layer_norm_jvp",
    "layer_norm_double_backward",
)  # fmt: skip
DEFAULT_SHAPES = ((1, 4096), (512, 768), (8192, 4096))

# Exit codes. Those of programs that a signal ends: 128 and its number, on each system.
USAGE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    The result is the exit code: 0; 1 if a check failed; 2 (by SystemExit) for arguments that make no sense or ask for
    what is not there; 130 after Ctrl-C; 141 if the reader of the output has closed it.
    """
    command_line = parser()
    options = command_line.parse_args(arguments, argparse.Namespace(json=False))
    try:
        with _interruptible():
            code = _run(options)
            sys.stdout.flush()
    except argparse.ArgumentError as error:
        command_line.exit(USAGE, f"{command_line.prog}: error: {error}\n")
    except BrokenPipeError:
        # what is left to print must not fail again when the interpreter closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within this context Ctrl-C also ends a compilation.

    Where it falls into a function that LLVM calls back, Python drops the KeyboardInterrupt and reports it as ignored:
    it is sent again a moment later.
    """
    before = sys.unraisablehook

    def hook(dropped: UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        again = threading.Timer(0.05, _thread.interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _run(options: argparse.Namespace) -> int:
    # Imported here, as each loads rich and one of them the whole CPU engine: --help must not wait for that.
    if options.command == "bench":
        from rmsnorm_np.cli.bench import bench

        return bench(
            options.shapes, options.dtype, options.backend, options.rounds, options.json, options.plot, options.peers,
            options.norms,
        )  # fmt: skip
    if options.command == "info":
        from rmsnorm_np.cli.info import info

        return info(options.json)
    if options.command == "warmup":
        from rmsnorm_np.cli.info import warmup

        return warmup(options.dtypes or DTYPES, options.json)
    if options.command == "check" and options.norms:
        from rmsnorm_np.cli.family import check

        return check(options.norms, options.json)
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
        description="Without a command: check the norms on activations of a real language model, then time them. "
        "Exit code 1 if a check fails.",
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {rn.__version__}")
    commands = top.add_subparsers(dest="command", metavar="command", title="commands")
    check = commands.add_parser("check", parents=[json], help="check, without timing")
    check.add_argument("--norms", nargs="+", choices=FAMILY, help="check these functions in place of the norms")
    bench = commands.add_parser("bench", parents=[json], help=f"time the norms and those of {', '.join(PEERS)}")
    bench.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        default=list(DEFAULT_SHAPES),
        metavar="ROWSxN",
        help="default: " + " ".join(f"{rows}x{n}" for rows, n in DEFAULT_SHAPES),
    )
    bench.add_argument("--dtype", choices=DTYPES, default="float32")
    bench.add_argument(
        "--norms", nargs="+", choices=NORMS + FAMILY, default=list(NORMS[:2]), help=f"default: {' '.join(NORMS[:2])}"
    )
    bench.add_argument("--backend", choices=("cpu", "reference", "cuda"), default="cpu")
    bench.add_argument("--rounds", type=_positive, default=7, help="times that each is measured (default: 7)")
    bench.add_argument("--plot", metavar="FILE", help="plot bandwidth against size: .png, .svg, .pdf … (matplotlib)")
    bench.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        help="compare with these only, or with none (default: all that are installed); on few cores the threads of "
        "each library slow down the others",
    )
    commands.add_parser("info", parents=[json], help="show versions, processor, threads, cache folder and engines")
    warmup = commands.add_parser("warmup", parents=[json], help="compile all kernels now and keep them on disk")
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
