"""Every path on an accelerator that is not there: no tensors are mixed, a training step waits for nothing."""

import contextlib
import dataclasses
import importlib

import accelerate
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import runs
from accelerator import META, Accelerator, MixedDevicesError
from flowback import AlignmentConfig, Sampler, classify
from flowback.alignment.align import Alignment, Noised
from flowback.alignment.encoders import Encoder, Recipe
from flowback.alignment.targets import CachedTargets, ComputedTargets
from flowback.data.image_set import FeatureTable, MemoryImages
from flowback.evaluation.held_out import HeldOutBatch, log_densities
from flowback.sampling import cuda_graph
from flowback.sampling.block_plan import BlockPlan
from flowback.sampling.denoise import denoise
from flowback.sampling.guidance import Guidance
from flowback.training import batches as streams
from flowback.training.monitoring import Guard, block_statistics, gradient_balance
from flowback.training.state import Weights, update_average
from flowback.training.trainer import Trainer
from reference import random_flow

STRATEGIES = {
    "none": AlignmentConfig(),
    "forward": AlignmentConfig(strategy="forward", locations=((2, 1),), hidden=8),
    "detach": AlignmentConfig(strategy="detach", locations=((1, 1), (2, 1)), hidden=8),
    "reverse-literal": AlignmentConfig(strategy="reverse-literal", locations=((2, 1),), hidden=8),
    "order 2": AlignmentConfig(strategy="reverse", order=2, locations=((1, 1), (2, 1)), hidden=8),
    "conv": AlignmentConfig(
        strategy="reverse", order=0, locations=((1, 1),), projector="conv", spatial_norm=0.8
    ),
}


def flow_there(**changes):
    """A flow on the accelerator; "meta" takes a millisecond an operator, so it is small."""
    return random_flow(
        torch.float32, **{"width": 8, "head_dim": 8, "layers": 1, "image_size": 4, **changes}
    ).to(META)


def batch_there(flow, count=3):
    """Noised images and labels of one."""
    config = flow.config
    images = torch.zeros(count, config.channels, config.image_size, config.image_size, device=META)
    return images, torch.zeros(count, dtype=torch.long, device=META) if config.num_classes else None


# --- the tool itself ---


def test_mixing_fails():
    flow = flow_there()
    images, labels = batch_there(flow)
    flow.blocks[1].class_table = torch.nn.Parameter(torch.zeros(5, 8))
    with Accelerator(), pytest.raises(MixedDevicesError):
        flow(images, labels)
    with Accelerator(), pytest.raises(MixedDevicesError):
        images.add_(torch.zeros(4))
    with Accelerator() as machine:
        images.add_(torch.zeros(()))  # numbers may come from anywhere, as on a GPU
        images[torch.tensor([0, 2])]  # so may indices
    assert machine.operators == 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: torch.zeros(3).copy_(x),
    ],
)
def test_waits_are_counted(wait):
    with Accelerator() as machine:
        wait(torch.zeros(3, device=META))
    assert len(machine.waits) == 1


def test_what_it_refuses():
    x = torch.zeros(3, device=META)
    with Accelerator() as machine, pytest.raises(NotImplementedError):
        x[x > 0]
    assert machine.waits == ["boolean index"]
    with Accelerator(), pytest.raises(TypeError, match="MPS has no float64"):
        x.double()
    with Accelerator(), pytest.raises(TypeError, match="MPS has no float64"):
        torch.zeros(3, dtype=torch.float64, device=META)


# --- training ---


class Here(accelerate.Accelerator):
    """One process, on the accelerator."""

    device = META

    def __init__(self):
        pass

    def prepare(self, part):
        return part.to(META) if isinstance(part, torch.nn.Module) else part

    def no_sync(self, _):
        return contextlib.nullcontext()


