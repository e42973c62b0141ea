"""Training of text-to-latent and latent-to-text diffusion with a cycle objective."""
