"""Swap the norms of a model for those of this library, after finding out what each of them computes."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rmsnorm_np import reference
from rmsnorm_np.torch.modules import LayerNorm, RMSNorm
from rmsnorm_np.torch.operators import NUMPY_NAMES, to_array, to_tensor, y_dtype

_SCALES = 1.0, 1e-3, 30.0  # of the rows that a norm is tried on: eps shows in small ones
_UNITS = 16.0  # largest difference from what a norm computes, in units of the dtype for the largest element of the row
_ALIKE = 0.98  # of the elements are equal in 16 bits: one rounding more changes a quarter of them


class Replaced(NamedTuple):
    """What `replace_norms` did, by the names of the modules."""

    replaced: dict[str, torch.nn.Module]
    kept: dict[str, str]


class _Guess(NamedTuple):
    """What a module may compute."""

    centred: bool
    eps: float
    ndim: int
    weight_offset: float
    round_xhat: bool

    def y(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        norm = reference.layer_norm if self.centred else reference.rms_norm
        dtype = y_dtype(x, weight, self.round_xhat)
        return to_tensor(
            norm(
                to_array(x), to_array(weight), to_array(bias), eps=self.eps, axis=tuple(range(-self.ndim, 0)),
                weight_offset=self.weight_offset, round_xhat=self.round_xhat, dtype=NUMPY_NAMES[dtype],
            )
        )  # fmt: skip


def replace_norms(model: torch.nn.Module) -> Replaced:
    """Replace the RMSNorm and LayerNorm modules of a model by those of this library, in place.

    A module is replaced if its class has "norm" in its name and it computes, on random rows with random parameters,
    what one of this library's modules does: RMSNorm or LayerNorm, with the weight or 1 + the weight (Gemma), with the
    normalised row rounded to 16 bits before the weight (Llama, Qwen, Mistral) or not. It is tried in its own dtype, in
    bfloat16, and with float32 parameters on bfloat16 rows. Everything else stays as it is.

    Parameters
    ----------
    model : torch.nn.Module
        Its parameters stay the same objects, with the same names in its state dict.

    Returns
    -------
    Replaced
        A named tuple: ``replaced``, the new modules, and ``kept``, the reason why a module with "norm" in the name of
        its class was not replaced.

    Examples
    --------
    >>> import torch
    >>> from rmsnorm_np.torch import replace_norms
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.BatchNorm1d(8))
    >>> done = replace_norms(model)
    >>> list(done.replaced), list(done.kept)
    (['1'], ['2'])
    """
    replaced, kept = {}, {}
    known: dict[torch.nn.Module, torch.nn.Module | str] = {}  # a module may be in several places
    for parent_name, parent in list(model.named_modules(remove_duplicate=False)):
        for child_name, child in list(parent.named_children()):
            if "norm" not in type(child).__name__.lower() or isinstance(child, (RMSNorm, LayerNorm)):
                continue
            if child not in known:
                known[child] = _replacement(child)
            new, name = known[child], f"{parent_name}.{child_name}".lstrip(".")
            if isinstance(new, str):
                kept[name] = new
            else:
                setattr(parent, child_name, new)
                replaced[name] = new
    return Replaced(replaced, kept)


def _replacement(module: torch.nn.Module) -> torch.nn.Module | str:
    """The module of this library that does the same, or why there is none."""
    reason = _unusual(module)
    if reason is not None:
        return reason
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    shape = tuple(getattr(module, "normalized_shape", () if weight is None else weight.shape))
    if not shape:
        return "it has no weight, and so no known length of a row"
    own = torch.float32 if weight is None else weight.dtype
    tries = [(own, own), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
    guesses = list(_guesses(module, shape))
    for parameter_dtype, x_dtype in dict.fromkeys(tries):
        guesses = _confirmed(module, guesses, shape, parameter_dtype, x_dtype)
        if not guesses:
            names = (str(dtype).removeprefix("torch.") for dtype in (parameter_dtype, x_dtype))
            return "it computes something else, with {} parameters on {} rows".format(*names)
    found = guesses[0]
    own_shape = shape[len(shape) - found.ndim :]
    new: torch.nn.Module
    if found.centred:
        new = LayerNorm(own_shape, found.eps, elementwise_affine=False, weight_offset=found.weight_offset)
    else:
        new = RMSNorm(
            own_shape, found.eps, elementwise_affine=False, weight_offset=found.weight_offset,
            round_xhat=found.round_xhat,
        )  # fmt: skip
    new.weight, new.elementwise_affine = weight, weight is not None
    if bias is not None:
        new.bias = bias
    return new.train(module.training)


def _unusual(module: torch.nn.Module) -> str | None:
    """Why a module is not even tried."""
    parameters = dict(module.named_parameters())
    others = {name for name, _ in module.named_buffers()} | {name for name, _ in module.named_children()}
    others |= parameters.keys() - {"weight", "bias"}
    if others:
        return f"it has {', '.join(sorted(others))}"
    if any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks")):
        return "it has hooks"
    if any(a.device.type != "cpu" or a.dtype not in NUMPY_NAMES for a in parameters.values()):
        return "its parameters are not floating-point numbers on the CPU"
    arguments = inspect.signature(module.forward).parameters
    if len(arguments) != 1:
        return f"it is called with {', '.join(arguments)}"
    return None


def _guesses(module: torch.nn.Module, shape: tuple[int, ...]) -> Iterator[_Guess]:
    """What a module of these attributes may compute. The plain way comes first: without weight, several are equal."""
    numbers = {value for value in vars(module).values() if type(value) is float and 0.0 <= value < 1.0}
    if getattr(module, "eps", 0.0) is None:
        numbers = {torch.finfo(torch.float32).eps}
    has_weight = getattr(module, "weight", None) is not None
    for ndim in dict.fromkeys((len(shape), 1)):
        for eps in numbers:
            for weight_offset in (0.0, 1.0) if has_weight else (0.0,):
                yield _Guess(True, eps, ndim, weight_offset, False)
                if getattr(module, "bias", None) is None:
                    for round_xhat in (False, True) if has_weight else (False,):
                        yield _Guess(False, eps, ndim, weight_offset, round_xhat)


def _confirmed(
    module: torch.nn.Module, guesses: list[_Guess], shape: tuple[int, ...], dtype: torch.dtype, x_dtype: torch.dtype
) -> list[_Guess]:
    """The guesses that a copy of the module agrees with on random rows."""
    tried = copy.deepcopy(module).to(dtype)
    random = torch.Generator().manual_seed(0)
    parameters = []
    for name in ("weight", "bias"):
        a = getattr(tried, name, None)
        if a is not None:
            a.data.copy_(torch.rand(a.shape, generator=random) + 0.25)
            a = a.detach()
        parameters.append(a)
    rows = torch.randn((2, len(_SCALES), *shape), generator=random)
    x = (rows * torch.tensor(_SCALES).reshape(-1, *(1 for _ in shape))).to(x_dtype)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may warn of the mixture of dtypes
            y = tried(x.clone())
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return []  # it is anybody's code, and what fails is not a norm of such rows
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return []
    return [guess for guess in guesses if _agree(y, guess.y(x, *parameters))]


def _agree(y: Tensor, expected: Tensor) -> bool:
    if y.dtype != expected.dtype:
        return False
    largest = expected.double().abs().amax(-1, keepdim=True)
    near = (y.double() - expected.double()).abs() <= _UNITS * torch.finfo(y.dtype).eps * largest
    return bool(near.all()) and (y.dtype.itemsize > 2 or bool((y == expected).double().mean() > _ALIKE))
