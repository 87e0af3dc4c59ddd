import pytest
import torch

from baselines.quantization.operations import coin_flips, inner_product


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_coin_flips_are_fair_and_seeded(probability):
    def flip():
        generator = torch.Generator().manual_seed(5)
        return coin_flips(torch.empty(101, 203), probability, generator)

    flips = flip()
    assert set(flips.unique().tolist()) <= {0.0, 1.0}
    assert abs(flips.mean().item() - probability) < 0.015
    assert torch.equal(flips, flip())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_coin_flips_lie_in_memory_as_what_they_are_for(layout):
    x = torch.empty(2, 3, 4, 5).to(memory_format=layout)
    assert coin_flips(x, 0.5, None).stride() == x.stride()


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
