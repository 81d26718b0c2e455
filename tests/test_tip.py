"What `crackxai tip` promises: files, tables, coordinates, exit codes; every fault of a field is told in one line and the field beside it is done."
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from PIL import Image

from conftest import error_line, left_over
from crackxai.core import find_data, read_csv, weights_dir
from crackxai.data.dic import read_field, tip_of
from crackxai.data.nodemap import NodeMap, write_nodemap
from crackxai.data.specimens import fields

COLUMNS = ['file', 'found', 'x_px', 'y_px', 'x_mm', 'y_mm', 'confidence', 'source']
shipped = pytest.mark.skipif(not (weights_dir()/'dic.safetensors').is_file(), reason='the shipped weights dic are not here yet')


@pytest.fixture(scope='session')
def tip_weights(tmp_path_factory):
    "Files of an untrained network: one whose map is 1 everywhere (the tip is in the middle), one whose map is 0, and one as it is."
    from crackxai.models.classify import save_weights
    from crackxai.models.tip import ParallelNets
    folder, files = tmp_path_factory.mktemp('tip'), {}
    for name, push in [('middle', 20.), ('blind', -20.), ('plain', None)]:
        torch.manual_seed(0)
        net = ParallelNets(2)
        with torch.no_grad():
            if push: net.out.weight.zero_(); net.out.bias.fill_(push)
        files[name] = folder/f'{name}.safetensors'
        save_weights(net, files[name], tip_finder=dict(size=32))
    return SimpleNamespace(**files)


@pytest.fixture(scope='session')
def made():
    "Two generated fields (2, 48, 48) of a view of 70 mm."
    return fields(2, 1, specimen='S_160_4.7', size=48, load=1., crop=False).displacement


def stored(path, u, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **(dict(displacement_mm=u, field_of_view_mm=70.) | more))
    return path


def node_map(path, u, left=False):
    "A field as the nodes of a map, in the half x > 0 or mirrored into x < 0."
    at = np.linspace(0, 70, u.shape[2])
    x, y = (a.ravel() for a in np.meshgrid(at, at - 35))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nodemap(path, NodeMap(-x if left else x, y, -u[0].ravel() if left else u[0].ravel(), u[1].ravel()))
    return path


def names(folder): return sorted(p.name for p in Path(folder).iterdir())


def test_table_and_picture_are_as_in_the_contract(run, tip_weights, made, tmp_path):
    path, out = stored(tmp_path/'stage.npz', made[0]), tmp_path/'new'/'out'
    r = run('tip', path, '--out', out, '--weights', tip_weights.middle)
    assert r.code == 0 and '1 fields done, 0 failed' in r.output
    assert names(out) == ['stage_attention.png', 'tips.csv']
    assert (out/'tips.csv').read_text().splitlines()[0] == ','.join(COLUMNS)
    (row,) = read_csv(out/'tips.csv')
    assert (row['file'], row['found'], row['source']) == (str(path), 'True', 'segmentation') and 0 < float(row['confidence']) <= 1
    assert [float(row[c]) for c in COLUMNS[2:6]] == pytest.approx([23.5, 23.5, 35, 0], abs=1e-4)      # the middle of 48 pixels, 0 = the first one's centre
    picture = Image.open(out/'stage_attention.png')
    assert picture.mode == 'RGB' and picture.height >= 512 and picture.width >= 3*512
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 1000


def test_a_field_without_a_tip_is_a_row_and_no_failure(run, tip_weights, made, tmp_path):
    assert run('tip', stored(tmp_path/'a.npz', made[0]), '--out', tmp_path/'out', '--weights', tip_weights.blind).code == 0
    (row,) = read_csv(tmp_path/'out'/'tips.csv')
    assert row['found'] == 'False' and {row[c] for c in COLUMNS[2:6]} == {''} and row['source'] == '' and float(row['confidence']) == 0
    assert Image.open(tmp_path/'out'/'a_attention.png').height >= 512


