"""GPT-2 124M on one GPU, on the text of the quick start: minutes, to see tokens/s, MFU and a falling loss.

Source: GPT-2 (Radford et al., 2019) with a smaller vocabulary. Hardware: one GPU of 16 GB or more.
Expected: a falling loss within the first hundred steps; not run on a GPU yet. To record tokens/s, MFU and the curve:
    python tools/bench/recipe.py debug_gpu --workdir runs/debug_gpu
or plainly
    lm train debug_gpu --workdir runs/debug_gpu
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Docstrings, SentencePiece, Stdlib
from lm.models import GPT2
from lm.objectives import CausalLM
from lm.optim import AdamW, Cosine

VOCAB_SIZE = 8192

config = Config(
    model=GPT2(vocab_size=VOCAB_SIZE),
    data=Data(
        path="data/debug_gpu",
        sources={"stdlib": Stdlib(), "docstrings": Docstrings()},
        tokenizer=SentencePiece(vocab_size=VOCAB_SIZE),
        seq_len=1024,
        batch_size=32,
        validation_fraction=0.03,
    ),
    objective=CausalLM(chunks=4),
    optim=AdamW(lr=6e-4, schedule=Cosine(warmup_steps=100)),
    train=Train(steps=1000, log_every=20, eval_every=250),
    checkpoint=Checkpoint(every=500, keep_last=1),
)
