"""BERT-base at its published size: 110,106,428 parameters with both heads of pre-training, 109,482,240 without them.

Source: "BERT" (Devlin et al., 2019), appendix A.2. Other than there: rows have 512 tokens from the first step, the
vocabulary is SentencePiece's, and the second head learns the order of two halves in place of next sentences.
Hardware: 8 GPUs of 80 GB, or a TPU v5e-16 slice. Expected: not run here. The paper reports a GLUE score of 79.6 after
fine-tuning; RoBERTa's authors, who trained it again, a perplexity of masked words of 3.99 (Liu et al., 2019, table 3).
Data: any text. Name yours on the command line:
    lm train bert_base --workdir runs/bert 'data.sources={"web": Jsonl(glob="/data/web/*.jsonl.gz")}'
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.models import Bert, MaskedLMAndPair
from lm.objectives import MaskedLM
from lm.optim import AdamW, Linear

VOCAB_SIZE = 30_522
TOKENIZER_SIZE = VOCAB_SIZE - 3  # the mask, [CLS] and [SEP] come after the tokenizer's own

config = Config(
    model=Bert(vocab_size=VOCAB_SIZE, dropout=0.1, task=MaskedLMAndPair()),
    data=Data(
        path="data/bert_base",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(kind="bpe", vocab_size=TOKENIZER_SIZE, train_bytes=100_000_000),
        seq_len=512,
        batch_size=256,
    ),
    objective=MaskedLM(
        mask_id=TOKENIZER_SIZE,
        cls_id=TOKENIZER_SIZE + 1,
        sep_id=TOKENIZER_SIZE + 2,
        vocab_size=TOKENIZER_SIZE,
        pair="sop",
    ),
    optim=AdamW(lr=1e-4, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, schedule=Linear(warmup_steps=10_000)),
    train=Train(steps=1_000_000, eval_every=10_000),
    checkpoint=Checkpoint(every=5000, keep_every=100_000),
)
