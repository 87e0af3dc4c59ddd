"""Small networks that the tests of the baselines share."""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock


class SmallResNet(nn.Module):
    """Stem, two residual blocks (the second with a projection), pooling, classifier."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, 2, shortcut))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.pool(x).flatten(1))


class LongSkip(nn.Module):
    """A connection that passes a layer: the third convolution also reads what the first one gave."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        a = self.a(x).relu()
        return self.fc(self.c(a + self.b(a).relu()).mean((2, 3)))


class ReadByFunction(nn.Module):
    """The output of `conv` is also read by an addition, which is no module, so that no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(self.bn0(self.stem(x)))
        return (self.bn(x) + x).mean((2, 3))


class Windows(nn.Module):
    """A block whose first layer sees four windows of an image as four rows, and one layer behind it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.outside = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.inside(x.reshape(-1, 16, 4)).relu().reshape(x.shape)
            return x + self.outside(y + x)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 4, 1), self.Block(), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.block(self.stem(x).relu().permute(0, 2, 3, 1).reshape(len(x), 64, 4)).mean(1))


class Brightness(nn.Module):
    """Bright batches take another path than dark ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bright, self.dark = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        path = self.bright if x.mean() > 1 else self.dark
        return self.fc(path(self.stem(x).relu()).mean((2, 3)))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in eval mode with seeded weights and batch norm statistics that are not the trivial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2 * spread)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.2)
                module.running_var.copy_(0.2 + torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


def images(count: int, seed: int = 1, size: int = 8) -> torch.Tensor:
    """Seeded inputs ``(count, 3, size, size)``."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether both hold the same values."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
