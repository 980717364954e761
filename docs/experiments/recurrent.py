"""GRU and LSTM with a norm at every step, with gradients by hand. Sequences are (T, B, m): time first.

The norms sit where the paper has them, on the summed inputs before the bias: W x of every step at once, U h within the
step. A `mask` (T, B) is 1 where a sequence has a word; at a 0 the state is carried on unchanged.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from layers import add, glorot, orthogonal, product, rows, sigmoid, sigmoid_backward, tanh_backward
from norms import named_norm, named_norm_backward, norm_parameters

# GRU (Cho et al.)
#     z, r = σ(norm(W_gates x) + b + norm(U_gates h))
#     h̃   = tanh(norm(W_proposal x) + b + norm(U_proposal (r ⊙ h)))
#     h'   = z ⊙ h + (1 − z) ⊙ h̃


def gru_parameters(rng, m, d, how):
    """Of a GRU with m inputs and d hidden units: W (m, …), U (d, …), and the four norms of each step."""
    return {
        "W_gates": glorot(rng, m, 2 * d),
        "W_proposal": glorot(rng, m, d),
        "U_gates": orthogonal(rng, d, 2 * d),
        "U_proposal": orthogonal(rng, d, d),
        **norm_parameters(how, "x_gates", 2 * d),
        **norm_parameters(how, "x_proposal", d),
        **norm_parameters(how, "h_gates", 2 * d, bias=False),  # b of x_gates serves the sum
        **norm_parameters(how, "h_proposal", d, bias=False),
    }


def gru_input(x, P, how):
    """What the inputs x (..., m) add to gates and proposal: ((..., 2d), (..., d)), cache."""
    gates, cache_gates = named_norm(how, product(x, P["W_gates"]), P, "x_gates")  # (..., 2d)
    proposal, cache_proposal = named_norm(how, product(x, P["W_proposal"]), P, "x_proposal")  # (..., d)
    return (gates, proposal), (x, P, cache_gates, cache_proposal)


class GRUInputGrads(NamedTuple):
    """What `gru_input` hands back: to the inputs, and to its parameters."""

    dx: np.ndarray  # (..., m)
    for_w: tuple  # (x, da_gates, da_proposal), for the products in `gru_gradients`
    grads: dict  # of the norms' parameters


def gru_input_backward(dgates, dproposal, cache):
    """Gradients of `gru_input` from dgates (..., 2d) and dproposal (..., d)."""
    x, P, cache_gates, cache_proposal = cache
    da_gates, grads_gates = named_norm_backward(dgates, cache_gates, "x_gates")  # (..., 2d)
    da_proposal, grads_proposal = named_norm_backward(dproposal, cache_proposal, "x_proposal")  # (..., d)
    dx = product(da_gates, P["W_gates"].T) + product(da_proposal, P["W_proposal"].T)  # (..., m)
    return GRUInputGrads(dx, (x, da_gates, da_proposal), {**grads_gates, **grads_proposal})


def gru_step(x_gates, x_proposal, h, P, how, mask=None):
    """One step from h (B, d) to h' (B, d), given what `gru_input` made of x; mask (B,)."""
    d = h.shape[-1]
    h_gates, cache_gates = named_norm(how, h @ P["U_gates"], P, "h_gates")  # (B, 2d)
    gates = sigmoid(x_gates + h_gates)  # (B, 2d)
    z, r = gates[:, :d], gates[:, d:]  # (B, d), (B, d)
    rh = r * h  # (B, d)
    h_proposal, cache_proposal = named_norm(how, rh @ P["U_proposal"], P, "h_proposal")  # (B, d)
    proposal = np.tanh(x_proposal + h_proposal)  # (B, d)
    new = proposal + z * (h - proposal)  # (B, d) = z ⊙ h + (1 − z) ⊙ h̃
    if mask is not None:
        new = h + mask[:, None] * (new - h)  # (B, d)
    return new, (h, gates, rh, proposal, cache_gates, cache_proposal, P, mask)


class GRUStepGrads(NamedTuple):
    """What one step hands back: to its inputs, to the state before, and to its parameters."""

    dgates: np.ndarray  # (B, 2d): of x_gates
    dproposal: np.ndarray  # (B, d): of x_proposal
    dh: np.ndarray  # (B, d)
    for_u: tuple  # (h, da_gates, rh, da_proposal), for the products in `gru_gradients`
    grads: dict  # of the norms' parameters


