"""A student's compiled evaluation against its PyTorch network, in float64, for every kind of it."""

import dataclasses

import pytest
import torch

from flowback.sampling import native
from flowback.students.native_network import NativeStudent
from flowback.students.sampler import StudentSampler
from students.test_student_network import MODEL, student_of

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")

KINDS = {
    "gelu": {},
    "rope-swiglu": {"position": "rope", "mlp": "swiglu", "qk_norm": True},
    "nine tokens": {"image_size": 12, "width": 64, "head_dim": 16},
    "unconditional": {"num_classes": 0},
    "many tokens": {"image_size": 28, "channels": 3, "patch_size": 2, "width": 48, "head_dim": 24},
}


def noise_of(student, count):
    return torch.randn(count, student.config.tokens, student.config.token_dim, dtype=student.dtype)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_network(kind, layers, threads):
    """To 1e-11: the same sums in another order, through six layers; batches that grow and shrink."""
    torch.set_num_threads(threads)
    model = dataclasses.replace(MODEL, **KINDS[kind])
    student = student_of(model=model, layers=layers)
    for parameter in student.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    compiled = NativeStudent(student, torch.float64)
    for count in (1, 7, 3):
        z, number = noise_of(student, count), torch.rand(count).double()
        ids = torch.arange(count) % 3
        given = [None, ids, torch.nn.functional.one_hot(ids, 3).double()] if model.num_classes else [None]
        for labels in given:
            expected, _ = student(z, labels, None, number)
            torch.testing.assert_close(compiled(z, labels, number), expected, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(compiled(z), student(z)[0], atol=1e-11, rtol=1e-11)


def test_keeps_nothing_of_the_call_before():
    """Two results are two tensors, and contexts are those of the call."""
    student, z = student_of(), torch.randn(2, 4, 16).double()
    compiled = NativeStudent(student, torch.float64)
    first = compiled(z, torch.tensor([0, 1]))
    kept = first.clone()
    second = compiled(z, torch.tensor([2, 2]), torch.ones(2).double())
    assert torch.equal(first, kept)
    assert not torch.allclose(first, second, atol=1e-9)


def test_fp32_and_bf16_are_near():
    """One part in 10,000, and in 30: bfloat16 keeps 8 bits, and a student of random weights has no slack."""
    student = student_of(model=dataclasses.replace(MODEL, width=64, head_dim=32)).float()
    z = torch.randn(4, 4, 16)
    student_of_bf16 = StudentSampler(student, bf16=True)._native
    assert student_of_bf16.weights.storage == torch.bfloat16
    expected, _ = student(z)
    size = expected.abs().max()
    assert (NativeStudent(student, torch.float32)(z) - expected).abs().max() < 1e-4 * size
    assert 0 < (student_of_bf16(z) - expected).abs().max() < 0.03 * size


@pytest.mark.parametrize("method", ["inverse", "matching"])
def test_images_are_those_of_pytorch(method):
    student = student_of(method)
    ways = [StudentSampler(student, 0.7 if method == "matching" else 0.0, native=n) for n in (True, False)]
    assert [way._native is not None for way in ways] == [True, False]
    images = [way([0, 1, 2], seeds=[4, 5, 6]) for way in ways]
    torch.testing.assert_close(*images, atol=1e-11, rtol=1e-11)


def test_wide_networks_and_other_devices_stay_with_pytorch():
    wide = dataclasses.replace(MODEL, width=512, head_dim=64)
    assert StudentSampler(student_of(model=wide))._native is None
    assert StudentSampler(student_of(model=MODEL).to("meta"))._native is None


def test_a_part_of_the_tokens_is_refused():
    """They see each other: the step cannot know what the others are."""
    student = student_of()
    step, _, rows = NativeStudent(student, torch.float64)._step(2)
    with pytest.raises(ValueError, match="3 tokens, which see all 4"):
        step(torch.zeros(2, 3, 16).double(), 0, rows)
