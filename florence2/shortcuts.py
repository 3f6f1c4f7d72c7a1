"""When the fast paths may read a module's weights instead of calling the module.

Folding or packing weights gives the same numbers only while the module does nothing else. Somebody who hooks,
replaces, subclasses or patches a part of the model wants that part to be called; then the plain path runs.
"""

import torch
from torch import nn

_AS_BUILT = ("florence2.", "torch.nn.modules.")


def may_bypass(module: nn.Module) -> bool:
    """True if calling `module` and its parts would do no more than the mathematics of their weights."""
    if module.training or torch.is_grad_enabled():
        return False
    return all(_is_as_built(part) for part in module.modules())


def _is_as_built(part: nn.Module) -> bool:
    hooked = part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
    return not hooked and type(part).__module__.startswith(_AS_BUILT) and type(part) is not nn.Linear
