"""The MMDiT blocks of the `mmdit` package, with the settings it does not pass on."""

from __future__ import annotations

import warnings
from importlib import metadata

from torch import nn

from job.config import ModelConfig
from job.errors import UserError

# x-transformers, which mmdit needs, loads einx. Where PyTorch is there already, einx at once tells PyTorch's compiler
# of functions that these blocks never call, and for that the whole compiler is loaded: a second of every start.
# So programs that use a model import einx before torch: then it waits until one of the functions is used. Training
# does not, as PyTorch's optimizers load the compiler as well.

# The parameters of the residual streams changed names and shapes between releases, so weights belong to one of them.
NEEDED = {"mmdit": "0.3.0", "hyper-connections": "0.4.11", "x-transformers": "2.31.10"}


def check_packages() -> None:
    """Refuse a missing or another release of mmdit and what it is built on, saying what to install."""
    for name, wanted in NEEDED.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "not installed"
        if found != wanted:
            install = " ".join(f"{n}=={v}" for n, v in NEEDED.items())
            raise UserError(f"{name} {wanted} is needed, found: {found}; run `pip install {install}`")


def build_backbone(config: ModelConfig) -> nn.Module:
    """Two modalities (text, latent) of width hidden_size, conditioned on a vector of width cond_dim.

    Called with modality_tokens=([B, S, H], [B, 1, H]), modality_masks=([B, S] bool, None), time_cond=[B, cond_dim].
    """
    check_packages()
    with warnings.catch_warnings():
        # x-transformers calls it when it is imported: torch 2.15 would say so on the terminal of every command.
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        from mmdit.mmdit_generalized_pytorch import MMDiT
        from mmdit.mmdit_pytorch import JointAttention

    dims = (config.hidden_size, config.hidden_size)
    backbone = MMDiT(
        depth=config.n_blocks,
        dim_modalities=dims,
        dim_cond=config.cond_dim,
        dim_head=config.head_dim,
        heads=config.n_heads,
        num_residual_streams=config.num_residual_streams,
        ff_kwargs={"dropout": config.dropout},
    )
    if config.qk_rmsnorm:
        for block in backbone.blocks:  # MMDiTBlock takes qk_rmsnorm and drops it
            block.joint_attn = JointAttention(
                dim_inputs=dims, dim_head=config.head_dim, heads=config.n_heads, qk_rmsnorm=True
            )
    return backbone
