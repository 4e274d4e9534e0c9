"""What everything else rests on: tensors, the factors of LoRA, messages, files. Torch and numpy alone."""
