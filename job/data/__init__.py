"""Shards of tokenized texts with one latent each: preparing them, reading them, and the order in which training sees them."""
