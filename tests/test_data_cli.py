"The command `crackxai data` and the readers behind it, without a network."
import shutil, socket, subprocess, sys, zipfile
from pathlib import Path

import numpy as np, pytest
from PIL import Image

from conftest import error_line, left_over
from crackxai.core import InputError, read_csv
from crackxai.data import fetch
from crackxai.data.surface import Item, cut_tiles, dic_cracks, magnetic_tile, masonry, read_mask
from crackxai.data.walls import make_walls

SETS = ['masonry', 'magnetic_tile', 'fatigue_dic', 'nodemaps', 'dic_cracks', 'fatigue_dic_full', 'crackmnist']
IMAGES, MASKS = 'crack_detection_224_images', 'crack_detection_224_masks'


@pytest.fixture
def data_home(checkout, monkeypatch, tmp_path):
    "An empty folder for data sets."
    monkeypatch.setenv('CRACKXAI_DATA', str(tmp_path/'data'))
    monkeypatch.setattr(fetch.time, 'sleep', lambda seconds: None)      # no pauses between tries
    (tmp_path/'data').mkdir()
    return tmp_path/'data'


@pytest.fixture(scope='session')
def walls(tmp_path_factory):
    folder = tmp_path_factory.mktemp('walls')
    make_walls(folder, 3, size=64)
    return folder


