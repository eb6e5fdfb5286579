from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference import random_flow, random_images

BODIES = [
    pytest.param({}, id="learned-gelu"),
    pytest.param({"position": "rope", "mlp": "swiglu"}, id="rope-swiglu"),
    pytest.param({"qk_norm": True}, id="qk-norm"),
]


class KeepFirst:
    """A guide that ignores the unconditional half."""

    def __call__(self, shift: Tensor, log_scale: Tensor, start: int) -> tuple[Tensor, Tensor]:
        return shift.chunk(2)[0], log_scale.chunk(2)[0]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("index", [0, 1])
def test_a_prediction_depends_on_earlier_tokens_only(index, body):
    flow = random_flow(**body)
    block = flow.blocks[index]
    x = flow.tokens(random_images(flow, 1))
    context = block.context(torch.tensor([3]))
    assert block.flip == (index == 1)

    def predicted(x: Tensor) -> Tensor:
        shift, log_scale, _ = block.predict(x, context)
        return torch.cat([shift, log_scale], dim=-1)[0]

    jacobian = torch.autograd.functional.jacobian(predicted, x)[:, :, 0]  # (n, 2d, n, d)
    reached = jacobian.abs().amax(dim=(1, 3))  # (predicted token, token read)
    earlier = torch.ones_like(reached).triu(1) if block.flip else torch.ones_like(reached).tril(-1)
    assert (reached[earlier == 0] == 0).all()  # exactly
    assert (reached[earlier == 1] > 0).all()


def test_the_first_token_passes_unchanged():
    flow = random_flow()
    x = flow.tokens(random_images(flow, 2))
    for block, first in zip(flow.blocks, (0, -1), strict=True):
        z = block(x, block.context(None)).z
        assert torch.equal(z[:, first], x[:, first])
        assert (z != x).any(dim=-1).sum() == 2 * 15


@pytest.mark.parametrize("body", BODIES)
def test_cached_decoding_equals_the_prediction_from_the_whole_sequence(body):
    flow = random_flow(**body)
    x = flow.tokens(random_images(flow, 3))
    for block in flow.blocks:
        context = block.context(torch.tensor([0, 2, 4]))
        decoded = block.inverse(block(x, context).z, context)
        torch.testing.assert_close(decoded, x, rtol=0, atol=1e-9)


def test_hidden_states_come_in_raster_order():
    flow = random_flow()
    x = flow.tokens(random_images(flow, 1))
    changed = x.clone()
    changed[:, 5] += 1
    for block, touched in zip(flow.blocks, (range(5, 16), range(6)), strict=True):
        before, after = (
            block.predict(tokens, block.context(None), hidden=[1]).hidden[1] for tokens in (x, changed)
        )
        differs = (before != after).any(dim=-1)[0]
        assert differs.nonzero()[:, 0].tolist() == list(touched)


def test_context_of_ids_weights_drop_and_none():
    block = random_flow().blocks[0]
    table = block.class_table.detach()
    ids = torch.tensor([4, 0, 0])
    one_hot = torch.nn.functional.one_hot(ids, 5).double()
    torch.testing.assert_close(block.context(ids), table[ids])
    torch.testing.assert_close(block.context(one_hot), table[ids])
    torch.testing.assert_close(block.context(None), table.mean(0, keepdim=True))
    torch.testing.assert_close(
        block.context(torch.full((1, 5), 0.2, dtype=torch.float64)), block.context(None)
    )
    dropped = block.context(ids, torch.tensor([False, True, False]))
    torch.testing.assert_close(dropped, torch.stack([table[4], table.mean(0), table[0]]))
    assert random_flow(num_classes=0).blocks[0].context(None) is None


def test_a_guide_that_ignores_the_second_half_changes_nothing():
    flow = random_flow()
    z = torch.randn(2, 16, 4, dtype=torch.float64)
    for block in flow.blocks:
        conditional = block.context(torch.tensor([1, 3]))
        both = torch.cat([conditional, block.context(None).expand(2, -1)])
        guided = block.inverse(z, both, guide=KeepFirst())
        torch.testing.assert_close(guided, block.inverse(z, conditional), rtol=0, atol=1e-12)


def test_a_guide_is_told_the_token_that_it_guides():
    block = random_flow().blocks[1]
    seen = []

    class Recorder(KeepFirst):
        def __call__(self, shift: Tensor, log_scale: Tensor, start: int) -> tuple[Tensor, Tensor]:
            seen.append(start)
            return super().__call__(shift, log_scale, start)

    block.inverse(torch.randn(1, 16, 4, dtype=torch.float64), block.context(None), guide=Recorder())
    assert seen == list(range(1, 16))


def test_temperature_per_row_of_a_guided_pass():
    block = random_flow().blocks[0]
    z = torch.randn(1, 16, 4, dtype=torch.float64)

    class KeepSecond(KeepFirst):
        def __call__(self, shift: Tensor, log_scale: Tensor, start: int) -> tuple[Tensor, Tensor]:
            return shift.chunk(2)[1], log_scale.chunk(2)[1]

    rows = torch.tensor([1.0, 3.0], dtype=torch.float64).view(2, 1, 1, 1)
    guided = block.inverse(z, block.context(None), guide=KeepSecond(), temperature=rows)
    torch.testing.assert_close(
        guided, block.inverse(z, block.context(None), temperature=3.0), rtol=0, atol=1e-12
    )
    assert not torch.allclose(guided, block.inverse(z, block.context(None)))


def test_nothing_remains_after_an_exception_in_the_middle_of_decoding():
    block = random_flow().blocks[0]
    z = torch.randn(2, 16, 4, dtype=torch.float64)
    original, before = z.clone(), block.inverse(z, block.context(None))
    attributes = {name: set(vars(module)) for name, module in block.named_modules()}

    class Fails(KeepFirst):
        def __call__(self, shift: Tensor, log_scale: Tensor, start: int) -> tuple[Tensor, Tensor]:
            if start == 7:
                raise RuntimeError("stop here")
            return super().__call__(shift, log_scale, start)

    with pytest.raises(RuntimeError, match="stop here"):
        block.inverse(z, block.context(None), guide=Fails())
    assert {name: set(vars(module)) for name, module in block.named_modules()} == attributes
    assert torch.equal(z, original)
    assert torch.equal(block.inverse(z, block.context(None)), before)


@pytest.mark.parametrize("body", BODIES)
def test_steps_over_pieces_equal_the_prediction_from_the_whole_sequence(body):
    """In the block's own order, with pieces of 5, 1 and 9 of the 16 tokens; the last has no follower."""
    flow = random_flow(**body)
    x = flow.tokens(random_images(flow, 2))
    for block in flow.blocks:
        context = block.context(torch.tensor([1, 3]))
        own, cache = block.reorder(x), block.body.empty_cache(2, 16, like=x)
        whole = block.predict(x, context)
        pieces = [block.step(own[:, a:b], context, cache, a) for a, b in ((0, 5), (5, 6), (6, 15))]
        for found, expected in zip(zip(*pieces, strict=True), whole[:2], strict=True):
            following = block.reorder(expected)[:, 1:]
            torch.testing.assert_close(torch.cat(found, 1), following, rtol=0, atol=1e-12)
