"""One training run of one model: it can be stopped at any time and goes on where it was, with the same numbers.

Everything random in step k is drawn from (seed, k), so a checkpoint is the parameters, Adam's moments and the step.

A model is a module with

    Config             frozen dataclass; at least norm, steps, evaluate_every, clip
    SIZES              {"small": Config, "paper": Config}
    METRIC, NORMS      what `evaluate` is judged by; the kinds of norm that the paper has for this model
    EXPERIMENTS        the runs to store, [{"norm": …, any other setting: …, "seeds": how many if not three}]
    load(config)                   -> (data, config with what depends on the data)
    init(config, rng)              -> parameters, a flat dict; "….running" are statistics without a gradient
    batches(data, config, rng)     -> the training batches of one epoch
    example_batch(config, rng)     -> a batch of the config's sizes without data, for time and tests
    learning_rate(config, step)    -> of step 1, 2, …
    loss_and_gradients(parameters, batch, config, rng)  -> (loss, gradients, statistics); rng None: no dropout
    evaluate(parameters, data, config, "validation" or "test")  -> {METRIC: …, …}
    report(parameters, data, config)                    -> a dict of what else the result stores
"""

from __future__ import annotations

import json
import math
import time
from itertools import count, islice
from pathlib import Path

import numpy as np

from optim import adam, adam_state, clip

CURVE_EVERY = 20  # steps whose mean loss makes one point of the stored curve
CHECKPOINT_EVERY = 60.0  # seconds


def train(model, loaded, config, seed, checkpoint, progress=lambda **_: None):
    """Train `config.steps` steps; `progress(step=…, loss=…, quality=…)` is told of each.

    Returns a dict of what is stored: "curve" [(step, seconds, mean training loss)], "history" (a dict for each
    evaluation on the validation data), "test" metrics, "seconds" of training alone, what `model.report` adds, and
    "diverged", the step whose loss or gradient was not finite (None if all were): training ends there.
    """
    P = model.init(config, np.random.default_rng([seed, 0]))
    adam_moments = adam_state(P)
    run = {"seconds": 0.0, "recent": [], "curve": [], "history": [], "diverged": None}
    if checkpoint.exists():
        run = _load(checkpoint, P, adam_moments)
    quality, saved = _quality(model, run), time.monotonic()

    first = adam_moments["step"]
    for step, batch in islice(enumerate(stream(model, loaded, config, seed), 1), first, config.steps):
        start = time.perf_counter()
        loss, size = train_step(model, P, adam_moments, batch, config, np.random.default_rng([seed, 2, step]))
        run["seconds"] += time.perf_counter() - start
        if not (math.isfinite(loss) and math.isfinite(size)):
            run["diverged"] = step
            break
        run["recent"].append(loss)
        if step % CURVE_EVERY == 0 or step == config.steps:
            run["curve"].append((step, run["seconds"], float(np.mean(run["recent"]))))
            run["recent"] = []
        if step % config.evaluate_every == 0 or step == config.steps:
            metrics = model.evaluate(P, loaded, config, "validation")
            run["history"].append({"step": step, "seconds": run["seconds"], **metrics})
            quality = _quality(model, run)
        if time.monotonic() - saved > CHECKPOINT_EVERY:
            _save(checkpoint, P, adam_moments, run)
            saved = time.monotonic()
        progress(step=step, loss=loss, quality=quality)

    if run["diverged"] is None:
        run["test"] = model.evaluate(P, loaded, config, "test")
        run |= model.report(P, loaded, config)
    del run["recent"]
    return run


def train_step(model, P, adam_moments, batch, config, rng):
    """One step of Adam, in place: (loss, norm of the gradient). Nothing is changed where that is not finite."""
    loss, grads, _ = model.loss_and_gradients(P, batch, config, rng)
    grads, size = clip(grads, config.clip)
    if math.isfinite(size):
        adam(P, grads, adam_moments, model.learning_rate(config, adam_moments["step"] + 1))
    return float(loss), size


def stream(model, loaded, config, seed):
    """Training batches without end, an epoch after the other."""
    for epoch in count():
        yield from model.batches(loaded, config, np.random.default_rng([seed, 1, epoch]))


def _quality(model, run):
    return run["history"][-1][model.METRIC] if run["history"] else None


def _save(path, P, adam_moments, run):
    arrays = {f"{kind}/{name}": value for kind in "mv" for name, value in adam_moments[kind].items()}
    arrays |= {f"P/{name}": value for name, value in P.items()}
    notes = json.dumps({"step": adam_moments["step"], "run": run})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{path}.writing")
    with unfinished.open("wb") as file:
        np.savez(file, notes=notes, **arrays)
    unfinished.replace(path)  # at once: a file is whole or not there


def _load(path, P, adam_moments):
    with np.load(path) as arrays:
        notes = json.loads(str(arrays["notes"]))
        for group, values in (("P", P), *((kind, adam_moments[kind]) for kind in "mv")):
            for name in values:
                values[name][...] = arrays[f"{group}/{name}"]
    adam_moments["step"] = notes["step"]
    return notes["run"]
