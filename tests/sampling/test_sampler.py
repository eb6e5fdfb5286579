"""What a user of :func:`flowback.sample` relies on."""

import pytest
import torch

from flowback import BlockPlan, Denoising, Guidance, InputError, SampleConfig, Sampler, sample
from flowback.nn.transformer import Transformer
from flowback.sampling import decoder, native
from flowback.sampling.sampler import Overflow, noise
from sampling.flows import tame_flow


@pytest.fixture(scope="module")
def flow():
    return tame_flow(torch.float32)


def test_is_the_flow_inverse(flow):
    labels = torch.tensor([0, 3, 4])
    images = sample(flow, labels, [5, 6, 7], denoise=False)
    torch.testing.assert_close(images, flow.inverse(noise(flow, [5, 6, 7]), labels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_an_image_depends_on_its_seed_only(flow, guidance):
    """Batch size, neighbours and order change an image by rounding only: 1e-5 in fp32."""
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    whole = sample(flow, labels, range(7), guidance)
    split = sample(flow, labels, range(7), guidance, batch_size=2)
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=0)
    swapped = sample(flow, labels.flip(0), range(6, -1, -1), guidance).flip(0)
    torch.testing.assert_close(swapped, whole, atol=1e-5, rtol=0)
    assert (whole[0] - whole[5]).abs().max() > 0.1


def test_jacobi_gives_the_same_images(flow):
    exact = sample(flow, [0, 1], denoise=False)
    for plan, allowed in ((BlockPlan(5, "z", None), 1e-5), (BlockPlan(8, "zeros", 1e-4), 1e-3)):
        found = sample(flow, [0, 1], denoise=False, plans=[plan] * 2)
        torch.testing.assert_close(found, exact, atol=allowed, rtol=0)


def test_labels_of_every_form(flow):
    ids = sample(flow, torch.tensor([2, 2]), [0, 1])
    for same in (2, [2, 2], torch.eye(5)[[2, 2]]):
        torch.testing.assert_close(sample(flow, same, [0, 1]), ids, atol=1e-6, rtol=0)
    mean = torch.full((2, 5), 0.2)
    torch.testing.assert_close(sample(flow, None, [0, 1]), sample(flow, mean, [0, 1]), atol=1e-5, rtol=0)
    assert sample(flow, 2).shape == (1, 1, 8, 8)


def test_guidance_away_from_the_unconditional(flow):
    """At w = -1 every prediction is the unconditional one, in the guided blocks."""
    found = sample(flow, [0, 1], guidance=-1.0, denoise=False)
    torch.testing.assert_close(found, sample(flow, None, [0, 1], denoise=False), atol=1e-5, rtol=0)
    partly = sample(flow, [0, 1], guidance=Guidance(-1.0, blocks=1), denoise=False)
    z = noise(flow, [0, 1])
    expected = flow.blocks[1].inverse(z, flow.blocks[1].context(None))
    expected = flow.blocks[0].inverse(expected, flow.blocks[0].context(torch.tensor([0, 1])))
    torch.testing.assert_close(partly, flow.images(expected), atol=1e-5, rtol=0)


def test_attention_temperature_guides_without_labels():
    flow = tame_flow(torch.float32, num_classes=0)
    plain = sample(flow, seeds=[0, 1])
    assert not torch.allclose(sample(flow, seeds=[0, 1], guidance=Guidance(1.0, temperature=1.5)), plain)
    with pytest.raises(InputError, match="attention temperature"):
        sample(flow, seeds=[0, 1], guidance=1.0)


def test_trajectory_ends_in_the_sample(flow):
    states = Sampler(flow).trajectory([0, 1])
    assert len(states) == 4  # z, two blocks, denoised
    torch.testing.assert_close(states[0], flow.images(noise(flow, [0, 1])))
    torch.testing.assert_close(states[-1], sample(flow, [0, 1]))
    torch.testing.assert_close(states[-2], sample(flow, [0, 1], denoise=False))


def test_noise_is_one_stream_a_seed(flow):
    assert torch.equal(noise(flow, [3, 9])[1], noise(flow, [9])[0])
    assert not torch.equal(noise(flow, [3], redraw=1), noise(flow, [3]))
    assert not torch.equal(noise(flow, [3], redraw=1), noise(flow, [3], redraw=2))
    assert noise(flow, range(400)).std().item() == pytest.approx(1, abs=0.02)  # 3 deviations of 25,600 values


def test_leaves_the_flow_as_it_was(flow):
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    sample(flow, [0], guidance=1.0)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    assert all(parameter.grad is None for parameter in flow.parameters())


@pytest.mark.parametrize(
    ("labels", "seeds", "message"),
    [
        ([0, 1, 2], [0, 1], "3 labels for 2 seeds"),
        ([0], [0, 1], "1 labels for 2 seeds"),
        ([0, 5], [0, 1], "out of range"),
        ([0], [-1], "Seed -1"),
        (None, [2**32], "out of range"),
        (0, [], "no seeds"),
    ],
)
def test_bad_input(flow, labels, seeds, message):
    with pytest.raises(InputError, match=message):
        sample(flow, labels, seeds)


def test_guidance_without_labels_is_refused(flow):
    with pytest.raises(InputError, match="give labels"):
        sample(flow, None, [0], guidance=1.0)
    with pytest.raises(InputError, match="guided blocks"):
        sample(flow, [0], guidance=Guidance(1.0, blocks=3))


JOBS = (([0, 3, 4], [5, 6, 7]), ([1], [8]), ([2, 2, 2, 0, 1], [0, 1, 2, 3, 4]), ([0, 3, 4], [5, 6, 7]))
"""Labels and seeds of calls of one sampler, with batches of different sizes."""


@pytest.mark.parametrize(
    "compiled",
    [pytest.param(True, marks=pytest.mark.skipif(native.library() is None, reason="no C++ compiler")), False],
)
@pytest.mark.parametrize("options", [{}, {"guidance": 1.5}, {"plans": [BlockPlan(5), BlockPlan()]}], ids=str)
def test_weights_are_packed_once_for_many_calls(flow, monkeypatch, compiled, options):
    """And each call gives the images of a sampler of its own, bit for bit."""
    counts = {"packed": 0, "caches": 0}

    def counting(name, call):
        def counted(*arguments, **others):
            counts[name] += 1
            return call(*arguments, **others)

        return counted

    monkeypatch.setattr(native.NativeWeights, "__init__", counting("packed", native.NativeWeights.__init__))
    monkeypatch.setattr(native.NativeCache, "empty", counting("caches", native.NativeCache.empty))
    monkeypatch.setattr(Transformer, "empty_cache", counting("caches", Transformer.empty_cache))
    if not compiled:
        monkeypatch.setattr(decoder.NativeWeights, "suits", lambda block, storage: False)
    sampler = Sampler(flow, batch_size=3, **options)
    assert sampler.engine.native is compiled
    found = [sampler(labels, seeds) for labels, seeds in JOBS]
    assert counts["packed"] == (2 if compiled else 0)  # two blocks
    assert counts["caches"] <= 2  # of the first block; plans' second block takes windows
    assert torch.equal(found[0], found[-1])
    for (labels, seeds), images in zip(JOBS, found, strict=True):
        assert torch.equal(images, sample(flow, labels, seeds, batch_size=3, **options))
        assert torch.equal(images, sampler.trajectory(labels, seeds)[-1])


def test_sampler_of_options(flow):
    config = SampleConfig(
        guidance=1.5, ramp=True, guided_blocks=1, denoise=False, batch_size=2, sampler="jacobi", window=5
    )
    sampler = Sampler.from_config(flow, config)
    guidance = Guidance(1.5, ramp=True, blocks=1)
    plans = [BlockPlan(5)] * 2
    expected = sample(flow, [0, 1, 2], range(3), guidance, False, batch_size=2, plans=plans)
    assert torch.equal(sampler([0, 1, 2]), expected)
    sequential = Sampler.from_config(flow, config, [BlockPlan()] * 2)
    assert not torch.equal(sequential([0, 1, 2]), expected)
    with pytest.raises(InputError, match="1 plans for a model of 2 blocks"):
        Sampler(flow, plans=[BlockPlan()])


def test_class_names_are_labels(flow):
    named = type(flow)(flow.config, classes=("ant", "bee", "cow", "dog", "eel"))
    named.load_state_dict(flow.state_dict())
    assert torch.equal(named.sample(["dog", "ant"]), sample(flow, [3, 0]))
    assert torch.equal(Sampler(named)("dog"), sample(flow, 3))


@pytest.mark.parametrize("made_inside", [True, False])
def test_under_inference_mode(flow, made_inside):
    """Denoising takes a gradient there too; and a sampler made there serves elsewhere."""
    expected = sample(flow, [0, 1], guidance=1.0)
    sampler = None if made_inside else Sampler(flow, guidance=1.0)
    with torch.inference_mode():
        sampler = sampler or Sampler(flow, guidance=1.0)
        assert torch.equal(sampler(torch.tensor([0, 1]), torch.tensor([0, 1])), expected)
        weights = torch.eye(5)[[0, 1]]
        torch.testing.assert_close(sampler(weights, [0, 1]), expected, atol=1e-5, rtol=0)
    assert torch.equal(sampler([0, 1]), expected)


def breaking(block, token):
    """A flow whose block ``block`` gives not-a-number at the place ``token`` of its own order."""
    flow = tame_flow(torch.float32)
    chosen = flow.blocks[block - 1]
    # The prediction at place token - 1 is of the token after it.
    place = chosen.reorder(torch.arange(flow.config.tokens), dim=0)[token - 1]
    chosen.position.data[place] = torch.nan
    return flow


@pytest.mark.parametrize(("block", "token", "place"), [(1, 5, 5), (2, 5, 10), (2, 15, 0)])
@pytest.mark.parametrize("window", [1, 4, 15])
def test_the_first_overflow_names_block_and_token(block, token, place, window):
    """Block 2 reads 16 tokens backwards: the place 5 of its order is token 10 of the image."""
    if window > 1 and native.library() is None:
        pytest.skip("a position of not-a-number reaches all tokens of a window by PyTorch's masked attention")
    flow = breaking(block, token)
    sampler = Sampler(flow, plans=[BlockPlan(window)] * 2)
    assert not sampler([0, 1]).isfinite().all(dim=(1, 2, 3)).any()
    assert sampler.overflows([0, 1]) == [Overflow(block, place)] * 2
    assert str(sampler.overflows(0)[0]) == f"block {block}, token {place}"


@pytest.mark.parametrize(("block", "place"), [(1, 1), (2, 14)])
def test_log_scales_that_overflow(block, place):
    """exp(200) is infinite in fp32, at the first token that is predicted."""
    flow = tame_flow(torch.float32)
    flow.blocks[block - 1].proj_out.bias.data[:4] = 200.0  # log-scales come first
    assert Sampler(flow).overflows([0]) == [Overflow(block, place)]


def test_images_without_overflow_have_none(flow):
    assert Sampler(flow).overflows([0, 1]) == [None, None]


def test_an_overflow_while_denoising(flow, monkeypatch):
    def broken(flow, images, labels=None, noise=None):
        """The second image breaks at the third level, 0.02, or where there is only one."""
        return torch.cat([images[:1], images[1:] / 0]) if noise is None or noise < 0.03 else images

    monkeypatch.setattr("flowback.sampling.denoise.denoise", broken)
    assert Sampler(flow).overflows([0, 1]) == [None, Overflow(None, None)]
    assert str(Overflow(None, None)) == "denoising"
    ranged = tame_flow(torch.float32, noise="range", noise_max=0.04)
    found = Sampler(ranged, denoise=Denoising(4)).overflows([0, 1])
    assert found == [None, Overflow(None, None, 3)]
    assert str(found[1]) == "denoising step 3"
