import logging
from collections import namedtuple

import pytest
import torch

from cat_plugin import CATError
from cat_plugin.layers.images import flipped
from cat_plugin.running.collect import Inputs
from cat_plugin.running.positions import PositionDraw
from tests.cat_plugin.layers.networks import kept_images, pictures

SIZES = (5, 3, 4)
Named = namedtuple("Named", "values mask")
CHOSEN = torch.tensor([0, 2, 4, 5, 9, 11])
HOW = {
    "parts of two": {"size": 2},
    "all in one": {"size": 99},
    "four parts": {"count": 4},
    "more parts than images": {"count": 9},
    "random order": {"size": 2, "generator": torch.Generator().manual_seed(0)},
    "random parts": {"count": 4, "generator": torch.Generator().manual_seed(1)},
}


def maps(batches, budget=4):
    """`KeptImages` of batches with outputs (N, 5, 3, 3), of which up to `budget` positions are drawn; these outputs,
    and the drawn rows of every image (images, positions, 5)."""
    kept, draw = kept_images([]), PositionDraw(None, budget, 0)
    outputs, rows = [torch.randn(len(next(iter(batch))), 5, 3, 3) for batch in batches], []
    for batch, output in zip(batches, outputs, strict=True):
        drawn = draw(output)
        kept.append(Inputs(batch[0] if isinstance(batch, tuple) else batch, drawn))
        rows.append(drawn.rows(output).reshape(len(output), -1, 5))
    return kept, torch.cat(outputs), torch.cat(rows)


def check_parts(parts, x, outputs, rows):
    """Each part holds its images and their positions; returns the images in turn."""
    seen = []
    for part in parts:
        if len(part.images):
            assert torch.equal(part.batch, x[part.images])
            assert torch.equal(part.rows(outputs[part.images]), rows[part.images].flatten(0, 1))
        seen += part.images.tolist()
    return seen


