"Training on several devices: what torchrun starts twice learns what one process learns."
import json, math, os, signal, subprocess, sys

import numpy as np, pytest, torch
from safetensors.torch import load_file

from conftest import left_over

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason='this build of torch has no gloo')

# Two small networks without batch normalisation or dropout, in float32; one loss is a mean over rows, the other (Dice) belongs to the whole batch.
# 13 rows in batches of 4: the last one has a single row, so that one of two processes has none.
SCRIPT = '''
import json, os, signal, sys
import torch
from torch import nn
from crackxai.core import write_json
from crackxai.training import devices, fit
out, how = sys.argv[1:]
rank, number = devices()
g = torch.Generator().manual_seed(0)
images, line = torch.rand(13, 1, 8, 8, generator=g), torch.rand(13, generator=g)
masks = (images > .5).float()
class Rows:
    def __init__(self, *tensors): self.tensors = tensors
    def __len__(self): return 4
    def __call__(self, epoch, rng):
        order = torch.randperm(13, generator=rng)
        for i in range(0, 13, 4): yield tuple(t[order[i:i + 4]] for t in self.tensors)
torch.manual_seed(1 + rank)                                             # the first process's weights count
net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1))
def dice(logits, y):
    p = logits.sigmoid()
    return nn.functional.binary_cross_entropy_with_logits(logits, y) + 1 - 2*(p*y).sum()/(p.sum() + y.sum())
called = []
def score(model):
    assert rank == 0
    called.append(1)
    if how == 'killed' and len(called) == 4: os.kill(os.getpid(), signal.SIGKILL)
    return dict(score=-dice(model(images), masks).item())
plain = dict(lr=.01, epochs=8, mixed=False, progress=False)
record = fit(net, Rows(images, masks), dice, score, f'{out}/net', schedule='one_cycle', decoupled=True, **plain)
fit(flat, Rows(images, line), lambda o, y: ((o[:, 0] - y)**2).mean(), lambda m: dict(score=0.), f'{out}/flat', patience=3, **plain)
fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Dropout(.5)), Rows(images, line), lambda o, y: ((o[:, 0] - y)**2).mean(), lambda m: {}, f'{out}/dropout', monitor=None, **plain)
write_json(f'{out}/seen_by_{rank}.json', dict(devices=number, epochs=len(record['history']), best=record['best_epoch'], sum=float(sum(p.double().sum() for p in net.parameters()))))
'''


