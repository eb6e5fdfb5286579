"""Fast steps against the block's own inverse, in float64, for every kind of Transformer."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowback.flow import affine
from flowback.sampling import native
from flowback.sampling.decoder import Engine, sequential
from flowback.sampling.guidance import Guidance
from reference import ReferenceFlow, random_flow
from runs import run_code
from sampling.flows import labels_of, noise_of, tame_flow

KINDS = {
    "gelu": {},
    "rope-swiglu": {"position": "rope", "mlp": "swiglu", "qk_norm": True},
    "wide": {"width": 128, "head_dim": 64, "layers": 1, "image_size": 16},
    "unconditional": {"num_classes": 0},
    "uneven": {"layers": (1, 3)},
    "bounded": {"log_scale_bound": 0.05},
}
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("kind", KINDS)
def test_sequential_is_the_inverse(kind, compiled):
    """To 1e-12: the same sums in another order, over 16 or 64 tokens."""
    flow = tame_flow(**KINDS[kind])
    engine = Engine(flow, native=compiled)
    assert engine.native is compiled
    for batch in (1, 3, 20):  # shared by the threads; not divisible; each thread its own images
        z = noise_of(flow, batch)
        for index, block in enumerate(flow.blocks, start=1):
            context = block.context(labels_of(flow, batch))
            found = sequential(engine.decoder(index, batch, context), block.reorder(z))
            torch.testing.assert_close(
                block.reorder(found), block.inverse(z, context), atol=1e-12, rtol=1e-12
            )


@needs_compiler
@pytest.mark.parametrize("threads", [2, 3, 5, 7])
@pytest.mark.parametrize(
    ("width", "head_dim", "mlp"),
    [(256, 64, "gelu"), (192, 64, "swiglu"), (192, 24, "gelu"), (160, 8, "swiglu")],
)
def test_threads_share_a_step(threads, width, head_dim, mlp):
    """Heads and inner columns that threads do not divide, and teams of them that share the images.

    The narrowest model has enough to do for more than one thread from two images on.
    """
    torch.set_num_threads(threads)
    flow = tame_flow(width=width, head_dim=head_dim, mlp=mlp)
    block, engine = flow.blocks[0], Engine(flow)
    for batch in (1, 3, 13):
        z, context = noise_of(flow, batch), block.context(labels_of(flow, batch))
        found, _ = engine.decoder(1, batch, context, new=9).step(z[:, :9], 0)
        torch.testing.assert_close(found, block.predict(z, context).shift[:, 1:10], atol=1e-12, rtol=1e-12)
        decoded = sequential(engine.decoder(1, batch, context), z)
        torch.testing.assert_close(decoded, block.inverse(z, context), atol=1e-12, rtol=1e-12)


@needs_compiler
def test_fewer_threads_than_asked_for():
    """OpenMP may give fewer, as under OMP_THREAD_LIMIT: one of them then does the work of all."""
    code = """
import torch
from flowback.sampling.decoder import Engine
from sampling.flows import labels_of, noise_of, tame_flow
torch.set_num_threads(4)
flow = tame_flow(width=256)
block, z = flow.blocks[0], noise_of(flow, 3)
context = block.context(labels_of(flow, 3))
found, _ = Engine(flow).decoder(1, 3, context, new=2).step(z[:, :2], 0)
torch.testing.assert_close(found, block.predict(z, context).shift[:, 1:3], atol=1e-12, rtol=1e-12)
"""
    done = run_code(code, environment=os.environ | {"OMP_THREAD_LIMIT": "2"})
    assert done.returncode == 0, done.stderr


def test_sequential_decodes_what_the_reference_encodes():
    flow = tame_flow()
    image = 2 * torch.rand(1, 8, 8, dtype=torch.float64) - 1
    z, _, _ = ReferenceFlow(flow).encode(image, 3)
    x, engine = z[None], Engine(flow)
    for index in (2, 1):
        block = flow.blocks[index - 1]
        decoder = engine.decoder(index, 1, block.context(torch.tensor([3])))
        x = block.reorder(sequential(decoder, block.reorder(x)))
    torch.testing.assert_close(flow.images(x)[0], image, atol=1e-10, rtol=0)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("formula", ["tarflow", "starflow"])
@pytest.mark.parametrize("bound", [None, 0.05])
def test_guided_streams_with_temperature(bound, formula, compiled):
    """Two streams in one batch, scales and temperatures of their own, as the block's inverse has them."""
    flow, batch = tame_flow(log_scale_bound=bound), 4
    engine, block, z = Engine(flow, native=compiled), flow.blocks[0], noise_of(flow, 4)
    guidance = Guidance([0.0, 0.5, 1.0, 2.0], ramp=True, formula=formula)
    guide = guidance.guide(guidance.scales(batch, z), flow.config.tokens)
    context = torch.cat([block.context(labels_of(flow, batch)), block.context(None).expand(batch, -1)])
    temperature = torch.tensor([1.0] * batch + [1.5] * batch, dtype=torch.float64)
    found = sequential(engine.decoder(1, batch, context, guide, temperature), z)
    expected = block.inverse(z, context, guide, temperature.view(-1, 1, 1, 1))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert (
        found[0] - block.inverse(z, block.context(labels_of(flow, batch)))[0]
    ).abs().max() < 1e-12  # w = 0


