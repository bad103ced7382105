"""What gives accuracy back: weights fitted to samples without labels (compensate), and training with the dense model as teacher (finetune)."""
