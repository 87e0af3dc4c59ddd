import copy

import pytest
import torch
from torch import nn

from cat_plugin import CATConfig, CATError, apply_cat, compare_accuracy, fit_cluster_affine
from cat_plugin.running.collect import collect_outputs
from cat_plugin.running.positions import PositionDraw, class_axis_of, fold_of_rows, from_rows, to_rows
from tests.cat_plugin.helpers import held_out_scores, images, model_pair, paired_logits, state_of

SHAPES = [
    ((3, 5), None),
    ((3, 4, 5), None),
    ((3, 5, 4), 1),
    ((3, 5, 2, 4), None),
    ((3, 2, 4, 5), -1),
    ((3, 5, 2, 2, 3), 1),
]


@pytest.mark.parametrize(("shape", "class_axis"), SHAPES, ids=str)
def test_rows_are_the_positions_of_one_image_after_another(shape, class_axis):
    output = torch.randn(shape)
    axis = shape.index(5)
    assert class_axis_of(output, class_axis) == axis
    sizes = [size for place, size in enumerate(shape) if place != axis]
    expected = []
    for place in torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(sizes)).tolist():
        expected.append(output[(*place[:axis], slice(None), *place[axis:])])
    rows = to_rows(output, class_axis)
    assert torch.equal(rows, torch.stack(expected))
    restored = from_rows(rows, output, class_axis)
    assert torch.equal(restored, output)
    assert restored.is_contiguous()


@pytest.mark.parametrize("class_axis", [0, 4, -4, -5])
def test_class_axis_that_there_is_not(class_axis):
    with pytest.raises(CATError, match=rf"class_axis={class_axis} for an output of shape \(2, 3, 4, 5\)"):
        to_rows(torch.zeros(2, 3, 4, 5), class_axis)


@pytest.mark.parametrize(
    ("field", "value"), [("class_axis", 0), ("class_axis", "last"), ("positions", 0), ("positions", None)]
)
def test_invalid_config(field, value):
    with pytest.raises(CATError, match=f"{field}={value!r}"):
        CATConfig(**{field: value})
    assert CATConfig(class_axis=-1, positions=5).to_dict()["class_axis"] == -1


def places(n_images, height, width, first=0):
    """(N, 1, H, W) float: number of the image and of the position, as one number."""
    numbers = torch.arange(n_images * height * width).reshape(n_images, 1, height, width)
    return (numbers + first * height * width).float()


