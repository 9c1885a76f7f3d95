"""Gemma 2 9B at its published size: 9,241,705,984 parameters (one table serves both ends), 8192 tokens of context.

Source: "Gemma 2: Improving Open Language Models at a Practical Size" (Gemma Team, 2024), table 1. The paper distils
this size from a larger model, over 8T tokens; here it learns from the text alone, at Llama 3 8B's rate and batch.
Hardware: 256 TPU v5p chips or 256 GPUs of 80 GB. Expected: not run here; the released model reaches 71.3 on MMLU with
five examples.
    lm train gemma2_9b --workdir gs://bucket/gemma2_9b --distributed
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.mesh import Mesh
from lm.models import Compute, Gemma2
from lm.objectives import CausalLM
from lm.optim import AdamW, Cosine

VOCAB_SIZE = 256_000

config = Config(
    model=Gemma2(
        vocab_size=VOCAB_SIZE,
        d_model=3584,
        n_layers=42,
        n_heads=16,
        n_kv_heads=8,
        head_dim=256,
        d_ff=14_336,
        compute=Compute(remat="full"),
    ),
    data=Data(
        path="data/gemma2_9b",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(vocab_size=VOCAB_SIZE, train_bytes=1_000_000_000),
        seq_len=8192,
        batch_size=512,
    ),
    objective=CausalLM(chunks=32),
    optim=AdamW(lr=3e-4, schedule=Cosine(warmup_steps=8000)),
    train=Train(steps=1_900_000, eval_every=10_000),
    mesh=Mesh(data=1, fsdp=256),
    checkpoint=Checkpoint(every=1000, keep_every=50_000),
)