@pytest.mark.parametrize("budget", [4, 99], ids=["some positions", "all positions"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_images_and_their_positions_in_any_company(how, budget):
    x = pictures(sum(SIZES))
    kept, outputs, rows = maps([(part,) for part in x.split(SIZES)], budget)
    parts = list(kept.parts(CHOSEN, **how))
    assert sorted(check_parts(parts, x, outputs, rows)) == CHOSEN.tolist()
    if "count" in how:
        assert len(parts) == how["count"]
    pieces = [piece for part in parts for piece in part.split(1)]
    assert all(len(piece.images) <= 1 for piece in pieces)
    assert sorted(check_parts(pieces, x, outputs, rows)) == CHOSEN.tolist()


def test_without_a_generator_in_order_and_with_one_as_it_says():
    kept = kept_images(pictures(12).split(5))
    assert [part.images.tolist() for part in kept.parts(CHOSEN, size=4)] == [[0, 2, 4, 5], [9, 11]]
    orders = [
        [part.images.tolist() for part in kept.parts(CHOSEN, size=6, generator=torch.Generator().manual_seed(seed))]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def tensors(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    return list(batch.values()) if isinstance(batch, dict) else batch


@pytest.mark.parametrize("what", ["dict", "shapes", "tuple"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_batches_that_have_to_stay_together(what, how):
    inputs = [torch.randn(size, 3 + (place if what == "shapes" else 0)) for place, size in enumerate(SIZES)]
    batches = [{"dict": {"x": x}, "tuple": [x, x]}.get(what, x) for x in inputs]
    kept, draw, outputs = kept_images([]), PositionDraw(None, 4, 0), [torch.randn(size, 5, 3, 3) for size in SIZES]
    rows = []
    for batch, output in zip(batches, outputs, strict=True):
        drawn = draw(output)
        kept.append(Inputs(batch, drawn))
        rows.append(drawn.rows(output).reshape(len(output), -1, 5))
    rows = torch.cat(rows)
    assert kept.groups().tolist() == [0] * 5 + [1] * 3 + [2] * 4
    seen = []
    for part in kept.parts(CHOSEN, **how):
        if len(part.images):
            batch = int(kept.groups()[part.images[0]])
            assert all(map(torch.equal, tensors(part.batch), tensors(batches[batch])))
            assert torch.equal(part.rows(outputs[batch]), rows[part.images].flatten(0, 1))
            assert list(part.split(1)) == [part]
        seen += part.images.tolist()
    if "count" in how and how["count"] < len(SIZES):
        return
    assert sorted(seen) == CHOSEN.tolist()


def test_loaders_may_overwrite_their_batches():
    buffer, kept = torch.zeros(4, 3), kept_images([])
    for value in (1.0, 2.0):
        buffer.fill_(value)
        kept.append(Inputs(buffer, kept_images([buffer])._batches[0][1]))
    (part,) = kept.parts(torch.arange(8))
    assert part.batch[:, 0].tolist() == [1.0] * 4 + [2.0] * 4


def test_images_made_in_inference_mode_can_be_run_with_gradients():
    with torch.inference_mode():
        kept = kept_images([pictures(4), pictures(3)])
    (part,) = kept.parts(torch.arange(7))
    assert not part.batch.is_inference()


def test_what_does_not_fit_in_memory_is_said_once(caplog):
    batches = pictures(20).split(5)
    with caplog.at_level(logging.WARNING):
        kept = kept_images(batches, most_bytes=2 * 5 * 3 * 64 * 4)
    assert len(kept) == 10 and kept.full
    assert [record.getMessage() for record in caplog.records] == [
        "layers are corrected by the first 10 images only: more do not fit in memory"
    ]
    assert check_parts(kept.parts(torch.arange(10), size=3), pictures(20), torch.zeros(20, 5), torch.zeros(20, 1, 5))


def test_no_images():
    kept = kept_images([])
    assert len(kept) == 0 and kept.groups().tolist() == []
    assert [len(part.images) for part in kept.parts(torch.arange(0), count=3)] == [0, 0, 0]
    assert list(kept.parts(torch.arange(0))) == []


def test_views_of_images_are_these_images():
    x = pictures(6)
    (part,) = kept_images([x]).parts(torch.arange(6))
    view = part.seen(lambda images: images + 1)
    assert torch.equal(view.batch, x + 1) and torch.equal(view.images, part.images) and torch.equal(part.batch, x)


def test_half_of_the_images_are_mirrored():
    x = pictures(200)
    torch.manual_seed(0)
    out = flipped(x)
    mirrored = [torch.equal(view, image.flip(-1)) for view, image in zip(out, x, strict=True)]
    same = [torch.equal(view, image) for view, image in zip(out, x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True)) and 70 < sum(mirrored) < 130
    torch.manual_seed(0)
    assert torch.equal(flipped(x), out)


@pytest.mark.parametrize("outputs", [1, 8], ids=["a bag", "two of each"])
def test_tensors_that_are_not_one_image_an_entry_stay_together(outputs):
    kept = kept_images([])
    for batch in torch.randn(3, 4, 2):
        kept.append(Inputs(batch, PositionDraw(None, None, 0)(torch.randn(outputs, 5))))
    assert kept.groups().tolist() == [number for number in range(3) for _ in range(outputs)]


def test_a_tuple_with_a_field_called_values_is_kept():
    kept, batch = kept_images([]), Named(torch.randn(4, 2), torch.ones(4))
    kept.append(Inputs(batch, PositionDraw(None, None, 0)(torch.randn(4, 5))))
    (part,) = kept.parts(torch.arange(4))
    assert torch.equal(part.batch.values, batch.values) and not kept.full


@pytest.mark.parametrize("batch", [{"x": torch.zeros(2, 3)}, torch.zeros(2, 3)], ids=["dict", "rows"])
def test_what_cannot_be_mirrored_is_said(batch):
    with pytest.raises(CATError, match='augment="flip" mirrors batches that are one tensor of images'):
        flipped(batch)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_batches_without_images_are_nothing(place):
    x = pictures(6)
    parts = [x[:2], x[2:]]
    expected, outputs, rows = maps([(part,) for part in parts])
    parts.insert(place, x[:0])
    kept, draw, start = kept_images([]), PositionDraw(None, 4, 0), 0
    for part in parts:
        output = outputs[start : start + len(part)]
        drawn = draw(output)
        assert drawn.means(output).shape == (len(part), 5)
        kept.append(Inputs(part, drawn))
        start += len(part)
    assert len(kept) == len(expected) == 6
    check_parts(kept.parts(torch.arange(6), size=4), x, outputs, rows)
