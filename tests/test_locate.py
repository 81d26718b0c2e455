"What `crackxai locate` promises: tables, places, exit codes; every fault of a file is told in one line and the plate beside it is done."
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch

from conftest import error_line, left_over
from crackxai.core import read_csv, weights_dir
from crackxai.data.wave import box, cells, simulate

COLUMNS = ['file', 'found', 'x_min', 'y_min', 'x_max', 'y_max', 'confidence']
CRACKS = [np.zeros((0, 4)), [.3, .35, .6, .65], [.2, .7, .5, .75], [.55, .2, .75, .5]]
shipped = pytest.mark.skipif(not (weights_dir()/'wave.safetensors').is_file(), reason='the shipped weights wave are not here yet')


@pytest.fixture(scope='session')
def wave_weights(tmp_path_factory):
    "Files of an untrained network: one that is sure of a crack in 0.25..0.5 x 0.35..0.65, one that is sure of none."
    from crackxai.models.classify import save_weights
    from crackxai.models.keypoint import SensorNet
    folder, files = tmp_path_factory.mktemp('wave'), {}
    for name, push in [('crack', 20.), ('intact', -20.)]:
        torch.manual_seed(0)
        net = SensorNet(500, pool=1, width=8)
        with torch.no_grad(): net.box.weight.zero_(); net.box.bias.copy_(torch.tensor([.5, .65, .25, .35, push])); net.map.bias.fill_(-50)     # no likely cells: the regressed box counts
        files[name] = folder/f'{name}.safetensors'
        save_weights(net, files[name])
    return SimpleNamespace(**files)


@pytest.fixture(scope='session')
def plates():
    "Waves of an intact and three cracked plates, divided by the largest |value| of the intact one."
    waves = simulate(CRACKS)
    return waves/np.abs(waves[0]).max()


def stored(path, waves, reference=None, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **(dict(waves=waves.astype(np.float16)) | ({} if reference is None else dict(reference=reference.astype(np.float16))) | more))
    return path


def names(folder): return sorted(p.name for p in Path(folder).iterdir())


def test_table_is_as_in_the_contract(run, wave_weights, plates, tmp_path):
    path, out = stored(tmp_path/'plate.npz', plates[1], plates[0]), tmp_path/'new'/'out'
    r = run('locate', path, '--out', out, '--weights', wave_weights.crack)
    assert r.code == 0 and '1 plates done, 0 failed' in r.output and 'warning' not in r.output
    assert names(out) == ['boxes.csv'] and (out/'boxes.csv').read_text().splitlines()[0] == ','.join(COLUMNS)
    (row,) = read_csv(out/'boxes.csv')
    assert row['file'] == str(path) and row['found'] == 'True' and float(row['confidence']) == pytest.approx(1)
    assert [float(row[c]) for c in COLUMNS[2:6]] == [.25, .375, .5, .625]        # corners in order, sides on the grid of the labels


def test_an_intact_plate_is_a_row_and_no_failure(run, wave_weights, plates, tmp_path):
    assert run('locate', stored(tmp_path/'a.npz', plates[0], plates[0]), '--out', tmp_path/'out', '--weights', wave_weights.intact).code == 0
    (row,) = read_csv(tmp_path/'out'/'boxes.csv')
    assert row['found'] == 'False' and {row[c] for c in COLUMNS[2:6]} == {''} and float(row['confidence']) < 1e-6


def test_without_a_reference_and_in_folders(run, wave_weights, plates, tmp_path):
    stored(tmp_path/'in'/'a.npz', plates[1]); stored(tmp_path/'in'/'deep'/'b.npz', plates[2], plates[0]); (tmp_path/'in'/'waves.csv').write_text('file\n')
    assert run('locate', tmp_path/'in', '--out', tmp_path/'in'/'out', '--weights', wave_weights.crack).code == 0
    assert [Path(r['file']).name for r in read_csv(tmp_path/'in'/'out'/'boxes.csv')] == ['a.npz', 'b.npz']


def changed(change, with_reference=True):
    "Both arrays changed alike."
    return lambda path, w, r: stored(path, change(w), change(r) if with_reference else None)


def one_nan(w):
    w = w.copy(); w[0, 700, 3, 3] = np.nan
    return w


