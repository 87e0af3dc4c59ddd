from pathlib import Path

import pytest
import torch

from cat_plugin import CATError
from cat_plugin.fitting import store as module
from cat_plugin.fitting.store import LogitStore, different_images, groups_of_alike
from cat_plugin.running.digests import output_keys

Q, F = (torch.randn(100, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


@pytest.fixture(params=[10**6, 500, 0], ids=["memory", "files", "files from the start"])
def filled(request):
    with LogitStore(request.param) as store:
        for start in range(0, 100, 30):
            store.append(*(part[start : start + 30] for part in (Q, F)))
        yield store


def test_rows_come_back_as_they_went(filled):
    assert (len(filled), filled.classes, filled.dtype) == (100, 5, torch.float32)
    for rows in (torch.arange(100), torch.tensor([99, 3, 4, 5, 4, 0]), torch.tensor([], dtype=torch.int64)):
        for part, expected in zip(filled.take(rows), (Q, F), strict=True):
            assert part.dtype == torch.float64
            assert torch.equal(part, expected[rows].double())


def test_chunks_are_all_rows_in_order(filled, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_VALUES", 10 * 40)
    chunks = list(filled.chunks())
    assert [len(q) for q, _ in chunks] == [40, 40, 20]
    for part, expected in zip(zip(*chunks, strict=True), (Q, F), strict=True):
        assert torch.equal(torch.cat(part), expected.double())


def test_files_are_deleted():
    with pytest.raises(KeyError), LogitStore(0) as store:
        store.append(Q, F)
        folder = Path(store._folder.name)
        assert len(list(folder.iterdir())) == 2
        raise KeyError
    assert not folder.exists()


def test_float64_stays_float64():
    store = LogitStore.of(Q.double() / 3, F.double())
    assert store.dtype == torch.float64
    assert torch.equal(store.take(torch.arange(100))[0], Q.double() / 3)


def test_keys_tell_images_apart_by_all_their_logits():
    changed = Q.clone()
    changed[7, 4] += 0.01
    keys, others = (LogitStore.of(q, F).keys() for q in (Q, changed))
    assert keys.shape == (100, 2)
    assert (keys != others).any(dim=1).nonzero().tolist() == [[7]]
    assert len(keys.unique(dim=0)) == 100


@pytest.mark.parametrize(("rows", "width"), [(50, 5), (100, 4)], ids=["rows", "width"])
def test_batches_that_do_not_fit_together(rows, width):
    store = LogitStore()
    store.append(Q, F)
    with pytest.raises(CATError, match="expected one row an image, always as wide"):
        store.append(Q[:, :width], F[:rows, :width])


def test_rows_of_images_that_have_several():
    """Three images of 2, 3 and 1 rows, in two batches."""
    images = torch.tensor([0, 0, 1, 1, 1, 2])
    store = LogitStore()
    store.append(Q[:5], F[:5], images[:5])
    store.append(Q[5:6], F[5:6], images[5:])
    assert (len(store), store.num_images) == (6, 3)
    assert store.rows_per_image().tolist() == [2, 3, 1]
    rows, owners = store.rows_of(torch.tensor([2, 0]))
    assert rows.tolist() == [5, 0, 1]
    assert owners.tolist() == [0, 1, 1]
    expected = output_keys(*(torch.stack([part[:2].mean(0), part[2:5].mean(0), part[5]]) for part in (Q, F)))
    torch.testing.assert_close(store.keys(), expected)


def test_images_that_are_alike():
    keys = LogitStore.of(Q[[0, 1, 2, 0, 1, 0]], F[[0, 1, 2, 0, 1, 0]] * (1 + 1e-7)).keys()
    assert len(different_images(keys)) == 3
    first, second, third, *_ = groups = groups_of_alike(keys).tolist()
    assert groups == [first, second, third, first, second, first]
    assert len({first, second, third}) == 3
    other_target = LogitStore.of(Q[[0, 0]], F[[0, 1]]).keys()
    assert len(different_images(other_target)) == 2


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_what_all_outputs_have_in_common_makes_no_images_alike(offset):
    assert len(different_images(LogitStore.of(Q.double() + offset, F.double() + offset).keys())) == 100
    twice = LogitStore.of(*(torch.cat([part, part]).double() + offset for part in (Q, F)))
    assert len(different_images(twice.keys())) == 100
