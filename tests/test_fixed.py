"""Calls of one shape: the same sample, and one compilation a run."""

import pytest
import torch

import piadm

LINEAR = piadm.schedules.DiscreteBetas.linear(1000)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Recording(piadm.Wrapper):
    def __init__(self, denoiser):
        super().__init__(denoiser)
        self.rows = []

    def __call__(self, x, t, **condition):
        self.rows.append(len(x))
        assert all(len(value) in (1, len(x)) for value in condition.values())
        return self.denoiser(x, t, **condition)


@pytest.mark.parametrize("size", [1, 7, 24, 100])
def test_every_call_has_the_size_and_the_sample_is_the_same(size):
    means = torch.randn(5, 16, generator=generator(), dtype=torch.float64)
    plain = piadm.targets.GaussianMixture(means, 0.1, schedule=LINEAR)
    noise = torch.randn(3, 16, generator=generator(), dtype=torch.float64)
    recording = Recording(plain)
    results = [
        piadm.Parallel(one, piadm.DDPM(30), window=8)((3, 16), generator=generator(), noise=noise)
        for one in (plain, piadm.FixedBatch(recording, size))
    ]
    assert set(recording.rows) == {size}
    assert results[0].rounds == results[1].rounds
    torch.testing.assert_close(results[1].samples, results[0].samples, rtol=1e-10, atol=1e-10)


def test_conditions_go_with_their_rows():
    digits = piadm.models.load("digits")
    label = torch.tensor([1, 7])
    one, other = (
        piadm.Parallel(each, piadm.DDIM(12), window=5)((2, 1, 8, 8), generator=generator(), label=label).samples
        for each in (digits, piadm.FixedBatch(digits, 4))
    )
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fixed", [True, False])
def test_a_compiled_network_is_compiled_once(fixed):
    compiled = []

    def backend(graph, inputs):
        compiled.append(tuple(inputs[0].shape))
        return graph.forward

    torch._dynamo.reset()
    network = torch.compile(lambda x, t: torch.tanh(x) * 0.5, backend=backend, dynamic=False)
    denoiser = piadm.Denoiser(network, LINEAR, "sample", event_shape=(4,))
    result = piadm.Parallel(piadm.FixedBatch(denoiser, 8) if fixed else denoiser, piadm.DDPM(24), window=8)(
        (1, 4), generator=generator()
    )
    assert result.converged
    assert (len(compiled) == 1) == fixed  # without it, the last windows have shapes of their own


def test_a_wrong_size_is_said():
    with pytest.raises(ValueError, match="size"):
        piadm.FixedBatch(piadm.targets.Gaussian(0.0, 1.0, schedule=LINEAR), 0)
