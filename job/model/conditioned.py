"""What blocks take from the conditions and from their small weights, for all blocks at once.

A block has five linear layers that see nothing but the conditions, four hyper-connections of small weights, and gains
of heads. Block by block they would start more than a hundred small kernels forward and backward, and a GPU needs its
3 us for each, however little it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from job.model.sublayer import connection_weights

Stacked = tuple[Tensor, Tensor]  # weights [sum of outputs, cond_dim] and biases of the layers of `conditioned_layers`


class Conditioned(NamedTuple):
    """Of one block. Lists of four: attention of texts and of latents, feed-forward of texts and of latents."""

    connections: list[tuple[Tensor, Tensor]]  # four: weight and bias of `sublayer.Reading`
    modulations: list[Tensor]  # four [C, 2H]: gain and bias of the norm under each condition
    gains: list[Tensor]  # four [C, H]: of what the branch gives
    head_gains: list[Tensor | None]  # of texts and of latents [2, h, d]: of queries and of keys, where these are normed


def conditioned_layers(blocks: Sequence[Any]) -> list[nn.Linear]:
    """The layers that see the conditions: of each block the four norms' and that of the branches' gains."""
    return [
        sequence[-1]
        for block in blocks
        for sequence in (
            *(norm.to_cond for norm in (*block.attn_layernorms, *block.ff_layernorms)),
            block.to_post_branch_gammas,
        )
    ]


def prepare(blocks: Sequence[Any], cond: Tensor, stacked: Stacked | None = None) -> list[Conditioned]:
    """For each block what it takes from conditions [C, cond_dim], which went through their SiLU."""
    layers = conditioned_layers(blocks)
    if stacked:
        outputs: Sequence[Tensor] = F.linear(cond, *stacked).split([layer.out_features for layer in layers], dim=-1)
    else:
        outputs = [layer(cond) for layer in layers]
    connections = connection_weights([c for b in blocks for c in (*b.attn_residual_fns, *b.ff_residual_fns)])
    head_gains = _head_gains(blocks)
    prepared = []
    for number, block in enumerate(blocks):
        *modulations, gains = outputs[5 * number : 5 * number + 5]
        prepared.append(
            Conditioned(
                connections[4 * number : 4 * number + 4],
                modulations,
                list(gains.split([*block.dim_modalities, *block.dim_modalities], dim=-1)),
                head_gains[2 * number : 2 * number + 2],
            )
        )
    return prepared


def _head_gains(blocks: Sequence[Any]) -> list[Tensor | None]:
    """Gains of the heads of texts and of latents, block by block."""
    norms = [
        norm
        for block in blocks
        if block.joint_attn.qk_rmsnorm
        for of_modality in zip(block.joint_attn.q_rmsnorms, block.joint_attn.k_rmsnorms, strict=True)
        for norm in of_modality
    ]
    if not norms:
        return [None] * (2 * len(blocks))
    gains = torch.stack([norm.gamma.squeeze(1) for norm in norms]) * norms[0].scale
    return list(gains.unflatten(0, (-1, 2)).unbind())
