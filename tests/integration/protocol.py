"""What every toolkit's model goes through: correct, compare, bake, export, save, load, remove."""

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.datasets.calibration_split import split_calibration
from benchmarks.datasets.dataset import Dataset
from benchmarks.reports.tables import markdown_table
from benchmarks.runs.files import write_text
from cat_plugin import CATWrapper, apply_cat, compare_accuracy
from cat_plugin.correction.hook import find_hooks

from .converters import Convert, exported, onnx_runtime
from .networks import plain

N_CALIB, N_CAT, BATCH_SIZE = 256, 1024, 64
TOLERANCE = 1e-4  # of the logits of a baked, exported or converted model
# Share of the images that may differ by more after a conversion: other sums of floats round other values at a tie.
TIES = 0.02
HEADER = ("toolkit", "version", "bits", "network", "FP", "quantized", "+ CAT", "agreement with FP", "layers")
VERDICTS = ("hook", "bake", "torch.export", "ONNX Runtime")
NOTES = "Notes, on the toolkit's own model, without CAT:"


@dataclass(frozen=True)
class Task:
    """The digits, split as the benchmarks do: images for quantization, others for CAT, and test images."""

    digits: Dataset

    @property
    def calibration(self) -> list[Tensor]:
        """Batches for the toolkit."""
        return list(self.digits.train_images[self._split()[0]].split(BATCH_SIZE))

    @property
    def fresh(self) -> Tensor:
        """Images for CAT, (N_CAT, 1, 8, 8)."""
        return self.digits.train_images[self._split()[1]]

    @property
    def test(self) -> list[tuple[Tensor, Tensor]]:
        """Labelled batches, the last of them partial."""
        images, labels = self.digits.test_images, self.digits.test_labels
        return list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))

    def _split(self) -> tuple[Tensor, Tensor]:
        return split_calibration(len(self.digits.train_images), N_CALIB, N_CAT, seed=0)


@dataclass(frozen=True)
class Verdict:
    """Whether something works, and what is to be known about it."""

    works: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table; top-1 and agreement in percent of the test images; layers that are corrected, of those
    that gradients reach; one verdict for each of `VERDICTS`."""

    toolkit: str
    version: str
    bits: str
    network: str
    fp: float
    quantized: float
    corrected: float
    agreement: tuple[float, float]
    layers: str
    verdicts: tuple[Verdict, ...]


def check(
    quantized: nn.Module,
    fp: nn.Module,
    task: Task,
    *,
    toolkit: str,
    distribution: str,
    bits: str,
    gains: bool,
    converters: Sequence[Convert] = (exported, onnx_runtime),
    wrapper: Any = None,
) -> Row:
    """Asserts all that the plug-in promises for a toolkit's model.

    Args:
        toolkit, bits: as the table shows them; `distribution` is the name of the package that has the version.
        gains: whether quantization has lost enough that CAT must win some back; else it must leave the model alone.
        converters: to `torch.export` and to ONNX Runtime; the toolkit's own ways, where torch's cannot do it.
        wrapper: of `quantized`, and no module: what the user holds and gives to CAT.
    """
    before = outputs(quantized, task)
    cat_model = apply_cat(wrapper or quantized, fp, task.fresh)
    corrected = outputs(quantized, task)
    layers = cat_model.report.layers
    accuracy = compare_accuracy(fp, quantized, cat_model, task.test)
    agreement = agreement_with(fp, before, task), agreement_with(fp, corrected, task)
    baked = cat_model.bake()
    check_correction(before, corrected, gains, agreement)
    assert accuracy.cat_top1 >= accuracy.quantized_top1, f"accuracy falls: {accuracy}"

    assert cat_model.remove() is quantized
    assert_same(outputs(quantized, task), before)
    assert not find_hooks(quantized)
    assert_close(joined(outputs(baked, task)), joined(corrected))
    converted = [verdict(convert, baked, quantized, cat_model, task) for convert in converters]
    check_saved(cat_model, task, corrected)
    assert_same(outputs(quantized, task), before)
    return Row(
        toolkit=toolkit,
        version=metadata.version(distribution),
        bits=bits,
        network=type(fp).__name__,
        fp=accuracy.fp_top1,
        quantized=accuracy.quantized_top1,
        corrected=accuracy.cat_top1,
        agreement=agreement,
        layers=f"{len(cat_model.layers)} of {len(layers.layers)}",
        verdicts=(Verdict(True), Verdict(True), *converted),
    )


def check_saved(cat_model: CATWrapper, task: Task, corrected: list) -> None:
    """The correction, once taken off, comes back from a folder, for this very model."""
    with tempfile.TemporaryDirectory() as folder:
        cat_model.save_pretrained(folder)
        loaded = CATWrapper.from_pretrained(folder, cat_model.quantized_model)
    assert_same(outputs(loaded, task), corrected)
    loaded.remove()


def check_correction(before: list, corrected: list, gains: bool, agreement: tuple[float, float]) -> None:
    """The corrected outputs have the type of the plain ones, and differ from them exactly where there is a gain."""
    assert [type(output) for output in corrected] == [type(output) for output in before]
    if gains:
        assert agreement[1] > agreement[0], f"agreement with FP does not rise: {agreement}"
    else:
        assert_same(corrected, before)


@torch.no_grad()
def outputs(model: nn.Module, task: Task) -> list:
    """What the model returns for every test batch."""
    return [model(images) for images, _ in task.test]


def joined(batches: list) -> Tensor:
    """Logits (N, C) of all outputs."""
    return torch.cat([plain(output) for output in batches])


def assert_same(found: list, expected: list) -> None:
    """Same types, and the same logits bit for bit."""
    assert [type(output) for output in found] == [type(output) for output in expected]
    assert torch.equal(joined(found), joined(expected))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """The same logits to `tolerance`."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance(expected))


