"Killed without warning, and started again: the call finishes, does again only what was in flight, leaves nothing half-written, and gives what an uninterrupted one gives."
import base64, json, multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path

import nbformat, numpy as np, pytest
from safetensors import safe_open

from conftest import left_over, photo
from crackxai.core import read_csv
from crackxai.run_report import table_hashes

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='SIGKILL is of POSIX')
FORKS = multiprocessing.get_context('forkserver')                  # torch is imported once, for all processes that will be killed
FORKS.set_forkserver_preload(['crackxai.pipeline.surface', 'crackxai.train_surface', 'crackxai.report'])


def start(*args):
    "The command in a process of its own."
    process = FORKS.Process(target=exec, args=(f'from crackxai.cli import main; main({[str(a) for a in args]})', {}))
    process.start()
    return process


def ended(*args):
    process = start(*args)
    process.join(120)
    return process.exitcode


def changes(folder):
    "Every (name, time) that was ever seen below a folder, temporary files too."
    seen = set()
    def look():
        for at, _, names in os.walk(folder):
            for name in names:
                try: seen.add((at, name, os.stat(os.path.join(at, name)).st_mtime_ns))
                except OSError: pass
        return len(seen)
    return look


def kill_after(process, look, n, pause=0.):
    "SIGKILL once `look` has seen n changes and a little later; whether the process was still there."
    end = time.time() + 120
    while look() < n and process.is_alive() and time.time() < end: time.sleep(.001)
    time.sleep(pause)
    alive = process.is_alive()
    process.kill(); process.join()
    return alive


