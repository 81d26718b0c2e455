"What `crackxai segment` promises: files, tables, exit codes."
import errno, json, os, pickle, sys
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import save_file

from conftest import error_line, left_over, photo, pixels
from crackxai.core import read_csv
from crackxai.data import walls
from crackxai.pipeline import surface

COLUMNS = ['file', 'crack_probability', 'cracks', 'area_px', 'area_mm2', 'max_width_px', 'max_width_mm', 'length_px', 'length_mm']
MM = [c for c in COLUMNS if c.endswith(('_mm', '_mm2'))]


def names(folder): return sorted(p.name for p in Path(folder).iterdir())


def test_mask_overlay_and_table_are_as_in_the_contract(run, tiny_weights, tmp_path):
    wall, out = photo(tmp_path/'wall.png', 130, 150), tmp_path/'new'/'out'
    r = run('segment', wall, '--out', out, '--weights', tiny_weights.cracked)
    assert r.code == 0 and '1 images done, 0 failed' in r.output
    assert names(out) == ['severity.csv', 'wall_mask.png', 'wall_overlay.png']
    mask, overlay = Image.open(out/'wall_mask.png'), Image.open(out/'wall_overlay.png')
    assert (mask.mode, mask.size, overlay.mode, overlay.size) == ('L', (150, 130), 'RGB', (150, 130))
    mask = np.asarray(mask)
    assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
    assert (out/'severity.csv').read_text().splitlines()[0] == ','.join(COLUMNS)
    (row,) = read_csv(out/'severity.csv')
    assert row['file'] == str(wall) and float(row['crack_probability']) > .5
    assert (np.asarray(overlay) == pixels(130, 150)).all(2)[mask == 0].all()        # intact wall is shown as it is
    assert (np.asarray(overlay) != pixels(130, 150)).any(2)[mask > 0].all()


def test_intact_photo_has_an_empty_mask_and_no_width(run, tiny_weights, tmp_path):
    assert run('segment', photo(tmp_path/'w.png'), '--out', tmp_path/'out', '--weights', tiny_weights.intact, '--mm-per-px', 1).code == 0
    (row,) = read_csv(tmp_path/'out'/'severity.csv')
    assert float(row['crack_probability']) < .5 and (row['cracks'], row['area_px']) == ('0', '0')
    assert (row['max_width_px'], row['max_width_mm'], float(row['length_px']), float(row['length_mm'])) == ('', '', 0, 0)
    assert not np.asarray(Image.open(tmp_path/'out'/'w_mask.png')).any()
    assert (np.asarray(Image.open(tmp_path/'out'/'w_overlay.png')) == pixels()).all()


def test_millimetres_only_with_a_scale_and_in_step_with_pixels(run, tiny_weights, tmp_path):
    wall, rows = photo(tmp_path/'w.png', 130, 150), {}
    for name, scale in [('px', []), ('mm', ['--mm-per-px', '0.43'])]:
        assert run('segment', wall, '--out', tmp_path/name, '--weights', tiny_weights.cracked, *scale).code == 0
        (rows[name],) = read_csv(tmp_path/name/'severity.csv')
    assert {rows['px'][c] for c in MM} == {''}
    assert int(rows['mm']['area_px']) > 0
    got = {c: float(rows['mm'][c]) for c in COLUMNS[2:]}
    assert got['area_mm2'] == pytest.approx(got['area_px']*.43**2, rel=1e-5)
    assert got['max_width_mm'] == pytest.approx(got['max_width_px']*.43, rel=1e-5)
    assert got['length_mm'] == pytest.approx(got['length_px']*.43, rel=1e-5)
    assert all(rows['px'][c] == rows['mm'][c] for c in COLUMNS if c not in MM)


@pytest.mark.parametrize('scale', ['0', '-1', 'nan', 'inf', 'ten', '0,43'])
def test_a_scale_that_is_no_positive_number_is_bad_usage(run, tiny_weights, tmp_path, scale):
    r = run('segment', photo(tmp_path/'w.png'), '--out', tmp_path/'out', '--weights', tiny_weights.plain, f'--mm-per-px={scale}')
    assert r.code == 2 and 'mm-per-px' in r.output and not (tmp_path/'out').exists()