def test_draw_is_of_every_image_by_seed_and_the_same_in_any_batches():
    output = places(6, 5, 8)
    drawn = PositionDraw(None, 7, seed=3)(output)
    rows = drawn.rows(output).squeeze(1).long()
    assert len(rows.unique()) == 42
    assert torch.equal(rows // 40, torch.arange(6).repeat_interleave(7))
    assert torch.equal(rows // 40, drawn.images())
    assert torch.equal(drawn.labels(output.squeeze(1).long()), rows)
    assert torch.equal(drawn.labels(output.long()), rows)
    assert len((rows % 40).unique()) > 20
    draw = PositionDraw(None, 7, seed=3)
    parts = [draw(part).rows(part) for part in output.split(4)]
    assert torch.equal(torch.cat(parts).squeeze(1).long(), rows)
    assert not torch.equal(PositionDraw(None, 7, seed=4)(output).rows(output).squeeze(1), rows)


@pytest.mark.parametrize("budget", [None, 40, 100])
def test_all_positions_where_the_budget_allows(budget):
    output = places(2, 5, 8)
    drawn = PositionDraw(None, budget, 0)(output)
    assert torch.equal(drawn.rows(output).squeeze(1), torch.arange(80.0))
    assert PositionDraw(None, budget, 0)(output[:0]).rows(output[:0]).shape == (0, 1)


def test_logits_without_positions_are_drawn_whole():
    logits, labels = torch.randn(5, 3), torch.arange(5)
    drawn = PositionDraw(-2, 1, 0)(logits)
    assert drawn.rows(logits) is logits
    assert drawn.labels(labels) is not None
    assert drawn.images() is None
    assert drawn.labels(torch.zeros(5, 4, dtype=torch.int64)) is None


def test_folds_keep_images_together():
    owners = torch.randint(23, (400,), generator=torch.Generator().manual_seed(0)) * 10
    folds = fold_of_rows(owners, 5, seed=1)
    for owner in owners.unique():
        assert len(folds[owners == owner].unique()) == 1
    sizes = [len(owners[folds == fold].unique()) for fold in range(5)]
    assert sorted(sizes) == [4, 4, 5, 5, 5]
    assert not torch.equal(folds, fold_of_rows(owners, 5, seed=2))


def image_noise(n_images, positions, spread):
    """Rows whose error is mostly that of their image: it can be learnt by heart, and tells nothing of other images."""
    q, _ = paired_logits(n_images, 10, noise=0.0)
    error = spread * torch.randn(n_images, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    jitter = 0.01 * torch.randn(
        n_images * positions, 10, generator=torch.Generator().manual_seed(6), dtype=torch.float64
    )
    owners = torch.arange(n_images).repeat_interleave(positions)
    return q[owners] + jitter, (q + error)[owners], owners


@pytest.mark.parametrize("config", [CATConfig.paper(40, alpha=1.0), CATConfig(num_clusters=64)], ids=["paper", "auto"])
def test_what_is_learnt_by_heart_does_not_count(config):
    q, f, owners = image_noise(40, 32, spread=2.0)
    by_row, by_image = held_out_scores(q, f, config), held_out_scores(q, f, config, images=owners)
    assert by_row.kl_after < 0.7 * by_row.kl_before
    assert by_image.kl_after > 0.9 * by_image.kl_before


class Pixelwise(nn.Module):
    """The network inside at every position of (N, 6, ...) or (N, ..., 6), with classes on the axis of the channels."""

    def __init__(self, net, axis):
        super().__init__()
        self.net, self.axis = net, axis

    def forward(self, x):
        moved = x.movedim(self.axis, -1)
        return self.net(moved.reshape(-1, 6)).reshape(*moved.shape[:-1], -1).movedim(-1, self.axis)


LAYOUTS = {
    "segmentation": ((5, 4), 1, None),
    "sequence": ((20,), -1, None),
    "steps last": ((20,), 1, 1),
    "last": ((5, 4), -1, -1),
}


def dense_pair(layout, n_images=60):
    """Both models, images, and the `class_axis` to give."""
    sizes, axis, class_axis = LAYOUTS[layout]
    pair = [Pixelwise(net, axis).eval() for net in model_pair()]
    return (*pair, images(n_images * 20).reshape(n_images, *sizes, 6).movedim(-1, axis), class_axis)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_position_is_corrected(layout):
    quantized, fp, x, class_axis = dense_pair(layout)
    before = state_of(quantized, fp)
    with torch.no_grad():
        q, f = quantized(x), fp(x)
    rows, wanted = to_rows(q, class_axis), to_rows(f, class_axis)
    config = CATConfig(mode="paper", num_clusters=5, class_axis=class_axis)
    expected = fit_cluster_affine(rows, wanted, config)(rows)
    labels = wanted.argmax(dim=1).reshape(len(x), *LAYOUTS[layout][0])
    cat_model = apply_cat(quantized, fp, x, config=config, eval_loader=[(x, labels)], batch_size=16)
    with torch.no_grad():
        out = quantized(x)
    assert out.shape == q.shape
    torch.testing.assert_close(to_rows(out, class_axis), expected)
    report = cat_model.report
    assert (report.images, report.positions, sum(report.cluster_sizes)) == (60, 1200, 1200)
    assert "fitted on 60 images (1,200 positions), 5 clusters of" in str(report)
    assert "positions each" in str(report)
    accuracy = report.accuracy
    assert (accuracy.images, accuracy.positions, accuracy.fp_top1) == (60, 1200, 100.0)
    assert accuracy.quantized_top1 == pytest.approx(100 * (rows.argmax(1) == wanted.argmax(1)).float().mean().item())
    assert accuracy.cat_top1 == pytest.approx(100 * (expected.argmax(1) == wanted.argmax(1)).float().mean().item())
    assert "1,200 positions of 60 images" in str(accuracy)
    cat_model.remove()
    assert state_of(quantized, fp) == before


def test_default_mode_gains_and_fits_on_the_budget():
    quantized, fp, x, _ = dense_pair("segmentation", 200)
    cat_model = apply_cat(quantized, fp, x, config=CATConfig(positions=8))
    report = cat_model.report
    assert (report.images, report.positions) == (200, 1600)
    assert report.evidence.accepted
    assert report.held_out.agreement_after > report.held_out.agreement_before + 3
    with torch.no_grad():
        fresh = images(200, seed=9).reshape(10, 5, 4, 6).movedim(-1, 1)
        f = fp(fresh)
        with cat_model.disabled():
            plain = quantized(fresh)
        assert (quantized(fresh) - f).square().mean() < 0.7 * (plain - f).square().mean()


def test_few_images_are_left_alone_however_many_their_positions():
    quantized, fp, x, _ = dense_pair("segmentation", 19)
    report = apply_cat(quantized, fp, x).report
    assert (report.images, report.positions, report.held_out) == (19, 380, None)
    assert "19 images are too few to learn from" in str(report)


def test_the_same_seed_draws_the_same_positions():
    quantized, fp, x, _ = dense_pair("segmentation")
    first, again, other = (
        collect_outputs(quantized, fp, x, positions=3, seed=seed, batch_size=size)
        for seed, size in ((0, 64), (0, 7), (1, 64))
    )
    torch.testing.assert_close(first.q, again.q)
    assert torch.equal(first.images, torch.arange(60).repeat_interleave(3))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.q, other.q)


def test_accuracy_leaves_out_positions_without_a_class(monkeypatch):
    quantized, fp, x, _ = dense_pair("segmentation", 4)
    with torch.no_grad():
        q, labels = quantized(x).argmax(dim=1), fp(x).argmax(dim=1)
    labels[0, 0], labels[1, 1], labels[2] = 255, -100, -1
    counted = (labels >= 0) & (labels != 255)
    found = compare_accuracy(fp, quantized, quantized, [(x, labels)])
    assert (found.positions, found.fp_top1) == (int(counted.sum()), 100.0)
    assert found.quantized_top1 == pytest.approx(100 * (q == labels)[counted].float().mean().item())
    with pytest.raises(CATError, match="labels run from 0 to 77, the models have 10 classes"):
        compare_accuracy(fp, quantized, quantized, [(x, torch.where(labels == 255, 77, labels).clamp(min=0))])
    with pytest.raises(CATError, match="one integer class an image, or one a position"):
        compare_accuracy(fp, quantized, quantized, [(x, labels[:, 0, 0])])
    monkeypatch.setattr("cat_plugin.evaluation.EVALUATED_POSITIONS", 3)
    assert compare_accuracy(fp, quantized, quantized, [(x, labels.clamp(0, 9))]).positions == 12


def test_accuracy_does_not_depend_on_batches():
    quantized, fp, x, _ = dense_pair("segmentation", 6)
    labels = fp(x).argmax(dim=1)
    once = compare_accuracy(fp, quantized, fp, [(x, labels)])
    assert once.paired.ci_low < once.paired.delta < once.paired.ci_high
    assert compare_accuracy(fp, quantized, fp, list(zip(x.split(2), labels.split(2), strict=True))) == once


def test_outputs_of_other_shapes():
    quantized, fp, x, _ = dense_pair("segmentation")
    other = nn.Sequential(copy.deepcopy(fp), nn.AvgPool2d(2))
    with pytest.raises(CATError, match=r"quantized_model \(60, 10, 5, 4\), fp_model \(60, 10, 2, 2\)"):
        collect_outputs(quantized, other, x)


def test_export_and_bake():
    quantized, fp, x, _ = dense_pair("segmentation")
    cat_model = apply_cat(quantized, fp, x, config=CATConfig.paper(5))
    with torch.no_grad():
        expected = quantized(x)
        program = torch.export.export(cat_model.bake(), (x,))
        torch.testing.assert_close(program.module()(x), expected)
        cat_model.remove()
        assert not torch.equal(quantized(x), expected)
