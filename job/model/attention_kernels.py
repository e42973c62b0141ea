"""Triton kernels that add one latent to the attention among the tokens of its row; `job.model.attention` calls them.

A program takes some tokens of one row and head: their part of the latent's attention to them, and the latent's part of
theirs. [R, h, d] lies as [R * h, d], and a program's first number is the row's and head's place in it: a GPU starts
programs in this order, so those of all heads of a few tokens run together and read whole stretches of memory. Norms are
computed where queries and keys are read, so heads of the few latents need no kernel of their own.
"""

# Triton reads these functions' source; annotations other than tl.constexpr would be read as types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl

from job.model.head_kernels import norm_backward

QUERY, KEY, VALUE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # in [.., 3, h, d]


@triton.jit
def _tile(n_tokens, n_heads, D: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):
    """A program's row, head and tokens, and a head's columns, with which of them there are; places [tokens, columns] in
    [R, S, h, d] and, of queries, in [R, S, 3, h, d], and which are there."""
    row, head = (tl.program_id(0) // n_heads).to(tl.int64), tl.program_id(0) % n_heads
    token, column = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    is_token, is_column = token < n_tokens, column < D
    place = row * n_tokens + token
    at = (place * n_heads + head)[:, None] * D + column[None, :]
    of_query = (place * (3 * n_heads) + head)[:, None] * D + column[None, :]
    return row, head, token, is_token, column, is_column, at, of_query, is_token[:, None] & is_column[None, :]


@triton.jit
def _number():
    """Of a program's tile among those of all rows and heads."""
    return tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def _load(x, at, counts):
    return tl.load(x + at, counts, 0.0).to(tl.float32)


@triton.jit
def _normed(x, gain, element, NORM: tl.constexpr):
    """Queries or keys [tokens, columns] after their norm, rounded as attention takes them."""
    if NORM:
        inverse = tl.rsqrt(tl.maximum(tl.sum(x * x, 1), 1e-24))
        x = (x * inverse[:, None] * gain).to(element).to(tl.float32)
    return x


@triton.jit
def _gain(gains, PART: tl.constexpr, head, n_heads, column, D: tl.constexpr, NORM: tl.constexpr):
    """Gain [1, columns] of a head's queries or keys."""
    gain = 1.0
    if NORM:
        gain = tl.load(gains + (PART * n_heads + head) * D + column, column < D, 0.0)[None, :]
    return gain


@triton.jit
def _in_latent(PART: tl.constexpr, row, head, n_heads, column, D: tl.constexpr):
    """Places [1, columns] of a latent's query, key or value in [R, 3, h, d]."""
    return (((row * 3 + PART) * n_heads + head) * D + column)[None, :]


@triton.jit
def _of_latent(latent, gains, PART: tl.constexpr, row, head, n_heads, column, D: tl.constexpr, NORM: tl.constexpr):
    """A latent's query, key or value [1, columns] after its norm."""
    normed: tl.constexpr = NORM and PART != VALUE
    gain = _gain(gains, PART, head, n_heads, column, D, normed)
    given = _load(latent, _in_latent(PART, row, head, n_heads, column, D), (column < D)[None, :])
    return _normed(given, gain, latent.dtype.element_ty, normed)


@triton.jit
def _store_gradient(to_qkv, at, inside, gradient, given, gain, gain_parts, at_part, is_column, NORM: tl.constexpr):
    """Stores gradients [tokens, columns] of queries or keys before their norm, and those of their gain summed up."""
    if NORM:
        gradient, of_gain = norm_backward(gradient, given, gain)
        tl.store(gain_parts + at_part, tl.sum(of_gain, 0), is_column)
    tl.store(to_qkv + at, gradient.to(to_qkv.dtype.element_ty), inside)


@triton.jit
def tokens_forward(
    qkv,  # [R, S, 3, h, d]: before the norm
    gains,  # [2, h, d] float32: of queries and of keys
    latent,  # [R, 3, h, d]
    latent_gains,
    q,  # out [R, S, h, d], and so k and v
    k,
    v,
    scores,  # out [R, h, S] float32: of the tokens' queries and the latent's key
    parts,  # out [R * h, tiles, D + 2] float32: of the latent's attention, unnormalized; its maximum; its sum
    n_tokens,
    n_heads,
    scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    NORM: tl.constexpr,
):
    """The tokens' heads; while they are at hand, all that the latent's attention asks of them."""
    row, head, token, is_token, column, is_column, at, given_at, inside = _tile(n_tokens, n_heads, D, COLUMNS, TOKENS)
    width = n_heads * D
    # Here and below the tokens are read first: the GPU reads no further while it waits for a sum.
    query, key = _load(qkv, given_at, inside), _load(qkv + width, given_at, inside)
    value = _load(qkv + 2 * width, given_at, inside)
    latent_key = _of_latent(latent, latent_gains, KEY, row, head, n_heads, column, D, NORM)
    latent_query = _of_latent(latent, latent_gains, QUERY, row, head, n_heads, column, D, NORM)
    query = _normed(query, _gain(gains, QUERY, head, n_heads, column, D, NORM), q.dtype.element_ty, NORM)
    key = _normed(key, _gain(gains, KEY, head, n_heads, column, D, NORM), q.dtype.element_ty, NORM)
    tl.store(q + at, query.to(q.dtype.element_ty), inside)
    tl.store(k + at, key.to(q.dtype.element_ty), inside)
    tl.store(v + at, value.to(q.dtype.element_ty), inside)
    at_score = tl.program_id(0).to(tl.int64) * n_tokens + token
    tl.store(scores + at_score, tl.sum(query * latent_key, 1) * scale, is_token)
    score = tl.where(is_token, tl.sum(key * latent_query, 1) * scale, float("-inf"))
    top = tl.max(score, 0)
    exponent = tl.exp(score - top)
    of_part = parts + _number() * (D + 2)
    tl.store(of_part + column, tl.sum(exponent[:, None] * value, 0), is_column)
    tl.store(of_part + D, top)
    tl.store(of_part + D + 1, tl.sum(exponent, 0))


@triton.jit
def merge_forward(
    out,  # in and out [R, S, h, d]: what the tokens took from each other, then with the latent
    lse,  # in and out [R, h, S] float32: logarithm of their sum of exponents
    lse_of_row,  # its strides
    lse_of_head,
    lse_of_token,
    scores,  # [R, h, S] float32: of the latent
    latent,  # [R, 3, h, d]
    n_tokens,
    n_heads,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row, head, token, is_token, column, _, at, _, inside = _tile(n_tokens, n_heads, D, COLUMNS, TOKENS)
    alone = _load(out, at, inside)
    value = _of_latent(latent, None, VALUE, row, head, n_heads, column, D, False)
    score = tl.load(scores + tl.program_id(0).to(tl.int64) * n_tokens + token, is_token, 0.0)
    at_lse = lse + row * lse_of_row + head * lse_of_head + token * lse_of_token
    before = tl.load(at_lse, is_token, 0.0)
    top = tl.maximum(before, score)
    after = top + tl.log(tl.exp(before - top) + tl.exp(score - top))
    merged = tl.exp(before - after)[:, None] * alone + tl.exp(score - after)[:, None] * value
    tl.store(out + at, merged.to(out.dtype.element_ty), inside)
    tl.store(at_lse, after, is_token)


@triton.jit
def latent_forward(
    latent,  # [R, 3, h, d]
    latent_gains,
    parts,  # as tokens_forward left them
    out,  # out [R, h, d]: what the latents took
    lse,  # out [R * h] float32
    tiles,
    n_heads,
    scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    NORM: tl.constexpr,
):
    """Puts the parts of one latent's attention, and its own, together."""
    row, head = (tl.program_id(0) // n_heads).to(tl.int64), tl.program_id(0) % n_heads
    column = tl.arange(0, COLUMNS)
    is_column = column < D
    query = _of_latent(latent, latent_gains, QUERY, row, head, n_heads, column, D, NORM)
    key = _of_latent(latent, latent_gains, KEY, row, head, n_heads, column, D, NORM)
    value = _of_latent(latent, None, VALUE, row, head, n_heads, column, D, False)
    own = tl.sum(tl.sum(query * key, 1), 0) * scale
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
    answer = tl.sum(taken, 0)[None, :] + tl.exp(own - top) * value
    at = (tl.program_id(0) * D + column)[None, :]
    tl.store(out + at, (answer / total).to(out.dtype.element_ty), is_column[None, :])
    tl.store(lse + tl.program_id(0), top + tl.log(total))


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
    latent,  # [R, 3, h, d]
    latent_gains,
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
    row, head, token, is_token, column, is_column, at, given_at, inside = _tile(n_tokens, n_heads, D, COLUMNS, TOKENS)
    width = n_heads * D
    given, to_query = _load(qkv, given_at, inside), _load(to_q, at, inside)
    gradient, output = _load(to_out, at, inside), _load(out, at, inside)
    key = _of_latent(latent, latent_gains, KEY, row, head, n_heads, column, D, NORM)
    value = _of_latent(latent, None, VALUE, row, head, n_heads, column, D, False)
    gain = _gain(gains, QUERY, head, n_heads, column, D, NORM)
    query = _normed(given, gain, to_qkv.dtype.element_ty, NORM)
    at_lse = lse + row * lse_of_row + head * lse_of_head + token * lse_of_token
    share = tl.exp(tl.sum(query * key, 1) * scale - tl.load(at_lse, is_token, 0.0))
    # Of shares' gradients the part along the output is taken away: both in one sum.
    to_score = share * tl.sum(gradient * (value - output), 1) * scale
    to_query += to_score[:, None] * key
    part = parts + _number() * (3 * D) + column
    tl.store(part + D, tl.sum(to_score[:, None] * query, 0), is_column)
    tl.store(part + 2 * D, tl.sum(share[:, None] * gradient, 0), is_column)
    at_part = (row * tl.num_programs(1) + tl.program_id(1)) * (2 * width) + head * D + column
    _store_gradient(to_qkv, given_at, inside, to_query, given, gain, gain_parts, at_part, is_column, NORM)


@triton.jit
def keys_backward(
    to_k,  # [R, S, h, d]: gradients through the tokens' attention to each other
    to_v,
    qkv,  # [R, S, 3, h, d]: before the norm
    gains,  # [2, h, d] float32: of queries and of keys
    latent,  # [R, 3, h, d]
    latent_gains,
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
    row, head, _, is_token, column, is_column, at, of_query, inside = _tile(n_tokens, n_heads, D, COLUMNS, TOKENS)
    width = n_heads * D
    given_at = of_query + width
    of_latent = (tl.program_id(0) * D + column)[None, :]
    given, value = _load(qkv, given_at, inside), _load(qkv + width, given_at, inside)
    to_key, to_value = _load(to_k, at, inside), _load(to_v, at, inside)
    query = _of_latent(latent, latent_gains, QUERY, row, head, n_heads, column, D, NORM)
    output = _load(latent_out, of_latent, is_column[None, :])
    gradient = _load(to_latent_out, of_latent, is_column[None, :])
    gain = _gain(gains, KEY, head, n_heads, column, D, NORM)
    key = _normed(given, gain, to_qkv.dtype.element_ty, NORM)
    share = tl.exp(tl.sum(key * query, 1) * scale - tl.load(latent_lse + tl.program_id(0)))
    share = tl.where(is_token, share, 0.0)  # without a token it may be infinite
    to_score = share * tl.sum((value - output) * gradient, 1) * scale
    to_key += to_score[:, None] * query
    to_value += share[:, None] * gradient
    tl.store(parts + _number() * (3 * D) + column, tl.sum(to_score[:, None] * key, 0), is_column)
    at_part = (row * tl.num_programs(1) + tl.program_id(1)) * (2 * width) + width + head * D + column
    _store_gradient(to_qkv, given_at, inside, to_key, given, gain, gain_parts, at_part, is_column, NORM)
    tl.store(to_qkv + given_at + width, to_value.to(to_qkv.dtype.element_ty), inside)


@triton.jit
def latent_backward(
    latent,  # [R, 3, h, d]
    gains,  # [2, h, d] float32
    latent_out,  # [R, h, d] and
    latent_lse,  # [R * h] as latent_forward left them
    to_latent_out,
    parts,  # as queries_backward and keys_backward left them
    to_latent,  # out [R, 3, h, d]
    gain_parts,  # out [R, 2, h, d] float32, to be summed
    tiles,
    n_heads,
    scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    NORM: tl.constexpr,
):
    """Sums the parts of one latent and head, and adds what passes from the latent to itself."""
    row, head = (tl.program_id(0) // n_heads).to(tl.int64), tl.program_id(0) % n_heads
    column = tl.arange(0, COLUMNS)
    is_column = column < D
    inside = is_column[None, :]
    of_query, of_key, of_value = _sums_of_parts(parts, tiles, column, D, COLUMNS, TILES)
    width = n_heads * D
    at_query = _in_latent(QUERY, row, head, n_heads, column, D)
    query_given, key_given = _load(latent, at_query, inside), _load(latent, at_query + width, inside)
    value = _load(latent, at_query + 2 * width, inside)
    query_gain = _gain(gains, QUERY, head, n_heads, column, D, NORM)
    key_gain = _gain(gains, KEY, head, n_heads, column, D, NORM)
    query = _normed(query_given, query_gain, latent.dtype.element_ty, NORM)
    key = _normed(key_given, key_gain, latent.dtype.element_ty, NORM)
    at = (tl.program_id(0) * D + column)[None, :]
    gradient = _load(to_latent_out, at, inside)
    share = tl.exp(tl.sum(query * key, 1) * scale - tl.load(latent_lse + tl.program_id(0)))
    to_score = (share * tl.sum(gradient * (value - _load(latent_out, at, inside)), 1) * scale)[:, None]
    of_query, of_key = of_query + to_score * key, of_key + to_score * query
    of_value += share[:, None] * gradient
    at_part = (row * 2 * n_heads + head) * D + column
    _store_gradient(
        to_latent, at_query, inside, of_query, query_given, query_gain, gain_parts, at_part, is_column, NORM
    )
    at_key, at_part = at_query + width, at_part + width
    _store_gradient(to_latent, at_key, inside, of_key, key_given, key_gain, gain_parts, at_part, is_column, NORM)
    tl.store(to_latent + at_query + 2 * width, of_value.to(to_latent.dtype.element_ty), inside)


@triton.jit
def _sums_of_parts(parts, tiles, column, D: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr):
    """One latent's and head's parts [tiles, 3, D] summed: [1, columns] of its query, its key and its value."""
    of_queries = tl.zeros([TILES, COLUMNS], tl.float32)
    of_keys, of_values = of_queries, of_queries
    of_parts = parts + tl.program_id(0).to(tl.int64) * tiles * (3 * D)
    for begin in range(0, tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & (column < D)[None, :]
        of_tile = of_parts + tile[:, None] * (3 * D) + column[None, :]
        of_queries += tl.load(of_tile, inside, 0.0)
        of_keys += tl.load(of_tile + D, inside, 0.0)
        of_values += tl.load(of_tile + 2 * D, inside, 0.0)
    return tl.sum(of_queries, 0)[None, :], tl.sum(of_keys, 0)[None, :], tl.sum(of_values, 0)[None, :]
