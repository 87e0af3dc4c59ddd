import pytest
import torch

from baselines.reconstruction.losses import inner_product, reconstruction_error


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
    ],
    ids=["contiguous", "channels-last", "transposed", "expanded"],
)
def test_inner_product_for_any_layouts(arrange):
    a, b = values(2, 3, 4, 4).double(), values(2, 3, 4, 4, seed=1).double()
    expected = sum(x * y for x, y in zip(arrange(a).flatten().tolist(), b.flatten().tolist(), strict=True))
    for other in (b, b.to(memory_format=torch.channels_last)):
        assert inner_product(arrange(a), other).item() == pytest.approx(expected)


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_gradient_of_the_error_equals_autograd_and_lies_as_the_output_does(norm, layout):
    output, target = (values(2, 3, 4, 4, seed=seed).to(memory_format=layout) for seed in (0, 1))
    output.requires_grad_()
    # through another operation, since the gradient of a leaf is laid out like the leaf anyway
    passed = output * 1
    passed.register_hook(lambda grad: strides.append(grad.stride()))
    strides = []
    error = reconstruction_error(passed, target, 1, norm)
    (mine,) = torch.autograd.grad(error, output)
    naive = (output - target).abs().pow(norm).sum(1).mean()
    torch.testing.assert_close(error, naive)
    torch.testing.assert_close(mine, torch.autograd.grad(naive, output)[0])
    assert strides == [output.stride()]
