"Every fault of an output folder and of a parameter, for every command: one line that names it, the exit code of the contract, nothing half-written."
import ctypes, os, subprocess, sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np, pytest
from PIL import Image

from conftest import error_line, left_over, photo
from crackxai.core import read_csv
from test_growth import table
from test_locate import plates, stored as plate, wave_weights
from test_tip import made, stored as field, tip_weights

linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='Linux only')


@pytest.fixture(scope='session')
def inputs(tmp_path_factory, tiny_weights, tip_weights, wave_weights, made, plates):
    "One good input for each command: its arguments without --out."
    d = tmp_path_factory.mktemp('inputs')
    wall, stage, waves = photo(d/'wall.png'), field(d/'stage.npz', made[0]), plate(d/'plate.npz', plates[1], plates[0])
    for label in ('crack', 'intact'): [photo(d/'own'/label/f'{k}.png', 32, 32, seed=k) for k in range(12)]
    return dict(segment=['segment', wall, '--weights', tiny_weights.cracked], tip=['tip', stage, '--weights', tip_weights.middle],
                locate=['locate', waves, '--weights', wave_weights.crack], align=['align', wall, '--reference', wall],
                growth=['growth', table(d/'severity.csv', [1, 2, 4, 5], times=range(4)), '--time', 'day'],
                walls=['data', 'make', 'walls', '--n', 1, '--size', 32], dic=['data', 'make', 'dic', '--n', 1, '--size', 16],
                train=['train', 'surface', '--images', d/'own', '--profile', 'quick'])


COMMANDS = ['segment', 'tip', 'locate', 'align', 'growth', 'walls', 'dic', 'train']
def target(command, folder): return folder/'w.safetensors' if command == 'train' else folder      # train names a file