def bytes_of(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_segment_killed_three_times_gives_the_same_bytes_and_does_each_photo_once(tiny_weights, tmp_path):
    rng = np.random.default_rng(5)
    for k in range(16): photo(tmp_path/'in'/f'{k:02}.png', 60, 130, seed=k)
    (tmp_path/'in'/'bad.png').write_bytes(b'no')
    call = lambda out: ('segment', tmp_path/'in', '--out', tmp_path/out, '--weights', tiny_weights.cracked)
    assert ended(*call('whole')) == 3
    kept, killed = {}, 0
    for k in range(3):
        before = len(bytes_of(tmp_path/'out')) if k else 0
        killed += kill_after(start(*call('out')), changes(tmp_path/'out'), before + int(rng.integers(8, 14)), rng.uniform(0, .03))
        journal = (tmp_path/'out'/'severity.csv.journal').read_text().splitlines()[1:]
        done = {json.loads(line)['stem'] for line in journal if line.endswith('}')}
        again = {s for s in done & set(kept) if os.stat(tmp_path/'out'/f'{s}_mask.png').st_mtime_ns != kept[s]}
        assert not again and set(kept) <= done                     # what was finished is left alone
        kept = {s: os.stat(tmp_path/'out'/f'{s}_mask.png').st_mtime_ns for s in done}
    assert killed == 3 and 3 <= len(kept) < 16
    assert ended(*call('out')) == 3
    assert all(os.stat(tmp_path/'out'/f'{s}_mask.png').st_mtime_ns == t for s, t in kept.items())
    assert bytes_of(tmp_path/'out') == bytes_of(tmp_path/'whole') and not left_over(tmp_path/'out') and len(read_csv(tmp_path/'out'/'severity.csv')) == 16


def test_another_call_or_a_changed_photo_takes_nothing_from_a_killed_one(run, tiny_weights, tmp_path):
    for k in range(8): photo(tmp_path/'in'/f'{k}.png', 60, 130, seed=k)
    call = lambda out, *more: ('segment', tmp_path/'in', '--out', tmp_path/out, '--weights', tiny_weights.cracked, *more)
    assert kill_after(start(*call('out')), changes(tmp_path/'out'), 8)
    photo(tmp_path/'in'/'0.png', 60, 70, seed=9)
    for out, more in [('new', ['--mm-per-px', 2]), ('out', ['--mm-per-px', 2])]: assert run(*call(out, *more)).code == 0
    assert bytes_of(tmp_path/'out') == bytes_of(tmp_path/'new')


def trained(path):
    "Tensors and card of a weights file, without the time it took."
    with safe_open(path, 'np') as f: card, tensors = json.loads(f.metadata()['crackxai']), {k: f.get_tensor(k).tobytes() for k in f.keys()}
    card['card']['facts'].pop('minutes')
    return card, tensors


def test_train_surface_killed_three_times_gives_the_same_weights(tmp_path):
    rng = np.random.default_rng(1)
    for k in range(40):
        for label in ('crack', 'intact'):
            path = photo(tmp_path/'in'/label/f'{k}.png', 32, 32, seed=k)
            if label == 'intact':
                from PIL import Image
                Image.fromarray(np.random.default_rng(k).integers(150, 200, (32, 32, 3), dtype=np.uint8)).save(path)
    code = "from crackxai import train_surface as t; t.PROFILES['quick'] = dict(classifier=dict(width=1/16, epochs=6, lr=3e-3), student=dict(epochs=2, later=1, width=1/16), size=32); t.RECIPE = t.RECIPE | dict(strength='flips')\n"
    def begin(name):
        args = ['train', 'surface', '--images', str(tmp_path/'in'), '--out', str(tmp_path/name/'w.safetensors'), '--profile', 'quick']
        (tmp_path/name).mkdir(exist_ok=True)
        process = FORKS.Process(target=exec, args=(code + f'from crackxai.cli import main; main({args})', {}))
        process.start()
        return process
    process, look = begin('whole'), changes(tmp_path/'whole')
    while process.is_alive(): whole = look(); time.sleep(.002)
    assert process.exitcode == 0 and whole > 20
    killed = sum(kill_after(begin('out'), changes(tmp_path/'out'), int(n)) for n in rng.integers(8, whole//2, 3))
    process = begin('out'); process.join(120)
    assert killed >= 2 and process.exitcode == 0 and not left_over(tmp_path/'out')
    assert trained(tmp_path/'out'/'w.safetensors') == trained(tmp_path/'whole'/'w.safetensors')
    assert set(bytes_of(tmp_path/'out')) == set(bytes_of(tmp_path/'whole'))


def test_data_fetch_killed_goes_on_and_leaves_nothing_of_the_first_try(tmp_path):
    "Two files from a slow host on this machine; killed while the second one comes. The first is not asked for again."
    import functools, http.server, threading
    site, asked, slow = tmp_path/'site', [], threading.Event()
    site.mkdir(); slow.set()
    for name in ('a.bin', 'b.bin'): (site/name).write_bytes(np.random.default_rng(0).bytes(10**6))
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()
        def copyfile(self, source, out):
            while chunk := source.read(50_000):
                out.write(chunk)
                if slow.is_set() and 'b.bin' in self.path: time.sleep(.05)
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=site))
    server.handle_error = lambda *args: None                       # the client goes away
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, home = f'http://127.0.0.1:{server.server_port}', tmp_path/'home'
    code = f"""from crackxai.data.fetch import DataSet, File, fetch
fetch('toy', {str(home)!r}, sets=dict(toy=DataSet('toy', 'x', None, 'CC0', tuple(File('{address}/' + n, (n,)) for n in ('a.bin', 'b.bin')))), local=True, progress=False)"""
    again = lambda: FORKS.Process(target=exec, args=(code, {}))
    process = again(); process.start()
    while '/b.bin' not in asked and process.is_alive(): time.sleep(.01)
    time.sleep(.2)
    alive = process.is_alive()
    process.kill(); process.join(); slow.clear()
    assert alive and (home/'a.bin').is_file() and not (home/'b.bin').exists() and left_over(home)
    process = again(); process.start(); process.join(60)
    server.shutdown(); server.server_close()
    assert process.exitcode == 0 and asked == ['/a.bin', '/b.bin', '/b.bin']
    assert bytes_of(home).keys() == {'a.bin', 'b.bin', 'a.bin.sha256', 'b.bin.sha256'} and (home/'b.bin').read_bytes() == (site/'b.bin').read_bytes()


# The real Snakefile with the options of `make reproduce`; the real training of three networks, as small as it gets, and a short notebook that needs it in place of the next one.
SMALL = 'melching2022_10_train: {data: generated, size: 64, train_size: 48, features: 4, seeds: [0], epochs: 6, lr: 0.004, share: 0.05, valid_every: 10, ship: false}'
NEXT = '''
from crackxai.core import read_csv, run_folder, run_record, write_csv, write_json
out = run_folder(profile, 'melching2022')
write_csv(out/'melching2022_20_performance.csv', [{k: m[k] for k in ('recipe', 'hash')} for m in read_csv(out/'melching2022_10_train.csv')])
write_json(out/'melching2022_20_performance.json', run_record('generated: toy', profile, [0], 0.))
'''
ROOT = Path(__file__).resolve().parents[1]


def reproduce(folder):
    "Snakemake for the two notebooks in a checkout of its own, in a process group of its own."
    if not folder.exists():
        for name in ('profiles', 'papers'): (folder/'nbs'/name).mkdir(parents=True)
        for name in ('Snakefile', 'settings.ini', 'data', 'nbs/papers/melching2022_10_train.ipynb'): (folder/name).symlink_to(ROOT/name)
        cells = [nbformat.v4.new_code_cell("profile = 'paper'", metadata=dict(tags=['parameters'])), nbformat.v4.new_code_cell(NEXT.strip())]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='p', language='python'))), folder/'nbs'/'papers'/'melching2022_20_performance.ipynb')
        (folder/'nbs'/'profiles'/'small.yaml').write_text(SMALL)
    options = ['--cores', '1', '--nolock', '--rerun-incomplete', '--keep-incomplete', '--quiet', 'host', 'reason', '--config', 'profile=small', '--', 'runs/small/melching2022/melching2022_20_performance.json']
    return subprocess.Popen([sys.executable, '-m', 'snakemake', *options], cwd=folder, env=os.environ | dict(PYTHONWARNINGS='ignore'), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finished(folder):
    "Records of the notebooks that are done, with the time of their files."
    in_flight = {base64.b64decode(p.name).decode() for p in (folder/'.snakemake'/'incomplete').glob('*') if p.is_file()}
    return {p.name: p.stat().st_mtime_ns for p in (folder/'runs').rglob('melching2022_?0_*.json') if p.relative_to(folder).as_posix() not in in_flight}


def test_reproduce_killed_three_times_gives_the_tables_of_an_uninterrupted_run(tmp_path):
    "The whole process group of `make reproduce`'s Snakemake is killed, then started again: finished notebooks are kept, a training goes on from its checkpoint."
    whole, out, rng, kept, killed = tmp_path/'whole', tmp_path/'out', np.random.default_rng(2), {}, 0
    process, look = reproduce(whole), changes(whole/'runs')
    while process.poll() is None: total = look(); time.sleep(.005)
    assert process.returncode == 0 and total > 40, process.stderr.read()
    for n in rng.integers(2, total//4, 3):
        look = changes(out/'runs')
        n, process, end = n + look(), reproduce(out), time.time() + 240
        while look() < n and process.poll() is None and time.time() < end: time.sleep(.005)
        time.sleep(rng.uniform(0, .3))
        killed += process.poll() is None
        try: os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        process.wait()
        now = finished(out)
        assert kept.items() <= now.items()
        kept = now
    process = reproduce(out)
    assert process.wait(240) == 0, process.stderr.read()
    assert killed == 3 and kept.items() <= finished(out).items() and len(finished(out)) == 2
    made = table_hashes(out/'runs'/'small')
    assert made == table_hashes(whole/'runs'/'small') and len(made) == 2 and not left_over(out/'runs')
    plain = [m['file'] for m in made if not m['left_out']]          # the training's table also holds its minutes
    assert len(plain) == 1 and all((out/'runs'/'small'/f).read_bytes() == (whole/'runs'/'small'/f).read_bytes() for f in plain)
    names = lambda folder: {p.relative_to(folder).as_posix() for p in (folder/'runs').rglob('*') if p.is_file()}
    assert names(out) == names(whole)
