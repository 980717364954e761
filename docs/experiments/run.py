"""Train one of the paper's models, or measure the time of its training step; every result is a JSON file in results/.

    python docs/experiments/run.py rnnsearch --norm rms           trains, then tests
    python docs/experiments/run.py rnnsearch --set p=0.5 --seed 2
    python docs/experiments/run.py rnnsearch --time --size paper  seconds per step with each norm
    python docs/experiments/run.py equation10                     a training run that shows equation 10
    python docs/experiments/run.py all                            every stored result that is not there yet

Training can be stopped (Ctrl-C) and continues from its last checkpoint; the other runs start over. A result that is
there already is not made again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from ast import literal_eval
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import equation10
import rmsnorm_np as rn
from norms import KINDS, Norm
from timing import keep_memory, measure
from training import train

EQUATION10 = "equation10"  # not a model: RNNSearch in a run of its own kind
MODELS = ("rnnsearch", "transformer", "reader", "order_embeddings", "convpool")
RESULTS = Path(__file__).with_name("results")
SEEDS = 3
ROUNDS = {"small": 20, "paper": 5}  # of --time


class Job(NamedTuple):
    """One result: a model, and what its configuration differs in from the size's."""

    model: str
    size: str = "small"
    settings: tuple[tuple[str, Any], ...] = ()  # norm first
    seed: int = 1
    time: bool = False

    @property
    def name(self) -> str:
        """Of its file in results/."""
        settings = [str(value) if key == "norm" else f"{key}={value}" for key, value in self.settings]
        return "-".join([self.model, self.size, *(["time"] if self.time else []), *settings, f"seed{self.seed}"])


def configure(model: Any, job: Job) -> Any:
    """The model's Config for a job. A setting is a field of Config, or "norm", "p" or "fused" of its norm."""
    config = model.SIZES[job.size]
    for key, value in job.settings:
        if key == "norm":
            config = replace(config, norm=config.norm._replace(kind=value))
        elif key in ("p", "fused"):
            config = replace(config, norm=config.norm._replace(**{key: value}))
        elif key in {field.name for field in fields(config)}:
            config = replace(config, **{key: value})
        else:
            names = ", ".join(["p", "fused", *(field.name for field in fields(config))])
            raise ValueError(f"setting is {key!r}, expected one of {names}")
    return config


def all_jobs() -> Iterator[Job]:
    """Every stored result: the models' EXPERIMENTS with three seeds (or their own "seeds"), and both sizes' time."""
    yield Job(EQUATION10)
    for name in MODELS:
        model = importlib.import_module(name)
        for size in ("small", "paper"):
            yield Job(name, size, time=True)
        for experiment in model.EXPERIMENTS:
            settings = tuple((key, value) for key, value in experiment.items() if key != "seeds")
            for seed in range(1, experiment.get("seeds", SEEDS) + 1):
                yield Job(name, settings=settings, seed=seed)


