"settings.ini is the one place for requirements: the lock, its checksums and the conda file must agree with it."
import platform, re, shutil, subprocess, sys, tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest, yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
settings = ConfigParser(delimiters=['='], interpolation=None)
settings.read(ROOT/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']
WANTED = [Requirement(r) for r in settings['requirements'].split() + settings['dev_requirements'].split()]


def lock_lines():
    lines = (line.strip() for line in (ROOT/'constraints.txt').read_text().splitlines())
    return [line for line in lines if line and not line.startswith('#')]


LOCK = {canonicalize_name(name): Version(version) for name, _, version in (line.partition('==') for line in lock_lines())}
CONDA = yaml.safe_load((ROOT/'environment.yml').read_text())['dependencies']


@pytest.mark.parametrize('wanted', WANTED, ids=str)
def test_lock_holds_every_requirement(wanted):
    assert canonicalize_name(wanted.name) in LOCK, f'{wanted.name} is in settings.ini but not in constraints.txt: renew the lock'
    assert wanted.specifier.contains(LOCK[canonicalize_name(wanted.name)], prereleases=True), f'constraints.txt has {wanted.name} {LOCK[canonicalize_name(wanted.name)]}, settings.ini asks for {wanted}'


def test_lock_is_exact_and_names_no_place():
    assert len(LOCK) == len(lock_lines())
    assert not [line for line in lock_lines() if any(mark in line for mark in ('@', '/', ';', '*'))]
    assert 'crackxai' not in LOCK


def checksums():
    "Per line `name==version` of requirements.lock its checksums."
    text = '\n'.join(line for line in (ROOT/'requirements.lock').read_text().splitlines() if not line.startswith('#')).replace('\\\n', '')
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def test_the_lock_has_checksums_of_every_version_and_of_nothing_else():
    "pip installs with --require-hashes and --no-deps: what is not in the file, or is another file, is not installed."
    found = checksums()
    assert {canonicalize_name(line.partition('==')[0]): Version(line.partition('==')[2]) for line in found} == LOCK and len(found) == len(LOCK)
    assert all(sums and all(re.fullmatch('--hash=sha256:[0-9a-f]{64}', s) for s in sums) for sums in found.values())
    assert len(set(s for sums in found.values() for s in sums)) == sum(map(len, found.values()))
    assert '://' not in (ROOT/'requirements.lock').read_text()


def test_what_comes_as_source_is_built_with_the_locked_setuptools():
    needed = [Requirement(r) for r in tomllib.loads((ROOT/'pyproject.toml').read_text())['build-system']['requires']]
    assert all(r.specifier.contains(LOCK[canonicalize_name(r.name)]) for r in needed)
    first = subprocess.run(['sed', '-n', r'/^setuptools==/,/[^\\]$/p', ROOT/'requirements.lock'], capture_output=True, text=True).stdout.replace('\\\n', '').split()
    assert first == [line := f"setuptools=={LOCK['setuptools']}", *checksums()[line]]


@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
@pytest.mark.parametrize('given, says', [([], None), (['TORCH_INDEX=x'], 'constraints'), (['PIP_EXTRA=--pre'], 'constraints'), (['PYTHON=false'], 'constraints')])
def test_set_up_checks_every_file_or_says_that_it_does_not(given, says):
    "On another machine, with another Python or another index the versions are the same and a sentence says that nothing checks the files."
    at_home = (sys.version_info[:2], sys.platform, platform.machine(), platform.libc_ver()[0]) == ((3, 11), 'linux', 'x86_64', 'glibc')
    plan = subprocess.run(['make', '--dry-run', '--always-make', '.venv/.made-from-lock', *(given or [f'PYTHON={sys.executable}'])], cwd=ROOT, capture_output=True, text=True).stdout
    installs = [line for line in plan.splitlines() if ' install ' in line]
    if says is None and at_home: assert [line.split('-r ')[-1] for line in installs[:-1]] == ['.venv/build.lock', 'requirements.lock'] and all('--require-hashes --no-deps' in line for line in installs[:-1]) and '--no-deps' in installs[-1]
    else: assert '-c constraints.txt' in ' '.join(installs) and 'their files unchecked' in plan and '--require-hashes' not in plan


def test_conda_file_lists_the_same_packages():
    pip = next(part['pip'] for part in CONDA if isinstance(part, dict))
    same = lambda requirements: {(canonicalize_name(r.name), r.specifier) for r in requirements}
    assert same(map(Requirement, pip)) == same(WANTED)


def test_conda_python_is_new_enough():
    python = next(part for part in CONDA if isinstance(part, str) and part.startswith('python='))
    assert Version(python.removeprefix('python=')) in SpecifierSet(f">={settings['min_python']}")


def test_pins_that_matter():
    assert (LOCK['torch'], LOCK['torchvision'], LOCK['zennit']) == (Version('2.15.0'), Version('0.29.2'), Version('0.5.1'))
    assert LOCK['nbdev'] < Version('3')