def content(data): return lambda path, w, r: path.write_bytes(data)
def cut(path, w, r): stored(path, w, r); path.write_bytes(path.read_bytes()[:-5000])
def bare(path, w, r):
    with open(path, 'wb') as f: np.save(f, w)


# how the file is made, what its line must say
FAULTS = {
    'empty': (content(b''), 'npz'),
    'no archive': (content(b'hello, this is no archive'), 'npz'),
    'cut off': (cut, 'cut off'),
    'bare array': (bare, 'bare array'),
    'no waves': (lambda path, w, r: np.savez(path, field=w), 'waves'),
    'objects': (lambda path, w, r: np.savez(path, waves=np.array([w, {}], object)), 'Python objects'),
    'time first': (changed(lambda w: w.transpose(1, 0, 2, 3)), '(2, t, '),
    'time last': (changed(lambda w: w.transpose(0, 2, 3, 1)), '(2, t, '),
    'components last': (changed(lambda w: w.transpose(1, 2, 3, 0)), '(2, t, '),
    'one component': (changed(lambda w: w[0]), '(2, t, '),
    'several plates': (changed(lambda w: w[None]), 'one plate'),
    '7 x 7 sensors': (changed(lambda w: w[:, :, 1:8, 1:8]), '7 x 7 sensors'),
    '9 x 8 sensors': (changed(lambda w: w[..., :8]), '(2, 2000, 9, 8)'),
    'sensor axes exchanged': (changed(lambda w: w.swapaxes(2, 3)), 'exchanged'),
    'sensors in reverse': (changed(lambda w: w[..., ::-1]), 'reverse'),
    'components exchanged': (changed(lambda w: w[::-1]), 'exchanged'),
    'NaN': (changed(one_nan), 'NaN'),
    'all zero': (changed(lambda w: w*0), 'zero'),
    'reference zero': (lambda path, w, r: stored(path, w, r*0), 'reference'),
    'few steps': (changed(lambda w: w[:, :1500]), '2000'),
    'reference of another length': (lambda path, w, r: stored(path, w, r[:, :1900]), 'reference'),
    'reference of another scale': (lambda path, w, r: stored(path, w*100, r), '100 times'),
    'most sensors silent': (changed(lambda w: w*(np.arange(9) < 4)), 'record nothing'),
    'complex': (lambda path, w, r: np.savez(path, waves=w + 0j), 'complex'),
    'gone': (None, 'x.npz'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_fault_beside_a_good_plate(run, wave_weights, plates, tmp_path, fault):
    make, why = FAULTS[fault]
    good, bad, out = stored(tmp_path/'good.npz', plates[2], plates[0]), tmp_path/'x.npz', tmp_path/'out'
    if make: make(bad, plates[1], plates[0])
    r = run('locate', bad, good, '--out', out, '--weights', wave_weights.crack)
    assert r.code == 3 and [row['file'] for row in read_csv(out/'boxes.csv')] == [str(good)], r.output
    (failure,) = read_csv(out/'failures.csv')
    assert failure['file'] == str(bad) and 'x.npz' in failure['reason'] and why in failure['reason'] and '\n' not in failure['reason'], failure['reason']
    assert failure['reason'] in r.output and names(out) == ['boxes.csv', 'failures.csv'] and not left_over(out)


def silent(w):
    w = w.copy(); w[:, :, 2, 5] = 0
    return w


WARNED = {
    'more steps': (changed(lambda w: np.concatenate([w, w[:, :100]], 1)), 'the first 2000 are used'),
    'late source': (changed(lambda w: np.concatenate([np.zeros_like(w[:, :40]), w], 1)[:, :2000]), '40 steps later'),
    'early source': (changed(lambda w: np.concatenate([w[:, 30:], w[:, -30:]], 1)), '30 steps earlier'),
    'silent sensor': (lambda path, w, r: stored(path, silent(w), r), '(2, 5)'),
    'no reference': (changed(lambda w: w, False), 'no reference: the first arrivals are those of the simulated plate'),
    'not divided': (changed(lambda w: w*50, False), 'multiplied by 0.02'),
    'another source and no reference': (lambda path, w, r: stored(path, simulate([CRACKS[1]], wavelength=10.)[0]), 'less certain'),
}


@pytest.mark.parametrize('case', WARNED)
def test_changes_to_the_input_are_one_line_and_name_the_file(run, wave_weights, plates, tmp_path, case):
    make, said = WARNED[case]
    make(tmp_path/'x.npz', plates[1], plates[0])
    r = run('locate', tmp_path/'x.npz', '--out', tmp_path/'out', '--weights', wave_weights.crack)
    assert r.code == 0, r.output
    assert any(line.startswith('  warning: ') and 'x.npz' in line and said in line for line in r.output.splitlines()), r.output


def test_unit_shift_and_velocities_leave_the_input_of_the_network_alone(plates):
    "What another simulator may do otherwise is taken out before the network sees it."
    from crackxai.pipeline.wave import _prepared, shifted
    usual = _prepared(plates[1], plates[0], 'a')[0]
    v = simulate([CRACKS[1], CRACKS[0]], record='velocity')
    for waves, reference in [(plates[1]*1e-9, plates[0]*1e-9), (shifted(plates[1], -40), shifted(plates[0], -40)), tuple(v*3), (plates[1]*1e9, None), (v[0], None)]:
        got = _prepared(waves, reference, 'a')[0]
        np.testing.assert_allclose(got[:, :1950], usual[:, :1950], atol=2e-3)


def test_weights_of_another_kind_are_one_line(run, tiny_weights, plates, tmp_path):
    r = run('locate', stored(tmp_path/'a.npz', plates[1]), '--out', tmp_path/'out', '--weights', tiny_weights.plain)
    assert r.code == 2 and 'sensornet' in error_line(r.output) and not (tmp_path/'out').exists()


def test_made_plates_are_read_and_the_table_holds_the_truth(run, wave_weights, tmp_path):
    call = lambda: run('data', 'make', 'wave', '--n', 4, '--out', tmp_path/'set', '--seed', 2, '--intact', .5).code
    assert call() == 0 and names(tmp_path/'set') == [f'wave_{i:05}.npz' for i in range(4)] + ['waves.csv']
    rows = {r['file']: r for r in read_csv(tmp_path/'set'/'waves.csv')}
    assert 0 < [r['length'] for r in rows.values()].count('') < 4
    for name, row in rows.items():
        with np.load(tmp_path/'set'/name) as f:
            assert f['waves'].shape == f['reference'].shape == (2, 2000, 9, 9) and np.abs(f['reference']).max() == 1
            if row['length']: np.testing.assert_allclose([float(row[k]) for k in COLUMNS[2:6]], f['box'], atol=1e-6)
            else: assert not f['cells'].any()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'set').glob('*.npz')}
    assert call() == 0 and {p.name: p.stat().st_mtime_ns for p in (tmp_path/'set').glob('*.npz')} == before     # goes on where it was
    assert run('locate', tmp_path/'set', '--out', tmp_path/'out', '--weights', wave_weights.crack).code == 0 and len(read_csv(tmp_path/'out'/'boxes.csv')) == 4


