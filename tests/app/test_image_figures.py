"""The app's figures are those of the library."""

from dataclasses import replace

import pytest
import torch

from app.conftest import CONFIG, made
from flowback import Flow, classify
from flowback.app import pictures
from flowback.app.image_figures import read
from flowback.data.image_set import image_set
from flowback.evaluation.held_out import likelihood

LEVELS = torch.randint(256, (1, 1, 8, 8), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
IMAGE = LEVELS.double() / 127.5 - 1


@pytest.fixture(scope="module")
def exact():
    return made().double()


def test_decoded_from_z_is_what_was_encoded(exact):
    found = read(exact, IMAGE, 1)
    assert found.error < 1e-10
    torch.testing.assert_close(exact.tokens(found.z), exact(exact.add_noise(IMAGE, [0]), [1]).z)
    assert torch.equal(found.noised, exact.add_noise(IMAGE, [0]))


def test_likelihood_is_that_of_evaluate(flow):
    expected = likelihood(flow, image_set(LEVELS), draws=3, conditional=False)
    found = read(flow, IMAGE.float())
    assert found.bits_per_dim == pytest.approx(expected.bits_per_dim.mean, abs=1e-5)
    assert found.nll == pytest.approx(expected.nll.mean, abs=1e-5)


@pytest.mark.parametrize("method", ["gradient", "normalised", "exhaustive"])
def test_scores_are_those_of_classify(exact, method):
    found = read(exact, IMAGE, method=method)
    torch.testing.assert_close(found.scores, classify(exact, IMAGE, method, draws=3)[0])


def test_an_unconditional_flow_has_no_scores():
    assert read(Flow(replace(CONFIG, num_classes=0)).eval(), IMAGE.float()).scores is None


def test_names_are_text_wherever_they_stand():
    name = '<img src=x onerror="alert(1)">'
    shown = pictures.tiles(torch.zeros(1, 1, 2, 2), [name], name) + pictures.error(name)
    shown += pictures.bars(torch.tensor([1.0, 2.0]), [name, "b"], name)
    assert "<img src=x" not in shown
    assert shown.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt;") == 6


def test_bars_of_many_classes_are_the_highest_ten():
    shown = pictures.bars(torch.arange(1000.0), [f"class {k}" for k in range(1000)], "scores")
    assert shown.count("<tr") == 10
    assert "class 990<" in shown
    assert "class 989<" not in shown
