"""Paired logits of a low-bit network and its full-precision original, for fitting and, apart, for scoring."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from baselines.files import digest_tensors
from benchmarks.measure.leak_guard import LeakGuard, fit_guarded, joined
from benchmarks.networks.layer_fits import Variation
from cat_plugin import CATConfig, ClusterAffine
from cat_plugin.report.clusters import ClusterProfile, profile_clusters

FRESH, TUNED = "fresh", "tuned"
ORIGINS = FRESH, TUNED
MANY = 100  # classes, from which on top-5 is told, too


@dataclass(frozen=True, eq=False, kw_only=True)
class PairedLogits:
    """Float32 logits of the low-bit network `q` and of the full-precision one `f`, on the CPU.

    `fit_*` `(N, C)` are of fresh training images, for corrections, and `tuned_*` `(T, C)` of those that
    quantization was tuned on; `test_*` `(M, C)` and the int64 `labels` `(M,)` are of the test images and only
    score. What is not known is None.
    """

    fit_q: Tensor
    fit_f: Tensor
    test_q: Tensor
    test_f: Tensor
    labels: Tensor
    tuned_q: Tensor | None = None
    tuned_f: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All that is known, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in values.items() if tensor is not None}

    @cached_property
    def _guard(self) -> LeakGuard:
        return LeakGuard(joined(self.test_q, self.test_f))

    def refuse_leaks(self, where: str) -> None:
        """Refuse test images among the others; `where` starts the names of these in the message.

        Raises:
            BenchmarkError: there are some.
        """
        self._guard.check(joined(self.fit_q, self.fit_f), f"{where}images to fit on")
        if self.tuned_q is not None:
            self._guard.check(joined(self.tuned_q, self.tuned_f), f"{where}images that quantization was tuned on")

    def fit(self, config: CATConfig, rows: slice = slice(None), origin: str = FRESH) -> ClusterAffine:
        """A correction fitted on images for fitting alone: `rows` of the fresh ones, or of the `"tuned"` ones.

        Raises:
            BenchmarkError: a test image is among them.
        """
        q, f = (self.fit_q, self.fit_f) if origin == FRESH else (self.tuned_q, self.tuned_f)
        return fit_guarded(q[rows], f[rows], config, self._guard)

    def score(self, corrected: dict[str, Tensor]) -> dict[str, Tensor]:
        """Classes that are predicted for the test images, int16 `(M,)`: `labels`, `fp`, `lq` and corrected.

        `corrected` are logits `(M, C)` for the test images, by the names of corrections.
        """
        predictions = {name: values.argmax(1).to(torch.int16) for name, values in self._named(corrected).items()}
        return {"labels": self.labels.to(torch.int16), **predictions}

    def ranks(self, corrected: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ranks of the labels, int16 `(M,)`, by `rank_name` of the networks that `score` has; none of few classes."""
        if self.test_f.shape[1] < MANY:
            return {}
        return {rank_name(name): ranks(values, self.labels) for name, values in self._named(corrected).items()}

    def _named(self, corrected: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"fp": self.test_f, "lq": self.test_q, **corrected}

    def profile(self, correction: ClusterAffine, corrected: Tensor) -> tuple[ClusterProfile, ...]:
        """What becomes of the logits of the test images, which are `corrected` `(M, C)`, in each of the clusters of
        `correction`."""
        return profile_clusters(correction, self.test_q, self.test_f, corrected)


class CorrectableLayers(Protocol):
    """A low-bit network whose layers can be corrected."""

    def corrected(self, config: CATConfig, rows: slice, variation: Variation) -> Tensor:
        """Logits `(M, C)` of the test images, with layers corrected on `rows` of the fresh images."""


@dataclass(frozen=True)
class Source:
    """A low-bit network beside its full-precision one: their logits, which `load` reads when they are needed.

    `digest` changes with any of the logits; `fresh` is the number of images to draw from, `tuned` that of the
    images known that quantization was tuned on. `networks` makes the networks themselves, where they are known.
    """

    name: str
    digest: str
    fresh: int
    load: Callable[[], PairedLogits]
    tuned: int = 0
    networks: Callable[[], CorrectableLayers] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        pairs: PairedLogits,
        load: Callable[[], PairedLogits],
        networks: Callable[[], CorrectableLayers] | None = None,
    ) -> "Source":
        """Of `pairs`, which are let go: many of them do not fit into memory together."""
        tuned = 0 if pairs.tuned_q is None else len(pairs.tuned_q)
        digest = digest_tensors(pairs.tensors())
        return cls(name=name, digest=digest, load=load, fresh=len(pairs.fit_q), tuned=tuned, networks=networks)

    def draws(self, images: int, most: int, origin: str = FRESH) -> int:
        """How many disjoint draws of so many images there are, up to `most`."""
        return min(most, (self.tuned if origin == TUNED else self.fresh) // images)


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """int16 `(M,)`: how many of the logits `(M, C)` come before that of the label, 0 where it is the prediction. Of
    equal ones the first comes first, and what is no number before all others, as for `argmax`."""
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1]) < labels[:, None]
    return (~(logits <= own) | ((logits == own) & earlier)).sum(1).to(torch.int16)


def rank_name(network: str) -> str:
    """What the ranks of labels under a network are stored as."""
    return f"{network}_rank"
