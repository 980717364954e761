"""A PyTorch module against the oracle: value in ULP, gradients by autograd."""

import numpy as np
import pytest
import torch

from rmsnorm_np import reference


class MyRMSNorm(torch.nn.Module):
    def __init__(self, n: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.rand(n) + 0.5), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.double()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * rstd * self.weight).to(x.dtype)


@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 1024), (1, 1)])
def test_my_rms_norm(shape):
    torch.manual_seed(0)
    norm = MyRMSNorm(shape[-1])
    x, dy = torch.randn(2, *shape)
    x.requires_grad_()
    y = norm(x)
    y.backward(dy)

    wide = [t.detach().numpy().astype(np.float64) for t in (dy, x, norm.weight)]
    exact = reference.rms_norm(*wide[1:])
    assert np.all(np.abs(y.detach().numpy() - exact) <= 0.51 * np.spacing(np.float32(np.abs(exact))))
    grads = reference.rms_norm_backward(*wide)
    np.testing.assert_allclose(x.grad.numpy(), grads.dx, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.weight.grad.numpy(), grads.dweight, rtol=1e-5, atol=1e-6)
