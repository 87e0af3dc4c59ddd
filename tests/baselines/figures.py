"""Figures of a small network quantized by each method, kept with the version of the results that they stand for.

`python -m tests.baselines.figures` writes them anew, once the versions of what changed are raised.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from baselines import METHODS, quantize
from baselines.recipes import RECIPES
from baselines.versions import result_version

from .networks import SmallResNet

PATH = Path(__file__).with_suffix(".json")
COMMAND = "python -m tests.baselines.figures"
TOLERANCE = 1e-3


class Mixed(SmallResNet):
    """Convolutions, batch norms, residual blocks and a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x):
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.encoder(x.flatten(2).transpose(1, 2)).mean(1))


def figures(method: str) -> dict[str, object]:
    """What `method` comes to in a few steps: mean and standard deviation of each weight and scale; its published steps
    are too many to be taken."""
    numbers = np.random.RandomState(0)  # the same in all versions of NumPy
    model = Mixed().double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                values = torch.from_numpy(numbers.standard_normal(tensor.shape))
                tensor.copy_(1 + 0.3 * values.abs() if name.endswith("var") or tensor.dim() == 1 else 0.3 * values)
    inputs = torch.from_numpy(numbers.standard_normal((32, 3, 8, 8)))
    network = quantize(model, inputs, method=method, w_bits=3, a_bits=4, iters=8, batch_size=16, seed=0)
    return {
        "version": result_version(method),
        "published steps": [stage.iters for stage in RECIPES[method].stages],
        "tensors": {
            name: [float(f"{value:.6g}") for value in (tensor.mean().item(), tensor.std(correction=0).item())]
            for name, tensor in network.state_dict().items()
            if name.endswith(("weight", "scale"))
        },
    }


def complaint(method: str, stored: dict[str, object], now: dict[str, object]) -> str | None:
    """What is wrong with the `stored` figures of `method`, and what to do; None where nothing is."""
    if stored["version"] != now["version"]:
        return f"the figures of {method} are those of version {stored['version']}; run {COMMAND} to write them anew"
    if stored["published steps"] == now["published steps"] and _near(stored["tensors"], now["tensors"]):
        return None
    return (
        f"results changed; raise the version of the recipe {method!r} (or ENGINE_VERSION in baselines/versions.py, "
        f"where all methods changed) and run {COMMAND} to write the figures anew"
    )


def _near(stored: dict[str, list[float]], now: dict[str, list[float]]) -> bool:
    if stored.keys() != now.keys():
        return False
    before, behind = (np.array([values[name] for name in stored]) for values in (stored, now))
    return bool((np.abs(before - behind) <= TOLERANCE * np.abs(before).sum(1, keepdims=True)).all())


def main() -> None:
    now = {method: figures(method) for method in METHODS}
    stored = json.loads(PATH.read_text("utf-8")) if PATH.is_file() else {}
    for method in now.keys() & stored.keys():
        text = complaint(method, stored[method], now[method])
        if text and stored[method]["version"] == now[method]["version"]:
            sys.exit(text)
    PATH.write_text(json.dumps(now, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
