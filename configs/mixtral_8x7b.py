"""Mixtral 8x7B at its published size: 46,702,792,704 parameters (head included), of which a token meets 12,879,925,248.

Source: "Mixtral of Experts" (Jiang et al., 2024), table 1. How it was trained is not in the paper; batch, rate and
length are Llama 2's at 8192 tokens of context (the released model has 32768), and the weight of the balance loss is
that of the released config.
Hardware: 256 TPU v5p chips or 256 GPUs of 80 GB. Expected: not run here; the paper's model reaches 70.6 on MMLU with
five examples.
    lm train mixtral_8x7b --workdir gs://bucket/mixtral_8x7b --distributed
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.mesh import Mesh
from lm.models import Compute, Mixtral
from lm.objectives import CausalLM
from lm.optim import AdamW, Cosine

VOCAB_SIZE = 32_000

config = Config(
    model=Mixtral(
        vocab_size=VOCAB_SIZE,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        d_ff=14_336,
        compute=Compute(remat="full"),
    ),
    data=Data(
        path="data/mixtral_8x7b",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(kind="bpe", vocab_size=VOCAB_SIZE, train_bytes=1_000_000_000),
        seq_len=8192,
        batch_size=512,
    ),
    objective=CausalLM(chunks=8, router_balance=0.02),
    optim=AdamW(lr=3e-4, schedule=Cosine(warmup_steps=2000)),
    train=Train(steps=477_000, eval_every=5000),
    mesh=Mesh(data=1, fsdp=32, expert=8),
    checkpoint=Checkpoint(every=1000, keep_every=50_000),
)
