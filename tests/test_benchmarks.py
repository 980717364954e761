"""The benchmark gate's verdicts, and what benchmarks do on commits that lack what they measure."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

SUITE = Path(__file__).parent.parent / "asv_benchmarks"


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module here
    spec.loader.exec_module(module)
    return module


gate = _load("benchmark_gate", SUITE / "gate.py")
history = _load("benchmark_history", SUITE / "history.py")
common = _load("benchmark_common", SUITE / "benchmarks" / "common.py")


def timed(name="forward", ratio=1.0, p=1e-5, quick=None):
    """A benchmark that took 2 ms on the base."""
    quick = ratio if quick is None else quick
    return gate.Comparison(name, 2e-3, 2e-3 * ratio, p, quick, 0.9 * ratio, 1.1 * ratio)


def judged(first, again=()):
    return gate.judge(first, again, factor=1.1)


def test_equal_times_are_the_same():
    both = timed(), timed("backward", 0.7)
    verdict = judged(both)
    assert (verdict.code, verdict.slower, verdict.failed, verdict.compared) == (0, (), (), both)


def test_slower_in_both_measurements_is_slower_by_what_the_second_found():
    again = timed("forward", 1.24, p=0.005)
    verdict = judged([timed("forward", 1.5), timed("backward")], [again])
    assert verdict.code == 1
    assert verdict.slower == (again,)


@pytest.mark.parametrize(
    "again",
    [timed(ratio=1.02), timed(ratio=1.3, p=0.01), timed(ratio=1.3, quick=1.0), timed(ratio=0.7)],
    ids=["same", "not sure", "only the slow samples", "faster"],
)
def test_one_measurement_does_not_convict(again):
    first = timed(ratio=1.3)
    verdict = judged([first], [again])
    assert (verdict.code, verdict.slower, verdict.not_confirmed) == (0, (), (first,))


@pytest.mark.parametrize(
    "first",
    [timed(ratio=1.09, quick=1.3), timed(ratio=1.3, p=0.002), timed(ratio=1.3, quick=1.09)],
    ids=["by less than the factor", "asv would not call it different", "only the slow samples"],
)
def test_suspicion_needs_factor_significance_and_the_quick_samples(first):
    assert not first.is_slower(1.1, gate.SURE[0])
    verdict = judged([first], [timed(ratio=1.3)])
    assert (verdict.code, verdict.not_confirmed) == (0, ())


@pytest.mark.parametrize(("base", "head"), [(1.0, None), (None, 1.0), (None, None)])
def test_a_benchmark_that_fails_is_failed_and_not_slower(base, head):
    slow = timed("backward", 1.5)
    verdict = judged([gate.Comparison("forward", base, head), slow], [slow])
    assert (verdict.code, verdict.failed) == (2, ("forward",))
    assert verdict.slower == (slow,)  # it is told nevertheless


def test_nothing_measured_is_failed():
    assert judged([]).code == 2


@pytest.mark.parametrize(("base", "head"), [(math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan)])
def test_skipped_is_neither_failed_nor_compared(base, head):
    skipped = gate.Comparison("cuda", base, head)
    verdict = judged([skipped, timed()])
    assert (verdict.code, verdict.compared) == (0, (timed(),))
    assert judged([skipped]).code == 2  # when there is nothing else, nothing was measured


@pytest.mark.parametrize(
    "again",
    [[], [gate.Comparison("forward", 1.0, None)], [gate.Comparison("forward", math.nan, math.nan)]],
    ids=["not measured", "failed", "skipped"],
)
def test_suspicion_that_could_not_be_followed_up_is_failed(again):
    verdict = judged([timed("forward", 1.5)], again)
    assert (verdict.code, verdict.failed, verdict.slower) == (2, ("forward",), ())


def test_what_is_counted_needs_no_samples():
    worse = gate.Comparison("ulp", 0.5, 0.6)
    assert judged([worse], [worse]).code == 1
    assert judged([gate.Comparison("ulp", 0.5, 0.5)]).code == 0
    assert judged([gate.Comparison("ulp", 0.0, 0.0)]).code == 0
    assert gate.Comparison("ulp", 0.0, 0.5).is_slower(1.1, gate.SURE[0])


def test_the_verdict_names_benchmark_ratio_and_confidence(capsys):
    verdict = judged([timed("forward", 1.24), timed("backward", 1.2)], [timed("forward", 1.25), timed("backward")])
    gate.tell(verdict, 1.1)
    out = capsys.readouterr().out
    assert "SLOWER: forward, 1.25 times as long (99 % confidence: 1.12 to 1.38; p = 1e-05)" in out
    assert "not confirmed: backward, 1.20 times as long at first" in out
    assert out.endswith("2 benchmarks compared: 1 slower\n")


def test_ratios_are_printed_when_nothing_is_slower(capsys):
    gate.tell(
        judged([timed("forward", 1.04), gate.Comparison("ulp", 0.5, 0.45), gate.Comparison("cuda", 1, math.nan)]), 1.1
    )
    assert capsys.readouterr().out.splitlines() == [
        "HEAD over BASE, ratio of the medians:",
        "  1.04  forward",
        "  0.90  ulp",
        "2 benchmarks compared: none is slower by a factor of 1.1",
    ]


def test_rounds_are_taken_apart_in_order():
    assert gate.medians([1, 2, 9, 4, 5, 5], 2) == [2, 5]
    with pytest.raises(ValueError, match="5 samples cannot come from 2 rounds"):
        gate.medians([1, 2, 3, 4, 5], 2)


def test_what_asv_keeps_is_read(tmp_path):
    pytest.importorskip("asv", reason="asv is not installed")
    from asv.results import Results
    from asv.runner import BenchmarkResult
    from asv.util import write_json

    params = [["'cpu'", "'cuda'"]]
    timed = {"name": "speed.time", "params": params, "version": "1", "type": "time", "unit": "seconds"}
    counted = {"name": "count.track", "params": [], "version": "1", "type": "track", "unit": "ULP"}
    write_json(tmp_path / "benchmarks.json", {b["name"]: b for b in (timed, counted)}, api_version=2)
    write_json(tmp_path / "machine" / "machine.json", {"machine": "machine"}, api_version=1)
    seconds = {"b" * 40: [1.0, 1.1, 1.2, 1.3], "a" * 40: [2.0, 2.2, 2.4, 2.6]}
    for commit, samples in seconds.items():
        results = Results({"machine": "machine"}, {}, commit, 0, "3", "environment", {})
        ran = BenchmarkResult([True, math.nan], [samples, None], [1, None], 0, "", None)
        results.add_result(timed, ran, record_samples=True)
        if commit[0] == "b":  # the head did not come to this
            results.add_result(counted, BenchmarkResult([0.5], [None], [None], 0, "", None))
        results.save(tmp_path)
    conf = types.SimpleNamespace(results_dir=str(tmp_path), benchmark_dir=str(SUITE / "benchmarks"))

    def read(selected):
        return {c.benchmark: c for c in gate.compare(conf, "b" * 40, "a" * 40, selected, rounds=2)}

    assert read("time").keys() == {"speed.time('cpu')", "speed.time('cuda')"}
    found = read("")
    assert found["speed.time('cuda')"].skipped
    assert found["count.track"].failed
    cpu = found["speed.time('cpu')"]
    assert (cpu.base, cpu.head, cpu.quick) == (1.15, 2.3, 2.0)
    assert cpu.p == pytest.approx(2 / 70)  # the most extreme order of four and four, on either side
    assert gate.compare(conf, "b" * 40, "c" * 40, "", rounds=2) == []


@pytest.fixture
def repository(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setattr(gate, "HERE", tmp_path)
    for role in "AUTHOR", "COMMITTER":
        monkeypatch.setenv(f"GIT_{role}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "someone@localhost")
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    for number in "1", "2":
        (tmp_path / "file").write_text(number)
        subprocess.run([*git, "add", "file"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", number], check=True)
    return tmp_path


def test_a_commit_is_compared_with_a_twin_of_itself(repository):
    base, head = gate.commits("HEAD", "HEAD")
    assert base != head
    assert gate._git("rev-parse", f"{base}^{{tree}}") == gate._git("rev-parse", f"{head}^{{tree}}")
    assert gate.commits("HEAD", "HEAD") == (base, head)  # what was compiled for the twin is still good
    assert gate._git("rev-parse", "HEAD") == base


def test_two_commits_stay_what_they_are(repository):
    assert gate.commits("HEAD~1", "HEAD") == (gate._git("rev-parse", "HEAD~1"), gate._git("rev-parse", "HEAD"))


def test_a_name_that_is_no_commit_is_failed(repository, capsys):
    assert gate.main(["HEAD", "no-such-branch"]) == 2
    assert "no-such-branch" in capsys.readouterr().out


@pytest.mark.parametrize(("bad_in", "code"), [((), 0), (("first",), 0), (("first", "again"), 1)])
def test_only_suspects_are_measured_again(repository, monkeypatch, bad_in, code):
    asked = []

    def measure(base, head, benchmarks, rounds, name):
        asked.append((benchmarks, rounds))
        return [timed("f('x', '2 (y)')", 1.3 if name in bad_in else 1.0), timed("g")]

    monkeypatch.setattr(gate, "measure", measure)
    assert gate.main(["HEAD~1"]) == code
    assert asked[0] == (gate.BENCHMARKS, gate.ROUNDS[0])
    assert asked[1:] == ([(r"^(f\('x',\ '2\ \(y\)'\))$", gate.ROUNDS[1])] if bad_in else [])


# ----------------------------------------------------------------------------------------------- the suite's own guards


@pytest.fixture(params=["rmsnorm_np.cpu.nothing", "rmsnorm_np.norms"])
def missing(request):
    """A module, or a name in one, that this commit has not got."""
    return request.param, "no_such_name"


def test_what_this_commit_lacks_is_an_error(missing, monkeypatch):
    monkeypatch.delenv("ASV_COMMIT", raising=False)
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        common.ours(*missing)


def test_what_an_older_commit_lacks_is_skipped(missing, monkeypatch):
    monkeypatch.setattr(common, "_measures_another_commit", lambda: True)
    with pytest.raises(NotImplementedError, match=r"nothing|no_such_name"):
        common.ours(*missing)


def test_a_library_that_the_package_lacks_is_no_reason_to_skip(monkeypatch):
    monkeypatch.setattr(common, "_measures_another_commit", lambda: True)

    def broken(name):
        raise ModuleNotFoundError("No module named 'numba'", name="numba")

    monkeypatch.setattr(common.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="numba"):
        common.ours("rmsnorm_np.cpu")


def test_another_commit_is_told_by_asv(repository, monkeypatch):
    monkeypatch.setattr(common, "__file__", str(repository / "common.py"))
    monkeypatch.delenv("ASV_COMMIT", raising=False)
    assert not common._measures_another_commit()
    monkeypatch.setenv("ASV_COMMIT", gate._git("rev-parse", "HEAD"))
    assert not common._measures_another_commit()
    monkeypatch.setenv("ASV_COMMIT", gate._git("rev-parse", "HEAD~1"))
    assert common._measures_another_commit()


def test_the_reason_to_skip_survives_the_cache():
    def measure():
        raise NotImplementedError("no valgrind")

    with pytest.raises(NotImplementedError, match="no valgrind"):
        common.skip_without(common.outcome(measure))
    assert common.outcome(lambda: {"x": 1.0}) == {"x": 1.0}
    common.skip_without({"x": 1.0})


def test_commits_of_note_are_hashes():
    hashes = history.commits((SUITE / "commits.txt").read_text(encoding="utf-8"))
    assert len(set(hashes)) == len(hashes) >= 12
    assert all(len(name) == 10 and set(name) <= set("0123456789abcdef") for name in hashes)


def test_history_loads_nothing_from_the_net(tmp_path):
    """Of every library that asv's page names there is a copy."""
    asv = pytest.importorskip("asv", reason="asv is not installed")
    shutil.copy(Path(asv.__file__).parent / "www" / "index.html", tmp_path)
    history.without_net(tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"""<(script|link|img)[^>]*["']https?:""", page)
    loaded = re.findall(r"""<(?:script|link)[^>]*(?:src|href)=["'](\S+?)["']""", page)
    assert {"jquery.flot.js", "bootstrap.min.css", "md5.min.js"} <= set(loaded)
    assert all(
        (tmp_path / name).exists() or (Path(asv.__file__).parent / "www" / name).exists()
        for name in loaded
        if not name.endswith(".xml")
    )


def test_history_needs_a_copy_of_each_library(tmp_path):
    page = tmp_path / "index.html"
    page.write_text('<script src="https://example.org/other.min.js" integrity="sha256-x"></script>')
    with pytest.raises(FileNotFoundError, match=r"no other\.min\.js, which this version of asv loads from https://exa"):
        history.without_net(page)
