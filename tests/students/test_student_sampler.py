"""Drawing with a student: the solver's order and cost, seeds, guidance, and the teacher's exact images."""

import pytest
import torch

from flowback import BlockPlan, InputError, SampleConfig, Sampler
from flowback.sampling.jacobi import jacobi
from flowback.sampling.sampler import noise as noise_of_seeds
from flowback.students.refine import refined_sampler
from flowback.students.sampler import StudentSampler, integrate, squared_times
from sampling.flows import noise_of, tame_flow
from students.test_student_network import student_of


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("evaluations", range(1, 9))
def test_a_solver_takes_the_evaluations_that_it_was_given(solver, evaluations):
    """And a constant velocity leads to the image exactly."""
    z, v, calls = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double(), []

    def velocity(x, t):
        calls.append(t)
        return v

    *_, image = integrate(velocity, z, evaluations, solver)
    assert len(calls) == evaluations
    assert torch.allclose(image, z - v, atol=1e-12)
    assert squared_times(4) == [1, 0.5625, 0.25, 0.0625, 0]


def test_heun_is_of_second_order():
    """dx/dt = x·cos t: twice the steps divide Euler's error by about 2, Heun's by about 4."""
    z = torch.ones(1, 1, 1).double()
    exact = torch.exp(-torch.sin(torch.ones(1).double()))

    def error(evaluations, solver):
        *_, x = integrate(lambda x, t: x * torch.cos(torch.tensor(t).double()), z, evaluations, solver)
        return float((x - exact).abs().max())

    assert 1.7 < error(20, "euler") / error(40, "euler") < 2.4
    assert 3.2 < error(39, "heun") / error(79, "heun") < 5
    assert error(39, "heun") < error(39, "euler") / 2


@pytest.mark.parametrize("method", ["inverse", "matching"])
def test_an_image_is_its_seed_and_its_noise_the_teachers(method):
    student = student_of(method)
    flow = tame_flow(num_classes=3, image_size=8, channels=1, patch_size=4)
    together = student.sample([0, 1, 2], seeds=[5, 6, 7])
    for label, seed, image in zip([0, 1, 2], [5, 6, 7], together, strict=True):
        assert torch.allclose(student.sample([label], seeds=[seed])[0], image, atol=1e-10)
    assert torch.allclose(student.sample([0, 1, 2], seeds=[5, 6, 7], batch_size=2), together, atol=1e-10)
    first = StudentSampler(student).trajectory([0], [5])[0]
    assert torch.equal(first, Sampler(flow).trajectory([0], [5])[0])


def test_the_way_ends_at_the_image():
    """Of an inverse: z, the states, the image."""
    drawing = StudentSampler(student_of())
    *way, image = drawing.trajectory([0, 1], [3, 4])
    assert len(way) == 3
    assert torch.allclose(image, drawing([0, 1], [3, 4]), atol=1e-12)


def test_matching_is_guided_by_two_velocities():
    """One Euler step: z − (v_u + (1 + w)(v_c − v_u))."""
    student = student_of("matching")
    z = noise_of_seeds(student, [3])
    one = torch.ones(1)
    with_label, without = (student(z, labels, None, one)[0] for labels in (torch.tensor([2]), None))
    image = StudentSampler(student, 0.5, evaluations=1)([2], [3])
    expected = z - (without + 1.5 * (with_label - without))
    assert torch.allclose(student.tokens(image), expected, atol=1e-10)


def test_the_scale_of_an_inverse_is_its_input():
    student = student_of(guidance=2.0)
    z = noise_of_seeds(student, [3])
    expected, _ = student(z, torch.tensor([2]), None, torch.tensor([0.75]))
    assert torch.allclose(student.tokens(StudentSampler(student, 1.5)([2], [3])), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("inverse", {"evaluations": 0}, "--evaluations 0 must be at least 1"),
        ("inverse", {"evaluations": 2}, "draws in one evaluation, not 2"),
        ("inverse", {"guidance": 1.0}, "has learned guidance from 0 to 0, not 1.0"),
        ("matching", {"batch_size": 0}, "batch size is 0"),
    ],
)
def test_what_a_student_cannot_do_is_refused(method, options, sentence):
    with pytest.raises(InputError, match=sentence):
        StudentSampler(student_of(method), **options)


def test_options_of_flows_are_refused():
    with pytest.raises(InputError, match="leave out --ramp"):
        student_of("matching").sampler(SampleConfig(guidance=1.0, ramp=True))
    with pytest.raises(InputError, match="--sampler jacobi is of flows"):
        student_of().sampler(SampleConfig(sampler="jacobi"))
    flow = tame_flow()
    for option in ({"sampler": "student+exact"}, {"evaluations": 3}, {"solver": "heun"}):
        with pytest.raises(InputError, match="is of students, and this model is a flow"):
            Sampler.from_config(flow, SampleConfig(**option))


# --- exact images that start from the student's ---


def test_sweeps_from_the_answer_end_at_once():
    """One sweep a window finds that nothing changes; from z they take more. Both are exact."""
    flow = tame_flow(num_classes=3)
    block, z = flow.blocks[0], noise_of(flow, 2)
    answer = block.inverse(z, block.context(None))
    decoder = Sampler(flow).decoder(1, None, torch.zeros(2, dtype=torch.float64), new=8)
    far = jacobi(decoder, z, 4, 1e-9)
    near = jacobi(decoder, z, 4, 1e-9, init=answer)
    assert near.sweeps.tolist() == [1, 1]
    assert (far.sweeps > 1).all()
    for solution in (far, near):
        assert torch.allclose(solution.x, answer, atol=1e-7)


@pytest.mark.parametrize("method", ["inverse", "matching"])
def test_refined_images_are_the_teachers_whatever_the_student_says(method):
    """A random student's start, a tolerance of 1e-10 in float64: equal to 1e-7 after two blocks."""
    flow = tame_flow(num_classes=3, image_size=8, channels=1, patch_size=4, blocks=2)
    refined = refined_sampler(
        flow, student_of(method), SampleConfig(window=3, tolerance=1e-10, denoise=False)
    )
    assert all(isinstance(plan, BlockPlan) and plan.window == 3 for plan in refined.plans)
    exact = Sampler(flow, denoise=False)([0, 1, 2], [1, 2, 3])
    assert torch.allclose(refined([0, 1, 2], [1, 2, 3]), exact, atol=1e-7)
