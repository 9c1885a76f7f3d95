"""BART base at its published size: 139,420,416 parameters, the head being the embedding.

Source: "BART" (Lewis et al., 2020), 2 and, for the large model whose steps and rows these are, 5; the paper does not
say its learning rate: this one is that of RoBERTa (Liu et al., 2019), whose rows it has.
Hardware: 64 GPUs of 80 GB or a TPU v5p-64 slice. Expected: not run here; the paper's table 1 reports F1 90.8 on SQuAD
1.1 for this size and objective, after 1M steps on books and Wikipedia.
Data: any text. Name yours on the command line:
    lm train bart_base --workdir gs://bucket/bart_base --distributed
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.models import Bart
from lm.objectives import Denoising
from lm.optim import AdamW, Linear

VOCAB_SIZE = 50_265

config = Config(
    model=Bart(vocab_size=VOCAB_SIZE, d_model=768, n_layers=6, n_heads=12, d_ff=3072),
    data=Data(
        path="data/bart_base",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(kind="bpe", vocab_size=VOCAB_SIZE - 1, train_bytes=100_000_000),
        seq_len=512,
        batch_size=8000,
    ),
    objective=Denoising(mask_id=VOCAB_SIZE - 1, chunks=8),
    optim=AdamW(lr=4e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, schedule=Linear(warmup_steps=10_000)),
    train=Train(steps=500_000, microbatches=5, eval_every=10_000),
    checkpoint=Checkpoint(every=1000, keep_every=50_000),
)