def test_any_size_and_a_picture_at_least_512_high(run, tip_weights, made, tmp_path):
    u = np.random.default_rng(0).normal(0, .01, (2, 600, 300)).astype(np.float32) + np.linspace(0, 1, 300, dtype=np.float32)
    stored(tmp_path/'in'/'tall.npz', u); stored(tmp_path/'in'/'small.npz', made[0][:, ::3, ::3])
    assert run('tip', tmp_path/'in', '--out', tmp_path/'out', '--weights', tip_weights.middle).code == 0
    at = {Path(r['file']).stem: [float(r[c]) for c in COLUMNS[2:6]] for r in read_csv(tmp_path/'out'/'tips.csv')}
    assert at['tall'] == pytest.approx([149.5, 299.5, 35, 0], abs=1e-3) and at['small'] == pytest.approx([7.5, 7.5, 35, 0], abs=1e-3)
    assert (Image.open(tmp_path/'out'/'tall_attention.png').height, Image.open(tmp_path/'out'/'small_attention.png').height) == (628, 540)


def test_node_maps_of_either_side(run, tip_weights, made, tmp_path):
    "Both give the same place; on the left x is negative. The view can be chosen."
    right, left = node_map(tmp_path/'right.txt', made[0]), node_map(tmp_path/'left.txt', made[0], left=True)
    rows = {}
    for name, path, more in [('right', right, []), ('left', left, ['--side', 'left']), ('near', right, ['--field-of-view-mm', 40])]:
        assert run('tip', path, '--out', tmp_path/name, '--weights', tip_weights.plain, *more).code == 0
        (rows[name],) = read_csv(tmp_path/name/'tips.csv')
        assert run('tip', path, '--out', tmp_path/name, '--weights', tip_weights.middle, *more).code == 0
        (rows[name + ' middle'],) = read_csv(tmp_path/name/'tips.csv')
    number = lambda row, c: float(row[c] or 'nan')
    assert [rows[n + ' middle']['x_mm'] for n in ('right', 'left', 'near')] == ['35', '-35', '20']
    assert (rows['right']['found'], rows['right']['confidence']) == (rows['left']['found'], rows['left']['confidence'])
    np.testing.assert_allclose([-number(rows['left'], 'x_mm'), number(rows['left'], 'y_mm')], [number(rows['right'], 'x_mm'), number(rows['right'], 'y_mm')], rtol=1e-4)


def test_the_left_side_as_an_array(run, tip_weights, made, tmp_path):
    "Columns from x = -70 mm to 0: pixels are those of the file."
    mirrored = made[0][..., ::-1]*np.array([-1, 1])[:, None, None]
    assert run('tip', stored(tmp_path/'l.npz', mirrored), '--out', tmp_path/'out', '--weights', tip_weights.middle, '--side', 'left').code == 0
    (row,) = read_csv(tmp_path/'out'/'tips.csv')
    assert [float(row[c]) for c in COLUMNS[2:6]] == pytest.approx([23.5, 23.5, -35, 0], abs=1e-4)


def test_folders_give_npz_and_txt_and_keep_like_names_apart(run, tip_weights, made, tmp_path):
    stored(tmp_path/'in'/'a.npz', made[0]); node_map(tmp_path/'in'/'deep'/'a.txt', made[1]); (tmp_path/'in'/'dic.csv').write_text('file,tip\n')
    call = lambda: run('tip', tmp_path/'in', '--out', tmp_path/'in'/'out', '--weights', tip_weights.middle).code
    assert call() == 0 and len(read_csv(tmp_path/'in'/'out'/'tips.csv')) == 2 and len(list((tmp_path/'in'/'out').glob('*_attention.png'))) == 2
    first = names(tmp_path/'in'/'out')
    assert call() == 0 and names(tmp_path/'in'/'out') == first


