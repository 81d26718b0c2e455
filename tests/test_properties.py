"Properties of coordinates, files and explanations on drawn examples, and random bytes through every reader: a result or an InputError, nothing else."
import io, tarfile, tempfile, warnings, zipfile
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from conftest import pixels
from crackxai.attribution import METHODS, attribute
from crackxai.core import InputError
from crackxai.data.dic import mm_to_pixel, pixel_to_mm, read_any, read_field
from crackxai.data.fetch import unpack
from crackxai.data.nodemap import NodeMap, read_nodemap, write_nodemap
from crackxai.data.surface import read_image, read_mask
from crackxai.data.wave import box, cells
from crackxai.data.waveset import read_waves
from crackxai.models.classify import load_weights, save_weights, vgg11_128
from crackxai.pipeline.growth import read_series, read_table
from crackxai.pipeline.tip import regions
from crackxai.training_wave import boxes_from_map, flip_boxes

seeds = st.integers(0, 2**32 - 1)


# coordinates

@given(st.tuples(st.integers(16, 300), st.integers(16, 300)), st.floats(1, 500), st.floats(0, 1), st.floats(0, 1), st.sampled_from(['right', 'left']))
def test_pixels_and_millimetres_are_there_and_back(shape, view, a, b, side):
    xy = np.array([a*(shape[1] - 1), b*(shape[0] - 1)])
    mm = pixel_to_mm(xy, shape, view, side)
    np.testing.assert_allclose(mm_to_pixel(mm, shape, view, side), xy, atol=1e-6)
    np.testing.assert_allclose(pixel_to_mm([xy[0], shape[0] - 1 - xy[1]], shape, view, side), mm*[1, -1], atol=1e-9)       # mirrored in y
    np.testing.assert_allclose(pixel_to_mm(xy, shape, view, 'left'), pixel_to_mm(xy, shape, view)*[-1, 1], atol=1e-9)      # the other half of the specimen


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.floats(0, 1, width=16)), st.sampled_from([(0,), (1,), (0, 1)]))
def test_the_places_of_a_map_flip_with_it(p, axes):
    places = lambda found: sorted((round(r['mass'], 6), round(r['mean'], 6), *r['at'].round(6)) for r in found)
    back = [dict(r, at=np.array([n - 1 - c if k in axes else c for k, (c, n) in enumerate(zip(r['at'], p.shape))])) for r in regions(np.flip(p, axes))]
    np.testing.assert_allclose(places(back), places(regions(p)), atol=2e-6)


@given(st.tuples(*[st.floats(.01, .99)]*4))
def test_the_box_of_a_crack_flips_with_it_and_holds_it(crack):
    x0, y0, x1, y1 = crack
    assume(abs(x1 - x0) + abs(y1 - y0) > .01)
    b = box(cells(crack))
    assert b[0] <= min(x0, x1) + 1e-6 and b[1] <= min(y0, y1) + 1e-6 and b[2] >= max(x0, x1) - 1e-6 and b[3] >= max(y0, y1) - 1e-6
    assert (flip_boxes(flip_boxes(b[None])) == pytest.approx(b[None]))
    np.testing.assert_allclose(box(cells(crack)[::-1]), flip_boxes(b[None])[0], atol=1e-6)


@given(hnp.arrays(np.float32, (16, 16), elements=st.floats(0, 1, width=16)), st.integers(1, 4))
def test_boxes_of_a_map_flip_with_it(p, least):
    a, b = boxes_from_map(p, .5, least)[0], boxes_from_map(p[::-1], .5, least)[0]
    assert sorted(map(tuple, flip_boxes(b).round(5))) == sorted(map(tuple, a.round(5))) and (a[:, :2] < a[:, 2:]).all()


# explanations

@settings(max_examples=6)
@given(seeds, st.sampled_from([m for m in METHODS if m != 'lrp']))
def test_relevance_adds_up_to_the_change_of_the_score(seed, method):
    torch.manual_seed(seed)
    net = vgg11_128(32, hidden=8, width=1/16).eval()
    x = torch.rand(2, 3, 32, 32)
    given_baselines = {} if METHODS[method].baselines == 'none' else dict(baselines=torch.rand(3, 3, 32, 32))
    a = attribute(net, x, method, **given_baselines)
    np.testing.assert_allclose(a.values.sum((1, 2))*x.shape[1] - a.difference, a.delta, atol=1e-4)      # what delta says is what it is
    if method in ('deeplift', 'deepliftshap'): assert (np.abs(a.delta) < 1e-3*np.abs(a.difference) + 1e-5).all()
    if method == 'intgrad': assert (np.abs(a.delta) < .2*np.abs(a.difference) + 1e-3).all()


