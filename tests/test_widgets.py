"What the interactive page promises, without a browser: controls through their values, uploads, saved views, the line of Python."
import html, io, json, time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from PIL import Image

import crackxai.inspector as inspector_module
from conftest import left_over, photo
from crackxai.core import read_csv
from crackxai.inspector import LARGEST, STAGES, surface
from crackxai.inspector_page import inspector
from crackxai.data.specimens import fields
from crackxai.data.wave import simulate
from crackxai.models.classify import save_weights
from crackxai.models.keypoint import SensorNet
from crackxai.models.tip import ParallelNets

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def weights(tiny_weights, tmp_path_factory):
    "Files of untrained networks, one for each tab; the first takes every tile for cracked."
    folder = tmp_path_factory.mktemp('page')
    torch.manual_seed(0)
    save_weights(ParallelNets(2), folder/'dic.safetensors', tip_finder=dict(size=32, min_confidence=0., threshold=.01))
    save_weights(SensorNet(500, pool=1, width=8), folder/'wave.safetensors', crack_locator=dict(threshold=0))
    return [str(tiny_weights.cracked), str(folder/'dic.safetensors'), str(folder/'wave.safetensors')]


@pytest.fixture
def page(weights, tmp_path, monkeypatch):
    monkeypatch.delenv('CRACKXAI_DATA', raising=False)
    inspector_module.masonry_here.cache_clear()
    yield SimpleNamespace(out=tmp_path/'out', tabs=inspector(tmp_path/'out', *weights).tabs)
    inspector_module.masonry_here.cache_clear()


def give(tab, name, content):
    tab.upload.value = (dict(name=name, type='', size=len(content), content=memoryview(content), last_modified=datetime.now()),)


def again(tab):
    "The view that the line in the text box makes."
    space = {}
    exec(tab.line.value, space)
    return space['view']


