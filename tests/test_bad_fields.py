"Every fault of a field, a plate, a weights file and an archive that test_tip, test_locate and test_data_cli do not try: one line, and the file beside it is done."
import io, json, os, pickle, stat, struct, sys, tarfile, zipfile
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import save_file

from conftest import error_line, left_over, photo
from crackxai.core import read_csv
from crackxai.data.nodemap import NodeMap, write_nodemap
from test_data_cli import data_home, everything, walls
from test_locate import plates, stored as plate, wave_weights
from test_segment import Evil
from test_tip import made, node_map, stored as field, text, tip_weights

posix = pytest.mark.skipif(sys.platform == 'win32', reason='no such name or link on Windows')


def npz(path, **headers):
    "An .npz whose arrays are headers of the given shape with hardly any data behind them."
    with zipfile.ZipFile(path, 'w') as z:
        for name, shape in headers.items():
            memory = io.BytesIO()
            np.lib.format.write_array_header_1_0(memory, dict(descr='<f8', fortran_order=False, shape=shape))
            z.writestr(f'{name}.npy', memory.getvalue() + bytes(64))


def declared(path, gigabytes):
    "The sizes in a zip's directory replaced: a small file that says it unpacks to so much in each member."
    data = path.read_bytes()
    at = data.find(b'PK\1\2')
    while at >= 0:
        data = data[:at + 24] + struct.pack('<I', int(gigabytes*2**30)) + data[at + 28:]
        at = data.find(b'PK\1\2', at + 4)
    path.write_bytes(data)


def bomb(write):
    def make(path, *given): write(path, *given); declared(path, 3.9)
    return make


# name of the file, how it is made of two good arrays (a field, or waves and reference), what its line must say
COMMON = {
    'another kind of file with that name': ('x.npz', lambda path, *a: Image.new('L', (9, 9)).save(path, 'PNG'), 'npz'),
    'a header that declares 8 terabytes': ('x.npz', lambda path, *a: npz(path, displacement_mm=(2, 10**6, 10**6), field_of_view_mm=(), waves=(2, 10**10, 9, 9)), 'x.npz'),
    'a header that declares more than there is': ('x.npz', lambda path, *a: npz(path, displacement_mm=(2, 99, 99), field_of_view_mm=(), waves=(2, 2000, 9, 9)), 'x.npz'),
    'an archive without arrays': ('x.npz', lambda path, *a: zipfile.ZipFile(path, 'w').close(), 'x.npz'),
    'an archive of text': ('x.npz', lambda path, *a: text_zip(path, **{'displacement_mm.npy': 'one', 'field_of_view_mm.npy': 'two', 'waves.npy': 'three'}), 'x.npz'),
    'a member with a path': ('x.npz', lambda path, *a: text_zip(path, **{'../../evil.npy': 'one'}), 'x.npz'),
    'a link to itself': ('x.npz', lambda path, *a: path.symlink_to(path.name), 'x.npz'),
    'a folder': ('x.npz', lambda path, *a: path.mkdir(), None),
    'an unknown suffix': ('x.mat', lambda path, *a: path.write_bytes(b'MATLAB 5.0'), 'x.mat'),
    'spaces and umlauts in a bad name': ('Stufe 1 größer.npz', lambda path, *a: path.write_bytes(b'no'), 'Stufe 1 größer.npz'),
    'a newline in a bad name': ('a\nb.npz', lambda path, *a: path.write_bytes(b'no'), 'a b.npz'),
    'a leading dash in a bad name': ('-x.npz', lambda path, *a: path.write_bytes(b'no'), '-x.npz'),
}
FIELDS = COMMON | {
    'a bomb': ('x.npz', bomb(field), 'would unpack'),
    'doubled nodes only': ('x.txt', lambda path, u: write_nodemap(path, NodeMap(*np.ones((4, 200)))), 'too few'),
    'two points': ('x.txt', text(lambda t: '\n'.join(t.splitlines()[:3])), 'too few'),
    'nodes in one line': ('x.txt', lambda path, u: write_nodemap(path, NodeMap(np.linspace(0, 70, 99), np.zeros(99), *np.random.default_rng(0).normal(0, .01, (2, 99)))), 'line'),
    'metres for millimetres': ('x.txt', text(lambda t: '\n'.join(' ; '.join([f'{float(c)/1000:.10f}' if k in (1, 2) else c for k, c in enumerate(line.split(';'))]) if line[:1].isdigit() else line for line in t.splitlines())), 'coordinates in m'),
    'a unit in inches': ('x.txt', text(lambda t: t.replace('u [mm]', 'u [in]')), 'unit [in]'),
    'every row without numbers': ('x.txt', text(lambda t: '\n'.join(line if line[:1] == '#' else '1; nan; nan; nan; nan; nan; nan' for line in t.splitlines())), 'x.txt'),
    'points and commas': ('x.txt', text(lambda t: t.replace('; 0.', '; 0,', 9)), 'line 2: could not convert'),
    'nothing but commas': ('x.txt', text(lambda t: t.replace('.', ',').replace('; ', ',')), 'cannot be told'),
    'a missing column in one line': ('x.txt', text(lambda t: '\n'.join(line.rpartition(';')[0] if i == 40 else line for i, line in enumerate(t.splitlines()))), 'line 41 holds'),
    'a word among the numbers': ('x.txt', text(lambda t: '\n'.join(line.rpartition(';')[0] + '; high' if i == 40 else line for i, line in enumerate(t.splitlines()))), 'line 41'),
    'UTF-16': ('x.txt', lambda path, u: (node_map(path, u), path.write_text(path.read_text(), encoding='utf-16')), 'not plain text'),
    'a picture as text': ('x.txt', lambda path, u: Image.new('L', (99, 99)).save(path, 'PNG'), 'not plain text'),
}
PLATES = COMMON | {'a bomb': ('x.npz', bomb(plate), 'would unpack'), 'a field in place of waves': ('x.npz', lambda path, *a: field(path, np.zeros((2, 48, 48))), 'waves')}


