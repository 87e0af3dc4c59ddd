"""A correction inside the model: of the output of one layer, channel by channel, by least squares."""

import dataclasses

import torch

from cat_plugin.config import CATConfig
from cat_plugin.correction.module import ClusterAffine
from cat_plugin.fitting.fit import Fit
from cat_plugin.fitting.paper import cross_fitted, fit_paper
from cat_plugin.fitting.processes import ALONE, Processes
from cat_plugin.fitting.scores import ErrorScores
from cat_plugin.fitting.store import LogitStore


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
    scores = None if out is None else ErrorScores.of(f, q, out, images)
    if scores is not None and scores.accepted:
        correction = fit_paper(q, f, *config.clusters_for(len(q)), config)
    else:
        correction = ClusterAffine.identity(store.classes)
    n_images = int(processes.sum(torch.tensor(store.num_images, device="cpu")))
    return Fit(correction, scores, None, n_images, None if images is None else len(q), 0, q, f)
