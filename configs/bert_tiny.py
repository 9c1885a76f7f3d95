"""A small BERT on the text of the quick start: masked words, and which of two halves came first.

Hardware: two CPU cores, under a minute once the text is prepared. Expected: the loss of masked words falls from 8.4 to
about 6.1, which is what the frequency of words alone tells; the order of halves takes longer to learn.
    lm train bert_tiny --workdir runs/bert_tiny
"""

from lm.config import Checkpoint, Config, Eval, Train
from lm.data import Data, Docstrings, SentencePiece, Stdlib
from lm.mesh import Mesh
from lm.models import Bert, MaskedLMAndPair
from lm.objectives import MaskedLM
from lm.optim import Cosine, Muon

TOKENIZER_SIZE = 4096
VOCAB_SIZE = TOKENIZER_SIZE + 3  # and the mask, [CLS] and [SEP]

config = Config(
    model=Bert(vocab_size=VOCAB_SIZE, d_model=128, n_layers=3, n_heads=4, max_positions=128, task=MaskedLMAndPair()),
    data=Data(
        path="data/quickstart",
        sources={"stdlib": Stdlib(), "docstrings": Docstrings()},
        tokenizer=SentencePiece(vocab_size=TOKENIZER_SIZE),
        seq_len=128,
        batch_size=24,
        validation_fraction=0.02,
    ),
    objective=MaskedLM(
        mask_id=TOKENIZER_SIZE,
        cls_id=TOKENIZER_SIZE + 1,
        sep_id=TOKENIZER_SIZE + 2,
        vocab_size=TOKENIZER_SIZE,
        pair="sop",
    ),
    optim=Muon(lr=0.01, schedule=Cosine(warmup_steps=10)),
    train=Train(steps=60, log_every=10),
    mesh=Mesh(data=-1, fsdp=1),
    checkpoint=Checkpoint(every=60),
    eval=Eval(max_batches=8),
)