def gru_step_backward(dnew, cache):
    """Gradients of `gru_step` from dnew (B, d)."""
    h, gates, rh, proposal, cache_gates, cache_proposal, P, mask = cache
    d = h.shape[-1]
    z, r = gates[:, :d], gates[:, d:]  # (B, d), (B, d)
    kept = 0 if mask is None else dnew * (1 - mask[:, None])  # (B, d)
    dnew = dnew if mask is None else dnew * mask[:, None]  # (B, d)

    dproposal = tanh_backward(dnew * (1 - z), proposal)  # (B, d), before the tanh
    da_proposal, grads_proposal = named_norm_backward(dproposal, cache_proposal, "h_proposal")  # (B, d)
    drh = da_proposal @ P["U_proposal"].T  # (B, d)

    dz, dr = dnew * (h - proposal), drh * h  # (B, d), (B, d)
    dgates = sigmoid_backward(np.concatenate([dz, dr], axis=1), gates)  # (B, 2d), before the sigmoid
    da_gates, grads_gates = named_norm_backward(dgates, cache_gates, "h_gates")  # (B, 2d)

    dh = dnew * z + drh * r + da_gates @ P["U_gates"].T + kept  # (B, d)
    for_u = (h, da_gates, rh, da_proposal)
    return GRUStepGrads(dgates, dproposal, dh, for_u, {**grads_gates, **grads_proposal})


def gru_gradients(inputs, steps):
    """Gradients of the GRU's parameters, from the lists of all `GRUInputGrads` and `GRUStepGrads`.

    dW = Σ_t x_tᵀ da_t, dU = Σ_t h_tᵀ da_t: one product for all steps is quicker than one a step.
    """
    x, a_gates, a_proposal = (_stacked(arrays) for arrays in zip(*(part.for_w for part in inputs), strict=True))
    h, b_gates, rh, b_proposal = (_stacked(arrays) for arrays in zip(*(step.for_u for step in steps), strict=True))
    grads = {
        "W_gates": x.T @ a_gates,  # (m, 2d)
        "W_proposal": x.T @ a_proposal,  # (m, d)
        "U_gates": h.T @ b_gates,  # (d, 2d)
        "U_proposal": rh.T @ b_proposal,  # (d, d)
    }
    for part in (*inputs, *steps):
        add(grads, part.grads)
    return grads


def gru(x, h0, P, how, mask=None, reverse=False):
    """States h (T, B, d) for inputs x (T, B, m) from h0 (B, d); `reverse` runs from the last to the first."""
    (x_gates, x_proposal), cache_input = gru_input(x, P, how)  # (T, B, 2d), (T, B, d)
    times = range(len(x))[::-1] if reverse else range(len(x))
    states, caches, h = {}, {}, h0
    for t in times:
        h, caches[t] = gru_step(x_gates[t], x_proposal[t], h, P, how, _mask_at(mask, t))
        states[t] = h
    return np.stack([states[t] for t in range(len(x))]), (cache_input, caches, times)


def gru_backward(dstates, cache):
    """(dx, dh0, grads) from dstates (T, B, d)."""
    cache_input, caches, times = cache
    steps, dh = {}, 0
    for t in reversed(times):
        steps[t] = gru_step_backward(dstates[t] + dh, caches[t])
        dh = steps[t].dh  # (B, d)
    ordered = [steps[t] for t in range(len(dstates))]
    dgates = np.stack([step.dgates for step in ordered])  # (T, B, 2d)
    dproposal = np.stack([step.dproposal for step in ordered])  # (T, B, d)
    inputs = gru_input_backward(dgates, dproposal, cache_input)
    return inputs.dx, dh, gru_gradients([inputs], ordered)


# LSTM (Hochreiter and Schmidhuber; norms as in Cooijmans et al.)
#     i, f, o, u = norm(W x) + b + norm(U h)
#     c' = σ(f) ⊙ c + σ(i) ⊙ tanh(u)
#     h' = σ(o) ⊙ tanh(norm(c'))

STEPS_WITH_STATISTICS = 50  # the later steps share the last statistics of BatchNorm


def lstm_parameters(rng, m, d, how, gain=1.0, forget_bias=1.0):
    """Of an LSTM with m inputs and d hidden units. `gain`: the initial g, for BatchNorm often 0.1.

    BatchNorm has running statistics of its own for each of the first steps, because the states need some to settle in
    (Cooijmans et al.): "h.running" (steps, 2, 4d) and "c.running" (steps, 2, d).
    """
    P = {
        "W": glorot(rng, m, 4 * d),
        "U": orthogonal(rng, d, 4 * d),
        **norm_parameters(how, "x", 4 * d, gain=gain),
        **norm_parameters(how, "h", 4 * d, bias=False, gain=gain),
        **norm_parameters(how, "c", d, bias=how.kind not in ("none", "weight"), gain=gain),
    }
    P["x.b"][d : 2 * d] = forget_bias
    for name in _running(P):
        P[name] = np.stack([P[name]] * STEPS_WITH_STATISTICS)  # (steps, 2, n)
    return P


def lstm_at_step(P, step):
    """The parameters as `lstm_step` needs them: BatchNorm's running statistics are those of this step, or the last."""
    return {**P, **{name: P[name][min(step, len(P[name]) - 1)] for name in _running(P)}}  # (2, n) each


