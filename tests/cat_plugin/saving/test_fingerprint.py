import copy

import pytest
import torch
from torch import nn

from cat_plugin import CATWrapper, ClusterAffine
from cat_plugin.saving.fingerprint import Fingerprint
from tests.cat_plugin.helpers import SmallNet, Wrapped


def test_equal_models_and_none_for_no_difference():
    model = SmallNet()
    one, two = Fingerprint.of(model), Fingerprint.of(copy.deepcopy(model))
    assert one == two and one.difference(two) is None
    assert (one.tensors, one.numbers) == (9, 6 * 16 + 16 + 16 * 10 + 10 + 4 * 16 + 1)


def test_modes_hooks_and_memory_layout_do_not_matter():
    model = SmallNet()
    before = Fingerprint.of(model)
    CATWrapper(model.eval().requires_grad_(False), ClusterAffine.identity(10))
    assert Fingerprint.of(model) == before
    conv = nn.Conv2d(3, 4, 3)
    assert Fingerprint.of(conv) == Fingerprint.of(copy.deepcopy(conv).to(memory_format=torch.channels_last))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_does_not_matter():
    assert Fingerprint.of(SmallNet()) == Fingerprint.of(SmallNet().cuda())


def test_one_number_of_a_buffer_that_is_not_saved_matters():
    model = nn.Linear(2, 2)
    model.register_buffer("ranges", torch.zeros(3), persistent=False)
    before = Fingerprint.of(model)
    model.ranges[1] = 1e-6
    assert before.difference(Fingerprint.of(model)) == "its weights or buffers have other values"


def test_order_of_registration_does_not_matter():
    first, second = nn.ModuleDict(), nn.ModuleDict()
    a, b = nn.Linear(2, 3), nn.Linear(3, 2)
    first["a"], first["b"] = a, b
    second["b"], second["a"] = b, a
    assert Fingerprint.of(first) == Fingerprint.of(second)


def test_packed_int8_weights():
    """They are neither parameters nor buffers."""

    class Packed(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[prefix + "packed"] = (torch.quantize_per_tensor(self.kept, self.step, 0, torch.qint8), None)
            destination[prefix + "dtype"] = torch.qint8

    def packed(kept, step=0.1):
        model = Packed(2, 2)
        model._parameters.clear()
        model.kept, model.step = kept, step
        return Fingerprint.of(model)

    base = packed(torch.ones(2, 2))
    assert base.tensors == 1 and base == packed(torch.ones(2, 2))
    assert base.difference(packed(torch.zeros(2, 2)))
    assert base.difference(packed(torch.full((2, 2), 2.0), step=0.2))  # the same integers on another grid
    assert base.difference(packed(torch.ones(2, 3)))


def test_tensor_subclass_is_read_inside():
    def wrapped(codes, scale=1.0):
        model = nn.Module()
        model.weight = nn.Parameter(Wrapped(codes, torch.tensor(scale)), requires_grad=False)
        return Fingerprint.of(model)

    codes = torch.arange(6, dtype=torch.int8).reshape(2, 3)
    base = wrapped(codes)
    assert base == wrapped(codes.clone()) and base.numbers == 7
    assert base.difference(wrapped(codes + 1)) and base.difference(wrapped(codes, 0.5))
    assert "other names, shapes or types" in base.difference(wrapped(codes.short()))


def test_tensors_that_cannot_be_read_count_by_shape():
    def sparse(size):
        model = nn.Module()
        model.register_buffer("mask", torch.eye(size).to_sparse())
        return Fingerprint.of(model)

    assert sparse(3) == sparse(3)
    assert sparse(3).difference(sparse(4))


def test_failing_state_dict_hook_does_not_matter():
    model = SmallNet()
    before = Fingerprint.of(model)

    def fail(*args):
        raise RuntimeError("mine")

    model._register_state_dict_hook(fail)
    assert Fingerprint.of(model) == before
