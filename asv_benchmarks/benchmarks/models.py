"""A training step of the paper's models, at their small sizes: what the norms' kernels are worth to a whole program."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from . import common

EXPERIMENTS = Path(__file__).parents[2] / "docs" / "experiments"  # of the suite's own tree, for every commit measured


class TrainingStep:
    params = (["rnnsearch", "transformer"], ["none", "layer", "rms", "prms"])
    param_names = ("model", "norm")
    rounds = 1
    repeat = 10
    warmup_time = 0.1
    made_for = None

    def setup(self, model, norm):
        if self.made_for == (model, norm):
            return  # asv sets up before every sample
        for name in ("rms_norm_backward", "layer_norm_backward"):
            common.ours("rmsnorm_np", name)
        common.ours("rmsnorm_np", "set_num_threads")(1)  # as in run.py: a second pool of threads disturbs BLAS's
        common.theirs("sacrebleu")  # which the models import
        if str(EXPERIMENTS) not in sys.path:
            sys.path.insert(0, str(EXPERIMENTS))
        optim, timing, self.training = map(importlib.import_module, ("optim", "timing", "training"))
        timing.keep_memory()
        self.model = importlib.import_module(model)
        _, config = self.model.load(self.model.SIZES["small"])
        self.config = replace(config, norm=config.norm._replace(kind=norm, fused=True))
        rng = np.random.default_rng(0)
        self.batch = self.model.example_batch(self.config, rng)
        self.parameters = self.model.init(self.config, rng)
        self.moments = optim.adam_state(self.parameters)
        self.frozen = timing.Frozen(self.model)
        self.time_step(model, norm)  # compiles
        self.made_for = model, norm

    def time_step(self, model, norm):
        self.training.train_step(
            self.frozen, self.parameters, self.moments, self.batch, self.config, np.random.default_rng(0)
        )
