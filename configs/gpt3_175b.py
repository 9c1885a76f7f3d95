"""GPT-3 at its published size: 174,604,836,864 parameters, 2048 tokens of context, 3.1M tokens a step, 300B in all.

Source: "Language Models are Few-Shot Learners" (Brown et al., 2020), table 2.1 and appendix B. Every other layer is
locally banded; the paper does not say how wide, and 256 is GPT-Neo's. The vocabulary of 50,257 is rounded up to a
multiple of 128, without which the model has 174,604,259,328 parameters (one table serves both ends).
Hardware: 512 TPU v5p chips or 512 GPUs of 80 GB. Expected: not run here; the paper's model reaches 76.2 % on LAMBADA
without an example.
    lm train gpt3_175b --workdir gs://bucket/gpt3_175b --distributed
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.mesh import Mesh
from lm.models import GPT2, Compute
from lm.objectives import CausalLM
from lm.optim import AdamW, Cosine

config = Config(
    model=GPT2(
        vocab_size=50_304,
        d_model=12_288,
        n_layers=96,
        n_heads=96,
        max_positions=2048,
        window=256,
        compute=Compute(remat="full"),
    ),
    data=Data(
        path="data/gpt3_175b",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(kind="bpe", vocab_size=50_257, train_bytes=1_000_000_000),
        seq_len=2048,
        batch_size=1536,
    ),
    objective=CausalLM(document_mask=False, chunks=16),
    optim=AdamW(lr=6e-5, schedule=Cosine(warmup_steps=120)),
    train=Train(steps=95_000, eval_every=1000),
    mesh=Mesh(data=1, fsdp=64, tensor=8),
    checkpoint=Checkpoint(every=500, keep_every=5000),
)
