from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from flowback import AlignmentConfig, DataConfig, InputError, ModelConfig, RunConfig, TrainConfig
from flowback.checked import from_dict, to_dict
from flowback.task_config import EvaluateConfig, ProbeConfig, SampleConfig

UNUSUAL = RunConfig(
    model=ModelConfig(image_size=32, patch_size=2, width=192, num_classes=7, position="rope", mlp="swiglu"),
    data=DataConfig(path=Path("some/folder"), flip=True, bad_images="skip"),
    alignment=AlignmentConfig(strategy="reverse", order="exact", locations=((1, 2), (8, 8))),
    train=TrainConfig(steps=12, betas=(0.8, 0.9), grad_clip=1.5, precision="bf16"),
)


@pytest.mark.parametrize("config", [RunConfig(), UNUSUAL])
def test_a_config_survives_json(config):
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_values_given_lie_over_the_default():
    changed = from_dict(RunConfig, {"model": {"width": 384}, "train": {"lr": 1}}, default=UNUSUAL)
    assert changed.model.width == 384
    assert changed.model.position == "rope"
    assert changed.train.lr == 1.0
    assert isinstance(changed.train.lr, float)
    assert changed.data == UNUSUAL.data


def test_configs_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        RunConfig().model.width = 3


def test_sizes_follow_from_the_settings():
    model = ModelConfig(image_size=64, channels=3, patch_size=4)
    assert (model.grid, model.tokens, model.token_dim, model.dims) == (16, 256, 48, 64 * 64 * 3)


def test_a_path_alone_means_a_folder_of_images():
    assert RunConfig(data=DataConfig(path=Path("photos"))).data.name == "folder"
    assert RunConfig(data=DataConfig(path=Path("sets"), name="mnist")).data.name == "mnist"