def test_folders_are_searched_through_and_like_names_kept_apart(run, tiny_weights, tmp_path):
    for k, name in enumerate(['a/wall.png', 'b/deep/wall.png', 'b/WALL.PNG', 'c/other.jpg']): photo(tmp_path/'in'/name, 40 + k, 50)
    (tmp_path/'in'/'notes.txt').write_text('no image')
    assert run('segment', tmp_path/'in', '--out', tmp_path/'out', '--weights', tiny_weights.plain).code == 0
    rows = read_csv(tmp_path/'out'/'severity.csv')
    assert sorted(Path(r['file']).relative_to(tmp_path/'in').as_posix() for r in rows) == ['a/wall.png', 'b/WALL.PNG', 'b/deep/wall.png', 'c/other.jpg']
    masks = sorted((tmp_path/'out').glob('*_mask.png'))
    assert sorted(Image.open(m).height for m in masks) == [40, 41, 42, 43] and len(list((tmp_path/'out').glob('*_overlay.png'))) == 4


def test_no_result_overwrites_another(run, tiny_weights, tmp_path):
    "The second 'x' must not take the name of a photo that is called like its stand-in."
    for k, name in enumerate(['a/x.png', 'b/x.png', 'c/x~2.png']): photo(tmp_path/'in'/name, 40 + k, 50)
    assert run('segment', tmp_path/'in', '--out', tmp_path/'out', '--weights', tiny_weights.plain).code == 0
    assert sorted(Image.open(m).height for m in (tmp_path/'out').glob('*_mask.png')) == [40, 41, 42]


def test_a_file_named_twice_is_done_once(run, tiny_weights, tmp_path):
    wall = photo(tmp_path/'in'/'w.png')
    assert run('segment', wall, tmp_path/'in', wall, '--out', tmp_path/'out', '--weights', tiny_weights.plain).code == 0
    assert len(read_csv(tmp_path/'out'/'severity.csv')) == 1


def test_again_into_a_folder_inside_the_photos(run, tiny_weights, tmp_path):
    "The results of the first call are not taken for photos by the second."
    photo(tmp_path/'in'/'w.png')
    call = lambda: run('segment', tmp_path/'in', '--out', tmp_path/'in'/'out', '--weights', tiny_weights.plain).code
    assert call() == 0
    first = names(tmp_path/'in'/'out')
    assert call() == 0 and names(tmp_path/'in'/'out') == first and len(read_csv(tmp_path/'in'/'out'/'severity.csv')) == 1


def test_a_photo_is_never_overwritten(run, tiny_weights, tmp_path):
    "Results beside the photos must not replace a file that is itself an input."
    photo(tmp_path/'w.png')
    own = photo(tmp_path/'w_mask.png', seed=1)
    before = own.read_bytes()
    r = run('segment', tmp_path/'w.png', own, '--out', tmp_path, '--weights', tiny_weights.plain)
    assert r.code in (2, 3) and own.read_bytes() == before


def test_the_same_call_gives_the_same_bytes(run, tiny_weights, tmp_path):
    wall = photo(tmp_path/'w.png', 90, 130)
    for out in 'ab': assert run('segment', wall, '--out', tmp_path/out, '--weights', tiny_weights.cracked, '--threshold', 'gmm').code == 0
    for name in names(tmp_path/'a'): assert (tmp_path/'a'/name).read_bytes() == (tmp_path/'b'/name).read_bytes(), name


def test_fast_says_so_and_draws_nearly_the_same(run, tmp_path):
    Image.fromarray((walls.wall(3, size=224).image.transpose(1, 2, 0)*255).round().astype(np.uint8)).save(tmp_path/'w.png')
    drawn, seen = [], []
    for out, more in (('exact', []), ('fast', ['--fast'])):
        r = run('segment', tmp_path/'w.png', '--out', tmp_path/out, '--min-probability', '0', *more)
        assert r.code == 0 and ('in bfloat16' in r.output) == bool(more)
        drawn.append(np.asarray(Image.open(tmp_path/out/'w_mask.png')) > 0)
        seen.append(float(read_csv(tmp_path/out/'severity.csv')[0]['crack_probability']))
    exact, fast = drawn
    assert exact.sum() > 200 and (exact & fast).sum() > .9*(exact | fast).sum()
    assert 0 < abs(seen[0] - seen[1]) < .02                                          # another answer, but a near one


