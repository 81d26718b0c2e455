# What is made from what. `make reproduce PROFILE=quick` runs it; each node is one notebook run by papermill.
# A killed run goes on where it stopped: finished notebooks are kept, and a training inside one resumes from its checkpoint.
# On a cluster: slurm/config.yaml.
import sys
from pathlib import Path

PROFILE = config.get('profile', 'quick')
RUN = f'runs/{PROFILE}'
PARAMETERS = f'nbs/profiles/{PROFILE}.yaml'
# The quick profile's networks are too small for a second thread: as many notebooks at a time as there are cores. The others take one notebook at a time, on all cores.
THREADS = 1 if PROFILE == 'quick' else workflow.cores

# notebook: the notebooks whose results it needs
NOTEBOOKS = {
    'forest2024_10_classifier': [],
    'forest2024_15_explainers': ['forest2024_10_classifier'],
    'forest2024_20_attribution': ['forest2024_10_classifier'],
    'forest2024_30_segmentation': ['forest2024_10_classifier', 'forest2024_15_explainers'],
    'forest2024_35_augsmooth': ['forest2024_10_classifier', 'forest2024_15_explainers'],
    'forest2024_40_severity': ['forest2024_30_segmentation'],
    'forest2024_45_runtime': ['forest2024_10_classifier', 'forest2024_15_explainers'],
    'forest2024_50_growth': ['forest2024_15_explainers', 'forest2024_40_severity'],
    'forest2024_55_faithfulness': ['forest2024_10_classifier', 'forest2024_15_explainers'],
    'forest2024_60_sensitivity': ['forest2024_10_classifier'],
    'melching2022_10_train': [],
    'melching2022_20_performance': ['melching2022_10_train'],
    'melching2022_30_attention': ['melching2022_10_train'],
    'melching2022_40_stability': ['melching2022_20_performance'],
    'melching2022_50_trust': ['melching2022_10_train', 'melching2022_20_performance'],
    'moreh2024_10_train': [],
    'moreh2024_20_localisation': ['moreh2024_10_train'],
    'moreh2024_30_cost': [],
    'moreh2024_40_explanation': ['moreh2024_10_train'],
    'moreh2024_50_beyond': ['moreh2024_10_train'],
    'beyond_10_weak_to_pixel': ['forest2024_10_classifier'],
    'beyond_20_labels': ['beyond_10_weak_to_pixel'],
}

if not Path(PARAMETERS).is_file():
    known = ', '.join(sorted(p.stem for p in Path('nbs/profiles').glob('*.yaml'))) or 'none'
    raise WorkflowError(f'profile {PROFILE}: {PARAMETERS} is missing; choose one of: {known}')


def record(stem):
    "The JSON sidecar of a notebook's results."
    return f"{RUN}/{stem.split('_')[0]}/{stem}.json"


def executed(stem):
    "The executed copy of a notebook."
    return f"{RUN}/{stem.split('_')[0]}/run/{stem}.ipynb"


rule summary:
    input: [record(stem) for stem in NOTEBOOKS]
    output: f'{RUN}/published_vs_reproduced.csv', f'{RUN}/report.html', f'{RUN}/hashes.csv'
    message: 'published_vs_reproduced'
    localrule: True
    shell: f'{sys.executable} -m crackxai.reproduce --collect --profile {PROFILE}'


for stem, needs in NOTEBOOKS.items():
    rule:
        name: stem
        input:
            notebook=f'nbs/papers/{stem}.ipynb',
            profile=PARAMETERS,
            needs=[record(n) for n in needs],
        output:
            notebook=executed(stem),
            record=record(stem),
        params: stem=stem
        threads: THREADS         # on a cluster at most the profile's max-threads
        message: '{params.stem}'
        shell: f'OMP_NUM_THREADS={{threads}} MKL_NUM_THREADS={{threads}} OPENBLAS_NUM_THREADS={{threads}} {sys.executable} -m crackxai.reproduce {{params.stem}} --profile {PROFILE}'
