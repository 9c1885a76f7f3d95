"""What a case gives here and in transformers, as differences: for the tests, and for the table in the README."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import hf
from tests.hf.cases import CASES, ENCODER_DECODERS, inputs, real, reference, rows

NOT_COMPARED = ("past_key_values", "router_logits")
# Numbers in the largest case, and some more: one compiled update serves all of them.
UPDATED = 2**17


class Differences(NamedTuple):
    """outputs: output -> difference at the tokens that are no padding, `hidden_states 2` for one of several. gradients:
    tensor -> difference of the gradients of the loss, relative to the largest entry of each."""

    outputs: dict[str, float]
    gradients: dict[str, float]


def tensors(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {k: torch.from_numpy(np.array(v)) for k, v in batch.items()}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest, as a number; shapes must agree."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())


def differences(name: str, model: hf.HFModel, gradients: bool = True) -> Differences:
    """Outputs, loss and, unless they are left out, gradients: one program here, one forward and backward pass there."""
    theirs_model, batch = reference(name), inputs(name)
    if not gradients:
        return Differences(_outputs(name, batch, model(**batch), _forward(name, batch)), {})
    theirs_model.zero_grad()
    theirs = _forward(name, batch)
    theirs.loss.backward()
    grads = {n: p.grad.numpy() for n, p in theirs_model.named_parameters() if p.grad is not None}
    ours, our_grads = model.outputs_and_grad(**batch)
    return Differences(_outputs(name, batch, ours, theirs), _gradients(our_grads, by_stored_name(grads, model)))


def _forward(name: str, batch: dict[str, np.ndarray]) -> Any:
    return reference(name)(**tensors(batch), output_hidden_states=True)


def _outputs(name: str, batch: dict[str, np.ndarray], ours: dict[str, Any], theirs: Any) -> dict[str, float]:
    found = {}
    for key in theirs:
        if key in NOT_COMPARED or theirs[key] is None:
            continue
        assert key in ours, f"{key}: not returned"
        several = isinstance(theirs[key], tuple)
        for i, (a, b) in enumerate(zip(ours[key], theirs[key], strict=True) if several else [(ours[key], theirs[key])]):
            b = b.detach().numpy()
            at = real(name, batch, b.shape) if b.ndim else ...
            found[f"{key} {i}" if several else key] = difference(a[at], b[at])
    return found


def _gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
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


def by_stored_name(grads: dict[str, np.ndarray], model: hf.HFModel) -> dict[str, np.ndarray]:
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


ADAMW = optax.adamw(3e-3, weight_decay=0.1)


@jax.jit
def _update(params: jax.Array, grads: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    updates, state = ADAMW.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def losses_of_adamw(name: str, model: hf.HFModel, steps: int = 6) -> tuple[list[float], list[float]]:
    """(ours, theirs): the loss before each step on one batch, without dropout. `model` is as before afterwards."""
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

    before = model.state_dict()
    state, ours = ADAMW.init(jnp.zeros(UPDATED)), []
    for _ in range(steps):
        out, grads = model.outputs_and_grad(**batch)
        ours.append(float(out["loss"]))
        weights = model.state_dict()
        flat = {n: weights[n] for n in grads}
        updated, state = _update(_vector(flat), _vector(grads), state)
        model.load_state_dict(weights | _split(np.asarray(updated), flat))
    model.load_state_dict(before)
    return ours, theirs


def _vector(arrays: dict[str, np.ndarray]) -> np.ndarray:
    flat = np.concatenate([x.ravel() for x in arrays.values()])
    return np.pad(flat, (0, UPDATED - flat.size))


def _split(vector: np.ndarray, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ends = np.cumsum([x.size for x in like.values()])
    return {n: part.reshape(x.shape) for (n, x), part in zip(like.items(), np.split(vector, ends))}


def sequences(name: str, model: hf.HFModel, **options: Any) -> tuple[np.ndarray, np.ndarray]:
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
