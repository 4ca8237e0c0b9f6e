"""BigGAN's generator once more in plain PyTorch, written apart from the Flax one.

From the description in Brock et al. (2019), Appendix B, with the parameter names of
the authors' checkpoints. Spectral normalization is by hand: one step of power
iteration from a stored vector, as their networks do in evaluation mode.
"""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402


class Spectral(nn.Module):
    """A convolution (`size` given) or linear layer, divided by its largest singular
    value."""

    def __init__(self, c_in, c_out, size=None, bias=True):
        super().__init__()
        window = () if size is None else (size, size)
        self.weight = nn.Parameter(torch.empty(c_out, c_in, *window))
        self.bias = nn.Parameter(torch.empty(c_out)) if bias else None
        self.register_buffer("u0", torch.empty(1, c_out))
        self.register_buffer("sv0", torch.ones(1))

    def forward(self, x):
        matrix = self.weight.flatten(1)
        v = functional.normalize(self.u0 @ matrix)
        u = functional.normalize(v @ matrix.T)
        weight = self.weight / (u @ matrix @ v.T).squeeze()
        if weight.dim() == 2:
            return functional.linear(x, weight, self.bias)
        return functional.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)


class Norm(nn.Module):
    """BatchNorm by stored statistics; gain and bias come from a condition, or not."""

    def __init__(self, channels, condition=None):
        super().__init__()
        if condition:
            self.gain = Spectral(condition, channels, bias=False)
            self.bias = Spectral(condition, channels, bias=False)
        else:
            self.gain = nn.Parameter(torch.empty(channels))
            self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("stored_mean", torch.empty(channels))
        self.register_buffer("stored_var", torch.empty(channels))

    def forward(self, x, y=None):
        mean, var = (
            s[None, :, None, None] for s in (self.stored_mean, self.stored_var)
        )
        x = (x - mean) / (var + 1e-5) ** 0.5
        if y is None:
            return x * self.gain[None, :, None, None] + self.bias[None, :, None, None]
        return x * (1 + self.gain(y))[..., None, None] + self.bias(y)[..., None, None]


def double(x):
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


class Block(nn.Module):
    def __init__(self, c_in, c_out, condition):
        super().__init__()
        self.bn1, self.bn2 = Norm(c_in, condition), Norm(c_out, condition)
        self.conv1, self.conv2 = Spectral(c_in, c_out, 3), Spectral(c_out, c_out, 3)
        self.conv_sc = Spectral(c_in, c_out, 1)

    def forward(self, x, y):
        h = self.conv1(double(torch.relu(self.bn1(x, y))))
        h = self.conv2(torch.relu(self.bn2(h, y)))
        return h + self.conv_sc(double(x))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.theta = Spectral(c, c // 8, 1, bias=False)
        self.phi = Spectral(c, c // 8, 1, bias=False)
        self.g = Spectral(c, c // 2, 1, bias=False)
        self.o = Spectral(c // 2, c, 1, bias=False)
        self.gamma = nn.Parameter(torch.empty(()))

    def forward(self, x, y):
        query = self.theta(x).flatten(2)
        key = functional.max_pool2d(self.phi(x), 2).flatten(2)
        value = functional.max_pool2d(self.g(x), 2).flatten(2)
        share = torch.softmax(query.transpose(1, 2) @ key, dim=2)
        found = (value @ share.transpose(1, 2)).reshape(len(x), -1, *x.shape[2:])
        return x + self.gamma * self.o(found)


class TorchBigGAN(nn.Module):
    """channels: of the 4x4 features and of each block; attention after which block."""

    def __init__(self, channels, classes, chunk, shared_dim, attention):
        super().__init__()
        self.chunk = chunk
        self.shared = nn.Embedding(classes, shared_dim)
        self.linear = Spectral(chunk, 16 * channels[0])
        self.blocks = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip(channels, channels[1:], strict=False)):
            parts = [Block(c_in, c_out, shared_dim + chunk)]
            parts += [Attention(c_out)] if i == attention else []
            self.blocks.append(nn.ModuleList(parts))
        self.output_layer = nn.Sequential(
            Norm(channels[-1]), nn.ReLU(), Spectral(channels[-1], 3, 3)
        )

    def forward(self, z, labels):
        first, *rest = z.split(self.chunk, dim=1)
        x = self.linear(first).unflatten(1, (-1, 4, 4))
        for parts, chunk in zip(self.blocks, rest, strict=True):
            y = torch.cat([self.shared(labels), chunk], dim=1)
            for part in parts:
                x = part(x, y)
        return torch.tanh(self.output_layer(x))


def randomize(net, seed=0):
    """Give every parameter and statistic values that keep the features of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            new = torch.randn(value.shape, generator=generator)
            value.copy_(0.5 + new.abs() if "var" in name else new)
        for module in net.modules():
            if hasattr(module, "weight_u"):  # where training would have brought them
                u, _, v = torch.linalg.svd(
                    module.weight_orig.flatten(1), full_matrices=False
                )
                module.weight_u.copy_(u[:, 0])
                module.weight_v.copy_(v[0])
    return net.eval()
