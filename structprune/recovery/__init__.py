"""What gives accuracy back: weights fitted to samples without labels, layer by layer (compensate) and all together (matching), and training with the
dense model as teacher (finetune)."""
