"""GPT-2 and LLaMA in float64 numpy, written from the papers: an account of the models that shares no code with `lm`.

Only the layout of the parameters is taken over. Loops over rows and heads stand where `lm` has einsums, and rotary
positions are multiplications of complex numbers.
"""

from __future__ import annotations

import jax
import numpy as np

from lm.models import Model
from lm.models.base import abstract


def random_params(model: Model, seed: int = 0) -> dict:
    """float32 parameters of which none is special: biases are not zero, scales are not one, layers differ."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = 0.3 * rng.normal(size=leaf.shape)
        return np.asarray(x + 1.0 if path[-1].key == "scale" else x, np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract(model).params)


def gpt2(params: dict, tokens, *, eps: float, positions=None, segments=None) -> tuple[np.ndarray, np.ndarray]:
    """tokens [B,S] -> (hidden [B,S,D], logits [B,S,V])."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    x = p["embed"]["table"][tokens] + p["positions"]["table"][positions]
    for layer in _layers(p["layers"]):
        a = layer["attn"]
        h = layer_norm(x, **layer["norm1"], eps=eps)
        q, k, v = (np.einsum("bsd,dhk->bshk", h, a[n]) + a[f"{n}_bias"] for n in "qkv")
        x = x + np.einsum("bshk,hkd->bsd", attention(q, k, v, segments), a["o"]) + a["o_bias"]
        m = layer["mlp"]
        h = layer_norm(x, **layer["norm2"], eps=eps) @ m["up"] + m["up_bias"]
        x = x + gelu(h) @ m["down"] + m["down_bias"]
    x = layer_norm(x, **p["norm"], eps=eps)
    return x, x @ p["embed"]["table"].T


def llama(
    params: dict, tokens, *, eps: float, theta: float, positions=None, segments=None
) -> tuple[np.ndarray, np.ndarray]:
    """tokens [B,S] -> (hidden [B,S,D], logits [B,S,V]); tied when there is no `head`."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    x = p["embed"]["table"][tokens]
    for layer in _layers(p["layers"]):
        a = layer["attn"]
        h = rms_norm(x, **layer["norm1"], eps=eps)
        q, k, v = (np.einsum("bsd,dhk->bshk", h, a[n]) for n in "qkv")
        y = attention(rope(q, positions, theta), rope(k, positions, theta), v, segments)
        x = x + np.einsum("bshk,hkd->bsd", y, a["o"])
        m = layer["mlp"]
        h = rms_norm(x, **layer["norm2"], eps=eps)
        gate = h @ m["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ m["up"])) @ m["down"]
    x = rms_norm(x, **p["norm"], eps=eps)
    return x, x @ p["head" if "head" in p else "embed"]["table"].T


def attention(q, k, v, segments=None) -> np.ndarray:
    """Causal: q [B,S,H,K], k, v [B,S,G,K] -> [B,S,H,K]; query head h reads kv head h // (H / G)."""
    b, s, h, d = q.shape
    out = np.zeros(q.shape)
    for i in range(b):
        sees = np.tril(np.ones((s, s), bool))
        if segments is not None:
            sees &= segments[i][:, None] == segments[i][None, :]
        for j in range(h):
            g = j // (h // k.shape[2])
            scores = np.where(sees, q[i, :, j] @ k[i, :, g].T / np.sqrt(d), -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[i, :, j] = weights / weights.sum(axis=1, keepdims=True) @ v[i, :, g]
    return out


def rope(x, positions, theta: float) -> np.ndarray:
    """x [B,S,H,K]: lanes i and i + K/2 are one complex number, turned by position * theta^(-2i/K)."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    angle = np.asarray(positions)[:, :, None, None] * theta ** (-np.arange(half) / half)
    z = z * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def rms_norm(x, scale, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def layer_norm(x, scale, bias, eps: float) -> np.ndarray:
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps) * scale + bias


def gelu(x) -> np.ndarray:
    """The tanh form, as in GPT-2's code."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def cross_entropy(logits, targets, weights, z_loss=0.0, label_smoothing=0.0) -> tuple[float, float]:
    """logits [...,V], targets and weights [...] -> (total, nll), sums."""
    logits = np.asarray(logits, np.float64)
    vocab = logits.shape[-1]
    peak = logits.max(axis=-1, keepdims=True)
    log_z = peak + np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))
    log_p = logits - log_z
    aim = (1 - label_smoothing) * np.eye(vocab)[targets] + label_smoothing / vocab
    per_token = -(aim * log_p).sum(axis=-1) + z_loss * log_z[..., 0] ** 2
    nll = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return float((weights * per_token).sum()), float((weights * nll).sum())


def _layers(stacked: dict) -> list[dict]:
    leaves, treedef = jax.tree.flatten(stacked)
    return [treedef.unflatten(layer) for layer in zip(*leaves)]
