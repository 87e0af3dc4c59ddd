from pathlib import Path

import pytest
import torch

from cat_plugin import CATError
from cat_plugin.fitting import store as module
from cat_plugin.fitting.processes import ALONE
from cat_plugin.fitting.store import LogitStore

Q, F = torch.randn(2, 100, 5, generator=torch.Generator().manual_seed(5))


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


def test_logits_that_are_given_stay_in_memory():
    wide = torch.randn(100, 300, dtype=torch.float64)
    store = LogitStore.of(wide, wide)
    assert store._folder is None


@pytest.mark.parametrize("q", [Q[:50], Q[:, :2]], ids=["rows", "width"])
def test_batches_that_do_not_fit_together(q):
    store = LogitStore()
    store.append(Q, F)
    with pytest.raises(CATError, match="expected one row an image, always as wide"):
        store.append(q, F if len(q) < 100 else q)


def test_rows_know_their_images():
    with LogitStore() as store:
        store.append(Q[:60], F[:60], torch.arange(3).repeat_interleave(20))
        store.append(Q[60:], F[60:], torch.arange(3, 5).repeat_interleave(20))
        assert (len(store), store.num_images) == (100, 5)
        assert torch.equal(store.images, torch.arange(5).repeat_interleave(20))
        with pytest.raises(CATError, match="some batches have one row an image and others several"):
            store.append(Q, F)
    plain = LogitStore.of(Q, F)
    assert plain.images is None and plain.num_images == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gathered_rows_are_all_rows_in_the_dtype_of_the_logits(dtype):
    owners = torch.arange(50).repeat_interleave(2)
    q, f, images = LogitStore.of(Q.to(dtype), F.to(dtype), owners).gathered(ALONE)
    assert q.dtype == f.dtype == dtype
    assert torch.equal(q, Q.to(dtype)) and torch.equal(f, F.to(dtype)) and torch.equal(images, owners)
    assert LogitStore.of(Q, F).gathered(ALONE)[2] is None
