"""The models in plain PyTorch: the independent peer of the parity tests and of `benchmarks/train_step.py`.

Written from the papers' formulas, not from the JAX code: patches by a strided convolution, one fused q-k-v product,
PyTorch's own attention, activation and loss, matrix square roots by Schur decomposition, the slope by bisection.
"""

import itertools
import math

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn


def position_embedding(rows: int, columns: int, width: int) -> torch.Tensor:
    """[T, D], [sin x, cos x, sin y, cos y] with omega_k = 10000^(-k / (D/4 - 1))."""
    table = torch.empty(rows, columns, 4, width // 4, dtype=torch.float64)
    for y, x, k in itertools.product(range(rows), range(columns), range(width // 4)):
        omega = 10000.0 ** (-k / (width / 4 - 1))
        table[y, x, :, k] = torch.tensor(
            [math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega)]
        )
    return table.reshape(rows * columns, width).to(torch.get_default_dtype())


def espa_constants(
    num_tokens: int, depth: int, gamma_max_depth: float, divide_columns: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """d_l [L, T] and B_l [L, T, T]; the reference divides columns of A_l by d_l, where rows are meant."""
    alpha = math.sqrt(1.0 - math.exp(-2.0 * gamma_max_depth))
    distance = scipy.linalg.toeplitz(np.arange(num_tokens))
    kernels = [np.eye(num_tokens)]
    for layer in range(1, depth + 1):
        gamma = -0.5 * math.log(1.0 - alpha ** (2.0 * layer / depth))
        kernels.append(np.exp(-gamma * distance))
    roots = [np.real(scipy.linalg.sqrtm(kernel)) for kernel in kernels]
    matrices = np.stack([current @ np.linalg.inv(previous) for previous, current in itertools.pairwise(roots)])
    row_scale, attention_bias = matrices.sum(axis=2), np.log(np.maximum(matrices, 1e-12))
    if divide_columns:
        attention_bias -= np.log(row_scale)[:, None, :]
    return tuple(torch.tensor(x, dtype=torch.get_default_dtype()) for x in (row_scale, attention_bias))


def tat_slope(activations: int, eta: float) -> float:
    """Negative slope s with C_f(0) = eta."""

    def c_f(slope: float) -> float:
        c = 0.0
        for _ in range(activations):
            correction = math.sqrt(1.0 - c * c) - c * math.acos(c)
            c += (1.0 - slope) ** 2 / (math.pi * (1.0 + slope**2)) * correction
        return c

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if c_f(middle) > eta else (low, middle)
    return low


def scaled_orthogonal_(layer: nn.Linear) -> nn.Linear:
    """SUO: orthogonal times max(sqrt(out / in), 1); bias 0."""
    fan_out, fan_in = layer.weight.shape
    nn.init.orthogonal_(layer.weight, max(math.sqrt(fan_out / fan_in), 1.0))
    nn.init.zeros_(layer.bias)
    return layer


def attend(qkv: torch.Tensor, num_heads: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(d_head) + bias) v for qkv [B, T, 3 D]."""
    b, t, _ = qkv.shape
    q, k, v = qkv.reshape(b, t, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(b, t, -1)


class ShapedAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, row_scale: torch.Tensor | None, attention_bias: torch.Tensor):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.qkv.weight[:width].detach())
        nn.init.normal_(self.qkv.weight[width:].detach(), std=width**-0.5)
        nn.init.zeros_(self.qkv.bias)
        self.num_heads = num_heads
        self.register_buffer("row_scale", row_scale)
        self.register_buffer("attention_bias", attention_bias)

    def forward(self, x):
        x = attend(self.qkv(x), self.num_heads, self.attention_bias)
        return x if self.row_scale is None else self.row_scale[:, None] * x


class TailoredMLP(nn.Module):
    def __init__(self, width: int, mlp_dim: int, slope: float):
        super().__init__()
        self.dense1 = scaled_orthogonal_(nn.Linear(width, mlp_dim))
        self.dense2 = scaled_orthogonal_(nn.Linear(mlp_dim, width))
        self.slope, self.scale = slope, math.sqrt(2.0 / (1.0 + slope**2))

    def forward(self, x):
        x = self.scale * F.leaky_relu(self.dense1(x), self.slope)
        return self.scale * F.leaky_relu(self.dense2(x), self.slope)


class VanillaBlock(nn.Module):
    def __init__(self, attention: ShapedAttention, mlp: nn.Module):
        super().__init__()
        self.attention, self.mlp = attention, mlp

    def forward(self, x):
        return self.mlp(self.attention(x))


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.num_heads = num_heads

    def forward(self, x):
        return self.out(attend(self.qkv(self.norm(x)), self.num_heads))


class MLP(nn.Module):
    def __init__(self, width: int, mlp_dim: int, norm: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.dense1 = nn.Linear(width, mlp_dim)
        self.dense2 = nn.Linear(mlp_dim, width)

    def forward(self, x):
        return self.dense2(F.gelu(self.dense1(self.norm(x))))


def looks_linear_(mlp: MLP) -> MLP:
    """The identity for any activation with phi(z) - phi(-z) = z; biases 0."""
    fan_out, fan_in = mlp.dense1.weight.shape
    half = nn.init.orthogonal_(torch.empty(fan_out // 2, fan_in))
    with torch.no_grad():
        mlp.dense1.weight.copy_(torch.cat([half, -half]))
        mlp.dense2.weight.copy_(torch.cat([half, -half]).T)
    nn.init.zeros_(mlp.dense1.bias)
    nn.init.zeros_(mlp.dense2.bias)
    return mlp


class SkipBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.attention, self.mlp = Attention(width, num_heads), MLP(width, mlp_dim)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


class ViT(nn.Module):
    """`name` is simplest_vit, isometric_vit (by the `attention_bias` [L, H, T, T] given) or simple_vit.

    Maps images [B, C, H, W] to logits.
    """

    def __init__(
        self,
        name: str,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        patch_size: int,
        depth: int,
        width: int,
        num_heads: int,
        mlp_dim: int,
        gamma_max_depth: float = 0.005,
        c_val_0_target: float = 0.9,
        divide_columns: bool = False,
        attention_bias: torch.Tensor | None = None,
    ):
        super().__init__()
        height, width_pixels, channels = image_shape
        rows, columns = height // patch_size, width_pixels // patch_size
        self.patch_embedding = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.register_buffer("position_embedding", position_embedding(rows, columns, width))
        self.head = nn.Linear(width, num_classes)
        if name == "simplest_vit":
            nn.init.normal_(self.patch_embedding.weight, std=(channels * patch_size**2) ** -0.5)
            nn.init.zeros_(self.patch_embedding.bias)
            slope = tat_slope(2 * depth, c_val_0_target)
            constants = zip(*espa_constants(rows * columns, depth, gamma_max_depth, divide_columns), strict=True)
            self.blocks = nn.Sequential(
                *(
                    VanillaBlock(
                        ShapedAttention(width, num_heads, row_scale, attention_bias),
                        TailoredMLP(width, mlp_dim, slope),
                    )
                    for row_scale, attention_bias in constants
                )
            )
            self.norm = nn.Identity()
            scaled_orthogonal_(self.head)
        elif name == "isometric_vit":
            self.blocks = nn.Sequential(
                *(
                    VanillaBlock(
                        ShapedAttention(width, num_heads, None, bias), looks_linear_(MLP(width, mlp_dim, norm=False))
                    )
                    for bias in attention_bias
                )
            )
            for block in self.blocks:
                nn.init.orthogonal_(block.attention.qkv.weight[2 * width :].detach())
            self.norm = nn.Identity()
        else:
            self.blocks = nn.Sequential(*(SkipBlock(width, num_heads, mlp_dim) for _ in range(depth)))
            self.norm = nn.LayerNorm(width)

    def forward(self, image):
        x = self.patch_embedding(image).flatten(2).transpose(1, 2) + self.position_embedding
        return self.head(self.norm(self.blocks(x).mean(dim=1)))


def loss(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Mean label-smoothed cross-entropy with soft targets [B, num_classes]."""
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def perturb_(model: nn.Module, scale: float = 0.3) -> None:
    """Move every parameter off its initialization, where queries are zero and keys have no gradient."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * parameter[0].numel() ** -0.5 * torch.randn_like(parameter)


def to_flax(model: nn.Module, values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Parameters or gradients under the paths and in the layout of the JAX models.

    Args:
      model: The model they belong to.
      values: By the names of `model.named_parameters()`.

    Returns:
      float32 arrays by path, such as `blocks/mlp/dense1/kernel` [L, in, out].
    """
    flat = {}
    for name, value in values.items():
        path, kind = name.rsplit(".", 1)
        if kind == "weight" and value.ndim == 1:
            kind = "scale"
        elif kind == "weight":
            # OIHW to [H W I, O], and [out, in] to [in, out].
            value = value.permute(2, 3, 1, 0).flatten(0, 2) if value.ndim == 4 else value.T
            kind = "kernel"
        if path.endswith("qkv"):
            for part, array in zip(("query", "key", "value"), value.chunk(3, dim=-1), strict=True):
                flat[f"{path[:-3]}{part}.{kind}"] = array
        else:
            flat[f"{path}.{kind}"] = value
    layers = range(len(model.blocks))
    stacked = {
        name.replace("blocks.0.", "blocks."): torch.stack(
            [flat[name.replace("blocks.0.", f"blocks.{i}.")] for i in layers]
        )
        if name.startswith("blocks.0.")
        else value
        for name, value in flat.items()
        if not name.startswith("blocks.") or name.startswith("blocks.0.")
    }
    return {name.replace(".", "/"): value.detach().numpy().copy() for name, value in stacked.items()}


def loss_and_gradients(
    model: nn.Module, image: np.ndarray, targets: np.ndarray, label_smoothing: float
) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits, loss and gradients (see `to_flax`) for images [B, H, W, C]."""
    logits = model(torch.from_numpy(image).permute(0, 3, 1, 2))
    value = loss(logits, torch.from_numpy(targets), label_smoothing)
    named = dict(model.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(value, named.values()), strict=True))
    return logits.detach().numpy(), value.item(), to_flax(model, gradients)
