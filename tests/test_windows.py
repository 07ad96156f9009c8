"""Exact windows, and the reference's chunks against a simulation, for every length up to LONGEST."""

from __future__ import annotations

import pytest
from helpers import assert_one_line

from samekit.errors import InputError
from samekit.windows import ExactWindows, Window, reference_chunks

LONGEST = 200

# Size, context, alignment: the smallest that work, round ones, and those of the published models.
PLANS = [
    (1, 0, 1),
    (3, 1, 1),
    (9, 4, 1),
    (25, 12, 1),
    (64, 12, 1),
    (2, 0, 2),
    (4, 1, 2),
    (6, 2, 2),
    (8, 3, 2),
    (64, 1, 2),
    (64, 2, 2),
    (66, 3, 2),
    (4, 0, 4),
    (8, 2, 4),
    (12, 3, 4),
    (64, 3, 4),
    (12, 1, 6),
]
each_plan = pytest.mark.parametrize(
    "plan", [ExactWindows(*plan) for plan in PLANS], ids=lambda plan: f"{plan.size}-{plan.context}-{plan.alignment}"
)


@each_plan
def test_cores_tile_the_sequence(plan):
    for latents in range(LONGEST + 1):
        kept = [
            window.start + position
            for window in plan.over(latents)
            for position in range(window.stop - window.start)[window.core]
        ]
        assert kept == list(range(latents))


@each_plan
def test_windows_are_aligned_and_of_one_size(plan):
    for latents in range(1, LONGEST + 1):
        *inner, last = plan.over(latents)
        assert all(window.start % plan.alignment == 0 for window in [*inner, last])
        assert all(window.stop - window.start == plan.size for window in inner)
        assert all(window.stop % plan.alignment == 0 for window in inner)
        assert last.stop - last.start <= plan.size
        assert last.stop == latents


@each_plan
def test_kept_latents_see_their_context(plan):
    for latents in range(1, LONGEST + 1):
        for window in plan.over(latents):
            assert window.start <= max(0, window.core_start - plan.context)
            assert window.stop >= min(latents, window.core_stop + plan.context)


@each_plan
def test_no_window_is_wasted(plan):
    for latents in range(1, LONGEST + 1):
        windows = list(plan.over(latents))
        assert all(window.core_stop > window.core_start for window in windows)
        # There is a further window only for latents that the windows so far do not cover.
        assert len(windows) == 1 + max(0, -(-(latents - plan.size) // plan.step))


@each_plan
@pytest.mark.parametrize("piece", [1, 7])
def test_windows_of_a_growing_sequence_are_the_same(plan, piece):
    for latents in range(1, LONGEST + 1):
        windows = []
        for available in [*range(0, latents, piece), latents]:
            while (window := plan.next(len(windows), available, final=False)) is not None:
                assert window.stop <= available
                windows.append(window)
        while (window := plan.next(len(windows), latents, final=True)) is not None:
            windows.append(window)
        assert windows == list(plan.over(latents))


@each_plan
def test_a_window_is_given_as_soon_as_it_is_settled(plan):
    settled = Window(0, plan.size, 0, plan.step + plan.context)
    assert plan.next(0, plan.size, final=False) is None
    assert plan.next(0, plan.size + 1, final=False) == settled


@pytest.mark.parametrize("alignment", [1, 2, 3, 4])
@pytest.mark.parametrize("context", range(6))
def test_sizes_without_a_core_are_refused(context, alignment):
    works = [
        size
        for size in range(40)
        if size % alignment == 0 and (size - 2 * context) // alignment * alignment >= alignment
    ]
    for size in range(-2, 40):
        if size in works:
            assert ExactWindows(size, context, alignment).size == size
        else:
            with pytest.raises(InputError, match=f"pass a multiple of {alignment} from {works[0]}$") as caught:
                ExactWindows(size, context, alignment)
            assert_one_line(caught.value)


def simulate(latents, chunk_size, overlap):
    """Return (start of the chunk, position in it) for each latent, by copying chunk after chunk as the reference."""
    if latents <= chunk_size:
        return [(0, position) for position in range(latents)]
    starts = []
    start = 0
    while start + chunk_size <= latents:
        starts.append(start)
        start += chunk_size - overlap
    if starts[-1] != latents - chunk_size:
        starts.append(latents - chunk_size)
    result = [None] * latents
    for start in starts:
        left = 0 if start == starts[0] else overlap // 2
        right = 0 if start == starts[-1] else overlap // 2
        for position in range(left, chunk_size - right):
            result[start + position] = (start, position)
    return result


@pytest.mark.parametrize(
    ("chunk_size", "overlap"),
    [(1, 0), (2, 0), (2, 1), (5, 2), (5, 3), (5, 4), (8, 4), (8, 7), (16, 0), (16, 5), (128, 32)],
)
def test_reference_chunks(chunk_size, overlap):
    for latents in range(1, LONGEST + 1):
        chunks = reference_chunks(latents, chunk_size, overlap)
        kept = [(chunk.start, position) for chunk in chunks for position in range(chunk.stop - chunk.start)[chunk.core]]
        assert kept == simulate(latents, chunk_size, overlap)
        assert all(0 <= chunk.start < chunk.stop <= latents for chunk in chunks)


@pytest.mark.parametrize(
    ("chunk_size", "overlap"), [(0, 0), (-1, -2), (8, 8), (8, 9), (8, -1), (8, 2.0), (8.5, 2), ("8", 2), (8, None)]
)
def test_chunks_without_a_step_are_refused(chunk_size, overlap):
    with pytest.raises(InputError, match=r"pass (0 <= overlap < chunk_size|a whole number from)") as caught:
        reference_chunks(100, chunk_size, overlap)
    assert_one_line(caught.value)
