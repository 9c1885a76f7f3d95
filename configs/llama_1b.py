"""A LLaMA of 1.2B parameters, the shape of Llama 3.2 1B with a vocabulary of its own, trained for 100B tokens.

Source: Llama 3 herd of models (Grattafiori et al., 2024) for shape, rope base and schedule.
Hardware: a TPU v5p-32 slice or 32 GPUs of 80 GB. Expected: not run at full length here; `lm describe llama_1b` prints
its FLOPs and bytes per device.
    lm train llama_1b --workdir gs://bucket/llama_1b --distributed
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.models import Llama
from lm.nn.position import Rope
from lm.objectives import CausalLM
from lm.optim import AdamW, Cosine

VOCAB_SIZE = 65_536

config = Config(
    model=Llama(
        vocab_size=VOCAB_SIZE,
        d_model=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        d_ff=8192,
        rope=Rope(theta=500_000.0),
    ),
    data=Data(
        path="data/llama_1b",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(vocab_size=VOCAB_SIZE, train_bytes=500_000_000),
        seq_len=4096,
        batch_size=256,
    ),
    objective=CausalLM(z_loss=1e-4, chunks=8),
    optim=AdamW(lr=6e-4, schedule=Cosine(warmup_steps=2000)),
    train=Train(steps=95_000, eval_every=5000),
    checkpoint=Checkpoint(every=1000, keep_every=20_000),
)
