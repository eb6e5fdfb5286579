"""Interpolation and inpainting: exact in float64 where the flow allows it, and said where not."""

import pytest
import torch

from flowback import InputError, Sampler, sample
from flowback.sampling.editing import slerp
from flowback.sampling.sampler import noise
from sampling.flows import tame_flow

LEFT = torch.arange(16).view(1, 16) % 4 < 2  # of 4 x 4 tokens
TOP = torch.arange(16).view(1, 16) < 8
LABELS = [1, 4]


@pytest.fixture(scope="module")
def flow():
    return tame_flow()


@pytest.fixture(scope="module")
def one_block():
    return tame_flow(blocks=1)


@pytest.fixture(scope="module")
def pictures(flow):
    return flow.sample(LABELS, [0, 1], denoise=False), flow.sample(LABELS, [2, 3], denoise=False)


def test_a_way_ends_in_the_images_themselves(flow, pictures):
    way = flow.interpolate(*pictures, steps=3, labels=LABELS)
    assert way.shape == (2, 3, 1, 8, 8)
    torch.testing.assert_close(way[:, 0], pictures[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(way[:, 2], pictures[1], atol=1e-10, rtol=0)


def test_the_middle_lies_on_the_circle_between_their_z(flow, pictures):
    way = flow.interpolate(*pictures, steps=3, labels=LABELS)
    first, second, middle = (flow(x, LABELS).z for x in (*pictures, way[:, 1]))
    angle = torch.nn.functional.cosine_similarity(first.flatten(1), second.flatten(1)).acos()[:, None, None]
    expected = (first + second) * torch.sin(angle / 2) / torch.sin(angle)
    torch.testing.assert_close(middle, expected, atol=1e-10, rtol=0)


def test_labels_move_with_the_way(flow, pictures):
    way = flow.interpolate(*pictures, steps=5, labels=[0, 0], second_labels=[2, 3])
    torch.testing.assert_close(way[:, 4], pictures[1], atol=1e-10, rtol=0)
    weights = torch.eye(5, dtype=torch.float64)
    quarter = 0.75 * weights[[0, 0]] + 0.25 * weights[[2, 3]]
    z = slerp(
        flow(pictures[0], [0, 0]).z, flow(pictures[1], [2, 3]).z, torch.tensor(0.25, dtype=torch.float64)
    )
    torch.testing.assert_close(way[:, 1], flow.inverse(z, quarter), atol=1e-10, rtol=0)


def test_a_way_without_labels_and_in_batches(flow, pictures, monkeypatch):
    whole = flow.interpolate(*pictures, steps=3)
    torch.testing.assert_close(whole[:, 2], pictures[1], atol=1e-10, rtol=0)
    monkeypatch.setattr("flowback.sampling.decoder.Engine.images_at_once", lambda *_: 2)
    torch.testing.assert_close(flow.interpolate(*pictures, steps=3), whole, atol=1e-10, rtol=0)


def test_slerp_of_equal_and_of_opposite_directions():
    one, half = torch.ones(1, 1, 4, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(slerp(one, 3 * one, half), 2 * one)
    torch.testing.assert_close(slerp(one, -one, half), 0 * one)
    away, along = torch.tensor([[[1.0, 0], [0, 0]]]), torch.tensor([[[0.0, 0], [0, 1]]])
    assert slerp(away, along, torch.tensor(0.3)).norm().item() == pytest.approx(1)  # as long as its ends


def test_kept_tokens_stay_bit_for_bit(flow, pictures):
    result = flow.inpaint(pictures[0], LEFT, LABELS, seeds=[7, 8], rounds=2)
    before, after = flow.tokens(pictures[0]), flow.tokens(result.images)
    assert torch.equal(after[:, LEFT[0]], before[:, LEFT[0]])
    assert ((after - before)[:, ~LEFT[0]].abs().amax((1, 2)) > 0.1).all()
    assert not result.exact.any()
    assert (result.drift > 1e-3).all()
    torch.testing.assert_close(result.log_prob, flow(result.images, LABELS).log_prob)


def test_a_round_step_by_step(flow, pictures):
    """Fresh noise where the mask says, block 2 as always, block 1 token by token with the kept ones set."""
    labels = torch.tensor(LABELS)
    fresh = torch.where(LEFT[..., None], flow(pictures[0], labels).z, noise(flow, [7, 8]))
    inner = flow.blocks[1].inverse(fresh, flow.blocks[1].context(labels))
    x = torch.where(LEFT[..., None], flow.tokens(pictures[0]), inner)
    for token in range(1, 16):
        if not LEFT[0, token]:
            said = flow.blocks[0].predict(x, flow.blocks[0].context(labels))
            x[:, token] = inner[:, token] * said.log_scale[:, token].exp() + said.shift[:, token]
    result = flow.inpaint(pictures[0], LEFT, LABELS, seeds=[7, 8], rounds=1)
    torch.testing.assert_close(flow.tokens(result.images), x, atol=1e-10, rtol=0)
    free = flow.tokens(flow.inverse(fresh, labels)) - flow.tokens(pictures[0])
    torch.testing.assert_close(result.drift, free[:, LEFT[0]].square().mean((1, 2)).sqrt())


def test_one_block_with_the_kept_tokens_first_is_exact(one_block):
    """The first tokens are a function of their z alone, so fresh z of the others draws from p(x | kept)."""
    images = one_block.sample([0, 1], [0, 1], denoise=False)
    result = one_block.inpaint(images, TOP, [0, 1], seeds=[7, 8], rounds=3)
    assert result.exact.all()
    assert result.drift.max() < 1e-12
    before, after = (one_block(x, [0, 1]).z for x in (images, result.images))
    torch.testing.assert_close(after[:, :8], before[:, :8], atol=1e-12, rtol=0)
    last_round = noise(one_block, [7, 8], redraw=2)
    torch.testing.assert_close(after[:, 8:], last_round[:, 8:], atol=1e-10, rtol=0)
    assert not one_block.inpaint(images, ~TOP, [0, 1]).exact.any()


def test_nothing_kept_is_a_sample_and_all_kept_changes_nothing(flow, pictures):
    none = torch.zeros(1, 16, dtype=torch.bool)
    drawn = flow.inpaint(pictures[0], none, LABELS, [5, 6], rounds=1, guidance=1.0)
    expected = sample(flow, LABELS, [5, 6], guidance=1.0, denoise=False)
    torch.testing.assert_close(drawn.images, expected, atol=1e-10, rtol=0)
    every = flow.inpaint(pictures[0], ~none, LABELS)
    assert torch.equal(every.images, pictures[0])
    assert drawn.exact.all()
    assert every.exact.all()
    assert every.drift.max() < 1e-10


def test_each_image_has_its_own_mask_seed_and_batch(flow, pictures, monkeypatch):
    whole = flow.inpaint(pictures[0], torch.cat([LEFT, TOP]), LABELS, [5, 6], denoise=True)
    monkeypatch.setattr("flowback.sampling.decoder.Engine.images_at_once", lambda *_: 1)
    split = flow.inpaint(pictures[0], torch.cat([LEFT, TOP]), LABELS, [5, 6], denoise=True)
    torch.testing.assert_close(split.images, whole.images, atol=1e-10, rtol=0)
    alone = flow.inpaint(pictures[0][1:], TOP, LABELS[1:], [6], denoise=True)
    torch.testing.assert_close(alone.images, whole.images[1:], atol=1e-10, rtol=0)
    kept = flow.tokens(whole.images)[1, TOP[0]]
    assert torch.equal(kept, flow.tokens(pictures[0])[1, TOP[0]])  # denoising leaves them, too


def test_the_compiled_step_keeps_tokens_too():
    flow = tame_flow(torch.float32)
    images = flow.sample(LABELS, [0, 1], denoise=False)
    result = flow.inpaint(images, LEFT, LABELS, [5, 6])
    assert torch.equal(flow.tokens(result.images)[:, LEFT[0]], flow.tokens(images)[:, LEFT[0]])
    exact = flow.double().inpaint(images.double(), LEFT, LABELS, [5, 6])
    torch.testing.assert_close(result.images.double(), exact.images, atol=1e-4, rtol=0)


def test_states_come_as_soon_as_they_are_there(flow):
    sampler = Sampler(flow, batch_size=2)
    sampler.images_at_once = 2
    labels, seeds = [0, 1, 2], [4, 5, 6]
    states = list(sampler.follow(labels, seeds))
    whole = flow.trajectory(labels, seeds)
    assert [part for part, _ in states] == [slice(0, 2)] * 4 + [slice(2, 4)] * 4
    for index, (part, state) in enumerate(states):
        torch.testing.assert_close(state, whole[index % 4][part], atol=1e-10, rtol=0)
    follow = sampler.follow(labels, seeds)
    with torch.inference_mode():
        assert not next(follow)[1].is_inference()
    torch.testing.assert_close(whole[-1], flow.sample(labels, seeds), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda flow, x: flow.interpolate(x, x, steps=1), "at least 2"),
        (lambda flow, x: flow.interpolate(x, x[:1]), "give as many"),
        (lambda flow, x: flow.interpolate(x, x, second_labels=[0, 1]), "Only the second images have labels"),
        (lambda flow, x: flow.interpolate(x[..., :4], x[..., :4]), r"shape \(B, 1, 8, 8\)"),
        (lambda flow, x: flow.inpaint(x, LEFT[:, :4]), "mask is of 4 tokens; the flow's images have 16"),
        (lambda flow, x: flow.inpaint(x, LEFT.expand(3, -1)), "3 masks for 2 images"),
        (lambda flow, x: flow.inpaint(x, LEFT, rounds=0), "at least 1"),
        (lambda flow, x: flow.inpaint(x, LEFT, seeds=[1]), "1 seeds for 2 images"),
        (lambda flow, x: flow.inpaint(x, LEFT, [0, 9]), "out of range"),
        (lambda flow, x: flow.inpaint(x, LEFT, guidance=1.0), "give labels"),
    ],
)
def test_what_does_not_fit_is_refused(flow, pictures, call, sentence):
    with pytest.raises(InputError, match=sentence):
        call(flow, pictures[0])


def test_a_flow_with_a_range_of_levels_is_told_the_level():
    flow = tame_flow(noise="range", noise_min=0.1, noise_max=0.6)
    first, second = (flow.sample(LABELS, seeds, denoise=False, noise=0.3) for seeds in ([0, 1], [2, 3]))
    way = flow.interpolate(first, second, 3, LABELS, noise=0.3)
    torch.testing.assert_close(way[:, 2], second, atol=1e-10, rtol=0)
    result = flow.inpaint(first, LEFT, LABELS, noise=0.3, denoise=True)
    assert torch.equal(flow.tokens(result.images)[:, LEFT[0]], flow.tokens(first)[:, LEFT[0]])
    held = flow.inpaint(first, LEFT | True, LABELS, noise=0.3)
    assert held.drift.max() < 1e-10  # encoded and decoded at the same level
    torch.testing.assert_close(held.log_prob, flow.log_prob(first, LABELS, noise=0.3))
    for call in (lambda: flow.inpaint(first, LEFT), lambda: flow.interpolate(first, second)):
        with pytest.raises(InputError, match="level"):
            call()
