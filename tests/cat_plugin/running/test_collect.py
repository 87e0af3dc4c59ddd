import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cat_plugin import CATConfig, CATError, CATWrapper, ClusterAffine, apply_cat
from cat_plugin.correction.hook import find_hooks
from cat_plugin.running.collect import collect_outputs
from cat_plugin.running.models import check_models
from tests.cat_plugin.helpers import SmallNet, images, model_pair, state_of


def test_pairs_equal_separate_runs():
    quantized, fp = model_pair()
    x, y = images(70), torch.arange(70) % 10
    pairs = collect_outputs(quantized, fp, DataLoader(TensorDataset(x, y), 32), progress=False)
    with torch.no_grad():
        torch.testing.assert_close(pairs.q, quantized.eval()(x))
        torch.testing.assert_close(pairs.f, fp.eval()(x))
    assert torch.equal(pairs.targets, y)
    assert not pairs.q.requires_grad


def test_targets_need_every_batch_to_be_labelled():
    quantized, fp = model_pair()
    assert collect_outputs(quantized, fp, [(images(8), torch.arange(8)), images(8)]).targets is None


def test_model_that_reuses_its_output():
    class Static(SmallNet):
        def forward(self, x):
            return self.__dict__.setdefault("out", torch.empty(4, 10)).copy_(super().forward(x))

    quantized, fp = Static(), model_pair()[1]
    pairs = collect_outputs(quantized, fp, images(8), batch_size=4)
    assert not torch.equal(pairs.q[:4], pairs.q[4:])


