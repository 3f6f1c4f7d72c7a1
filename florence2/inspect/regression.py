"""The linear read-outs of a probe: ridge regression of numbers, logistic regression of classes, and their scores."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.errors import OptionError


def fit_numbers(z: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Fit y (n, columns) on z (n, F) by ridge regression; return weights (F, columns) and constant (columns,).

    It solves the smaller of two equivalent systems of equations, of size n or F.
    """
    constant = y.mean(dim=0)
    n, width = z.shape
    penalty = max(ridge, 1e-8)  # without any, dependent features would have no unique solution
    if width <= n:
        gram = z.T @ z + penalty * torch.eye(width, dtype=z.dtype)
        return torch.linalg.solve(gram, z.T @ (y - constant)), constant
    gram = z @ z.T + penalty * torch.eye(n, dtype=z.dtype)
    return z.T @ torch.linalg.solve(gram, y - constant), constant


def fit_classes(z: Tensor, y: Tensor, ridge: float, classes: int) -> tuple[Tensor, Tensor]:
    """Fit the classes y (n,) on z (n, F) by logistic regression; return weights (F, classes) and constant (classes,).

    The loss is convex, so the starting point does not matter.
    """
    weight = torch.zeros(z.shape[1], classes, dtype=z.dtype, requires_grad=True)
    constant = torch.zeros(classes, dtype=z.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, constant], max_iter=200, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z @ weight + constant, y) + 0.5 * ridge * weight.square().sum() / len(z)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), constant.detach()


def measure_scores(out: Tensor, y: Tensor, classes: Sequence[str] | None) -> list[float]:
    """Return the accuracy for classes, or the R2 of each column. Raises OptionError where R2 is not defined."""
    if classes is not None:
        return [float((out.argmax(dim=1) == y).double().mean())]
    rest, spread = (out - y).square().sum(dim=0), (y - y.mean(dim=0)).square().sum(dim=0)
    if not spread.all():
        raise OptionError("The targets of the held-out images are all equal, so R2 is not defined; hold out more.")
    return [float(value) for value in 1 - rest / spread]


def predict_constant(y: Tensor, classes: Sequence[str] | None) -> Tensor:
    """Return the baseline's output: the mean of each column, or a one-hot vector of the most frequent class."""
    if classes is None:
        return y.mean(dim=0)
    return F.one_hot(torch.bincount(y, minlength=len(classes)).argmax(), len(classes)).double()
