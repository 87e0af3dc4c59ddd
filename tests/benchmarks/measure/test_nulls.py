"""Where nothing can be gained nothing is, and where something can it is."""

from dataclasses import dataclass

import pytest
import torch

from benchmarks.measure import nulls
from benchmarks.measure.nulls import (
    CASES,
    NUMBERS,
    Deviating,
    LogitsCase,
    LowBit,
    NetworkCase,
    NullCell,
    measure_null,
    null_cells,
)


@dataclass(frozen=True, kw_only=True)
class GainCase(LogitsCase):
    """FP's logits of the first class are two more than the low-bit model's."""

    def draw(self, images, positions, generator):
        q, f = super().draw(images, positions, generator)
        f[..., 0] += 2
        return q, f


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_logits_vary_over_images_and_positions_as_documented():
    q, f = CASES["positions"].draw(4000, 8, generator())
    assert q.shape == f.shape == (4000, 8, 10) and q.dtype == f.dtype == torch.float32
    # 3 at one class of ten, the same at all positions, adds a mean of 0.3 and a variance of 9 * 0.1 * 0.9.
    for logits, mean, between, within in ((f - q, 0.0, 1.0**2, 0.2**2), (q, 0.3, 1.5**2 + 0.81, 0.3**2)):
        assert logits.mean() == pytest.approx(mean, abs=0.03)
        assert logits.var(1).mean() == pytest.approx(within, rel=0.03)
        assert logits.mean(1).var() == pytest.approx(between + within / 8, rel=0.05)


def test_nothing_in_the_low_bit_logits_tells_how_the_full_precision_ones_differ():
    q, f = CASES["plain"].draw(20_000, 1, generator())
    q, difference = q[:, 0].double(), (f - q)[:, 0].double()
    design = torch.cat([q, q.pow(2), torch.ones(len(q), 1)], 1)
    fitted = design @ torch.linalg.lstsq(design, difference).solution
    assert fitted.pow(2).mean() < 2 * design.shape[1] / len(q)


def test_sizes_are_those_that_the_page_promises():
    logits = [case for case in CASES.values() if isinstance(case, LogitsCase)]
    assert {case.name: (case.images, case.positions, case.classes) for case in logits} == {
        "positions": ((25, 60, 200), 64, 10),
        "plain": ((256, 1024), 1, 10),
        "plain-100": ((256, 1024), 1, 100),
    }
    networks = [case for case in CASES.values() if isinstance(case, NetworkCase)]
    assert {case.name: (case.images, case.deviation, case.classes) for case in networks} == {
        "layers": ((64, 256, 1024), 1.0, 10),
        "layers-far": ((64, 256, 1024), 3.0, 10),
    }


def test_every_draw_has_a_name_and_logits_of_its_own():
    cells = [*null_cells(CASES.values(), 3, 0), *null_cells(CASES.values(), 3, 1)]
    assert len({cell.name for cell in cells}) == len(cells) == 2 * 3 * 13


def test_what_networks_differ_by_is_nothing_that_the_low_bit_one_sees():
    low_bit = LowBit(5, generator())
    full_precision = Deviating(low_bit, 5, 1.5)
    x = torch.randn(20_000, NUMBERS + 5, generator=generator(1))
    with torch.no_grad():
        q, f = low_bit(x), full_precision(x)
        assert torch.equal(low_bit(x * (torch.arange(NUMBERS + 5) < NUMBERS)), q)
    assert (f - q).std() == pytest.approx(1.5, rel=0.02) and q.std() == pytest.approx(3, rel=0.1)
    both = torch.cat([x[:, :NUMBERS], q, f - q], 1).T.corrcoef()
    assert both[:-5, -5:].abs().max() < 0.04


def test_layers_are_corrected_where_that_gains_and_not_where_it_cannot(monkeypatch):
    cell = NullCell(NetworkCase(name="null", images=(256,), classes=4, deviation=1.0), 256, 0, 0)
    null = measure_null(cell)

    class Shifted(Deviating):
        """Adds to a hidden layer instead."""

        def forward(self, x):
            self.network.layers[0].bias.data.fill_(1.0)
            return self.network(x)

    monkeypatch.setattr(nulls, "Deviating", Shifted)
    gain = measure_null(cell)
    assert (gain.row.layers, gain.row.accepted, null.row.layers, null.row.accepted) == (True, True, False, False)
    assert gain.row.change > 5 and null.row.change == 0 and null.row.n_eval == 3000
    assert torch.equal(null.predictions["lq"], null.predictions["corrected"])


@pytest.mark.parametrize(("positions", "expected"), [(1, 3000), (2, 6000), (6, 12_000)])
def test_planted_gain_is_accepted_and_a_null_is_not(positions, expected):
    sizes = {"images": (100,), "positions": positions, "classes": 4}
    gain = measure_null(NullCell(GainCase(name="gain", **sizes), 100, 0, 0))
    null = measure_null(NullCell(LogitsCase(name="null", **sizes), 100, 0, 0))
    assert (gain.row.accepted, null.row.accepted) == (True, False)
    assert gain.row.change > 5 and null.row.change == 0
    assert gain.row.n_eval == null.row.n_eval == expected
    gain.verify("gain")
    assert torch.equal(null.predictions["lq"], null.predictions["corrected"])


def test_figures_are_those_of_the_predictions():
    made = measure_null(NullCell(GainCase(name="gain", images=(60,)), 60, 0, 5))
    same = {name: (made.predictions[name] == made.predictions["labels"]) for name in ("lq", "corrected")}
    before, after = (100 * same[name].sum().item() / 3000 for name in ("lq", "corrected"))
    assert made.row.lq_agreement == pytest.approx(before, abs=1e-4)
    assert made.row.agreement == pytest.approx(after, abs=1e-4)
    assert made.row.change == pytest.approx(after - before, abs=1e-4)


def test_draw_is_the_same_again_and_another_with_another_number_or_seed():
    case = LogitsCase(name="null", images=(20,), classes=3)

    def labels(draw, seed):
        return measure_null(NullCell(case, 20, draw, seed)).predictions["labels"]

    torch.manual_seed(1)
    first = labels(0, 0)
    torch.manual_seed(2)
    assert torch.equal(first, labels(0, 0))
    assert not torch.equal(first, labels(1, 0)) and not torch.equal(first, labels(0, 1))
