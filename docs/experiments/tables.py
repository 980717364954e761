"""The tables of docs/experiments.md, in Markdown, from what is stored in results/."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

import published

HERE = Path(__file__).parent
LABELS = {
    "none": "no norm",
    "layer": "LayerNorm",
    "rms": "RMSNorm",
    "prms": "pRMSNorm",
    "l2": "L2-Norm",
    "batch": "BatchNorm",
    "weight": "WeightNorm",
}
MODELS = {
    "rnnsearch": "RNNSearch",
    "transformer": "Transformer",
    "reader": "attentive reader",
    "order_embeddings": "order embeddings",
    "convpool": "ConvPool-CNN-C",
}
METRICS = {  # the test metric that the summary shows, its digits and what it is
    "rnnsearch": ("bleu", 1, "BLEU"),
    "transformer": ("bleu", 1, "BLEU"),
    "reader": ("accuracy", 3, "accuracy"),
    "order_embeddings": ("recall", 1, "mean recall"),
    "convpool": ("error", 1, "error, %"),
}
FUSED = ("layer", "rms", "prms", "l2")  # the norms with kernels
NOTHING = "not run yet"
FEWER = 1_200  # steps of the runs of RNNSearch with one seed


class Results:
    """The stored results of one folder."""

    def __init__(self, folder=HERE / "results"):
        self.all = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]

    def runs(self, model, **settings):
        """The training runs of the small size with exactly these settings, seed by seed."""
        of_model = [r for r in self.all if (r["model"], r["size"]) == (model, "small") and "curve" in r]
        return sorted((r for r in of_model if r["settings"] == settings), key=lambda r: r["seed"])

    def finished(self, model, **settings):
        """Those of them that did not diverge."""
        return [r for r in self.runs(model, **settings) if r["diverged"] is None]

    def quality(self, key, model, digits=1, **settings):
        """Mean ± standard deviation of a test metric over the seeds; how many diverged, or that there is only one."""
        runs, finished = self.runs(model, **settings), self.finished(model, **settings)
        if not finished:
            return "diverged" if runs else NOTHING
        shown = mean_sd([r["test"][key] for r in finished], digits)
        return shown if len(finished) == len(runs) else f"{shown} ({len(runs) - len(finished)} of {len(runs)} diverged)"

    def norms(self, model):
        """The kinds of norm with a run of nothing but that setting, in the order of LABELS."""
        return [kind for kind in LABELS if self.runs(model, norm=kind)]

    def equation10(self):
        """Its curves, or none."""
        return next((r["curves"] for r in self.all if r["model"] == "equation10" and r["settings"] == {}), [])

    def time(self, model, size):
        """{(norm, fused): row} of the times of one model and size; for a norm without a kernel both are one row."""
        for r in self.all:
            if r["model"] == model and r["size"] == size and r["settings"] == {} and "time" in r:
                rows = {(row["norm"], row["fused"]): row for row in r["time"]}
                return {
                    (kind, fused): rows.get((kind, fused)) or rows[kind, None]
                    for kind, _ in rows
                    for fused in (False, True)
                }
        return {}


def table(head, *rows):
    """Markdown."""
    if not rows:
        return NOTHING
    lines = [" | ".join(map(str, row)) for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def plain(text):
    """Text of a data set as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_<>\[\]|${}])", r"\\\1", text.replace("\n", " "))


