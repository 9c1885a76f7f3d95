"""Optimizer configs, each with the optax transformation it makes.

Clipping is not in the transformation. The train step takes `global_norm` once, reports it, and passes it to
`clip_by_norm` before `tx.update`; XLA then folds the factor into the update's own passes, where
`optax.chain(optax.clip_by_global_norm(c), optax.adamw(...))` takes a second norm and writes the clipped gradients
out. On a 124M-parameter tree (2 CPU cores, jit, donated) the chain needs 497 MB more and 2 to 4 times as long. A
hand-fused AdamW, on the other hand, compiles to the same three passes as optax's and is within 7 % of its time.

Weight decay is decoupled and multiplied by the scheduled rate (PyTorch's AdamW; Loshchilov & Hutter, 2019, leave the
peak rate out): W <- W - lr_t (U + weight_decay W), for every optimizer here and for the parameters that declare it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.errors import UserError
from lm.optim.adafactor import scale_by_adafactor
from lm.optim.matrices import Matrix, as_matrix, map_axes
from lm.optim.schedules import Cosine, Schedule, expect


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Base of all. `lr` is the peak rate; `clip_norm` and `ema_decay` (None: off) are carried out by the step."""

    lr: float
    schedule: Schedule = Cosine()
    weight_decay: float = 0.1  # this and the next are GPT-3's (Brown et al., 2020, appendix B)
    clip_norm: float | None = 1.0
    ema_decay: float | None = None

    def __post_init__(self):
        expect(self.lr > 0, "lr", "> 0", self.lr)
        expect(self.weight_decay >= 0, "weight_decay", ">= 0", self.weight_decay)
        expect(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "> 0 or None", self.clip_norm)
        expect(self.ema_decay is None or 0 <= self.ema_decay < 1, "ema_decay", "in [0, 1) or None", self.ema_decay)

    def make(self, schedule: optax.Schedule, decay_mask: Any, axes: Any) -> optax.GradientTransformation:
        """`decay_mask` and `axes`: trees like the parameters, of bools and of tuples of logical axis names."""
        raise NotImplementedError

    def _descend(self, schedule: optax.Schedule, decay_mask: Any) -> optax.GradientTransformation:
        """U -> -lr_t (U + weight_decay W)."""
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay, decay_mask), optax.scale_by_learning_rate(schedule)
        )


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """U = m^ / (sqrt(v^) + eps) with bias-corrected moments (Kingma & Ba, 2015; Loshchilov & Hutter, 2019).

    b2 = 0.95 is GPT-3's (Brown et al., 2020, appendix B): it forgets a burst of large gradients in 20 steps.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        _check_betas(self.betas)
        expect(self.eps > 0, "eps", "> 0", self.eps)

    def make(self, schedule, decay_mask, axes):
        return optax.chain(optax.scale_by_adam(*self.betas, eps=self.eps), self._descend(schedule, decay_mask))


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """U = sign(b1 m + (1-b1) g), then m <- b2 m + (1-b2) g (Chen et al., 2023, algorithm 2).

    Against AdamW, `lr` is 3 to 10 times smaller and `weight_decay` as much larger (section 5 there).
    """

    betas: tuple[float, float] = (0.9, 0.99)  # of the paper

    def __post_init__(self):
        super().__post_init__()
        _check_betas(self.betas)

    def make(self, schedule, decay_mask, axes):
        return optax.chain(optax.scale_by_lion(*self.betas), self._descend(schedule, decay_mask))


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """m <- momentum m + g; U = m, or g + momentum m with `nesterov` (Sutskever et al., 2013)."""

    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self):
        super().__post_init__()
        expect(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)

    def make(self, schedule, decay_mask, axes):
        return optax.chain(optax.trace(self.momentum, self.nesterov), self._descend(schedule, decay_mask))


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Factored second moments, updates relative to the parameters' RMS; see `scale_by_adafactor`.

    The defaults are T5's (Raffel et al., 2020; t5x/adafactor.py): no momentum, weight decay or global clipping. T5
    pretrains at `lr=0.01, schedule=InverseSqrt(timescale=10_000)` and fine-tunes at `lr=1e-3, schedule=Constant()`.
    """

    weight_decay: float = 0.0
    clip_norm: float | None = None
    decay_rate: float = 0.8
    update_clip: float = 1.0
    min_dim_size_to_factor: int = 128  # optax's: of smaller ones a full moment costs little

    def __post_init__(self):
        super().__post_init__()
        expect(self.decay_rate > 0, "decay_rate", "> 0", self.decay_rate)
        expect(self.update_clip > 0, "update_clip", "> 0", self.update_clip)
        expect(self.min_dim_size_to_factor >= 2, "min_dim_size_to_factor", ">= 2", self.min_dim_size_to_factor)

    def make(self, schedule, decay_mask, axes):
        scale = scale_by_adafactor(
            axes,
            decay_rate=self.decay_rate,
            update_clip=self.update_clip,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
        )
        return optax.chain(scale, self._descend(schedule, decay_mask))


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Orthogonalised momentum for the matrices inside layers (Jordan, 2024), AdamW for everything else.

    U = s NewtonSchulz5(b m^ + (1-b) g^), each layer (and expert) by itself, with optax's bias-corrected Nesterov
    momentum. s = update_rms sqrt(max(rows, cols)) gives U the RMS of an AdamW update, so `lr` and `weight_decay` tuned
    for AdamW carry over (Liu et al., 2025, section 2.2); `update_rms=None` is Jordan's sqrt(max(1, cols / rows)).
    Embeddings, heads, positions, norms and biases take AdamW with `betas`, `eps` and the same schedule, with the
    peak `adamw_lr` (None: `lr`). Matmuls run at the backend's default precision (bf16 on TPU), which Newton-Schulz
    tolerates.
    """

    momentum: float = 0.95
    ns_steps: int = 5
    update_rms: float | None = 0.2  # about that of AdamW's updates (Liu et al., 2025)
    adamw_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        expect(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        expect(self.ns_steps > 0, "ns_steps", "> 0", self.ns_steps)
        expect(self.update_rms is None or self.update_rms > 0, "update_rms", "> 0 or None", self.update_rms)
        expect(self.adamw_lr is None or self.adamw_lr > 0, "adamw_lr", "> 0 or None", self.adamw_lr)
        _check_betas(self.betas)
        expect(self.eps > 0, "eps", "> 0", self.eps)

    def make(self, schedule, decay_mask, axes):
        dims = map_axes(_muon_dims, axes)
        labels = map_axes(lambda *named: "adamw" if isinstance(_muon_dims(*named), optax.MaskedNode) else "muon", axes)
        if "muon" not in jax.tree.leaves(labels):
            raise UserError("optim: Muon found no matrix with a 'layers' axis; use AdamW")
        ratio = 1.0 if self.adamw_lr is None else self.adamw_lr / self.lr
        # Not optax.contrib.muon: it hands its `nesterov` on to Adam, and one eps to both.
        muon = optax.chain(
            optax.contrib.scale_by_muon(ns_steps=self.ns_steps, beta=self.momentum, weight_dimension_numbers=dims),
            _scale_by_shape(dims, self.update_rms),
            self._descend(schedule, decay_mask),
        )
        adamw = optax.chain(
            optax.scale_by_adam(*self.betas, eps=self.eps),
            self._descend(lambda step: ratio * schedule(step), decay_mask),
        )
        return optax.partition({"muon": muon, "adamw": adamw}, labels)


def make_optimizer(
    config: Optimizer, total_steps: int, decay_mask: Any, axes: Any
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(tx, schedule). `tx` does not clip (`clip_by_norm`) and counts its own steps; `schedule(step)` is for the log."""
    expect(total_steps > 0, "schedule", "a run of at least 1 step", total_steps)
    schedule = config.schedule.make(config.lr, total_steps)
    return config.make(schedule, decay_mask, axes), schedule


