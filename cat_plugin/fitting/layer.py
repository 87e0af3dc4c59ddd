"""A correction inside the model: of the output of one layer, channel by channel, by least squares."""

import dataclasses

import torch
from torch import Tensor

from cat_plugin.config import CATConfig
from cat_plugin.correction.module import ClusterAffine
from cat_plugin.fitting.fit import Fit
from cat_plugin.fitting.paper import cross_fitted, fit_paper
from cat_plugin.fitting.processes import ALONE, Processes
from cat_plugin.fitting.store import LogitStore
from cat_plugin.metrics import standard_error


@dataclasses.dataclass(frozen=True)
class LayerScores:
    """Closeness of a layer to the full-precision one on images that were held out from the fit.

    mse_before, mse_after: mean squared difference of the quantized and of the corrected layer's output from the
    full-precision one. mse_error: standard error of the fall.
    """

    mse_before: float
    mse_after: float
    mse_error: float

    @classmethod
    def of(cls, f: Tensor, q: Tensor, out: Tensor, images: Tensor | None) -> "LayerScores":
        """Scores of the corrected output `out` of a layer whose outputs are `q` and, in full precision, `f`: (N, C)."""
        before, after = ((rows.double() - f.double()).square().mean(dim=1) for rows in (q, out))
        return cls(before.mean().item(), after.mean().item(), standard_error(before - after, images))

    @property
    def accepted(self) -> bool:
        """Whether the error falls by more than chance."""
        return self.mse_before - self.mse_after > self.mse_error

    def summary(self) -> list[str]:
        """What changes, in a few words."""
        return [f"squared error to FP {self.mse_before:.4g} -> {self.mse_after:.4g}"]

    def __str__(self) -> str:
        return (
            f"squared error to the FP layer {self.mse_before:.4g} -> {self.mse_after:.4g} "
            f"(fall {self.mse_before - self.mse_after:.4g} +- {self.mse_error:.4g})"
        )


def fit_layer(store: LogitStore, config: CATConfig, processes: Processes = ALONE) -> Fit:
    """The correction of a layer's output, whose channels are the classes of `store`, by least squares.

    Channels have no softmax, so divergences mean nothing here: in `"auto"` mode there is one scale and offset a
    channel, in `"paper"` mode one a channel and cluster. The identity is returned where the squared error does not
    fall on held-out images, by more than its standard error. All rows are held in memory.

    Raises:
        CATError: in `"paper"` mode there are fewer rows than clusters.
    """
    if config.mode == "auto":
        config = dataclasses.replace(config, mode="paper", num_clusters=1)
    q, f, images = store.gathered(processes)
    out = cross_fitted(q, f, config, images)
    scores = None if out is None else LayerScores.of(f, q, out, images)
    if scores is not None and scores.accepted:
        correction = fit_paper(q, f, config.clusters_for(len(q)), config)
    else:
        correction = ClusterAffine.identity(store.classes)
    n_images = int(processes.sum(torch.tensor(store.num_images)))
    return Fit(correction, scores, None, n_images, None if images is None else len(q), 0, q, f)
