"""Times of `rmsnorm_np.torch` beside PyTorch's own, as in docs/pytorch.md.

``python docs/measurements/torch_speed.py [--one-thread] [norms] [models]`` prints tables. Contenders take turns, and
what counts is the median of the ratios of their turns. --one-thread measures CPU time instead of wall time, which a
machine that others use disturbs less. torch and transformers have to be installed, and a C++ compiler.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from functools import partial

import torch
from torch.nn.functional import rms_norm

import rmsnorm_np as rn
import rmsnorm_np.torch as rt
from rmsnorm_np.cpu import describe

clock = time.perf_counter


def turns(calls, rounds=41, seconds=0.02):
    """{name: (median µs, median ratio to the first, quartiles)} of calls that take turns."""
    counts = {}
    for name, call in calls.items():
        call()
        call()
        start = clock()
        call()
        counts[name] = max(1, min(2000, int(seconds / (clock() - start))))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            for _ in range(counts[name]):
                call()
            times[name].append((clock() - start) / counts[name])
    first = times[next(iter(calls))]
    table = {}
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, first, strict=True)]
        table[name] = statistics.median(own), statistics.median(ratios), statistics.quantiles(ratios, n=4)[::2]
    return table


def show(title, table, unit=1e6):
    print(title, flush=True)
    for name, (middle, ratio, (low, high)) in table.items():
        print(f"    {name:28} {middle * unit:10.1f}   x {ratio:5.2f}  ({low:.2f} to {high:.2f})", flush=True)


def gradients(norm, x, w, dy):
    return torch.autograd.grad(norm(x, w), (x, w), dy)


def norms():
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((1, 768), (512, 768), (2048, 4096)):
            n = shape[1:]
            x, dy = torch.randn(2, *shape, dtype=dtype)
            w = torch.rand(n, dtype=dtype)
            torch.compiler.reset()
            compiled = torch.compile(lambda x, w, n=n: rms_norm(x, n, w, 1e-6), dynamic=False)
            calls = {
                "F.rms_norm": lambda x, w, n=n: rms_norm(x, n, w, 1e-6),
                "F.rms_norm compiled": compiled,
                "rmsnorm_np.torch": lambda x, w, n=n: rt.rms_norm(x, n, w, 1e-6),
            }
            with torch.no_grad():
                show(f"forward {shape} {dtype}, µs", turns({k: partial(f, x, w) for k, f in calls.items()}))
            xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()
            both = {k: partial(gradients, f, xg, wg, dy) for k, f in calls.items()}
            show(f"forward and backward {shape} {dtype}, µs", turns(both))


def models():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        before = transformers.LlamaForCausalLM(config).to(dtype)
        after = copy.deepcopy(before)
        rt.replace_norms(after)
        tokens = torch.randint(3, 4096, (4, 128))

        def step(model, tokens=tokens):
            model.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()

        def decode(model, tokens=tokens):
            with torch.no_grad():
                out = model(input_ids=tokens[:1, :16], use_cache=True)
                for _ in range(16):
                    last = out.logits[:, -1:].argmax(-1)
                    out = model(input_ids=last, past_key_values=out.past_key_values, use_cache=True)

        for name, work in (("training step", step), ("16 prompt and 16 new tokens", decode)):
            both = {"before": partial(work, before), "after": partial(work, after)}
            show(f"{name} {dtype}, ms", turns(both, 9, 0.0), 1e3)


if __name__ == "__main__":
    asked = sys.argv[1:]
    torch.set_num_threads(2)
    if "--one-thread" in asked:
        asked.remove("--one-thread")
        torch.set_num_threads(1)
        rn.set_num_threads(1)
        clock = time.thread_time
    for name in asked or ["norms", "models"]:
        {"norms": norms, "models": models}[name]()
    about = describe()
    print({key: about[key] for key in ("cpu", "threads", "threading_layer")}, "torch", torch.__version__)
