import copy
import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from cat_plugin import CATConfig, CATWrapper, apply_cat, fit_cluster_affine
from tests.cat_plugin.helpers import SmallNet, copied, images, model_pair, state_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


class ConvNet(nn.Module):
    """One convolution inside a block, pooled, to logits (N, 10), from images (N, 3, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU())
        self.last = nn.Linear(24, 10)

    def forward(self, x, temperature=None):
        logits = self.last(self.body(x).mean((2, 3)))
        return logits if temperature is None else logits / temperature


def conv_images(n_images, seed=0):
    return torch.randn(n_images, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def conv_pair():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fp = ConvNet().eval().to(DEVICE)
        fp.last.weight.data *= 10
    quantized = copy.deepcopy(fp)
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.copy_((parameter * 6).round() / 6)
        quantized.last.weight[:, :3] = 0
    return quantized, fp


CONFIGS = {
    "clusters": CATConfig.paper(5, alpha=1.0),
    "low rank": CATConfig(num_clusters=1),
    "both": CATConfig(num_clusters=4),
}


@functools.cache
def fit(name):
    """A hooked model, its wrapper, the baked module, fresh images and what the hooked model gives for them."""
    quantized, fp = conv_pair()
    cat_model = apply_cat(quantized, fp, conv_images(300), config=CONFIGS[name])
    fresh = conv_images(37, seed=1)
    with torch.no_grad(), cat_model.disabled():
        plain = quantized(fresh)
    with torch.no_grad():
        expected = quantized(fresh)
    assert (expected - plain).abs().max() > 0.01
    assert (cat_model.correction.mix is not None) == (name != "clusters")
    return quantized, cat_model, cat_model.bake().requires_grad_(False), fresh, expected


@pytest.fixture(params=CONFIGS)
def fitted(request):
    return fit(request.param)


def test_equals_the_hooked_model_which_stays_corrected(fitted):
    quantized, cat_model, baked, fresh, expected = fitted
    assert torch.equal(baked(fresh), expected)
    assert torch.equal(quantized(fresh), expected)
    assert torch.equal(cat_model(fresh), expected)
    with cat_model.disabled():
        assert torch.equal(baked(fresh), expected)
        assert torch.equal(cat_model.bake()(fresh), expected)
        assert not torch.equal(quantized(fresh), expected)


def test_compile_without_graph_breaks(fitted):
    *_, baked, fresh, expected = fitted
    compiled = torch.compile(baked, backend="eager", fullgraph=True, dynamic=True)
    for n_images in (5, 37):
        torch.testing.assert_close(compiled(fresh[:n_images]), expected[:n_images], **TOLERANCE)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="the default backend needs a compiler")
def test_compile_with_the_default_backend():
    *_, baked, fresh, expected = fit("both")
    torch.testing.assert_close(torch.compile(baked)(fresh), expected, **TOLERANCE)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export_with_any_number_of_images(fitted, strict):
    *_, baked, fresh, expected = fitted
    dynamic = ({0: torch.export.Dim("images", min=1)},)
    program = torch.export.export(baked, (conv_images(4),), dynamic_shapes=dynamic, strict=strict)
    for n_images in (1, 5, 37):
        torch.testing.assert_close(program.module()(fresh[:n_images]), expected[:n_images], **TOLERANCE)


def onnx_outputs(module, example, batches, path):
    """What ONNX Runtime gives for each of the `batches`, after an export with another one."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    dynamic = ({0: torch.export.Dim("images", min=1)},)
    torch.onnx.export(module, (example,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.shape[0]) == ("x", "images")
    return [torch.from_numpy(session.run(None, {"x": batch.cpu().numpy()})[0]) for batch in batches]


def test_onnx_runtime_with_any_number_of_images(fitted, tmp_path):
    *_, baked, fresh, expected = fitted
    sizes = (1, 5, 37)
    found = onnx_outputs(baked, conv_images(4), [fresh[:size] for size in sizes], tmp_path / "model.onnx")
    for logits, size in zip(found, sizes, strict=True):
        torch.testing.assert_close(logits, expected[:size].cpu(), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, tmp_path):
    quantized, fp = (model.to(dtype) for model in conv_pair())
    cat_model = apply_cat(quantized, fp, conv_images(300))
    baked, fresh = cat_model.bake(), conv_images(37, seed=1).to(dtype)
    with torch.no_grad():
        expected = quantized(fresh)
        assert expected.dtype == dtype and torch.equal(baked(fresh), expected)
        dynamic = ({0: torch.export.Dim("images", min=1)},)
        program = torch.export.export(baked, (conv_images(4).to(dtype),), dynamic_shapes=dynamic)
        assert torch.equal(program.module()(fresh), expected)
        assert torch.equal(torch.compile(baked, backend="eager")(fresh), expected)
        if dtype == torch.float16:  # numpy has no bfloat16 to give to ONNX Runtime
            (found,) = onnx_outputs(baked, conv_images(4).to(dtype), [fresh], tmp_path / "model.onnx")
            # The network itself is rounded otherwise there.
            torch.testing.assert_close(found, expected.cpu(), atol=4e-3, rtol=2e-3)


def test_half_of_the_baked_module_does_not_round_the_correction():
    cat_model = apply_cat(*conv_pair(), conv_images(300))
    baked = cat_model.bake().half()
    assert baked.correction.scale.dtype == torch.float32
    assert baked(conv_images(3).half()).dtype == torch.float16
    assert cat_model.quantized_model.last.weight.dtype == torch.float16  # shared, as documented


def test_weights_are_shared_and_the_model_is_as_before():
    quantized, fp = conv_pair()
    cat_model = apply_cat(quantized, fp, conv_images(300), config=CONFIGS["both"])
    before = state_of(quantized)
    baked = cat_model.bake()
    baked(conv_images(3))
    assert state_of(quantized) == before
    assert {p.data_ptr() for p in baked.parameters()} == {p.data_ptr() for p in quantized.parameters()}
    assert baked.correction is not cat_model.correction
    with torch.no_grad():
        quantized.last.bias.add_(1)
    assert torch.equal(baked(conv_images(3)), quantized(conv_images(3)))


def test_baked_stays_after_remove_and_can_be_made_then():
    quantized, fp = conv_pair()
    fresh = conv_images(37, seed=1)
    with torch.no_grad():
        plain, before = quantized(fresh), state_of(quantized)
        cat_model = apply_cat(quantized, fp, conv_images(300))
        expected, baked = quantized(fresh), cat_model.bake()
        cat_model.remove()
        assert torch.equal(baked(fresh), expected)
        assert torch.equal(cat_model.bake()(fresh), expected)
        assert torch.equal(quantized(fresh), plain)
    assert state_of(quantized) == before


def test_no_deepcopy_of_the_model():
    class Frozen(SmallNet):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    quantized = Frozen().eval()
    cat_model = apply_cat(quantized, model_pair()[1], images(300), config=CATConfig.paper(3))
    assert torch.equal(cat_model.bake()(images(9)), quantized(images(9)))


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_stay_corrected(fitted, how):
    *_, baked, fresh, expected = fitted
    clone = copied(baked, how)
    assert {p.data_ptr() for p in clone.parameters()}.isdisjoint(p.data_ptr() for p in baked.parameters())
    with torch.no_grad():
        clone.quantized_model.last.bias.add_(1)
        clone.correction.shift.add_(1)
    assert torch.equal(baked(fresh), expected)
    assert not torch.allclose(clone(fresh), expected)
    assert torch.export.export(clone, (fresh,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def test_saved_module_loads_in_a_new_process(tmp_path):
    *_, baked, fresh, expected = fit("both")
    torch.save((baked, fresh, expected), tmp_path / "baked.pt")
    code = (
        "import sys, torch\n"
        "baked, x, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(baked(x), expected)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "baked.pt"], check=True, env=environment)


def test_state_dict_holds_the_correction(fitted):
    quantized, _, baked, fresh, expected = fitted
    state = {name: value.clone() for name, value in baked.state_dict().items()}
    names = [f"quantized_model.{name}" for name in quantized.state_dict()]
    assert set(state) == {*names, *(f"correction.{name}" for name, _ in baked.correction.named_buffers())}
    other = copy.deepcopy(baked)
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(fresh), expected)


def test_fx_takes_the_exported_graph_and_never_drops_the_correction(fitted):
    *_, baked, fresh, expected = fitted
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(baked)
    graph = torch.export.export(baked, (fresh,)).module()
    assert isinstance(graph, torch.fx.GraphModule)
    assert torch.equal(graph(fresh), expected)
    assert torch.equal(baked.forward(fresh), expected)


def test_arguments_of_the_model(fitted):
    quantized, _, baked, fresh, _ = fitted
    for arguments, named in [((fresh,), {"temperature": 2.0}), ((fresh, 2.0), {}), ((), {"x": fresh})]:
        assert torch.equal(baked(*arguments, **named), quantized(*arguments, **named))
    program = torch.export.export(baked, (), {"x": fresh}, dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    assert torch.equal(program.module()(x=fresh[:3]), baked(fresh[:3]))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        baked()


class Containers(SmallNet):
    """Logits among other things, in one container or another."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        logits = super().forward(x)
        if self.kind == "dict":
            return {"hidden": self.first(x), "logits": logits}
        return (logits, x.sum()) if self.kind == "tuple" else (self.first(x), {"y": (logits,)})


OUTPUTS = {
    "dict": (None, lambda output: output["logits"]),
    "tuple": (None, lambda output: output[0]),
    "pair": (
        (lambda output: output[1]["y"][0], lambda output, logits: (output[0], {"y": (logits,)})),
        lambda output: output[1]["y"][0],
    ),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_containers(kind):
    output, logits = OUTPUTS[kind]
    model = Containers(kind).eval()
    correction = fit_cluster_affine(*(torch.randn(60, 10) for _ in range(2)), CATConfig.paper(3))
    baked = CATWrapper(model, correction, output=output).bake()
    x = images(9)
    expected = model(x)
    assert torch.equal(logits(expected), correction(SmallNet.forward(model, x)))
    program = torch.export.export(baked, (images(4),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    compiled = torch.compile(baked, backend="eager", fullgraph=True)
    for way in (baked, program.module(), compiled):
        torch.testing.assert_close(way(x), expected, **TOLERANCE)


def test_hooks_of_others_act_too():
    quantized, fp = conv_pair()
    quantized.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    quantized.register_forward_hook(lambda module, args, output: output * 3)
    quantized.body.register_forward_hook(lambda module, args, output: output * 0.9)
    cat_model = apply_cat(quantized, fp, conv_images(300), config=CONFIGS["both"])
    fresh = conv_images(9)
    assert torch.equal(cat_model.bake()(fresh), quantized(fresh))


def test_compiled_in_place():
    quantized, fp = conv_pair()
    cat_model = apply_cat(quantized, fp, conv_images(300), config=CONFIGS["clusters"])
    fresh = conv_images(9)
    expected = quantized(fresh)
    quantized.compile(backend="eager")
    torch.testing.assert_close(quantized(fresh), expected)
    torch.testing.assert_close(cat_model.bake()(fresh), expected)


def test_training_mode_is_that_of_the_model():
    quantized, _ = model_pair()
    correction = fit_cluster_affine(*(torch.randn(50, 10) for _ in range(2)), CATConfig.paper(2))
    assert CATWrapper(quantized, correction).bake().training
    assert not CATWrapper(SmallNet().eval(), correction).bake().training
    assert repr(CATWrapper(SmallNet(), correction).bake()).startswith("BakedCAT(\n  (quantized_model): SmallNet(")