def everything(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def test_the_guard_stops_what_leaves_this_machine(no_network):
    for reach in (lambda: socket.create_connection(('192.0.2.1', 80), timeout=1), lambda: socket.getaddrinfo('zenodo.org', 443)):
        with pytest.raises(no_network): reach()
    with socket.create_server(('127.0.0.1', 0)) as here: socket.create_connection(here.getsockname(), timeout=5).close()


def test_the_guard_holds_in_processes_of_their_own(run_process):
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    assert 'NetworkUsed' in subprocess.run([sys.executable, '-c', code], env=run_process.env, capture_output=True, text=True).stderr


def test_list_names_every_set_with_its_origin_and_place(run, data_home):
    (data_home/'masonry').mkdir()
    r = run('data', 'list')
    assert r.code == 0
    assert {line.split()[0] for line in r.output.splitlines() if line[:1].strip()} == set(SETS)
    assert str(data_home/'masonry') in r.output and r.output.count('not here') == len(SETS) - 1
    assert 'GPL-3.0' in r.output and 'https://github.com/dimitrisdais/crack_detection_CNN_masonry' in r.output


def test_verify_reports_what_is_missing(run, data_home, walls):
    shutil.copytree(walls, data_home/'masonry')
    r = run('data', 'verify', 'masonry')
    assert r.code == 3 and 'not complete' in r.output and '237 of 240 published images are not here' in r.output


def test_verify_names_each_broken_file_and_goes_on(run, data_home, walls):
    shutil.copytree(walls, data_home/'masonry')
    (data_home/'masonry'/IMAGES/'wall0_0_0.png').write_bytes(b'')
    Image.new('L', (9, 8)).save(data_home/'masonry'/MASKS/'wall0_0_1.png')
    r = run('data', 'verify', 'masonry')
    assert r.code == 3 and 'wall0_0_0.png: the file is empty' in r.output
    assert 'wall0_0_1.png: the mask is 9 x 8 px, its image 64 x 64' in r.output


@pytest.mark.parametrize('command', ['verify', 'fetch'])
def test_an_unknown_set_is_bad_usage_and_the_names_are_told(run, data_home, command):
    r = run('data', command, 'nonsense')
    assert r.code == 2 and all(name in error_line(r.output) for name in ['nonsense', *SETS])


def test_verify_of_a_set_that_is_not_here_says_how_to_get_it(run, data_home):
    r = run('data', 'verify', 'masonry')
    assert r.code == 2 and 'crackxai data fetch masonry' in error_line(r.output) and str(data_home/'masonry') in r.output


@pytest.mark.parametrize('name', SETS)
def test_without_a_network_fetch_says_where_to_put_the_file(run, data_home, name):
    r = run('data', 'fetch', name)
    assert r.code == 2 and f'put the file here yourself: {data_home/name}' in error_line(r.output)
    assert not any(data_home.iterdir())                                   # nothing half-written


def archive(path, *sources, **more):
    with zipfile.ZipFile(path, 'w') as z:
        for source in sources:
            for p in sorted(source.rglob('*.png')): z.write(p, f'repo-main/{p.relative_to(source.parent)}')
        for name, text in more.items(): z.writestr(name.replace('__', '/'), text)


def test_the_advice_works_an_archive_put_there_by_hand_is_used(run, data_home, walls):
    (data_home/'masonry').mkdir()
    archive(data_home/'masonry'/'crack_detection_CNN_masonry-main.zip', walls/IMAGES, walls/MASKS)
    assert run('data', 'fetch', 'masonry').code == 0
    assert len(masonry(data_home/'masonry')) == 3
    assert {k: v for k, v in everything(data_home/'masonry').items() if k.endswith('.png')} == {k: v for k, v in everything(walls).items() if k.endswith('.png')}
    assert not left_over(data_home)
    assert run('data', 'fetch', 'masonry').code == 0                      # the second time there is nothing to do


@pytest.mark.parametrize('kind', ['truncated', 'a web page', 'points outside'])
def test_an_archive_that_cannot_be_used_leaves_nothing(run, data_home, walls, kind):
    home = data_home/'masonry'
    home.mkdir()
    path = home/'main.zip'
    archive(path, walls/IMAGES, walls/MASKS, **({'..__..__evil.png': 'x'} if kind == 'points outside' else {}))
    if kind == 'truncated': path.write_bytes(path.read_bytes()[:-200])
    if kind == 'a web page': path.write_text('<html>404</html>')
    before = everything(data_home.parent)
    r = run('data', 'fetch', 'masonry')
    assert r.code == 2 and 'main.zip' in error_line(r.output) and everything(data_home.parent) == before


def test_make_walls_goes_on_where_it_stopped_with_the_same_bytes(run, tmp_path):
    make = lambda folder, n: run('data', 'make', 'walls', '--n', n, '--size', 64, '--out', folder)
    assert make(tmp_path/'a', 3).code == 0
    whole = everything(tmp_path/'a')
    assert sorted(whole) == sorted(['walls.csv', *(f'{f}/wall0_0_{i}.png' for f in (IMAGES, MASKS) for i in range(3))])
    kept = (tmp_path/'a'/IMAGES/'wall0_0_0.png').stat().st_mtime_ns
    (tmp_path/'a'/IMAGES/'wall0_0_1.png').unlink(); (tmp_path/'a'/MASKS/'wall0_0_2.png').unlink(); (tmp_path/'a'/'walls.csv').unlink()
    assert make(tmp_path/'a', 3).code == 0 and everything(tmp_path/'a') == whole
    assert (tmp_path/'a'/IMAGES/'wall0_0_0.png').stat().st_mtime_ns == kept
    assert [r['label'] for r in read_csv(tmp_path/'a'/'walls.csv')] == ['0', '1', '0']


def test_make_walls_repairs_a_truncated_picture(run, walls, tmp_path):
    shutil.copytree(walls, tmp_path/'w')
    for folder in (IMAGES, MASKS):
        path = tmp_path/'w'/folder/'wall0_0_1.png'
        path.write_bytes(path.read_bytes()[:len(path.read_bytes())//2])
    assert run('data', 'make', 'walls', '--n', 3, '--size', 64, '--out', tmp_path/'w').code == 0
    assert everything(tmp_path/'w') == everything(walls)


@pytest.mark.parametrize('options', [['--n', '0'], ['--n', 'three'], [], ['--n', '1', '--size', '8'], ['--n', '1', '--seed', '-1']], ids=' '.join)
def test_make_walls_with_bad_numbers_is_bad_usage(run, tmp_path, options):
    r = run('data', 'make', 'walls', '--out', tmp_path/'w', *options)
    assert r.code == 2 and not list(tmp_path.rglob('*.png'))


def test_make_walls_into_a_file_is_bad_usage(run, tmp_path):
    (tmp_path/'w').write_text('mine')
    assert run('data', 'make', 'walls', '--n', 1, '--out', tmp_path/'w').code == 2 and (tmp_path/'w').read_text() == 'mine'


def said(call):
    "The one line of an InputError."
    with pytest.raises(InputError) as caught: call()
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_a_mask_of_another_size_names_the_mask_and_both_sizes(walls, tmp_path):
    shutil.copytree(walls, tmp_path/'w')
    Image.new('L', (50, 64)).save(tmp_path/'w'/MASKS/'wall0_0_1.png')
    line = said(lambda: cut_tiles(masonry(tmp_path/'w')))
    assert MASKS in line and 'wall0_0_1.png' in line and '50 x 64' in line and '64 x 64' in line and 'pair each mask' in line
    assert read_mask(walls/MASKS/'wall0_0_1.png', (64, 64)).any()


def test_a_missing_mask_names_its_picture_and_the_remedy(walls, tmp_path):
    shutil.copytree(walls, tmp_path/'w')
    (tmp_path/'w'/MASKS/'wall0_0_2.png').unlink()
    line = said(lambda: masonry(tmp_path/'w'))
    assert str(tmp_path/'w') in line and 'wall0_0_2.png' in line and 'unpack' in line


@pytest.mark.parametrize('missing', [IMAGES, MASKS])
@pytest.mark.parametrize('how', ['missing', 'empty'])
def test_a_missing_or_empty_folder_is_named(walls, tmp_path, missing, how):
    shutil.copytree(walls, tmp_path/'w')
    shutil.rmtree(tmp_path/'w'/missing)
    if how == 'empty': (tmp_path/'w'/missing).mkdir()
    line = said(lambda: masonry(tmp_path/'w'))
    assert str(tmp_path/'w'/missing) in line and ('crackxai data list' in line if how == 'missing' else 'unpack' in line)


@pytest.mark.parametrize('reader', [masonry, magnetic_tile, dic_cracks], ids=lambda r: r.__name__)
def test_every_reader_names_a_folder_that_holds_nothing(reader, tmp_path):
    for folder in (tmp_path, tmp_path/'none'):
        line = said(lambda: reader(folder))
        assert str(folder) in line and '; ' in line


@pytest.mark.parametrize('crack', [False, True])
def test_tiles_of_one_class_only(tmp_path, crack):
    Image.new('L', (64, 64), 200).save(tmp_path/'w.png'); Image.new('L', (64, 64), 255*crack).save(tmp_path/'m.png')
    line = said(lambda: cut_tiles([Item(tmp_path/'w.png', tmp_path/'m.png', 'w', 'crack')]))
    assert str(tmp_path) in line and 'one class only' in line and 'cracked and intact' in line


def test_no_items_at_all():
    assert 'images' in said(lambda: cut_tiles([]))
