import pytest
import torch
from torch import nn

from cat_plugin import CATError, ChannelAffine
from tests.cat_plugin.helpers import copied

SHAPES = {"logits": ((4, 3), -1), "sequence": ((4, 7, 3), -1), "signal": ((4, 3, 7), -2), "map": ((4, 3, 5, 6), -3)}


def change(channels=3, axis=-1):
    generator = torch.Generator().manual_seed(0)
    return ChannelAffine(torch.rand(channels, generator=generator), torch.rand(channels, generator=generator), axis)


@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_every_channel_has_its_own_scale_and_offset(shape, axis):
    x, correction = torch.randn(shape), change(axis=axis)
    out = correction(x)
    for channel in range(3):
        expected = x.select(axis, channel) * correction.scale[channel] + correction.shift[channel]
        assert torch.equal(out.select(axis, channel), expected)


def test_by_hand():
    correction = ChannelAffine(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]), -1)
    assert correction(torch.tensor([[1.0, 1.0], [0.0, 2.0]])).tolist() == [[2.5, 2.0], [0.5, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_types_of_inputs(dtype):
    """Computed in float32 at least and rounded once at the end."""
    x, correction = torch.randn(50, 3).to(dtype), change()
    wide = torch.promote_types(dtype, torch.float32)
    expected = (x.to(wide) * correction.scale.to(wide) + correction.shift.to(wide)).to(dtype)
    assert correction(x).dtype == dtype
    assert torch.equal(correction(x), expected)


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 2), -1), ((4, 3, 2), -1), ((4, 2, 3), -2), ((3,), -2), ((), -1)], ids=str
)
def test_other_channels_are_an_error(shape, axis):
    message = rf"got an output of shape \({', '.join(map(str, shape))},?\); this correction takes 3 channels along axis"
    with pytest.raises(CATError, match=message):
        change(axis=axis)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("scale", "shift", "axis"),
    [((3,), (2,), -1), ((3, 1), (3, 1), -1), ((), (), -1), ((0,), (0,), -1), ((3,), (3,), 0), ((3,), (3,), 1)],
    ids=str,
)
def test_buffers_of_other_shapes_are_an_error(scale, shift, axis):
    with pytest.raises(CATError, match=r"expected \(C,\) twice and an axis counted from the last one"):
        ChannelAffine(torch.ones(scale), torch.ones(shift), axis)


def test_half_of_a_model_does_not_round_the_buffers():
    model = nn.Sequential(nn.Linear(2, 3), change()).half()
    assert model[0].weight.dtype == torch.float16
    assert torch.equal(model[1].scale, change().scale)
    assert list(model[1].parameters()) == [] and set(model[1].state_dict()) == {"scale", "shift"}


def test_made_in_inference_mode_it_takes_part_in_gradients():
    with torch.inference_mode():
        correction = ChannelAffine(torch.full((3,), 2.0), torch.zeros(3), -1).double()
    x = torch.ones(1, 3, requires_grad=True)
    correction(x).sum().backward()
    assert x.grad.tolist() == [[2.0, 2.0, 2.0]]


def test_what_it_costs_and_that_it_can_be_pickled():
    correction = change(7, -3)
    assert (correction.num_parameters, correction.num_bytes) == (14, 56)
    loaded = copied(correction, "save")
    x = torch.randn(2, 7, 3, 3)
    assert torch.equal(loaded(x), correction(x)) and repr(loaded) == "ChannelAffine(channels=7, axis=-3)"


def test_its_tensors_are_not_those_that_were_given():
    scale = torch.ones(3, requires_grad=True)
    assert not ChannelAffine(scale, torch.zeros(3), -1).scale.requires_grad


def test_sequences_of_several_lengths():
    """As transformers hand them on where there is padding."""
    correction, parts = ChannelAffine(torch.rand(4), torch.randn(4), -1), [torch.randn(n, 4) for n in (5, 2)]
    out = correction(torch.nested.as_nested_tensor(parts))
    assert out.is_nested
    for part, corrected in zip(parts, out.unbind(), strict=True):
        torch.testing.assert_close(corrected, correction(part))