def test_an_input_is_never_overwritten(run, tip_weights, made, tmp_path):
    own = node_map(tmp_path/'tips.csv', made[0])
    before = own.read_bytes()
    assert run('tip', own, '--out', tmp_path, '--weights', tip_weights.middle).code == 2 and own.read_bytes() == before


class Evil:
    "Runs when it is unpickled."
    def __init__(self, marker): self.marker = str(marker)
    def __reduce__(self): return open, (self.marker, 'w')


def with_nan(u, share):
    u = u.copy(); u[:, :round(share*len(u[0]))] = np.nan
    return u


def text(change):
    "A node map with its text changed."
    def write(path, u):
        node_map(path, u)
        path.write_text(change(path.read_text(encoding='windows-1252')), encoding='windows-1252')
    return write


def arrays(**change): return lambda path, u: stored(path, u, **{k: v(u) if callable(v) else v for k, v in change.items()})
def without(name): return lambda path, u: np.savez(path, **{k: v for k, v in dict(displacement_mm=u, field_of_view_mm=70.).items() if k != name})
def content(data): return lambda path, u: path.write_bytes(data)
def cut(path, u): stored(path, u); path.write_bytes(path.read_bytes()[:-500])


# name of the file, how it is made, what its line must say
FAULTS = {
    'empty': ('x.npz', content(b''), 'empty'),
    'no archive': ('x.npz', content(b'hello, this is no archive'), 'npz'),
    'cut off': ('x.npz', cut, 'copy it again'),
    'objects': ('x.npz', lambda path, u: np.savez(path, displacement_mm=np.array([Evil(path.parent/'ran'), 1], object), field_of_view_mm=70.), 'Python objects'),
    'pickle': ('x.npz', lambda path, u: path.write_bytes(pickle.dumps(Evil(path.parent/'ran'))), 'npz'),
    'no displacement': ('x.npz', without('displacement_mm'), 'displacement_mm'),
    'no field of view': ('x.npz', without('field_of_view_mm'), 'field_of_view_mm'),
    'field of view zero': ('x.npz', arrays(field_of_view_mm=0.), 'positive'),
    'field of view NaN': ('x.npz', arrays(field_of_view_mm=np.nan), 'positive'),
    'field of view twice': ('x.npz', arrays(field_of_view_mm=[70., 70.]), 'positive'),
    'axes last': ('x.npz', arrays(displacement_mm=lambda u: u.transpose(1, 2, 0)), 'expected (2, h, w)'),
    'one component': ('x.npz', arrays(displacement_mm=lambda u: u[0]), 'expected (2, h, w)'),
    'three components': ('x.npz', arrays(displacement_mm=lambda u: np.concatenate([u, u[:1]])), 'expected (2, h, w)'),
    'words': ('x.npz', arrays(displacement_mm=lambda u: u.astype(str)), 'not numbers'),
    'few pixels': ('x.npz', arrays(displacement_mm=lambda u: u[:, :8, :8]), '16'),
    'a strip': ('x.npz', arrays(displacement_mm=lambda u: np.tile(u[:, :16], (1, 1, 3))), 'strip'),
    'half of it NaN': ('x.npz', arrays(displacement_mm=lambda u: with_nan(u, .5)), 'no displacement'),
    'all NaN': ('x.npz', arrays(displacement_mm=lambda u: u*np.nan), 'no displacement'),
    'constant': ('x.npz', arrays(displacement_mm=lambda u: u*0 + 1), 'same everywhere'),
    'micrometres': ('x.npz', arrays(displacement_mm=lambda u: u*1000), 'micrometres'),
    'no node map': ('x.txt', content(b'shopping list\nmilk\n'), 'too few'),
    'empty node map': ('x.txt', content(b''), 'empty'),
    'node map without u_y': ('x.txt', text(lambda t: t.replace('v [mm]', 'q [mm]')), 'uy'),
    'node map cut off': ('x.txt', text(lambda t: t[:-25]), 'cut off'),
    'few nodes': ('x.txt', text(lambda t: '\n'.join(t.splitlines()[:20])), 'too few'),
    'nodes of the other side': ('x.txt', lambda path, u: node_map(path, u, left=True), 'try the other side'),
    'node map in metres': ('x.txt', lambda path, u: write_nodemap(path, NodeMap(*np.indices(u.shape[1:])[::-1].reshape(2, -1)*.0015, u[0].ravel()/1e3, u[1].ravel()/1e3)), 'x.txt'),
    'gone': ('gone.npz', None, 'no such file'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_fault_beside_a_good_field(run, tip_weights, made, tmp_path, fault):
    name, make, why = FAULTS[fault]
    good, bad, out = stored(tmp_path/'in'/'good.npz', made[0]), tmp_path/'in'/name, tmp_path/'out'
    if make: make(bad, made[1])
    r = run('tip', bad, good, '--out', out, '--weights', tip_weights.middle)
    assert r.code == 3 and [row['file'] for row in read_csv(out/'tips.csv')] == [str(good)], r.output
    (failure,) = read_csv(out/'failures.csv')
    assert failure['file'] == str(bad) and name in failure['reason'] and why in failure['reason'] and '\n' not in failure['reason'], failure['reason']
    assert failure['reason'] in r.output and names(out) == ['failures.csv', 'good_attention.png', 'tips.csv'] and not left_over(out)
    assert not (tmp_path/'in'/'ran').exists()


# what is read all the same, and what is said about it
WARNED = {
    'some NaN': ('x.npz', arrays(displacement_mm=lambda u: with_nan(u, .1)), 'filled'),
    'decimal commas': ('x.txt', text(lambda t: t.replace('.', ',')), 'decimal commas'),
    'tabs': ('x.txt', text(lambda t: t.replace('; ', '\t')), 'tabs'),
    'rows without numbers': ('x.txt', text(lambda t: '\n'.join(' ; '.join([c if k < 4 else 'nan' for k, c in enumerate(line.split(';'))]) if i == 30 else line for i, line in enumerate(t.splitlines()))), 'without numbers'),
}


@pytest.mark.parametrize('case', WARNED)
def test_warnings_are_one_line_and_name_the_file(run, tip_weights, made, tmp_path, case):
    name, make, said = WARNED[case]
    make(tmp_path/name, made[0])
    r = run('tip', tmp_path/name, '--out', tmp_path/'out', '--weights', tip_weights.middle)
    assert r.code == 0, r.output
    assert any(line.startswith('  warning: ') and name in line and said in line for line in r.output.splitlines()), r.output


def test_a_crack_that_grows_to_the_other_side_is_hinted_at(made, tmp_path):
    from crackxai.pipeline import TipFinder, tip_file
    from crackxai.models.tip import UNet
    class OneWay(UNet):
        "Finds a tip in fields that open at the first column."
        def forward(self, x): return super().forward(x)*0 + 20*torch.sign(x[:, 1, -1, 0] - x[:, 1, 0, 0] - x[:, 1, -1, -1] + x[:, 1, 0, -1])[:, None, None, None]
    u = made[0] if np.ptp(made[0][1, :, 0]) > np.ptp(made[0][1, :, -1]) else made[0][..., ::-1]
    path = stored(tmp_path/'l.npz', u[..., ::-1]*np.array([-1, 1])[:, None, None])
    with pytest.warns(UserWarning, match='l.npz.*grow to the left.*--side'): assert not tip_file(TipFinder(OneWay(1), 32), path, tmp_path)['found']
    assert tip_file(TipFinder(OneWay(1), 32), path, tmp_path, side='left')['found']


@pytest.mark.parametrize('option, value', [('--field-of-view-mm', '0'), ('--field-of-view-mm', '-70'), ('--field-of-view-mm', 'nan'), ('--field-of-view-mm', 'wide'), ('--side', 'top'), ('--weights', 'nonsense')])
def test_a_bad_option_is_bad_usage_and_writes_nothing(run, tip_weights, made, tmp_path, option, value):
    weights = [] if option == '--weights' else ['--weights', tip_weights.middle]
    r = run('tip', stored(tmp_path/'a.npz', made[0]), '--out', tmp_path/'out', *weights, f'{option}={value}')
    assert r.code == 2 and option.strip('-') in r.output + '--weights' and value in r.output and not (tmp_path/'out').exists()


def test_weights_of_another_task_are_one_line(run, tiny_weights, made, tmp_path):
    r = run('tip', stored(tmp_path/'a.npz', made[0]), '--out', tmp_path/'out', '--weights', tiny_weights.plain)
    assert r.code == 2 and 'unet_tip, parallelnets' in error_line(r.output) and not (tmp_path/'out').exists()


def test_made_fields_are_read_and_the_table_holds_the_truth(run, tip_weights, tmp_path):
    assert run('data', 'make', 'dic', '--n', 6, '--out', tmp_path/'dic', '--size', 64, '--seed', 3).code == 0
    rows = read_csv(tmp_path/'dic'/'dic.csv')
    assert len(rows) == 6 and {'tip_x_mm', 'k1_mpa_sqrt_m'} < set(rows[0])
    for row in rows:
        f = read_field(tmp_path/'dic'/row['file'])
        assert f.displacement_mm.shape == (2, 64, 64) and f.field_of_view_mm == pytest.approx(float(row['field_of_view_mm']), rel=1e-5)
        tip = tip_of(f.label)
        assert (tip is None) == (row['tip_x_px'] == '')
        if tip: assert np.hypot(tip[1] - float(row['tip_x_px']), tip[0] - float(row['tip_y_px'])) < .71 and np.hypot(*(f.tip_mm - [float(row['tip_x_mm']), float(row['tip_y_mm'])])) < .71*f.field_of_view_mm/63
    assert run('tip', tmp_path/'dic', '--out', tmp_path/'out', '--weights', tip_weights.middle).code == 0 and len(read_csv(tmp_path/'out'/'tips.csv')) == 6


@shipped
def test_shipped_weights_on_the_real_stage(run, tmp_path):
    stage = next((find_data('fatigue_dic') or tmp_path).glob('*.npz'), None)
    if not stage: pytest.skip('the real stage is not here: crackxai data fetch fatigue_dic')
    assert run('tip', stage, '--out', tmp_path/'out').code == 0
    (row,) = read_csv(tmp_path/'out'/'tips.csv')
    assert np.hypot(*(read_field(stage).tip_mm - [float(row['x_mm']), float(row['y_mm'])])) < .54      # the paper's mean


@shipped
@pytest.mark.parametrize('side', ['right', 'left'])
def test_shipped_weights_on_finite_element_node_maps(run, tmp_path, side):
    folder = find_data('nodemaps')
    maps = sorted(folder.glob('File_F*.txt')) if folder else []
    if not maps: pytest.skip('the node maps are not here: crackxai data fetch nodemaps')
    assert run('tip', *maps, '--out', tmp_path/'out', '--side', side).code == 0
    for row, a in zip(read_csv(tmp_path/'out'/'tips.csv'), (30, 40, 50)): assert np.hypot(float(row['x_mm']) - (a if side == 'right' else -a), float(row['y_mm'])) < 1


@shipped
def test_shipped_weights_on_generated_fields():
    from crackxai.pipeline import TipFinder
    finder, made = TipFinder.load('dic'), fields(24, 99, specimen='S_160_2.0', size=256, load=1., crop=False)
    results = [finder(u, 70.) for u in made.displacement]
    deviation = [np.hypot(*(r.xy_mm - t)) for r, t in zip(results, made.tip_mm) if r.found]
    assert len(deviation) >= 23 and np.median(deviation) < .5
