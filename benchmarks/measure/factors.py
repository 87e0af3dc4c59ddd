"""The settings of a correction that `ablate` changes, one at a time, around paper mode and the default for outputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.measure.corrections import OUTPUT_MODE, corrections_of_logits
from benchmarks.measure.draws import FIT_SEED, Cell
from benchmarks.measure.paired_logits import ORIGINS, Source
from cat_plugin import CATConfig

ABLATED = ("cat_paper", OUTPUT_MODE)
Value = int | float | str


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One setting: how it is called on an axis, its values, all of one type, and the axis' scale.

    `change` gives the cell that has another value of it; None where that is not to be had.
    """

    label: str
    values: tuple[Value, ...]
    change: Callable[[Cell, Any], Cell | None]
    scale: str = "log"  # or "linear", or "names" for values side by side
    least: float = 1
    most: float = float("inf")

    @property
    def kind(self) -> type[Value]:
        return type(self.values[0])


@dataclass(frozen=True)
class Point:
    """A cell as one value of a factor; the same cell may stand for several."""

    factor: str
    value: Value
    cell: Cell


def _configured(field: str) -> Callable[[Cell, Any], Cell | None]:
    return lambda cell, value: _possible(replace(cell, config=replace(cell.config, **{field: value})))


def _sized(cell: Cell, images: int) -> Cell | None:
    return _possible(replace(cell, images=images))


def _from(cell: Cell, origin: str) -> Cell | None:
    """As many images either way: those that quantization was tuned on limit their number."""
    images = min(cell.images, cell.source.tuned)
    return _possible(replace(cell, images=images, origin=origin)) if images else None


def _possible(cell: Cell) -> Cell | None:
    """The paper's recipe refuses fewer images than clusters."""
    return None if cell.config.mode == "paper" and cell.images < cell.config.num_clusters else cell


FACTORS: dict[str, Factor] = {
    "clusters": Factor(
        label="clusters",
        values=(1, 4, 8, 16, 32, 64, 128, 256),
        change=_configured("num_clusters"),
    ),
    "alpha": Factor(
        label="alpha",
        values=tuple(tenths / 10 for tenths in range(1, 11)),
        change=_configured("alpha"),
        scale="linear",
        least=0,
        most=1,
    ),
    "pca-dim": Factor(label="PCA dimension", values=(2, 5, 10, 25, 50, 100), change=_configured("pca_dim")),
    "images": Factor(label="images for the correction", values=(64, 128, 256, 512, 1024, 2048, 4096), change=_sized),
    "origin": Factor(
        label="images for the correction: fresh, or those of the quantization",
        values=ORIGINS,
        change=_from,
        scale="names",
    ),
    "seed": Factor(
        label="seed of clustering and folds",
        values=(0, 1, 2, 3, 4),
        change=_configured("seed"),
        scale="names",
        least=0,
        most=2**32 - 1,
    ),
}


def centre(n_cat: int) -> dict[str, CATConfig]:
    """What is changed: paper mode and the default for the output."""
    return {mode: config for mode, config in corrections_of_logits(n_cat, FIT_SEED).items() if mode in ABLATED}


def points(
    sources: Sequence[Source], factors: Mapping[str, Sequence[Value]], n_cat: int, max_draws: int
) -> list[Point]:
    """All values of all factors, source by source, on up to `max_draws` disjoint draws of `n_cat` images.

    Test images and labels play no part in what is fitted, and no value is chosen by them: all are shown.
    """
    return [
        Point(factor, value, replace(cell, draw=draw))
        for source in sources
        for factor, values in factors.items()
        for value in values
        for mode, config in centre(n_cat).items()
        if (cell := FACTORS[factor].change(Cell(source, n_cat, 0, mode, config), value)) is not None
        for draw in range(source.draws(cell.images, max_draws, cell.origin))
    ]


def unique_cells(found: Sequence[Point]) -> list[Cell]:
    """The cells to measure, each once."""
    return list({point.cell.name: point.cell for point in found}.values())