@pytest.mark.parametrize('option, reason', [('--fast', 'lrp needs full precision'), ('--thorough', 'lrp is computed in one orientation')])
def test_fast_and_thorough_are_for_the_student_only(run, tiny_weights, tmp_path, option, reason):
    for weights in (['--method', 'lrp'], ['--weights', tiny_weights.plain]):
        r = run('segment', photo(tmp_path/'w.png'), '--out', tmp_path/'out', option, *weights)
        assert r.code == 2 and reason in error_line(r.output) and option in error_line(r.output)


def test_thorough_draws_a_turned_photo_as_the_photo(run, tmp_path):
    pixels, drawn = (walls.wall(3, size=224).image.transpose(1, 2, 0)*255).round().astype(np.uint8), {}
    for name, image, more in (('up', pixels, ['--thorough']), ('turned', np.rot90(pixels), ['--thorough']), ('once', np.rot90(pixels), [])):
        Image.fromarray(np.ascontiguousarray(image)).save(tmp_path/f'{name}.png')
        r = run('segment', tmp_path/f'{name}.png', '--out', tmp_path/name, '--min-probability', '0', *more)
        assert r.code == 0 and ('in eight orientations' in r.output) == bool(more)
        drawn[name] = np.asarray(Image.open(tmp_path/name/f'{name}_mask.png')) > 0
    off = lambda a, b: (a ^ b).sum()/(a | b).sum()
    assert drawn['up'].sum() > 200 and off(np.rot90(drawn['up']), drawn['turned']) < .02 < off(drawn['once'], drawn['turned'])


def test_failures_of_an_earlier_call_do_not_stay(run, tiny_weights, tmp_path):
    wall, out = photo(tmp_path/'w.png'), tmp_path/'out'
    assert run('segment', wall, tmp_path/'gone.png', '--out', out, '--weights', tiny_weights.plain).code == 3
    assert 'no such file' in read_csv(out/'failures.csv')[0]['reason']
    assert run('segment', wall, '--out', out, '--weights', tiny_weights.plain).code == 0
    assert not (out/'failures.csv').exists()


def test_an_empty_folder_is_told(run, tiny_weights, tmp_path):
    (tmp_path/'empty').mkdir()
    assert run('segment', tmp_path/'empty', '--out', tmp_path/'out', '--weights', tiny_weights.plain).code == 3
    (row,) = read_csv(tmp_path/'out'/'failures.csv')
    assert row['file'] == str(tmp_path/'empty') and 'holds no image' in row['reason']
    assert (tmp_path/'out'/'severity.csv').read_text().splitlines() == [','.join(COLUMNS)]


@pytest.mark.parametrize('option, choice', [('--method', 'lrp'), ('--threshold', 'gmm')])
def test_an_unknown_choice_is_one_line_with_the_choices(run, tiny_weights, tmp_path, option, choice):
    r = run('segment', photo(tmp_path/'w.png'), '--out', tmp_path/'out', '--weights', tiny_weights.plain, option, 'nonsense')
    assert r.code == 2 and 'nonsense' in error_line(r.output) and choice in error_line(r.output) and not (tmp_path/'out').exists()


def test_usage_errors_are_2(run, tmp_path):
    assert run('segment').code == 2 and run('segment', 'x.png').code == 2 and run('segmnet').code == 2
    assert run('segment', 'x.png', '--out', tmp_path, '--wieghts', 'x').code == 2


class Evil:
    "Runs when it is unpickled."
    def __init__(self, marker): self.marker = str(marker)
    def __reduce__(self): return open, (self.marker, 'w')


