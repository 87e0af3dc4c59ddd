"""What is measured for a cell of a grid: a row of figures, and the predicted classes that they are computed from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from baselines.files import atomic_path
from benchmarks import BenchmarkError
from benchmarks.runs.files import write_text
from cat_plugin.report.clusters import ClusterProfile
from cat_plugin.saving.plain import from_plain, to_plain

SECONDS, PROFILES, PARTS = "seconds", "profiles", "parts"  # stand beside the fields of a stored row
LABELS = "labels"

AnyRow = TypeVar("AnyRow")


def change(predictions: Mapping[str, Tensor], name: str) -> Tensor:
    """`(n_eval,)` float64: 1 for test images that the named network gets right and the low-bit one does not, -1 for the
    reverse, else 0."""
    after, before = (predictions[network] == predictions[LABELS] for network in (name, "lq"))
    return after.double() - before.double()


@dataclass(frozen=True, eq=False)
class Record(Generic[AnyRow]):
    """A row, a dataclass, and what its figures come from.

    `predictions` holds int16 tensors `(n_eval,)`: `labels`, and the classes that each network predicts (`fp`,
    `lq`, and one a correction); the ranks of the labels may be there, too. `seconds` is the time it took, 0 where that
    is unknown. `profiles` are what a correction did to the logits of the test images, where that is kept for a figure.
    `parts` are the seconds of single steps, by name, as far as they are known.
    """

    row: AnyRow
    predictions: dict[str, Tensor]
    seconds: float = 0.0
    profiles: tuple[ClusterProfile, ...] = ()
    parts: dict[str, float] = field(default_factory=dict)

    row_type: ClassVar[type]

    @staticmethod
    def figures(predictions: dict[str, Tensor]) -> dict[str, Any]:
        """The fields of a row that follow from its predictions."""
        raise NotImplementedError

    @classmethod
    def of_earlier(
        cls, values: dict[str, Any], predictions: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fields and predictions as they are called today, in case an earlier version has stored them."""
        return values, predictions

    def verify(self, name: str) -> None:
        """Refuse a row, called `name` in the message, whose figures are not those of its predictions.

        Raises:
            BenchmarkError: the message says which figures differ.
        """
        figures = self.figures(self.predictions)
        expected = {key: value for key, value in figures.items() if getattr(self.row, key) != value}
        if expected:
            found = "; ".join(f"{key} {getattr(self.row, key)} instead of {value}" for key, value in expected.items())
            raise BenchmarkError(f"the row {name} does not hold the figures of its predictions: {found}")

    def store(self, path: Path) -> None:
        """Write the row as JSON to `path`, last: where it is, the predictions are beside it, too."""
        with atomic_path(path.with_suffix(".safetensors")) as temporary:
            save_file(self.predictions, temporary)
        beside = {SECONDS: self.seconds} | ({PROFILES: to_plain(self.profiles)} if self.profiles else {})
        beside |= {PARTS: self.parts} if self.parts else {}
        write_text(path, json.dumps({**asdict(self.row), **beside}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Record[AnyRow]":
        """Inverse of `store`."""
        values = json.loads(path.read_text("utf-8"))
        seconds = values.pop(SECONDS, 0.0)
        profiles = from_plain(tuple[ClusterProfile, ...], values.pop(PROFILES, []), PROFILES)
        parts = {str(name): float(taken) for name, taken in values.pop(PARTS, {}).items()}
        values, predictions = cls.of_earlier(values, load_file(path.with_suffix(".safetensors")))
        return cls(cls.row_type(**values), predictions, seconds, profiles, parts)