def text_zip(path, **members):
    with zipfile.ZipFile(path, 'w') as z:
        for name, text in members.items(): z.writestr(name, text)


@posix
@pytest.mark.parametrize('command, fault', [('tip', f) for f in FIELDS] + [('locate', f) for f in PLATES])
def test_fault_beside_a_good_file(run, tip_weights, wave_weights, made, plates, tmp_path, said, command, fault):
    "Its line names file, reason and remedy; the file beside it is done."
    name, make, why = (FIELDS if command == 'tip' else PLATES)[fault]
    bad, out, table = tmp_path/'in'/name, tmp_path/'out', 'tips.csv' if command == 'tip' else 'boxes.csv'
    good = field(tmp_path/'in'/'good.npz', made[0]) if command == 'tip' else plate(tmp_path/'in'/'good.npz', plates[1], plates[0])
    make(bad, made[1]) if command == 'tip' else make(bad, plates[2], plates[0])
    r = run(command, '--out', out, '--weights', tip_weights.middle if command == 'tip' else wave_weights.crack, '--', bad, good)
    assert [row['file'] for row in read_csv(out/table)] == [str(good)] and not left_over(out)
    (failure,) = read_csv(out/'failures.csv')
    said(failure['reason'])
    assert r.code == 3 and failure['file'] == str(bad) and ' '.join(name.split()) in failure['reason'] and '\n' not in failure['reason'] and len(failure['reason']) < 400
    assert (why or 'holds no') in failure['reason'], failure['reason']


@pytest.mark.parametrize('command', ['tip', 'locate'])
def test_a_folder_of_mixed_types(run, tip_weights, wave_weights, made, plates, tmp_path, command):
    "Only what a command reads is looked at; what has the right suffix and the wrong content is named."
    field(tmp_path/'in'/'a.npz', made[0]); plate(tmp_path/'in'/'b.npz', plates[1], plates[0]); node_map(tmp_path/'in'/'deep'/'c.txt', made[0]); photo(tmp_path/'in'/'d.png')
    (tmp_path/'in'/'notes.md').write_text('notes')
    r = run(command, tmp_path/'in', '--out', tmp_path/'out', '--weights', tip_weights.middle if command == 'tip' else wave_weights.crack)
    done = {Path(row['file']).name for row in read_csv(tmp_path/'out'/('tips.csv' if command == 'tip' else 'boxes.csv'))}
    failed = {Path(row['file']).name for row in read_csv(tmp_path/'out'/'failures.csv')}
    assert r.code == 3 and (done, failed) == (({'a.npz', 'c.txt'}, {'b.npz'}) if command == 'tip' else ({'b.npz'}, {'a.npz'}))


