"""What `apply_cat` is asked to fit, as an immutable value."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from cat_plugin.errors import CATError
from cat_plugin.kinds import KINDS, SOFTMAX, OutputKind

MODES = ("auto", "paper")
AUTO = "auto"
LAYERS = (AUTO, "all", "none")
TRIED_CLUSTERS, IMAGES_A_CLUSTER = (4, 32), 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class CATConfig:
    """Settings of a Cluster-based Affine Transformation (arXiv 2509.26277).

    ================  ==========================================================================
    field             meaning
    ================  ==========================================================================
    mode              `"auto"`: maps of several families are weighed against each other and
                      against leaving the model alone on held-out images, see
                      `cat_plugin.fitting.auto`; `"paper"`: the published recipe
    layers            which layers inside the network get a scale and an offset per channel, see
                      `cat_plugin.layers.fit`: `"all"` that have weights and that gradients reach;
                      names; `"none"`, the output only; `"auto"`: all, where images are enough and
                      held-out ones show a gain, and none in `"paper"` mode
    num_clusters      K, the number of clusters of the quantized model's logits. None: 64 in
                      `"paper"`, and in `"auto"` 4 or 32, whichever predicts held-out images better
                      (where there are 16 images a cluster); 1 tries no clusters
    pca_dim           principal components of the logits that are kept: for clustering where
                      there are more classes than this, and in `"auto"` for the shared map
    alpha             0 to 1, how far an output moves from the quantized to the corrected logits
    output_kind       what outputs mean: `"softmax"`, logits of classes that exclude each other (one
                      logit is that of the second of two classes); `"sigmoid"`, logits of labels
                      that do not; `"value"`, numbers of a regression. `"auto"`: as the first, and
                      the report warns where it may be another
    class_axis        axis of the classes in outputs that have positions; None: the last of
                      sequences (N, T, C), 1 of maps (N, C, H, W)
    positions         of such outputs, how many positions of an image are drawn for the fit
    seed              of PCA, k-means, the folds, the positions and the order of images
    ================  ==========================================================================

    Raises:
        CATError: a value that is of another type, out of range, or does not go with the others.

    Example:
        >>> from cat_plugin import CATConfig
        >>> CATConfig().mode, CATConfig.paper().mode
        ('auto', 'paper')
        >>> CATConfig.from_dict(CATConfig(alpha=0.5).to_dict()).alpha
        0.5
    """

    mode: str = "auto"
    layers: str | tuple[str, ...] = AUTO
    num_clusters: int | None = None
    pca_dim: int = 50
    alpha: float = 1.0
    output_kind: str = AUTO
    class_axis: int | None = None
    positions: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise CATError(f"mode={self.mode!r} should be one of {', '.join(map(repr, MODES))}")
        self._check_layers()
        if self.output_kind not in (AUTO, *KINDS):
            raise CATError(f"output_kind={self.output_kind!r} should be one of {', '.join(map(repr, (AUTO, *KINDS)))}")
        if self.num_clusters is None and self.mode == "paper":
            object.__setattr__(self, "num_clusters", 64)
        if self.num_clusters is not None:
            self._check_int("num_clusters", 1)
        self._check_int("pca_dim", 1)
        self._check_int("positions", 1)
        self._check_int("seed", 0, 2**32 - 1)
        if self.class_axis is not None:
            self._check_int("class_axis")
            if self.class_axis == 0:
                raise CATError("class_axis=0 is the axis of images; expected that of classes, such as 1 or -1")
        alpha = self.alpha
        is_number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
        if not is_number or not math.isfinite(alpha) or not 0 <= alpha <= 1:
            raise CATError(f"alpha={alpha!r} should be a number from 0 (no correction) to 1 (full correction)")
        object.__setattr__(self, "alpha", float(alpha))

    def _check_layers(self) -> None:
        if isinstance(self.layers, str):
            if self.layers not in LAYERS:
                raise CATError(
                    f"layers={self.layers!r} should be one of {', '.join(map(repr, LAYERS))}, or names of layers in a "
                    f"tuple, ({self.layers!r},)"
                )
            return
        names = tuple(self.layers) if isinstance(self.layers, list | tuple) else ()
        if not names or not all(isinstance(name, str) and name for name in names):
            raise CATError(
                f"layers={self.layers!r} should be one of {', '.join(map(repr, LAYERS))}, or names of layers"
            )
        object.__setattr__(self, "layers", tuple(dict.fromkeys(names)))

    @property
    def corrects_layers(self) -> bool:
        """Whether layers are to be looked at."""
        return self.layers != "none" and not (self.layers == AUTO and self.mode == "paper")

    def _check_int(self, name: str, low: float = -math.inf, high: float = math.inf) -> None:
        value = getattr(self, name)
        is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_int or not low <= value <= high:
            limits = f" from {low} to {high}" if high < math.inf else f" >= {low}" if low > -math.inf else ""
            raise CATError(f"{name}={value!r} should be an integer{limits}")
        object.__setattr__(self, name, int(value))

    @property
    def kind(self) -> OutputKind:
        """What outputs mean."""
        return SOFTMAX if self.output_kind == AUTO else KINDS[self.output_kind]

    @classmethod
    def resolve(cls, config: "CATConfig | None") -> "CATConfig":
        """`config` itself, or the default one for None; anything else is a `CATError`."""
        if config is None:
            return cls()
        if not isinstance(config, cls):
            raise CATError(
                f"config={config!r} is a {type(config).__name__}; expected a CATConfig or None, such as "
                "CATConfig(alpha=0.4), or CATConfig.from_dict(...) of a dict"
            )
        return config

    @classmethod
    def paper(cls, num_clusters: int = 64, pca_dim: int = 50, alpha: float = 0.4, seed: int = 0) -> "CATConfig":
        """The published recipe: exactly `num_clusters` clusters, however few images they hold; the output only."""
        return cls(mode="paper", layers="none", num_clusters=num_clusters, pca_dim=pca_dim, alpha=alpha, seed=seed)

    def clusters_for(self, n_images: int) -> tuple[int, ...]:
        """Numbers of clusters to try on `n_images` images: one that was asked for, in `"auto"` at most half as many as
        there are images, or several or none.

        Raises:
            CATError: in `"paper"` mode, there are fewer images than clusters.
        """
        if self.num_clusters is None:
            return tuple(count for count in TRIED_CLUSTERS if count * IMAGES_A_CLUSTER <= n_images)
        if self.mode == "auto":
            return (max(min(n_images // 2, self.num_clusters), 1),)
        if n_images < self.num_clusters:
            raise CATError(
                f"n_images={n_images} should be >= num_clusters={self.num_clusters}; "
                "lower num_clusters or give more images"
            )
        return (self.num_clusters,)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CATConfig":
        """Inverse of `to_dict`; absent fields take their defaults, unknown ones are a `CATError`."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise CATError(f"unknown CATConfig fields {unknown}; known are {known}")
        return cls(**values)
