"""Shards of tokenized texts with one latent each: preparing them, reading them, and their order in training."""