def with_header(change):
    "The good file, its header changed by a function of (spec, card)."
    def write(path, good):
        from safetensors import safe_open
        with safe_open(good, 'pt') as f: header, state = json.loads(f.metadata()['crackxai']), {k: f.get_tensor(k) for k in f.keys()}
        change(header)
        save_file(state, path, {'crackxai': json.dumps(header)})
    return write


def one_tensor(change):
    def write(path, good):
        from safetensors import safe_open
        with safe_open(good, 'pt') as f: header, state = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
        key = max(state, key=lambda k: state[k].numel())
        change(state, key)
        save_file(state, path, header)
    return write


WEIGHTS = {
    'empty': (lambda path, good: path.write_bytes(b''), 'not a safetensors file'),
    'truncated': (lambda path, good: path.write_bytes(good.read_bytes()[:-999]), 'not a safetensors file'),
    'a header that declares 10^18 bytes': (lambda path, good: path.write_bytes(struct.pack('<Q', 10**18) + good.read_bytes()[8:]), 'not a safetensors file'),
    'a pickle': (lambda path, good: path.write_bytes(pickle.dumps(Evil(path.parent/'ran'))), 'never opened'),
    'a torch pickle': (lambda path, good: torch.save(Evil(path.parent/'ran'), path), 'never opened'),
    'an npz': (lambda path, good: np.savez(open(path, 'wb'), a=np.zeros(3)), 'not a safetensors file'),
    'of another program': (lambda path, good: save_file({'a': torch.zeros(2)}, path, {'format': 'pt'}), 'another program'),
    'an unknown network': (with_header(lambda h: h['spec'].update(architecture='resnet')), 'resnet'),
    'an unknown option of the network': (with_header(lambda h: h['spec'].update(colour='red')), 'colour'),
    'a missing tensor': (one_tensor(lambda state, key: state.pop(key)), 'do not fit'),
    'a tensor of another shape': (one_tensor(lambda state, key: state.update({key: state[key][:1].clone()})), 'do not fit'),
    'a tensor with NaN': (one_tensor(lambda state, key: state[key].view(-1)[0].fill_(float('nan'))), 'NaN'),
    'a link to itself': (lambda path, good: path.symlink_to(path.name), 'no such weights'),
}


@posix
@pytest.mark.parametrize('command', ['segment', 'tip', 'locate'])
@pytest.mark.parametrize('kind', WEIGHTS)
def test_weights_that_cannot_be_used(run, tiny_weights, tip_weights, wave_weights, made, tmp_path, said, command, kind):
    "One line, exit code 2; nothing in the file is run, nothing is written."
    make, why = WEIGHTS[kind]
    make(tmp_path/'w.safetensors', dict(segment=tiny_weights.plain, tip=tip_weights.plain, locate=wave_weights.crack)[command])
    r = run(command, photo(tmp_path/'w.png'), '--out', tmp_path/'out', '--weights', tmp_path/'w.safetensors')
    said(r.output.strip().splitlines()[-1])
    assert r.code == 2 and why in error_line(r.output) and 'w.safetensors' in error_line(r.output) and '; ' in error_line(r.output), r.output
    assert not (tmp_path/'ran').exists() and not (tmp_path/'out').exists()


@pytest.mark.parametrize('command, other', [(a, b) for a in ('segment', 'tip', 'locate') for b in ('segment', 'tip', 'locate') if a != b])
def test_weights_of_another_command(run, tiny_weights, tip_weights, wave_weights, tmp_path, command, other):
    path = dict(segment=tiny_weights.plain, tip=tip_weights.plain, locate=wave_weights.crack)[other]
    r = run(command, photo(tmp_path/'w.png'), '--out', tmp_path/'out', '--weights', path)
    assert r.code == 2 and path.name in error_line(r.output) and 'this command takes' in error_line(r.output) and not (tmp_path/'out').exists()


def linked(path):
    "A zip that unpacks a link."
    with zipfile.ZipFile(path, 'w') as z:
        link = zipfile.ZipInfo('repo/crack_detection_224_images/a.png')
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        z.writestr(link, '/etc/passwd')


def archive(*names):
    return lambda path: text_zip(path, **{n: 'x' for n in names})


