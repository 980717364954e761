"""Is HEAD slower than BASE on this machine? ``python asv_benchmarks/gate.py BASE [HEAD]``

Prints the ratio of each benchmark. Exit code 0: the same or faster. 1: slower; which benchmark, by how much and how
sure is printed. 2: something did not run: a commit that does not exist or build, a benchmark that fails.

``asv continuous`` measures, in rounds that alternate between the two commits, each built from source in asv's own
environment. A benchmark is under suspicion if asv's test says that the samples differ (Mann-Whitney, p < 0.002) and
both their medians and the quickest of them do by more than a factor. That is not enough: the samples of one process are
not independent. Processes of one commit differ by a tenth and more, by where their memory lies and what the neighbours
do. So what is under suspicion is measured again, from nothing and in eight rounds, and the same test is put to the
rounds' medians (p < 0.01), one number a process. It is slower only if that says so, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SAME, SLOWER, FAILED = 0, 1, 2
BENCHMARKS = r"^speed\.Float32"
FACTOR = 1.1
ROUNDS = 2, 8  # of the first measurement, and of that of what is under suspicion
SURE = 0.002, 0.01  # what p has to be below: of samples, as in asv, then of rounds; eight can show as little as 0.0002
SAMPLES = 30  # of one benchmark in one round


@dataclass(frozen=True)
class Comparison:
    """One benchmark on two commits. A value is None where the benchmark failed, NaN where it was skipped."""

    benchmark: str
    base: float | None
    head: float | None
    p: float = 0.0  # how probable such a difference would be of equals; 0 for a figure that is counted, not sampled
    quick: float = math.nan  # the ratio of the quickest samples: other processes can only add to a time
    low: float = math.nan  # 99 % confidence interval of the ratio, from the ratios of the rounds
    high: float = math.nan

    @property
    def failed(self) -> bool:
        return self.base is None or self.head is None

    @property
    def skipped(self) -> bool:
        return not self.failed and (math.isnan(self.base) or math.isnan(self.head))

    @property
    def ratio(self) -> float:
        if self.base == self.head:
            return 1.0
        return self.head / self.base if self.base else math.inf

    def is_slower(self, factor: float, sure: float) -> bool:
        if self.failed or self.skipped or self.p >= sure:
            return False
        return self.ratio > factor and (math.isnan(self.quick) or self.quick > factor)


@dataclass(frozen=True)
class Verdict:
    """What is to be told, and the exit code."""

    code: int
    slower: tuple[Comparison, ...] = ()  # as measured again
    failed: tuple[str, ...] = ()
    compared: tuple[Comparison, ...] = ()  # all that neither failed nor were skipped, as measured first
    not_confirmed: tuple[Comparison, ...] = ()  # slower at first, not when measured again


def judge(first: Sequence[Comparison], again: Sequence[Comparison], factor: float) -> Verdict:
    """The verdict on a first measurement of all benchmarks and a second one of those under suspicion."""
    failed = [c.benchmark for c in (*first, *again) if c.failed]
    compared = [c for c in first if not (c.failed or c.skipped)]
    second = {c.benchmark: c for c in again if not (c.failed or c.skipped)}
    slower, not_confirmed = [], []
    for suspect in compared:
        if not suspect.is_slower(factor, SURE[0]):
            continue
        if suspect.benchmark not in second:
            failed.append(suspect.benchmark)
        elif second[suspect.benchmark].is_slower(factor, SURE[1]):
            slower.append(second[suspect.benchmark])
        else:
            not_confirmed.append(suspect)
    code = FAILED if failed or not compared else SLOWER if slower else SAME
    return Verdict(code, tuple(slower), tuple(dict.fromkeys(failed)), tuple(compared), tuple(not_confirmed))


def measure(base: str, head: str, benchmarks: str, rounds: int, name: str) -> list[Comparison]:
    """Have ``asv continuous`` measure two commits, and read what it found; nothing if it could not measure."""
    from asv.config import Config
    from asv.util import load_json

    work = HERE / ".asv" / "gate"
    shutil.rmtree(work / name, ignore_errors=True)  # asv would add to the samples of an earlier run
    work.mkdir(parents=True, exist_ok=True)
    conf = load_json(str(HERE / "asv.conf.json"), js_comments=True)
    conf["results_dir"] = str(work / name)
    for key in "repo", "benchmark_dir", "env_dir":
        conf[key] = str((HERE / conf[key]).resolve())
    path = work / f"{name}.json"
    path.write_text(json.dumps(conf))
    command = [sys.executable, "-m", "asv", "continuous", "--config", str(path), "--interleave-rounds", "--show-stderr"]
    command += ["--factor", str(FACTOR), "--bench", benchmarks, "-a", f"rounds={rounds}", "-a", f"repeat={SAMPLES}"]
    subprocess.run([*command, base, head], check=False)  # it exits with 1 for slower and for much else: see the results
    return compare(Config.load(str(path)), base, head, benchmarks, rounds)


def compare(conf: Any, base: str, head: str, selected: str, rounds: int) -> list[Comparison]:
    """What asv kept of two commits, one comparison for each combination of a benchmark's parameters."""
    from asv.benchmarks import Benchmarks
    from asv.commands.compare import unroll_result
    from asv.results import iter_results
    from asv.util import UserError

    try:
        benchmarks = Benchmarks.load(conf, regex=selected)
    except UserError:  # asv did not come so far
        return []
    results = {result.commit_hash: result for result in iter_results(conf.results_dir)}
    if base not in results or head not in results:
        return []
    comparisons = []
    for name, benchmark in benchmarks.items():
        columns = []
        for result in results[base], results[head]:
            if name in result.get_all_result_keys():
                columns += [
                    of(name, benchmark["params"]) for of in (result.get_result_value, result.get_result_samples)
                ]
            else:
                columns += [None, None]
        for row in unroll_result(name, benchmark["params"], *columns):
            comparisons.append(_comparison(*row, rounds))
    return comparisons


