"""How networks are quantized: the cells of a grid, and what all of them share."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks.wording import bits_name


@dataclass(frozen=True)
class Setting:
    """One cell of the grid."""

    method: str
    w_bits: int
    a_bits: int
    seed: int

    @property
    def name(self) -> str:
        """Readable, unique in a run, and fit for a file name."""
        return f"{self.method}-w{self.w_bits}a{self.a_bits}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What all cells of a run share.

    `iters` and `batch_size` are those of the reconstruction, `n_calib` the training images that quantization
    sees and `n_cat` the fresh ones that corrections are fitted on; `device` is where the networks run.
    """

    iters: int
    n_calib: int
    n_cat: int
    batch_size: int = 32
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class LowBitNetwork:
    """Which network, and how it is quantized: the first columns of tables."""

    dataset: str
    model: str
    method: str
    w_bits: int
    a_bits: int

    @property
    def setting(self) -> tuple[str, int, int]:
        """What lines of one network over seeds share."""
        return self.method, self.w_bits, self.a_bits

    @property
    def title(self) -> str:
        """Method and bits."""
        return f"{self.method} {bits_name(self.w_bits, self.a_bits)}"


def quantization_options(setting: Setting, protocol: Protocol) -> dict[str, Any]:
    """What `baselines.quantize` is asked for."""
    return {**vars(setting), "iters": protocol.iters, "batch_size": protocol.batch_size}


def settings_grid(methods: Iterable[str], bits: Iterable[tuple[int, int]], seeds: Iterable[int]) -> list[Setting]:
    """Every method, bit setting and seed."""
    return [Setting(method, *widths, seed) for method, widths, seed in product(methods, bits, seeds)]