@pytest.mark.parametrize(
    ("kind", "values", "sentence"),
    [
        (
            ModelConfig,
            {"image_size": 30},
            "--model.image-size 30 is not divisible by --model.patch-size 4; choose",
        ),
        (ModelConfig, {"width": 100}, "--model.width 100 is not divisible by --model.head-dim 64; choose"),
        (
            ModelConfig,
            {"position": "rope", "head_dim": 6, "width": 12},
            "--model.head-dim 6 must be a multiple of 4 for --model.position rope.",
        ),
        (ModelConfig, {"blocks": 0}, "--model.blocks must be at least 1."),
        (ModelConfig, {"mlp_ratio": 0}, "--model.mlp-ratio must be at least 1."),
        (ModelConfig, {"num_classes": -1}, "--model.num-classes must not be negative."),
        (ModelConfig, {"noise_std": -0.1}, "--model.noise-std must not be negative."),
        (
            ModelConfig,
            {"noise_std": math.nan},
            "Option model.noise_std is NaN, which is not a finite",
        ),
        (DataConfig, {"holdout": 1.0}, "--data.holdout must be in [0, 1)"),
        (DataConfig, {"workers": -1}, "--data.workers must not be negative."),
        (
            AlignmentConfig,
            {"weight": -1.0},
            "--alignment.weight -1.0 must not be negative; 0 switches it off.",
        ),
        (
            AlignmentConfig,
            {"weight": math.inf},
            "Option alignment.weight is Infinity, which is not a",
        ),
        (AlignmentConfig, {"order": -1}, "--alignment.order -1 must be 0, 1, 2, ... or exact."),
        (AlignmentConfig, {"tolerance": 0.0}, "--alignment.tolerance must be above 0."),
        (AlignmentConfig, {"hidden": 0}, "--alignment.hidden must be at least 1."),
        (AlignmentConfig, {"levels": (0.2, 0.1)}, "--alignment.levels (0.2, 0.1) must rise from at least 0"),
        (AlignmentConfig, {"levels": (-0.1, 0.1)}, "must rise from at least 0"),
        (AlignmentConfig, {"stop_at": 0}, "--alignment.stop-at must be at least 1."),
        (AlignmentConfig, {"decay": "cosine"}, "--alignment.decay cosine needs --alignment.stop-at"),
        (AlignmentConfig, {"stop_below": -2.0}, "--alignment.stop-below must be in [-1, 1]"),
        (AlignmentConfig, {"spatial_norm": 1.5}, "--alignment.spatial-norm must be in [0, 1]"),
        (AlignmentConfig, {"grid": 0}, "--alignment.grid must be at least 1."),
        (AlignmentConfig, {"originals": True, "originals_path": Path("x")}, "a prepared set; give one."),
        (
            AlignmentConfig,
            {"locations": ((1, 1), (1, 1))},
            "repeats a location: ((1, 1), (1, 1)); give each once",
        ),
        (AlignmentConfig, {"strategy": "reverse", "locations": ()}, "--alignment.locations is empty; give"),
        (TrainConfig, {"steps": 0}, "--train.steps must be at least 1."),
        (TrainConfig, {"batch_size": -4}, "--train.batch-size must be at least 1."),
        (TrainConfig, {"sample_every": -1}, "--train.sample-every must not be negative; 0 draws none."),
        (TrainConfig, {"micro_batch": 0}, "--train.micro-batch must be at least 1."),
        (TrainConfig, {"lr": 0.0}, "--train.lr must be above 0"),
        (TrainConfig, {"lr": math.nan}, "Option train.lr is NaN, which is not a finite"),
        (
            TrainConfig,
            {"timeout": math.inf},
            "Option train.timeout is Infinity, which is not a",
        ),
        (
            TrainConfig,
            {"lr": 1e-4, "min_lr": 1e-3},
            "--train.min-lr 0.001 is above --train.lr 0.0001",
        ),
        (TrainConfig, {"betas": (0.9, 1.0)}, "--train.betas must both be in [0, 1)."),
        (TrainConfig, {"betas": (-0.1, 0.9)}, "--train.betas must both be in [0, 1)."),
        (
            TrainConfig,
            {"betas": (math.nan, 0.9)},
            "Option train.betas is [NaN, 0.9], which is not [a",
        ),
        (TrainConfig, {"weight_decay": -1.0}, "--train.weight-decay must not be negative."),
        (TrainConfig, {"seed": -1}, "--train.seed must be in [0, 2^63)."),
        (TrainConfig, {"seed": 2**63}, "--train.seed must be in [0, 2^63)."),
        (SampleConfig, {"guidance": math.nan}, "Option guidance is NaN, which is not a finite"),
        (SampleConfig, {"attention_temperature": 0.0}, "--attention-temperature must be above 0."),
        (SampleConfig, {"guided_blocks": -1}, "--guided-blocks must not be negative."),
        (EvaluateConfig, {"search": (0.0, math.inf)}, "Option search is [0.0, Infinity], which is not"),
        (EvaluateConfig, {"seed": -1}, "--seed -1 is out of range; it goes from 0 to 4294966272."),
        (EvaluateConfig, {"seed": 2**32 - 1}, "--seed 4294967295 is out of range"),
        (ProbeConfig, {"seed": -1}, "--seed -1 is out of range; it goes from 0 to 4294967295."),
        (TrainConfig, {"warmup_steps": -1}, "--train.warmup-steps must not be negative."),
        (TrainConfig, {"ema_decay": 1.0}, "--train.ema-decay must be in [0, 1)."),
        (TrainConfig, {"label_drop": 1.5}, "--train.label-drop must be in [0, 1]."),
        (TrainConfig, {"grad_clip": 0.0}, "--train.grad-clip must be above 0."),
    ],
)
def test_a_bad_value_is_refused_with_its_option(kind, values, sentence):
    with pytest.raises(InputError) as caught:
        kind(**values)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "value", "meant"),
    [
        (AlignmentConfig, "strategy", "Reverse", "did you mean reverse"),
        (AlignmentConfig, "strategy", "revers", "did you mean reverse or reverse-literal?"),
        (AlignmentConfig, "order", "Exact", "did you mean exact?"),
        (ModelConfig, "noise", "gausian", "did you mean gaussian?"),
        (ModelConfig, "mlp", "swigl", "did you mean swiglu?"),
        (ModelConfig, "position", "rop", "did you mean rope?"),
        (TrainConfig, "precision", "fp16", "which is not fp32 or bf16"),
        (SampleConfig, "formula", "star", "did you mean starflow or tarflow?"),
    ],
)
def test_a_misspelled_choice_never_trains_something_else(kind, name, value, meant):
    with pytest.raises(InputError) as caught:
        kind(**{name: value})
    assert meant in str(caught.value)


def test_values_are_brought_to_the_type_of_their_field():
    """As YAML (1e-3 is text there), JSON and people write them."""
    config = AlignmentConfig(locations=[[1, 1]], originals_path="larger", order="2")
    assert config.locations == ((1, 1),)
    assert config.originals_path == Path("larger")
    assert config.order == 2
    assert TrainConfig(lr="1e-3").lr == 1e-3
    assert from_dict(RunConfig, {"train": {"lr": "1e-3"}}).train.lr == 1e-3


@pytest.mark.parametrize("location", [(9, 1), (0, 1), (8, 9), (1, 0)])
def test_an_alignment_location_outside_the_model_is_refused(location):
    alignment = AlignmentConfig(strategy="detach", locations=(location,))
    with pytest.raises(InputError) as caught:
        RunConfig(alignment=alignment)
    assert f"--alignment.locations: ({location[0]}, {location[1]}) is outside the model" in str(caught.value)
    assert "blocks go from 1 to 8, layers from 1 to 8" in str(caught.value)
    RunConfig(alignment=AlignmentConfig(locations=(location,)))  # nothing is aligned: nothing to refuse


