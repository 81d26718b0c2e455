"Profiles, parameters and executed copies of the paper notebooks."
import json
from pathlib import Path

import nbformat, pytest, yaml

from crackxai.core import InputError
from crackxai.reproduce import check_parameters, find_notebook, main, profile_parameters, tidy

ROOT = Path(__file__).resolve().parents[1]
PAPERS = sorted((ROOT/'nbs'/'papers').glob('*.ipynb')) + sorted((ROOT/'nbs'/'benchmarks').glob('*.ipynb'))
PROFILES = sorted(p.stem for p in (ROOT/'nbs'/'profiles').glob('*.yaml'))


@pytest.fixture
def small(checkout):
    "A checkout with one paper notebook, toy_10_fit, and one profile, quick."
    (checkout/'nbs'/'papers').mkdir(parents=True); (checkout/'nbs'/'profiles').mkdir()
    cells = [nbformat.v4.new_code_cell("profile = 'paper'\nepochs = 100\nlr = 1e-4\nfolds = [0, 1]\nwidth = None", metadata=dict(tags=['parameters'])),
             nbformat.v4.new_code_cell("import os, sys\nprint(epochs, profile, os.getcwd())\nprint('warned', file=sys.stderr)")]
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), checkout/'nbs'/'papers'/'toy_10_fit.ipynb')
    return checkout


def quick(root, text): (root/'nbs'/'profiles'/'quick.yaml').write_text(text)


def one_line(capsys):
    out, err = capsys.readouterr()
    assert 'Traceback' not in err and err.startswith('reproduce: ') and err.count('\n') == 1, err
    return err


BAD_PROFILES = {
    'misspelt': ('toy_10_fit: {epcohs: 3}', ['epcohs', 'epochs, lr, folds']),
    'misspelt in common': ('common: {sed: 3}', ['sed', 'epochs']),
    'text for a number': ("toy_10_fit: {epochs: '3'}", ['epochs', 'int']),
    'float for a whole number': ('toy_10_fit: {epochs: 2.5}', ['epochs', 'int']),
    'bool for a number': ('toy_10_fit: {epochs: true}', ['epochs', 'int']),
    'exponent that YAML takes for text': ('toy_10_fit: {lr: 1e-3}', ['lr', 'float']),
    'number for a list': ('toy_10_fit: {folds: 0}', ['folds', 'list']),
    'not YAML': ('toy_10_fit: {epochs: [', ['quick.yaml']),
    'a list': ('- epochs', ['quick.yaml']),
    'a section that is a number': ('toy_10_fit: 3', ['toy_10_fit']),
}


@pytest.mark.parametrize('kind', BAD_PROFILES)
def test_a_profile_that_does_not_fit_is_one_line_before_anything_runs(small, capsys, kind):
    text, words = BAD_PROFILES[kind]
    quick(small, text)
    assert main(['toy_10_fit', '--profile', 'quick']) == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line
    assert not (small/'runs').exists()


@pytest.mark.parametrize('text', ['', 'common:\n', 'common: {}\ntoy_10_fit:\n', 'toy_10_fit: {lr: 1, width: 0.5}'])
def test_an_empty_section_means_the_defaults(small, text):
    quick(small, text)
    check_parameters(small/'nbs'/'papers'/'toy_10_fit.ipynb', profile_parameters('quick', 'toy_10_fit'))


def test_unknown_notebook_and_unknown_profile(small, capsys):
    quick(small, '')
    assert main(['no_such_notebook', '--profile', 'quick']) == 2 and 'toy_10_fit' in one_line(capsys)
    assert main(['toy_10_fit', '--profile', 'quik']) == 2
    line = one_line(capsys)
    assert 'quik' in line and 'choose one of quick' in line


