"""What a correction does to the logits, cluster by cluster, in figures few enough to be kept in a report."""

import dataclasses

import torch
from torch import Tensor

from cat_plugin.correction.module import ClusterAffine
from cat_plugin.errors import CATError
from cat_plugin.kinds import SOFTMAX, OutputKind
from cat_plugin.metrics import kl_divergence

CLUSTERS_KEPT = 6
CLASSES_KEPT = 10


@dataclasses.dataclass(frozen=True)
class ClusterProfile:
    """Mean logits of the images of one cluster: of the full-precision, the quantized and the corrected model.

    cluster: its index in the correction. images: how many there are (positions, where outputs have such). classes: up
    to `CLASSES_KEPT` indices, those of the largest mean full-precision logits, ascending. fp, quantized, corrected: one
    mean a class of these. They are centred, since predictions do not see what all logits of an image have in common,
    and in units of the model's own spread (the root mean square of its centred logits over all images), since
    predictions do not see a factor, and a divergence shrinks what is uncertain. kl_before, kl_after: mean KL(FP || .)
    of the quantized and the corrected model's logits as they are, in nats.
    """

    cluster: int
    images: int
    classes: tuple[int, ...]
    fp: tuple[float, ...]
    quantized: tuple[float, ...]
    corrected: tuple[float, ...]
    kl_before: float
    kl_after: float

    def __post_init__(self) -> None:
        lengths = [len(part) for part in (self.classes, self.fp, self.quantized, self.corrected)]
        if len(set(lengths)) > 1 or any(label < 0 for label in self.classes):
            raise CATError(
                f"classes {self.classes}, fp, quantized and corrected of a cluster have the lengths {lengths}; "
                "expected one length, and classes from 0"
            )


def profile_clusters(
    correction: ClusterAffine, q: Tensor, f: Tensor, out: Tensor, kind: OutputKind = SOFTMAX
) -> tuple[ClusterProfile, ...]:
    """Profiles of the `CLUSTERS_KEPT` largest clusters, the largest first.

    Args:
        correction: assigns images to clusters.
        q, f, out: (N, C) logits of the quantized and the full-precision model, and corrected ones, for images that
            these were not fitted on.
    """
    ids = correction.assign(q.to(correction.scale.dtype).to(correction.scale.device)).cpu()
    sizes = torch.bincount(ids, minlength=correction.num_clusters)
    found = [cluster for cluster in sizes.argsort(descending=True, stable=True).tolist() if sizes[cluster]]
    units = [_in_units_of_spread(kind.centred(part.double())) for part in (f, q, out)]
    profiles = []
    for cluster in found[:CLUSTERS_KEPT]:
        rows = ids == cluster
        fp, quantized, corrected = (part[rows].mean(dim=0) for part in units)
        classes = fp.topk(min(CLASSES_KEPT, len(fp))).indices.sort().values
        means = (tuple(part[classes].tolist()) for part in (fp, quantized, corrected))
        kl = kl_divergence(f[rows], q[rows], kind), kl_divergence(f[rows], out[rows], kind)
        profiles.append(ClusterProfile(cluster, int(rows.sum()), tuple(classes.tolist()), *means, *kl))
    return tuple(profiles)


def _in_units_of_spread(logits: Tensor) -> Tensor:
    return logits / logits.square().mean().sqrt().clamp(min=1e-12)
