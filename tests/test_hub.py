"""Flows by name: those that come along, and those on the Hub, whose HTTP interface has a stand-in here."""

from __future__ import annotations

import pytest
import torch

from fake_hub import COMMIT, FakeHub
from flowback import Flow, InputError, ModelConfig, checkpoint, create_encoder, hub
from flowback.config import CodecConfig
from flowback.data.hf_datasets import open_hub
from flowback.data.vae import open_codec
from flowback.model_card import Card

CONFIG = ModelConfig(
    image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=3
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A cache and a token of the test's own."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")


def point_to(address, monkeypatch):
    """Let the client ask this address."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def fake(monkeypatch):
    """A Hub that answers."""
    made = FakeHub()
    with made.serving() as address:
        point_to(address, monkeypatch)
        yield made


@pytest.fixture
def silent(monkeypatch):
    """No Hub: nothing listens at this port, for it cannot be listened at."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    point_to("http://127.0.0.1:1", monkeypatch)


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    return Flow(CONFIG, ("cat", "dog", "eel")).eval()


@pytest.fixture(scope="module")
def files(flow, tmp_path_factory):
    """What a repository of the flow holds, and what a thief might add."""
    folder = tmp_path_factory.mktemp("files") / "flow"
    flow.save_pretrained(folder)
    return {**{file.name: file.read_bytes() for file in folder.iterdir()}, "training.pt": b"a pickle"}


def refusal(name, **options):
    with pytest.raises(InputError) as caught:
        Flow.from_pretrained(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_flow_on_the_hub(fake, flow, files):
    fake.repositories["someone/cats"] = files
    loaded = Flow.from_pretrained("someone/cats")
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(loaded(images, ["dog", "cat"]).z, flow(images, ["dog", "cat"]).z)
    assert not any("training.pt" in request for request in fake.requests if "resolve" in request)
    assert Flow.from_pretrained(f"someone/cats@{COMMIT}").folder == loaded.folder
    assert Flow.from_pretrained("someone/cats", revision="main").folder == loaded.folder


def test_the_cache_serves_when_the_hub_is_silent(fake, files, monkeypatch):
    fake.repositories["someone/cats"] = files
    folder = checkpoint.fetch("someone/cats")
    point_to("http://127.0.0.1:1", monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    assert checkpoint.fetch("someone/cats") == folder


def test_a_silent_hub_is_asked_once(silent):
    said = refusal("someone/cats")
    assert said == (
        "No checkpoint at someone/cats: there is no such folder, and the Hub does not answer, nor has its "
        "cache a copy; connect, and try again."
    )


def test_a_silent_hub_costs_others_no_time(silent):
    """File by file, as timm and diffusers fetch, the client repeats each request, and sleeps in between."""
    from huggingface_hub import errors, hf_hub_download

    with hub.quick(), pytest.raises(errors.LocalEntryNotFoundError):
        hf_hub_download("someone/cats", "config.json")
    with pytest.raises(InputError, match=r"cannot be downloaded \(the Hub does not answer.*encoder-weights"):
        create_encoder("timm:test_vit")
    with pytest.raises(InputError, match=r"The VAE someone/vae cannot be loaded \(the Hub does not answer"):
        open_codec(CodecConfig("someone/vae"))
    with pytest.raises(
        InputError, match=r"hf:someone/set cannot be loaded .*\(the Hub does not answer, nor has"
    ):
        open_hub("hf:someone/set", 0.0)


def test_a_hub_that_is_switched_off(fake, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the Hub is switched off (HF_HUB_OFFLINE), nor has its cache a copy" in refusal("someone/cats")
    assert fake.requests == []


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        (None, "the Hub has no such repository, or it is private; check the name, or log in with"),
        ((403, "GatedRepo"), "it is gated: accept its terms at http"),
        ((404, "RevisionNotFound"), "the repository has no revision v9; give a branch, a tag or a commit"),
        ((500, ""), "the Hub answers with the status 500; try again later"),
    ],
)
def test_refusals(fake, files, monkeypatch, refuses, message):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # it repeats what failed in the server
    if refuses:
        fake.repositories["someone/cats"], fake.refuses["someone/cats"] = files, refuses
    assert message in refusal("someone/cats@v9")


def test_a_download_that_breaks_off(fake, files, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own repetitions
    fake.repositories["someone/cats"], fake.breaks_at = files, len(files["model.safetensors"]) // 2
    said = refusal("someone/cats")
    assert "the connection broke off" in said
    assert said.endswith("; try again.")
    fake.breaks_at, fake.cut = None, False
    Flow.from_pretrained("someone/cats")  # and its checksum is right


def test_a_broken_download_is_not_taken_for_a_whole_one(fake, files, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    fake.repositories["someone/cats"], fake.breaks_at = files, len(files["model.safetensors"]) // 2
    refusal("someone/cats")
    point_to("http://127.0.0.1:1", monkeypatch)
    assert "incomplete" in refusal("someone/cats")  # older clients take the part for the whole


def test_files_that_are_no_flow(fake, files):
    fake.repositories["someone/cats"] = {"config.json": files["config.json"], "model.bin": b"a pickle"}
    assert "has no model.safetensors of it; it is no flow, or" in refusal("someone/cats")
    fake.repositories["someone/dogs"] = {**files, "model.safetensors": files["model.safetensors"][:-8]}
    assert "is damaged: its SHA-256 is not the one in config.json" in refusal("someone/dogs")


def test_what_is_pushed_comes_back(fake, flow, monkeypatch):
    monkeypatch.setattr(
        Flow, "_picture", lambda *given: b"a picture"
    )  # the real one is in test_model_card.py
    address = flow.push_to_hub("someone/cats", Card("someone/cats", licence="mit"), torch.float16)
    assert address.endswith("/someone/cats")
    assert sorted(fake.repositories["someone/cats"]) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "samples.png",
    ]
    loaded = Flow.from_pretrained("someone/cats")
    for name, value in flow.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float())
    assert loaded.classes == flow.classes
    assert 'from_pretrained("someone/cats")' in fake.repositories["someone/cats"]["README.md"].decode()


def test_a_push_is_refused_before_the_work(fake, flow, monkeypatch):
    monkeypatch.setattr(Flow, "save_pretrained", lambda *given: pytest.fail("it works already"))
    fake.user = None
    with pytest.raises(InputError, match="The Hub does not know you; log in with `hf auth login`"):
        flow.push_to_hub("someone/cats")
    with pytest.raises(InputError, match="cats is no name on the Hub; give owner/name"):
        flow.push_to_hub("cats")
    point_to("http://127.0.0.1:1", monkeypatch)
    with pytest.raises(InputError, match="does not answer; connect, and try again"):
        flow.push_to_hub("someone/cats")


def test_a_push_into_what_belongs_to_others(fake, flow):
    fake.refuses["others/cats"] = (403, "")
    with pytest.raises(InputError, match="others/cats cannot be uploaded: you may not do that there"):
        flow.push_to_hub("others/cats", Card("others/cats", columns=0))


def test_the_switch_is_put_back(silent):
    from huggingface_hub import constants

    with hub.quick():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(InputError), hub.quick():
        raise InputError("while it was off")
    assert not constants.HF_HUB_OFFLINE
