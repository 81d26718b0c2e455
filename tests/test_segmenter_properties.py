"Properties that hold for any input, tried on drawn examples."
import tempfile
from pathlib import Path

import numpy as np, pytest
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import label

from crackxai.core import read_csv, write_csv
from crackxai.data.surface import dihedral, tile_corners
from crackxai.metrics import pixel_counts, scores
from crackxai.morphology import THRESHOLDS, clean, close, open_area, to_mask
from crackxai.pipeline import Segmenter, blend_weights, overlay
from crackxai.severity import severity

sides = st.integers(1, 40)
masks = hnp.arrays(bool, st.tuples(sides, sides), elements=st.booleans())
sparse = st.builds(lambda shape, seed, share: np.random.default_rng(seed).random(shape) < share, st.tuples(sides, sides), st.integers(0, 2**32 - 1), st.floats(0, 1))
any_mask = masks | sparse
maps = st.builds(lambda n, seed, power: np.random.default_rng(seed).normal(size=(n, n)).round(2)**power, st.integers(3, 40), st.integers(0, 2**32 - 1), st.sampled_from([1, 3]))


@given(any_mask, st.sampled_from([3, 5, 9, 25]))
def test_closing_only_adds_and_a_second_one_adds_nothing(mask, size):
    once = close(mask, size)
    assert once.shape == mask.shape and (once >= mask).all() and (close(once, size) == once).all()


@given(any_mask, st.sampled_from([3, 5, 9]))
def test_closing_grows_with_the_mask(mask, size):
    part = mask & (np.indices(mask.shape).sum(0) % 3 > 0)
    assert (close(part, size) <= close(mask, size)).all()


@given(any_mask, st.integers(1, 60))
def test_area_opening_keeps_exactly_the_components_that_are_large_enough(mask, least):
    parts = label(mask, connectivity=2)
    want = np.zeros_like(mask)
    for k in range(1, parts.max() + 1): want |= (parts == k) if (parts == k).sum() >= least else False
    assert (open_area(mask, least) == want).all()


@given(any_mask)
def test_cleaning_leaves_no_small_component_and_the_same_shape(mask):
    cleaned = clean(mask)
    assert cleaned.shape == mask.shape and (open_area(cleaned, 50) == cleaned).all()


@given(maps, st.integers(0, 7))
def test_the_simple_threshold_turns_and_flips_with_the_map(values, k):
    import torch
    turn = lambda a: dihedral(torch.from_numpy(np.array(a)), k).numpy()
    assert (to_mask(turn(values), 'simple', morphology=False) == turn(to_mask(values, 'simple', morphology=False))).all()


@given(maps, st.sampled_from([(0,), (1,), (0, 1)]))
def test_the_cleaned_mask_flips_with_the_map(values, axes):
    "Quarter turns are not promised: OpenCV's ellipse is wider than it is high at its ends."
    assert (to_mask(np.flip(values, axes), 'simple') == np.flip(to_mask(values, 'simple'), axes)).all()


@given(maps, st.floats(.5, 20), st.sampled_from(sorted(THRESHOLDS)))
def test_a_mask_covers_at_most_half_and_does_not_depend_on_the_scale(values, factor, threshold):
    mask = THRESHOLDS[threshold](values)
    assert mask.shape == values.shape and mask.mean() <= .5
    if threshold == 'simple': assert (THRESHOLDS[threshold](values*2.**round(factor)) == mask).all()


@given(st.integers(1, 30).flatmap(lambda n: hnp.arrays(bool, (2, n, n))))
def test_pixel_counts_and_scores_hang_together(pair):
    predicted, truth = pair
    counts = pixel_counts(predicted, truth)
    tp, fp, fn, tn = counts
    assert counts.sum() == truth.size and tp + fn == truth.sum() and tp + fp == predicted.sum()
    assert (pixel_counts(~predicted, ~truth) == [tn, fn, fp, tp]).all() and (pixel_counts(truth, predicted) == [tp, fn, fp, tn]).all()
    assume(tp + fp + fn > 0)
    s, swapped = scores(counts), scores(pixel_counts(truth, predicted))
    assert s['f1'] == pytest.approx(2*s['iou']/(1 + s['iou'])) and 0 <= s['iou'] <= s['f1'] <= 1
    assert np.array_equal([s['precision'], s['recall'], s['f1']], [swapped['recall'], swapped['precision'], swapped['f1']], equal_nan=True)
    if tp: assert s['f1'] == pytest.approx(2/(1/s['precision'] + 1/s['recall']))


