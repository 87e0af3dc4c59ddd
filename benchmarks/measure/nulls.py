"""Cases where no correction can gain anything, and whether the default accepts one all the same.

The low-bit model's logits are what the full-precision model's are on average, and these deviate at random: nothing in
`q` tells how.
"""

import abc
import copy
import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure.accuracy import top1
from benchmarks.measure.draws import CORRECTED
from benchmarks.measure.leak_guard import LeakGuard, fit_networks_guarded, fit_positions_guarded, position_rows
from benchmarks.runs.files import digest_text
from benchmarks.runs.row_files import LABELS, Record, change
from cat_plugin import CATConfig

FRESH_IMAGES = 3000
FRESH_POSITIONS = 4
"""Of a fresh image, at most."""
WINNER = 3.0
NUMBERS, WIDTH, LEVELS = 16, 32, 7
"""What a low-bit network sees of an image, the channels of its hidden layers, and the steps of their outputs."""
SPREAD, DEVIATION = (1.5, 0.3), (1.0, 0.2)
"""Standard deviations of the low-bit logits and of what the full-precision ones differ by: one value an image, and one
more a position."""


class Levels(NamedTuple):
    """Which levels are corrected."""

    output: bool
    layers: bool = False


@dataclass(frozen=True, kw_only=True)
class NullCase(abc.ABC):
    """Outputs of so many classes where nothing can be gained, and the numbers of images that are fitted on."""

    name: str
    images: tuple[int, ...]
    classes: int = 10

    @abc.abstractmethod
    def fit(self, images: int, seed: int, generator: torch.Generator) -> tuple[Levels, dict[str, Tensor]]:
        """What the default corrects on so many images, and `(M, classes)` logits of fresh ones: those of FP as
        `"labels"`, of the low-bit model as `"lq"`, and corrected."""