def test_half_model_gets_half_inputs():
    fp = SmallNet()
    pairs = collect_outputs(copy.deepcopy(fp).to(torch.bfloat16), fp, images())
    assert pairs.q.dtype == pairs.f.dtype == torch.float32
    torch.testing.assert_close(pairs.q, pairs.f, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_models_and_inputs_of_different_dtypes(dtype):
    fp = SmallNet()
    quantized, x = copy.deepcopy(fp).to(dtype), images()
    expected = collect_outputs(quantized, fp, x)
    for given in (torch.float16, torch.float64):
        pairs = collect_outputs(quantized, fp, x.to(given))
        torch.testing.assert_close((pairs.q, pairs.f), (expected.q, expected.f), atol=0.01, rtol=0.01)


def test_progress_bar_goes_to_stderr(capsys):
    collect_outputs(*model_pair(), images(), batch_size=48, progress=True)
    assert "collecting logits: 100%" in capsys.readouterr().err


class Broken(Exception):
    pass


class FailsAt(SmallNet):
    """Raises in its forward pass number `at`."""

    def __init__(self, at):
        super().__init__()
        self.countdown = at

    def forward(self, x):
        self.countdown -= 1
        if self.countdown < 0:
            raise Broken
        return super().forward(x)


def _failing_loader(at):
    for batch in itertools.islice(images().split(16), at):
        torch.rand(1)
        yield batch
    raise Broken


def _mixed(model):
    """Training mode but for one frozen batch norm, with gradients and a foreign hook."""
    model.train()
    model(images()).sum().backward()
    model.norm.eval()
    model.last.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("at", [0, 2, 5], ids=lambda at: f"batch {at}")
@pytest.mark.parametrize("culprit", ["loader", "quantized_model", "fp_model"])
def test_state_is_restored_after_a_failure(culprit, at):
    quantized, fp = (_mixed(model) for model in model_pair())
    if culprit == "quantized_model":
        quantized = _mixed(FailsAt(at + 1))
    if culprit == "fp_model":
        fp = _mixed(FailsAt(at + 1))
    loader = _failing_loader(at) if culprit == "loader" else images()
    before = state_of(quantized, fp)
    with pytest.raises(Broken):
        apply_cat(quantized, fp, loader, batch_size=16)
    assert state_of(quantized, fp) == before


@pytest.mark.parametrize("at", [0, 2, 5], ids=lambda at: f"batch {at}")
@pytest.mark.parametrize("culprit", ["loader", "plain pass", "corrected pass", "fp_model"])
def test_state_is_restored_after_a_failure_of_the_evaluation(culprit, at):
    quantized, fp = (_mixed(model) for model in model_pair())
    calibration = 6  # batches, one pass each through both models
    before_evaluation = 1 + calibration  # _mixed makes a pass, too
    looked_at = culprit != "loader"  # a generator is not
    if culprit == "fp_model":
        fp = _mixed(FailsAt(before_evaluation + looked_at + at))
    if culprit.endswith("pass"):  # the quantized model runs twice a batch, without the correction and with it
        quantized = _mixed(FailsAt(before_evaluation + 2 * at + (culprit == "corrected pass")))
    batches = list(zip(images().split(16), (torch.arange(96) % 10).split(16), strict=True))
    loader = batches if culprit != "loader" else ((x, torch.arange(16) % 10) for x in _failing_loader(at))
    before = state_of(quantized, fp)
    with pytest.raises(Broken):
        apply_cat(quantized, fp, images(), eval_loader=loader, batch_size=16)
    assert state_of(quantized, fp) == before
    assert not find_hooks(quantized)


def test_state_is_restored_after_success():
    quantized, fp = (_mixed(model) for model in model_pair())
    loader = DataLoader(TensorDataset(images(), torch.arange(96) % 10), 16, shuffle=True)
    before = state_of(quantized, fp)
    cat_model = apply_cat(quantized, fp, loader, eval_loader=loader)
    cat_model.remove()
    assert state_of(quantized, fp) == before


class CallsForward(SmallNet):
    def __call__(self, x):
        return self.forward(x)


class Poisoned(SmallNet):
    def forward(self, x):
        out = super().forward(x)
        out[1, :3], out[2, 0] = float("nan"), float("inf")
        return out


class Pair(SmallNet):
    def forward(self, x):
        return super().forward(x), x


def _shared_pair():
    fp = SmallNet()
    quantized = copy.deepcopy(fp)
    quantized.last.bias = fp.last.bias
    quantized.first.weight.data = fp.first.weight.data
    return quantized, fp


def _views_pair():
    """Overlapping views of one allocation that start at different places."""
    quantized, fp = model_pair()
    flat = torch.randn(101)
    fp.first.weight.data = flat[:96].view(16, 6)
    quantized.first.weight.data = flat[5:].view(16, 6)
    return quantized, fp


def _shared_buffer_pair():
    quantized, fp = model_pair()
    quantized.norm.running_mean = fp.norm.running_mean
    return quantized, fp


def _sparse_buffer_pair():
    quantized, fp = _shared_buffer_pair()
    quantized.register_buffer("graph", torch.eye(3).to_sparse(), persistent=False)
    fp.register_buffer("graph", torch.eye(3).to_sparse_csr(), persistent=False)
    return quantized, fp


def _attached_pair():
    quantized, fp = model_pair()
    CATWrapper(quantized, ClusterAffine.identity(10))
    return quantized, fp


def _same():
    model = SmallNet()
    return model, model


ERRORS = {
    "empty loader": (model_pair, [], "the loader yielded no images"),
    "other classes": (
        lambda: (SmallNet(10), SmallNet(7)),
        images(),
        r"quantized_model \(64, 10\), fp_model \(64, 7\); expected the same classes",
    ),
    "not logits": (lambda: (SmallNet(), Pair()), images(), r"fp_model returned a tuple of 2: \(Tensor \(64, 10\)"),
    "not 2-D": (lambda: (nn.Flatten(0), SmallNet()), images(), r"quantized_model returned a tensor of shape \(384,\)"),
    "NaN": (
        lambda: (Poisoned(), SmallNet()),
        images(),
        "quantized_model gave 8 NaN or infinite logits, in 4 of 96 images",
    ),
    "NaN in FP": (lambda: (SmallNet(), Poisoned()), images(), "fp_model gave 8 NaN or infinite logits"),
    "same object": (_same, images(), "quantized_model and fp_model are the same object"),
    "shared storage": (
        _shared_pair,
        images(),
        "shares 2 of its parameters and buffers with fp_model, such as 'first.weight'",
    ),
    "views of one buffer": (
        _views_pair,
        images(),
        "shares 1 of its parameters and buffers with fp_model, such as 'first.weight'",
    ),
    "shared buffer beside sparse ones": (
        _sparse_buffer_pair,
        images(),
        "shares 1 of its .* such as 'norm.running_mean'",
    ),
    "shared buffer": (_shared_buffer_pair, images(), "shares 1 of its .* such as 'norm.running_mean'"),
    "no module": (lambda: (SmallNet(), torch.relu), images(), "fp_model is a builtin_function_or_method; expected a"),
    "no module, quantized": (lambda: (None, SmallNet()), images(), "quantized_model is a NoneType; expected a"),
    "attached": (_attached_pair, images(), r"CAT is already attached to this SmallNet; call remove\(\)"),
    "hook bypassed": (
        lambda: (CallsForward(), SmallNet()),
        images(),
        "the forward hook on quantized_model never fired for a batch",
    ),
    "too few images": (model_pair, images(3), "n_images=3 should be >= num_clusters=64; lower num_clusters or give"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_leave_no_trace(case):
    make, loader, message = ERRORS[case]
    quantized, fp = make()
    models = [model for model in (quantized, fp) if isinstance(model, nn.Module)]
    before = state_of(*models)
    with pytest.raises(CATError, match=message):
        apply_cat(quantized, fp, loader, config=CATConfig.paper())
    assert state_of(*models) == before


def test_constants_of_one_number_and_tensors_without_memory_may_be_shared():
    quantized, fp = model_pair()
    for name, constant in (("eps", torch.tensor(1e-5)), ("one", torch.ones(1)), ("none", torch.empty(0))):
        for model in (quantized, fp):
            model.register_buffer(name, constant)
    check_models(quantized, fp)


class Opaque(torch.Tensor):
    """A wrapper without memory of its own, as the weights of quantization tools are."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(function)


class Wrapped(Opaque):
    def __tensor_flatten__(self):
        return ["inner"], None


@pytest.mark.parametrize(("kind", "found"), [(Opaque, False), (Wrapped, True)])
def test_sharing_inside_of_tensor_subclasses(kind, found):
    quantized, fp = model_pair()
    quantized.register_buffer("packed", kind(fp.first.weight.detach().flatten()[1:]))
    with pytest.raises(CATError, match="such as 'packed'") if found else contextlib.nullcontext():
        check_models(quantized, fp)
    quantized.packed = kind(torch.ones(95))
    check_models(quantized, fp)


def test_bypassed_hook_is_found_on_the_first_batch():
    batches = iter(images().split(16))
    with pytest.raises(CATError, match="never fired"):
        collect_outputs(CallsForward(), SmallNet(), batches)
    assert len(list(batches)) == 5


def test_hook_that_stops_firing_is_found():
    class Sometimes(SmallNet):
        calls = 0

        def __call__(self, x):
            self.calls += 1
            return super().__call__(x) if self.calls < 3 else self.forward(x)

    with pytest.raises(CATError, match="never fired"):
        collect_outputs(Sometimes(), SmallNet(), images(), batch_size=16)
