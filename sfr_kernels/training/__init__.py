"""SFR in the training loops people have: a transformers model, a stock Trainer, checkpoints."""