def npz(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def pixels(tab): return np.asarray(Image.open(io.BytesIO(tab.picture.value)))


def test_every_part_has_a_tooltip_and_nothing_complains(page):
    for name, tab in page.tabs.items():
        parts = [*tab.controls.values(), tab.upload, tab.save, tab.folder, tab.line]
        assert all(len(p.tooltip) > 4 for p in parts) and len({p.tooltip for p in parts}) == len(parts), name
        assert tab.message.value == '' and tab.numbers.value.count('<tr>') > 5 and len(tab.said.value) > 60


@pytest.mark.parametrize('tab, changes', [
    ('Surface', dict(method='deeplift', compare='', threshold='simple', close1=21, min_area=400, close2=41, strength=.9, truth=False, sample='wall 3')),
    ('DIC', dict(shown='u_y', layer='up4', stage=2, sample='S_160_2.0 seed 0')),
    ('Waves', dict(shown='scattered', method='deeplift', sensor=5, step=800, sample='plate 1'))])
def test_each_control_changes_the_picture_and_the_line_makes_it_again(page, tab, changes):
    tab = page.tabs[tab]
    for name, value in changes.items():
        before, shown = tab.view, pixels(tab)
        tab.controls[name].value = value
        assert tab.message.value == '' and (tab.view.picture.shape != before.picture.shape or (tab.view.picture != before.picture).any()), name
        assert pixels(tab).shape != shown.shape or (pixels(tab) != shown).any(), name
        assert f'{name}={value!r}' in tab.line.value
    made = again(tab)
    assert (made.picture == tab.view.picture).all() and made.rows == tab.view.rows and '\n' not in tab.line.value


def test_baselines(page):
    tab = page.tabs['Surface']
    tab.controls['compare'].value = ''
    assert tab.controls['baseline'].disabled                       # LRP asks for none
    tab.controls['method'].value = 'intgrad'
    assert not tab.controls['baseline'].disabled
    maps = []
    for key in ('intact', 'blurred', 'mean', 'black'):
        tab.controls['baseline'].value = key
        assert tab.message.value == ''
        maps.append(tab.view.picture)
    assert all((a != b).any() for i, a in enumerate(maps) for b in maps[:i] if i != 1)   # no tile is intact here, so a blurred one stands in


def test_sliders_explain_nothing_anew(page, monkeypatch):
    tab, calls, real = page.tabs['Surface'], [], inspector_module.attribute
    monkeypatch.setattr(inspector_module, 'attribute', lambda *a, **k: (calls.append(a[2]), real(*a, **k))[1])
    inspector_module.explain.cache_clear()
    tab.controls['sample'].value = 'wall 6'
    assert sorted(calls) == ['input_x_gradient', 'lrp']
    for name, value in dict(close1=9, min_area=10, close2=15, strength=.2, threshold='simple', truth=False).items(): tab.controls[name].value = value
    assert len(calls) == 2
    tab.controls['method'].value = 'deeplift'
    assert calls[2:] == ['deeplift']
    tab.controls['method'].value = 'lrp'
    assert len(calls) == 3


def test_a_slider_follows_within_a_tenth_of_a_second(page):
    tab, seconds = page.tabs['Surface'], []
    assert inspector_module.photo(tab.controls['sample'].value)[0].shape == (3, 256, 256) and tab.controls['compare'].value   # two methods at once
    for value in range(1, 24, 2):
        start = time.process_time()
        tab.controls['close1'].value = value
        seconds.append(time.process_time() - start)                # of this process: other work on the machine does not count
    print(f'{1000*np.median(seconds):.0f} ms, best {1000*min(seconds[1:]):.0f} ms')
    assert min(seconds[1:]) < .1


def test_no_crack_is_said(weights, tiny_weights):
    view = surface('intact 1', str(tiny_weights.intact))
    assert 'nothing to explain' in view.said and view.rows[0]['cracks'] == 0 and view.rows[0]['max_width_px'] is None
    assert 'nothing to explain' in surface('intact 1', str(tiny_weights.intact), compare='deeplift').said


def test_upload_an_image(page, tmp_path):
    tab, content = page.tabs['Surface'], photo(tmp_path/'my wall.png', 150, 170).read_bytes()
    before = tab.view
    give(tab, 'my wall.png', content)
    assert tab.message.value == '' and tab.view is not before and tab.upload.value == ()
    assert tab.controls['sample'].label == 'my_wall.png (uploaded)' and (page.out/'uploads'/'my_wall.png').read_bytes() == content
    assert (again(tab).picture == tab.view.picture).all() and 'iou_with_truth' not in tab.view.rows[0]
    assert tab.controls['across'].disabled and tab.controls['down'].disabled
    tab.controls['sample'].value = 'wall 1'
    assert (tab.view.picture == before.picture).all()              # and back


def test_part_of_a_large_photo(page, tmp_path):
    tab = page.tabs['Surface']
    give(tab, 'large.png', photo(tmp_path/'large.png', 200, LARGEST + 300).read_bytes())
    assert not tab.controls['across'].disabled and tab.controls['down'].disabled
    before = tab.view
    tab.controls['across'].value = 0.
    assert tab.message.value == '' and (tab.view.picture != before.picture).any() and (again(tab).picture == tab.view.picture).all()


def test_upload_a_field_and_waves(page, tmp_path):
    u, tab = fields(1, 1, specimen='S_160_4.7', size=48, load=1., crop=False).displacement[0], page.tabs['DIC']
    give(tab, 'mine.npz', npz(displacement_mm=u, field_of_view_mm=70.))
    assert tab.message.value == '' and tab.controls['stage'].disabled and tab.controls['stage'].value == 0 and (again(tab).picture == tab.view.picture).all()
    tab.controls['sample'].value = 'S_160_4.7 seed 0'
    tab.controls['stage'].value = STAGES - 1
    assert tab.view.rows[0]['stage'] == STAGES - 1
    cracked, intact = simulate([[.3, .4, .6, .7], np.zeros((0, 4))])
    tab = page.tabs['Waves']
    give(tab, 'plate.npz', npz(waves=cracked, reference=intact))
    assert tab.message.value == '' and (again(tab).picture == tab.view.picture).all() and tab.controls['sample'].label == 'plate.npz (uploaded)'
    former = tab.view
    give(tab, 'alone.npz', npz(waves=cracked))
    tab.controls['shown'].value = 'scattered'
    assert 'no uncracked plate' in tab.message.value and tab.view is not former


BAD = [('Surface', 'cut.png', None, 'cut.png'), ('Surface', 'text.jpg', b'hello', 'text.jpg'), ('Surface', 'empty.png', b'', 'empty.png'),
       ('DIC', 'cut.npz', npz(displacement_mm=np.ones((2, 64, 64)), field_of_view_mm=70.)[:900], 'not a whole .npz archive'), ('DIC', 'other.npz', npz(image=np.ones(3)), 'no array displacement_mm'),
       ('DIC', 'map.txt', b'1;2;3\n', 'map.txt'), ('Waves', 'other.npz', npz(image=np.ones(3)), "has no array 'waves'"), ('Waves', 'cut.npz', b'PK', 'not an .npz file'),
       ('Waves', 'short.npz', npz(waves=np.random.default_rng(0).normal(size=(2, 300, 9, 9))), '300 time steps'), ('Waves', 'five.npz', npz(waves=np.random.default_rng(0).normal(size=(2, 2000, 5, 5))), '5 x 5 sensors')]


@pytest.mark.parametrize('tab, name, content, said', BAD, ids=[f'{t}-{n}' for t, n, *_ in BAD])
def test_a_bad_upload_costs_one_line_and_the_view_stays(page, tmp_path, tab, name, content, said):
    tab = page.tabs[tab]
    former, shown, sample, line = tab.view, tab.picture.value, tab.controls['sample'].value, tab.line.value
    give(tab, name, photo(tmp_path/'whole.png').read_bytes()[:200] if content is None else content)
    assert said in html.unescape(tab.message.value) and '\n' not in tab.message.value and 'Traceback' not in tab.message.value
    assert (tab.view, tab.picture.value, tab.controls['sample'].value, tab.line.value, tab.upload.value) == (former, shown, sample, line, ())
    assert not left_over(page.out)
    first = next(n for n in ('strength', 'layer', 'sensor') if n in tab.controls)
    tab.controls[first].value = dict(strength=.8, layer='up4', sensor=2)[first]
    assert tab.message.value == '' and tab.view is not former      # and the page goes on


def test_saved(page):
    for tab in page.tabs.values():
        for n in (1, 2):
            tab.save.click()
            png, csv = page.out/f'{tab.name}-{n}.png', page.out/f'{tab.name}-{n}.csv'
            assert str(png) in tab.message.value and csv.name in tab.message.value
            assert (np.asarray(Image.open(png)) == tab.view.picture).all() and Image.open(png).text['Source'] == tab.line.value
            rows = read_csv(csv)
            assert len(rows) == len(tab.view.rows) and all(r['line'] == tab.line.value for r in rows) and set(tab.view.rows[0]) <= set(rows[0])
    assert not left_over(page.out) and len(list(page.out.iterdir())) == 12


def test_a_folder_that_cannot_be_used_is_told(page, tmp_path):
    (tmp_path/'file').write_text('')
    page.tabs['DIC'].folder.value = str(tmp_path/'file')
    page.tabs['DIC'].save.click()
    assert 'choose another folder' in page.tabs['DIC'].message.value
    give(page.tabs['Surface'], 'a.png', photo(tmp_path/'a.png').read_bytes())
    assert 'choose another folder' in page.tabs['Surface'].message.value


@pytest.mark.parametrize('tab', ['Surface', 'DIC', 'Waves'])
def test_other_weights(page, tab, weights):
    tab = page.tabs[tab]
    former, good = tab.view, tab.controls['weights'].value
    for bad in ('nothing_of_that_name', weights[1] if good != weights[1] else weights[0]):
        tab.controls['weights'].value = bad
        assert tab.message.value and '\n' not in tab.message.value and tab.view is former
    tab.controls['weights'].value = good
    assert tab.message.value == ''


def test_play_moves_time(page, weights):
    tab = page.tabs['Waves']
    play = next(w for w in tab.box.children[0].children if type(w).__name__ == 'Play')
    play.value = 900
    assert tab.controls['step'].value == 900 and tab.view.rows[0]['step'] == 900 and tab.message.value == ''


def test_the_notebook_is_stored_clean():
    book = json.loads((ROOT/'nbs'/'inspect.ipynb').read_text(encoding='utf-8'))
    code = [''.join(c['source']) for c in book['cells'] if c['cell_type'] == 'code']
    assert 'widgets' not in book['metadata'] and not any(c['outputs'] for c in book['cells'] if c['cell_type'] == 'code')
    assert code[-1] == 'inspector()' and [c.split('(')[0] for c in code[1:-1]] == ['view = surface', 'view = field', 'view = waves']   # pictures first
