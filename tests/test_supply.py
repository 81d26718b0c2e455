"What is installed: under which licences, from which files, and that nothing is fetched when the package is imported."
import re, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
settings = ConfigParser(delimiters=['='], interpolation=None)
settings.read(ROOT/'settings.ini', encoding='utf-8')
NAMES = {kind: [Requirement(r).name for r in settings['DEFAULT'][kind].split()] for kind in ('requirements', 'dev_requirements', 'cluster_requirements')}
FREE = ['Apache-2.0', 'Apache-2.0 WITH LLVM-exception', 'BSD', 'BSD-2-Clause', 'BSD-3-Clause', '0BSD', 'BSL-1.0', 'CC0-1.0', 'ISC', 'MIT', 'MIT-CMU', 'MPL-2.0', 'PSF-2.0', 'Zlib']
# used as libraries, unchanged and apart from this package, as their licences ask
LESSER = {'zennit': 'LGPL-3.0-or-later'}
CLASSIFIERS = {'BSD License': 'BSD', 'MIT License': 'MIT', 'Apache Software License': 'Apache-2.0', 'Python Software Foundation License': 'PSF-2.0', 'GNU Lesser General Public License v3 or later (LGPLv3+)': 'LGPL-3.0-or-later',
               'Mozilla Public License 2.0 (MPL 2.0)': 'MPL-2.0', 'ISC License (ISCL)': 'ISC'}
WORDS = {'BSD 3-Clause License': 'BSD-3-Clause', 'Apache Software License 2.0': 'Apache-2.0'}


def licences(name):
    "SPDX identifiers of an installed package: its expression, else its classifiers, else the one line it states."
    m = metadata(name)
    expression = m.get('License-Expression')
    if not expression:
        told = [c.split(' :: ')[-1] for c in m.get_all('Classifier') or [] if c.startswith('License ::') and c != 'License :: OSI Approved']
        if told: return [CLASSIFIERS.get(t, t) for t in told]
        expression = (m.get('License') or '').strip()
    return [WORDS.get(part.strip(' ()'), part.strip(' ()')) for part in re.split(r' AND | OR ', expression)]


@pytest.mark.parametrize('name', sorted({n for names in NAMES.values() for n in names}))
def test_the_licence_of_each_direct_dependency_is_known_and_allowed(name):
    found = licences(name)
    assert found and all(found) and (set(found) <= set(FREE) or found == [LESSER.get(name)]), f'{name}: {found}'


def test_no_licence_is_listed_that_nobody_needs():
    used = {l for names in NAMES.values() for n in names for l in licences(n)}
    assert set(LESSER.values()) <= used and set(LESSER) <= set(NAMES['requirements']) and not used - set(FREE) - set(LESSER.values())


def test_importing_every_module_reaches_no_network_and_writes_no_file(run_process, tmp_path):
    "Every module of the package in a fresh process: what it connects to or opens for writing is told by Python's own audit."
    modules = sorted('.'.join(p.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__') for p in (ROOT/'crackxai').rglob('*.py') if p.stem != '_modidx')
    code = f'''
import importlib, os, sys
sys.dont_write_bytecode = True
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "http.client.connect", "ftplib.connect"): print("NETWORK", event, args)
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+") and str(args[0]).startswith({str(ROOT)!r}): print("WRITES", args[0])
    if event in ("os.mkdir", "os.rename", "os.remove") and os.path.abspath(str(args[0])).startswith({str(ROOT)!r}): print("CHANGES", args[0])
sys.addaudithook(watch)
for name in {modules}: importlib.import_module(name)
print("imported", len({modules}))
'''
    done = subprocess.run([sys.executable, '-c', code], env=run_process.env | dict(HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), MPLCONFIGDIR=str(tmp_path), NUMBA_CACHE_DIR=str(tmp_path)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f'imported {len(modules)}'], done.stdout
