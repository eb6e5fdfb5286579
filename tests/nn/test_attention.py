from __future__ import annotations

import pytest
import torch

from flowback.nn.attention import Attention, KVCache, Rotary, rotary_table

WIDTH, HEAD, GRID = 32, 16, 3
TOKENS = GRID**2


def attention(qk_norm: bool = False) -> Attention:
    torch.manual_seed(0)
    return Attention(WIDTH, HEAD, qk_norm).double()


def rotary() -> Rotary:
    return Rotary(*(table.double() for table in rotary_table(GRID, HEAD)))


def rows(table: Rotary, start: int, end: int) -> Rotary:
    return Rotary(table.cos[start:end], table.sin[start:end])


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("pieces", [[1] * TOKENS, [4, 5], [1, 3, 2, 3], [TOKENS]])
def test_pieces_with_a_cache_equal_the_whole_sequence(pieces, qk_norm):
    layer, table = attention(qk_norm), rotary()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    whole = layer(x, table)
    cache = KVCache.empty(1, 2, WIDTH // HEAD, TOKENS, HEAD, like=x)
    start, outputs = 0, []
    for n in pieces:
        end = start + n
        outputs.append(
            layer(x[:, start:end], rows(table, start, end), (cache.keys[0], cache.values[0]), start)
        )
        start = end
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-12)


def test_what_lies_in_the_cache_beyond_the_call_is_not_read():
    layer = attention()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    cache = KVCache.empty(1, 2, WIDTH // HEAD, TOKENS, HEAD, like=x)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    y = layer(x[:, :4], None, (cache.keys[0], cache.values[0]), 0)
    torch.testing.assert_close(y, layer(x[:, :4]), rtol=0, atol=1e-12)


def test_later_tokens_have_no_influence():
    layer = attention()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5:] += 1
    before, after = layer(x), layer(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(dim=-1).all()


def test_temperature_divides_the_logits_and_may_differ_per_image():
    layer = attention()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    temperature = torch.tensor([1.0, 2.5], dtype=torch.float64).view(2, 1, 1, 1)
    y = layer(x, temperature=temperature)
    torch.testing.assert_close(y[:1], layer(x[:1]), rtol=0, atol=1e-12)
    torch.testing.assert_close(y[1:], layer(x[1:], temperature=2.5), rtol=0, atol=1e-12)
    with torch.no_grad():  # the logits are linear in the queries: the first third of qkv
        layer.qkv.weight[:WIDTH] /= 2.5
        layer.qkv.bias[:WIDTH] /= 2.5
    torch.testing.assert_close(y[1:], layer(x[1:]), rtol=0, atol=1e-12)


def test_rotary_scores_depend_on_the_difference_of_rows_and_of_columns_only():
    grid, table = 5, Rotary(*(half.double() for half in rotary_table(5, HEAD)))
    query, key = torch.randn(2, HEAD, dtype=torch.float64)

    def turn(vector, token):
        first, second = vector.chunk(2)
        return vector * table.cos[token] + torch.cat([-second, first]) * table.sin[token]

    def score(row, column, other_row, other_column):
        return turn(query, row * grid + column) @ turn(key, other_row * grid + other_column)

    # Table entries are fp32, so scores of size 1 carry errors of some 1e-7.
    for moved in (score(1, 1, 3, 2), score(2, 2, 4, 3), score(0, 1, 2, 2)):
        assert abs(moved - score(0, 0, 2, 1)) < 1e-6
    for other in (score(0, 0, 1, 2), score(2, 1, 0, 0), score(0, 0, 2, 2), score(0, 0, 3, 1)):
        assert abs(other - score(0, 0, 2, 1)) > 1e-3


def test_rotary_table_starts_at_the_identity():
    table = rotary_table(GRID, HEAD)
    assert table.cos.shape == table.sin.shape == (TOKENS, HEAD)
    assert torch.equal(table.cos[0], torch.ones(HEAD))
    assert torch.equal(table.sin[0], torch.zeros(HEAD))


def test_qk_norm_takes_the_length_out_of_queries_and_keys():
    layer = attention(qk_norm=True)
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    y = layer(x)
    with torch.no_grad():
        layer.qkv.weight[: 2 * WIDTH] *= 10
        layer.qkv.bias[: 2 * WIDTH] *= 10
    # the norm's epsilon of 1e-6 against mean squares of about 0.3
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-4)
