"""Keeps test images out of all that is quantized, fitted or chosen."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import BenchmarkError
from benchmarks.datasets.images import Images, batches, digests, shown
from cat_plugin import CATConfig, CATWrapper, ClusterAffine, apply_cat, fit_cluster_affine
from cat_plugin.fitting.fit import Fit, fit_and_score
from cat_plugin.fitting.store import LogitStore

FITTED = "images that a correction is to be fitted on"


class LeakGuard:
    """Knows test images, or the outputs for them, by digest, and refuses them elsewhere."""

    def __init__(self, test: Images) -> None:
        """`test`: `M` test images, in memory or as files, or outputs `(M, ...)` of them."""
        self._test = test
        self._places = {digest: place for place, digest in enumerate(digests(test))}

    def check(self, given: Images, role: str) -> list[str]:
        """The digests of `given`, `N` of the same kind, called `role` in the message; refused if a test image is among
        it.

        Raises:
            BenchmarkError: one is.
        """
        keys = digests(given)
        found = [(row, self._places[key]) for row, key in enumerate(keys) if key in self._places]
        if found:
            row, place = found[0]
            raise BenchmarkError(
                f"leak: {len(found):,} of {len(given):,} {role} are test images, such as number {shown(given, row)}, "
                f"which is test image {shown(self._test, place)}; figures would be better than they are. Take them out "
                "of one of the two"
            )
        return keys


def fit_guarded(q: Tensor, f: Tensor, config: CATConfig, guard: LeakGuard) -> ClusterAffine:
    """`fit_cluster_affine`, the only call of it in the benchmarks: nothing is fitted that `guard` has not passed.

    Args:
        q: `(N, C)` logits of the low-bit network, and `f` of the full-precision one.
        config: what to fit.
        guard: of `joined` logits of the test images.

    Raises:
        BenchmarkError: one of the images is a test image.
    """
    guard.check(joined(q, f), FITTED)
    return fit_cluster_affine(q, f, config)


def fit_positions_guarded(q: Tensor, f: Tensor, config: CATConfig, guard: LeakGuard) -> Fit:
    """`fit_and_score`, the only call of it in the benchmarks, of outputs that may have positions.

    Args:
        q: `(N, P, C)` logits of `P` positions of the low-bit network, and `f` of the full-precision one; where `P` is
            1, outputs are taken to have no positions.
        config: what to fit.
        guard: of the `position_rows` of the test images.

    Raises:
        BenchmarkError: one of the positions is a test image's.
    """
    guard.check(position_rows(q, f), f"positions of {FITTED}")
    images, positions = q.shape[:2]
    owners = torch.arange(images).repeat_interleave(positions) if positions > 1 else None
    return fit_and_score(LogitStore.of(q.flatten(0, 1), f.flatten(0, 1), owners), config)


def fit_networks_guarded(
    quantized: nn.Module,
    fp_model: nn.Module,
    images: Images,
    config: CATConfig,
    guard: LeakGuard,
    *,
    augment: str | Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> CATWrapper:
    """`apply_cat`, the only call of it in the benchmarks; the correction is attached to `quantized`.

    Args:
        quantized: the low-bit network, and `fp_model` the full-precision one.
        images: what to fit on.
        config: what to fit.
        guard: of the test images.
        augment: other views of the images, as `apply_cat` takes them.
        progress: show progress bars.

    Raises:
        BenchmarkError: one of the images is a test image.
    """
    guard.check(images, FITTED)
    return apply_cat(quantized, fp_model, batches(images, None), config=config, augment=augment, progress=progress)


def joined(q: Tensor, f: Tensor) -> Tensor:
    """`(N, 2 C)`: what tells images apart where only the logits `(N, C)` of both networks are known."""
    return torch.cat([q, f], dim=1)


def position_rows(q: Tensor, f: Tensor) -> Tensor:
    """`(N P, 2 C)`: `joined` of every position of logits `(N, P, C)`."""
    return joined(q.flatten(0, 1), f.flatten(0, 1))
