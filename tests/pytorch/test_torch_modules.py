"""The modules, and the replacement of a model's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch_cases import on_reference  # noqa: F401 (a fixture)

import rmsnorm_np.torch as rt

pytestmark = pytest.mark.usefixtures("on_reference")
ROW = 64


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RMSNorm", {}),
        ("RMSNorm", {"eps": 1e-3, "elementwise_affine": False}),
        ("RMSNorm", {"dtype": torch.bfloat16}),
        ("LayerNorm", {}),
        ("LayerNorm", {"bias": False, "eps": 1e-3}),
        ("LayerNorm", {"elementwise_affine": False}),
    ],
)
@pytest.mark.parametrize("shape", [8, (3, 8)])
def test_modules_are_those_of_pytorch(name, options, shape):
    """Arguments, state dict, values."""
    ours, theirs = (getattr(module, name)(shape, **options) for module in (rt, torch.nn))
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    for a in theirs.parameters():
        torch.nn.init.uniform_(a)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 8, dtype=options.get("dtype", torch.float32))
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_weight_that_is_a_difference_to_one():
    """It begins with zero, as Gemma's."""
    for norm in (rt.RMSNorm(8, weight_offset=1.0), rt.LayerNorm(8, weight_offset=1.0)):
        assert not norm.weight.any()
        plain = type(norm)(8)
        x = torch.randn(2, 8)
        torch.testing.assert_close(norm(x), plain(x))
        assert "weight_offset=1.0" in repr(norm)


class Norm(torch.nn.Module):
    """Any norm of one weight."""

    def __init__(self, formula, eps=1e-6, dtype=torch.float32):
        super().__init__()
        self.weight, self.formula, self.eps = torch.nn.Parameter(torch.rand(ROW, dtype=dtype)), formula, eps

    def forward(self, x):
        wide = x.float()
        return self.formula(wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt(), self.weight, x.dtype)


def llama(xhat, weight, dtype):
    return weight * xhat.to(dtype)


def gemma(xhat, weight, dtype):
    return (xhat * (1.0 + weight.float())).to(dtype)


def plain(xhat, weight, dtype):
    return (xhat * weight.float()).to(dtype)


def t5(xhat, weight, dtype):
    return weight * xhat.to(weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("formula", "weight_offset", "round_xhat"), [(llama, 0.0, True), (gemma, 1.0, False), (plain, 0.0, False)]
)
def test_norms_are_told_apart_by_what_they_compute(formula, weight_offset, round_xhat, dtype):
    """The class has the same name each time."""
    before = Norm(formula, dtype=dtype)
    model = torch.nn.Sequential(before)
    done = rt.replace_norms(model)
    assert done == ({"0": model[0]}, {})
    assert (model[0].weight_offset, model[0].round_xhat, model[0].eps) == (weight_offset, round_xhat, 1e-6)
    assert model[0].weight is before.weight
    x = torch.randn(16, ROW, dtype=dtype)
    alike = (model(x) == before(x)).float().mean()
    assert alike > (0.99 if dtype.itemsize == 2 else 0.1)


class WithGateNorm(Norm):
    def forward(self, x, gate=None):
        return super().forward(x)


class HookedNorm(Norm):
    def __init__(self):
        super().__init__(llama)
        self.register_forward_hook(lambda *args: None)


