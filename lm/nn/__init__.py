"""Parts that models are composed of. They hold `Param`s only: no rng state, no cache, no mode.

Letters, used in every shape and einsum: B batch, S query length, T key length, D d_model, H heads, G kv heads,
K head_dim, F d_ff, V vocabulary, L layers, E experts. The dtype of the activation decides the dtype of the compute;
parameters are float32 and cast where they are used.
"""
