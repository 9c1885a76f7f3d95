"""GPT-2 124M from scratch (Radford et al., 2019), at the batch of 0.5M tokens that its reproductions use.

Source: "Language Models are Unsupervised Multitask Learners", and the GPT-3 paper's learning rate for this size.
Hardware: 8 GPUs of 80 GB, or a TPU v5e-16 slice. Expected: the reproductions on web text end near a validation loss of
3.1 (OpenWebText) after 300B tokens; this recipe sees 10B. Not run at full length here.
Data: any text. Name yours on the command line:
    lm train gpt2_124m --workdir runs/gpt2 'data.sources={"web": Jsonl(glob="/data/web/*.jsonl.gz")}'
"""

from lm.config import Checkpoint, Config, Train
from lm.data import Data, Jsonl, SentencePiece
from lm.models import GPT2
from lm.objectives import CausalLM
from lm.optim import AdamW, Cosine

config = Config(
    model=GPT2(vocab_size=50304),  # 50257 rounded up to a multiple of 128
    data=Data(
        path="data/gpt2_124m",
        sources={"web": Jsonl(glob="data/raw/web/*.jsonl.gz")},
        tokenizer=SentencePiece(kind="bpe", vocab_size=50257, train_bytes=100_000_000),
        seq_len=1024,
        batch_size=512,
    ),
    objective=CausalLM(chunks=8),
    optim=AdamW(lr=6e-4, schedule=Cosine(warmup_steps=700)),
    train=Train(steps=19_073, eval_every=1000),
    checkpoint=Checkpoint(every=1000, keep_every=5000),
)