@pytest.fixture
def trainer(monkeypatch):
    """Of a run that is about to make a step on the accelerator."""
    optimizer = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])

    def make(alignment, targets=None, noise="gaussian", **train):
        base = runs.tiny_config()
        model = dataclasses.replace(
            base.model, width=16, head_dim=8, blocks=2, layers=1, num_classes=10, noise=noise
        )
        train = dataclasses.replace(base.train, spike=10.0, ema_more=(0.5,), grad_clip=1.0, **train)
        config = dataclasses.replace(base, model=model, alignment=alignment, train=train)
        machine = Here()
        trainer = object.__new__(Trainer)
        trainer.config, trainer.targets, trainer.accelerator, trainer.device = config, targets, machine, META
        dim = targets.dim if targets else 6 if alignment.active else None
        trainer.weights = Weights(config, dim, machine, sharded=False)
        trainer.guard, trainer.known_bad, trainer.step, trainer.stopped = Guard(10.0, META), 0, 0, False
        return trainer

    return make


class Generator(torch.Generator):
    """Of an accelerator; there is none for "meta"."""

    device = META


def grey_images():
    labels = torch.arange(64) % 10
    return MemoryImages("grey", tuple("0123456789"), labels, torch.zeros(64, 1, 8, 8, dtype=torch.uint8))


def stream(config, monkeypatch, count=1):
    """Batches on the accelerator."""
    made = streams.generator
    monkeypatch.setattr(
        streams, "generator", lambda device, *key: Generator() if device == META else made(device, *key)
    )
    yielded = streams.batches(grey_images(), config, 0, 0, 1, META)
    return [next(yielded) for _ in range(count)]


class Told:
    """Features from nowhere."""

    dim, originals = 6, None

    def __call__(self, indices, flipped, seen):
        return torch.zeros(len(seen), 4, 6, device=META)


def steps(trainer, monkeypatch):
    """What waited in a step, with its batch."""
    with Accelerator() as machine:
        for batch in stream(trainer.config, monkeypatch):
            trainer.update(batch)
    assert machine.operators > 100
    return machine.waits


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_training_step_waits_for_nothing(name, trainer, monkeypatch):
    """Batch, objective, backward pass, guard, clipping, optimiser and averages."""
    alignment = STRATEGIES[name]
    assert steps(trainer(alignment, Told() if alignment.active else None), monkeypatch) == []


@pytest.mark.parametrize("train", [{"micro_batch": 8}, {"checkpoint_activations": True}])
def test_nor_does_one_with_other_options(train, trainer, monkeypatch):
    made = trainer(STRATEGIES["order 2"], Told(), **train)
    assert steps(made, monkeypatch) == []


def test_nor_does_one_over_noise_levels(trainer, monkeypatch):
    """With alignment at some of them, and the values of each image that figures by level take."""
    alignment = dataclasses.replace(STRATEGIES["order 2"], levels=(0.05, 0.2))
    assert steps(trainer(alignment, Told(), noise="range", micro_batch=8), monkeypatch) == []


def test_cached_features_are_looked_up_without_waiting(trainer, monkeypatch, tmp_path):
    table = FeatureTable(tmp_path, torch.zeros(64, 2, 4, 6))
    assert steps(trainer(STRATEGIES["order 2"], CachedTargets(table, 6)), monkeypatch) == []


def test_mirrored_images_are_the_same_on_every_device(trainer, monkeypatch):
    """They are drawn on the CPU, where cached features are looked up."""
    config = trainer(STRATEGIES["none"]).config
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, flip=True))
    (there,) = stream(config, monkeypatch)
    here = next(streams.batches(grey_images(), config, 0, 0, 1, torch.device("cpu")))
    assert there.noised.device == META
    assert there.flipped.device == torch.device("cpu")
    assert torch.equal(there.flipped, here.flipped)
    assert here.flipped.any()


class Patches(Encoder):
    """An encoder that needs no model."""

    def feature_map(self, images, size):
        return torch.nn.functional.pixel_unshuffle(images[:, :, :4, :4], 2)


