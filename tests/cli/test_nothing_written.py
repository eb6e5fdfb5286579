"""A wrong option is refused before anything is written, in every verb: ``--out`` does not appear."""

import pytest
import torch

from flowback import DataConfig, Flow, ModelConfig, RunConfig, checkpoint

RUN = "RUN"
TINY = ["--model.width", "16", "--model.head-dim", "8", "--model.blocks", "2", "--model.layers", "1"]
TINY += ["--train.batch-size", "8", "--train.steps", "1", "--train.device", "cpu"]
TINY += ["--alignment.locations", "2", "1", "--alignment.hidden", "8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of an untrained flow for digits."""
    config = RunConfig(
        ModelConfig(
            image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=10
        ),
        DataConfig("digits"),
        classes=tuple("0123456789"),
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    checkpoint.save(folder, config, Flow(config.model, config.classes).state_dict())
    return folder


BAD = [
    ["demo", "--seed", "-1"],
    ["demo", "--steps", "0"],
    ["demo", "--samples", "1"],
    ["demo", "--guidance", "nan"],
    ["prepare", "digits", "--image-size", "0"],
    ["prepare", "digits", "--holdout", "2"],
    ["prepare", "digits", "--encoder", "efficientnet_lite0"],
    ["prepare", "digits", "--encoder", "no_such", "--encoder-grid", "2"],
    ["prepare", "digits", "--workers", "-1"],
    ["prepare", "digits", "--device", "qpu"],
    ["prepare", "nowhere"],
    ["train", "digits-mini", *TINY, "--train.seed", "-1"],
    ["train", "digits-mini", *TINY, "--model.num-classes", "7"],
    ["train", "digits-mini", *TINY, "--train.device", "qpu"],
    ["train", "digits-mini", *TINY, "--train.init-from", "nowhere"],
    ["train", "digits-mini", *TINY, "--train.trackers", "wandb"],
    ["train", "digits-mini", *TINY, "--data.labelled", "3"],
    ["train", "digits-mini-reverse", *TINY, "--alignment.encoder", "no_such"],
    ["train", "digits-mini-reverse", *TINY, "--alignment.weights", "nowhere.pth"],
    ["train", "folder-32", "--data.path", "nowhere"],
    ["sample", RUN, "--seed", "-1"],
    ["sample", RUN, "--count", "0"],
    ["sample", RUN, "--labels", "12"],
    ["sample", RUN, "--guidance", "inf"],
    ["sample", RUN, "--guided-blocks", "-1"],
    ["sample", RUN, "--batch-size", "0"],
    ["sample", RUN, "--device", "qpu"],
    ["sample", RUN, "--vae", "nowhere"],
    ["sample", "nowhere"],
    ["classify", RUN, "--seed", "-1"],
    ["classify", RUN, "--limit", "0"],
    ["classify", RUN, "--device", "qpu"],
    ["classify", RUN, "--images", "nowhere"],
    ["classify", RUN, "--images", RUN, "--method", "both"],
    ["evaluate", RUN, "--samples", "1"],
    ["evaluate", RUN, "--search", "3:1:1"],
    ["evaluate", RUN, "--reference", "nowhere"],
    ["evaluate", RUN, "--reference-limit", "1"],
    ["evaluate", RUN, "--device", "qpu"],
    ["evaluate", "nowhere"],
    ["probe", RUN, "--seed", "-1"],
    ["probe", RUN, "--locations", "9", "9"],
    ["probe", RUN, "--encoder", "no_such"],
    ["probe", RUN, "--device", "qpu"],
    ["plot", "nowhere"],
    ["reproduce", "table1", "--seeds", "0"],
    ["reproduce", "table1", "--first-seed", "-1"],
    ["reproduce", "table99"],
    ["reproduce", "table1", "--scale", "mini", "--steps", "0"],
    ["reproduce", "table1", "--scale", "mini", "--samples", "1"],
    ["reproduce", "table1", "--scale", "mini", "--device", "qpu"],
    ["reproduce", "table1", "--scale", "mini", "--jobs", "0"],
]


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_nothing_is_written_before_all_options_are_checked(flowback, model, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    words = [model if word == RUN else word for word in words]
    before = sorted(model.iterdir())
    code, _, error = flowback(*words, "--out", tmp_path / "deep" / "new")
    assert code == 2, error
    assert list(tmp_path.iterdir()) == []
    assert sorted(model.iterdir()) == before


@pytest.mark.parametrize("verb", ["train", "prepare", "sample", "distil"])
def test_nor_among_the_images_of_a_set(flowback, photos, tmp_path, verb):
    """A folder of samples in a folder of photographs would be one more class of them."""
    config = RunConfig(
        ModelConfig(image_size=8, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=2),
        DataConfig("folder", photos),
        classes=("china", "flower"),
    )
    checkpoint.save(tmp_path / "model", config, Flow(config.model, config.classes).state_dict())
    subject = {"train": ["folder-32", "--data.path", photos, *TINY], "prepare": [photos]}
    before = sorted(photos.rglob("*"))
    code, _, error = flowback(
        verb, *subject.get(verb, [tmp_path / "model"]), "--out", photos / "deep" / "new"
    )
    assert code == 2, error
    assert f"lies in {photos}, the folder of the images, and would become a part of them" in error
    assert sorted(photos.rglob("*")) == before


@pytest.mark.parametrize(
    "words", [["--noise-std", "nan"], ["--patch-size", "0"], ["--patch-size", "2"]], ids=str
)
def test_nor_by_an_import(flowback, tmp_path, words):
    code, _, error = flowback(
        "import-tarflow",
        tmp_path / "none.pth",
        tmp_path / "new",
        "--image-size",
        8,
        "--patch-size",
        4,
        *words,
    )
    assert code == 2, error
    assert list(tmp_path.iterdir()) == []