def run(job: Job, progress: Progress, folder: Path) -> dict[str, Any]:
    """Make one result and store it."""
    model = importlib.import_module("rnnsearch" if job.model == EQUATION10 else job.model)
    config = configure(model, job)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if job.time:
        if job.size == "small":
            _, config = model.load(config)  # has the vocabulary of the data; the paper's size has its own
        rounds = config.steps if "steps" in dict(job.settings) else ROUNDS[job.size]
        variants = sum(1 if kind in ("none", "batch", "weight") else 2 for kind in model.NORMS)
        task = progress.add_task(job.name, total=variants * (rounds + 1), loss="", quality="")
        found = {"time": measure(model, config, rounds, job.seed, lambda: progress.advance(task))}
    elif job.model == EQUATION10:
        steps = config.steps if "steps" in dict(job.settings) else equation10.STEPS
        task = progress.add_task(job.name, total=len(equation10.CASES) * steps, loss="", quality="")
        found = {"curves": equation10.measure(config, job.seed, steps, lambda: progress.advance(task))}
    else:
        task = progress.add_task(job.name, total=config.steps, loss="", quality="")
        loaded, config = model.load(config)

        def show(step: int, loss: float, quality: float | None) -> None:
            shown = "" if quality is None else f"{model.METRIC} {quality:.3g}"
            progress.update(task, completed=step, loss=f"loss {loss:.3f}", quality=shown)

        checkpoint = folder / "unfinished" / f"{job.name}.npz"
        found = train(model, loaded, config, job.seed, checkpoint, show)
    result = {
        "model": job.model,
        "size": job.size,
        "seed": job.seed,
        "settings": dict(job.settings),
        "config": {**asdict(config), "norm": config.norm._asdict()},
        "started": started,
        "machine": machine(),
        "versions": versions(),
        **found,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{job.name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if "curve" in found:
        checkpoint.unlink(missing_ok=True)
    return result


def machine() -> dict[str, Any]:
    """What the run was made on."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    cpu = models[0].partition(": ")[2] if models else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": rn.get_num_threads(), "platform": platform.platform()}


def versions() -> dict[str, str]:
    """Of everything that computes."""
    packages = ("numpy", "scipy", "numba", "sacrebleu")
    return {"python": platform.python_version(), "rmsnorm_np": rn.__version__} | {
        name: metadata.version(name) for name in packages
    }


def show_result(result: dict[str, Any], out: Console) -> None:
    """Print the figures of one result."""
    if "curves" in result:
        table = Table("norm", "initial weights", "their learning rate", "last loss")
        for row in result["curves"]:
            table.add_row(row["norm"], f"{row['delta']} W", f"{row['factor']} η", f"{row['losses'][-1]:.6f}")
        out.print(table)
        return
    if "time" not in result:
        if result["diverged"] is not None:
            out.print(f"diverged at step {result['diverged']}")
            return
        out.print("test:", ", ".join(f"{name} {value:.4g}" for name, value in result["test"].items()))
        if "baselines" in result:
            out.print("baselines:", ", ".join(f"{name} {value:.4g}" for name, value in result["baselines"].items()))
        for entry in [*result.get("translations", []), *result.get("answers", [])]:
            out.print("", *(f"{name:12} {text}" for name, text in entry.items()), sep="\n")
        return
    table = Table("norm", "computed by", "s a step", "quartiles", "saved against LayerNorm")
    for row in result["time"]:
        way = {None: "", False: "NumPy", True: "kernels"}[row["fused"]]
        low, high = row["quartiles"]
        table.add_row(
            row["norm"], way, f"{row['median']:.4g}", f"{low:.4g} to {high:.4g}", f"{100 * row['saving']:.1f} %"
        )
    out.print(table)


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as Python writes it or a bare word."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE")
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=(*MODELS, EQUATION10, "all"))
    parser.add_argument("--norm", choices=KINDS, default=Norm("rms").kind)
    parser.add_argument("--size", choices=("small", "paper"), default="small")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="training steps; with --time, steps of each variant")
    parser.add_argument("--time", action="store_true", help="measure seconds per step with each norm, do not train")
    parser.add_argument("--set", type=setting, action="append", default=[], dest="settings", metavar="NAME=VALUE")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON files")
    options = parser.parse_args(arguments)
    if options.model == EQUATION10 and (options.time or options.size != "small"):
        parser.error(f"{EQUATION10} is one training run of the small size: without --time and --size")
    return options


def main(arguments: list[str]) -> int:
    """Run what the command line says."""
    options = parse(arguments)
    keep_memory()
    rn.set_num_threads(1)  # the norms are small, and idle threads of a second pool take the processor from BLAS's
    if options.model == "all":
        jobs = list(all_jobs())
    else:
        settings = () if options.time or options.model == EQUATION10 else (("norm", options.norm),)
        steps = () if options.steps is None else (("steps", options.steps),)
        jobs = [Job(options.model, options.size, (*settings, *options.settings, *steps), options.seed, options.time)]
    out = Console(highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]} {task.fields[quality]}"),
    )
    for number, job in enumerate(jobs, 1):
        stored = options.results / f"{job.name}.json"
        if stored.exists():
            out.print(f"{job.name}: there already ({stored})")
            result = json.loads(stored.read_text(encoding="utf-8"))
        else:
            if len(jobs) > 1:
                out.print(f"{number} of {len(jobs)}: {job.name}")
            with Progress(*columns, console=out) as progress:
                try:
                    result = run(job, progress, options.results)
                except KeyboardInterrupt:
                    out.print("stopped: the same command continues training from the last checkpoint")
                    return 130
        if len(jobs) == 1:
            show_result(result, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