def other_header(header):
    def write(path, good): save_file({'a': torch.zeros(2)}, path, header)
    return write


def with_spec(**changes):
    "The good file with another description of the network."
    def write(path, good):
        from safetensors import safe_open
        with safe_open(good, 'pt') as f: header, state = json.loads(f.metadata()['crackxai']), {k: f.get_tensor(k) for k in f.keys()}
        save_file(state, path, {'crackxai': json.dumps(header | dict(spec=header['spec'] | changes))})
    return write


BAD_WEIGHTS = {
    'missing': (lambda path, good: None, 'no such weights'),
    'folder': (lambda path, good: path.mkdir(), 'no such weights'),
    'empty': (lambda path, good: path.write_bytes(b''), 'not a safetensors file'),
    'truncated': (lambda path, good: path.write_bytes(good.read_bytes()[:-1000]), 'not a safetensors file'),
    'cut in the header': (lambda path, good: path.write_bytes(good.read_bytes()[:50]), 'not a safetensors file'),
    'pickle': (lambda path, good: path.write_bytes(pickle.dumps(Evil(path.parent/'ran'))), 'never opened'),
    'torch pickle': (lambda path, good: torch.save(Evil(path.parent/'ran'), path), 'never opened'),
    'picture': (lambda path, good: path.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(200)), 'not a safetensors file'),
    'without header': (other_header(None), 'another program'),
    'header of another program': (other_header({'format': 'pt'}), 'another program'),
    'header that is no JSON': (other_header({'crackxai': '{'}), 'header'),
    'header without network': (other_header({'crackxai': '{}'}), 'header'),
    'header that is a list': (other_header({'crackxai': '[1]'}), 'header'),
    'unknown architecture': (with_spec(architecture='unet'), 'unet'),
    'another size of network': (with_spec(hidden=9), 'do not fit'),
    'unknown option of the network': (with_spec(colour='red'), 'colour'),
    'impossible image size': (with_spec(image_size=33), 'multiple of 32'),
}


@pytest.mark.parametrize('kind', BAD_WEIGHTS)
def test_weights_that_cannot_be_used_are_one_line_and_never_run(run, tiny_weights, tmp_path, kind):
    make, why = BAD_WEIGHTS[kind]
    path = tmp_path/'w.safetensors'
    make(path, tiny_weights.plain)
    r = run('segment', photo(tmp_path/'w.png'), '--out', tmp_path/'out', '--weights', path)
    assert r.code == 2 and why in error_line(r.output), r.output
    assert 'w.safetensors' in r.output or kind == 'impossible image size'
    assert not (tmp_path/'ran').exists() and not (tmp_path/'out').exists()


def test_out_that_is_a_file_is_bad_usage(run, tiny_weights, tmp_path):
    (tmp_path/'out').write_text('mine')
    for out in (tmp_path/'out', tmp_path/'out'/'below'):
        r = run('segment', photo(tmp_path/'w.png'), '--out', out, '--weights', tiny_weights.plain)
        assert r.code == 2 and str(out) in error_line(r.output)
    assert (tmp_path/'out').read_text() == 'mine'


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere')
def test_out_in_a_read_only_folder_is_bad_usage(run, tiny_weights, tmp_path):
    (tmp_path/'closed').mkdir(mode=0o555)
    r = run('segment', photo(tmp_path/'w.png'), '--out', tmp_path/'closed'/'out', '--weights', tiny_weights.plain)
    assert r.code == 2 and 'closed' in error_line(r.output)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='/proc is on Linux only')
def test_out_where_no_folder_can_be_made_is_bad_usage(run, tiny_weights, tmp_path):
    r = run('segment', photo(tmp_path/'w.png'), '--out', '/proc/results', '--weights', tiny_weights.plain)
    assert r.code == 2 and '/proc/results' in error_line(r.output)


