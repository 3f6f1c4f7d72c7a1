"""New weights from an adapter's tensors, in float32, one after another; and the checks that need values."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from florence2.checkpoints.merging.plan import COPY, Plan, module_path


def merged(
    modules: Mapping[str, nn.Module], plan: Plan, stored: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name, the old and the new value of each tensor one by one, so that a second model is never held."""
    for path, change in plan.changes.items():
        module = modules[path]
        weight = module.weight
        assert isinstance(weight, Tensor)
        exact = torch.promote_types(weight.dtype, torch.float32)
        a, b = (stored[name].to(weight.device, exact).flatten(1) for name in (change.a, change.b))
        product = (b @ a).T if isinstance(module, nn.Embedding) else (b @ a).view(weight.shape)
        new = weight.to(exact) + change.scale * product
        if change.magnitude is not None:
            new = _with_lengths(new, stored[change.magnitude].to(new).flatten(), isinstance(module, nn.Embedding))
        yield f"{path}.weight", weight, new.to(weight.dtype)
    for target, name in plan.whole.items():
        path, _, leaf = target.rpartition(".")
        old = getattr(modules[path], leaf)
        yield target, old, stored[name].to(old)


def _with_lengths(weight: Tensor, lengths: Tensor, columns: bool) -> Tensor:
    """Scale the rows of a weight, or its columns (D of a table (V, D)), to the given lengths."""
    rows = weight.T if columns else weight.flatten(1)
    scaled: Tensor = (lengths / torch.linalg.vector_norm(rows, dim=1))[:, None] * rows
    return scaled.T if columns else scaled.view(weight.shape)


def find_foreign(modules: Mapping[str, nn.Module], stored: Mapping[str, Tensor]) -> list[str]:
    """List the problems of stored weights of the base model.

    peft stores them when the output projection is a target. They show whether this is the model that the adapter was
    trained on, up to the rounding of any type.
    """
    problems = []
    for name in stored:
        path = module_path(name.removesuffix(COPY), modules) if name.endswith(COPY) else None
        if name.endswith(COPY) and (path is None or not _is_near(stored[name], modules[path].weight)):
            problems.append(f"{name} is not the weight of this model; the adapter was trained on another model")
    return problems


def _is_near(stored: Tensor, weight: Tensor | nn.Module) -> bool:
    assert isinstance(weight, Tensor)
    same_shape = stored.shape == weight.shape
    return same_shape and torch.allclose(stored.float(), weight.float().cpu(), rtol=2**-7, atol=1e-6)


def find_infinite(modules: Mapping[str, nn.Module], plan: Plan, stored: Mapping[str, Tensor]) -> list[str]:
    """List the tensors that would hold values that are not finite."""
    return [
        f"once merged, {name} is not finite (as {new.dtype})"
        for name, _, new in merged(modules, plan, stored)
        if not torch.isfinite(new).all()
    ]