def zip_bomb(path):
    "Twelve members that each declare 3.9 GiB."
    archive(*(f'repo/crack_detection_224_images/{k}.png' for k in range(12)))(path)
    declared(path, 3.9)


def lying_bomb(path):
    "Declares ten bytes and unpacks to ten million."
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name in ('crack_detection_224_images/a.png', 'crack_detection_224_masks/a.png'): z.writestr(name, bytes(10**7))
    declared(path, 10/2**30)


def encrypted(path):
    archive('crack_detection_224_images/a.png')(path)
    data = bytearray(path.read_bytes())
    data[6] |= 1; data[data.find(b'PK\1\2') + 8] |= 1
    path.write_bytes(data)


def damaged(path):
    with zipfile.ZipFile(path, 'w') as z: z.writestr('crack_detection_224_images/a.png', bytes(range(256))*40); z.writestr('crack_detection_224_masks/a.png', b'x')
    data = bytearray(path.read_bytes()); data[500] ^= 255
    path.write_bytes(data)


def tar_of(**attributes):
    def make(path):
        with tarfile.open(path, 'w') as t:
            member = tarfile.TarInfo(attributes.get('name', 'crack_detection_224_images/a.png'))
            for key, value in attributes.items(): setattr(member, key, value)
            t.addfile(member)
    return make


ARCHIVES = {
    'a link': (linked, 'a link or a device'), 'a link in a tar': (tar_of(type=tarfile.SYMTYPE, linkname='/etc/passwd'), 'a link or a device'),
    'a hard link in a tar': (tar_of(type=tarfile.LNKTYPE, linkname='../../x'), 'a link or a device'), 'a device in a tar': (tar_of(type=tarfile.CHRTYPE, devmajor=1, devminor=3), 'a link or a device'),
    'a path upwards': (archive('repo/../../evil.png'), 'points outside'), 'an absolute path': (archive('/evil.png'), 'points outside'), 'a path upwards in a tar': (tar_of(name='../evil.png'), 'points outside'),
    'a drive of Windows': (archive('C:/evil.png'), 'points outside'), 'backslashes': (archive('..\\..\\evil.png'), 'points outside'),
    'a bomb': (zip_bomb, 'would unpack to more'), 'a bomb that lies about its size': (lying_bomb, 'is damaged'), 'a password': (encrypted, 'is damaged'), 'a changed byte': (damaged, 'is damaged'),
    'other content': (archive('README.md', 'code/main.py'), 'holds no crack_detection_224_images'), 'nothing': (archive(), 'holds no crack_detection_224_images'), 'an empty file': (lambda path: path.write_bytes(b''), 'neither a zip nor a tar'),
}


@posix
@pytest.mark.parametrize('kind', ARCHIVES)
def test_an_archive_that_may_not_be_unpacked(run, data_home, said, kind):
    "Nothing is written, inside the folder or outside."
    make, why = ARCHIVES[kind]
    (data_home/'masonry').mkdir()
    make(data_home/'masonry'/'main.zip')
    before = everything(data_home.parent)
    r = run('data', 'fetch', 'masonry')
    said(r.output.strip().splitlines()[-1])
    assert r.code == 2 and 'main.zip' in error_line(r.output) and why in error_line(r.output) and '; ' in error_line(r.output), r.output
    assert everything(data_home.parent) == before and os.listdir(data_home/'masonry') == ['main.zip']


def test_verify_names_every_fault_of_an_image_at_once(run, data_home, walls):
    import shutil
    from test_bad_input import FAULTS
    shutil.copytree(walls, data_home/'masonry')
    images = data_home/'masonry'/'crack_detection_224_images'
    (mask,) = sorted((data_home/'masonry'/'crack_detection_224_masks').iterdir())[:1]
    wrong = [(k, f) for k, f in enumerate(FAULTS) if FAULTS[f][2] is None and 'link' not in f and 'long' not in f]
    for k, fault in wrong:
        FAULTS[fault][1](images/f'bad_{k}{Path(FAULTS[fault][0]).suffix}')
        shutil.copy(mask, mask.parent/f'bad_{k}.png')
    r = run('data', 'verify', 'masonry')
    assert r.code == 3 and not [f for k, f in wrong if f'bad_{k}.' not in r.output] and 'wall0' not in r.output