# there and back

@settings(max_examples=15)
@given(st.integers(60, 200), seeds, st.booleans(), st.text(st.characters(codec='windows-1252', exclude_categories=['Cc']), max_size=20))
def test_a_node_map_that_is_written_is_read_again(n, seed, strains, note):
    rng = np.random.default_rng(seed)
    x, y = rng.permutation(np.stack(np.meshgrid(np.arange(20), np.arange(20)), -1).reshape(-1, 2))[:n].T*5. + rng.uniform(-1, 1, (2, n))
    made = NodeMap(x, y, *rng.normal(0, .02, (2, n)), *(rng.normal(size=(3, n)) if strains else [None]*3), header={'note': note})
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('error')
        write_nodemap(Path(folder)/'m.txt', made)
        read = read_nodemap(Path(folder)/'m.txt')
    for key in ('x', 'y', 'ux', 'uy') + (('eps_x', 'eps_y', 'eps_xy') if strains else ()): np.testing.assert_allclose(getattr(read, key), getattr(made, key), atol=1e-9)
    assert read.eps_x is not None or not strains


# random bytes

@pytest.fixture(scope='module')
def whole(tmp_path_factory, tiny_weights):
    "The folder of a good file for each reader."
    folder, rng = tmp_path_factory.mktemp('whole'), np.random.default_rng(0)
    for suffix in ('png', 'jpg', 'tif', 'bmp', 'webp'): Image.fromarray(pixels(12, 16)).save(folder/f'a.{suffix}')
    np.savez_compressed(folder/'field.npz', displacement_mm=rng.normal(0, .01, (2, 16, 16)), field_of_view_mm=70.)
    np.savez(folder/'waves.npz', waves=rng.normal(size=(2, 20, 9, 9)))
    write_nodemap(folder/'map.txt', NodeMap(*rng.uniform(0, 70, (2, 60)), *rng.normal(0, .01, (2, 60))))
    (folder/'t.csv').write_text('file,area_px,day\n' + ''.join(f'{k}.png,{k},{k}\n' for k in range(5)))
    with zipfile.ZipFile(folder/'a.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('repo/images/1', 'one'*99); z.writestr('repo/images/2', 'two')
    with tarfile.open(folder/'a.tar', 'w:gz') as t: t.add(folder/'t.csv', 'images/t.csv')
    torch.manual_seed(0)
    save_weights(vgg11_128(32, hidden=2, width=1/64), folder/'w.safetensors')
    return folder


READERS = {
    'image': (['a.png', 'a.jpg', 'a.tif', 'a.bmp', 'a.webp'], read_image), 'mask': (['a.png'], lambda p: read_mask(p, (12, 16))),
    'field': (['field.npz'], read_field), 'node map': (['map.txt'], read_any), 'waves': (['waves.npz'], read_waves), 'weights': (['w.safetensors'], load_weights),
    'table': (['t.csv'], read_table), 'series': (['t.csv'], lambda p: read_series(p, 'day')), 'archive': (['a.zip', 'a.tar'], lambda p: unpack(p, p.parent/'out', ('images',), 2**20)),
}


@st.composite
def damaged(draw, data):
    "Bytes with some changed, put in, left out, cut off; or only noise."
    if draw(st.integers(0, 9)) == 0: return draw(st.binary(max_size=200))
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at, what = draw(st.integers(0, max(0, len(data) - 1))), draw(st.integers(0, 4))
        if what == 0: data[at:at + 1] = draw(st.binary(min_size=1, max_size=1))
        if what == 1: data[at:at + 4] = draw(st.sampled_from([b'\xff\xff\xff\xff', bytes(4), b'\x7f\xff\xff\xff', b'0000', b'nan;', b'-1e9']))
        if what == 2: data[at:at] = draw(st.binary(max_size=8))
        if what == 3: del data[at:at + draw(st.integers(1, 40))]
        if what == 4: del data[at:]
    return bytes(data)


@pytest.mark.parametrize('reader', READERS)
@settings(max_examples=60)
@given(st.data())
def test_random_bytes_give_a_result_or_an_input_error(whole, reader, data):
    names, read = READERS[reader]
    name = data.draw(st.sampled_from(names))
    content = data.draw(damaged((whole/name).read_bytes()))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        (path := Path(folder)/name).write_bytes(content)
        try: read(path)
        except InputError as error: assert '\n' not in str(error) and len(str(error)) < 1000
        assert not [p for p in Path(folder).parent.glob('evil*')]