@dataclass(frozen=True, kw_only=True)
class LogitsCase(NullCase):
    """Pairs of logits; one position stands for outputs that have none."""

    positions: int = 1

    def fit(self, images: int, seed: int, generator: torch.Generator) -> tuple[Levels, dict[str, Tensor]]:
        """By the default for outputs."""
        q, f = self.draw(images, self.positions, generator)
        fresh = self.draw(FRESH_IMAGES, min(self.positions, FRESH_POSITIONS), generator)
        fresh_q, fresh_f = (logits.flatten(0, 1) for logits in fresh)
        fit = fit_positions_guarded(q, f, CATConfig(layers="none", seed=seed), LeakGuard(position_rows(*fresh)))
        logits = {LABELS: fresh_f, "lq": fresh_q, CORRECTED: fit.correction(fresh_q)}
        return Levels(output=fit.evidence.accepted), logits

    def draw(self, images: int, positions: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Logits `q` and `f`, both `(images, positions, classes)` float32, of the low-bit and the FP model."""
        winners = torch.randint(self.classes, (images, 1, 1), generator=generator).expand(-1, positions, 1)
        q = self._noise(images, positions, SPREAD, generator)
        q.scatter_add_(2, winners, torch.full((images, positions, 1), WINNER))
        return q, q + self._noise(images, positions, DEVIATION, generator)

    def _noise(
        self, images: int, positions: int, deviations: tuple[float, float], generator: torch.Generator
    ) -> Tensor:
        shared, own = deviations
        alike = torch.randn(images, 1, self.classes, generator=generator)
        return shared * alike + own * torch.randn(images, positions, self.classes, generator=generator)


@dataclass(frozen=True, kw_only=True)
class NetworkCase(NullCase):
    """Networks, whose layers may be corrected, too: the full-precision one is the low-bit one, and adds to its logits
    what the low-bit one does not see of an image, numbers with a standard deviation of `deviation`."""

    deviation: float

    def fit(self, images: int, seed: int, generator: torch.Generator) -> tuple[Levels, dict[str, Tensor]]:
        """By the default for networks."""
        low_bit = LowBit(self.classes, generator)
        full_precision = Deviating(low_bit, self.classes, self.deviation)
        given, fresh = (torch.randn(n, NUMBERS + self.classes, generator=generator) for n in (images, FRESH_IMAGES))
        with torch.no_grad():
            logits = {LABELS: full_precision(fresh), "lq": low_bit(fresh)}
            cat_model = fit_networks_guarded(low_bit, full_precision, given, CATConfig(seed=seed), LeakGuard(fresh))
            logits[CORRECTED] = low_bit(fresh)
        report = cat_model.report
        return Levels(output=report.evidence.accepted, layers=report.layers.accepted), logits


class LowBit(nn.Module):
    """Three linear layers with random weights and few steps of hidden outputs: images `(N, NUMBERS + ...)`, of which
    it sees the first numbers, to logits `(N, classes)`."""

    def __init__(self, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = NUMBERS, WIDTH, WIDTH, classes
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, *each) for each in itertools.pairwise(sizes))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.normal_(std=math.sqrt(2 / layer.in_features), generator=generator)
                layer.bias.zero_()
            probe = self(torch.randn(FRESH_IMAGES, NUMBERS, generator=generator))
            self.layers[-1].weight.mul_(WINNER / probe.std())

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = x[:, :NUMBERS]
        for layer in self.layers[:-1]:
            x = (2 * layer(x)).round().clamp(0, LEVELS) / 2
        return self.layers[-1](x)


class Deviating(nn.Module):
    """A copy of a network, to whose logits it adds `deviation` times the last `classes` numbers of an image."""

    def __init__(self, network: nn.Module, classes: int, deviation: float) -> None:
        super().__init__()
        self.network, self.classes, self.deviation = copy.deepcopy(network), classes, deviation

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.network(x) + self.deviation * x[:, -self.classes :]


CASES = {
    case.name: case
    for case in (
        LogitsCase(name="positions", images=(25, 60, 200), positions=64),
        LogitsCase(name="plain", images=(256, 1024)),
        LogitsCase(name="plain-100", images=(256, 1024), classes=100),
        NetworkCase(name="layers", images=(64, 256, 1024), deviation=1.0),
        NetworkCase(name="layers-far", images=(64, 256, 1024), deviation=3.0),
    )
}
"""By name; `plain-100` has more classes."""


@dataclass(frozen=True)
class NullCell:
    """Fit number `draw` on `images` images of a case; `seed` is that of all draws."""

    case: NullCase
    images: int
    draw: int
    seed: int

    @property
    def name(self) -> str:
        """Readable, and says which logits are drawn."""
        return f"{self.case.name}-{self.images}-draw{self.draw}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class NullFit:
    """A line of `results.csv`: whether a correction was `accepted`, whether that is one of `layers`, too, and agreement
    with the FP model on fresh images.

    `n_eval` counts fresh images, or their positions where outputs have such. Agreements of the low-bit model alone and
    with the correction are in percent, and `change` is their difference in percentage points.
    """

    case: str
    images: int
    draw: int
    accepted: bool
    layers: bool = False
    n_eval: int
    lq_agreement: float
    agreement: float
    change: float


class NullDraw(Record[NullFit]):
    """A fit with the classes that `lq` and `corrected` predict; `labels` are those of the FP model."""

    row_type: ClassVar[type] = NullFit

    @staticmethod
    def figures(predictions: dict[str, Tensor]) -> dict[str, Any]:
        """Agreements and their change."""
        labels = predictions[LABELS]
        return {
            "n_eval": len(labels),
            "lq_agreement": top1(predictions["lq"], labels),
            "agreement": top1(predictions[CORRECTED], labels),
            "change": round(100 * change(predictions, CORRECTED).mean().item(), 4),
        }


def null_cells(cases: Iterable[NullCase], draws: int, seed: int) -> list[NullCell]:
    """`draws` fits of every case and number of images."""
    return [NullCell(case, images, draw, seed) for case in cases for images in case.images for draw in range(draws)]


def measure_null(cell: NullCell) -> NullDraw:
    """Fit the default on images or logits drawn anew, and compare classes with the FP model's on fresh ones."""
    started, case = time.perf_counter(), cell.case
    # Of the name: draws of other cases and sizes have nothing in common.
    generator = torch.Generator().manual_seed(int(digest_text(cell.name), 16))
    levels, networks = case.fit(cell.images, cell.draw, generator)
    predictions = {name: logits.argmax(1).to(torch.int16) for name, logits in networks.items()}
    described = {"case": case.name, "images": cell.images, "draw": cell.draw}
    row = NullFit(**described, accepted=any(levels), layers=levels.layers, **NullDraw.figures(predictions))
    return NullDraw(row, predictions, time.perf_counter() - started)
