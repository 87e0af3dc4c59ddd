"""Fitting a correction on paired logits, and scoring it on images that it has not seen."""

import dataclasses

from torch import Tensor

from cat_plugin.config import CATConfig
from cat_plugin.correction.module import ClusterAffine, compute_dtype
from cat_plugin.errors import CATError
from cat_plugin.fitting.auto import draw, select
from cat_plugin.fitting.evidence import Evidence
from cat_plugin.fitting.paper import cross_fitted, fit_paper
from cat_plugin.fitting.processes import ALONE, Processes
from cat_plugin.fitting.scores import ErrorScores, HeldOutScores, score
from cat_plugin.fitting.store import LogitStore, different_images
from cat_plugin.kinds import SOFTMAX
from cat_plugin.running.checks import check_finite


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A correction with what is known of it.

    scores: on held-out images; None where images are too few to hold any out. evidence: what it was chosen by, in
    `"auto"` mode. images: how many it was fitted on, and positions: how many of their positions, where outputs have
    such; repeated: how many of the images repeat another. q, f: (n, C) logits of those that it was judged on, and
    out: (n, C) corrected logits of these, by maps that were fitted without them; None where nothing was held out.
    owners: (n,) int64, the image of each, where these are positions of images.
    """

    correction: ClusterAffine
    scores: HeldOutScores | ErrorScores | None
    evidence: Evidence | None
    images: int
    positions: int | None
    repeated: int
    q: Tensor
    f: Tensor
    out: Tensor | None = None
    owners: Tensor | None = None


def fit_cluster_affine(q: Tensor, f: Tensor, config: CATConfig | None = None) -> ClusterAffine:
    """Fits the correction that takes quantized logits to full-precision ones (arXiv 2509.26277).

    In `"auto"` mode, the default, maps of several families are weighed on held-out images, and the identity is
    returned where these show no gain, see `cat_plugin.fitting.auto`. In `"paper"` mode, clusters `q` by k-means after
    PCA, fits one least-squares affine map for each cluster and class, and moves the output by `config.alpha` of the
    way. Fitted in float64 on the CPU.

    Args:
        q: (N, C) logits of the quantized model, of any floating dtype, on any device.
        f: (N, C) logits of the full-precision model for the same images.
        config: `CATConfig()` by default.

    Returns:
        The correction, on the device of `q`, in float64 if `q` is and in float32 otherwise.

    Raises:
        CATError: `q` and `f` are not finite floating-point (N, C) with N >= 1; C is 1, where outputs are classes; in
            `"paper"` mode there are fewer images than clusters; or `config` is no CATConfig.

    Example:
        >>> import torch
        >>> from cat_plugin import CATConfig, fit_cluster_affine
        >>> q = torch.randn(400, 3)
        >>> correction = fit_cluster_affine(q, 2 * q + 1, CATConfig.paper(num_clusters=1, alpha=1.0))
        >>> torch.allclose(correction(q), 2 * q + 1, atol=1e-4)
        True
        >>> torch.equal(fit_cluster_affine(q, q)(q), q)  # nothing to gain: left as it is
        True
    """
    config = _check(q, f, config)
    if config.mode == "paper":
        return fit_paper(q, f, *config.clusters_for(len(q)), config)
    return select(LogitStore.of(q, f), config).correction.to(q.device, compute_dtype(q))


def fit_and_score(store: LogitStore, config: CATConfig, processes: Processes = ALONE) -> Fit:
    """The correction for the logits in `store`, those of all processes together, and its scores by cross-fitting.

    Each image is scored by maps that were fitted on other images. In `"paper"` mode there are 5 folds, with as many
    clusters as the fit on all images has, or as a fold's training part has images. There are no scores where images
    are too few: one in `"paper"` mode, under 20 in `"auto"` mode.

    Args:
        store: finite logits of both models.
        processes: that call this function, each with images of its own.

    Raises:
        CATError: in `"paper"` mode there are fewer images than clusters.
    """
    dense, kind = store.images is not None, config.kind
    if config.mode == "auto":
        made = select(store, config, processes)
        out = made.corrected if made.evidence.images > 0 else None
        scores = None if out is None else score(kind, made.f, made.q, out, made.owners)
        correction, positions = made.correction.to(store.dtype), made.rows if dense else None
        return Fit(
            correction, scores, made.evidence, made.images, positions, made.repeated, made.q, made.f, out, made.owners
        )
    q, f, images = store.gathered(processes)
    keys = processes.gather_rows(store.keys())
    repeated = len(keys) - len(different_images(keys))
    correction = fit_paper(q, f, *config.clusters_for(len(q)), config)
    out = cross_fitted(q, f, config, images)
    scores = None if out is None else score(kind, f, q, out, images)
    return Fit(correction, scores, None, len(keys), len(q) if dense else None, repeated, q, f, out, images)


def judged_outputs(store: LogitStore, config: CATConfig, processes: Processes) -> Tensor:
    """The outputs of the quantized model in `store` (n, C) that `fit_and_score` would judge on, in its order.

    Two stores with the same images, by their keys, give the same ones.
    """
    return draw(store, config, processes).q if config.mode == "auto" else store.gathered(processes)[0]


def _check(q: Tensor, f: Tensor, config: CATConfig | None) -> CATConfig:
    """The resolved configuration, after everything given has been looked at."""
    for name, logits in (("q", q), ("f", f)):
        if not isinstance(logits, Tensor):
            raise CATError(f"{name} is a {type(logits).__name__}; expected a torch.Tensor (N, C)")
    is_floating = q.is_floating_point() and f.is_floating_point()
    if q.shape != f.shape or q.ndim != 2 or q.numel() == 0 or not is_floating:
        raise CATError(
            f"q has shape {tuple(q.shape)} and dtype {q.dtype}, f has shape {tuple(f.shape)} and dtype {f.dtype}; "
            "expected the same (N, C) twice, floating-point, with at least one image and one class"
        )
    check_finite(q, "q")
    check_finite(f, "f")
    config = CATConfig.resolve(config)
    if q.shape[1] == 1 and config.kind is SOFTMAX:
        raise CATError(
            f"q and f have shape {tuple(q.shape)}, one logit an image: that of the second of two classes; give both, "
            '[0, z] as (N, 2), or set output_kind="sigmoid" for labels of their own, or "value" for numbers'
        )
    return config
