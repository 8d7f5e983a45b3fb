import pytest
import torch
import torch.nn.functional as F

from ropepp_lit.nn import loss
from ropepp_lit.nn.loss import function_of_cross_entropy, linear_cross_entropy


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "MAX_LOGITS", 7 * 50)  # seven tokens at a time


def inputs(dtype=torch.float32, tokens=40, vocab_size=50):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 16).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, 16).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (tokens,))
    labels[::5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.usefixtures("small_chunks")
def test_equal_to_plain_cross_entropy(dtype, tolerance):
    hidden, weight, labels = inputs(dtype)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    actual = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=1e-6)
    gradients = torch.autograd.grad(actual * 3, (hidden, weight))
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted * 3, atol=10 * tolerance, rtol=1e-5)


@pytest.mark.parametrize("with_places", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_weights_of_labels(with_places):
    hidden, weight, labels = inputs(torch.float64)
    label_weights = torch.rand(len(labels))
    losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    expected = (losses * label_weights).sum()
    places = (labels != -100).nonzero().flatten() if with_places else None
    actual = linear_cross_entropy(hidden, weight, labels, label_indices=places, label_weights=label_weights)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    for one, other in zip(
        torch.autograd.grad(actual, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("with_places", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_a_function_of_the_losses(with_places):
    hidden, weight, labels = inputs(torch.float64)

    def function(losses):  # no token's share of it is known before the others' losses
        return (losses[:16].sum() - losses[16:32].sum()).sigmoid() * losses.square().sum()

    places = (labels != -100).nonzero().flatten() if with_places else None
    losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    expected = function(losses if places is None else losses[places])
    actual = function_of_cross_entropy(hidden, weight, labels, function, label_indices=places)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    for one, other in zip(
        torch.autograd.grad(3 * actual, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)
    with torch.no_grad():
        kept = function_of_cross_entropy(hidden, weight, labels, lambda losses: losses, label_indices=places)
    torch.testing.assert_close(kept, losses if places is None else losses[places], atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("small_chunks")
def test_float32_accumulation_under_bfloat16():
    hidden, weight, labels = inputs(torch.bfloat16, tokens=4000)
    actual = linear_cross_entropy(hidden, weight, labels)
    assert actual.dtype == torch.float32
    expected = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")
    assert abs(actual.item() / expected.item() - 1) < 1e-3  # logits are rounded to bfloat16, the sum is not
    actual.backward()
    exact = torch.autograd.grad(expected, weight)[0].double()
    # 570 chunks summed in bfloat16 would be off by several percent.
    assert ((weight.grad.double() - exact).norm() / exact.norm()) < 0.01


def test_all_labels_ignored():
    hidden, weight, labels = inputs()
    actual = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    actual.backward()
    assert actual == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_without_gradients():
    hidden, weight, labels = inputs()
    with torch.no_grad():
        actual = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(actual, F.cross_entropy(hidden @ weight.T, labels, reduction="sum").detach())


def test_frozen_output_layer():
    hidden, weight, labels = inputs()
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_under_autocast():
    hidden, weight, labels = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_cross_entropy(hidden, weight, labels)
    actual.backward()
    assert (actual.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32,) * 3
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert abs(actual.item() / expected.item() - 1) < 0.02
