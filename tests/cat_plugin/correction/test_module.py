import pytest
import torch
from torch import nn

from cat_plugin import CATError, ClusterAffine

# Two clusters, told by the sign of the difference of both logits.
TABLE = {
    "weight": torch.tensor([[1.0, -1.0], [-1.0, 1.0]]),
    "bias": torch.zeros(2),
    "scale": torch.tensor([[2.0, 3.0], [1.0, 0.5]]),
    "shift": torch.tensor([[0.5, -1.0], [0.0, 10.0]]),
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def correction():
    return ClusterAffine(**{name: value.clone() for name, value in TABLE.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_table_computed_by_hand(correction, dtype):
    q = torch.tensor([[3.0, 1.0], [1.0, 4.0], [-2.0, -4.0]], dtype=dtype)
    before = q.clone()
    assert correction.assign(q).tolist() == [0, 1, 0]
    out = correction(q)
    assert torch.equal(out, torch.tensor([[6.5, 2.0], [1.0, 12.0], [-3.5, -13.0]], dtype=dtype))
    assert out.dtype == dtype
    assert torch.equal(q, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "make", [lambda: ClusterAffine(**TABLE), lambda: ClusterAffine.identity(2)], ids=["K=2", "K=1"]
)
@pytest.mark.parametrize("n_images", [0, 1])
def test_small_batches(make, dtype, n_images):
    out = make()(torch.ones(n_images, 2, dtype=dtype))
    assert out.shape == (n_images, 2)
    assert out.dtype == dtype


def test_half_is_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=generator) for shape in [(10, 8), (8,), (8, 10), (8, 10)]]
    correction = ClusterAffine(*parts)
    q = torch.randn(200, 10, generator=generator).to(torch.bfloat16)
    assert torch.equal(correction(q), correction(q.float()).to(torch.bfloat16))
    torch.testing.assert_close(correction(q.float()), correction(q.double()).float())


def test_autocast_does_not_move_images_to_other_clusters():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=generator) for shape in [(10, 64), (64,), (64, 10), (64, 10)]]
    correction = ClusterAffine(*parts)
    q = torch.randn(2000, 10, generator=generator)
    expected = correction(q)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(correction(q), expected)


def test_identity_changes_nothing():
    q = torch.randn(5, 4)
    assert torch.equal(ClusterAffine.identity(4)(q), q)


def test_sizes(correction):
    assert (correction.num_clusters, correction.num_classes) == (2, 2)
    assert correction.num_parameters == 4 + 2 + 4 + 4
    assert correction.num_bytes == 4 * 14
    assert repr(correction) == "ClusterAffine(clusters=2, classes=2, 56 bytes)"
    assert list(correction.parameters()) == []
    assert list(correction.state_dict()) == ["weight", "bias", "scale", "shift"]


def test_half_of_a_surrounding_model_does_not_round_the_correction(correction):
    nn.Sequential(correction).half()
    assert correction.scale.dtype == torch.float32
    assert correction.to("meta").scale.device.type == "meta"
    assert correction(torch.ones(3, 2, device="meta")).shape == (3, 2)


