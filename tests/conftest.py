"Shared by all tests: a tiny network, the command line in two forms, and a guard that lets nothing out to a network."
import os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

for _name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(_name, '1')   # tiny inputs: threads only get in each other's way

import numpy as np, pytest
from click.testing import CliRunner
from hypothesis import settings
from PIL import Image

settings.register_profile('short', max_examples=25, deadline=None, database=None, derandomize=True)
settings.load_profile('short')

# Also written out as sitecustomize.py, so that it holds in subprocesses.
GUARD = '''
import ipaddress, os, socket
class NetworkUsed(OSError): "A test tried to reach a network."
def _inside(host):
    if host in (None, "", "localhost", b"localhost"): return True
    try: return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError: return False
def _guarded(call, where):
    def checked(*args, **kwargs):
        address = where(args, kwargs)
        if isinstance(address, tuple): address = address[0]
        elif isinstance(address, (bytes, str)) and where is _second: return call(*args, **kwargs)   # a socket file of this machine
        if not _inside(address): raise NetworkUsed(101, f"no network in tests: {address}")
        return call(*args, **kwargs)
    return checked
_second = lambda args, kwargs: args[1]
_first = lambda args, kwargs: args[0] if args else kwargs.get("host")
for _name in ("connect", "connect_ex"): setattr(socket.socket, _name, _guarded(getattr(socket.socket, _name), _second))
socket.getaddrinfo = _guarded(socket.getaddrinfo, _first)
for _name in [n for n in os.environ if n.lower() in ("http_proxy", "https_proxy", "all_proxy")]: del os.environ[_name]
'''


@pytest.fixture(scope='session', autouse=True)
def no_network():
    "Connections to anything but this machine fail; proxies are forgotten."
    import socket
    kept, proxies = (socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo), dict(os.environ)
    space = {}
    exec(GUARD, space)
    yield space['NetworkUsed']
    socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = kept
    os.environ.update({k: v for k, v in proxies.items() if k.lower().endswith('_proxy')})


@pytest.fixture(scope='session')
def tiny_weights(tmp_path_factory):
    "Files of an untrained network: as it is, one that takes every tile for cracked, one that takes none."
    import torch
    from crackxai.models.classify import save_weights, vgg11_128
    folder, files = tmp_path_factory.mktemp('weights'), {}
    for name, push in [('plain', 0.), ('cracked', 20.), ('intact', -20.)]:
        torch.manual_seed(0)
        net = vgg11_128(32, hidden=8, width=1/16)
        with torch.no_grad(): net.classifier[-1].bias += torch.tensor([-push, push])
        files[name] = folder/f'{name}.safetensors'
        save_weights(net, files[name], segmenter=dict(threshold='simple'), data='none')
    return SimpleNamespace(**files)


@pytest.fixture(scope='session')
def run():
    "The command line in this process: exit code and output. Anything but a clean exit raises, so no test passes over a traceback."
    from crackxai.cli import main
    def call(*args):
        result = CliRunner().invoke(main, [str(a) for a in args])
        if result.exception and not isinstance(result.exception, SystemExit): raise result.exception
        assert 'Traceback' not in result.output
        return SimpleNamespace(code=result.exit_code, output=result.output)
    return call


@pytest.fixture(scope='session')
def run_process(tmp_path_factory):
    "The installed command as a process of its own, with the guard inside."
    folder = tmp_path_factory.mktemp('guard')
    (folder/'sitecustomize.py').write_text(GUARD)
    guarded = os.environ | dict(PYTHONPATH=str(folder))
    def call(*args, **options):
        command = [Path(sys.executable).parent/'crackxai', *map(str, args)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, env=guarded, **options)
        assert 'Traceback' not in done.stdout, done.stdout
        return SimpleNamespace(code=done.returncode, output=done.stdout)
    call.env = guarded
    return call


@pytest.fixture
def said(record_property, tmp_path):
    "Keeps the line that the program said in the report of the tests, without the folder of this test."
    return lambda line: record_property('said', line.replace(f'{tmp_path}/', '').removeprefix('crackxai: '))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "An empty checkout as the working directory, so that data and notebooks of the real one play no part."
    root = tmp_path/'checkout'
    (root/'data'/'raw').mkdir(parents=True)
    (root/'settings.ini').write_text('[DEFAULT]\nlib_name = crackxai\n')
    monkeypatch.chdir(root)
    monkeypatch.delenv('CRACKXAI_DATA', raising=False)
    return root


def error_line(output):
    "The one line that a call ends with when it cannot be carried out."
    lines = [line for line in output.splitlines() if line.strip()]
    assert [line.startswith('crackxai: ') for line in lines].count(True) == 1 and lines[-1].startswith('crackxai: '), output
    return lines[-1]


def pixels(height=48, width=64, seed=0):
    "A grey wall with a dark stroke: (h, w, 3) uint8."
    image = np.random.default_rng(seed).integers(150, 200, (height, width, 3), dtype=np.uint8)
    image[:, width//2:width//2 + 3] = 30
    return image


def photo(path, *args, **options):
    "Write such a wall; returns the path."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(*args, **options)).save(path)
    return path


def left_over(folder):
    "Temporary files."
    return [p.name for p in Path(folder).rglob('*') if p.name.startswith('.') or p.suffix in {'.tmp', '.part'}]
