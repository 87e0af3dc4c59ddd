import itertools

import pytest
import torch

from baselines.quantization import range_search
from baselines.quantization.range_search import NORM, activation_range, weight_range


def error_of(x, scale, zero_point, bits):
    """Naive: one value at a time."""
    total = 0.0
    for value in x.flatten().tolist():
        integer = min(max(round(value / scale) + zero_point, 0), 2**bits - 1)
        total += abs((integer - zero_point) * scale - value) ** NORM
    return total


def grid_error(x, scale, zero_point, levels):
    integers = torch.clamp((x / scale).round() + zero_point, 0, levels)
    return ((integers - zero_point) * scale - x).abs().pow(NORM).sum().item()


def test_minmax_range_is_the_closed_form():
    weight = torch.tensor([[-1.0, 0.5, 2.0], [0.3, 0.6, 0.9]])
    scale, zero_point = weight_range(weight, 2, "minmax")
    torch.testing.assert_close(scale, torch.tensor([1.0, 0.3]))  # the second row is widened to hold zero
    assert zero_point.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_search_is_never_worse_than_minmax_in_any_channel(bits):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(bits)) ** 3
    searched, simple = weight_range(weight, bits, "mse"), weight_range(weight, bits, "minmax")
    for row in range(6):
        mine = error_of(weight[row], searched[0][row].item(), searched[1][row].item(), bits)
        theirs = error_of(weight[row], simple[0][row].item(), simple[1][row].item(), bits)
        assert mine <= theirs * (1 + 1e-4)


def test_search_comes_close_to_an_exhaustive_one():
    row = torch.randn(60, generator=torch.Generator().manual_seed(3))
    low, high = row.min().item(), row.max().item()
    best = float("inf")
    for a, b in itertools.product(torch.linspace(0.1, 1, 60).tolist(), repeat=2):
        scale = (high * b - low * a) / 3
        best = min(best, error_of(row, scale, min(max(round(-low * a / scale), 0), 3), 2))
    scale, zero_point = weight_range(row.unsqueeze(0), 2)
    assert error_of(row, scale.item(), zero_point.item(), 2) <= 1.05 * best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_finds_the_best_of_the_authors_candidates(bits):
    """A hundred widths times every zero point, one after the other, as the QDrop authors' observer tries them."""
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(bits)) ** 3
    levels = 2**bits - 1
    scale, zero_point = weight_range(weight, bits)
    for row in range(8):
        width = (weight[row].max() - weight[row].min()).item()
        candidates = itertools.product([width * i / 100 / levels for i in range(1, 101)], range(levels + 1))
        best = min(grid_error(weight[row], s, z, levels) for s, z in candidates)
        assert grid_error(weight[row], scale[row], zero_point[row], levels) <= 1.01 * best


@pytest.mark.parametrize(("sign", "zero_point"), [(1, 0), (-1, 3)])
def test_one_sided_data_uses_the_whole_grid(sign, zero_point):
    values = sign * torch.rand(500, generator=torch.Generator().manual_seed(0))
    scale, found = activation_range(values, 2)
    assert found.item() == zero_point
    assert 0.15 < scale.item() < 0.34


def test_histogram_gives_the_range_of_the_values_themselves():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)).relu()
    scale, _ = activation_range(values, 4)
    repeated, _ = activation_range(values.repeat(5), 4)  # 10,000 values: through a histogram
    assert abs(repeated / scale - 1) < 0.03


def test_scaling_the_data_scales_the_range():
    values = torch.randn(300, generator=torch.Generator().manual_seed(0))
    scale, zero_point = activation_range(values, 3)
    scaled, same = activation_range(values * 8, 3)
    torch.testing.assert_close(scaled, scale * 8)
    assert same == zero_point


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_all_zero_channel_has_a_usable_scale(method):
    scale, zero_point = weight_range(torch.zeros(2, 5), 4, method)
    assert scale.tolist() == [1.0, 1.0]
    assert zero_point.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("values", ["normal", "few large", "one-sided", "many equal"])
def test_candidates_that_are_left_out_change_no_range(bits, values, monkeypatch):
    """Long rows are judged by their largest values first: every candidate of theirs gives the same."""
    rows = torch.randn(12, 400, generator=torch.Generator().manual_seed(bits))
    rows = {"normal": rows, "few large": rows**5, "one-sided": rows.abs(), "many equal": rows.round()}[values]
    found = weight_range(rows, bits)
    monkeypatch.setattr(range_search, "_FEWEST_FAR", rows.shape[1])
    monkeypatch.setattr(range_search, "_errors_of_near", None)
    for mine, all_tried in zip(found, weight_range(rows, bits), strict=True):
        assert torch.equal(mine, all_tried)


def test_few_candidates_of_long_rows_are_tried_on_all_values(monkeypatch):
    tried, real = [], range_search._error

    def counted(rows, counts, scale, zero_point, levels):
        tried.append(rows.shape[-1] * scale.numel())
        return real(rows, counts, scale, zero_point, levels)

    monkeypatch.setattr(range_search, "_error", counted)
    weight_range(torch.randn(8, 1024, generator=torch.Generator().manual_seed(0)), 4)
    assert sum(tried) < 0.4 * 8 * 1024 * (25 * 16 + 7 * 3)
