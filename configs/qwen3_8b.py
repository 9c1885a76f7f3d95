"""Qwen3 8B at its published size: 8,190,735,360 parameters (head included), the first stage at 4096 tokens of context.

Source: "Qwen3 Technical Report" (Yang et al., 2025), table 1 and section 3.2. Learning rate and batch size are not in
the report; those here are Llama 3 8B's.
Hardware: 256 TPU v5p chips or 256 GPUs of 80 GB. Expected: not run here; the released base model, trained for 36T
tokens, reaches 76.9 on MMLU with five examples.
    lm train qwen3_8b --workdir gs://bucket/qwen3_8b --distributed
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.mesh import Mesh
from lm.models import Compute, Qwen3
from lm.objectives import CausalLM
from lm.optim import AdamW, Cosine

config = Config(
    model=Qwen3(
        vocab_size=151_936,
        d_model=4096,
        n_layers=36,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=12_288,
        compute=Compute(remat="full"),
    ),
    data=Data(
        path="data/qwen3_8b",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(kind="bpe", vocab_size=151_669, train_bytes=1_000_000_000),
        seq_len=4096,
        batch_size=1024,
    ),
    objective=CausalLM(chunks=16),
    optim=AdamW(lr=3e-4, schedule=Cosine(warmup_steps=8000)),
    train=Train(steps=1_200_000, eval_every=10_000),
    mesh=Mesh(data=1, fsdp=256),
    checkpoint=Checkpoint(every=1000, keep_every=50_000),
)
