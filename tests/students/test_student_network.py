"""The students' network: what it sees, and that its conditions mean what those of the flow mean."""

import dataclasses

import pytest
import torch

from flowback import InputError, ModelConfig, Student, StudentConfig
from flowback.students.network import number_features

MODEL = ModelConfig(
    image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=3
)
RMS = (0.5, 2.0, 1.0)


def student_of(method="inverse", model=MODEL, **options):
    """A random student in float64."""
    return Student(model, StudentConfig(method, rms=RMS, **options)).double()


def noise(count=2):
    return torch.randn(count, 4, 16, dtype=torch.float64)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_every_token_sees_all_others(position):
    """No causal mask, in either direction."""
    student, z = student_of(model=dataclasses.replace(MODEL, position=position)), noise()
    before, _ = student(z)
    for changed, looked_at in ((0, 3), (3, 0)):
        other = z.clone()
        other[:, changed] += 1
        after, _ = student(other)
        assert not torch.allclose(after[:, looked_at], before[:, looked_at], atol=1e-9)


def test_labels_mean_what_they_mean_to_the_flow():
    """Ids are one-hot weights; without label, or where it is dropped, it is the mean of the classes."""
    student, z = student_of(), noise()
    ids = torch.tensor([2, 0])
    of_ids, _ = student(z, ids)
    of_weights, _ = student(z, torch.nn.functional.one_hot(ids, 3).double())
    assert torch.allclose(of_ids, of_weights, atol=1e-12)
    dropped, _ = student(z, ids, torch.tensor([True, False]))
    without, _ = student(z)
    assert torch.allclose(dropped[0], without[0], atol=1e-12)
    assert torch.equal(dropped[1], of_ids[1])
    assert not torch.allclose(of_ids, without, atol=1e-9)
    mean, _ = student(z, torch.full((2, 3), 1 / 3, dtype=torch.float64))
    assert torch.allclose(mean, without, atol=1e-12)


def test_the_number_is_an_input_and_none_is_zero():
    student, z = student_of(), noise()
    one, zero, none = (student(z, None, None, n)[0] for n in (torch.ones(2), torch.zeros(2), None))
    assert torch.equal(zero, none)
    assert not torch.allclose(one, zero, atol=1e-9)
    features = number_features(torch.tensor([0.25, 0.25001]), 64)
    assert (features[0] - features[1]).abs().max() < 0.05


def test_stages_are_those_of_the_teacher_and_one_more():
    student = student_of()
    _, hidden = student(noise())
    assert len(student.stages) == 3
    assert len(student.heads) == len(hidden) == len(student.states(hidden)) == 2
    assert len(student_of("matching").heads) == 0


def test_every_weight_has_a_gradient():
    for method in ("inverse", "matching"):
        student = student_of(method)
        out, hidden = student(noise(), torch.tensor([0, 1]), None, torch.tensor([0.3, 0.6]))
        outputs = [out, *(student.states(hidden) if method == "inverse" else [])]
        torch.stack([x.square().sum() for x in outputs]).sum().backward()
        assert [name for name, p in student.named_parameters() if p.grad is None] == []


def test_a_width_that_heads_do_not_divide_is_refused():
    from flowback import RunConfig

    with pytest.raises(InputError, match=r"--student\.width 20 is not divisible"):
        RunConfig(MODEL, student=StudentConfig("inverse", width=20))