def test_a_full_disk_costs_the_photo_and_leaves_no_half_of_it(run, tiny_weights, tmp_path, monkeypatch):
    save = surface.save_png
    def full(pixels, path):
        if path.name == 'a_overlay.png': raise OSError(errno.ENOSPC, 'No space left on device')
        save(pixels, path)
    monkeypatch.setattr(surface, 'save_png', full)
    photo(tmp_path/'in'/'a.png'); photo(tmp_path/'in'/'b.png')
    assert run('segment', tmp_path/'in', '--out', tmp_path/'out', '--weights', tiny_weights.plain).code == 3
    assert 'No space left' in read_csv(tmp_path/'out'/'failures.csv')[0]['reason']
    assert names(tmp_path/'out') == ['b_mask.png', 'b_overlay.png', 'failures.csv', 'severity.csv']


@pytest.mark.parametrize('error', [RuntimeError('not enough memory: you tried to allocate 9 bytes'), ValueError('odd\nvalue'), MemoryError()], ids=lambda e: type(e).__name__)
def test_an_unforeseen_error_costs_one_photo_not_the_run(run, tiny_weights, tmp_path, monkeypatch, error):
    read = surface.read_image
    def odd(path, **how):
        if path.name == 'a.png': raise error
        return read(path, **how)
    monkeypatch.setattr(surface, 'read_image', odd)
    photo(tmp_path/'in'/'a.png'); photo(tmp_path/'in'/'b.png')
    assert run('segment', tmp_path/'in', '--out', tmp_path/'out', '--weights', tiny_weights.plain).code == 3
    (failure,), (row,) = read_csv(tmp_path/'out'/'failures.csv'), read_csv(tmp_path/'out'/'severity.csv')
    assert 'a.png' in failure['reason'] and '\n' not in failure['reason'] and row['file'].endswith('b.png')


def test_stopped_by_hand_keeps_what_is_done(run, tiny_weights, tmp_path, monkeypatch):
    read = surface.read_image
    def stop(path, **how):
        if path.name == 'b.png': raise KeyboardInterrupt
        return read(path, **how)
    monkeypatch.setattr(surface, 'read_image', stop)
    for name in 'abc': photo(tmp_path/'in'/f'{name}.png')
    assert run('segment', tmp_path/'in', '--out', tmp_path/'out', '--weights', tiny_weights.plain).code == 130
    assert [Path(r['file']).name for r in read_csv(tmp_path/'out'/'severity.csv')] == ['a.png'] and not left_over(tmp_path/'out')


def test_installed_command_with_a_bad_file(run_process, tiny_weights, tmp_path):
    photo(tmp_path/'in'/'good.png')
    (tmp_path/'in'/'bad.png').write_bytes(b'')
    r = run_process('segment', 'in', '--out', 'out', '--weights', tiny_weights.cracked, cwd=tmp_path)
    assert r.code == 3 and 'bad.png' in r.output and '1 images done, 1 failed' in r.output
    assert names(tmp_path/'out') == ['failures.csv', 'good_mask.png', 'good_overlay.png', 'severity.csv']


def test_installed_command_says_its_version(run_process, tmp_path):
    from crackxai import __version__
    r = run_process('--version', cwd=tmp_path)
    assert r.code == 0 and __version__ in r.output


def test_installed_command_with_bad_usage(run_process, tmp_path):
    r = run_process('segment', 'x.png', '--out', 'out', '--weights', 'no_such_net', cwd=tmp_path)
    assert r.code == 2 and 'no such weights' in error_line(r.output) and not (tmp_path/'out').exists()


def test_a_name_with_a_leading_dash(run, tiny_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path/'-w.png')
    assert run('segment', '--out', 'out', '--weights', tiny_weights.plain, '--', '-w.png').code == 0
    assert (tmp_path/'out'/'-w_mask.png').is_file()


def test_opening_weights_leaves_the_random_numbers_alone_and_builds_nothing_large(tiny_weights):
    "The file decides every number, so nothing is drawn, and a small network takes little time."
    import time
    from crackxai.models.classify import load_weights
    torch.manual_seed(0)
    before, start = torch.get_rng_state(), time.process_time()
    load_weights(tiny_weights.plain)
    assert torch.equal(torch.get_rng_state(), before) and time.process_time() - start < .5