def _comparison(
    name: str, base: float, base_samples: list[float], head: float, head_samples: list[float], rounds: int
) -> Comparison:
    if not base_samples or not head_samples:
        return Comparison(name, base, head)
    from asv._stats import mann_whitney_u
    from asv_runner.statistics import quantile_ci

    quick = min(head_samples) / min(base_samples)
    of_rounds = [medians(samples, rounds) for samples in (base_samples, head_samples)]
    _, p = mann_whitney_u(*((base_samples, head_samples) if rounds == ROUNDS[0] else of_rounds))
    _, (low, high) = quantile_ci([after / before for before, after in zip(*of_rounds, strict=True)], 0.5)
    return Comparison(name, base, head, p, quick, low, high)


def medians(samples: Sequence[float], rounds: int) -> list[float]:
    """The median of each round; asv keeps the samples in the order in which they were taken."""
    count, rest = divmod(len(samples), rounds)
    if rest:
        raise ValueError(f"{len(samples)} samples cannot come from {rounds} rounds")
    return [statistics.median(samples[i * count : (i + 1) * count]) for i in range(rounds)]


def commits(base: str, head: str) -> tuple[str, str]:
    """The hashes of two names. A commit that is to be compared with itself gets a twin, or asv would see only one."""
    hashes = [_git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}") for name in (base, head)]
    if hashes[0] == hashes[1]:
        # the same name, address and date each time: the same hash, so what was built and compiled for it stays good
        who = {"NAME": "gate", "EMAIL": "gate@localhost", "DATE": _git("show", "-s", "--format=%ci", hashes[0])}
        identity = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}
        hashes[1] = _git("commit-tree", "-m", "A twin", "-p", hashes[0], f"{hashes[0]}^{{tree}}", **identity)
    return hashes[0], hashes[1]


def _git(*arguments: str, **environment: str) -> str:
    git = subprocess.run(
        ["git", *arguments], cwd=HERE, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return git.stdout.strip()


def tell(verdict: Verdict, factor: float) -> None:
    """Print the ratio of each benchmark, then the verdict, the most important last."""
    if verdict.compared:
        print("HEAD over BASE, ratio of the medians:")
    for c in verdict.compared:
        print(f"{c.ratio:6.2f}  {c.benchmark}")
    for c in verdict.not_confirmed:
        print(f"not confirmed: {c.benchmark}, {c.ratio:.2f} times as long at first")
    for name in verdict.failed:
        print(f"FAILED: {name}")
    for c in verdict.slower:
        sure = "" if math.isnan(c.low) else f" (99 % confidence: {c.low:.2f} to {c.high:.2f}; p = {c.p:.1g})"
        print(f"SLOWER: {c.benchmark}, {c.ratio:.2f} times as long{sure}")
    outcome = {
        SAME: f"none is slower by a factor of {factor}",
        SLOWER: f"{len(verdict.slower)} slower",
        FAILED: "failed to run",
    }[verdict.code]
    count = len(verdict.compared)
    print(f"{count} benchmark{'' if count == 1 else 's'} compared: {outcome}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, judge and tell; the result is the exit code."""
    parser = argparse.ArgumentParser(
        description="Compare the speed of two commits on this machine. Exit code 0: same, 1: slower, 2: failed to run."
    )
    parser.add_argument("base", help="commit to compare with; HEAD itself shows how steady the machine is")
    parser.add_argument("head", nargs="?", default="HEAD", help="commit under test (default: HEAD)")
    parser.add_argument("--bench", default=BENCHMARKS, help=f"regular expression of benchmarks (default: {BENCHMARKS})")
    parser.add_argument("--factor", type=float, default=FACTOR, help=f"slower by less passes (default: {FACTOR})")
    options = parser.parse_args(arguments)
    try:
        base, head = commits(options.base, options.head)
    except subprocess.CalledProcessError:
        print(f"FAILED: {options.base} or {options.head} is not a commit")
        return FAILED
    first = measure(base, head, options.bench, ROUNDS[0], "first")
    suspects = [c.benchmark for c in first if c.is_slower(options.factor, SURE[0])]
    again = measure(base, head, f"^({'|'.join(map(re.escape, suspects))})$", ROUNDS[1], "again") if suspects else []
    verdict = judge(first, again, options.factor)
    tell(verdict, options.factor)
    return verdict.code


if __name__ == "__main__":
    sys.exit(main())