def test_layers_are_one_number_or_one_a_block():
    config = from_dict(ModelConfig, {"blocks": 4, "layers": [4, 4, 4, 24]})  # as in YAML and JSON
    assert config.layers == config.depths == (4, 4, 4, 24)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert ModelConfig(blocks=3, layers=2).depths == (2, 2, 2)
    assert ModelConfig(blocks=3, layers=(2, 2, 2)) == ModelConfig(blocks=3, layers=2)
    assert to_dict(ModelConfig())["layers"] == 8
    assert ModelConfig(blocks=2, layers=(1, 2)).locations == [(1, 1), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (
            (4, 4, 24),
            "--model.layers 4,4,24 names 3 blocks, and --model.blocks is 4; give one number for all",
        ),
        ((), "names 0 blocks, and --model.blocks is 4"),
        ((4, 4, 0, 24), "--model.layers must be at least 1."),
        ((4, 4, 4, 2**11), "--model.layers is 2.05e+03, and flowback takes at most 1024."),
        ((2**10, 2**10, 2**10, 2**10 - 1, 2**10), "names 5 blocks"),
        ("4,4", 'Option model.layers is "4,4", which is not int or a list of int.'),
    ],
)
def test_layers_that_do_not_fit_the_blocks(layers, sentence):
    with pytest.raises(InputError) as caught:
        ModelConfig(blocks=4, layers=layers)
    assert sentence in str(caught.value)


def test_places_in_uneven_blocks():
    model = ModelConfig(blocks=4, layers=(4, 4, 4, 24))
    for place, inside in (((4, 24), True), ((3, 5), False), ((4, 25), False)):
        alignment = AlignmentConfig(strategy="detach", locations=(place,))
        if inside:
            RunConfig(model, alignment=alignment)
            continue
        with pytest.raises(InputError, match="blocks go from 1 to 4, and have 4, 4, 4, 24 layers"):
            RunConfig(model, alignment=alignment)


def test_a_bound_is_positive():
    with pytest.raises(InputError, match=r"--model\.log-scale-bound must be above 0"):
        ModelConfig(log_scale_bound=0.0)


def test_aligned_levels_are_some_of_the_flows():
    alignment = AlignmentConfig(strategy="detach", levels=(0.3, 0.5))
    with pytest.raises(
        InputError, match=r"--alignment\.levels 0\.3 0\.5 needs .*--model\.noise range; leave"
    ):
        RunConfig(alignment=alignment)
    with pytest.raises(InputError, match=r"holds none of the flow's noise levels, 0\.01 to 0\.3; choose"):
        RunConfig(ModelConfig(noise="range"), alignment=alignment)
    with pytest.raises(InputError, match="holds none"):
        RunConfig(ModelConfig(noise="range", noise_min=0.5, noise_max=0.6), alignment=alignment)
    RunConfig(ModelConfig(noise="range", noise_max=0.31), alignment=alignment)
    RunConfig(alignment=AlignmentConfig(levels=(0.3, 0.5)))  # nothing is aligned: nothing to refuse


def test_a_trigger_needs_looks():
    alignment = AlignmentConfig(strategy="detach", stop_below=0.0)
    with pytest.raises(InputError, match=r"--alignment\.stop-below needs --train\.diagnose-every"):
        RunConfig(alignment=alignment)
    RunConfig(alignment=alignment, train=TrainConfig(diagnose_every=10))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model": {"widht": 3}}, "Unknown option model.widht; did you mean width"),
        ({"modle": {}}, "Unknown option modle; did you mean model"),
        ({"train": {"xyzzy": 3}}, "Unknown option train.xyzzy; known: "),
        ({"model": 3}, "model must be a mapping of options, not 3."),
        ({"model": {"width": "wide"}}, 'Option model.width is "wide", which is not int'),
        ({"model": {"width": True}}, "Option model.width is true, which is not int"),
        ({"model": {"width": 3.5}}, "Option model.width is 3.5, which is not int"),
        ({"train": {"lr": "fast"}}, 'Option train.lr is "fast", which is not a finite number'),
        ({"train": {"betas": [0.9]}}, "Option train.betas is [0.9], which is not"),
        ({"model": {"mlp": "relu"}}, 'Option model.mlp is "relu", which is not gelu or swiglu'),
        ({"alignment": {"order": "all"}}, 'Option alignment.order is "all", which is not int or exact.'),
        (
            {"train": {"grad_clip": "yes"}},
            'Option train.grad_clip is "yes", which is not a finite number or',
        ),
        (
            {"alignment": {"locations": [[1, 2, 3]]}},
            "Option alignment.locations is [[1, 2, 3]], which is not a list of [int, int].",
        ),
        (
            {"alignment": {"locations": 3}},
            "Option alignment.locations is 3, which is not a list of [int, int].",
        ),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(values, sentence):
    with pytest.raises(InputError) as caught:
        from_dict(RunConfig, values)
    assert sentence in str(caught.value)
