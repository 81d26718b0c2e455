"settings.ini is the one place for requirements: the lock and the conda file must agree with it."
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
