"""docs/experiments/page.py: the pages show what is stored, and the tables say what they claim of it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re

import pytest

import page
import run
import tables


@pytest.fixture
def results(tmp_path):
    """A folder with a few small results."""

    def store(name, **result):
        (tmp_path / f"{name}.json").write_text(json.dumps({"size": "small", "settings": {}, **result}))

    def train(name, norm, bleu, seed=1, size="small", **settings):
        test = {"test": {"bleu": bleu, "loss": 2.0}, "diverged": None} if bleu is not None else {"diverged": 7}
        found = {"curve": [[20, 1.0, 5.0], [300, 9.0, 3.0]], "hidden_to_hidden": table5(bleu or 0.0), **test}
        of = {"model": "rnnsearch", "size": size, "seed": seed, "settings": {"norm": norm, **settings}}
        store(name, **of, **found)

    def table5(value):
        return {place: {"mean": -value, "sd": 1.0} for place in ("1", "2", "3", "4", "all")}

    for seed, bleu in enumerate((10.0, 12.0, 14.0)):
        train(f"a{seed}", "rms", bleu, seed)
    train("a-of-another-size", "rms", 99.0, size="paper")
    train("a-first", "l2", 10.0, 1)
    train("a-second", "l2", 14.0, 2)
    train("a-third", "l2", None, 3)
    train("b1", "none", None)
    train("b2", "prms", 9.0)
    train("c", "prms", 11.5, p=0.3, steps=tables.FEWER)
    train("d1", "layer", 1.0, initial_mean=0.2, steps=tables.FEWER)
    train("d2", "none", None, initial_mean=0.2, steps=tables.FEWER)
    times = [("none", None, 1.0), ("layer", False, 4.0), ("layer", True, 2.0), ("rms", False, 3.0), ("rms", True, 1.9)]
    rows = [{"norm": kind, "fused": fused, "median": s, "quartiles": [s, s + 1]} for kind, fused, s in times]
    store("e", model="rnnsearch", size="paper", time=rows)
    store("f", model="equation10", curves=[{"norm": "rms", "losses": [5.0, last]} for last in (4.0, 4.25, 3.0)])
    return tables.Results(tmp_path)


def cells(markdown):
    """The rows of a table below its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.split("\n")[2:]]


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.name)
def test_the_pages_show_what_is_stored(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"^<!-- (.+) -->$", text, re.MULTILINE)
    blocks = [name for name in named if name != "end"]
    assert named == [part for name in blocks for part in (name, "end")]
    assert sorted(blocks) == (["summary"] if path.name == "README.md" else sorted(page.BLOCKS))
    assert page.fill(text, tables.Results()) == text, "run python docs/experiments/page.py"


def test_results_are_of_the_settings_in_force():
    """A result that is there is not made again: one of other settings would stay on the page."""
    of_the_data = {"source_words", "target_words", "words", "markers", "image"}
    for r in tables.Results().all:
        model = importlib.import_module("rnnsearch" if r["model"] == run.EQUATION10 else r["model"])
        config = run.configure(model, run.Job(r["model"], r["size"], tuple(r["settings"].items()), r["seed"]))
        expected = {**dataclasses.asdict(config), "norm": config.norm._asdict()}
        differ = {key for key in expected if r["config"].get(key) != expected[key]} - of_the_data
        if "curve" not in r:
            differ -= {"steps", "evaluate_every", "decay_from"}  # which no step of training depends on
        assert not differ, f"{r['model']} {r['settings']}: {differ}"


def test_only_the_blocks_change(results):
    text = "before\n<!-- p sweep -->\nold\n\nolder\n<!-- end -->\nafter <!-- no block -->\n"
    filled = page.fill(text, results)
    assert filled == f"before\n<!-- p sweep -->\n{tables.p_sweep(results)}\n<!-- end -->\nafter <!-- no block -->\n"
    assert page.fill(filled, results) == filled
    assert page.fill("<!-- p sweep -->\n<!-- end -->\n<!-- answers -->\n<!-- end -->", results).count("<!--") == 4


