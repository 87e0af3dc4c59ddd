"""Which share of a correction comes from which family of maps: by how well it predicts images it was not fitted on."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from cat_plugin.fitting.divergence import best_scale, cross_entropy, softened_divergence
from cat_plugin.fitting.families import (
    CLUSTERED,
    IDENTITY,
    SHARED,
    TRUSTED,
    AffineMap,
    Family,
    Rows,
    Shared,
    fit_maps,
)
from cat_plugin.kinds import VALUE, OutputKind
from cat_plugin.running.positions import fold_of_rows

WEIGHT_PRIOR = 20.0
"""Strength of the pull of the weights to those of the trusted families."""
SHARES = (1.0, 0.75, 0.5, 0.25)
"""Of the way from the quantized model to the average of the maps."""
FEW_SAMPLES = 512
"""Up to which images are cut into ten parts, so that the maps judged are nearly those of all images; else into five."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Rows that families are compared on.

    owners: (n,) int64, the image of each, where all of these are positions of images. seed: of the folds.
    """

    rows: Rows
    owners: Tensor | None
    shared: Shared
    seed: int

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.rows.q) if self.owners is None else len(self.owners.unique())

    @property
    def samples(self) -> float:
        """How many independent samples the rows are worth."""
        return self.shared.share * len(self.rows.q)

    def divergence(self, output: Tensor) -> Tensor:
        """(n,) softened divergence of the outputs (n, C) from FP's."""
        shared = self.shared
        return softened_divergence(output, shared.teacher(self.rows.f), shared.temperature, shared.kind)

    def folds(self) -> Tensor:
        """(n,) int64 fold of every row; the positions of an image are held out together."""
        n_folds = 10 if self.samples <= FEW_SAMPLES else 5
        if self.owners is None:
            return torch.arange(len(self.rows.q), device="cpu") % n_folds
        return fold_of_rows(self.owners, n_folds, self.seed)


def cross_fit(sample: Sample) -> tuple[Sample, dict[Family, Tensor]]:
    """(n, C) float32 outputs of every family, each row by a map that was fitted without it; and the sample with the
    clusters in use that bring a family nearest to full precision (at temperature 1).

    The components and clusters are those of all rows, which says nothing of their full-precision logits.
    """
    fold_of = sample.folds()
    parts = [
        ((fold_of == fold).nonzero().squeeze(1), (fold_of != fold).nonzero().squeeze(1)) for fold in fold_of.unique()
    ]
    known: list[dict[Family, AffineMap]] = [{} for _ in parts]

    def outputs_of(families: Iterable[Family], trial: Sample) -> dict[Family, Tensor]:
        outputs = {family: torch.empty_like(trial.rows.q, dtype=torch.float32) for family in families}
        for (held_out, others), maps in zip(parts, known, strict=True):
            found = fit_maps(outputs, trial.shared, trial.rows.take(others), known=maps)
            maps.update({family: found[family] for family in found if not family.clustered})
            rows = trial.rows.take(held_out)
            for family, output in outputs.items():
                output[held_out] = found[family](rows).float()
        return outputs

    outputs = outputs_of(SHARED, sample)
    best, clustered, least = sample, {}, math.inf
    for clusters in sample.shared.tried:
        shared = dataclasses.replace(sample.shared, clusters=clusters)
        trial = dataclasses.replace(sample, shared=shared, rows=shared.rows(sample.rows.q, sample.rows.f))
        found = outputs_of(CLUSTERED, trial)
        plain = dataclasses.replace(trial, shared=dataclasses.replace(shared, temperature=1.0))
        loss = min(plain.divergence(output.double()).mean().item() for output in found.values())
        if loss < least:
            best, clustered, least = trial, found, loss
    return best, outputs | clustered


def weigh(outputs: dict[Family, Tensor], sample: Sample) -> dict[Family, float]:
    """Non-negative weights of the families that minimise the held-out KL(FP || output) of their sum.

    Away from equal shares for the trusted families, weights are pulled back: few images cannot tell families apart.
    """
    kind = sample.shared.kind
    # Values are in units of their own spread, so that the strength of the prior means the same.
    unit = sample.shared.temperature if kind is VALUE else 1.0
    stacked = torch.stack([kind.centred(output.double()) / unit for output in outputs.values()])
    teacher = kind.means(sample.rows.f / unit)
    trusted = np.array([float(family in TRUSTED) for family in outputs])
    trusted /= trusted.sum()
    rows = stacked.view(len(stacked), -1)  # as matrices, for which there are fast kernels

    def summed(weights: np.ndarray) -> Tensor:
        return (torch.from_numpy(weights) @ rows).view_as(teacher)

    mean = summed(trusted)
    scale = best_scale(mean, teacher, kind)
    penalty = WEIGHT_PRIOR * _dispersion(stacked, kind.means(scale * mean), teacher, kind) / sample.samples

    def value_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = cross_entropy(summed(weights), teacher, kind)
        gradient = (rows @ slope.reshape(-1)).numpy()
        away = weights / scale - trusted
        return value.item() + penalty * (away**2).sum(), gradient + 2 * penalty / scale * away

    bounds = [(0, None)] * len(outputs)
    found = minimize(value_and_gradient, scale * trusted, jac=True, method="L-BFGS-B", bounds=bounds)
    return {family: float(weight) for family, weight in zip(outputs, found.x, strict=True)}


def temper(weights: dict[Family, float], outputs: dict[Family, Tensor], sample: Sample) -> dict[Family, float]:
    """`weights`, moved towards the identity as far as held-out images ask, in steps of a quarter.

    Few images give a direction sooner than a distance.
    """
    total = sum(weights.values())
    output, plain = mixed(weights, outputs), total * sample.rows.q
    share = min(SHARES, key=lambda share: sample.divergence(plain + share * (output - plain)).mean().item())
    tempered = {family: share * weight for family, weight in weights.items()}
    tempered[IDENTITY] += (1 - share) * total
    return tempered


def mixed(weights: dict[Family, float], outputs: dict[Family, Tensor]) -> Tensor:
    """(n, C) float64 weighted sum of the outputs of the families."""
    return sum(weight * outputs[family].double() for family, weight in weights.items())


def _dispersion(stacked: Tensor, predicted: Tensor, teacher: Tensor, kind: OutputKind) -> float:
    """Variance of the slope of an image's divergence by the weights, relative to its curvature.

    1 where targets are drawn from the predictions; less where the teacher's soft predictions tell more than a label.
    """
    variance = curvature = 0.0
    for part in stacked:
        variance += ((predicted - teacher) * part).sum(dim=1).var().item()
        curvature += kind.quadratic(predicted, part).mean().item()
    return min(variance / max(curvature, 1e-12), 1.0)