@needs_compiler
def test_tokens_that_are_not_known_yet_play_no_part():
    """Of many tokens at once, each sees those before it only, and infinity elsewhere is nothing to it."""
    flow = tame_flow()
    x, context = noise_of(flow, 3), flow.blocks[0].context(labels_of(flow, 3))
    expected = flow.blocks[0].predict(x, context).shift[:, 1:7]
    x[:, 6:] = torch.inf
    found, _ = Engine(flow).decoder(1, 3, context, new=15).step(x[:, :15], 0)
    torch.testing.assert_close(found[:, :6], expected, atol=1e-12, rtol=1e-12)
    assert not found[:, 6:].isfinite().any()


@needs_compiler
def test_scores_of_thousands_do_not_overflow():
    """The largest of any number of scores is taken off all: exp of the others is 0, of none infinite."""
    flow, batch = tame_flow(), 3
    block, z = flow.blocks[0], noise_of(flow, 3)
    context, temperature = block.context(labels_of(flow, 3)), torch.full((batch,), 1e-4).double()
    expected = block.inverse(z, context, temperature=temperature.view(-1, 1, 1, 1))
    found = sequential(Engine(flow).decoder(1, batch, context, temperature=temperature), z)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_many_tokens_and_some_images(kind, compiled):
    """Tokens may come in pieces, and images alone: the predictions are those of one parallel pass."""
    flow, batch = tame_flow(**KINDS[kind]), 3
    engine, block = Engine(flow, native=compiled), flow.blocks[0]
    x, context = noise_of(flow, batch), block.context(labels_of(flow, batch))
    whole = block.predict(x, context)
    decoder = engine.decoder(1, batch, context, new=9)
    pieces = []
    for start, end in ((0, 9), (9, 10), (10, 15)):
        shift, log_scale = decoder.step(x[:, start:end], start)
        assert torch.isfinite(affine.inverse(x[:, start:end], shift, log_scale)).all()
        if start == 9:  # once more for two of the images: the last values count
            decoder.step(x[[0, 2], 9:10] + 1, 9, torch.tensor([0, 2]))
            again, _ = decoder.step(x[[0, 2], 9:10], 9, torch.tensor([0, 2]))
            torch.testing.assert_close(again, whole.shift[[0, 2], 10:11])
            shift, log_scale = decoder.step(x[:, start:end], start)
        pieces.append((shift.clone(), log_scale.clone()))
    shift, log_scale = (torch.cat(part, 1) for part in zip(*pieces, strict=True))
    torch.testing.assert_close(shift, whole.shift[:, 1:16], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(log_scale, whole.log_scale[:, 1:16], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.05), ("kv-bf16", 0.01)])
def test_bf16_is_near_and_shift_stays_fp32(precision, share, compiled):
    """bfloat16 keeps 8 bits: within a share of the predictions' size, smaller of keys and values alone."""
    flow = tame_flow(torch.float32)
    z, block = noise_of(flow, 4), flow.blocks[0]
    context = block.context(labels_of(flow, 4))
    shift, log_scale = Engine(flow, precision, compiled).decoder(1, 4, context, new=16).step(z, 0)
    exact = block.predict(z, context)
    assert shift.dtype == log_scale.dtype == torch.float32
    for found, known in ((shift, exact.shift), (log_scale, exact.log_scale)):
        error = (found[:, :-1] - known[:, 1:]).abs().max()
        assert 0 < error < share * known.abs().max()


