"""Training of text-to-latent and latent-to-text diffusion with a cycle objective."""

import os

# Read by torch when it is imported: large tensors on a CPU lie in huge pages, a step takes a tenth less.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
