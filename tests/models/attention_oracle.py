"""Attention and its gradients in closed form, in float64 NumPy."""

import numpy as np


def attention(query, key, value, num_heads, bias, scale, gradient):
    """Output [B, T, D], and the gradients of sum(output * gradient) by query, key and value."""
    b, t, d = query.shape
    d_head = d // num_heads

    def heads(x):
        return np.asarray(x, np.float64).reshape(b, t, num_heads, d_head).transpose(0, 2, 1, 3)

    def tokens(x):
        return x.transpose(0, 2, 1, 3).reshape(b, t, d)

    q, k, v, g = (heads(x) for x in (query, key, value, gradient))
    bias = np.zeros((t, t)) if bias is None else np.asarray(bias, np.float64)
    scale = np.ones(t) if scale is None else np.asarray(scale, np.float64)
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(d_head) + bias.reshape(1, -1, t, t)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixing = scale[:, None] * weights
    # d loss / d mixing = g v^T, through scale and softmax: row i of the Jacobian is diag(w_i) - w_i w_i^T.
    dweights = scale[:, None] * (g @ v.swapaxes(-1, -2))
    dlogits = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True)) / np.sqrt(d_head)
    dv = mixing.swapaxes(-1, -2) @ g
    return tokens(mixing @ v), tuple(tokens(x) for x in (dlogits @ k, dlogits.swapaxes(-1, -2) @ q, dv))


def inputs(seed, b, t, num_heads, d_head, *, bias=None, masked=False, scaled=False):
    """Random query, key, value and gradient, float64 [4, B, T, D]; a bias of `bias` heads or None, and a row scale."""
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(4, b, t, num_heads * d_head))
    if bias is not None:
        bias = rng.normal(size=(t, t) if bias == 1 else (bias, t, t)).astype(np.float32)
        bias = np.where(np.tri(t, dtype=bool), bias, -np.inf).astype(np.float32) if masked else bias
    return arrays, bias, rng.uniform(0.5, 2, t).astype(np.float32) if scaled else None


def relative_error(result, expected):
    """|result - expected| / |expected| in the Frobenius norm."""
    result = np.asarray(result, np.float64)
    return np.linalg.norm(result - expected) / max(np.linalg.norm(expected), 1e-300)
