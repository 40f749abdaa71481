"""Placement: slices where the samples are together, the same entries by index where they are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from piadm.placement import Placement, pick

STARTS = {"together": ([2, 2, 2], [6, 6, 6]), "apart": ([2, 3, 5], [6, 6, 7]), "one cut short": ([2, 2, 2], [6, 4, 6])}


@pytest.fixture(params=STARTS.values(), ids=list(STARTS))
def placed(request):
    start, stop = (torch.tensor(steps) for steps in request.param)
    return Placement(start, stop, int((stop - start).max()))


def test_a_lane_is_a_step_of_each_sample(placed):
    assert placed.together == (len(set(placed.starts)) == len(set(placed.stops)) == 1)
    values = np.stack([10.0 * np.arange(9), 10.0 * np.arange(9) + 1], axis=1)
    by_lane = np.broadcast_to(placed.of_step(values), (placed.count, 2, 3))
    for lane in range(placed.count):
        for sample, (start, stop) in enumerate(zip(placed.starts, placed.stops, strict=True)):
            assert bool(placed.valid[lane, sample]) == (start + lane < stop)
            assert placed.steps[lane, sample] == start + lane
            if start + lane < stop:
                assert by_lane[lane, :, sample].tolist() == [10 * (start + lane), 10 * (start + lane) + 1]


def test_rows_and_lanes_are_two_orders_of_the_same_numbers(placed):
    rows = torch.arange(1.0, 1 + int(placed.valid.sum()))[:, None].expand(-1, 2)
    dense = placed.dense(rows)
    assert torch.equal(dense[placed.valid], rows)
    assert bool((dense[~placed.valid] == 0).all())
    by_step = placed.by_step(dense[..., 0])
    assert by_step.shape == (placed.high - placed.low, 3)
    for lane, sample in placed.valid.nonzero().tolist():
        assert by_step[placed.starts[sample] + lane - placed.low, sample] == dense[lane, sample, 0]
    assert int(by_step.isfinite().sum()) == len(rows)


@pytest.mark.parametrize("first", [[1, 1], [0, 2], [3, 3], [4, 0], [9, 9]])
@pytest.mark.parametrize("last", [None, [3, 3], [1, 3]])
@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_picked_rows_are_the_samples_own_with_the_last_one_again_beyond_it(first, last, count):
    values = torch.arange(5 * 2 * 3.0).reshape(5, 1, 2, 3)
    found = pick(values, first, count, last)
    assert found.shape == (count, 1, 2, 3)
    for row in range(count):
        for sample in range(2):
            end = 4 if last is None else last[sample]
            assert torch.equal(found[row, 0, sample], values[min(first[sample] + row, end), 0, sample])