def train(script, out, processes=1, how=''):
    "The script in one process, or started by torchrun on this machine's loopback."
    launch = [sys.executable] if processes == 1 else [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', str(processes), '--rdzv-backend', 'c10d', '--rdzv-endpoint', '127.0.0.1:0', '--local-addr', '127.0.0.1']
    env = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', GLOO_SOCKET_IFNAME='lo', TP_SOCKET_IFNAME='lo')
    return subprocess.run([*launch, script, out, how], env=env, capture_output=True, text=True, timeout=240)


def history(out, name): return json.loads((out/name/'record.json').read_text())
def tensors(out, name): return load_file(out/name/'best.safetensors')
def losses(out, name): return np.array([h['loss'] for h in history(out, name)['history']])


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One process, two, and two that were killed in the fourth epoch and started again."
    folder = tmp_path_factory.mktemp('devices')
    (folder/'train.py').write_text(SCRIPT)
    for name, *how in [('one',), ('two', 2), ('again', 2, 'killed')]:
        done = train(folder/'train.py', folder/name, *how)
        assert (done.returncode == 0) == (name != 'again'), done.stderr[-3000:]
    assert len(history(folder/'again', 'net')['history']) == 3 and not (folder/'again'/'flat').exists()
    assert train(folder/'train.py', folder/'again', 2).returncode == 0
    return folder


def test_two_processes_have_the_loss_curve_of_one_at_the_same_batches(runs):
    """Within 1e-5, also for a loss that is not a mean over rows and a last batch of one row. In float32 and without batch normalisation: that takes the statistics of
    each process's own share, as in torch's DistributedDataParallel without SyncBatchNorm, and gives another curve."""
    for name in ('net', 'flat'):
        one, two = losses(runs/'one', name), losses(runs/'two', name)
        assert len(one) == len(two) and np.abs(one - two).max() < 1e-5, (name, np.abs(one - two).max())
    assert losses(runs/'one', 'net')[-1] < losses(runs/'one', 'net')[0] - .01       # something was learned
    for key, value in tensors(runs/'one', 'net').items(): assert torch.allclose(value, tensors(runs/'two', 'net')[key], atol=1e-4)


def test_all_processes_end_with_the_first_ones_selection(runs):
    seen = [json.loads((runs/'two'/f'seen_by_{r}.json').read_text()) for r in (0, 1)]
    assert seen[0] == seen[1] and seen[0]['devices'] == 2 and seen[0]['epochs'] == 8
    assert json.loads((runs/'one'/'seen_by_0.json').read_text())['best'] == seen[0]['best']


def test_all_processes_stop_early_together(runs):
    assert len(losses(runs/'two', 'flat')) == 4 and history(runs/'two', 'flat')['best_epoch'] == 0


def test_dropout_differs_and_is_still_the_same_twice(runs):
    assert not np.allclose(losses(runs/'one', 'dropout'), losses(runs/'two', 'dropout')) and (losses(runs/'two', 'dropout') == losses(runs/'again', 'dropout')).all()


def test_two_processes_killed_go_on_and_end_with_the_same_weights(runs):
    assert (losses(runs/'two', 'net') == losses(runs/'again', 'net')).all() and not left_over(runs/'again')
    for name in ('net', 'flat', 'dropout'): assert (runs/'two'/name/'best.safetensors').read_bytes() == (runs/'again'/name/'best.safetensors').read_bytes()
    assert {p.relative_to(runs/'two').as_posix() for p in (runs/'two').rglob('*')} == {p.relative_to(runs/'again').as_posix() for p in (runs/'again').rglob('*')}


def test_train_surface_on_two_devices_speaks_once_and_leaves_what_one_leaves(tmp_path):
    "`torchrun --nproc-per-node 2 --no-python crackxai train surface`: the first process speaks and writes; batch normalisation and dropout make other weights than one process has."
    from PIL import Image
    from conftest import photo
    for k in range(40):
        photo(tmp_path/'in'/'crack'/f'{k}.png', 32, 32, seed=k)
        (tmp_path/'in'/'intact').mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(150, 200, (32, 32, 3), dtype=np.uint8)).save(tmp_path/'in'/'intact'/f'{k}.png')
    (tmp_path/'in'/'crack'/'bad.png').write_bytes(b'no')
    (tmp_path/'train.py').write_text('''
import sys
from pathlib import Path
from crackxai import train_surface as t
from crackxai.cli import main
t.PROFILES['quick'] = dict(classifier=dict(width=1/16, epochs=6, lr=3e-3), student=dict(epochs=1, later=1, width=1/16), size=32)
t.RECIPE = t.RECIPE | dict(strength='flips')
Path(sys.argv[1]).mkdir(exist_ok=True)
main(['train', 'surface', '--images', str(Path(sys.argv[1]).with_name('in')), '--out', sys.argv[1] + '/w.safetensors', '--profile', 'quick'])
''')
    one, two = train(tmp_path/'train.py', tmp_path/'one'), train(tmp_path/'train.py', tmp_path/'two', 2)
    assert one.returncode == 3 and 'exitcode  : 3' in two.stderr, two.stderr[-3000:]      # one image cannot be read
    first_words = lambda done: [' '.join(line.split()[:2]) for line in done.stdout.splitlines()]
    assert first_words(one)[:3] == first_words(two)[:3] and len(two.stdout.splitlines()) == len(one.stdout.splitlines()) == 5 and 'two rounds of drawing' in two.stdout
    names = lambda folder: {p.relative_to(folder).as_posix() for p in folder.rglob('*')}
    assert names(tmp_path/'one') == names(tmp_path/'two') and not left_over(tmp_path/'two')
    assert two.stderr.count('left out') == 1 and (tmp_path/'two'/'w_failures.csv').read_text().count('bad.png') == (tmp_path/'one'/'w_failures.csv').read_text().count('bad.png')
