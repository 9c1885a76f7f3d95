"""Llama 3 8B at its published size: 8,030,261,248 parameters, 8192 tokens of context, 4M tokens a step.

Source: Llama 3 herd of models (Grattafiori et al., 2024), table 3.
Hardware: 256 TPU v5p chips or 256 GPUs of 80 GB. Expected: not run here; `lm describe llama3_8b` prints its FLOPs and
bytes per device.
    lm train llama3_8b --workdir gs://bucket/llama3_8b --distributed
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
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        d_ff=14_336,
        rope=Rope(theta=500_000.0),
        compute=Compute(remat="full"),
    ),
    data=Data(
        path="data/llama3_8b",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(kind="bpe", vocab_size=128_000, train_bytes=1_000_000_000),
        seq_len=8192,
        batch_size=512,
    ),
    objective=CausalLM(chunks=16),
    optim=AdamW(lr=3e-4, schedule=Cosine(warmup_steps=8000)),
    train=Train(steps=1_200_000, eval_every=10_000),
    mesh=Mesh(data=1, fsdp=256),
    checkpoint=Checkpoint(every=1000, keep_every=50_000),
)
