"""Llama 3 70B at its published size: 70,553,706,496 parameters (head included), 8192 tokens of context.

Source: "The Llama 3 Herd of Models" (Grattafiori et al., 2024), table 3: 15T tokens, here 8M a step throughout, where
the paper begins with 4M.
Hardware: 1024 TPU v5p chips or 1024 GPUs of 80 GB. Expected: not run here; the released model reaches 79.5 on MMLU with
five examples.
    lm train llama3_70b --workdir gs://bucket/llama3_70b --distributed
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.mesh import Mesh
from lm.models import Compute, Llama
from lm.nn.position import Rope
from lm.objectives import CausalLM
from lm.optim import AdamW, Cosine

config = Config(
    model=Llama(
        vocab_size=128_256,
        d_model=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        d_ff=28_672,
        rope=Rope(theta=500_000.0),
        compute=Compute(remat="full"),
    ),
    data=Data(
        path="data/llama3_70b",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(kind="bpe", vocab_size=128_000, train_bytes=1_000_000_000),
        seq_len=8192,
        batch_size=1024,
    ),
    objective=CausalLM(chunks=16),
    optim=AdamW(lr=1.5e-4, schedule=Cosine(warmup_steps=8000)),
    train=Train(steps=1_800_000, eval_every=10_000),
    mesh=Mesh(data=1, fsdp=128, tensor=8),
    checkpoint=Checkpoint(every=1000, keep_every=50_000),
)
