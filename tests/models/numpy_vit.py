"""Every network in float64 NumPy, written from the papers: no code of the package."""

import numpy as np
from scipy.special import softmax
from scipy.stats import norm as gaussian

ACTIVATIONS = {
    "gelu": lambda z: z * gaussian.cdf(z),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "relu": lambda z: np.maximum(z, 0),
}


def logits(params, image, attention_bias, row_scale, *, patch_size, num_heads, skip, mlp, activation, slope=0.0):
    """Logits [B, num_classes] by parameters as nested dicts, and attention's constants [L, H or 1, T, T] and [L, T]."""

    def dense(x, layer):
        return x @ np.float64(layer["kernel"]) + np.float64(layer.get("bias", 0.0))

    def normalize(x, layers):
        if "norm" not in layers:
            return x
        deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        return (x - x.mean(axis=-1, keepdims=True)) / deviation * layers["norm"]["scale"] + layers["norm"]["bias"]

    def add(x, y):
        return {"none": y, "residual": x + y, "scaled": (x + y) / np.sqrt(2)}[skip]

    def phi(z):
        if mlp == "tat":
            return np.sqrt(2 / (1 + slope**2)) * np.where(z > 0, z, slope * z)
        return ACTIVATIONS[activation](z)

    def heads(x):
        return x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)

    b, height, width, _ = image.shape
    rows, columns = height // patch_size, width // patch_size
    tokens = [
        np.float64(image)[:, y : y + patch_size, x : x + patch_size].reshape(b, -1)
        for y in range(0, height, patch_size)
        for x in range(0, width, patch_size)
    ]
    x = dense(np.stack(tokens, axis=1), params["patch_embedding"])
    omega = 10_000.0 ** -(np.arange(x.shape[-1] // 4) / (x.shape[-1] // 4 - 1))
    place = np.stack([np.tile(np.arange(columns), rows), np.repeat(np.arange(rows), columns)])[..., None] * omega
    x = x + np.concatenate([np.sin(place[0]), np.cos(place[0]), np.sin(place[1]), np.cos(place[1])], axis=-1)
    for layer in range(len(params["blocks"]["mlp"]["dense1"]["kernel"])):
        block = _slice(params["blocks"], layer)
        attention, units = block.get("attention", {}), block["mlp"]
        y = normalize(x, attention)
        scores = np.zeros(1)
        if "query" in attention:
            q, k = (heads(dense(y, attention[name])) for name in ("query", "key"))
            scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        matrix = softmax(scores + attention_bias[layer], axis=-1) * row_scale[layer][:, None]
        y = (
            (matrix @ heads(dense(y, attention["value"]) if "value" in attention else y))
            .swapaxes(1, 2)
            .reshape(x.shape)
        )
        x = add(x, dense(y, attention["out"]) if "out" in attention else y)
        y = dense(phi(dense(normalize(x, units), units["dense1"])), units["dense2"])
        x = add(x, phi(y) if mlp == "tat" else y)
    return dense(normalize(x.mean(axis=1), params), params["head"])


def _slice(tree, layer):
    return {name: _slice(part, layer) if isinstance(part, dict) else part[layer] for name, part in tree.items()}
