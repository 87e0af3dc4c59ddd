"""With a default device of another kind, "meta" here, everything comes out as without."""

import dataclasses

import pytest
import torch
from torch import nn

from cat_plugin import CATConfig, apply_cat


def shifts(classes: int, gain: float) -> torch.Tensor:
    return (1 - gain) * torch.arange(1, classes + 1, device="cpu")


class Maps(nn.Module):
    """Logits (N, 3, 2, 2) of four positions."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return self.gain * x.view(-1, 3, 2, 2) + shifts(3, self.gain)[:, None, None]


def linear(classes: int, gain: float) -> nn.Module:
    layer = nn.Linear(12, classes, device="cpu")
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, layer.weight.numel(), device="cpu").cos().view_as(layer.weight) * gain)
        layer.bias.copy_(shifts(classes, gain))
    return layer


MODELS = {
    "logits": (lambda gain: linear(3, gain), {}),
    "maps": (Maps, {"positions": 2}),
    "one-logit": (lambda gain: linear(1, gain), {}),
}
"""Of which that with a gain of 1 is the model in full precision, and the settings of the outputs."""


def everything(case: str, mode: str) -> tuple[object, ...]:
    """Corrected outputs, the fit and the report in words."""
    make, settings = MODELS[case]
    model, quantized = make(1.0).eval(), make(0.5).eval()
    numbers = torch.Generator("cpu").manual_seed(0)
    images = torch.randn(400, 12, generator=numbers, device="cpu")
    labels = torch.arange(400, device="cpu") % (2 if case == "one-logit" else 3)
    labels = labels[:, None, None].expand(-1, 2, 2).contiguous() if case == "maps" else labels
    config = dataclasses.replace(CATConfig.paper() if mode == "paper" else CATConfig(), **settings)
    with torch.no_grad():
        before = quantized(images)
    corrected = apply_cat(quantized, model, images, config=config, eval_loader=[(images, labels)])
    with torch.no_grad():
        outputs = quantized(images)
    assert not torch.equal(outputs, before)
    said = [line for line in str(corrected.report).splitlines() if "cost:" not in line]  # which holds seconds
    return outputs, corrected.correction.state_dict(), said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["auto", "paper"])
@pytest.mark.parametrize("case", MODELS)
def test_apply_cat_does_the_same_under_a_default_device(case, mode):
    outputs, state, said = everything(case, mode)
    with torch.device("meta"):
        others, other_state, other_said = everything(case, mode)
    assert torch.equal(outputs, others)
    assert said == other_said
    assert state.keys() == other_state.keys() and all(torch.equal(state[key], other_state[key]) for key in state)
