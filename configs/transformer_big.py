"""The big Transformer on WMT 2014 English-German: 214,245,376 parameters, one table for both languages and the head.

Source: "Attention Is All You Need" (Vaswani et al., 2017), table 3 (which says 213M) and section 5. Other than there:
pairs are packed into rows in place of batches by length, and checkpoints are not averaged.
Hardware: 8 GPUs of 16 GB or more. Expected: not run here; the paper reports 28.4 BLEU on newstest2014 after 300,000
steps, with beam 4 and length penalty 0.6.
Data: JSON lines whose "text" is the English sentence, a newline, the German one:
    lm train transformer_big --workdir runs/wmt 'data.sources={"wmt": Jsonl(glob="/data/wmt14_en_de/*.jsonl.gz")}'
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.models import Transformer
from lm.objectives import Seq2Seq
from lm.optim import AdamW, InverseSqrt

VOCAB_SIZE, D_MODEL, WARMUP_STEPS = 37_000, 1024, 4000

config = Config(
    model=Transformer(
        vocab_size=VOCAB_SIZE,
        d_model=D_MODEL,
        n_layers=6,
        n_heads=16,
        d_ff=4096,
        dropout=0.3,
        init_std=D_MODEL**-0.5,  # the scaled embedding then begins at the size of the sinusoids
    ),
    data=Data(
        path="data/transformer_big",
        sources={"wmt": Jsonl(glob="data/raw/wmt14_en_de/*.jsonl.gz")},
        tokenizer=SentencePiece(kind="bpe", vocab_size=VOCAB_SIZE, train_bytes=200_000_000),
        seq_len=1024,
        batch_size=48,  # about 25,000 tokens of each language (5.1)
    ),
    objective=Seq2Seq(max_source=512, max_target=512, label_smoothing=0.1, chunks=4),
    optim=AdamW(
        lr=(D_MODEL * WARMUP_STEPS) ** -0.5,  # the peak of equation 3
        betas=(0.9, 0.98),
        eps=1e-9,
        weight_decay=0.0,
        clip_norm=None,
        schedule=InverseSqrt(warmup_steps=WARMUP_STEPS),
    ),
    train=Train(steps=300_000, eval_every=5000),
    checkpoint=Checkpoint(every=2500, keep_last=20),
)
