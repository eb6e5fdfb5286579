"""Any order of options means the same, in every verb."""

import importlib
import itertools
import json

import pytest

from flowback import DataConfig, Flow, InputError, ModelConfig, RunConfig, checkpoint
from flowback.cli import VERBS, main
from flowback.cli.options import guidance_scales, parse


class Stop(Exception):  # noqa: N818 - no error
    """Carries the options out of a verb before it does anything."""


@pytest.fixture
def options_of(monkeypatch):
    """The options that a command comes to."""

    def stop(*arguments, **named):
        raise Stop(parse(*arguments, **named))

    def options(*words):
        module = VERBS[words[0]][0].split(":")[0]
        monkeypatch.setattr(importlib.import_module(f"flowback.cli.{module}"), "parse", stop)
        with pytest.raises(Stop) as caught:
            main([str(word) for word in words])
        return caught.value.args[0]

    return options


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint whose data are not the default ones."""
    config = RunConfig(
        ModelConfig(image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8),
        DataConfig("fake", holdout=0.25),
    )
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    checkpoint.save(folder, config, Flow(config.model).state_dict())
    return folder


def test_layers_of_each_block_on_the_command_line(options_of, tmp_path):
    words = ("train", "digits", "--model.layers")
    assert options_of(*words, "1,1,1,4").model.layers == (1, 1, 1, 4)
    assert options_of(*words, "3").model.layers == 3
    (tmp_path / "a.yaml").write_text("model: {layers: [1, 1, 1, 4]}")
    assert options_of("train", "digits", "--config", tmp_path / "a.yaml").model.layers == (1, 1, 1, 4)


POSITIONAL = "POSITIONAL"
WORDS = {
    "demo": [["--steps", "3"], ["--out", "x"], ["--json=y"]],
    "prepare": [[POSITIONAL], ["--out", "x"], ["--download"], ["--image-size=8"]],
    "train": [[POSITIONAL], ["--dry-run"], ["--train.steps", "3"], ["--model.width=64"]],
    "distil": [[POSITIONAL], ["--out", "x"], ["--method", "matching"], ["--train.steps=3"]],
    "sample": [[POSITIONAL], ["--out", "x"], ["--no-denoise"], ["--labels", "1", "2"], ["--seed=3"]],
    "plan": [[POSITIONAL], ["--ramp"], ["--guidance", "1"]],
    "classify": [[POSITIONAL], ["--no-noise"], ["--draws", "2"], ["--seed=3"]],
    "app": [["--port", "0"], [POSITIONAL], ["--no-open"], ["--host=::1"]],
    "evaluate": [[POSITIONAL], ["--no-likelihood"], ["--samples", "0"], ["--seed=3"]],
    "probe": [[POSITIONAL], ["--seed", "2"], ["--locations", "1", "1"], ["--encoder=None"]],
    "compare": [["a", "b"], ["--json", "x"]],
    "plot": [["a", "b"], ["--out", "x"], ["--against=seconds"]],
    "info": [[POSITIONAL], ["--json", "x"]],
    "cache": [["--clear", "all"]],
    "push": [[POSITIONAL, "a/b"], ["--out", "x"], ["--half"], ["--guidance=1"]],
    "completion": [["zsh"]],
    "presets": [["digits*"], ["--json", "x"]],
    "reproduce": [["table1"], ["--scale", "mini"], ["--seeds", "2"], ["--steps=3"]],
    "import-tarflow": [["a", "b"], ["--image-size", "8"], ["--patch-size=4"]],
    "export-tarflow": [["a", "b"]],
}


def orders(groups):
    """All rotations, also of the reverse; not those where an option of many values would go on."""
    for way in (groups, groups[::-1]):
        for start in range(len(way)):
            order = way[start:] + way[:start]
            before = [group for group, after in itertools.pairwise(order) if not after[0].startswith("-")]
            if not any(group[0] in ("--labels", "--locations") for group in before):
                yield [word for group in order for word in group]


@pytest.mark.parametrize("verb", VERBS)
def test_any_order_means_the_same(options_of, saved, verb):
    subject = {"train": "digits-mini", "prepare": "digits"}.get(verb, str(saved))
    groups = [[subject if word == POSITIONAL else word for word in group] for group in WORDS[verb]]
    first, *others = [options_of(verb, *order) for order in orders(groups)]
    assert all(other == first for other in others)
    if verb in ("evaluate", "classify", "probe"):
        assert first.data == DataConfig("fake", holdout=0.25)
    if verb == "train":
        assert (first.model.blocks, first.model.width) == (2, 64)


@pytest.mark.parametrize(
    "words",
    [
        ["--dry-run", "digits-mini"],
        ["digits-mini", "--dry-run"],
        ["--dry-run", "--train.steps", "1200", "digits-mini"],
        ["--dry-run", "--train.steps=1200", "digits-mini"],
        ["--dry_run", "--train.batch_size", "8", "digits-mini", "--train.batch-size", "64"],
        ["--dry-run", "--", "digits-mini"],
    ],
)
def test_the_preset_is_found_wherever_it_stands(flowback, words):
    code, out, err = flowback("train", *words)
    assert code == 0, err
    config = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert config["model"]["blocks"] == 2
    assert config["model"]["image_size"] == 8


def test_options_that_the_preset_allows_and_the_defaults_do_not(options_of):
    assert options_of("train", "--model.width", "32", "digits").model.width == 32  # not with heads of 64


@pytest.mark.parametrize("words", [["--alignment.locations", "2", "1"], ["--train.betas", ".8", ".9"]])
def test_many_values_leave_the_last_word_to_the_positional(options_of, words):
    options = options_of("train", "--dry-run", *words, "digits-mini")
    assert options == options_of("train", "digits-mini", *words, "--dry-run")
    assert options.preset == "digits-mini"


def test_many_values_take_all_up_to_the_next_option(flowback, tmp_path):
    """What cannot be told apart is refused, never taken for the default."""
    code, _, err = flowback("sample", "--labels", "1", "2", tmp_path, "--out", tmp_path / "x")
    assert code == 2
    assert "Missing" in err
    assert "A checkpoint folder" in err
    assert not (tmp_path / "x").exists()


def test_the_yaml_file_is_found_wherever_it_stands(options_of, tmp_path):
    (tmp_path / "my.yaml").write_text("train: {lr: 0.5}\nmodel: {width: 128}\n")
    groups = [["digits"], [f"--config={tmp_path / 'my.yaml'}"], ["--train.lr", "0.25"], ["--dry-run"]]
    found = [options_of("train", *order) for order in orders(groups)]
    assert {(o.model.width, o.train.lr, o.model.blocks) for o in found} == {(128, 0.25, 4)}


def test_data_for_short_in_any_order(options_of, saved, tmp_path):
    for given, expected in (
        (["--data", "mnist"], DataConfig("mnist", holdout=0.25)),
        (["--data=mnist"], DataConfig("mnist", holdout=0.25)),
        (["--data", tmp_path], DataConfig("folder", tmp_path, holdout=0.25)),
    ):
        for words in ([saved, *given, "--seed", 1], ["--seed", 1, *given, saved], [*given, saved]):
            assert options_of("evaluate", *words).data == expected


def test_help_shows_the_defaults_of_the_preset_in_any_order(flowback):
    before, after = (flowback("train", *words)[1] for words in (["--help", "digits"], ["digits", "--help"]))
    assert before == after
    assert "--train.steps INT" in before
    assert "(default: 1200)" in before


def test_errors_of_the_first_reading_explain_the_option(flowback):
    code, _, err = flowback("train", "--model.width", "32", "--train.steps", "abc", "digits")
    assert code == 2
    assert "--train.steps" in err
    assert "Optimiser steps." in err
    assert "head-dim" not in err


def test_guidance_ranges():
    assert guidance_scales("1.0:4.0:0.5") == (
        1,
        1.5,
        2,
        2.5,
        3,
        3.5,
        4,
    )
    assert guidance_scales("0:0.3:0.1") == (
        0,
        0.1,
        0.2,
        0.3,
    )
    assert guidance_scales("2") == (2,)
    for bad in ("a", "1:2", "2:1:0.5", "1:2:0", "1:2:-1", ""):
        with pytest.raises(InputError, match="FIRST:LAST:STEP"):
            guidance_scales(bad)