@pytest.mark.parametrize('option', ['--n=0', '--intact=1.5', '--seed=-1'])
def test_bad_numbers_for_a_set_are_bad_usage(run, tmp_path, option):
    r = run('data', 'make', 'wave', '--n', 1, option, '--out', tmp_path/'set')
    assert r.code == 2 and option.split('=')[0] in r.output and not (tmp_path/'set').exists()


@shipped
def test_shipped_weights_on_generated_plates(run, plates, tmp_path):
    from crackxai.metrics import box_scores
    for i, waves in enumerate(plates): stored(tmp_path/'in'/f'{i}.npz', waves, plates[0])
    stored(tmp_path/'in'/'4.npz', *(np.concatenate([np.zeros_like(w[:, :40]), w], 1)[:, :2000] for w in (plates[1], plates[0])))
    assert run('locate', tmp_path/'in', '--out', tmp_path/'out').code == 0
    rows = read_csv(tmp_path/'out'/'boxes.csv')
    assert [r['found'] for r in rows] == ['False'] + ['True']*4
    found = np.array([[float(r[c]) for c in COLUMNS[2:6]] for r in rows[1:]])
    iou = box_scores(found, np.stack([box(cells(CRACKS[i])) for i in (1, 2, 3, 1)]))['iou']
    assert iou.min() > .4 and iou.mean() > .6, iou
