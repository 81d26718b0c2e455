"`snakemake --profile slurm`: the plan of every profile, and real jobs through a SLURM that is played by this machine."
import os, re, subprocess, sys
from pathlib import Path

import nbformat, pytest, yaml

pytest.importorskip('snakemake_executor_plugin_slurm')
pytestmark = pytest.mark.skipif(os.name != 'posix', reason='SLURM is of POSIX')
ROOT = Path(__file__).resolve().parents[1]
STEMS = re.findall(r"^    '(\w+)': \[", (ROOT/'Snakefile').read_text(encoding='utf-8'), re.M)

# Each of SLURM's commands: sbatch starts the job as a process of its own, sacct tells how it ended, srun runs it. Calls are kept in a file. The first job is killed.
PLAYED = '''
import os, shlex, subprocess, sys
from pathlib import Path
name, args, jobs = Path(sys.argv[0]).name, sys.argv[1:], Path(os.environ['PLAYED_JOBS'])
with open(jobs/'calls', 'a') as f: f.write(name + ' ' + shlex.join(args) + '\\n')
if name == 'sbatch':
    number = sum(1 for _ in jobs.glob('*.log')) + 1
    wrapped = next(a for a in args if a.startswith('--wrap=')).removeprefix('--wrap=')
    command = 'kill -9 $$' if number == 1 else wrapped
    with open(jobs/f'{number}.log', 'w') as log:
        subprocess.Popen(['sh', '-c', f"sh -c {shlex.quote(command)}; echo $? > {jobs}/{number}.rc"], cwd=args[args.index('-D') + 1], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    print(number)
elif name == 'srun':
    while args[0].startswith('-'): args.pop(0)
    sys.exit(subprocess.run(args).returncode)
elif name in ('sacct', 'squeue'):
    for log in sorted(jobs.glob('*.log')):
        rc = log.with_suffix('.rc')
        code = rc.read_text().strip() if rc.is_file() else ''
        print(log.stem + '|' + ('RUNNING' if not code else 'COMPLETED' if code == '0' else 'FAILED'))
elif name == 'sinfo': print('PARTITION\\nbatch*')
'''


def snakemake(folder, *args, **env):
    command = [sys.executable, '-m', 'snakemake', '--profile', 'slurm', *args]
    return subprocess.run(command, cwd=folder, env=os.environ | dict(PYTHONWARNINGS='ignore') | env, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize('profile', ['quick', 'cpu', 'paper'])
def test_every_notebook_is_a_job_of_the_plan(profile, tmp_path):
    "A dry run of the profile in a clean checkout, without SLURM."
    for name in ('Snakefile', 'nbs', 'slurm'): (tmp_path/name).symlink_to(ROOT/name)
    done = snakemake(tmp_path, '--dry-run', '--config', f'profile={profile}')
    assert done.returncode == 0, done.stderr
    planned = re.findall(r'^(\w+) +1$', done.stdout + done.stderr, re.M)
    assert set(planned) == {*STEMS, 'summary'} and not (tmp_path/'runs').exists()


def test_the_profile_speaks_of_rules_that_exist():
    given = yaml.safe_load((ROOT/'slurm'/'config.yaml').read_text())
    assert set(given['set-resources']) < set(STEMS) and given['executor'] == 'slurm'
    kept = ('rerun-incomplete', 'keep-incomplete')                 # as in the Makefile: a training goes on from its checkpoint
    assert all(given[k] is True and f'--{k}' in (ROOT/'Makefile').read_text() for k in kept)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    "A checkout with the real Snakefile and profile, notebooks that only leave their record, and the commands of a cluster in the path."
    checkout, commands, jobs = (tmp_path/name for name in ('checkout', 'commands', 'jobs'))
    for folder in (checkout/'nbs'/'papers', checkout/'nbs'/'profiles', commands, jobs): folder.mkdir(parents=True)
    for name in ('Snakefile', 'slurm', 'settings.ini'): (checkout/name).symlink_to(ROOT/name)
    (checkout/'nbs'/'profiles'/'small.yaml').write_text('common: {}\n')
    for stem in STEMS:
        code = f"from crackxai.core import run_folder, write_json\nwrite_json(run_folder(profile, '{stem.split('_')[0]}')/'{stem}.json', dict(source='generated: toy'))"
        cells = [nbformat.v4.new_code_cell("profile = 'paper'", metadata=dict(tags=['parameters'])), nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='p', language='python'))), checkout/'nbs'/'papers'/f'{stem}.ipynb')
    for name in ('sbatch', 'srun', 'sacct', 'squeue', 'scancel', 'sinfo', 'sacctmgr', 'sshare', 'scontrol'):
        (commands/name).write_text(f'#!{sys.executable} -SE\n{PLAYED}'); (commands/name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{commands}:{os.environ["PATH"]}')
    return checkout, jobs


def test_jobs_get_their_resources_and_one_that_is_killed_is_begun_again(cluster):
    checkout, jobs = cluster
    records = [checkout/'runs'/'small'/'moreh2024'/f'moreh2024_{n}.json' for n in ('10_train', '20_localisation')]
    done = snakemake(checkout, '--slurm-init-seconds-before-status-checks', '1', '--seconds-between-status-checks', '1', records[1].relative_to(checkout), '--config', 'profile=small', PLAYED_JOBS=str(jobs))
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(r.is_file() and (r.parent/'run'/f'{r.stem}.ipynb').is_file() for r in records)
    batch = [line for line in (jobs/'calls').read_text().splitlines() if line.startswith('sbatch')]
    rule = [re.search(r'--comment rule_(\w+)', line)[1] for line in batch]
    assert rule == ['moreh2024_10_train', 'moreh2024_10_train', 'moreh2024_20_localisation']      # the first one was killed
    wanted = yaml.safe_load((ROOT/'slurm'/'config.yaml').read_text())
    for line in batch: assert f'--mem {wanted["default-resources"]["mem_mb"]}' in line and f'-t {wanted["default-resources"]["runtime"]}' in line
    assert all(re.search(r'--gpus[ =]1|--gres=gpu:1', line) for line in batch[:2]) and 'gpu' not in batch[2].split('--wrap')[0] and f'--cpus-per-task={wanted["max-threads"]}' in batch[2]
    again = snakemake(checkout, records[1].relative_to(checkout), '--config', 'profile=small', PLAYED_JOBS=str(jobs))
    assert again.returncode == 0 and (jobs/'calls').read_text().count('sbatch') == 3               # nothing is done twice