def test_a_benchmark_is_found_runs_and_is_released_like_a_paper(small, capsys):
    quick(small, '')
    (small/'nbs'/'benchmarks').mkdir()
    (small/'nbs'/'papers'/'toy_10_fit.ipynb').rename(small/'nbs'/'benchmarks'/'toy_speed.ipynb')
    assert main(['toy_speed', '--profile', 'quick']) == 0
    assert 'runs/quick/benchmarks/run/toy_speed.ipynb' in capsys.readouterr().out
    assert find_notebook('toy_speed') == (small/'nbs'/'benchmarks'/'toy_speed.ipynb', 'benchmarks')
    assert main(['no_such_notebook', '--profile', 'quick']) == 2 and 'toy_speed' in one_line(capsys)
    (small/'runs'/'quick'/'benchmarks'/'speed.csv').write_text('a\n1\n'); (small/'runs'/'quick'/'other').mkdir(); (small/'runs'/'quick'/'other'/'x.csv').write_text('a\n1\n')
    (small/'figures'/'toy').mkdir(parents=True); (small/'figures'/'toy'/'a_published.csv').write_text('row\n1\n')
    (small/'README.md').write_text('<!-- results --><!-- end of results -->')
    assert main(['toy_speed', '--release', '--profile', 'quick']) == 0
    assert (small/'figures'/'benchmarks'/'speed.csv').is_file() and (small/'figures'/'benchmarks'/'run'/'toy_speed.ipynb').is_file() and not (small/'figures'/'other').exists()


def test_nothing_to_collect(small, capsys):
    assert main(['--collect', '--profile', 'quick']) == 2 and 'run the paper notebooks first' in one_line(capsys)


def test_no_notebook_named(capsys):
    with pytest.raises(SystemExit) as stopped: main([])
    assert stopped.value.code == 2 and 'name a notebook' in capsys.readouterr().err


def test_a_run_uses_the_profile_and_leaves_a_tidy_copy(small, capsys):
    quick(small, 'common: {epochs: 3}')
    assert main(['toy_10_fit', '--profile', 'quick']) == 0
    assert 'runs/quick/toy/run/toy_10_fit.ipynb' in capsys.readouterr().out
    copy = (small/'runs'/'quick'/'toy'/'run'/'toy_10_fit.ipynb').read_text()
    outputs = [o for cell in json.loads(copy)['cells'] for o in cell.get('outputs', [])]
    assert [''.join(o['text']) for o in outputs] == ['3 quick .\n'] and str(small) not in copy      # nothing from stderr
    nbformat.validate(nbformat.reads(copy, as_version=4))


def test_a_parameter_must_be_tagged(checkout):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('epochs = 3')], metadata=dict(kernelspec=dict(name='python3', display_name='p', language='python'))), checkout/'n.ipynb')
    with pytest.raises(InputError, match="tagged 'parameters'"): check_parameters(checkout/'n.ipynb', dict(epochs=3))


def test_there_is_a_profile_of_each_kind(): assert PROFILES == ['cpu', 'paper', 'quick']


@pytest.mark.parametrize('profile', PROFILES)
def test_every_paper_notebook_knows_the_parameters_of_every_profile(profile):
    for notebook in PAPERS: check_parameters(notebook, profile_parameters(profile, notebook.stem))


@pytest.mark.parametrize('profile', PROFILES)
def test_every_section_of_a_profile_belongs_to_a_notebook(profile):
    if not PAPERS: pytest.skip('no paper notebook yet')
    sections = set(yaml.safe_load((ROOT/'nbs'/'profiles'/f'{profile}.yaml').read_text()) or {}) - {'common', 'forest2024', 'melching2022', 'moreh2024'}
    assert sections <= {p.stem for p in PAPERS}


def test_tidy_removes_paths_warnings_times_and_widget_state(tmp_path):
    import sys
    stream = lambda name, text: dict(output_type='stream', name=name, text=text)
    widget = dict(output_type='display_data', metadata={}, data={'application/vnd.jupyter.widget-view+json': dict(model_id='1'), 'text/plain': 'Box()'})
    nb = dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name='python3', display_name='p'), language_info=dict(name='python', version='3.11.7'),
              papermill=dict(duration=3), widgets={'application/vnd.jupyter.widget-state+json': dict(state=dict(secret=1))}),
        cells=[dict(cell_type='code', id='a', execution_count=1, source=[f'open("{tmp_path}/x")'], metadata=dict(papermill=dict(start_time='now'), tags=['parameters']),
                    outputs=[stream('stderr', 'Warning'), stream('stdout', [f'{tmp_path}/runs {sys.prefix}/lib {Path.home()}/x\n']), widget]),
               dict(cell_type='markdown', id='b', source=['text'], metadata=dict(tags=[]))])
    before = json.dumps(nb)
    text = json.dumps(tidy(nb, tmp_path))
    assert json.dumps(nb) == before                                     # the notebook given is left alone
    for word in (str(tmp_path), sys.prefix, str(Path.home()) + '/', 'Warning', 'papermill', 'start_time', 'secret', 'widget-state', '3.11.7'): assert word not in text, word
    cells = json.loads(text)['cells']
    assert cells[0]['outputs'][0]['text'] == ['./runs .venv/lib ~/x\n'] and cells[0]['metadata'] == dict(tags=['parameters']) and cells[1]['metadata'] == {}