def test_an_encoder_is_looked_at_once(trainer, monkeypatch):
    encoder = Patches(
        "patches", torch.nn.Identity(), Recipe(dim=4, stride=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    )
    made = trainer(STRATEGIES["detach"], ComputedTargets(encoder, 2))
    with Accelerator(answer=True) as machine:
        for batch in stream(made.config, monkeypatch, 3):
            made.update(batch)
    assert machine.waits == ["number to the CPU"]


def test_an_exact_step_waits_once_a_product(trainer, monkeypatch):
    """It asks whether the remainder is small; an answer of no gives all products: one a token."""
    alignment = dataclasses.replace(STRATEGIES["order 2"], order="exact")
    made = trainer(alignment, Told())
    with Accelerator(answer=True) as machine:
        for batch in stream(made.config, monkeypatch):
            made.update(batch)
    assert set(machine.waits) == {"number to the CPU"}
    assert len(machine.waits) == 2 * made.config.model.tokens


def test_alignment_in_a_loop_of_your_own():
    flow = flow_there()
    images, labels = batch_there(flow)
    align = Alignment(flow.config, target_dim=6, strategy="reverse", order=2, hidden=8).to(META)
    with Accelerator() as machine:
        align(flow, images, labels, targets=torch.zeros(3, 4, 6, device=META)).loss.backward()
    assert machine.waits == []


def test_figures_during_training():
    """They wait for what they show, once a figure."""
    flow, config = flow_there(), STRATEGIES["order 2"]
    images, labels = batch_there(flow)
    align = Alignment(flow.config, target_dim=6, hidden=8).to(META)
    targets = torch.zeros(3, 4, 6, device=META)
    with Accelerator() as machine:
        assert len(block_statistics(flow, Noised(images, labels))) == len(machine.waits) == 6
    with Accelerator():
        gradient_balance(flow, align.projector, Noised(images, labels), targets, config)


def test_the_optimiser_that_cuda_gets():
    """AdamW's fused step with ``found_inf``, and the averages, on tensors that say they are of CUDA."""
    with FakeTensorMode():
        weights = [torch.nn.Parameter(torch.zeros(3, 3, device="cuda")) for _ in range(2)]
        averages = [torch.zeros(3, 3, device="cuda") for _ in weights]
        optimiser, guard = torch.optim.AdamW(weights, fused=True), Guard(10.0, torch.device("cuda"))
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.found_inf = guard.judge(norm, 1)
        optimiser.step()
        with torch.no_grad():
            update_average(averages, weights, 0.9)
        assert averages[0].device == guard.bad.device == torch.device("cuda", 0)


def test_mixing_fails_on_fake_cuda_too():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="two devices"):
        torch.zeros(3, device="cuda") + torch.zeros(3)


# --- sampling ---

GUIDED = {
    "plain": 0.0,
    "guided": Guidance(1.5, ramp=True, formula="starflow", temperature=1.3, blocks=1),
}


@pytest.mark.parametrize("guidance", GUIDED)
@pytest.mark.parametrize("way", ["sequential", "captured", "jacobi"])
def test_sampling(guidance, way, monkeypatch):
    """Drawing the noise, checking the labels, decoding and denoising."""
    flow = flow_there()
    if way == "captured":
        monkeypatch.setattr("flowback.sampling.decoder.captures", lambda _: True)
        monkeypatch.setattr(cuda_graph, "cuda_graph", lambda run: run)
    plans = [BlockPlan(2)] * 2 if way == "jacobi" else None
    with Accelerator() as machine:
        images = Sampler(flow, GUIDED[guidance], plans=plans)([0, 0], seeds=[1, 2])
    assert images.device == META
    assert images.shape == (2, 1, 4, 4)
    labels = ["number to the CPU"] * 2  # least and largest, once a call
    # A sweep asks which images have converged, and hears none: 2 blocks, windows of 2 and 1 tokens.
    sweeps = ["copy to the CPU"] * 2 * (2 + 1)
    assert machine.waits == labels + (sweeps if way == "jacobi" else [])


def test_denoising():
    flow = flow_there()
    images, labels = batch_there(flow)
    with Accelerator() as machine:
        denoise(flow, images, labels)
    assert machine.waits == []


# --- classification and likelihood ---


@pytest.mark.parametrize("rule", ["gradient", "normalised", "exhaustive"])
def test_classification(rule):
    flow = flow_there()
    images, _ = batch_there(flow)
    with Accelerator() as machine:
        scores = classify(flow, images, rule, steps=2)
    assert scores.device == META
    assert machine.waits == []


def test_likelihood_in_float64_on_the_cpu():
    flow = flow_there()
    images, labels = batch_there(flow)
    batch = HeldOutBatch(images, labels, [0, 1, 2])
    with Accelerator():
        found = log_densities(flow, batch)
    assert found.dtype == torch.float64
    assert found.device == torch.device("cpu")
