"""When the fast paths may read a module's weights instead of calling the module.

Folding or packing weights gives the same numbers only while the modules do nothing else. Somebody who hooks,
replaces, subclasses or patches a part wants that part to be called; then the plain path runs. (Attention modules are
never called in any path of decoding, only their projections are; the `trace` names what they compute.)
"""

import torch
from torch import nn
from torch.nn.modules import module as torch_module


def may_bypass(module: nn.Module, known: frozenset[type[nn.Module]]) -> bool:
    """True if calling `module` and its parts would do no more than the mathematics of their weights.

    `known` are the exact classes of which the caller knows the mathematics.
    """
    if module.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    return all(type(part) in known and not _is_changed(part) for part in module.modules())


def _is_changed(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
