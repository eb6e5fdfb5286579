from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import flowback
from flowback import Flow, InputError, ModelConfig, checkpoint, create_flow
from flowback.flow.likelihood import add_noise
from flowback.sampling import sample

CONFIG = ModelConfig(
    image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=3
)
CLASSES = ("cat", "dog", "eel")


@pytest.fixture
def flow():
    made = Flow(CONFIG, CLASSES).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def test_a_saved_flow_comes_back(flow, tmp_path):
    flow.save_pretrained(tmp_path / "saved")
    loaded = Flow.from_pretrained(tmp_path / "saved")
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(loaded(images, ["dog", "cat"]).z, flow(images, ["dog", "cat"]).z)
    assert loaded.classes == CLASSES
    assert loaded.config == CONFIG
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())  # it can be trained on
    loaded.save_pretrained(tmp_path / "saved")  # and takes its own place
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_loading_draws_no_weights(position, tmp_path, monkeypatch):
    """820 million random numbers, to be overwritten, would take longer than reading them."""
    saved = Flow(ModelConfig(**{**vars(CONFIG), "position": position}), CLASSES)
    saved.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, **_: not tensor.is_meta and 1 / 0)
    loaded = Flow.from_pretrained(tmp_path / "saved")
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(loaded(images).z, saved(images).z)


def test_a_saved_flow_names_no_data(flow, tmp_path):
    """Nobody knows on what it was trained: certainly not on the default of the settings."""
    flow.save_pretrained(tmp_path / "saved")
    loaded = Flow.from_pretrained(tmp_path / "saved")
    assert loaded.run.data.name == "none"
    with pytest.raises(InputError, match="settings name no data"):
        flowback.evaluate(loaded, samples=0)


def test_a_folder_of_something_else_is_left_alone(flow, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"other than a checkpoint \(.*thesis.tex\); choose another"):
        flow.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("labels", "ids"),
    [(["eel", "cat"], [2, 0]), (("cat", 1), [0, 1]), ("dog", [1, 1]), ([2, 0], [2, 0]), (1, [1, 1])],
)
def test_labels_are_names_or_ids(flow, labels, ids):
    assert flow.labels(labels, 2).tolist() == ids
    images = torch.zeros(2, 1, 8, 8)
    assert torch.equal(flow(images, labels).z, flow(images, torch.tensor(ids)).z)
    assert torch.equal(flow.sample(labels, [3, 4]), sample(flow, ids, [3, 4]))


def test_an_unknown_name_is_refused(flow):
    with pytest.raises(InputError, match=r"no class 'dgo'; did you mean dog\?"):
        flow.labels(["dgo"], 1)
    with pytest.raises(InputError, match="does not know the names of its classes; give 'dog' as an id"):
        Flow(CONFIG).labels(["dog"], 1)
    with pytest.raises(InputError, match="2 classes called dog; give an id"):
        Flow(CONFIG, ("dog", "cat", "dog")).labels(["dog"], 1)
    with pytest.raises(InputError, match="2 class names for a model of 3 classes"):
        Flow(CONFIG, ("cat", "dog"))


def test_a_name_is_found_however_its_accents_are_composed_and_ids_are_shown():
    flow = Flow(CONFIG, ("Cafe\u0301", "犬", "eel"))
    assert flow.labels(["Caf\u00e9", "犬"], 2).tolist() == [0, 1]
    with pytest.raises(InputError, match=r"no class 'xyz'; known: 0 = Cafe\u0301, 1 = 犬, 2 = eel"):
        flow.labels(["xyz"], 1)


def test_a_number_of_images(flow):
    drawn = flow.sample(["eel", "cat"], count=3)
    assert torch.equal(drawn, flow.sample(["eel", "cat", "eel"], [0, 1, 2]))
    assert flow.sample("dog", count=2).shape == flow.sample(count=2).shape == (2, 1, 8, 8)
    pictures = flowback.to_pil(3 * torch.tensor([-1.0, 0, 1]).view(3, 1, 1, 1).expand(3, 1, 8, 8))
    assert [picture.getpixel((0, 0)) for picture in pictures] == [0, 128, 255]
    assert flowback.to_pil(torch.zeros(1, 3, 8, 8))[0].mode == "RGB"
    for options in ({"count": 0}, {"count": 2, "seeds": [1, 2]}):
        with pytest.raises(InputError, match="give a number of images, at least 1, or seeds, not both"):
            flow.sample(**options)


def test_its_noise_is_that_of_training(flow):
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    noised = flow.add_noise(images, seeds=[5, 6])
    assert torch.equal(noised, add_noise(images, CONFIG, [5, 6]))
    assert torch.equal(noised[1:], flow.add_noise(images[1:], seeds=[6]))


def test_a_preset_gives_a_flow():
    flow = create_flow("digits", classes=[str(k) for k in range(10)], width=32)
    assert (flow.config.width, flow.config.num_classes, flow.classes[3]) == (32, 10, "3")
    assert create_flow("digits", num_classes=0).config.num_classes == 0
    with pytest.raises(InputError, match="There is no preset 'digit'; did you mean digits"):
        create_flow("digit")
    with pytest.raises(InputError, match=r"The model has no option widht; did you mean width\?"):
        create_flow("digits", widht=32)


def test_a_name_on_the_hub_is_looked_up_in_the_cache(flow, tmp_path, monkeypatch):
    """As huggingface_hub lays it out; offline, so that nothing is asked for."""
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--someone--cats"
    flow.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert checkpoint.fetch("someone/cats") == repository / "snapshots" / commit
    with pytest.raises(InputError, match="No checkpoint at someone/dogs: there is no such folder, and"):
        Flow.from_pretrained("someone/dogs")


def test_the_package_loads_nothing_until_it_is_used():
    code = "import sys, flowback; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_shows_every_public_name():
    code = "import flowback; help(flowback)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in set(flowback.__all__) - {"__version__"} if name not in done.stdout] == []
    assert f"VERSION\n    {flowback.__version__}" in done.stdout
