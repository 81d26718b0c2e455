"Everything about the package is read from settings.ini, the one place where it is written."
from configparser import ConfigParser
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='], interpolation=None)
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
readme = Path('README.md')

LICENCES = {'apache2': 'Apache-2.0'}
STATUS = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.is_file() else cfg['description'],
    long_description_content_type='text/markdown',
    keywords=[word.strip() for word in cfg['keywords'].split(',')],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license_expression=LICENCES[cfg['license']],
    url=f"https://github.com/{cfg['user']}/{cfg['repo']}",
    project_urls={'Source': f"https://github.com/{cfg['user']}/{cfg['repo']}"},
    classifiers=[
        f"Development Status :: {STATUS[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        f"Programming Language :: Python :: {cfg['min_python']}",
        'Topic :: Scientific/Engineering :: Image Processing',
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg['lib_name'], f"{cfg['lib_name']}.*"]),
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'cluster': cfg['cluster_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    # the shipped weights and their cards; see crackxai.core.weights_dir
    data_files=[('share/crackxai/weights', sorted(glob('data/weights/*.safetensors') + glob('data/weights/*.json') + glob('data/weights/*.md')))],
    zip_safe=False,
)