@given(st.lists(hnp.arrays(bool, (2, 6, 6)), min_size=1, max_size=4))
def test_scores_of_many_images_are_those_of_one_large_image(pairs):
    pairs = np.stack(pairs)
    one = pixel_counts(pairs[:, 0].reshape(-1, 6), pairs[:, 1].reshape(-1, 6))
    assert np.array_equal(pixel_counts(pairs[:, 0], pairs[:, 1]).sum(0), one)


texts = st.text(st.characters(exclude_categories=['Cs']), max_size=12)
rows = st.lists(st.fixed_dictionaries(dict(file=texts, note=texts, count=st.integers(-2**60, 2**60), share=st.floats(allow_nan=False, allow_infinity=False), gone=st.none())), min_size=1, max_size=5)


@given(rows)
def test_a_table_that_is_written_is_read_again(rows):
    with tempfile.TemporaryDirectory() as folder:
        write_csv(Path(folder)/'t.csv', rows)
        again = read_csv(Path(folder)/'t.csv')
    assert len(again) == len(rows)
    for got, row in zip(again, rows):
        assert (got['file'], got['note'], int(got['count']), got['gone']) == (row['file'], row['note'], row['count'], '')
        assert float(got['share']) == pytest.approx(row['share'], rel=1e-5, abs=1e-300)


@given(st.integers(1, 64))
def test_blend_weights_of_half_overlapping_tiles_add_up_to_one(half):
    w = blend_weights(2*half)
    assert w.min() > 0 and np.allclose(w, w[::-1]) and np.allclose(w, w.T)
    assert np.allclose(w[:half, :half] + w[half:, :half] + w[:half, half:] + w[half:, half:], 1)


@given(st.integers(1, 500), st.integers(1, 130), st.integers(1, 130))
def test_tiles_cover_every_pixel_and_stay_inside(length, size, stride):
    stride = min(stride, size)
    corners = tile_corners(length, size, stride)
    covered = np.zeros(max(length, size), bool)
    for c in corners: covered[c:c + size] = True
    assert covered.all() and corners == sorted(set(corners)) and corners[-1] + size <= max(length, size)


@given(any_mask, st.floats(.01, 10))
def test_severity_counts_what_is_there(mask, scale):
    s = severity(mask, scale, min_area=1)
    assert s.area_px == mask.sum() and s.cracks == label(mask, connectivity=2).max() and (s.max_width_px is None) == (not mask.any())
    assert s.area_mm2 == pytest.approx(s.area_px*scale**2) and s.length_mm == pytest.approx(s.length_px*scale)
    if mask.any(): assert 0 < s.max_width_px <= max(mask.shape) + 1


@given(any_mask)
def test_the_overlay_changes_only_masked_pixels(mask):
    image = np.full((3, *mask.shape), .5, np.float32)
    changed = (overlay(image, mask) != overlay(image, np.zeros_like(mask))).any(2)
    assert (changed == mask).all()


@pytest.fixture(scope='module')
def segmenter(tiny_weights): return Segmenter.load(tiny_weights.cracked, method='input_x_gradient')


@settings(max_examples=8)
@given(st.integers(20, 200), st.integers(20, 200), st.integers(0, 99))
def test_the_result_has_the_shape_of_the_image(segmenter, h, w, seed):
    s = segmenter(np.random.default_rng(seed).random((3, h, w), np.float32))
    assert s.mask.shape == s.attribution.shape == (h, w) and s.mask.dtype == bool
    assert np.isfinite(s.attribution).all() and 0 <= s.probability <= 1 and s.severity.area_px <= s.mask.sum()
    assert s.probability == max(t['probability'] for t in s.tiles)


@settings(max_examples=4)
@given(st.integers(20, 130), st.integers(0, 99))
def test_the_same_image_gives_the_same_result_in_any_batch(tiny_weights, segmenter, side, seed):
    image = np.random.default_rng(seed).random((3, side, 170), np.float32)
    a, b = segmenter(image), Segmenter.load(tiny_weights.cracked, method='input_x_gradient', batch=1)(image)
    np.testing.assert_allclose(a.attribution, b.attribution, rtol=1e-3, atol=1e-5*np.abs(a.attribution).max())
    assert a.tiles == [dict(t, probability=pytest.approx(t['probability'], abs=1e-6)) for t in b.tiles]
