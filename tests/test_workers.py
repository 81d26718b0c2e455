"`--workers` and `--scheduler`: the same bytes as one process, every file once, also where a worker is killed, one joins late, or the call is stopped by hand."
import os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import error_line, left_over, photo
from crackxai.core import read_csv
from test_locate import plates, stored as plate, wave_weights
from test_tip import made, stored as field, tip_weights

BIN = Path(sys.executable).parent
QUICK = ['--method', 'input_x_gradient']


def bytes_of(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def gone(group):
    "Whether all processes of a group end soon."
    for _ in range(200):
        try: os.killpg(group, 0)
        except ProcessLookupError: return True
        time.sleep(.05)


@pytest.fixture(scope='module')
def crowd(tmp_path_factory, run_process):
    "A dask scheduler on this machine and a way to start workers; all end with the module."
    folder, started = tmp_path_factory.mktemp('dask'), []
    def begin(*args):
        started.append(subprocess.Popen([BIN/'dask', *args, '--host', '127.0.0.1', '--dashboard-address', '127.0.0.1:0', '--scheduler-file', folder/'scheduler.json'], env=run_process.env | dict(OMP_NUM_THREADS='1'), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1]
    begin('scheduler', '--port', '0')
    end = time.time() + 60
    while not (folder/'scheduler.json').exists() and time.time() < end: time.sleep(.05)
    import json
    address = json.loads((folder/'scheduler.json').read_text())['address']
    yield SimpleNamespace(address=address, worker=lambda: begin('worker', '--nthreads', '1', '--no-nanny'))
    for process in started: process.kill(); process.wait()


@pytest.fixture(scope='module')
def walls(tmp_path_factory):
    "Thirty photos, one of them broken, one with a newline in its name."
    folder = tmp_path_factory.mktemp('walls')
    for k in range(28): photo(folder/f'{k:02}.png', 60, 130, seed=k)
    photo(folder/'wall\nä 1.png', 50, 60); (folder/'05x.png').write_bytes(b'no')
    return folder


@pytest.fixture(scope='module')
def whole(run, tiny_weights, walls, tmp_path_factory):
    "What one process gives."
    out = tmp_path_factory.mktemp('whole')
    assert run('segment', walls, '--out', out, '--weights', tiny_weights.cracked, *QUICK).code == 3
    return bytes_of(out)


def test_two_workers_stopped_by_hand_and_called_again_give_the_bytes_of_one_process(run, run_process, tiny_weights, walls, whole, tmp_path):
    "Ctrl-C: exit code 130, the finished rows are in the table, no process and no temporary file stays; then the rest is done."
    command = [BIN/'crackxai', 'segment', walls, '--out', tmp_path/'out', '--weights', tiny_weights.cracked, *QUICK, '--workers', '2']
    for _ in range(5):                                             # on a busy machine all may be done before the hand is quick enough
        shutil.rmtree(tmp_path/'out', ignore_errors=True)
        process = subprocess.Popen(list(map(str, command)), env=run_process.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))      # what a shell starts in the background ignores it
        while process.poll() is None and len(list((tmp_path/'out').glob('*_overlay.png'))) < 3: time.sleep(.005)
        if process.returncode is None: os.killpg(process.pid, signal.SIGINT)      # as a terminal does: to all of them
        said = process.communicate(timeout=60)[0]
        if process.returncode == 130: break
    rows = read_csv(tmp_path/'out'/'severity.csv')
    assert process.returncode == 130 and 'what was finished is written' in said and 'Traceback' not in said, said
    assert 0 < len(rows) < 29 and not left_over(tmp_path/'out') and all((tmp_path/'out'/f'{Path(r["file"]).stem}_mask.png').is_file() for r in rows)
    assert gone(process.pid)
    kept = {r['file']: (tmp_path/'out'/f'{Path(r["file"]).stem}_mask.png').stat().st_mtime_ns for r in rows}
    assert run('segment', walls, '--out', tmp_path/'out', '--weights', tiny_weights.cracked, *QUICK, '--workers', 2).code == 3
    assert bytes_of(tmp_path/'out') == whole and not left_over(tmp_path/'out')
    assert all((tmp_path/'out'/f'{Path(f).stem}_mask.png').stat().st_mtime_ns == t for f, t in kept.items())


def test_a_cluster_loses_a_worker_and_gains_one_and_gives_the_same_bytes(run, tiny_weights, walls, whole, tmp_path, crowd):
    "Two workers; once some photos are done one is killed, and another joins. Every photo has one row."
    workers = [crowd.worker(), crowd.worker()]
    def accident(out, ended, done):
        while len(list(out.glob('*_overlay.png'))) < 6 and not ended.is_set(): time.sleep(.005)
        first = workers.pop(0)
        first.kill(); first.wait(); done.append(len(list(out.glob('*_overlay.png')))); workers.append(crowd.worker())
    for n in range(4):                                             # on a busy machine all may be done before the accident
        out, ended, done = tmp_path/f'out{n}', threading.Event(), []
        watcher = threading.Thread(target=accident, args=(out, ended, done))
        watcher.start()
        try: r = run('segment', walls, '--out', out, '--weights', tiny_weights.cracked, *QUICK, '--scheduler', crowd.address)
        finally: ended.set(); watcher.join()
        if done[0] < 29: break
    assert r.code == 3 and 6 <= done[0] < 29, (done, r.output)
    rows = [row['file'] for row in read_csv(out/'severity.csv')]
    assert len(rows) == len(set(rows)) == 29 and bytes_of(out) == whole


def test_tip_and_locate_on_the_cluster_say_what_one_process_says(run, tip_weights, wave_weights, made, plates, tmp_path, crowd, monkeypatch):
    "Paths are told as they were given, relative ones too."
    monkeypatch.chdir(tmp_path)
    for k in range(2): field(Path('in')/f'{k}.npz', made[k]); plate(Path('waves')/f'{k}.npz', plates[k + 1], *([plates[0]] if k else []))
    Path('in/bad.npz').write_bytes(b'no')
    for command, folder, weights in [('tip', 'in', tip_weights.middle), ('locate', 'waves', wave_weights.crack)]:
        outs = f'{command}-alone', f'{command}-together'
        said = [run(command, folder, '--out', out, '--weights', weights, *more) for out, more in zip(outs, [[], ['--scheduler', crowd.address]])]
        assert said[0].code == said[1].code and said[0].output.replace(*outs) == said[1].output
        assert bytes_of(Path(outs[0])) == bytes_of(Path(outs[1]))


@pytest.mark.parametrize('options, word', [(['--workers', '2', '--scheduler', 'tcp://127.0.0.1:9'], '--workers'), (['--scheduler', 'tcp://127.0.0.1:9'], 'does not answer'), (['--scheduler', 'here'], 'here')])
def test_a_scheduler_that_cannot_be_used_is_one_line(run, tiny_weights, tmp_path, options, word, monkeypatch):
    r = run('segment', photo(tmp_path/'w.png'), '--out', tmp_path/'out', '--weights', tiny_weights.plain, *options)
    assert r.code == 2 and word in error_line(r.output) and '; ' in error_line(r.output)


def test_without_dask_the_extra_is_named(run, tiny_weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'distributed', None)
    r = run('segment', photo(tmp_path/'w.png'), '--out', tmp_path/'out', '--weights', tiny_weights.plain, '--scheduler', 'tcp://127.0.0.1:9')
    assert r.code == 2 and 'crackxai[cluster]' in error_line(r.output)