@contextmanager
def without_privileges():
    "Permissions hold for root as for everyone."
    class Header(ctypes.Structure): _fields_ = [('version', ctypes.c_uint32), ('pid', ctypes.c_int)]
    class Sets(ctypes.Structure): _fields_ = [('effective', ctypes.c_uint32), ('permitted', ctypes.c_uint32), ('inheritable', ctypes.c_uint32)]
    libc, header, sets = ctypes.CDLL(None, use_errno=True), Header(0x20080522, 0), (Sets*2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    before = sets[0].effective
    sets[0].effective &= ~0b1110                                  # dac_override, dac_read_search, fowner
    assert libc.capset(ctypes.byref(header), sets) == 0
    try: yield
    finally:
        sets[0].effective = before
        assert libc.capset(ctypes.byref(header), sets) == 0


@contextmanager
def small_disk(place, size):
    "A file system of so many bytes, mounted at `place`."
    place.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', place], capture_output=True)
    if mounted.returncode: pytest.skip('no right to mount a small file system: the test of a full disk is not run')
    try: yield place
    finally: subprocess.run(['umount', '-l', place], check=True)


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('kind', ['a file', 'below a file'])
def test_out_is_a_file(run, inputs, tmp_path, said, command, kind):
    "One line, exit code 2; the file is left as it was."
    (tmp_path/'out').write_text('mine')
    out = target(command, tmp_path/'out' if kind == 'a file' else tmp_path/'out'/'below')
    r = run(*inputs[command], '--out', out)
    said(r.output.strip().splitlines()[-1])
    assert r.code == 2 and str(tmp_path/'out') in error_line(r.output) and '; ' in error_line(r.output)
    assert [p.name for p in tmp_path.iterdir()] == ['out'] and (tmp_path/'out').read_text() == 'mine'


@linux
@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('kind', ['read-only', 'below a read-only one'])
def test_out_is_read_only(run, inputs, tmp_path, said, command, kind):
    "One line, exit code 2; permissions hold for root, too."
    (tmp_path/'closed').mkdir()
    (tmp_path/'closed').chmod(0o555)
    with without_privileges(): r = run(*inputs[command], '--out', target(command, tmp_path/'closed' if kind == 'read-only' else tmp_path/'closed'/'out'))
    said(r.output.strip().splitlines()[-1])
    assert r.code == 2 and 'closed' in error_line(r.output) and '; ' in error_line(r.output) and not any((tmp_path/'closed').iterdir())


@linux
@pytest.mark.parametrize('command', [c for c in COMMANDS if c != 'train'])
def test_disk_is_full(run, inputs, tmp_path, said, command):
    "Not one byte is free: one line, and nothing half-written."
    with small_disk(tmp_path/'disk', '64k') as disk:
        (disk/'out').mkdir()
        fill = os.open(disk/'fill', os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError):
            while True: os.write(fill, bytes(4096))
        os.close(fill)
        r = run(*inputs[command], '--out', disk/'out')
        said(r.output.strip().splitlines()[-1])
        assert r.code == 2 and str(disk/'out') in error_line(r.output) and 'No space left' in error_line(r.output) and '; ' in error_line(r.output), r.output
        assert not left_over(disk/'out') and not [p for p in (disk/'out').iterdir() if p.stat().st_size == 0]


@linux
def test_a_photo_whose_results_do_not_fit_costs_that_photo(run, tiny_weights, tmp_path):
    "The large one in the middle is named; the small ones before and after it are done."
    noise = lambda side: np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    for name, side in [('a', 32), ('b', 300), ('c', 32)]: Image.fromarray(noise(side)).save((tmp_path/f'{name}.png'))
    with small_disk(tmp_path/'disk', '120k') as disk:
        r = run('segment', *(tmp_path/f'{n}.png' for n in 'abc'), '--out', disk/'out', '--weights', tiny_weights.intact)
        (failure,) = read_csv(disk/'out'/'failures.csv')
        assert r.code == 3 and failure['file'].endswith('b.png') and 'No space left' in failure['reason'] and '; ' in failure['reason']
        assert [Path(row['file']).stem for row in read_csv(disk/'out'/'severity.csv')] == ['a', 'c'] and not left_over(disk/'out')
        assert sorted(p.name for p in (disk/'out').glob('*.png')) == ['a_mask.png', 'a_overlay.png', 'c_mask.png', 'c_overlay.png']


@linux
def test_training_on_a_full_disk_is_one_line(run, inputs, tmp_path, monkeypatch):
    from crackxai import train_surface as owner
    monkeypatch.setattr(owner, 'three_parts', lambda group, label: [np.arange(len(label))]*3)      # few images do here
    with small_disk(tmp_path/'disk', '64k') as disk:
        r = run(*inputs['train'], '--out', disk/'w.safetensors')
        assert r.code == 2 and str(disk) in error_line(r.output) and 'No space left' in error_line(r.output), r.output
        assert not left_over(disk) and not (disk/'w.safetensors').exists()


@linux
@pytest.mark.parametrize('command', ['segment', 'tip', 'locate', 'align', 'growth', 'train'])
def test_an_input_that_may_not_be_read(run, inputs, tmp_path, command):
    "Beside a good file it is a failure; alone, or as the table that a whole call needs, it is told all the same."
    import shutil
    source = Path(inputs[command][1] if command != 'train' else inputs[command][3])
    if command == 'train': shutil.copytree(source, tmp_path/'in'); closed = tmp_path/'in'/'crack'/'3.png'
    else: closed = Path(shutil.copy(source, tmp_path/f'closed{source.suffix}'))
    closed.chmod(0)
    args = [tmp_path/'in' if a == source else a for a in inputs[command]] if command == 'train' else [inputs[command][0], *([source] if command != 'growth' else []), closed, *inputs[command][2:]]
    if command == 'train': closed = tmp_path/'in'/'crack'; closed.chmod(0)                        # the folder itself
    try:
        with without_privileges(): r = run(*args, '--out', target(command, tmp_path/'out') if command != 'train' else tmp_path/'w.safetensors')
    finally: closed.chmod(0o755)
    lines = [line for line in r.output.splitlines() if closed.name in line and ('ermission' in line or 'may not' in line)]
    assert r.code == (2 if command in ('growth', 'train') else 3) and lines, r.output


MISSPELT = {
    'command': ['segmnet', 'x.png', '--out', 'o'], 'subcommand of data': ['data', 'fetsh', 'masonry'], 'subcommand of train': ['train', 'surfaces'],
    'segment': ['segment', 'x.png', '--out', 'o', '--wieghts', 'masonry'], 'tip': ['tip', 'x.npz', '--out', 'o', '--field-of-veiw-mm', '70'],
    'locate': ['locate', 'x.npz', '--out', 'o', '--weight', 'wave', '--reference', 'r'], 'align': ['align', 'x.png', '--out', 'o', '--referense', 'x.png'],
    'growth': ['growth', 's.csv', '--out', 'o', '--times', 't.csv'], 'train surface': ['train', 'surface', '--image', 'd', '--outt', 'w.safetensors'],
    'data fetch': ['data', 'fetch', 'masonry', '--foldr', 'd'], 'data verify': ['data', 'verify', 'masonry', '--folder', 'd'], 'data make walls': ['data', 'make', 'walls', '--N', '3'],
}


@pytest.mark.parametrize('where', MISSPELT)
def test_a_misspelt_word_is_bad_usage_and_is_named(run, tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    r = run(*MISSPELT[where])
    assert r.code == 2 and 'No such' in r.output and r.output.strip().splitlines()[-1].startswith('Error: ') and not list(tmp_path.iterdir())


MISTYPED = {
    'segment scale': (['segment', '--mm-per-px=0,43'], 'mm-per-px'), 'segment workers': (['segment', '--workers=two'], 'workers'), 'segment no workers': (['segment', '--workers=0'], 'workers'),
    'tip view': (['tip', '--field-of-view-mm=70mm'], 'field-of-view-mm'), 'tip side': (['tip', '--side=Right'], 'side'), 'tip workers': (['tip', '--workers=-1'], 'workers'),
    'locate workers': (['locate', '--workers=1.5'], 'workers'), 'walls number': (['data', 'make', 'walls', '--n=3.0'], '--n'), 'dic size': (['data', 'make', 'dic', '--n=1', '--size=4'], 'size'),
    'wave share': (['data', 'make', 'wave', '--n=1', '--intact=half'], 'intact'), 'train profile': (['train', 'surface', '--profile=fast'], 'profile'), 'train seed': (['train', 'surface', '--seed=-1'], 'seed'),
    'segment method': (['segment', '--method=lpr'], 'lrp'), 'segment threshold': (['segment', '--threshold=.5'], 'gmm'),
}


@pytest.mark.parametrize('what', MISTYPED)
def test_a_mistyped_value_is_bad_usage_and_is_named(run, inputs, tmp_path, what):
    args, word = MISTYPED[what]
    r = run(*args, *(inputs.get(args[0], [None])[1:] if args[0] != 'train' else inputs['train'][2:4]), '--out', tmp_path/'out')
    assert r.code == 2 and word in r.output.strip().splitlines()[-1] and not (tmp_path/'out').exists(), r.output


@pytest.mark.parametrize('command', COMMANDS)
def test_without_out_or_input_the_call_is_bad_usage(run, inputs, tmp_path, monkeypatch, command):
    if command in ('walls', 'dic'): pytest.skip('has a folder by default')
    monkeypatch.chdir(tmp_path)
    assert run(*inputs[command]).code == 2 and run(inputs[command][0]).code in (0, 2) and not list(tmp_path.iterdir())
