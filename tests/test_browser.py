"The interactive page in JupyterLab and a real browser, as a new user meets it. Screenshots are kept in runs/browser/ to look at."
import json, re, secrets, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest
from PIL import Image

from conftest import photo
from crackxai.core import read_csv, weights_dir
from crackxai.run_report import run_report

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
PATIENCE = 300   # seconds: much more than anything takes, so that a busy machine is no failure
try: from playwright.sync_api import TimeoutError as TooLate, expect, sync_playwright
except ImportError: sync_playwright = None
else: expect.set_options(timeout=1000*PATIENCE)

pytestmark = [pytest.mark.skipif(sync_playwright is None, reason='playwright is not installed: pip install playwright'),
              pytest.mark.skipif(CHROMIUM is None, reason='no chromium here: on Debian, apt-get install chromium'),
              pytest.mark.skipif(not all((weights_dir()/f'{n}.safetensors').is_file() for n in ('masonry', 'dic', 'wave')), reason='the shipped weights are not here')]


def answers(url):
    try: return urllib.request.urlopen(url, timeout=30).status == 200
    except OSError: return False


@pytest.fixture(scope='module')
def lab(tmp_path_factory, run_process):
    "JupyterLab on a copy of the notebook, on a free port, with nobody's settings; its kernels reach no network."
    work, token = tmp_path_factory.mktemp('lab'), secrets.token_hex(16)
    shutil.copy(ROOT/'nbs'/'inspect.ipynb', work)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    (work/'settings').mkdir()
    quiet = {'@jupyterlab/apputils-extension:notification': dict(fetchNews='false', checkForUpdates=False)}
    (work/'settings'/'overrides.json').write_text(json.dumps(quiet))
    env = run_process.env | {f'JUPYTER_{name}_DIR': str(work/f'.{name.lower()}') for name in ('CONFIG', 'DATA', 'RUNTIME')} | dict(IPYTHONDIR=str(work/'.ipython'), OMP_NUM_THREADS='1')
    env = {k: v for k, v in env.items() if k not in ('CRACKXAI_DATA', 'MPLBACKEND')}
    command = [sys.executable, '-m', 'jupyterlab', 'inspect.ipynb', '--no-browser', '--allow-root', f'--ServerApp.port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={work}',
               f'--LabApp.app_settings_dir={work/"settings"}', '--ServerApp.tornado_settings={"websocket_max_message_size": 104857600}']
    log = open(work/'log.txt', 'w')
    server = subprocess.Popen(command, cwd=work, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.time() + PATIENCE
        while not answers(f'http://127.0.0.1:{port}/api?token={token}'):
            assert server.poll() is None and time.time() < until, (work/'log.txt').read_text()[-2000:]
            time.sleep(.5)
        yield SimpleNamespace(work=work, url=f'http://127.0.0.1:{port}/lab/tree/inspect.ipynb?token={token}', kernels=f'http://127.0.0.1:{port}/api/kernels?token={token}', out=work/'inspect_out')
    finally:
        server.terminate()
        try: server.wait(15)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


def kernel_is_there(lab):
    "JupyterLab shows a kernel as idle before there is one; the server knows better."
    with urllib.request.urlopen(lab.kernels, timeout=30) as answer: return any(k['execution_state'] == 'idle' and k['connections'] for k in json.load(answer))


def run_all(page, lab):
    """Run All Cells until the page is there. On a busy machine JupyterLab may ask which kernel it should take, or replace its first
    one, and what was asked before is forgotten without a word: every prompt is empty again. So the prompts are watched."""
    prompts, dialog, until = page.locator('.jp-CodeCell .jp-InputPrompt'), page.locator('.jp-Dialog'), time.time() + PATIENCE
    while not page.locator('.crackxai-surface-picture').count():
        if time.time() > until:
            keep(page, 'failed')
            raise TimeoutError(f'the page did not come: prompts {prompts.all_inner_texts()}, dialogs {dialog.all_inner_texts()}, server: {(lab.work/"log.txt").read_text()[-2000:]}')
        if dialog.count(): dialog.first.locator('.jp-mod-accept').click()
        elif kernel_is_there(lab) and not any(c in text for text in prompts.all_inner_texts() for c in '*0123456789'):
            try:
                page.get_by_role('menuitem', name='Run', exact=True).click(timeout=5000)
                page.locator('.lm-Menu-item', has_text='Run All Cells').first.click(timeout=5000)
            except TooLate: pass      # something came between, it is looked at in the next round
        page.wait_for_timeout(2000)


@pytest.fixture(scope='module')
def browser_page(lab):
    "The page after all cells were run, and what the console complained of."
    errors = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1680, height=1180))
        page.set_default_timeout(1000*PATIENCE)
        page.on('console', lambda m: errors.append(f'{m.text} ({m.location.get("url", "")})') if m.type == 'error' else None)
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.goto(lab.url)
        page.locator('.jp-Notebook .jp-Cell').first.wait_for()
        run_all(page, lab)
        errors[:] = [e for e in errors if '/api/kernels' not in e]      # of a kernel that was replaced before anything ran
        page.keyboard.press('Control+b')                     # the file browser makes room
        page.locator('.crackxai-surface-picture').scroll_into_view_if_needed()
        yield SimpleNamespace(page=page, errors=errors, browser=browser)
        browser.close()


