import torch
from torch import nn

from cat_plugin.running.tensors import named_tensors, state_tensors, storage_leaves
from tests.cat_plugin.helpers import SmallNet, Wrapped


def test_parameters_then_buffers_by_name():
    model = SmallNet()
    model.norm.register_buffer("hidden", torch.zeros(2), persistent=False)
    found = dict(named_tensors(model))
    assert list(found) == [
        *("first.weight", "first.bias", "last.weight", "last.bias", "norm.weight", "norm.bias"),
        *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "norm.hidden"),
    ]
    assert found["last.bias"] is model.last.bias


def test_leaves_are_the_plain_tensors_inside():
    codes, scale, zero = torch.zeros(2, 3), torch.ones(2), torch.ones(1)
    nested = Wrapped(Wrapped(codes, scale), zero)
    leaves = list(storage_leaves(nested))
    assert [leaf.data_ptr() for leaf in leaves] == [tensor.data_ptr() for tensor in (codes, scale, zero)]
    (leaf,) = storage_leaves(nn.Parameter(codes))
    assert leaf.data_ptr() == codes.data_ptr() and not leaf.requires_grad


class Packed(nn.Linear):
    """Keeps tensors that are neither parameters nor buffers, and puts them into its `state_dict`."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "packed"] = (torch.ones(4), [torch.zeros(5), None], "int8")
        destination[prefix + "one"] = torch.ones(6)


def test_what_else_the_state_dict_holds_comes_once_and_last():
    model = nn.Sequential(Packed(2, 3))
    found = list(state_tensors(model))
    assert [name for name, _ in found] == ["0.weight", "0.bias", "0.packed.0", "0.packed.1.0", "0.one"]
    assert [tensor.numel() for _, tensor in found] == [6, 3, 4, 5, 6]


def test_state_dict_that_fails_leaves_parameters_and_buffers():
    model = SmallNet()

    def fail(*args):
        raise RuntimeError("mine")

    model._register_state_dict_hook(fail)
    assert [name for name, _ in state_tensors(model)] == [name for name, _ in named_tensors(model)]
