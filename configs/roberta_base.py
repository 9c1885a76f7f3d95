"""RoBERTa-base at its published size: 124,697,433 parameters with the masked-word head.

Source: "RoBERTa" (Liu et al., 2019), table 9; the vocabulary is SentencePiece's. Hardware: 64 GPUs of 80 GB, or a TPU
v5p-64 slice. Expected: not run here. The paper reports a perplexity of masked words of 3.68 for this size at batches of
2,000 rows on BookCorpus and Wikipedia (table 3), and published the model after 500,000 steps on 160 GB of text.
Data: any text. Name yours on the command line:
    lm train roberta_base --workdir runs/roberta 'data.sources={"web": Jsonl(glob="/data/web/*.jsonl.gz")}'
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.models import Roberta
from lm.objectives import MaskedLM
from lm.optim import AdamW, Linear

VOCAB_SIZE = 50_265
TOKENIZER_SIZE = VOCAB_SIZE - 3  # the mask, [CLS] and [SEP] come after the tokenizer's own

config = Config(
    # Padding is id 0 of our tokenizer, 1 of the published one: the table has 514 rows all the same.
    model=Roberta(vocab_size=VOCAB_SIZE, pad_id=0, dropout=0.1),
    data=Data(
        path="data/roberta_base",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(kind="bpe", vocab_size=TOKENIZER_SIZE, train_bytes=100_000_000),
        seq_len=512,
        batch_size=8192,
    ),
    objective=MaskedLM(
        mask_id=TOKENIZER_SIZE,
        cls_id=TOKENIZER_SIZE + 1,
        sep_id=TOKENIZER_SIZE + 2,
        vocab_size=TOKENIZER_SIZE,
        chunks=7,
    ),
    optim=AdamW(
        lr=6e-4,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.01,
        clip_norm=None,
        schedule=Linear(warmup_steps=24_000),
    ),
    train=Train(steps=500_000, microbatches=4, eval_every=5000),
    checkpoint=Checkpoint(every=1000, keep_every=50_000),
)
