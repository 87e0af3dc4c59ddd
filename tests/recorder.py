"""A device that records, on the CPU: what a GPU does with a graph of kernels, operation by operation.

Of what a GPU refuses while it records, only readings of single values on the host are refused here.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Recorded(TorchDispatchMode):
    """All operations on tensors inside the block, to be done again on the same memory with the same other arguments.

    As on a GPU, nothing in Python is done again, and no single value may be read on the host.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, made))
        return made

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, made in self.operations:
                again = func(*args, **kwargs)
                for before, now in zip(tree_flatten(made)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(before, Tensor) and before.data_ptr() != now.data_ptr():
                        before.detach().copy_(now)


def recorder(count):
    """As `recorder_for` gives for a GPU; `count` grows by one with each replay."""

    def record(function, generator=None):
        recorded, pending = Recorded(), []
        with recorded:
            function()
        pending.append(True)  # the emulation has done what a GPU only does when it replays for the first time

        def replay():
            count.append(1)
            if pending:
                pending.clear()
            else:
                recorded.replay()

        return replay

    return record
