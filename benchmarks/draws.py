"""One draw: fit a correction on a block of fresh images of one source, and score it on all its test images."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.evaluate import PairedLogits, corrections, top1
from benchmarks.files import write_text
from cat_plugin import fit_cluster_affine
from cat_plugin.metrics import paired_statistics

MODES = ("plain_affine", "cat_paper", "cat")  # the names that `corrections` gives them
FIT_SEED = 0


@dataclass(frozen=True)
class Source:
    """A low-bit network beside its full-precision one: their logits, which ``load`` reads when they are needed.

    ``digest`` changes with any of the logits; ``fresh`` is the number of images to draw from.
    """

    name: str
    digest: str
    fresh: int
    load: Callable[[], PairedLogits]

    def draws(self, images: int, most: int) -> int:
        """How many disjoint draws of so many images there are, up to ``most``."""
        return min(most, self.fresh // images)


@dataclass(frozen=True)
class Cell:
    """One fit: number ``draw`` of the disjoint draws of ``images`` images each, and the kind of correction."""

    source: Source
    images: int
    draw: int
    mode: str

    @property
    def name(self) -> str:
        """Readable, and says on which logits a stored row was measured."""
        return f"{self.source.name}-{self.source.digest[:8]}-n{self.images}-draw{self.draw}-{self.mode}"

    @property
    def rows(self) -> slice:
        """Which of the source's fresh images the draw consists of."""
        return slice(self.draw * self.images, (self.draw + 1) * self.images)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A line of ``results.csv``: top-1 in percent, and the gain over the low-bit model in percentage points.

    ``ci_low`` to ``ci_high`` is the gain's 95 % paired bootstrap interval over test images, ``p_value`` that of
    McNemar's exact test; ``won`` and ``lost`` count the test images that became right and wrong.
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
    fit_seconds: float

    def store(self, path: Path) -> None:
        """Write the fields as JSON."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Gain":
        """Inverse of :meth:`store`."""
        return cls(**json.loads(path.read_text("utf-8")))


def cells(sources: Sequence[Source], images: Sequence[int], max_draws: int) -> list[Cell]:
    """The whole grid, source by source; the paper's correction only where images are enough for its clusters."""
    return [
        Cell(source, number, draw, mode)
        for source in sources
        for number in images
        for draw in range(source.draws(number, max_draws))
        for mode in MODES
        if mode in corrections(number, FIT_SEED)
    ]


def measure(cell: Cell, pairs: PairedLogits) -> Gain:
    """Fit on the draw's images alone and score on the test images."""
    config = corrections(cell.images, FIT_SEED)[cell.mode]
    started = time.perf_counter()
    correction = fit_cluster_affine(pairs.fit_q[cell.rows], pairs.fit_f[cell.rows], config)
    seconds = time.perf_counter() - started
    before, after = pairs.test_q.argmax(1), correction(pairs.test_q).argmax(1)
    paired = paired_statistics(before == pairs.labels, after == pairs.labels)
    return Gain(
        source=cell.source.name,
        images=cell.images,
        draw=cell.draw,
        mode=cell.mode,
        n_eval=paired.images,
        fp_top1=top1(pairs.test_f.argmax(1), pairs.labels),
        lq_top1=top1(before, pairs.labels),
        top1=top1(after, pairs.labels),
        gain=round(paired.delta, 4),
        ci_low=round(paired.ci_low, 4),
        ci_high=round(paired.ci_high, 4),
        p_value=float(f"{paired.p_value:.4g}"),
        won=paired.won,
        lost=paired.lost,
        fit_seconds=round(seconds, 3),
    )