def _running(P):
    return [name for name in ("h.running", "c.running") if name in P]


def lstm_step(x_sum, h, c, P, how, mask=None):
    """One step from h, c (B, d) to h', c' (B, d), given x_sum = norm(W x) + b (B, 4d); mask (B,)."""
    d = h.shape[-1]
    h_sum, cache_h = named_norm(how, h @ P["U"], P, "h")  # (B, 4d)
    sums = x_sum + h_sum  # (B, 4d)
    gates = sigmoid(sums[:, : 3 * d])  # (B, 3d)
    i, f, o = gates[:, :d], gates[:, d : 2 * d], gates[:, 2 * d :]  # (B, d) each
    u = np.tanh(sums[:, 3 * d :])  # (B, d)
    new_c = f * c + i * u  # (B, d)
    c_norm, cache_c = named_norm(how, new_c, P, "c")  # (B, d)
    t = np.tanh(c_norm)  # (B, d)
    new_h = o * t  # (B, d)
    if mask is not None:
        new_h = h + mask[:, None] * (new_h - h)  # (B, d)
        new_c = c + mask[:, None] * (new_c - c)  # (B, d)
    return (new_h, new_c), (h, c, gates, u, t, cache_h, cache_c, P, mask)


def lstm_step_backward(dnew_h, dnew_c, cache):
    """(dx_sum (B, 4d), dh, dc, da (B, 4d) of h U, grads of the norms) from dnew_h, dnew_c (B, d)."""
    h, c, gates, u, t, cache_h, cache_c, P, mask = cache
    d = h.shape[-1]
    i, f, o = gates[:, :d], gates[:, d : 2 * d], gates[:, 2 * d :]  # (B, d) each
    kept_h, kept_c = 0, 0
    if mask is not None:
        kept_h, kept_c = dnew_h * (1 - mask[:, None]), dnew_c * (1 - mask[:, None])  # (B, d), (B, d)
        dnew_h, dnew_c = dnew_h * mask[:, None], dnew_c * mask[:, None]  # (B, d), (B, d)

    dc_norm, grads_c = named_norm_backward(tanh_backward(dnew_h * o, t), cache_c, "c")  # (B, d)
    dc = dnew_c + dc_norm  # (B, d)
    dgates = sigmoid_backward(np.concatenate([dc * u, dc * c, dnew_h * t], axis=1), gates)  # (B, 3d): of i, f, o
    dsums = np.concatenate([dgates, tanh_backward(dc * i, u)], axis=1)  # (B, 4d)
    da, grads_h = named_norm_backward(dsums, cache_h, "h")  # (B, 4d)
    return dsums, da @ P["U"].T + kept_h, dc * f + kept_c, da, {**grads_h, **grads_c}


def lstm(x, P, how, mask=None, reverse=False):
    """States h (T, B, d) for inputs x (T, B, m), from h = c = 0; `reverse` runs from the last to the first."""
    T, B, _ = x.shape
    x_sum, cache_x = named_norm(how, product(x, P["W"]), P, "x")  # (T, B, 4d)
    d = x_sum.shape[-1] // 4
    times = range(T)[::-1] if reverse else range(T)
    h = c = np.zeros((B, d), x_sum.dtype)
    states, caches = {}, {}
    for step, t in enumerate(times):
        (h, c), caches[t] = lstm_step(x_sum[t], h, c, lstm_at_step(P, step), how, _mask_at(mask, t))
        states[t] = h
    return np.stack([states[t] for t in range(T)]), (x, P, cache_x, caches, times)


def lstm_backward(dstates, cache):
    """(dx, grads) from dstates (T, B, d)."""
    x, P, cache_x, caches, times = cache
    T, B, d = dstates.shape
    dx_sum, da = np.empty((2, T, B, 4 * d), dstates.dtype)  # (T, B, 4d), (T, B, 4d)
    grads, dh, dc = {}, 0, np.zeros((B, d), dstates.dtype)
    for t in reversed(times):
        dx_sum[t], dh, dc, da[t], step = lstm_step_backward(dstates[t] + dh, dc, caches[t])
        add(grads, step)
    before = _stacked([caches[t][0] for t in range(T)])  # (T·B, d): h before each step
    dWx, grads_x = named_norm_backward(dx_sum, cache_x, "x")  # (T, B, 4d)
    return product(dWx, P["W"].T), {**grads, **grads_x, "U": before.T @ rows(da), "W": rows(x).T @ rows(dWx)}


def _mask_at(mask, t):
    """The mask (B,) of one step, or None where it would change nothing, which saves six operations."""
    return None if mask is None or mask[t].all() else mask[t]


def _stacked(arrays):
    """Arrays (..., m) as the rows of one: (rows, m)."""
    return np.concatenate([rows(array) for array in arrays])
