"""One draw: fit a correction on a block of images of one source, and score it on all its test images."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from benchmarks.measure.accuracy import top1
from benchmarks.measure.corrections import EARLIER_NAMES, corrections_of_logits
from benchmarks.measure.intervals import paired_figures
from benchmarks.measure.paired_logits import FRESH, CorrectableLayers, PairedLogits, Source
from benchmarks.networks.layer_fits import Variation
from benchmarks.runs.files import digest_text
from benchmarks.runs.row_files import Record, change
from cat_plugin import CATConfig

FIT_SEED = 0
CORRECTED = "corrected"


@dataclass(frozen=True)
class Cell:
    """One fit: what, and on number `draw` of the disjoint draws of `images` images each.

    `mode` is the kind of correction and `origin` says which images: `"fresh"`, or those that quantization was
    `"tuned"` on. `variation` is of layers, None where the output alone is corrected.
    """

    source: Source
    images: int
    draw: int
    mode: str
    config: CATConfig
    origin: str = FRESH
    variation: Variation | None = None

    @property
    def name(self) -> str:
        """Readable, and says on which logits a stored row was measured, and what was fitted."""
        config = digest_text(repr(self.config), *([repr(self.variation)] if self.variation else []))[:8]
        images = f"{self.origin}{self.images}-draw{self.draw}"
        return f"{self.source.name}-{self.source.digest[:8]}-{images}-{self.mode}-{config}"

    @property
    def rows(self) -> slice:
        """Which of the source's images the draw consists of."""
        return slice(self.draw * self.images, (self.draw + 1) * self.images)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A line of `results.csv`: top-1 in percent, and the gain over the low-bit model in percentage points.

    `ci_low` to `ci_high` is the gain's 95 % paired bootstrap interval over test images, `p_value` that of
    McNemar's exact test; `won` and `lost` count the test images that became right and wrong.
    """

    source: str
    images: int
    draw: int
    mode: str
    n_eval: int
    fp_top1: float
    lq_top1: float
    top1: float
    gain: float
    ci_low: float
    ci_high: float
    p_value: float
    won: int
    lost: int


class Draw(Record[Gain]):
    """A gain with the predictions of the networks `fp`, `lq` and `corrected`."""

    row_type: ClassVar[type] = Gain

    @staticmethod
    def figures(predictions: dict[str, Tensor]) -> dict[str, Any]:
        """All but the description of the cell."""
        labels = predictions["labels"]
        difference = change(predictions, CORRECTED)
        return {
            "n_eval": len(labels),
            "fp_top1": top1(predictions["fp"], labels),
            "lq_top1": top1(predictions["lq"], labels),
            "top1": top1(predictions[CORRECTED], labels),
            "gain": round(100 * difference.mean().item(), 4),
            **paired_figures(difference),
        }

    @classmethod
    def of_earlier(
        cls, values: dict[str, Any], predictions: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """With the mode's name of today."""
        return values | {"mode": EARLIER_NAMES.get(values["mode"], values["mode"])}, predictions


def cells(sources: Sequence[Source], images: Sequence[int], max_draws: int) -> list[Cell]:
    """The whole grid, source by source; the paper's correction only where images are enough for its clusters."""
    return [
        Cell(source, number, draw, mode, config)
        for source in sources
        for number in images
        for draw in range(source.draws(number, max_draws))
        for mode, config in corrections_of_logits(number, FIT_SEED).items()
    ]


def measure(cell: Cell, pairs: PairedLogits, networks: Callable[[], CorrectableLayers] | None = None) -> Draw:
    """Fit on the draw's images alone and score on the test images.

    `networks` gives those of the cell's source, which makes them anew by default; they are needed for layers only.

    Raises:
        BenchmarkError: a test image is among the draw's.
    """
    started = time.perf_counter()
    if cell.variation is None:
        corrected = pairs.fit(cell.config, cell.rows, cell.origin)(pairs.test_q)
    else:
        corrected = (networks or cell.source.networks)().corrected(cell.config, cell.rows, cell.variation)
    predictions = pairs.score({CORRECTED: corrected})
    described = {"source": cell.source.name, "images": cell.images, "draw": cell.draw, "mode": cell.mode}
    return Draw(Gain(**described, **Draw.figures(predictions)), predictions, time.perf_counter() - started)
