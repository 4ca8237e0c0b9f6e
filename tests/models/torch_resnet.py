"""The ResNets once more in plain PyTorch, written apart from the Flax ones."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in, planes, *, stride, dilations, shortcut):
        super().__init__()
        d1, d2 = dilations
        self.conv1 = nn.Conv2d(
            c_in, planes, 3, stride, padding=d1, dilation=d1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, d2, dilation=d2, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = shortcut

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in, planes, *, stride, dilations, shortcut):
        super().__init__()
        d = dilations[0]
        self.conv1 = nn.Conv2d(c_in, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, d, dilation=d, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = shortcut

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + self.downsample(x))


class ImageNetResNet(nn.Module):
    """strides and dilations: one entry a stage; a dilation is (first conv, others)."""

    def __init__(
        self,
        block,
        sizes,
        *,
        width=64,
        num_classes=1000,
        strides=(1, 2, 2, 2),
        dilations=((1, 1),) * 4,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        c_in = width
        for s in range(4):
            planes, blocks = width * 2**s, []
            for i in range(sizes[s]):
                stride = strides[s] if i == 0 else 1
                first, rest = dilations[s]
                shortcut = nn.Identity()
                if stride != 1 or c_in != planes * block.expansion:
                    shortcut = nn.Sequential(
                        nn.Conv2d(
                            c_in, planes * block.expansion, 1, stride, bias=False
                        ),
                        nn.BatchNorm2d(planes * block.expansion),
                    )
                blocks.append(
                    block(
                        c_in,
                        planes,
                        stride=stride,
                        dilations=(first if i == 0 else rest, rest),
                        shortcut=shortcut,
                    )
                )
                c_in = planes * block.expansion
            setattr(self, f"layer{s + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(c_in, num_classes)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


class OptionA(nn.Module):
    def forward(self, x):
        c = x.shape[1]
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, c // 2, c // 2))


class PoolAndZeros(nn.Module):
    def forward(self, x):
        x = functional.avg_pool2d(x, 2)
        return torch.cat((x, torch.zeros_like(x)), dim=1)


class SmallResNet(nn.Module):
    """CIFAR (three stages, option A) or, with adapter=True, residual-adapter ResNet."""

    def __init__(self, blocks, *, width, num_classes, adapter=False):
        super().__init__()
        c_in = width // 2 if adapter else width
        self.conv1 = nn.Conv2d(3, c_in, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        for s in range(3):
            planes, stage = width * 2**s, []
            for i in range(blocks):
                shrink = i == 0 and (s > 0 or adapter)
                shortcut = (
                    (PoolAndZeros() if adapter else OptionA()) if shrink else None
                )
                stage.append(
                    BasicBlock(
                        c_in,
                        planes,
                        stride=2 if shrink else 1,
                        dilations=(1, 1),
                        shortcut=shortcut or nn.Identity(),
                    )
                )
                c_in = planes
            setattr(self, f"layer{s + 1}", nn.Sequential(*stage))
        self.final_bn = nn.BatchNorm2d(c_in) if adapter else None
        self.fc = nn.Linear(c_in, num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = x if self.final_bn else torch.relu(x)
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.final_bn:
            x = torch.relu(self.final_bn(x))
        return self.fc(x.mean(dim=(2, 3)))


def randomize(model, seed=0):
    """Give every layer random parameters, and every BatchNorm random statistics."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=generator)
        elif isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.1, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return model
