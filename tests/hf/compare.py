"""What a case gives here and in transformers, as differences: for the tests, and for the table in the README."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import hf
from tests.hf.cases import CASES, ENCODER_DECODERS, inputs, real, reference, rows

NOT_COMPARED = ("past_key_values", "router_logits")


def tensors(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {k: torch.from_numpy(np.array(v)) for k, v in batch.items()}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest, as a number; shapes must agree."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())


def outputs(name: str, model: hf.Model) -> dict[str, float]:
    """Output -> difference at the tokens that are no padding; `hidden_states 2` for one of several."""
    import torch

    batch = inputs(name)
    with torch.no_grad():
        theirs = reference(name)(**tensors(batch), output_hidden_states=True)
    ours, found = model(**batch), {}
    for key in theirs:
        if key in NOT_COMPARED or theirs[key] is None:
            continue
        assert key in ours, f"{key}: not returned"
        several = isinstance(theirs[key], tuple)
        for i, (a, b) in enumerate(zip(ours[key], theirs[key], strict=True) if several else [(ours[key], theirs[key])]):
            b = b.numpy()
            at = real(name, batch, b.shape) if b.ndim else ...
            found[f"{key} {i}" if several else key] = difference(a[at], b[at])
    return found


def gradients(name: str, model: hf.Model) -> dict[str, float]:
    """Tensor -> difference of the gradients of the loss, relative to the largest entry of each."""
    theirs_model, batch = reference(name), inputs(name)
    theirs_model.zero_grad()
    theirs_model(**tensors(batch)).loss.backward()
    grads = {n: p.grad.numpy() for n, p in theirs_model.named_parameters() if p.grad is not None}
    ours, theirs = model.grad(**batch), by_stored_name(grads, model)
    assert theirs.keys() <= ours.keys(), theirs.keys() - ours.keys()
    largest = max(np.abs(g).max() for g in theirs.values())
    found = {}
    for n, g in ours.items():
        if n not in theirs:
            assert not g.any(), f"{n}: has a gradient, in transformers none"
            continue
        # A gradient that cancels exactly, as that of a bias on the keys, is rounding on both sides.
        found[n] = difference(g, theirs[n]) / float(max(np.abs(theirs[n]).max(), 1e-4 * largest))
    return found


def by_stored_name(grads: dict[str, np.ndarray], model: hf.Model) -> dict[str, np.ndarray]:
    """Gradients of live parameters of transformers, under the names that files have."""
    out = {}
    for name, g in grads.items():
        at, _, part = name.rpartition(".")
        if part not in ("gate_up_proj", "down_proj") or g.ndim < 3:
            renamed = name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")
            stored = (name, renamed, "embed_out.weight" if name == "lm_head.weight" else name)
            out[next(n for n in stored if n in model.slots)] = g
            continue
        mixtral = f"{at.replace('.mlp.', '.block_sparse_moe.')}.0.w1.weight" in model.slots
        for i, expert in enumerate(g):
            parts = {"gate_proj": expert[: len(expert) // 2], "up_proj": expert[len(expert) // 2 :]}
            for key, x in (parts if part == "gate_up_proj" else {"down_proj": expert}).items():
                key = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[key] if mixtral else key
                out[f"{at.replace('.mlp.', '.block_sparse_moe.') if mixtral else at}.{i}.{key}.weight"] = x
    return out


def losses_of_adamw(name: str, model: hf.Model, steps: int = 6) -> tuple[list[float], list[float]]:
    """(ours, theirs): the loss before each step on one batch, without dropout."""
    import optax
    import torch

    batch = inputs(name)
    theirs_model = type(reference(name))(reference(name).config)
    theirs_model.load_state_dict(reference(name).state_dict())
    theirs_model.eval()  # without dropout
    adamw = torch.optim.AdamW(theirs_model.parameters(), lr=3e-3, weight_decay=0.1)
    theirs = []
    for _ in range(steps):
        adamw.zero_grad()
        loss = theirs_model(**tensors(batch)).loss
        loss.backward()
        adamw.step()
        theirs.append(loss.item())

    arrays = {k: jnp.asarray(v) for k, v in batch.items()}
    tx = optax.adamw(3e-3, weight_decay=0.1)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: model.outputs(p, arrays)["loss"])(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state, ours = model.params, tx.init(model.params), []
    for _ in range(steps):
        params, state, loss = step(params, state)
        ours.append(float(loss))
    return ours, theirs


def sequences(name: str, model: hf.Model, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """(ours, theirs): what is generated from the rows of a case."""
    import torch

    batch = rows(name)
    theirs_alone: dict[str, Any] = {}
    if CASES[name] not in ENCODER_DECODERS:
        batch = {k: v[[0, 2]] for k, v in batch.items()}  # a decoder's prompts are padded on the left
    elif name.startswith("t5"):
        theirs_alone["use_cache"] = False  # transformers 5.23 fails where the decoder has more layers than the encoder
    if "router" in str(CASES[name].fields):
        # transformers 5.23 takes the balance of experts over the prompt's mask at every step, and fails.
        theirs_alone["output_router_logits"] = False
    options = {"max_new_tokens": 9} | options
    with torch.no_grad():
        theirs = reference(name).generate(**tensors(batch), do_sample=False, **options, **theirs_alone).numpy()
    return model.generate(**batch, **options), theirs
