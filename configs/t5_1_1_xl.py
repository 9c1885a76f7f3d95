"""T5 1.1 XL at its published size: 2,849,757,184 parameters, with a head of its own and 32,128 rows of each table.

Source: "GLU Variants Improve Transformer" (Shazeer, 2020) and the release notes of T5 1.1: gated gelu, no dropout in
pre-training, an embedding and a head apart; objective and optimizer of Raffel et al., 2020.
Hardware: a TPU v5p-128 slice or 128 GPUs of 80 GB. Expected: not run here; tuned further as FLAN-T5 XL the released
weights reach 52.4 on MMLU with five examples (Chung et al., 2022).
Data: any text. Name yours on the command line:
    lm train t5_1_1_xl --workdir gs://bucket/t5_1_1_xl --distributed
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.mesh import Mesh
from lm.models import T5, Compute
from lm.objectives import SpanCorruption
from lm.optim import Adafactor, InverseSqrt

TOKENIZER_SIZE, N_SENTINELS = 32_000, 100

config = Config(
    model=T5(
        d_model=2048,
        n_layers=24,
        n_heads=32,
        d_ff=5120,
        activation="gelu_tanh",
        gated=True,
        tied=False,
        scale_output=False,
        dropout=0.0,
        compute=Compute(remat="full"),
    ),
    data=Data(
        path="data/t5_1_1_xl",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(vocab_size=TOKENIZER_SIZE, train_bytes=100_000_000),
        seq_len=568,  # of text: 512 slots of the encoder and 114 of the decoder (`SpanCorruption.raw_length`)
        batch_size=2048,
    ),
    objective=SpanCorruption(first_sentinel_id=TOKENIZER_SIZE + N_SENTINELS - 1, n_sentinels=N_SENTINELS, chunks=6),
    optim=Adafactor(lr=0.01, schedule=InverseSqrt(timescale=10_000)),
    train=Train(steps=1_000_000, eval_every=10_000),
    mesh=Mesh(data=1, fsdp=128),
    checkpoint=Checkpoint(every=1000, keep_every=50_000),
)
