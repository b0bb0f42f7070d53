"""common/linear.py: the same numbers and gradients as torch's own, with either library."""

import pytest
import torch
import torch.nn.functional as F

from common import linear as layers
from common.linear import GELU, Linear, by_onednn, gelu, linear
from common.ranks import generator


def inputs(*shape: int, dim_out: int = 128) -> list[torch.Tensor]:
    """x, weight, bias that learn, and a gradient of the result."""
    draw = generator("linear", *shape)
    x, weight, bias = (torch.randn(size, generator=draw).requires_grad_() for size in
                       (shape, (dim_out, shape[-1]), (dim_out,)))
    return [x, weight, bias, torch.randn(*shape[:-1], dim_out, generator=draw)]


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 * want.abs().max().item())


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", ((32, 27, 128), (864, 64), (2, 3, 40, 96), (1, 1, 17)))
def test_results_and_gradients_are_those_of_float64(shape, bias, products):
    x, weight, b, grad = inputs(*shape)
    used = [x, weight, b] if bias else [x, weight]
    linear(*used).backward(grad)
    doubles = [p.detach().double().requires_grad_() for p in used]
    want = F.linear(*doubles)
    want.backward(grad.double())
    near(linear(*used).detach(), want.detach())
    with torch.no_grad():
        near(linear(*used), want.detach())
    for p, d in zip(used, doubles, strict=True):
        near(p.grad, d.grad)


def test_any_memory_layout_gives_the_same_numbers(products):
    x, weight, bias, _ = inputs(40, 64)
    flat = x.detach().t().contiguous().t()
    part = torch.cat([x, x], 1).detach()[:, :64]
    with torch.no_grad():
        want = F.linear(x.double(), weight.double(), bias.double())
        for same in (flat, part, flat[None].expand(1, 40, 64)):
            near(linear(same, weight, bias).reshape(40, 128), want)


def test_biases_and_inputs_of_other_shapes_are_left_to_torch(products):
    x, weight, bias, _ = (p.detach() for p in inputs(40, 64))
    for other in (bias[:1].expand(128), torch.stack((bias, bias), 1)[:, 0], bias[:1], bias[None]):
        near(linear(x, weight, other), F.linear(x.double(), weight.double(), other.double()))
    near(linear(x[0], weight, bias), F.linear(x[0].double(), weight.double(), bias.double()))
    with pytest.raises(RuntimeError, match="shapes"):
        linear(x[:, :50], weight, bias)


def test_frozen_tensors_get_no_gradient_and_no_work(products):
    x, weight, bias, grad = inputs(30, 64)
    weight.requires_grad_(False)
    y = linear(x, weight, bias)
    if products == "onednn":  # the input of frozen weights is not kept
        assert [kept is None for kept in y.grad_fn.next_functions[0][0].saved_tensors] == [
            True, False]
    y.backward(grad)
    assert weight.grad is None and x.grad is not None and bias.grad is not None
    x.requires_grad_(False)
    assert not linear(x, weight).requires_grad


@pytest.mark.skipif(not layers.HAS_ONEDNN, reason="this CPU has no AVX-512")
def test_onednn_takes_large_fp32_products_alone(monkeypatch):
    x, weight = torch.zeros(864, 128), torch.zeros(512, 128)
    assert by_onednn(x, weight)
    assert not by_onednn(x[:4], weight)
    large = torch.zeros(2048, 2048)
    assert by_onednn(large[:4], large) and not by_onednn(large[:3], large)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not by_onednn(x, weight)
    monkeypatch.undo()
    assert not by_onednn(x.bfloat16(), weight.bfloat16()) and not by_onednn(x, weight.double())
    assert not by_onednn(x.to("meta"), weight.to("meta")) and not by_onednn(x[:0], weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_onednn(x, weight) and linear(x, weight).dtype == torch.bfloat16


def test_a_layer_has_torch_s_names_initial_values_and_numbers(products):
    torch.manual_seed(0)
    ours = Linear(96, 128)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(96, 128)
    x = torch.randn(50, 96)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(),
                                                 strict=True))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_gelu_and_its_gradient_are_those_of_the_tanh_form(dtype):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -1e4, 1e4])])
    x = x.to(dtype).requires_grad_()
    want_x = x.detach().double().requires_grad_()
    want = F.gelu(want_x, approximate="tanh")
    want.sum().backward()
    gelu(x).sum().backward()
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype != torch.bfloat16 else {
        "rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(gelu(x).double(), want, **tolerance)
    torch.testing.assert_close(x.grad.double(), want_x.grad, **tolerance)
    assert torch.equal(GELU()(x), gelu(x)) and gelu(x).dtype == dtype