@needs_compiler
def test_both_ways_narrow_the_same_keys():
    """To one part in a million but for keys at the edge of two bfloat16 numbers, of which few are."""
    flow = tame_flow(torch.float32)
    z, context = noise_of(flow, 4), flow.blocks[0].context(labels_of(flow, 4))
    found, known = (
        Engine(flow, "kv-bf16", compiled).decoder(1, 4, context, new=16).step(z, 0)[0]
        for compiled in (True, False)
    )
    error = (found - known).abs() / known.abs().max()
    assert error.median() < 1e-6
    assert error.max() < 1e-3


@needs_compiler
def test_fp32_is_exact_to_rounding():
    """The float kernel has its own exp and erf: within 1e-5 of float64."""
    flow = tame_flow(torch.float32, **KINDS["wide"])
    z, block = noise_of(flow, 5), flow.blocks[0]
    found = sequential(Engine(flow).decoder(1, 5, block.context(None)), z)
    exact = tame_flow(torch.float64, **KINDS["wide"]).blocks[0]
    exact.load_state_dict(block.state_dict())
    expected = exact.inverse(z.double(), exact.context(None))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_pytorch_decodes_without_a_compiler(monkeypatch):
    monkeypatch.setenv("FLOWBACK_NATIVE", "0")
    native.library.cache_clear()
    try:
        assert not Engine(tame_flow()).native
    finally:
        native.library.cache_clear()


def test_a_failing_compiler_is_a_warning(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path))
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert "could not be compiled" in caplog.text
    finally:
        native.library.cache_clear()


@needs_compiler
@pytest.mark.parametrize(("cache", "rows"), [(0, 16), (1 << 19, 16), (1 << 21, 32), (1 << 40, 32)])
def test_groups_of_images_fit_the_last_cache(monkeypatch, cache, rows):
    """One thread: a row has 16 KiB of keys and values in float64 here; 16 rows at least, 32 at most."""
    monkeypatch.setattr("flowback.sampling.decoder.last_cache", lambda: cache)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    engine = Engine(tame_flow())
    assert engine.images_at_once(100, guided=False) == rows
    assert engine.images_at_once(100, guided=True) == rows // 2
    assert engine.images_at_once(5, guided=False) == 5


def test_odd_widths_fall_back():
    """A width that is no multiple of the panels goes to PyTorch."""
    assert not Engine(random_flow(torch.float32, width=24, head_dim=8)).native


@pytest.mark.parametrize("captured", [False, True])
def test_bf16_matrices_are_converted_once(captured, monkeypatch):
    """Same bits as autocast's own conversion, which comes again at every token; the rest stays fp32."""
    if captured:
        monkeypatch.setattr("flowback.sampling.decoder.captures", lambda _: True)
        monkeypatch.setattr("flowback.sampling.cuda_graph.cuda_graph", lambda run: run)
    flow = tame_flow(torch.float32)
    z, block = noise_of(flow, 4), flow.blocks[0]
    context = block.context(labels_of(flow, 4))
    engine = Engine(flow, "bf16", native=False)
    matrices = {tuple(p.shape) for p in block.parameters() if p.ndim == 2} - {(4, 4)}

    class Conversions(TorchDispatchMode):
        """Elements of weights that become bfloat16."""

        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and tuple(args[0].shape) in matrices:
                self.count += args[0].numel() if kwargs.get("dtype") == torch.bfloat16 else 0
            return func(*args, **(kwargs or {}))

    with Conversions() as conversions:
        shift, log_scale = engine.decoder(1, 4, context).step(z[:, :1], 0)
    assert conversions.count == 0
    cache = block.body.empty_cache(4, 16, z.new_empty(0, dtype=torch.bfloat16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = block.step(z[:, :1], context, cache)
    if captured:  # attends to masked tokens too: other sums
        torch.testing.assert_close(shift, expected[0], atol=1e-3, rtol=0.05)
    else:
        assert torch.equal(shift, expected[0])
        assert torch.equal(log_scale, expected[1])
    assert block.proj_in.weight.dtype == torch.float32
    shared = engine._blocks[0]
    assert shared.proj_out.weight is block.proj_out.weight
    assert shared.position is block.position
