"""The pipeline draws what the flow draws, as pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowback import Flow, FlowPipeline, InputError, ModelConfig
from flowback.data.pixels import to_bytes

CONFIG = ModelConfig(
    image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=3
)


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    return Flow(CONFIG, ("cat", "dog", "eel")).eval()


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def test_images_are_those_of_the_flow(flow):
    pipe = FlowPipeline(flow)
    images = pipe(["dog", 2], generator=generator(), guidance_scale=0.5).images
    seeds = torch.randint(2**32, (2,), generator=generator())
    expected = to_bytes(flow.sample(["dog", 2], seeds, guidance=0.5))
    assert [image.mode for image in images] == ["L", "L"]
    assert np.array_equal(np.stack([np.array(image) for image in images]), expected[:, 0].numpy())
    again = pipe(["dog", 2], generator=generator(), guidance_scale=0.5, output_type="pt").images
    assert torch.equal(again, expected / 255)
    as_array = pipe(["dog", 2], generator=generator(), guidance_scale=0.5, output_type="np").images
    assert as_array.dtype == np.float32
    assert np.array_equal(as_array, again.permute(0, 2, 3, 1).numpy())


def test_a_generator_for_each_image(flow):
    pipe = FlowPipeline(flow)
    both = pipe([0, 0], generator=[generator(1), generator(2)], output_type="pt").images
    second = pipe(0, generator=generator(2), output_type="pt").images
    assert torch.allclose(both[1:], second, atol=1.5 / 255)  # rounding, of another batch size
    assert not torch.equal(both[0], both[1])


def test_without_labels_and_colours():
    flow = Flow(ModelConfig(**{**vars(CONFIG), "channels": 3, "num_classes": 0})).eval()
    images = FlowPipeline(flow)(batch_size=3, generator=generator()).images
    assert [(image.size, image.mode) for image in images] == [((8, 8), "RGB")] * 3
    assert images[0] != images[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": [0], "output_type": "jpg"}, "There is no output_type jpg"),
        ({"class_labels": [0, 1], "generator": [generator()]}, "1 generators for 2 images"),
        ({"class_labels": []}, "nothing to draw"),
        ({"class_labels": ["dgo"]}, r"no class 'dgo'; did you mean dog\?"),
    ],
)
def test_what_does_not_fit(flow, options, message):
    with pytest.raises(InputError, match=message):
        FlowPipeline(flow)(**options)
