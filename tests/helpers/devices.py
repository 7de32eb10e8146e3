"""A second device for machines that have none: what a GPU would refuse is refused on the CPU.

Within `two_devices()` a tensor that is made without a device is a `Host`, as it would be if the model were on
a GPU; all others count as the GPU's. An operation on both raises RuntimeError, as CUDA does, but for what
CUDA allows: single numbers, copies and indices.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

MAKERS = {
    getattr(torch, name) for name in "tensor arange zeros ones empty full rand randn randint eye".split()
}
ALLOWED = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__}


class Host(Tensor):
    """A tensor that would not be on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class two_devices(TorchFunctionMode):  # noqa: N801  (a context manager)
    """Tells `Host` tensors from others in every operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        hosts = {isinstance(one, Host) for one in leaves if one.dim()}
        found = func(*args, **kwargs)
        if func is Tensor.to and (goals := [one for one in (*args[1:], kwargs.get("device")) if names(one)]):
            return found.as_subclass(Host if isinstance(goals[0], Host) else Tensor)
        if len(hosts) == 2 and func not in ALLOWED:
            raise RuntimeError(f"{getattr(func, '__name__', func)}: its tensors are on two devices")
        if hosts == {True} or (func in MAKERS and kwargs.get("device") is None):
            return tree_map_only(Tensor, lambda one: one.as_subclass(Host), found)
        return found


def names(where: object) -> bool:
    """Whether an argument of `Tensor.to` says where to."""
    return isinstance(where, str | torch.device | Tensor)
