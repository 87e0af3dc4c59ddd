"""The settings of a correction that `ablate` changes, one at a time: of the output's, around paper mode and the default
for outputs, and of the layers', around the default."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.measure.corrections import DEFAULT_MODE, OUTPUT_MODE, corrections, corrections_of_logits
from benchmarks.measure.draws import FIT_SEED, Cell
from benchmarks.measure.paired_logits import ORIGINS, Source
from benchmarks.networks.layer_fits import CLOSED_FORM, VIEWS, WHICH, Variation
from cat_plugin import CATConfig
from cat_plugin.layers.descent import RATES
from cat_plugin.layers.fit import Recipe

ABLATED = ("cat_paper", OUTPUT_MODE)
ALL = "chosen"
Value = int | float | str


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One setting: how it is called on an axis, its values, all of one type, and the axis' scale.

    `change` gives the cell that has another value of it; None where that is not to be had. One that is `of_layers` can
    be changed only where the networks are known, and takes a fit through them for every value.
    """

    label: str
    values: tuple[Value, ...]
    change: Callable[[Cell, Any], Cell | None]
    scale: str = "log"  # or "linear", or "names" for values side by side
    least: float = 1
    most: float = float("inf")
    of_layers: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        """What it is changed of."""
        return (DEFAULT_MODE,) if self.of_layers else ABLATED

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


def _recipe(**fields: Callable[[Any], Any]) -> Callable[[Cell, Any], Cell]:
    """Each field of the recipe from the value."""
    return lambda cell, value: _varied(cell, recipe=Recipe(**{name: made(value) for name, made in fields.items()}))


def _varied(cell: Cell, **fields: Any) -> Cell:
    return replace(cell, variation=replace(cell.variation, **fields))


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
    "layers-images": Factor(
        label="images for the layers",
        values=(64, 128, 256, 512, 1024, 2048, 4096),
        change=_sized,
        of_layers=True,
    ),
    "layers-rate": Factor(
        label="learning rate of the layers",
        values=(ALL, *RATES),
        change=_recipe(rates=lambda rate: tuple(RATES) if rate == ALL else (rate,)),
        scale="names",
        of_layers=True,
    ),
    "layers-epochs": Factor(
        label="epochs of the layers, times the default's",
        values=(0.25, 0.5, 1.0, 2.0),
        change=_recipe(steps=float),
        least=0.01,
        of_layers=True,
    ),
    "layers-which": Factor(
        label="which layers",
        values=WHICH,
        change=lambda cell, which: _varied(cell, which=which),
        scale="names",
        of_layers=True,
    ),
    "layers-parts": Factor(
        label="what is fitted of the layers",
        values=("both", "scales", "offsets"),
        change=_recipe(scales=lambda part: part != "offsets", offsets=lambda part: part != "scales"),
        scale="names",
        of_layers=True,
    ),
    "layers-views": Factor(
        label="views of the images for the layers",
        values=tuple(VIEWS),
        change=lambda cell, views: _varied(cell, views=views),
        scale="names",
        of_layers=True,
    ),
    "layers-way": Factor(
        label="how layers are fitted: all together, or one after another in closed form as in QwT-v2",
        values=("together", CLOSED_FORM),
        change=lambda cell, way: _varied(cell, closed_form=way == CLOSED_FORM),
        scale="names",
        of_layers=True,
    ),
}
OF_OUTPUT = tuple(name for name, factor in FACTORS.items() if not factor.of_layers)


def centre(n_cat: int, factor: Factor) -> dict[str, CATConfig]:
    """What is changed: paper mode and the default for the output, or the library's default."""
    configs = corrections(n_cat, FIT_SEED) if factor.of_layers else corrections_of_logits(n_cat, FIT_SEED)
    return {mode: config for mode, config in configs.items() if mode in factor.modes}


def points(
    sources: Sequence[Source], factors: Mapping[str, Sequence[Value]], n_cat: int, max_draws: int
) -> list[Point]:
    """All values of all factors, source by source, on up to `max_draws` disjoint draws of `n_cat` images.

    Test images and labels play no part in what is fitted, and no value is chosen by them: all are shown.
    """
    return [
        Point(name, value, replace(cell, draw=draw))
        for source in sources
        for name, values in factors.items()
        for value in values
        for mode, config in centre(n_cat, FACTORS[name]).items()
        if (cell := FACTORS[name].change(_cell(source, n_cat, mode, config), value)) is not None
        for draw in range(source.draws(cell.images, max_draws, cell.origin))
    ]


def _cell(source: Source, n_cat: int, mode: str, config: CATConfig) -> Cell:
    return Cell(source, n_cat, 0, mode, config, variation=Variation() if mode == DEFAULT_MODE else None)


def unique_cells(found: Sequence[Point]) -> list[Cell]:
    """The cells to measure, each once."""
    return list({point.cell.name: point.cell for point in found}.values())
