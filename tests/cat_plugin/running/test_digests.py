import hashlib

import pytest
import torch
from torch import nn

from cat_plugin.running.digests import image_digests, known_calibration, state_digests, tensor_digest
from tests.cat_plugin.helpers import Wrapped


def test_digest_sees_name_dtype_shape_and_bytes():
    def digest(tensor, name="a"):
        module = nn.Module()
        module.register_buffer(name, tensor, persistent=False)
        return state_digests(module)

    base = digest(torch.zeros(2, 3))
    assert digest(torch.zeros(2, 3)) == base
    different = [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32), torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])]
    assert all(digest(tensor) != base for tensor in different)
    assert digest(torch.zeros(2, 3), "b") != base
    for tensor in (torch.tensor(1.0), torch.tensor(True), torch.zeros(0), torch.zeros(2, dtype=torch.bfloat16)):
        assert digest(tensor) == digest(tensor.clone())


def test_digest_leaves_tensors_resizable():
    model = nn.BatchNorm1d(3)
    state_digests(model)
    model.running_mean.resize_(5)


def test_digest_is_of_the_plain_tensors_inside_and_of_values_whatever_their_memory():
    codes, scale = torch.arange(6, dtype=torch.int8).reshape(2, 3), torch.ones(2)
    base = tensor_digest(Wrapped(codes, scale))
    assert base == tensor_digest(Wrapped(codes.clone(), scale.clone()))
    assert base not in (tensor_digest(Wrapped(codes + 1, scale)), tensor_digest(Wrapped(codes, scale + 1)))
    expected = hashlib.sha256(b"torch.int8 (3, 2)" + codes.T.contiguous().numpy().tobytes()).hexdigest()
    assert tensor_digest(codes.T) == expected
    assert tensor_digest(nn.Parameter(torch.ones(3))) == tensor_digest(torch.ones(3))


def test_images_are_told_by_their_values_alone():
    images = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    images[4] = images[1]
    found = image_digests(images)
    assert found == [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in images]
    assert len(set(found)) == 4
    assert image_digests(images.double()) == found
    assert image_digests(images.flip(0).transpose(1, 2).contiguous().transpose(1, 2)) == found[::-1]
    assert image_digests(images[:0]) == []


@pytest.mark.parametrize(
    "given", [{"a", "b"}, frozenset({"a"}), set(), ["a"], None], ids=["two", "frozen", "none", "list", "unknown"]
)
def test_calibration_is_known_where_the_model_tells(given):
    model = nn.Identity()
    assert known_calibration(model) is None
    model.calibration_digests = given
    assert known_calibration(model) == (frozenset(given) if isinstance(given, set | frozenset) and given else None)