def mean_sd(values, digits=1):
    """Mean ± standard deviation of the seeds; of one seed the value."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def saved(seconds, kind):
    """Time saved against LayerNorm, in percent, from {kind: seconds}."""
    return f"{100 * (1 - seconds[kind] / seconds['layer']):.1f} %".replace("-", "−")


# Quality


def translation_quality(results, model):
    """BLEU and loss of the test sentences."""
    title, theirs = published.QUALITY[model]
    return table(
        ("norm", f"paper: {title}", "BLEU", "loss", "seeds"),
        *(
            (
                LABELS[kind],
                theirs[kind],
                results.quality("bleu", model, norm=kind),
                results.quality("loss", model, 2, norm=kind),
                len(results.runs(model, norm=kind)),
            )
            for kind in results.norms(model)
        ),
    )


def reader_quality(results):
    """Accuracy on the test questions, and what one reaches without reading."""
    norms = results.norms("reader")
    baselines = next((r["baselines"] for kind in norms for r in results.finished("reader", norm=kind)), {})
    names = {
        "chance": "a name of the passage at random",
        "last_mentioned": "the last one",
        "most_frequent": "the most frequent one",
    }
    return table(
        ("", "accuracy", "loss", "seeds"),
        *((names[key], f"{baselines[key]:.3f}", "", "") for key in names if baselines),
        *(
            (
                LABELS[kind],
                results.quality("accuracy", "reader", 3, norm=kind),
                results.quality("loss", "reader", 2, norm=kind),
                len(results.runs("reader", norm=kind)),
            )
            for kind in norms
        ),
    )


def order_quality(results):
    """Recall and rank of both directions, for both groups of held-out emoji."""
    model = "order_embeddings"

    def row(kind, group):
        for wanted in ("caption", "image"):
            for key, digits in (("R@1", 1), ("R@5", 1), ("R@10", 1), ("mean rank", 0)):
                yield results.quality(f"{group} {wanted} {key}", model, digits, norm=kind)

    return table(
        (
            "pictures",
            "norm",
            *(f"{wanted} {key}" for wanted in ("caption", "image") for key in ("R@1", "R@5", "R@10", "rank")),
        ),
        *(
            (shown, LABELS[kind], *row(kind, group))
            for group, shown in (("style", "another artist's"), ("unseen", "unseen emoji"))
            for kind in results.norms(model)
        ),
        *(
            ("paper, COCO", LABELS[kind], *theirs.replace(";", "").split())
            for kind, theirs in published.QUALITY[model][1].items()
            if results.norms(model)
        ),
    )


def convpool_quality(results):
    """Test error."""
    theirs = published.QUALITY["convpool"][1]
    return table(
        ("norm", "paper: CIFAR-10, test error, %", "Fashion-MNIST, test error, %", "seeds"),
        *(
            (
                LABELS[kind],
                theirs[kind],
                results.quality("error", "convpool", norm=kind),
                len(results.runs("convpool", norm=kind)),
            )
            for kind in results.norms("convpool")
        ),
    )


def p_sweep(results):
    """BLEU by p, with fewer steps."""
    rows = [(f"{10 * p} %", results.finished("rnnsearch", norm="prms", p=p / 10, steps=FEWER)) for p in range(1, 10)]
    rows.append(("100 % (RMSNorm)", results.finished("rnnsearch", norm="rms", steps=FEWER)))
    rows = [(p, runs[0]["test"]) for p, runs in rows if runs]
    return table(("p", "BLEU", "loss"), *((p, f"{test['bleu']:.1f}", f"{test['loss']:.2f}") for p, test in rows))


def centred(results):
    """Initial weights with the mean 0.2 beside those with the mean 0."""
    shown = []
    for kind in ("none", "layer", "rms", "prms"):
        for run in results.runs("rnnsearch", norm=kind, initial_mean=0.2, steps=FEWER):
            curve = {step: loss for step, _, loss in run["curve"]}
            quality = f"{run['test']['bleu']:.1f}" if "test" in run else f"diverged at step {run['diverged']}"
            losses = [f"{curve[step]:.2f}" if step in curve else "" for step in (100, 300, FEWER)]
            usual = [
                loss
                for other in results.runs("rnnsearch", norm=kind)
                for step, _, loss in other["curve"]
                if step == 300
            ]
            shown.append((LABELS[kind], *losses, mean_sd(usual, 2) if usual else NOTHING, quality))
    return table(("norm", "loss at step 100", "300", f"{FEWER:,}", "300, with mean 0", "BLEU"), *shown)


def table5(results):
    """Mean and standard deviation of the normalised U h in the decoder."""
    places = ("1", "2", "3", "4", "all")
    rows = []
    for kind in results.norms("rnnsearch"):
        if kind in published.TABLE5_SD:
            theirs = zip(published.TABLE5_MEAN[kind], published.TABLE5_SD[kind], strict=True)
            rows.append((LABELS[kind], "paper", *(f"{mean:.2f} ± {sd:.2f}".replace("-", "−") for mean, sd in theirs)))
        ours = [run["hidden_to_hidden"] for run in results.finished("rnnsearch", norm=kind)]
        if ours:
            cells = [[np.mean([found[place][key] for found in ours]) for key in ("mean", "sd")] for place in places]
            rows.append((LABELS[kind], "here", *(f"{mean:.2f} ± {sd:.2f}".replace("-", "−") for mean, sd in cells)))
    return table(("norm", "", *(f"position {place}" for place in places[:4]), "all"), *rows)


def translations(results):
    """The first ten test sentences, by RMSNorm with seed 1."""
    by_model = [
        (MODELS[model], runs[0]["translations"])
        for model in ("rnnsearch", "transformer")
        if (runs := results.finished(model, norm="rms"))
    ]
    if not by_model:
        return NOTHING
    lines = []
    for i, entry in enumerate(by_model[0][1]):
        lines += ["", f"{i + 1}. {plain(entry['source'])}", f"   - reference: {plain(entry['reference'])}"]
        lines += [f"   - {name}: {plain(found[i]['translation'])}" for name, found in by_model]
    return "\n".join(lines[1:])


def answers(results):
    """Ten test questions, by RMSNorm with seed 1."""
    runs = results.finished("reader", norm="rms")
    shown = runs[0]["answers"] if runs else []
    return table(
        ("question", "answer", "model"),
        *([plain(entry[key]) for key in ("question", "answer", "prediction")] for entry in shown),
    )


# Time


def time_of(results, size):
    """Seconds of a training step, by separate operations and by the kernels."""
    rows = []
    for model, name in MODELS.items():
        found = results.time(model, size)
        theirs = published.SECONDS[model][1]
        for kind in LABELS:
            if (kind, False) not in found:
                continue
            medians = {fused: {k: found[k, fused]["median"] for k, f in found if f == fused} for fused in (False, True)}
            cells = []
            for fused in (False, True):
                if fused and kind not in ("none", *FUSED):
                    cells += ["–", "–"]
                    continue
                low, high = found[kind, fused]["quartiles"]
                cells += [f"{medians[fused][kind]:#.3g} ({low:#.3g} to {high:#.3g})", saved(medians[fused], kind)]
            gain = f"{medians[False][kind] / medians[True][kind]:.2f}" if kind in FUSED else "–"
            rows.append((name, LABELS[kind], saved(theirs, kind) if kind in theirs else "", *cells, gain))
            name = ""
    head = (
        "model",
        "norm",
        "paper: saved",
        "NumPy operations, s",
        "saved",
        "kernels, s",
        "saved",
        "operations / kernels",
    )
    return table(head, *rows)


def summary(results):
    """One row a model: quality with each norm, and what RMSNorm and the kernels save of a step."""
    rows = []
    for model, name in MODELS.items():
        key, digits, metric = METRICS[model]
        quality = [results.quality(key, model, digits, norm=kind) for kind in ("none", "layer", "rms", "prms")]
        found = results.time(model, "paper")
        theirs = saved(published.SECONDS[model][1], "rms")
        cells = [
            saved({kind: found[kind, fused]["median"] for kind in ("layer", "rms")}, "rms") if found else NOTHING
            for fused in (False, True)
        ]
        kernels = (
            f"{100 * (1 - found['layer', True]['median'] / found['layer', False]['median']):.1f} %"
            if found
            else NOTHING
        )
        rows.append((name, metric, *quality, theirs, *cells, kernels.replace("-", "−")))
    head = ("model", "metric", "no norm", "LayerNorm", "RMSNorm", "pRMSNorm")
    return table(
        (*head, "RMSNorm saves: paper", "here, NumPy operations", "here, kernels", "LayerNorm: kernels save"),
        *rows,
    )


def equation10(results):
    """How far apart the loss curves are."""
    curves = results.equation10()
    by_norm = {}
    for curve in curves:
        by_norm.setdefault(curve["norm"], []).append(np.array(curve["losses"]))
    return table(
        ("norm", "last loss: W, η", "3 W, 9 η", "3 W, η", "largest difference of the first two"),
        *(
            (LABELS[kind], *(f"{losses[-1]:.4f}" for losses in three), f"{np.max(np.abs(three[0] - three[1])):.1e}")
            for kind, three in by_norm.items()
        ),
    )
