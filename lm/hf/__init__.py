"""Hugging Face model folders, in and out, without torch: `load` and `save` are a checking face with their names.

    from lm import hf
    model = hf.load(folder)
    model(input_ids=ids)["logits"], model.generate(input_ids=ids, num_beams=4), model.grad(input_ids=ids, labels=ids)
    hf.save(model, folder)

`tensors` reads and writes the files, `families` say what is in them, `face` is what a loaded model is called by.
"""

from lm.hf.export import save
from lm.hf.face.model import HFModel, load
from lm.renamed import renamed_names

__all__ = ["HFModel", "load", "save"]

__getattr__ = renamed_names(
    __name__,
    {
        "Model": "HFModel",
    },
)
