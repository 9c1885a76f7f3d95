"""Llama 2 7B at its published size: 6,738,415,616 parameters (head included), 4096 tokens of context, 4M tokens a step.

Source: "Llama 2: Open Foundation and Fine-Tuned Chat Models" (Touvron et al., 2023), section 2: 2T tokens.
Hardware: 128 TPU v5p chips or 128 GPUs of 80 GB. Expected: not run here; the paper's model reaches 45.3 on MMLU with
five examples.
    lm train llama2_7b --workdir gs://bucket/llama2_7b --distributed
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.mesh import Mesh
from lm.models import Compute, Llama
from lm.objectives import CausalLM
from lm.optim import AdamW, Cosine

VOCAB_SIZE = 32_000

config = Config(
    model=Llama(
        vocab_size=VOCAB_SIZE, d_model=4096, n_layers=32, n_heads=32, d_ff=11_008, compute=Compute(remat="full")
    ),
    data=Data(
        path="data/llama2_7b",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(kind="bpe", vocab_size=VOCAB_SIZE, train_bytes=1_000_000_000),
        seq_len=4096,
        batch_size=1024,
    ),
    objective=CausalLM(chunks=8),
    optim=AdamW(lr=3e-4, schedule=Cosine(warmup_steps=2000)),
    train=Train(steps=477_000, eval_every=5000),
    mesh=Mesh(data=1, fsdp=128),
    checkpoint=Checkpoint(every=1000, keep_every=50_000),
)