def keep(page, name):
    folder = ROOT/'runs'/'browser'
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder/f'{name}.png')


class Tab:
    "One tab of the page, as it is seen."
    def __init__(self, page, name): self.page, self.name = page, name
    def at(self, part): return self.page.locator(f'.crackxai-{self.name}-{part}').first
    def text(self, part): return self.at(part).inner_text()
    def shot(self):
        "The picture and the numbers."
        self.page.wait_for_function('e => e.complete && e.naturalWidth > 0', arg=self.at('picture').element_handle())
        return self.at('picture').screenshot(), self.text('numbers')
    def changed(self, before, setting, numbers=True):
        "Another picture (and other numbers), once the view with this setting is there: its line of Python comes last."
        expect(self.at('line').locator('textarea')).to_have_value(re.compile(re.escape(setting)))
        expect(self.at('message')).to_have_text('')
        self.page.wait_for_timeout(300)
        now = self.shot()
        assert now[0] != before[0] and (not numbers or now[1] != before[1]), f'{self.name}: {setting} changed nothing'
        return now
    def slide(self, part, key, times=1):
        handle = self.at(part).locator('.noUi-handle')
        for _ in range(times): handle.press(key)
    def choose(self, part, label): self.at(part).locator('select').select_option(label=label)
    def upload(self, path):
        with self.page.expect_file_chooser() as chooser: self.at('upload').click()
        chooser.value.set_files(path)
    def line(self): return self.at('line').locator('textarea').input_value()
    def saved(self, lab, n):
        self.at('save').click()
        expect(self.at('message')).to_contain_text('Saved')
        png, csv = lab.out/f'{self.name}-{n}.png', lab.out/f'{self.name}-{n}.csv'
        assert str(png) in self.text('message')
        space = {}
        exec(self.line(), space)                                # the copied line, in this process
        assert (np.asarray(Image.open(png)) == space['view'].picture).all() and read_csv(csv)[0]['line'] == self.line()


def test_static_pictures_come_first(browser_page):
    page = browser_page.page
    places = page.evaluate("['.jp-RenderedImage img', '.crackxai-surface-picture'].map(s => [...document.querySelectorAll(s)].map(e => e.getBoundingClientRect().top))")
    assert len(places[0]) == 3 and max(places[0]) < min(places[1])
    assert page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0


def test_surface(browser_page, lab, tmp_path):
    page, tab = browser_page.page, Tab(browser_page.page, 'surface')
    first = tab.shot()
    keep(page, '1_surface')
    tab.slide('close1', 'ArrowRight', 6)
    closed = tab.changed(first, 'close1=17')
    box = tab.at('strength').locator('.noUi-handle').bounding_box()                 # a drag with the mouse
    page.mouse.move(box['x'] + box['width']/2, box['y'] + box['height']/2); page.mouse.down(); page.mouse.move(box['x'] + 60, box['y'] + 5, steps=8); page.mouse.up()
    strength = float(tab.at('strength').locator('.widget-readout').inner_text())
    assert strength > .5
    tinted = tab.changed(closed, f'strength={strength}', numbers=False)
    tab.choose('method', 'DeepLift')
    other = tab.changed(tinted, "method='deeplift'")
    assert 'DeepLift' in other[1] and 'LRP' not in other[1]
    tab.saved(lab, 1)
    keep(page, '2_surface_deeplift')
    tab.choose('compare', 'nothing')
    alone = tab.changed(other, "compare=''")
    tab.upload(photo(tmp_path/'my wall.png', 150, 180))
    mine = tab.changed(alone, 'my_wall.png')
    assert 'my_wall.png' in tab.at('sample').locator('select').locator('option:checked').inner_text()
    (tmp_path/'cut.png').write_bytes((tmp_path/'my wall.png').read_bytes()[:300])
    tab.upload(tmp_path/'cut.png')
    expect(tab.at('message')).to_contain_text('cut.png: ')
    assert tab.shot() == mine and 'my_wall.png' in tab.line() and len(tab.text('message').splitlines()) == 1
    keep(page, '3_surface_bad_upload')
    tab.saved(lab, 2)


