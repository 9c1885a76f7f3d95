"""ELECTRA-base: a discriminator of 109,483,009 parameters and, on the same embedding, a generator a third as wide.

Source: "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators" (Clark et al., 2020), table 6;
only the discriminator is kept for fine-tuning. Other than there: the vocabulary is SentencePiece's.
Hardware: 8 GPUs of 80 GB, or a TPU v5e-16 slice. Expected: not run here. The paper reports a GLUE score of 85.1 after
fine-tuning, on the development set, where BERT-base has 82.2 (table 2).
Data: any text. Name yours on the command line:
    lm train electra_base --workdir runs/electra 'data.sources={"web": Jsonl(glob="/data/web/*.jsonl.gz")}'
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.models import Electra
from lm.objectives import ReplacedTokens
from lm.optim import AdamW, Linear

VOCAB_SIZE = 30_522
TOKENIZER_SIZE = VOCAB_SIZE - 3  # the mask, [CLS] and [SEP] come after the tokenizer's own

config = Config(
    model=Electra(vocab_size=VOCAB_SIZE, dropout=0.1),
    data=Data(
        path="data/electra_base",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(kind="bpe", vocab_size=TOKENIZER_SIZE, train_bytes=100_000_000),
        seq_len=512,
        batch_size=256,
    ),
    objective=ReplacedTokens(
        mask_id=TOKENIZER_SIZE,
        cls_id=TOKENIZER_SIZE + 1,
        sep_id=TOKENIZER_SIZE + 2,
        vocab_size=TOKENIZER_SIZE,
    ),
    optim=AdamW(lr=2e-4, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, schedule=Linear(warmup_steps=10_000)),
    train=Train(steps=766_000, eval_every=10_000),
    checkpoint=Checkpoint(every=5000, keep_every=100_000),
)
