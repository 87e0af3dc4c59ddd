import json
import logging
import re

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import cat_plugin
from cat_plugin import CATConfig, CATError, apply_cat, compare_accuracy, fit_cluster_affine
from tests.cat_plugin.helpers import held_out_scores, images, model_pair, state_of


@pytest.fixture
def pair():
    quantized, fp = model_pair()
    return quantized.eval(), fp.eval()


def test_applies_what_the_tensor_level_fits(pair):
    quantized, fp = pair
    x, config = images(400), CATConfig.paper(5)
    with torch.no_grad():
        q, f = quantized(x), fp(x)
    expected = fit_cluster_affine(q, f, config)(q)
    cat_model = apply_cat(quantized, fp, x, config=config, batch_size=128)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), expected)
    assert cat_model.config == config


def test_report(pair, caplog):
    quantized, fp = pair
    x = images(400)
    with torch.no_grad():
        q, f = quantized(x), fp(x)
    labels = f.argmax(dim=1)
    with caplog.at_level(logging.INFO, "cat_plugin"):
        cat_model = apply_cat(quantized, fp, [x], eval_loader=DataLoader(TensorDataset(x, labels), 64))
    report = cat_model.report
    correction = cat_model.correction
    assert (report.images, report.num_clusters, sum(report.cluster_sizes)) == (400, correction.num_clusters, 400)
    assert report.held_out == held_out_scores(q, f)
    assert report.added_parameters == sum(buffer.numel() for buffer in correction.buffers())
    assert report.added_bytes == 4 * report.added_parameters
    assert report.accuracy == compare_accuracy(fp, quantized, cat_model, [(x, labels)])
    assert report.accuracy.fp_top1 == 100.0
    assert report.accuracy.quantized_top1 == pytest.approx(report.held_out.agreement_before)
    assert str(report) in caplog.text
    assert json.loads(json.dumps(report.to_dict()))["accuracy"]["images"] == 400
    for figure in (f"{report.held_out.kl_after:.4f}", "400 images", f"{correction.num_clusters} cluster"):
        assert figure in str(report)
        assert figure in repr(cat_model)


def test_report_of_one_image(pair):
    report = apply_cat(*pair, images(1)).report
    assert report.held_out is None
    assert "the images are too few to split" in str(report)
    assert "the model is left as it is\n  layers: 1 different images are too few for layers" in str(report)
    assert "\n  output: 1 images are too few to learn from" in str(report)
    assert "left as it is" in report.summary()
    assert report.warnings == ("1 different images are few: corrections gain from about a thousand",)


def test_two_runs_are_identical():
    first, second = (apply_cat(*model_pair(), images(300), config=CATConfig(seed=3)) for _ in range(2))
    assert first.report.held_out == second.report.held_out
    for a, b in zip(first.correction.buffers(), second.correction.buffers(), strict=True):
        assert torch.equal(a, b)


def test_labels_do_not_matter_for_the_fit():
    x = images(200)
    plain = apply_cat(*model_pair(), [x]).correction
    labelled = apply_cat(*model_pair(), [{"image": x, "label": torch.zeros(200)}]).correction
    assert torch.equal(plain.scale, labelled.scale)


WITHOUT_LABELS = r"accuracy needs class labels, .* take labels.long\(\) of floats, labels.argmax\(1\) of one-hot rows"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        *((labels, WITHOUT_LABELS) for labels in (None, torch.rand(8), torch.eye(8, 10), torch.eye(8, 10).bool())),
        (torch.arange(8) + 5, "labels run from 5 to 12"),
    ],
)
def test_labels_are_looked_at_before_the_fit(pair, labels, message, monkeypatch):
    monkeypatch.setattr("cat_plugin.api.fit_both_levels", lambda *args, **kwargs: pytest.fail("it was fitted"))
    batch = images(8) if labels is None else (images(8), labels)
    with pytest.raises(CATError, match=message):
        apply_cat(*pair, images(), eval_loader=[batch])


class Once:
    """Gives the same iterator every time that it is asked for one."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


class Stream(Once, IterableDataset):
    pass


@pytest.mark.parametrize("kind", [iter, Once, lambda batches: DataLoader(Stream(batches), batch_size=None)])
def test_labelled_images_that_can_be_read_once_are_all_evaluated(pair, kind):
    batches = [(images(8, seed=seed), torch.arange(8)) for seed in range(3)]
    cat_model = apply_cat(*pair, images(), eval_loader=kind(batches), config=CATConfig(layers="none"))
    assert cat_model.report.accuracy.images == 24


def test_failing_evaluation_leaves_nothing_attached(pair):
    before = state_of(*pair)
    with pytest.raises(CATError, match="accuracy needs class labels"):
        apply_cat(*pair, images(), eval_loader=[(images(8), torch.arange(8)), images(8)])
    assert state_of(*pair) == before


@pytest.mark.parametrize("meta", ["quantized_model", "fp_model"])
def test_model_on_the_meta_device_is_refused(pair, meta):
    models = dict(zip(("quantized_model", "fp_model"), pair, strict=True))
    models[meta] = models[meta].to("meta")
    with pytest.raises(
        CATError, match=f"{meta} has 9 parameters or buffers on the meta device, such as 'first.weight'"
    ):
        apply_cat(**models, calib_loader=images())


@pytest.mark.parametrize("config", [{"alpha": 1}, {}, "paper", CATConfig, 0.4], ids=repr)
def test_config_of_another_type(pair, config):
    def never():
        pytest.fail("the loader was asked")
        yield

    q, f = torch.randn(20, 3), torch.randn(20, 3)
    calls = [
        lambda: apply_cat(*pair, never(), config=config),
        lambda: fit_cluster_affine(q, f, config),
    ]
    message = re.escape(f"config={config!r} is a {type(config).__name__}; expected a CATConfig or None")
    for call in calls:
        with pytest.raises(CATError, match=message):
            call()


def test_second_attachment_is_refused_until_removed(pair):
    cat_model = apply_cat(*pair, images())
    with pytest.raises(CATError, match="already attached"):
        apply_cat(*pair, images())
    with pytest.raises(CATError, match="already attached"):
        apply_cat(cat_model, pair[1], images())
    cat_model.remove()
    assert apply_cat(*pair, images()).attached


def test_public_names():
    assert set(cat_plugin.__all__) == {
        "CATConfig",
        "CATError",
        "CATWrapper",
        "ChannelAffine",
        "ClusterAffine",
        "apply_cat",
        "compare_accuracy",
        "fit_cluster_affine",
    }
    assert cat_plugin.__version__ == "0.1.0"


def test_failure_between_batches_leaves_nothing_behind(pair, monkeypatch):
    before = state_of(*pair)

    def full(self, *parts):
        raise OSError("no space left on device")

    monkeypatch.setattr("cat_plugin.fitting.store.LogitStore.append", full)
    try:
        apply_cat(*pair, images())
    except OSError as error:  # the models are restored while the error is still at hand
        assert state_of(*pair) == before
        assert torch.is_grad_enabled()
        assert "no space left" in str(error)
    else:
        pytest.fail("nothing was raised")


def test_attached_model_is_refused_before_it_is_run(pair):
    quantized, fp = pair
    apply_cat(quantized, fp, images())
    with pytest.raises(CATError, match="already attached"):
        apply_cat(quantized, fp, (1 / 0 for _ in range(3)))
