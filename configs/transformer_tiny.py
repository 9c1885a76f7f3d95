"""A small Transformer on pairs cut from the text of the quick start: a document's first line, and the rest of it.

Hardware: two CPU cores, under a minute once the text is prepared. Expected: the loss falls from 8.9 to below 4 nats a
target, in wide swings: a batch holds few pairs, and many documents are alike. On the validation docstrings it is about
6.5; the files of the standard library are longer than a row, which leaves no pair of them.
    lm train transformer_tiny --workdir runs/transformer_tiny
"""

from lm.config import Checkpoint, Config, Eval, Train
from lm.data import Data, Docstrings, SentencePiece, Stdlib
from lm.mesh import Mesh
from lm.models import Transformer
from lm.objectives import Seq2Seq
from lm.optim import AdamW, InverseSqrt

TOKENIZER_SIZE = 4096

config = Config(
    model=Transformer(
        vocab_size=TOKENIZER_SIZE, d_model=128, n_layers=2, n_heads=4, d_ff=512, dropout=0.0, init_std=128**-0.5
    ),
    data=Data(
        path="data/quickstart",
        sources={"stdlib": Stdlib(), "docstrings": Docstrings()},
        tokenizer=SentencePiece(vocab_size=TOKENIZER_SIZE),
        seq_len=384,
        batch_size=16,
        validation_fraction=0.02,
    ),
    objective=Seq2Seq(max_source=48, max_target=160),
    optim=AdamW(lr=2e-3, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, schedule=InverseSqrt(warmup_steps=30)),
    train=Train(steps=60, log_every=10),
    mesh=Mesh(data=-1, fsdp=1),
    checkpoint=Checkpoint(every=60),
    eval=Eval(max_batches=8),
)