def test_quality_is_mean_and_standard_deviation_of_the_seeds(results):
    none, rms, prms, l2 = cells(tables.translation_quality(results, "rnnsearch"))
    assert none == ["no norm", "21.7 / 23.4", "diverged", "diverged", "1"]
    assert rms == ["RMSNorm", "22.4 / 23.7", "12.0 ± 2.0", "2.00 ± 0.00", "3"]
    assert prms == ["pRMSNorm", "22.6 / 23.1", "9.0", "2.00", "1"]
    assert l2[2:] == ["12.0 ± 2.8 (1 of 3 diverged)", "2.00 ± 0.00 (1 of 3 diverged)", "3"]
    assert tables.reader_quality(results) == "not run yet"


def test_the_p_sweep_has_its_own_runs_alone(results):
    assert cells(tables.p_sweep(results)) == [["30 %", "11.5", "2.00"]]


def test_initial_weights_beside_usual_ones(results):
    none, layer = cells(tables.centred(results))
    assert none == ["no norm", "", "3.00", "", "3.00", "diverged at step 7"]
    assert layer == ["LayerNorm", "", "3.00", "", "not run yet", "1.0"]


def test_table_5_is_the_mean_over_seeds(results):
    rows = cells(tables.table5(results))
    assert ["RMSNorm", "here", *["−12.00 ± 1.00"] * 5] in rows
    assert [row for row in rows if row[0] == "no norm"] == [rows[0]]  # diverged: the paper's alone
    assert ["RMSNorm", "paper", "−0.40 ± 1.27", "−0.60 ± 1.51", "−0.69 ± 1.50", "−0.74 ± 1.49", "−0.73 ± 1.50"] in rows


def test_savings_are_in_percent_of_layer_norm_in_the_same_way(results):
    none, layer, rms = cells(tables.time_of(results, "paper"))
    assert none == [
        "RNNSearch",
        "no norm",
        "40.0 %",
        "1.00 (1.00 to 2.00)",
        "75.0 %",
        "1.00 (1.00 to 2.00)",
        "50.0 %",
        "–",
    ]
    assert layer[1:] == ["LayerNorm", "0.0 %", "4.00 (4.00 to 5.00)", "0.0 %", "2.00 (2.00 to 3.00)", "0.0 %", "2.00"]
    assert rms[1:] == ["RMSNorm", "24.7 %", "3.00 (3.00 to 4.00)", "25.0 %", "1.90 (1.90 to 2.90)", "5.0 %", "1.58"]
    summary = cells(tables.summary(results))
    assert summary[0] == [
        "RNNSearch",
        "BLEU",
        "diverged",
        "not run yet",
        "12.0 ± 2.0",
        "9.0",
        "24.7 %",
        "25.0 %",
        "5.0 %",
        "50.0 %",
    ]
    assert summary[1][2:] == [*["not run yet"] * 4, "6.9 %", *["not run yet"] * 3]


def test_equation_10_compares_the_first_two_curves(results):
    assert cells(tables.equation10(results)) == [["RMSNorm", "4.0000", "4.2500", "3.0000", "2.5e-01"]]


def test_texts_are_shown_as_they_are(tmp_path):
    entry = {"question": "the _____ of\n*a* | b", "answer": "<x>", "prediction": "$1$"}
    result = {
        "model": "reader",
        "size": "small",
        "settings": {"norm": "rms"},
        "seed": 1,
        "curve": [],
        "diverged": None,
        "answers": [entry],
    }
    (tmp_path / "a.json").write_text(json.dumps(result))
    row = tables.answers(tables.Results(tmp_path)).split("\n")[2]
    assert row == r"| the \_\_\_\_\_ of \*a\* \| b | \<x\> | \$1\$ |"