def large_correction(seed=0):
    """Twelve clusters of 30 classes with scores and components that float16 does not hold."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "weight": (30, 12),
        "bias": (12,),
        "scale": (12, 30),
        "shift": (12, 30),
        "project": (30, 3),
        "mix": (3, 30),
    }
    parts = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    parts["bias"] *= 3e5
    parts["weight"] *= 3e4
    parts["bias"][5] = -torch.inf
    parts["project"] *= torch.tensor([1e5, 1e-7, 0])
    parts["mix"] *= torch.tensor([1e-6, 1e6, 1]).unsqueeze(1)
    return ClusterAffine(**parts)


def test_half_halves_the_bytes_and_keeps_the_outputs():
    wide, narrow = large_correction(), large_correction()
    assert narrow.half() is narrow
    assert narrow.num_bytes == wide.num_bytes / 2
    assert {buffer.dtype for buffer in narrow.buffers()} == {torch.float16}
    q = 5 * torch.randn(4000, 30, generator=torch.Generator().manual_seed(1))
    same = wide.assign(q) == narrow.assign(q)
    assert same.double().mean() > 0.99 and len(wide.assign(q).unique()) == 11
    torch.testing.assert_close(narrow(q)[same], wide(q)[same], atol=2e-2, rtol=2e-3)
    again = {name: buffer.clone() for name, buffer in narrow.named_buffers()}
    assert all(torch.equal(buffer, again[name]) for name, buffer in narrow.half().named_buffers())
    assert narrow.float().num_bytes == wide.num_bytes


@pytest.mark.parametrize("convert", [ClusterAffine.half, lambda correction: correction.to(torch.float16)])
def test_half_is_explicit_and_does_not_change_the_given_tensors(convert):
    parts = {name: value.clone() for name, value in TABLE.items()}
    correction = ClusterAffine(**parts)
    holder = nn.Sequential(correction)
    holder.half().to(torch.float16)
    assert correction.scale.dtype == torch.float32
    convert(correction)
    assert correction.scale.dtype == torch.float16
    assert all(torch.equal(parts[name], TABLE[name]) for name in TABLE)
    q = torch.tensor([[3.0, 1.0], [1.0, 4.0], [-2.0, -4.0]])
    assert torch.equal(correction(q), torch.tensor([[6.5, 2.0], [1.0, 12.0], [-3.5, -13.0]]))  # exact in float16


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (ClusterAffine.bfloat16, torch.bfloat16),
        (ClusterAffine.double, torch.float64),
        (lambda c: c.to("cpu", torch.float64), torch.float64),
        (lambda c: c.to(dtype=torch.bfloat16), torch.bfloat16),
        (lambda c: c.to("cpu"), torch.float32),
        (lambda c: c.to(torch.zeros(1, dtype=torch.float64)), torch.float32),
    ],
)
def test_other_types(correction, convert, dtype):
    assert {buffer.dtype for buffer in convert(correction).buffers()} == {dtype}


def test_half_of_one_cluster_without_scores():
    q = torch.randn(5, 4)
    assert torch.equal(ClusterAffine.identity(4).half()(q), q)


def test_what_half_cannot_hold_is_an_error_and_changes_nothing(correction):
    correction.shift[1, 0] = 1e5
    with pytest.raises(CATError, match=r"shift reaches 1e\+05, too large for torch.float16; bfloat16\(\) takes it"):
        correction.half()
    assert {buffer.dtype for buffer in correction.buffers()} == {torch.float32}
    assert correction.bfloat16().shift[1, 0].item() == pytest.approx(1e5, rel=1e-2)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (torch.ones(3, 4), r"got logits of shape \(3, 4\) and dtype torch.float32; .* floating-point \(N, 2\)"),
        (torch.ones(2), r"got logits of shape \(2,\)"),
        (torch.ones(3, 2, dtype=torch.int64), "dtype torch.int64"),
        (torch.ones(3, 2, device="meta"), "logits are on meta, the correction on cpu"),
    ],
)
def test_wrong_logits(correction, q, message):
    with pytest.raises(CATError, match=message):
        correction(q)


@pytest.mark.parametrize("name", TABLE)
def test_wrong_buffers(name):
    with pytest.raises(CATError, match=rf"{name} \(3, 5\).*; expected weight \(C, K\)"):
        ClusterAffine(**{**TABLE, name: torch.zeros(3, 5)})


@pytest.mark.parametrize("clusters", [1, 6])
def test_export_with_any_number_of_images(clusters):
    parts = [torch.randn(shape) for shape in [(4, clusters), (clusters,), (clusters, 4), (clusters, 4)]]
    correction = ClusterAffine(*parts)
    dynamic = ({0: torch.export.Dim("images", min=1)},)
    program = torch.export.export(correction, (torch.randn(8, 4),), dynamic_shapes=dynamic)
    for n_images in (1, 3, 50):
        q = torch.randn(n_images, 4)
        torch.testing.assert_close(program.module()(q), correction(q))


@pytest.mark.parametrize("clusters", [1, 6])
def test_compile_without_graph_breaks(clusters):
    parts = [torch.randn(shape) for shape in [(4, clusters), (clusters,), (clusters, 4), (clusters, 4)]]
    correction = ClusterAffine(*parts)
    q = torch.randn(8, 4)
    torch.testing.assert_close(torch.compile(correction, backend="eager", fullgraph=True)(q), correction(q))


def shared_correction(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (4, 3), "bias": (3,), "scale": (3, 4), "shift": (3, 4), "project": (4, 2), "mix": (2, 4)}
    parts = {name: torch.randn(*shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    return ClusterAffine(**parts), parts


def test_shared_map_adds_to_the_clusters():
    correction, parts = shared_correction()
    q = torch.randn(7, 4, dtype=torch.float64)
    out = correction(q)
    for image in range(7):
        row = q[image]
        cluster = max(range(3), key=lambda k: float(row @ parts["weight"][:, k] + parts["bias"][k]))
        for c in range(4):
            expected = row[c] * parts["scale"][cluster, c] + parts["shift"][cluster, c]
            for r in range(2):
                expected = expected + sum(row[d] * parts["project"][d, r] for d in range(4)) * parts["mix"][r, c]
            assert out[image, c].item() == pytest.approx(expected.item())
    assert correction.num_parameters == sum(part.numel() for part in parts.values())
    assert "rank=2, " in repr(correction)


def test_shared_map_exports_and_takes_half_precision():
    correction, _ = shared_correction(dtype=torch.float32)
    q = torch.randn(6, 4)
    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(correction, (q,), dynamic_shapes=(batch,)).module()
    fresh = torch.randn(9, 4)
    torch.testing.assert_close(exported(fresh), correction(fresh))
    assert correction(q.half()).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(correction(q), correction.double()(q.double()).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"project": torch.ones(4, 3)},
        {"mix": None},
        {"project": None},
        {"mix": torch.ones(2, 5)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_shared_map(wrong):
    _, parts = shared_correction()
    with pytest.raises(CATError, match=r"where there is a shared map project \(C, R\) with mix \(R, C\)"):
        ClusterAffine(**{**parts, **wrong})
