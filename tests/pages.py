"""The pages of the repository as data: blocks of code, headings, links, and the names that a page's code may use."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.cat_plugin.test_research_scripts import QuantModel

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / folder / "README.md" for folder in (".", "cat_plugin", "baselines", "benchmarks", "tests")]
CLASSES = 10

_FENCED = re.compile(
    r"^(?:<!-- not run: *(?P<reason>.*?) *-->\n)?(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, code without indent, the line where the code starts, the nearest heading above, and
    why it is not run; None: it is."""

    language: str
    code: str
    line: int
    heading: str
    reason: str | None


def blocks_of(text: str, language: str) -> list[Block]:
    """The blocks of a page in a language, in order."""
    found = []
    for match in _FENCED.finditer(text):
        before = text[: match.start("code")]
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.M)
        heading = (headings_of(before) or [""])[-1]
        found.append(Block(match["language"], code, before.count("\n") + 1, heading, match["reason"]))
    return [block for block in found if block.language == language]


def headings_of(text: str) -> list[str]:
    """All headings, without those marks that code in fences may start a line with."""
    return re.findall(r"^#+ (.*)$", _FENCED.sub("", text), re.M)


def links_of(text: str) -> list[str]:
    """Targets of links and pictures, as they are written."""
    return re.findall(r"\]\(([^)\s]+)\)", _FENCED.sub("", text))


def anchor_of(heading: str) -> str:
    """What GitHub calls a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


class ImageNetwork(nn.Module):
    """Images (N, 3, 8, 8) to logits, with a residual stage and a layer of the name that the pages speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(2))
        self.layer4 = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layer1:
            x = x + block(x)
        return self.fc(self.layer4(x).mean((2, 3)))


class MultiNetwork(ImageNetwork):
    """The same with two outputs, of which none is called logits."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = super().forward(x)
        return {"out": logits, "aux": -logits}


class Segmenter(nn.Module):
    """Images to maps (N, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu())


class TextNetwork(nn.Module):
    """Two keyword inputs (N, T) to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(50, 8), nn.Linear(8, CLASSES)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.fc((self.words(input_ids) * attention_mask.unsqueeze(-1)).mean(1))}


def pair(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A network in evaluation mode and a copy of it with coarse weights: `(quantized, fp)`."""
    torch.manual_seed(0)
    fp = build().eval()
    quantized = copy.deepcopy(fp)
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.copy_((parameter * 4).round() / 4)
    return quantized, fp


def names_for(page: Path) -> dict[str, Any]:
    """What the code of a page finds, as a user has it: networks, images, loaders."""
    if page.parent.name not in ("cat_plugin", "baselines"):
        return {}
    quantized, fp = pair(ImageNetwork)
    x = torch.randn(400, 3, 8, 8) + 3 * torch.randn(400, 3, 1, 1)
    y, masks = torch.randint(CLASSES, (400,)), torch.randint(CLASSES, (48, 8, 8))
    if page.parent.name == "baselines":
        return {"fp_model": fp, "calib_images": x[:64], "images": x[:320]}
    names: dict[str, Any] = {"copy": copy, "torch": torch, "quantized_model": quantized, "fp_model": fp}
    names["quantized_multi"], names["fp_multi"] = pair(MultiNetwork)
    names["quantized_segmenter"], names["fp_segmenter"] = pair(Segmenter)
    names["quantized_text_model"], names["fp_text_model"] = pair(TextNetwork)
    for loader in ("calib_loader", "fresh_loader", "test_loader", "other_loader"):
        names[loader] = DataLoader(TensorDataset(x, y), batch_size=64)
    names["map_loader"] = names["mask_loader"] = DataLoader(TensorDataset(x[:48], masks), batch_size=16)
    tokens = [{"input_ids": torch.randint(50, (64, 5)), "attention_mask": torch.ones(64, 5)} for _ in range(6)]
    q, f = torch.randn(300, CLASSES), torch.randn(300, CLASSES)
    scripts = {"QuantModel": lambda model, weight_quant_params, act_quant_params: QuantModel(model), "wq": {}, "aq": {}}
    own = {"images": x, "text_loader": tokens, "q": q, "f": f, "q_new": q[:5]}
    return names | own | scripts | {"class_names": [f"class {index}" for index in range(CLASSES)]}
