"""Which flows an app shows, and under which names."""

import pytest
import torch

from app.conftest import CONFIG, made
from flowback import Flow, InputError, RunConfig, checkpoint
from flowback.app.flows import Flows
from flowback.config import CodecConfig


def test_names_tell_run_and_step_and_no_path(runs):
    flows = Flows([runs / "first", runs / "second"])
    assert flows.names == ["first, step 20", "first, step 10", "second, step 5"]
    assert torch.equal(flows.own.blocks[0].class_table, made(2).blocks[0].class_table)
    assert flows["second, step 5"] is flows["second, step 5"]


def test_a_checkpoint_alone_and_the_same_name_twice(runs, tmp_path):
    made().save_pretrained(tmp_path / "first")
    flows = Flows([tmp_path / "first", runs / "first" / "checkpoints" / "step-00000010"])
    assert flows.names == ["first", "step-00000010"]
    assert Flows([tmp_path / "first", tmp_path / "first"]).names == ["first", "first (2)"]


@pytest.mark.parametrize("name", ["third", "../first", "/etc"])
def test_visitors_reach_no_other_checkpoint(runs, name):
    with pytest.raises(InputError, match="no such flow here"):
        Flows([runs / "first"])[name]


def test_flows_of_other_data_are_not_compared(runs, tmp_path):
    made(classes=("a", "b", "c")).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="other images or classes than the first run"):
        Flows([runs / "first", tmp_path / "other"])


def test_a_flow_of_latents_is_refused(tmp_path):
    config = RunConfig(CONFIG, codec=CodecConfig(vae="someone/vae"))
    checkpoint.save(tmp_path / "latent", config, Flow(CONFIG).state_dict())
    with pytest.raises(InputError, match="models the latents of a VAE; the app shows flows of pixels"):
        Flows([tmp_path / "latent"])