def test_a_large_upload_gets_through(browser_page, tmp_path):
    tab, noise = Tab(browser_page.page, 'surface'), np.random.default_rng(0).integers(0, 255, (2200, 2400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path/'large.png')
    assert (tmp_path/'large.png').stat().st_size > 12e6             # more than the server's usual limit
    before = tab.shot()
    tab.upload(tmp_path/'large.png')
    tab.changed(before, 'large.png')


def test_dic(browser_page, lab, tmp_path):
    page, tab = browser_page.page, Tab(browser_page.page, 'dic')
    page.locator('.lm-TabBar-tab', has_text='DIC').last.click()
    tab.at('picture').scroll_into_view_if_needed()
    first = tab.shot()
    keep(page, '4_dic')
    tab.slide('stage', 'ArrowRight', 3)
    grown = tab.changed(first, 'stage=9')
    tab.choose('layer', 'base')
    layer = tab.changed(grown, "layer='base'")
    tab.choose('shown', 'u_y, across the crack')
    tab.changed(layer, "shown='u_y'", numbers=False)
    tab.saved(lab, 1)
    keep(page, '5_dic_layer')
    np.savez(tmp_path/'wrong.npz', image=np.ones(3))
    tab.upload(tmp_path/'wrong.npz')
    expect(tab.at('message')).to_contain_text('no array displacement_mm')


def test_waves(browser_page, lab):
    page, tab = browser_page.page, Tab(browser_page.page, 'waves')
    page.locator('.lm-TabBar-tab', has_text='Waves').last.click()
    tab.at('picture').scroll_into_view_if_needed()
    first = tab.shot()
    keep(page, '6_waves')
    step, play = lambda: int(re.search(r'step=(\d+)', tab.line()).group(1)), tab.at('play').locator('button')
    play.first.click()
    page.wait_for_function('e => Number(/step=(\\d+)/.exec(e.value)[1]) >= 480', arg=tab.at('line').locator('textarea').element_handle())
    play.first.click()                                           # and stop
    last = -1
    while last != step(): last = step(); page.wait_for_timeout(1500)
    moved = tab.shot()
    assert moved[0] != first[0] and moved[1] != first[1]
    tab.choose('method', 'LRP')
    tab.changed(moved, "method='lrp'")
    tab.saved(lab, 1)
    keep(page, '7_waves_played')


def test_every_control_has_its_tooltip_in_the_page(browser_page):
    page = browser_page.page
    for name, parts in dict(surface='sample weights method compare baseline threshold close1 min_area close2 strength truth across down save upload folder', dic='sample stage shown layer view_mm side weights save upload',
                            waves='sample step shown method sensor weights save upload').items():
        for part in parts.split():
            told = Tab(page, name).at(part).evaluate('e => [e, ...e.querySelectorAll("[title]")].map(x => x.getAttribute("title") || "").join("")')
            assert len(told) > 4, f'{name} {part} has no tooltip'


def test_nothing_complained(browser_page, lab):
    assert browser_page.errors == []
    log = (lab.work/'log.txt').read_text().rpartition('Connecting to kernel')[2]       # from the kernel that ran the page
    assert not [line for line in log.splitlines() if 'Traceback' in line or 'NetworkUsed' in line]


def test_the_report_opens_without_a_network(browser_page, tmp_path):
    shutil.copytree(ROOT/'figures', tmp_path/'run')
    report, asked, errors = run_report(tmp_path/'run', 'cpu'), [], []
    shutil.move(report, tmp_path/'alone.html')                   # nothing lies beside it
    context = browser_page.browser.new_context(offline=True, viewport=dict(width=1200, height=900))
    page = context.new_page()
    page.set_default_timeout(1000*PATIENCE)
    page.on('request', lambda r: asked.append(r.url)); page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    page.goto((tmp_path/'alone.html').as_uri())
    pictures = page.locator('img')
    assert pictures.count() >= 20 and all(pictures.evaluate_all('all => all.map(e => e.complete && e.naturalWidth > 0)'))
    assert all(url.startswith(('data:', (tmp_path/'alone.html').as_uri())) for url in asked), asked
    page.locator('nav a', has_text='moreh2024_20').click()
    assert page.evaluate('scrollY') > 0
    folded = page.locator('details').first
    folded.locator('summary').click()
    expect(folded.locator('table')).to_be_visible()
    keep(page, '8_report')
    context.close()
    assert errors == []
