"""ALBERT-xxlarge at its published size: 223,158,450 parameters with both heads of pre-training, 222,595,584 without.

Source: "ALBERT" (Lan et al., 2020), sections 3 and 4.1; the paper rounds the size to 235M. Other than there: AdamW in
place of LAMB, which is not here, at a rate that was not tuned.
Hardware: 256 TPU v5p chips or 256 GPUs of 80 GB; a token passes 12 times through the one layer that all share.
Expected: not run here. The paper reports an average of 88.7 over its five tasks after these 125,000 steps (table 2).
Data: any text. Name yours on the command line:
    lm train albert_xxlarge --workdir gs://bucket/albert --distributed \
        'data.sources={"web": Jsonl(glob="/data/web/*.jsonl.gz")}'
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.models import Albert, Compute, MaskedLMAndPair
from lm.objectives import MaskedLM
from lm.optim import AdamW, Linear

VOCAB_SIZE = 30_000
TOKENIZER_SIZE = VOCAB_SIZE - 3  # the mask, [CLS] and [SEP] come after the tokenizer's own

config = Config(
    model=Albert(vocab_size=VOCAB_SIZE, task=MaskedLMAndPair(), compute=Compute(remat="full")),
    data=Data(
        path="data/albert_xxlarge",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(vocab_size=TOKENIZER_SIZE, train_bytes=100_000_000),
        seq_len=512,
        batch_size=4096,
    ),
    objective=MaskedLM(
        mask_id=TOKENIZER_SIZE,
        cls_id=TOKENIZER_SIZE + 1,
        sep_id=TOKENIZER_SIZE + 2,
        vocab_size=TOKENIZER_SIZE,
        span=3,
        pair="sop",
    ),
    optim=AdamW(lr=2e-4, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, schedule=Linear(warmup_steps=3125)),
    train=Train(steps=125_000, eval_every=5000),
    checkpoint=Checkpoint(every=1000, keep_every=25_000),
)
