"""The ridge regression of FRePo and the translator against torch.linalg and formulas by hand."""

import pytest
import torch
from conftest import relative

import frepo


def drawn(*shape, key=0):
    generator = torch.Generator().manual_seed(key)
    return torch.randn(*shape, generator=generator, dtype=torch.double)


def predict(support, labels, target, ridge=1e-6):
    return target @ frepo.krr(support, labels, ridge)


def solve(support, labels, target, ridge):
    """The prediction by torch.linalg.solve in float64."""
    support, labels, target = support.double(), labels.double(), target.double()
    kernel = support @ support.T
    kernel = kernel + ridge * kernel.trace() / len(kernel) * torch.eye(len(kernel)).double()
    return target @ support.T @ torch.linalg.solve(kernel, labels)


@pytest.mark.parametrize("n, width, ridge", [(7, 20, 1e-6), (30, 8, 1e-2), (12, 12, 0.1)])
def test_krr(n, width, ridge):
    """More and fewer images than features."""
    inputs = drawn(n, width), drawn(n, 3, key=1), drawn(9, width, key=2)
    assert relative(predict(*inputs, ridge), solve(*inputs, ridge)) < 1e-8


def test_krr_gradients():
    inputs = [x.requires_grad_() for x in (drawn(4, 6), drawn(4, 3, key=1), drawn(5, 6, key=2))]
    assert torch.autograd.gradcheck(lambda *x: predict(*x, ridge=1e-2), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: predict(*x, ridge=1e-2), inputs)


def test_krr_near_singular():
    """A kernel that is singular in float32: features of a large mean, images nearly equal."""
    support, target = drawn(100, 1000).float() + 3, drawn(20, 1000, key=2).float() + 3
    support[:40] = support[50:90] + 1e-4 * drawn(40, 1000, key=4).float()
    labels = drawn(100, 10, key=1).float().requires_grad_()
    support.requires_grad_()
    found = predict(support, labels, target)
    expected = solve(support, labels, target, 1e-6)
    assert found.dtype == torch.float32 and relative(found.double(), expected) < 1e-5
    ours = torch.autograd.grad(found.square().sum(), (support, labels))
    theirs = torch.autograd.grad(expected.square().sum(), (support, labels))
    assert max(map(relative, ours, theirs)) < 1e-4


def test_krr_not_positive_definite():
    """NaN, which no loop accepts; no error out of a linear solver."""
    assert frepo.krr(*torch.ones(2, 4, 4), ridge=0).isnan().all()


def test_labels_and_loss():
    """(one-hot - 1/C) / scale; half the squared error, summed over classes, mean over images."""
    labels = frepo.center_labels(torch.tensor([2, 0]), 4, 0.5)
    assert labels.tolist() == [[-0.5, -0.5, 1.5, -0.5], [1.5, -0.5, -0.5, -0.5]]
    assert frepo.half_square(labels, torch.zeros(2, 4)).item() == 1.5