def tolerance(logits: Tensor) -> float:
    """`TOLERANCE`, of the largest logit where that is above 1."""
    return TOLERANCE * max(1.0, logits.abs().max().item())


@torch.no_grad()
def agreement_with(fp: nn.Module, batches: list, task: Task) -> float:
    """Percent of the test images for which the outputs name FP's class."""
    return 100 * (joined(batches).argmax(1) == joined(outputs(fp, task)).argmax(1)).double().mean().item()


@torch.no_grad()
def verdict(convert: Convert, baked: nn.Module, quantized: nn.Module, cat_model: CATWrapper, task: Task) -> Verdict:
    """Whether the baked model can be converted; asserts that it can wherever the toolkit's own model can be.

    The converted model must give the baked one's logits; or else, where the output alone is corrected, CAT's correction
    of what the toolkit's own model gives after the same conversion.
    """
    ours = attempt(convert, baked, task)
    if isinstance(ours, Tensor) and share_off(ours, joined(outputs(baked, task))) <= TIES:
        return Verdict(True)
    own = attempt(convert, quantized, task)
    if isinstance(ours, str):
        assert isinstance(own, str), (
            f"{convert.__name__}: the toolkit's model can be converted, the baked one not: {ours}"
        )
        return Verdict(False, own)
    assert isinstance(own, Tensor), f"{convert.__name__}: the baked model gives other logits"
    if not cat_model.layers:
        assert share_off(ours, cat_model.correction(own)) <= TIES, f"{convert.__name__}: another correction"
    plain_logits = joined(outputs(quantized, task))
    same = (own.argmax(1) == plain_logits.argmax(1)).double().mean()
    off = share_off(own, plain_logits)
    return Verdict(True, f"other logits for {off:.0%} of the images after conversion, the same class for {same:.1%}")


def attempt(convert: Convert, model: nn.Module, task: Task) -> Tensor | str:
    """Logits (N, C) of the test images from the converted model; or in one line, why there are none."""
    example, *_ = task.calibration
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = convert(model, example[:3])
            return torch.cat([run(images) for images, _ in task.test])
    except Exception as error:
        return reason_of(error)


def share_off(found: Tensor, expected: Tensor) -> float:
    """Share of the images whose logits differ by more than `tolerance`."""
    return ((found - expected).abs().amax(1) > tolerance(expected)).double().mean().item()


def reason_of(error: Exception) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:200]


def write_table(rows: Sequence[Row], folder: Path) -> None:
    """Writes `results.md`."""
    write_text(folder / "results.md", to_markdown(rows) + "\n")


def to_markdown(rows: Sequence[Row]) -> str:
    """The table, and below it what numbers behind verdicts stand for."""
    notes = list(dict.fromkeys(verdict.note for row in rows for verdict in row.verdicts if verdict.note))

    def cell(verdict: Verdict) -> str:
        word = "yes" if verdict.works else "no"
        return f"{word} ({1 + notes.index(verdict.note)})" if verdict.note else word

    lines = [(*HEADER, *VERDICTS)]
    for row in rows:
        scores = (f"{score:.2f}" for score in (row.fp, row.quantized, row.corrected))
        agreement = " -> ".join(f"{value:.1f}" for value in row.agreement)
        about = row.toolkit, row.version, row.bits, row.network, *scores, agreement, row.layers
        lines.append((*about, *map(cell, row.verdicts)))
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([markdown_table(lines), *(["", NOTES, "", *numbered] if numbered else [])])
