"""One thread evaluates or fits while others serve: each gets what it asked for."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from cat_plugin import apply_cat, compare_accuracy
from cat_plugin.running.collect import collect_outputs
from tests.cat_plugin.helpers import images, model_pair

X = images(200)


def fitted():
    quantized, fp = (model.eval() for model in model_pair())
    with torch.no_grad():
        plain = quantized(X)
        cat_model = apply_cat(quantized, fp, images(400))
        return quantized, fp, cat_model, plain, quantized(X)


def serve(model, stop, expected, served):
    """Calls the model until told to stop, and keeps what differs from `expected`."""
    with torch.no_grad():
        while not stop.is_set():
            out = model(X)
            served.append(torch.equal(out, expected))


def test_eight_threads_are_served_while_one_is_not_corrected():
    quantized, fp, cat_model, plain, corrected = fitted()
    assert not torch.equal(plain, corrected)
    stop, served = threading.Event(), []
    with ThreadPoolExecutor(8) as pool, torch.no_grad():
        work = [pool.submit(serve, quantized, stop, corrected, served) for _ in range(8)]
        try:
            for _ in range(20):
                with cat_model.disabled():
                    assert torch.equal(quantized(X), plain)
                assert torch.equal(quantized(X), corrected)
            report = compare_accuracy(fp, quantized, cat_model, [(X, fp(X).argmax(1))])
        finally:
            stop.set()
        for each in work:
            each.result()
    assert report.quantized_top1 < report.cat_top1
    assert len(served) >= 8
    assert all(served)


def test_collecting_does_not_take_what_other_threads_run():
    class Waits(nn.Module):
        """Lets another thread run the model between its own pass and the end of it."""

        def __init__(self, net):
            super().__init__()
            self.net, self.meanwhile = net, None

        def forward(self, x):
            out = self.net(x)
            meanwhile, self.meanwhile = self.meanwhile, None
            if meanwhile is not None:
                thread = threading.Thread(target=meanwhile)
                thread.start()
                thread.join()
            return out

    quantized, fp = (model.eval() for model in model_pair())
    expected = collect_outputs(copy.deepcopy(quantized), fp, X)
    model = Waits(quantized)
    model.meanwhile = lambda: model(images(7, seed=3))
    found = collect_outputs(model, fp, X)
    assert torch.equal(found.q, expected.q)


def test_a_new_thread_is_corrected_inside_of_a_disabled_block():
    quantized, _, cat_model, plain, corrected = fitted()
    found = []
    with cat_model.disabled(), torch.no_grad():
        thread = threading.Thread(target=lambda: found.append(quantized(X).detach()))
        thread.start()
        thread.join()
        assert torch.equal(quantized(X), plain)
    assert torch.equal(found[0], corrected)


def test_disabled_blocks_nest_and_end_with_an_error():
    quantized, _, cat_model, plain, corrected = fitted()
    with torch.no_grad():
        try:
            with cat_model.disabled():
                with cat_model.disabled():
                    assert torch.equal(quantized(X), plain)
                assert torch.equal(quantized(X), plain)
                raise KeyError
        except KeyError:
            assert torch.equal(quantized(X), corrected)
