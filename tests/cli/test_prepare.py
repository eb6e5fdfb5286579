import json

import numpy as np
import pytest
from PIL import Image

from flowback import checkpoint


def test_prepare_train_evaluate(flowback, small, photos, tmp_path):
    """Photographs to a prepared set to a run; run again, the command checks what is there."""
    words = ("prepare", photos, "--out", tmp_path / "set", "--image-size", 32, "--workers", 2)
    code, printed, err = flowback(*words, "--json", tmp_path / "prepare.json")
    assert code == 0, err
    assert "--data.path" in printed
    record = json.loads((tmp_path / "prepare.json").read_text())
    assert record["set"]["splits"]["train"]["images"] + record["set"]["splits"]["test"]["images"] == 48
    code, printed, err = flowback(*words)
    assert code == 0, err
    assert "every byte" in printed
    out = tmp_path / "run"
    code, printed, err = flowback("train", "folder-32", "--data.path", tmp_path / "set", "--out", out, *small)
    assert code == 0, err
    assert checkpoint.load_config(out).model.num_classes == 2
    code, _, err = flowback("evaluate", out, "--samples", 0, "--draws", 1)
    assert code == 0, err
    settings = json.loads((out / "evaluation/evaluate.json").read_text())["settings"]
    assert settings["held_out"]["images_hash"] == record["set"]["splits"]["test"]["fingerprint"]
    code, _, err = flowback(
        "train",
        "folder-32",
        "--data.path",
        tmp_path / "set",
        "--model.image-size",
        64,
        "--out",
        tmp_path / "x",
    )
    assert code == 2
    assert "prepared with --image-size 32" in err


def test_hugging_face_datasets(flowback, tmp_path):
    """A data set that `datasets` saved to disk: images and classes by the types of its columns."""
    import datasets

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"picture": [Image.fromarray(image) for image in pixels], "kind": [k % 2 for k in range(12)]}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(
        {"train": table.select(range(8)), "validation": table.select(range(8, 12))}
    ).save_to_disk(tmp_path / "saved")
    code, _, err = flowback("prepare", tmp_path / "saved", "--out", tmp_path / "set", "--image-size", 8)
    assert code == 0, err
    for split, span in (("train", slice(8)), ("test", slice(8, 12))):
        folder = tmp_path / "set" / split
        assert np.array_equal(np.load(folder / "images.npy"), pixels[span].transpose(0, 3, 1, 2))
        assert np.load(folder / "labels.npy").tolist() == rows["kind"][span]


BAD = {
    "nothing": (["nowhere"], "nowhere is not a folder, a tar file, the name of a known set"),
    "size": (["digits", "--image-size", "0"], "--image-size must be at least 1"),
    "holdout": (["digits", "--holdout", "1"], "--holdout must be in [0, 1)"),
    "grid": (["digits", "--encoder", "efficientnet_lite0"], "--encoder and --encoder-grid go together"),
    "encoder": (["digits", "--encoder-grid", "4"], "--encoder and --encoder-grid go together"),
    "no grid": (["digits", "--encoder", "x", "--encoder-grid", "0"], "--encoder-grid must be at least 1"),
    "weights": (["digits", "--encoder-weights", "x"], "--encoder-weights needs --encoder"),
    "no encoder": (["digits", "--encoder", "x", "--encoder-grid", "4"], "Unknown encoder x"),
    "labels": (["digits", "--labels", "x.csv"], "--labels x.csv needs a folder of images"),
    "torchvision": (["cifar10", "--path", "."], "cifar10 is not in"),
}


@pytest.mark.parametrize(("words", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(flowback, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    code, out, err = flowback("prepare", *words, "--out", tmp_path / "set")
    assert code == 2, (out, err)
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "set").exists()
