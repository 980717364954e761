"""The figures of docs/lm.md: measures them, and writes its tables from what is stored in results/lm/.

    OPENBLAS_NUM_THREADS=1 python docs/experiments/lm_page.py --measure time text largest agreement
    python docs/experiments/lm_page.py                   the tables alone

Measuring takes minutes and needs the weights, see lm.py; "agreement" needs PyTorch and `transformers` too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

import lm
import rmsnorm_np as rn
from bpe import Tokenizer
from data import load_verses
from gguf_file import read
from lm_peer import peer, peer_logits
from page import DOCS, fill
from tables import NOTHING, plain, table

PAGE = DOCS / "lm.md"
STORED = Path(__file__).parent / "results" / "lm" / "smollm2.json"
QUESTION, BEGINNING = "Why is the sky blue?", "The theory of relativity says"
WRITTEN, READ = 60, 256  # tokens
ROUNDS = {"read": 9, "token": 100}  # of each measurement; a first one is left out
LABELS = {
    "separate": "NumPy operations",
    "kernel": "`RMSNorm`, and NumPy's addition",
    "fused": "`add_rms_norm`",
}

# Measure


class Timed:
    """A norm that notes the seconds of its last call."""

    def __init__(self, norm):
        self.norm, self.weight, self.seconds = norm, norm.weight, 0.0

    def __call__(self, h):
        """As the norm."""
        start = time.perf_counter()
        y = self.norm(h)
        self.seconds = time.perf_counter() - start
        return y

    def add(self, x, h):
        """As the norm."""
        start = time.perf_counter()
        found = self.norm.add(x, h)
        self.seconds = time.perf_counter() - start
        return found


def timed(model, cache, tokens):
    """(seconds, [seconds of each norm]) until the logits of what follows these tokens are there.

    The whole is the thread's own time, which other programs lengthen less; that clock is too slow for a norm.
    """
    model = model._replace(norms=[Timed(norm) for norm in model.norms])
    start = time.thread_time()
    lm.logits(model, lm.forward(model, tokens, cache)[-1:])
    return time.thread_time() - start, [norm.seconds for norm in model.norms]


def measure_time(models, tokens, rounds=ROUNDS):
    """{name: {"read": of all tokens at once, "token": of one more}}, all models taking turns.

    Of each: {"seconds": of all rounds, "norms": the median of each norm}.
    """
    caches = {name: lm.Cache(model, len(tokens) + rounds["token"] + 1) for name, model in models.items()}
    found = {name: {} for name in models}
    for kind, count in rounds.items():
        taken = {name: [] for name in models}
        for turn in range(count + 1):
            for name, model in models.items():
                if kind == "read":
                    caches[name].length = 0
                taken[name].append(timed(model, caches[name], tokens if kind == "read" else tokens[turn : turn + 1]))
        for name, pairs in taken.items():
            whole, norms = zip(*pairs[1:], strict=True)  # the first round compiles and warms up
            found[name][kind] = {"seconds": whole, "norms": np.median(norms, axis=0).tolist()}
    return found


def measure_text(facts, arrays, tokenizer, tokens):
    """What it writes: [{"prompt", "question", "dtype", "norm", "text"}]."""
    found = []
    end = [tokenizer.numbers[token] for token in lm.END]
    for prompt, question in ((QUESTION, True), (BEGINNING, False)):
        for dtype, norm in (("float32", "fused"), ("float16", "fused"), ("float16", "separate")):
            model = lm.build(facts, arrays, lm.NORMS[norm], np.dtype(dtype))
            given = tokenizer.encode(lm.chat(prompt) if question else prompt)
            with np.errstate(over="ignore"):
                text = tokenizer.decode(list(lm.write(model, given, tokens, end)))
            found.append({"prompt": prompt, "question": question, "dtype": dtype, "norm": norm, "text": text})
    return found


class Watched(lm.Separate):
    """A norm that keeps the largest element of each row."""

    def __call__(self, h):
        """As the norm."""
        self.largest = np.abs(h).max(axis=-1)  # (T,)
        return super().__call__(h)


def measure_size(facts, arrays, tokens):
    """The largest |element| of h at each of the 61 norms, of the first token and of all others; in float16, how many
    tokens are zeros after the last norm, if NumPy operations compute all of them.
    """  # fmt: skip
    model = lm.build(facts, arrays, Watched)
    lm.forward(model, tokens, lm.Cache(model, len(tokens)))
    largest = np.array([norm.largest for norm in model.norms])  # (61, T)
    half = lm.build(facts, arrays, lm.Separate, np.float16)
    with np.errstate(over="ignore"):
        y = lm.forward(half, tokens, lm.Cache(half, len(tokens)))  # (T, d)
    lost = {"zeros": int(np.sum(np.all(y == 0, axis=-1))), "tokens": len(tokens)}
    return {"largest": {"first": largest[:, 0].tolist(), "others": largest[:, 1:].max(axis=1).tolist()}, **lost}


def measure_agreement(facts, arrays, tokens):
    """Largest differences of logits: ours and theirs in float32, each to theirs in float64."""
    exact = peer_logits(peer(facts, arrays, "float64"), tokens)  # (T, V)
    found = {"transformers": peer_logits(peer(facts, arrays), tokens)}
    for name, norm in lm.NORMS.items():
        model = lm.build(facts, arrays, norm)
        found[name] = lm.logits(model, lm.forward(model, tokens, lm.Cache(model, len(tokens))))
    rows = {
        name: {
            "largest": float(np.abs(logits - exact).max()),
            "rms": float(np.sqrt(np.mean((logits - exact) ** 2))),
            "same_first": int(np.sum(logits.argmax(axis=-1) == exact.argmax(axis=-1))),
        }
        for name, logits in found.items()
    }
    return {"tokens": len(tokens), "sd": float(exact.std()), "rows": rows}


def measure(file, parts):
    """{part: what was measured}, and where."""
    import run

    rn.set_num_threads(1)  # an idle second pool would take the processor from BLAS's
    facts, tensors = read(file)
    arrays = {name: tensor.array() for name, tensor in tensors.items()}
    tokenizer = Tokenizer.of(facts)
    tokens = np.array(tokenizer.encode(" ".join(load_verses()[:20]))[:READ])  # (T,)
    measured = {
        "time": lambda: measure_time({name: lm.build(facts, arrays, norm) for name, norm in lm.NORMS.items()}, tokens),
        "text": lambda: measure_text(facts, arrays, tokenizer, WRITTEN),
        "largest": lambda: measure_size(facts, arrays, tokens),
        "agreement": lambda: measure_agreement(facts, arrays, tokens),
    }
    where = {"machine": run.machine() | {"blas_threads": os.environ.get("OPENBLAS_NUM_THREADS")}}
    when = {"started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    return {part: {**when, **where, "versions": run.versions(), "found": measured[part]()} for part in parts}


# The tables


def time_table(stored):
    """Medians with quartiles, and the share of the norms."""

    def cells(of):
        low, median, high = 1e3 * np.percentile(of["seconds"], [25, 50, 75])
        norms = 1e3 * sum(of["norms"])
        return f"{median:.0f} ({low:.0f} to {high:.0f})", f"{norms:.2f}", f"{100 * norms / median:.1f} %"

    rows = [(LABELS[name], *cells(of["token"]), *cells(of["read"])) for name, of in stored.items()]
    head = ("norms", "a token, ms", "its norms, ms", "share", f"reading {READ} tokens, ms", "their norms, ms", "share")
    return table(head, *rows)


def text_table(stored):
    """What each way writes."""
    rows = [
        (plain(of["prompt"]), of["dtype"], LABELS[of["norm"]], plain(of["text"]) or "nothing: it ends at once")
        for of in stored
    ]
    return table(("prompt", "h and norms in", "norms", "text"), *rows)


def size_table(stored):
    """Where the squares of h are above float16's range."""
    limit = np.sqrt(np.finfo(np.float16).max)
    rows = []
    for token, largest in stored["largest"].items():
        over = np.flatnonzero(np.array(largest) > limit)
        which = f"{len(over)} of {len(largest)}, the first of them number {over[0] + 1}" if len(over) else "none"
        rows.append(({"first": "the first", "others": "all others"}[token], f"{max(largest):,.0f}", which))
    lost = (
        f"Rows of zeros after the last norm, in float16 by NumPy operations: {stored['zeros']} of {stored['tokens']}."
    )
    return table(("token", "largest element of h", "norms with a square above 65,504"), *rows) + f"\n\n{lost}"


def agreement_table(stored):
    """Differences of logits."""
    rows = [
        (
            LABELS.get(name, "`transformers` in float32"),
            f"{row['largest']:.1e}",
            f"{row['rms']:.1e}",
            f"{row['same_first']} of {stored['tokens']}",
        )
        for name, row in stored["rows"].items()
    ]
    head = ("logits of", "largest difference", "root mean square", "same most probable token")
    return table(head, *rows)


TABLES = {"time": time_table, "text": text_table, "largest": size_table, "agreement": agreement_table}


def blocks(stored):
    """{name of a block on the page: function that gives its table}."""

    def shown(part):
        return TABLES[part](stored[part]["found"]) if part in stored else NOTHING

    return {f"lm: {part}": lambda _, part=part: shown(part) for part in TABLES}


def load():
    """What is stored."""
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}


def main(arguments):
    """Measure if asked to, then bring the page up to date."""
    parser = argparse.ArgumentParser(prog="lm_page.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--measure", nargs="+", choices=TABLES, default=[], help="what to measure anew")
    parts = parser.parse_args(arguments).measure
    if parts:
        found = load() | measure(lm.find(), parts)
        STORED.parent.mkdir(parents=True, exist_ok=True)
        STORED.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), None, blocks(load())), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
