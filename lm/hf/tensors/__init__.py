"""Files of tensors: safetensors and those of PyTorch, without torch."""
