"""What every toolkit's model goes through: correct, compare, bake, export, save, load, remove."""

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.data import Dataset, split_calibration
from benchmarks.files import write_text
from benchmarks.report import align
from cat_plugin import CATWrapper, apply_cat, compare_accuracy
from cat_plugin.hook import find_hooks

from .converters import Convert, exported, onnx_runtime
from .networks import plain

N_CALIB, N_CAT, BATCH_SIZE = 256, 1024, 64
TOLERANCE = 1e-4  # of the logits of a baked, exported or converted model
# Share of the images that may differ by more after a conversion: other sums of floats round other values at a tie.
TIES = 0.02
YES = "yes"
HEADER = ("toolkit", "bits", "network", "FP", "quantized", "+ CAT", "agreement with FP")
VERDICTS = ("hook", "bake", "torch.export", "ONNX Runtime")


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


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table; top-1 and agreement in percent of the test images, verdicts `YES` or a reason."""

    toolkit: str
    bits: str
    network: str
    fp: float
    quantized: float
    corrected: float
    agreement: tuple[float, float]
    verdicts: tuple[str, ...]


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
) -> Row:
    """Asserts all that the plug-in promises for a toolkit's model.

    Args:
        toolkit, bits: as the table shows them; `distribution` is the name of the package that has the version.
        gains: whether quantization has lost enough that CAT must win some back; else it must leave the model alone.
        converters: to `torch.export` and to ONNX Runtime; the toolkit's own ways, where torch's cannot do it.
    """
    before = outputs(quantized, task)
    cat_model = apply_cat(quantized, fp, task.fresh)
    corrected = outputs(quantized, task)
    accuracy = compare_accuracy(fp, quantized, cat_model, task.test)
    agreement = agreement_with(fp, before, task), agreement_with(fp, corrected, task)
    baked = cat_model.bake()
    check_correction(before, corrected, gains, agreement)
    assert accuracy.cat_top1 >= accuracy.quantized_top1, f"accuracy falls: {accuracy}"

    assert cat_model.remove() is quantized
    assert_same(outputs(quantized, task), before)
    assert not find_hooks(quantized)
    assert_close(torch.cat([plain(baked(images)) for images, _ in task.test]), joined(corrected))
    converted = [verdict(convert, baked, quantized, task) for convert in converters]
    check_saved(cat_model, task, corrected)
    assert_same(outputs(quantized, task), before)
    return Row(
        toolkit=f"{toolkit} {metadata.version(distribution)}",
        bits=bits,
        network=type(fp).__name__,
        fp=accuracy.fp_top1,
        quantized=accuracy.quantized_top1,
        corrected=accuracy.cat_top1,
        agreement=agreement,
        verdicts=(YES, YES, *converted),
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


def verdict(convert: Convert, baked: nn.Module, quantized: nn.Module, task: Task) -> str:
    """`YES`, or why the toolkit's own model cannot be converted; where only the baked one cannot, it is our fault."""
    reason = attempt(convert, baked, task)
    if reason == YES:
        return YES
    own = attempt(convert, quantized, task)
    assert own != YES, f"{convert.__name__}: the toolkit's own model can be converted, the baked one not: {reason}"
    return own


@torch.no_grad()
def attempt(convert: Convert, model: nn.Module, task: Task) -> str:
    """`YES` if the converted model gives the model's logits for batches of any size, else the reason in one line."""
    example, *_ = task.calibration
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = convert(model, example[:3])
            found = torch.cat([run(images) for images, _ in task.test])
    except Exception as error:
        return reason_of(error)
    expected = torch.cat([plain(model(images)) for images, _ in task.test])
    off = ((found - expected).abs().amax(1) > tolerance(expected)).double().mean().item()
    return YES if off <= TIES else f"{off:.0%} of the images get other logits"


def reason_of(error: Exception) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:200]


def write_table(rows: Sequence[Row], folder: Path) -> None:
    """Writes `results.md`: the table, and below it the reasons that its numbers stand for."""
    write_text(folder / "results.md", to_markdown(rows) + "\n")


def to_markdown(rows: Sequence[Row]) -> str:
    """The table; every reason that is no `YES` is a number, explained below it."""
    reasons = list(dict.fromkeys(text for row in rows for text in row.verdicts if text != YES))
    lines = [(*HEADER, *VERDICTS)]
    for row in rows:
        scores = (f"{score:.2f}" for score in (row.fp, row.quantized, row.corrected))
        agreement = " -> ".join(f"{value:.1f}" for value in row.agreement)
        verdicts = (YES if text == YES else f"no ({1 + reasons.index(text)})" for text in row.verdicts)
        lines.append((row.toolkit, row.bits, row.network, *scores, agreement, *verdicts))
    notes = [f"{number}. {text}" for number, text in enumerate(reasons, 1)]
    return "\n".join(
        [align(lines), *(["", "The toolkit's own model gives the same error:", "", *notes] if notes else [])]
    )
