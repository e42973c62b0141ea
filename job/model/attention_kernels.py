"""Triton kernels that add one latent to the attention among the tokens of its row; `job.model.attention` calls them.

A program takes some tokens of one row and head: their part of the latent's attention to them, and the latent's part of
theirs. [R, h, d] lies as [R * h, d], and a program's first number is the row's and head's place in it: of these there
may be more than a GPU counts in the second.
"""

# Triton reads these functions' source; annotations other than tl.constexpr would be read as types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl

from job.model.head_kernels import norm_backward


@triton.jit
def _tile(n_tokens, n_heads, D: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):
    """A program's row, head and tokens, and a head's columns; places [tokens, columns] in [R, S, h, d] and which are
    there; places [columns] in [R, h, d] and which are there."""
    row, head = (tl.program_id(0) // n_heads).to(tl.int64), tl.program_id(0) % n_heads
    token, column = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    is_column = column < D
    at = ((row * n_tokens + token) * n_heads + head)[:, None] * D + column[None, :]
    inside = (token < n_tokens)[:, None] & is_column[None, :]
    return row, head, token, column, at, inside, tl.program_id(0) * D + column, is_column


@triton.jit
def _number():
    """Of a program's tile among those of all rows and heads."""
    return tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def _load(x, at, counts):
    return tl.load(x + at, counts, 0.0).to(tl.float32)


@triton.jit
def merge_forward(
    q,  # [R, S, h, d], and so k and v
    k,
    v,
    out,  # in and out [R, S, h, d]: what the tokens took from each other, then with the latent
    lse,  # in and out [R, h, S] float32: logarithm of their sum of exponents
    lse_of_row,  # its strides
    lse_of_head,
    lse_of_token,
    latent_q,  # [R, h, d], and so keys and values
    latent_k,
    latent_v,
    parts,  # out [R * h, tiles, D + 2] float32: of the latent's attention, unnormalized; its maximum; its sum
    n_tokens,
    n_heads,
    scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row, head, token, column, at, inside, of_latent, is_column = _tile(n_tokens, n_heads, D, COLUMNS, TOKENS)
    is_token = token < n_tokens
    score = tl.sum(_load(q, at, inside) * _load(latent_k, of_latent, is_column)[None, :], 1) * scale
    at_lse = lse + row * lse_of_row + head * lse_of_head + token * lse_of_token
    before = tl.load(at_lse, is_token, 0.0)
    top = tl.maximum(before, score)
    after = top + tl.log(tl.exp(before - top) + tl.exp(score - top))
    merged = tl.exp(before - after)[:, None] * _load(out, at, inside)
    merged += tl.exp(score - after)[:, None] * _load(latent_v, of_latent, is_column)[None, :]
    tl.store(out + at, merged.to(out.dtype.element_ty), inside)
    tl.store(at_lse, after, is_token)

    score = tl.sum(_load(k, at, inside) * _load(latent_q, of_latent, is_column)[None, :], 1) * scale
    score = tl.where(is_token, score, float("-inf"))
    top = tl.max(score, 0)
    exponent = tl.exp(score - top)
    taken = tl.sum(exponent[:, None] * _load(v, at, inside), 0)
    of_part = parts + _number() * (D + 2)
    tl.store(of_part + column, taken, is_column)
    tl.store(of_part + D, top)
    tl.store(of_part + D + 1, tl.sum(exponent, 0))


@triton.jit
def _own(latent_q, latent_k, at, is_column, scale):
    """A latent's query and key [columns] and its score of itself."""
    query, key = _load(latent_q, at, is_column), _load(latent_k, at, is_column)
    return query, key, tl.sum(query * key, 0) * scale


@triton.jit
def latent_forward(
    latent_q,
    latent_k,
    latent_v,
    parts,  # as merge_forward left them
    out,  # out [R, h, d]: what the latents took
    lse,  # out [R * h] float32
    tiles,
    scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Puts the parts of one latent's attention, and its own, together."""
    column = tl.arange(0, COLUMNS)
    is_column = column < D
    at = tl.program_id(0) * D + column
    _, _, own = _own(latent_q, latent_k, at, is_column, scale)
    of_parts = parts + tl.program_id(0).to(tl.int64) * tiles * (D + 2)
    best = tl.full([TILES], float("-inf"), tl.float32)
    for begin in range(0, tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        best = tl.maximum(best, tl.load(of_parts + tile * (D + 2) + D, tile < tiles, float("-inf")))
    top = tl.maximum(tl.max(best, 0), own)
    totals, taken = tl.zeros([TILES], tl.float32), tl.zeros([TILES, COLUMNS], tl.float32)
    for begin in range(0, tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        of_tile = of_parts + tile * (D + 2)
        share = tl.exp(tl.load(of_tile + D, tile < tiles, float("-inf")) - top)
        totals += share * tl.load(of_tile + D + 1, tile < tiles, 0.0)
        inside = (tile < tiles)[:, None] & is_column[None, :]
        taken += share[:, None] * tl.load(of_tile[:, None] + column[None, :], inside, 0.0)
    total = tl.sum(totals, 0) + tl.exp(own - top)
    answer = tl.sum(taken, 0) + tl.exp(own - top) * _load(latent_v, at, is_column)
    tl.store(out + at, (answer / total).to(out.dtype.element_ty), is_column)
    tl.store(lse + tl.program_id(0), top + tl.log(total))


@triton.jit
def _normed(qkv, gain, at, inside, element, NORM: tl.constexpr):
    """Queries or keys before and after their norm, these rounded as attention was given them."""
    given = _load(qkv, at, inside)
    if NORM:
        inverse = tl.rsqrt(tl.maximum(tl.sum(given * given, 1), 1e-24))
        return given, (given * inverse[:, None] * gain[None, :]).to(element).to(tl.float32)
    return given, given


@triton.jit
def queries_backward(
    to_q,  # [R, S, h, d]: gradient through the tokens' attention to each other
    qkv,  # [R, S, 3, h, d]: before the norm
    gains,  # [2, h, d] float32: of queries and of keys
    out,  # [R, S, h, d] and
    lse,  # [R, h, S] with the latents
    lse_of_row,
    lse_of_head,
    lse_of_token,
    to_out,  # [R, S, h, d]
    latent_k,  # [R, h, d]
    latent_v,
    to_qkv,  # out [R, S, 3, h, d]: its queries
    gain_parts,  # out [R, tiles, 2, h, d] float32, to be summed: those of queries
    parts,  # out [R * h, tiles, 3, D] float32, to be summed: of the latents' keys and values
    n_tokens,
    n_heads,
    scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    NORM: tl.constexpr,
):
    """The tokens' queries and the latent's key and value."""
    row, head, token, column, at, inside, of_latent, is_column = _tile(n_tokens, n_heads, D, COLUMNS, TOKENS)
    is_token = token < n_tokens
    width = n_heads * D
    given_at = (row * n_tokens + token)[:, None] * (3 * width) + head * D + column[None, :]
    gain = 1.0
    if NORM:
        gain = tl.load(gains + head * D + column, is_column, 0.0)
    given, query = _normed(qkv, gain, given_at, inside, to_qkv.dtype.element_ty, NORM)
    key, gradient = _load(latent_k, of_latent, is_column), _load(to_out, at, inside)
    at_lse = lse + row * lse_of_row + head * lse_of_head + token * lse_of_token
    share = tl.exp(tl.sum(query * key[None, :], 1) * scale - tl.load(at_lse, is_token, 0.0))
    share = tl.where(is_token, share, 0.0)
    # Of shares' gradients the part along the output is taken away: both in one sum.
    value = _load(latent_v, of_latent, is_column)[None, :] - _load(out, at, inside)
    to_score = share * tl.sum(gradient * value, 1) * scale
    to_query = _load(to_q, at, inside) + to_score[:, None] * key[None, :]
    part = parts + _number() * (3 * D) + column
    tl.store(part + D, tl.sum(to_score[:, None] * query, 0), is_column)
    tl.store(part + 2 * D, tl.sum(share[:, None] * gradient, 0), is_column)
    if NORM:
        to_query, of_gain = norm_backward(to_query, given, gain[None, :])
        of_parts = gain_parts + (row * tl.num_programs(1) + tl.program_id(1)) * (2 * width) + head * D
        tl.store(of_parts + column, tl.sum(of_gain, 0), is_column)
    tl.store(to_qkv + given_at, to_query.to(to_qkv.dtype.element_ty), inside)


@triton.jit
def keys_backward(
    to_k,  # [R, S, h, d]: gradients through the tokens' attention to each other
    to_v,
    qkv,  # [R, S, 3, h, d]: before the norm
    gains,  # [2, h, d] float32: of queries and of keys
    latent_q,  # [R, h, d]
    latent_out,  # [R, h, d] and
    latent_lse,  # [R * h] with the latents themselves
    to_latent_out,  # [R, h, d]
    to_qkv,  # out [R, S, 3, h, d]: its keys and values
    gain_parts,  # out [R, tiles, 2, h, d] float32, to be summed: those of keys
    parts,  # out [R * h, tiles, 3, D] float32, to be summed: of the latents' queries
    n_tokens,
    n_heads,
    scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    NORM: tl.constexpr,
):
    """The tokens' keys and values and the latent's query."""
    row, head, token, column, at, inside, of_latent, is_column = _tile(n_tokens, n_heads, D, COLUMNS, TOKENS)
    is_token = token < n_tokens
    width = n_heads * D
    given_at = (row * n_tokens + token)[:, None] * (3 * width) + width + head * D + column[None, :]
    element = to_qkv.dtype.element_ty
    gain = 1.0
    if NORM:
        gain = tl.load(gains + width + head * D + column, is_column, 0.0)
    given, key = _normed(qkv, gain, given_at, inside, element, NORM)
    query, gradient = _load(latent_q, of_latent, is_column), _load(to_latent_out, of_latent, is_column)
    share = tl.exp(tl.sum(key * query[None, :], 1) * scale - tl.load(latent_lse + tl.program_id(0)))
    share = tl.where(is_token, share, 0.0)
    value = _load(qkv + width, given_at, inside) - _load(latent_out, of_latent, is_column)[None, :]
    to_score = share * tl.sum(value * gradient[None, :], 1) * scale
    to_key = _load(to_k, at, inside) + to_score[:, None] * query[None, :]
    to_value = _load(to_v, at, inside) + share[:, None] * gradient[None, :]
    tl.store(parts + _number() * (3 * D) + column, tl.sum(to_score[:, None] * key, 0), is_column)
    if NORM:
        to_key, of_gain = norm_backward(to_key, given, gain[None, :])
        of_parts = gain_parts + (row * tl.num_programs(1) + tl.program_id(1)) * (2 * width) + width + head * D
        tl.store(of_parts + column, tl.sum(of_gain, 0), is_column)
    tl.store(to_qkv + given_at, to_key.to(element), inside)
    tl.store(to_qkv + given_at + width, to_value.to(element), inside)


@triton.jit
def latent_backward(
    latent_q,
    latent_k,
    latent_v,
    latent_out,
    latent_lse,
    to_latent_out,
    parts,  # as queries_backward and keys_backward left them
    to_latents,  # out [3, R, h, d] float32: gradients of queries, keys and values
    tiles,
    of_each,  # elements of each of the three
    scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sums the parts of one latent and head, and adds what passes from the latent to itself."""
    column = tl.arange(0, COLUMNS)
    is_column = column < D
    at = tl.program_id(0) * D + column
    query, key, own = _own(latent_q, latent_k, at, is_column, scale)
    gradient = _load(to_latent_out, at, is_column)
    share = tl.exp(own - tl.load(latent_lse + tl.program_id(0)))
    along = tl.sum(gradient * _load(latent_out, at, is_column), 0)
    to_score = share * (tl.sum(gradient * _load(latent_v, at, is_column), 0) - along) * scale
    of_queries = tl.zeros([TILES, COLUMNS], tl.float32)
    of_keys, of_values = of_queries, of_queries
    of_parts = parts + tl.program_id(0).to(tl.int64) * tiles * (3 * D)
    for begin in range(0, tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & is_column[None, :]
        of_tile = of_parts + tile[:, None] * (3 * D) + column[None, :]
        of_queries += tl.load(of_tile, inside, 0.0)
        of_keys += tl.load(of_tile + D, inside, 0.0)
        of_values += tl.load(of_tile + 2 * D, inside, 0.0)
    tl.store(to_latents + at, tl.sum(of_queries, 0) + to_score * key, is_column)
    tl.store(to_latents + of_each + at, tl.sum(of_keys, 0) + to_score * query, is_column)
    tl.store(to_latents + 2 * of_each + at, tl.sum(of_values, 0) + share * gradient, is_column)
