"""The step that CUDA graphs repeat, with functions in place of graphs: all but the recording runs here."""

import pytest
import torch

from flowback.sampling import cuda_graph
from flowback.sampling.decoder import Engine, sequential
from flowback.sampling.guidance import Guidance
from sampling.flows import labels_of, noise_of, tame_flow
from sampling.test_decoder import KINDS


@pytest.fixture
def recorded(monkeypatch):
    """What was recorded; repeating it runs it again, into the same tensors as a graph does."""
    runs = []

    def record(run):
        runs.append(run)
        kept = tuple(result.clone() for result in run())

        def repeat():
            for old, new in zip(kept, run(), strict=True):
                old.copy_(new)
            return kept

        return repeat

    monkeypatch.setattr("flowback.sampling.decoder.captures", lambda _: True)
    monkeypatch.setattr(cuda_graph, "cuda_graph", record)
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_are_the_inverse(kind, recorded):
    """Two batches through the same graphs, with other labels; to 1e-12, the same sums in another order."""
    flow, batch = tame_flow(**KINDS[kind]), 3
    engine = Engine(flow, native=False)
    for shift in (0, 1):
        z = noise_of(flow, batch)
        labels = labels_of(flow, batch)
        labels = None if labels is None else labels + shift
        for index, block in enumerate(flow.blocks, start=1):
            context = block.context(labels)
            found = sequential(engine.decoder(index, batch, context), block.reorder(z))
            expected = block.inverse(z, context)
            torch.testing.assert_close(block.reorder(found), expected, atol=1e-12, rtol=1e-12)
    assert len(recorded) == cuda_graph.PARTS * len(flow.blocks)


def test_both_streams_and_their_temperatures(recorded):
    flow, batch = tame_flow(), 2
    engine, block, z = Engine(flow, native=False), flow.blocks[0], noise_of(flow, 2)
    guidance = Guidance(1.0, ramp=True)
    guide = guidance.guide(guidance.scales(batch, z), flow.config.tokens)
    context = torch.cat([block.context(labels_of(flow, batch)), block.context(None).expand(batch, -1)])
    for tau in (1.5, 0.7):
        temperature = torch.tensor([1.0, 1.0, tau, tau], dtype=torch.float64)
        found = sequential(engine.decoder(1, batch, context, guide, temperature), z)
        expected = block.inverse(z, context, guide, temperature.view(-1, 1, 1, 1))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert len(recorded) == cuda_graph.PARTS


def test_a_batch_with_broken_values_leaves_nothing_behind(recorded):
    """Keys of not-a-number, masked as they may be, would spoil the next batch's sums."""
    flow, batch = tame_flow(), 2
    engine, block, z = Engine(flow, native=False), flow.blocks[0], noise_of(flow, 2)
    context = block.context(labels_of(flow, batch))
    sequential(engine.decoder(1, batch, context), torch.full_like(z, torch.nan))
    found = sequential(engine.decoder(1, batch, context), z)
    torch.testing.assert_close(found, block.inverse(z, context), atol=1e-12, rtol=1e-12)


def test_another_number_of_rows_takes_other_graphs(recorded):
    flow = tame_flow()
    engine, block = Engine(flow, native=False), flow.blocks[0]
    for batch in (3, 2, 2):
        z, context = noise_of(flow, batch), block.context(labels_of(flow, batch))
        found = sequential(engine.decoder(1, batch, context), z)
        torch.testing.assert_close(found, block.inverse(z, context), atol=1e-12, rtol=1e-12)
    assert len(recorded) == 2 * cuda_graph.PARTS


def test_nothing_is_captured_but_on_cuda(monkeypatch):
    assert not cuda_graph.captures(torch.device("cpu"))
    assert cuda_graph.captures(torch.device("cuda"))
    monkeypatch.setenv("FLOWBACK_CUDA_GRAPHS", "0")
    assert not cuda_graph.captures(torch.device("cuda"))


def test_where_recording_fails_the_step_runs_as_it_is(monkeypatch, caplog):
    def broken():
        raise RuntimeError("no stream\nat all")

    monkeypatch.setattr(torch.cuda, "Stream", broken)
    run = lambda: (torch.ones(1), torch.zeros(1))  # noqa: E731
    assert cuda_graph.cuda_graph(run) is run
    assert "Decoding without CUDA graphs: no stream" in caplog.text