def executed(data): return dict(metadata={}, cells=[dict(cell_type='code', metadata={}, outputs=[dict(output_type='display_data', metadata={}, data=data)])])


@pytest.mark.parametrize('kind', ['image/png', 'image/jpeg'])
def test_tidy_leaves_pictures_alone(tmp_path, monkeypatch, kind):
    "Base64 may hold the letters of a path by chance."
    monkeypatch.setenv('HOME', '/root'); monkeypatch.setenv('USERPROFILE', '/root')
    nb = executed({kind: 'iVBORw0KGgo/root/abcd=='})
    assert tidy(nb, tmp_path)['cells'][0]['outputs'] == nb['cells'][0]['outputs']


def test_tidy_where_the_home_folder_is_the_root_of_the_disk(tmp_path, monkeypatch):
    "As in many containers: not every slash is a home."
    monkeypatch.setenv('HOME', '/'); monkeypatch.setenv('USERPROFILE', '/')
    nb = executed({'text/plain': 'a/b https://example.org/x'})
    assert tidy(nb, tmp_path)['cells'][0]['outputs'] == nb['cells'][0]['outputs']


def test_tidy_leaves_no_view_of_a_widget_without_its_state(tmp_path):
    nb = executed({'application/vnd.jupyter.widget-view+json': dict(model_id='1'), 'text/plain': 'Box()'})
    assert 'widget-view' not in json.dumps(tidy(nb, tmp_path))


def test_two_runs_with_one_seed_have_one_hash_and_another_seed_another(small):
    "`--collect` writes it to report.html and, for each table, to hashes.csv; times do not count."
    import csv, re, shutil
    code = '''
import time
import numpy as np, pandas as pd
from crackxai.core import run_folder, run_record, write_json
out, started = run_folder(profile, 'toy'), time.time()
pd.DataFrame(dict(f1=np.random.default_rng(epochs).normal(size=5), training_seconds=time.time())).to_csv(out/'toy_10_fit.csv', index=False)
pd.DataFrame([dict(paper='toy', row='a', quantity='f1', published=1., reproduced=2.)]).to_csv(out/'toy_10_fit_published.csv', index=False)
(out/'toy_10_fit_none.csv').write_text('\\n')
write_json(out/'toy_10_fit.json', run_record('generated: toy', profile, [epochs], started))
'''
    path = small/'nbs'/'papers'/'toy_10_fit.ipynb'
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].source = code.strip()
    nbformat.write(nb, path)
    said = []
    for seed in (3, 3, 4):
        quick(small, f'common: {{epochs: {seed}}}')
        assert main(['toy_10_fit', '--profile', 'quick']) == main(['--collect', '--profile', 'quick']) == 0
        with open(small/'runs'/'quick'/'hashes.csv') as f: each = {r['file']: r for r in csv.DictReader(f)}
        said.append((re.search('[0-9a-f]{64}', (small/'runs'/'quick'/'report.html').read_text())[0], each['toy/toy_10_fit.csv']['sha256']))
        shutil.rmtree(small/'runs')
    assert said[0] == said[1] and not set(said[0]) & set(said[2])
    assert set(each) == {'toy/toy_10_fit.csv', 'toy/toy_10_fit_published.csv', 'toy/toy_10_fit_none.csv'} and each['toy/toy_10_fit.csv']['left_out'] == 'training_seconds'