def global_norm(grads: Any) -> jax.Array:
    """sqrt(sum of squares) over all arrays of a tree."""
    return optax.tree.norm(grads)


def clip_by_norm(grads: Any, norm: jax.Array, max_norm: float | None) -> Any:
    """Gradients scaled by min(1, max_norm / norm), `norm` being their `global_norm`; None leaves them as they are.

    Bit-equal below the limit. A NaN or infinite norm makes every gradient NaN, so that a bad step cannot pass unseen.
    """
    if max_norm is None:
        return grads
    scale = max_norm / jnp.maximum(norm, max_norm)  # exactly 1 below the limit
    scale = jnp.where(jnp.isfinite(norm), scale, jnp.nan)  # an infinite norm would make it 0 and hide the step
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def _muon_dims(names: tuple[str | None, ...], where: str) -> optax.contrib.MuonDimensionNumbers | optax.MaskedNode:
    matrix: Matrix | None = as_matrix(names, where) if "layers" in names else None
    return optax.MaskedNode() if matrix is None else optax.contrib.MuonDimensionNumbers(*matrix)


def _scale_by_shape(dims: Any, update_rms: float | None) -> optax.GradientTransformation:
    """`Muon`'s s, a constant for each parameter."""

    def scale(u, d):
        rows, cols = (math.prod(u.shape[i] for i in dims) for dims in d)
        return u * math.sqrt(max(1.0, cols / rows) if update_rms is None else update_rms**2 * max(rows, cols))

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, dims))


def _check_betas(betas: tuple[float, float]) -> None:
    expect(all(0 <= b < 1 for b in betas), "betas", "each in [0, 1)", betas)
