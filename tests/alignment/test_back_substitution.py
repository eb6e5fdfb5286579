"""The compiled exact reverse gradient, against decoding under autograd; what it leaves to products."""

import pytest
import torch

from alignment.test_strategies import ALL, TWO, Case, assert_same, config
from flowback.alignment import back_substitution, strategies
from flowback.alignment.back_substitution import Encoding, recording
from reference import decode_with_autograd

pytestmark = pytest.mark.skipif(back_substitution.library() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever the machine has: the compiled code wants two images for each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def solved(monkeypatch):
    """The number of blocks that the compiled code solved."""
    calls = []

    def solve(self, *values):
        calls.append(self.block)
        return original(self, *values)

    original = Encoding.solve
    monkeypatch.setattr(Encoding, "solve", solve)
    return calls


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"classes": 0},
        {"layers": (1, 2, 1, 3), "batch": 5},
        {"log_scale_bound": 0.2},
        {"noise": "range"},
        {"head_dim": 8, "channels": 3},
        {"image_size": 12, "patch_size": 3, "width": 48, "mlp_ratio": 3},
    ],
    ids=str,
)
def test_equals_sequential_decoding_under_autograd(changes, solved):
    """Up to rounding, whatever the tolerance: the largest relative error seen is 6e-16 in one block."""
    case = Case(**{"batch": 4, **changes})
    locations = ((2, 2), (4, 3)) if "layers" in changes else ALL
    expected = case.expected(locations, decode_with_autograd)
    assert_same(case.both(config("reverse", locations, "exact", tolerance=0.5)), expected, relative=1e-12)
    assert len(solved) == 4 - min(block for block, _ in locations) + 1


def test_fp32_is_exact_to_rounding(solved):
    """The float kernel has its own exp and erf: within 1e-5 of float64."""
    exact, case = Case(batch=4), Case(batch=4, dtype=torch.float32)
    case.flow.load_state_dict(exact.flow.state_dict())
    case.projector.load_state_dict(exact.projector.state_dict())
    case.images, case.targets = exact.images.float(), exact.targets.float()
    expected = exact.expected(TWO, decode_with_autograd)
    found = {
        name: None if value is None else value.double()
        for name, value in case.both(config("reverse", TWO, "exact")).items()
    }
    assert solved
    assert_same(found, expected, relative=1e-5)


def test_one_thread_and_two_agree(solved):
    case = Case(batch=5)
    expected = case.both(config("reverse", TWO, "exact"))
    torch.set_num_threads(2)
    assert_same(case.both(config("reverse", TWO, "exact")), expected, relative=1e-12)
    assert len(solved) == 4


@pytest.mark.parametrize(
    "changes",
    [{"mlp": "swiglu"}, {"position": "rope"}, {"qk_norm": True}, {"width": 24, "head_dim": 8}],
    ids=str,
)
def test_other_blocks_are_solved_by_products(changes, solved):
    case = Case(batch=4, **changes)
    expected = case.expected(TWO, decode_with_autograd)
    assert_same(case.both(config("reverse", TWO, "exact")), expected)
    assert not solved


def test_few_images_are_solved_by_products(solved):
    case = Case(batch=1)
    assert_same(case.both(config("reverse", TWO, "exact")), case.expected(TWO, decode_with_autograd))
    assert not solved


@pytest.mark.parametrize("how", ["checkpointing", "autocast"])
def test_layers_that_are_called_in_other_ways(how, solved):
    case = Case(batch=4, dtype=torch.float32)
    for block in case.flow.blocks:
        block.body.checkpointing = how == "checkpointing"
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        case.both(config("reverse", TWO, "exact", tolerance=0.1))
    assert not solved


def test_compiled_bodies_get_no_hooks():
    """Dynamo would compile them again at every step."""
    block = Case(batch=4).flow.blocks[0]
    block.body.compile(backend="eager")
    with recording(block, 4) as encoding:
        assert encoding is None


def test_recording_leaves_no_hook():
    block = Case(batch=4).flow.blocks[0]
    with pytest.raises(KeyError), recording(block, 4):
        raise KeyError
    assert not any(module._forward_hooks for module in block.modules())


def test_products_are_counted(monkeypatch):
    """Without the compiled code, products do it; the control of the tests above."""
    monkeypatch.setattr(back_substitution, "library", lambda: None)
    calls = []

    def series(*arguments):
        calls.append(arguments)
        return strategies.truncated_series(arguments[0], arguments[1], 100, arguments[3])

    monkeypatch.setattr(strategies, "complete_series", series)
    case = Case(batch=4)
    assert_same(case.both(config("reverse", TWO, "exact")), case.expected(TWO, decode_with_autograd))
    assert len(calls) == 2
