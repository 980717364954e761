"""Error messages that name the likely mistake and the call that was meant. Runs only after a check has failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    Shape: TypeAlias = tuple[int, ...]


def parameter_shape(name: str, shape: Shape, x_shape: Shape, axes: Shape) -> str:
    """The message for a weight or bias whose shape does not fit x."""
    normalised = tuple(x_shape[i] for i in axes)
    ndim, first = len(x_shape), len(x_shape) - len(axes)  # first: of the normalised axes, if they are trailing
    trailing = axes[0] == first
    message = f"{name} has shape {shape}, expected {normalised}, the axes {axes} of x.shape {x_shape}"
    if trailing and len(axes) < len(shape) <= ndim:
        message += ", or a shape that broadcasts to x.shape and has these axes in full"
        moved = _axes_of(shape[: len(shape) - len(axes)], x_shape[:first])
        if moved is not None and shape[len(moved) :] == normalised:
            spread = tuple(x_shape[i] if i in moved or i >= first else 1 for i in range(moved[0], ndim))
            message += f"; for the axes {(*moved, *axes)}, pass {name}.reshape{spread}"
    elif not shape:
        message += "; if eps was meant, it is keyword-only: eps=..."
    elif len(shape) > ndim and x_shape in (shape[-ndim:], tuple(shape[i] for i in axes)):
        message += f"; {name} and x look swapped: x comes first"
    return message


def _axes_of(lengths: Shape, x_shape: Shape) -> Shape | None:
    """The axes of x, in order, that have these lengths, as far back as possible; None if there are none."""
    axes: Shape = ()
    before = len(x_shape)
    for length in reversed(lengths):
        before = next((i for i in reversed(range(before)) if x_shape[i] == length), -1)
        if before < 0:
            return None
        axes = (before, *axes)
    return axes


# the order of the arguments, by the arrays like x that a function has; the first that fits
_ORDERS = (
    (("gate", "dy"), "dy, x, gate, weight, bias"),
    (("gate",), "x, gate, weight, bias"),
    (("x_dot",), "x, weight, bias, x_dot, weight_dot, bias_dot"),
    (("ddx",), "ddx, ddweight, ddbias, dy, x, weight, bias"),
    (("h",), "dy, dh, h, weight, bias"),
    (("dy",), "dy, x, weight, bias"),
)


def same_shape(name: str, shape: Shape, x_name: str, x_shape: Shape, names: tuple[str, ...]) -> str:
    """The message for an array that has another shape than x. names: of x and of all that have its shape."""
    message = f"{name} has shape {shape}, expected {x_name}.shape {x_shape}"
    if len(shape) != len(x_shape) and name in ("dy", "gate", "x_dot", "ddx"):  # one of the two is probably the weight
        order = next(order for some, order in _ORDERS if all(one in names for one in some))
        message += f"; the arguments are {order}, in this order"
    return message


def not_an_array(name: str, value: Any, error: Exception) -> TypeError | ValueError:
    """The error for a value that NumPy cannot make an array of, with the conversion of a PyTorch tensor."""
    if getattr(value, "requires_grad", False):
        return TypeError(
            f"{name} is a {type(value).__name__} that requires grad, expected an array: pass {name}.detach()"
        )
    return (ValueError if isinstance(error, ValueError) else TypeError)(f"{name} is not an array: {error}")


_DEVICES = {2: "CUDA", 4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 13: "CUDA managed", 14: "oneAPI", 15: "WebGPU"}


def not_on_the_host(name: str, value: Any, kind: Any, number: Any) -> str:
    """The message for an array on a device; kind and number are DLPack's."""
    if hasattr(value, "__cuda_array_interface__"):
        return f"{name} is a device array, expected a host array like x, such as {name}.copy_to_host()"
    device = _DEVICES.get(kind, f"kind {kind} in DLPack")
    return f"{name} is a {type(value).__name__} on device {number} of {device}, expected an array on the CPU"