class BrokenNorm(Norm):
    def forward(self, x):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (Norm(lambda xhat, weight, dtype: weight * xhat.to(dtype) + 0.001), "computes something else"),
        (Norm(lambda xhat, weight, dtype: (weight + 0.5) * xhat.to(dtype)), "computes something else"),
        (Norm(t5), "with float32 parameters on bfloat16 rows"),
        (Norm(lambda xhat, weight, dtype: (llama(xhat, weight, dtype), xhat)), "computes something else"),
        (BrokenNorm(llama), "computes something else"),
        (WithGateNorm(llama), "it is called with x, gate"),
        (HookedNorm(), "it has hooks"),
        (torch.nn.BatchNorm1d(ROW), "it has num_batches_tracked"),
        (torch.nn.GroupNorm(1, ROW), "computes something else"),
        (torch.nn.LocalResponseNorm(2), "no known length of a row"),
        (torch.nn.RMSNorm(ROW, device="meta"), "not floating-point numbers on the CPU"),
        (torch.nn.utils.parametrizations.weight_norm(torch.nn.LayerNorm(ROW), dim=None), "it has parametrizations"),
    ],
    ids=str,
)
def test_what_is_not_known_is_kept(norm, reason):
    model = torch.nn.ModuleDict({"a": norm, "b": rt.RMSNorm(ROW)})
    done = rt.replace_norms(model)
    assert model["a"] is norm
    assert done.replaced == {}
    assert reason in done.kept["a"]


def test_other_modules_are_not_called():
    class Shift(torch.nn.Module):
        def forward(self, x):
            raise AssertionError

    model = torch.nn.Sequential(Shift(), torch.nn.Linear(3, 3))
    assert rt.replace_norms(model) == ({}, {})


def test_pytorchs_own_norms():
    model = torch.nn.ModuleDict(
        {
            "layer": torch.nn.LayerNorm(ROW),
            "two axes": torch.nn.LayerNorm((3, ROW), eps=1e-3),
            "without bias": torch.nn.LayerNorm(ROW, bias=False),
            "bare": torch.nn.LayerNorm(ROW, elementwise_affine=False),
            "rms": torch.nn.RMSNorm(ROW),
            "bare rms": torch.nn.RMSNorm(ROW, eps=1e-4, elementwise_affine=False),
        }
    ).eval()
    before = copy.deepcopy(model)
    done = rt.replace_norms(model)
    assert [*done.replaced] == [*before.keys()]
    x = torch.randn(2, 3, ROW)
    for name, norm in model.items():
        assert isinstance(norm, rt.RMSNorm if "rms" in name else rt.LayerNorm)
        assert not norm.training
        torch.testing.assert_close(norm(x), before[name](x))
    assert [*model.state_dict()] == [*before.state_dict()]


def test_a_norm_in_two_places_stays_one():
    norm = torch.nn.LayerNorm(ROW)
    model = torch.nn.Sequential(norm, torch.nn.Sequential(norm))
    done = rt.replace_norms(model)
    assert [*done.replaced] == ["0", "1.0"]
    assert model[0] is model[1][0]


def test_random_numbers_of_others_stay():
    torch.manual_seed(0)
    expected = torch.rand(1)
    model = torch.nn.Sequential(torch.nn.LayerNorm(ROW))
    torch.manual_seed(0)
    rt.replace_norms(model)
    assert torch.rand(1) == expected


SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "norms", "weight_offset", "round_xhat"),
    [("Llama", 5, 0.0, True), ("Gemma", 5, 1.0, False), ("Qwen3", 9, 0.0, True)],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models(name, norms, weight_offset, round_xhat, dtype):
    """Their results and gradients stay, to the bit in 16 bits, where their norms are those of this library."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL)
    before = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    for parameter_name, a in before.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.uniform_(a, 0.5, 1.5)
    model = copy.deepcopy(before)
    done = rt.replace_norms(model)
    assert done.kept == {}
    assert len(done.replaced) == norms
    assert {(norm.weight_offset, norm.round_xhat) for norm in done.replaced.values()} == {(weight_offset, round_xhat)}
    assert [*model.state_dict()] == [*before.state_dict()]
    tokens = torch.arange(12).reshape(2, 6)
    results = [m(input_ids=tokens, labels=tokens) for m in (model, before)]
    exact = {"rtol": 0, "atol": 0} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(*(result.logits for result in results), **exact)
    for result in results:
        result.loss.backward()
    for (parameter_name, a), b in zip(model.named_parameters(), before.parameters(), strict=True):
        error = (a.grad - b.grad).norm() / b.grad.norm()
        assert error < (0.02 if dtype is torch.bfloat16 else 1e-4), parameter_name
