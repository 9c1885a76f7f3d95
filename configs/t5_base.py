"""T5 base at its published size: 222,903,552 parameters, the head being the embedding, with 32,128 rows of it.

Source: "Exploring the Limits of Transfer Learning" (Raffel et al., 2020), 3.1 and, for steps and rows, 3.7.
Hardware: a TPU v5p-32 slice or 32 GPUs of 80 GB. Expected: not run here; the paper's table 14 reports a GLUE average of
82.7 for this size, whose pre-training saw the tasks too.
Data: any text. Name yours on the command line:
    lm train t5_base --workdir gs://bucket/t5_base --distributed
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.models import T5
from lm.objectives import SpanCorruption
from lm.optim import Adafactor, InverseSqrt

TOKENIZER_SIZE, N_SENTINELS = 32_000, 100

config = Config(
    model=T5(),
    data=Data(
        path="data/t5_base",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(vocab_size=TOKENIZER_SIZE, train_bytes=100_000_000),
        seq_len=568,  # of text: 512 slots of the encoder and 114 of the decoder (`SpanCorruption.raw_length`)
        batch_size=2048,
    ),
    objective=SpanCorruption(first_sentinel_id=TOKENIZER_SIZE + N_SENTINELS - 1, n_sentinels=N_SENTINELS, chunks=6),
    optim=Adafactor(lr=0.01, schedule=InverseSqrt(timescale=10_000)),
    train=Train(steps=1_000_000, eval_every=10_000),
    checkpoint=Checkpoint(every=5000, keep_every=100_000),
)
