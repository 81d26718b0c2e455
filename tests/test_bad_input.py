"Every fault of an image file: it works or it is told in one line, and the photo beside it is always done."
import io, os, struct, sys, zlib

import numpy as np, pytest
from PIL import Image

from conftest import left_over, photo, pixels
from crackxai.core import read_csv

EVEN = pixels(40, 60)                                             # 60 wide, 40 high
GREY = np.linspace(0, 1, 40*60, dtype=np.float32).reshape(40, 60)


def encoded(image, kind, **options):
    memory = io.BytesIO()
    image.save(memory, kind, **options)
    return memory.getvalue()


def picture(pixels, mode=None, **options):
    "Writer of a picture in the format of its name."
    def write(path): (Image.fromarray(pixels).convert(mode) if mode else Image.fromarray(pixels)).save(path, **options)
    return write


def content(make):
    return lambda path: path.write_bytes(make())


def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def huge_png(side):
    "A valid PNG header that declares side x side pixels, and hardly any data."
    header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(100))) + chunk(b'IEND', b'')


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6                                              # shown turned by a quarter
    Image.fromarray(EVEN).save(path, exif=exif)


def transparent(path):
    alpha = np.full((40, 60, 1), 255, np.uint8); alpha[:20] = 0
    Image.fromarray(np.concatenate([EVEN, alpha], 2)).save(path)


def tiff(change):
    values = GREY.copy()
    change(values)
    return picture(values)


def folder(path): path.mkdir(); photo(path/'inside.png')
def set_value(value): return lambda a: a.__setitem__((3, 4), value)


# name of the file, how it is made, size of its mask (None: must fail)
FAULTS = {
    'empty file': ('x.png', content(lambda: b''), None),
    'truncated png': ('x.png', content(lambda: encoded(Image.fromarray(EVEN), 'PNG')[:600]), None),
    'truncated jpeg': ('x.jpg', content(lambda: encoded(Image.fromarray(EVEN), 'JPEG')[:700]), None),
    'damaged png': ('x.png', content(lambda: encoded(Image.fromarray(EVEN), 'PNG').replace(b'IDAT', b'IDAX')), None),
    'text': ('x.png', content(lambda: b'not a picture'), None),
    'web page': ('x.jpg', content(lambda: b'<!doctype html><title>404</title>'), None),
    'one pixel': ('x.png', picture(EVEN[:1, :1]), (1, 1)),
    'one row of 10000 pixels': ('x.png', picture(np.tile(EVEN, (1, 200, 1))[:1, :10000]), (10000, 1)),
    'one row': ('x.png', picture(np.tile(EVEN, (1, 9, 1))[:1, :500]), (500, 1)),
    'one column': ('x.png', picture(np.tile(EVEN, (13, 1, 1))[:500, :1]), (1, 500)),
    'grey': ('x.png', picture(EVEN, 'L'), (60, 40)),
    'black and white': ('x.png', picture(EVEN, '1'), (60, 40)),
    'transparency': ('x.png', transparent, (60, 40)),
    'grey with transparency': ('x.png', picture(EVEN, 'LA'), (60, 40)),
    'cmyk': ('x.jpg', picture(EVEN, 'CMYK'), (60, 40)),
    'palette': ('x.png', picture(EVEN, 'P'), (60, 40)),
    'palette with transparency': ('x.png', lambda p: Image.fromarray(EVEN).convert('P').save(p, transparency=0), (60, 40)),
    '16-bit grey': ('x.png', picture((GREY*65535).astype(np.uint16)), (60, 40)),
    'float 0..1': ('x.tif', tiff(lambda a: None), (60, 40)),
    'float 0..255': ('x.tif', tiff(lambda a: a.__imul__(255)), None),
    'float with NaN': ('x.tif', tiff(set_value(np.nan)), None),
    'float with infinity': ('x.tif', tiff(set_value(np.inf)), None),
    'negative float': ('x.tif', tiff(set_value(-.5)), None),
    'rotated by EXIF': ('x.jpg', rotated, (40, 60)),
    'all black': ('x.png', picture(np.zeros((40, 60, 3), np.uint8)), (60, 40)),
    'all white': ('x.png', picture(np.full((40, 60, 3), 255, np.uint8)), (60, 40)),
    'another format than its name': ('x.png', content(lambda: encoded(Image.fromarray(EVEN), 'JPEG')), (60, 40)),
    'spaces in the name': ('old wall 1.png', picture(EVEN), (60, 40)),
    'umlauts in the name': ('Häuserwand Straße.png', picture(EVEN), (60, 40)),
    'newline in the name': ('wall\n1.png', picture(EVEN), (60, 40)),
    'leading dash': ('-rf.png', picture(EVEN), (60, 40)),
    'comma and quote in the name': ('a,"b".png', picture(EVEN), (60, 40)),
    'broken and newline in the name': ('wall\n1.png', content(lambda: b'no'), None),
    'broken and umlauts in the name': ('Häuser.png', content(lambda: b'no'), None),
    'too long a name for its results': ('w\n' + 'x'*246 + '.png', picture(EVEN), None),
    'a suffix in capitals': ('X.PNG', picture(EVEN), (60, 40)),
    'an animation': ('x.webp', lambda p: Image.fromarray(EVEN).save(p, save_all=True, append_images=[Image.fromarray(EVEN[::-1])], lossless=True), (60, 40)),
    'several pages': ('x.tif', lambda p: Image.fromarray(EVEN).save(p, save_all=True, append_images=[Image.fromarray(EVEN[::-1])]), (60, 40)),
    'a video with that name': ('x.jpg', content(lambda: b'\0\0\0\x18ftypmp42' + bytes(500)), None),
    'link to itself': ('x.png', lambda p: p.symlink_to(p.name), None),
    'link to nothing': ('x.png', lambda p: p.symlink_to('gone.png'), None),
    '100000 x 100000 pixels declared': ('x.png', content(lambda: huge_png(100_000)), None),
    '2000000000 x 2000000000 pixels declared': ('x.png', content(lambda: huge_png(2_000_000_000)), None),
}
POSIX = ('newline', 'quote', 'link', 'too long')


@pytest.mark.parametrize('fault', FAULTS)
def test_fault_beside_a_good_photo(run, tiny_weights, tmp_path, said, fault):
    "It is segmented, or its line names file, reason and remedy; the photo beside it is done."
    if sys.platform == 'win32' and any(word in fault for word in POSIX): pytest.skip('no such name or link on Windows')
    name, make, size = FAULTS[fault]
    good, bad, out = photo(tmp_path/'in'/'zz_good.png', 50, 70), tmp_path/'in'/name, tmp_path/'out'
    make(bad)
    r = run('segment', tmp_path/'in', '--out', out, '--weights', tiny_weights.cracked)
    rows = {row['file']: row for row in read_csv(out/'severity.csv')}
    assert str(good) in rows and Image.open(out/'zz_good_mask.png').size == (70, 50) and not left_over(out)
    if size:
        assert r.code == 0 and str(bad) in rows and not (out/'failures.csv').exists(), r.output
        assert Image.open(out/f'{bad.stem}_mask.png').size == Image.open(out/f'{bad.stem}_overlay.png').size == size
    else:
        assert r.code == 3 and len(rows) == 1
        assert (out/'failures.csv').read_text(encoding='utf-8').splitlines()[0] == 'file,reason'
        (failure,) = read_csv(out/'failures.csv')
        said(failure['reason'])
        assert failure['file'] == str(bad)
        assert ' '.join(name.split()) in failure['reason'] and '\n' not in failure['reason'], failure['reason']
        assert sorted(p.name for p in out.iterdir()) == ['failures.csv', 'severity.csv', 'zz_good_mask.png', 'zz_good_overlay.png']


def test_a_folder_with_the_name_of_a_picture_is_searched_through(run, tiny_weights, tmp_path):
    photo(tmp_path/'in'/'good.png'); folder(tmp_path/'in'/'x.png')
    assert run('segment', tmp_path/'in', '--out', tmp_path/'out', '--weights', tiny_weights.plain).code == 0
    assert len(read_csv(tmp_path/'out'/'severity.csv')) == 2


@pytest.mark.skipif(sys.platform == 'win32', reason='links need rights on Windows')
def test_a_folder_linked_into_itself_ends(run, tiny_weights, tmp_path):
    photo(tmp_path/'in'/'good.png')
    for name in ('again', 'again.png'): (tmp_path/'in'/name).symlink_to('.')
    assert run('segment', tmp_path/'in', '--out', tmp_path/'out', '--weights', tiny_weights.plain).code == 0
    assert len(read_csv(tmp_path/'out'/'severity.csv')) == 1


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='only Linux allows any bytes in a name')
def test_a_name_that_is_not_utf8_costs_no_other_photo(run, tiny_weights, tmp_path):
    photo(tmp_path/'in'/'good.png')
    with open(os.fsencode(tmp_path/'in') + b'/w\xff.png', 'wb') as f: f.write(encoded(Image.fromarray(EVEN), 'PNG'))
    assert run('segment', tmp_path/'in', '--out', tmp_path/'out', '--weights', tiny_weights.plain).code in (0, 3)
    assert str(tmp_path/'in'/'good.png') in [r['file'] for r in read_csv(tmp_path/'out'/'severity.csv')]


def test_transparent_pixels_are_white(tmp_path):
    from crackxai.data.surface import read_image
    transparent(tmp_path/'x.png')
    image = read_image(tmp_path/'x.png')
    assert (image[:, :20] == 1).all() and (image[:, 20:].transpose(1, 2, 0)*255 == EVEN[20:]).all()


def test_the_same_wall_in_any_lossless_form_is_the_same_array(tmp_path):
    from crackxai.data.surface import read_image
    grey = np.arange(0, 256, 8, dtype=np.uint8).reshape(4, 8)
    forms = {'a.png': grey, 'b.png': np.repeat(grey[..., None], 3, 2), 'c.png': grey.astype(np.uint16)*257, 'd.tif': grey.astype(np.float32)/255, 'e.bmp': grey}
    for name, array in forms.items():
        Image.fromarray(array).save(tmp_path/name)
        np.testing.assert_allclose(read_image(tmp_path/name), np.repeat(grey[None]/255, 3, 0), atol=1e-6, err_msg=name)


@pytest.mark.parametrize('fault', FAULTS)
def test_fault_beside_a_good_photo_that_is_aligned(run, tmp_path, fault):
    "A photo that can be read may still not be registered; either way the good one, here the reference itself, is done."
    if sys.platform == 'win32' and any(word in fault for word in POSIX): pytest.skip('no such name or link on Windows')
    name, make, size = FAULTS[fault]
    good, bad, out = photo(tmp_path/'in'/'zz_good.png', 100, 120), tmp_path/'in'/name, tmp_path/'out'
    make(bad)
    r = run('align', tmp_path/'in', '--reference', good, '--out', out)
    (failure,) = read_csv(out/'failures.csv')
    read = size or 'too long' in fault                              # its results have short names here
    assert r.code == 3 and failure['file'] == str(bad) and ' '.join(name.split()) in failure['reason'] and ('cannot be registered' in failure['reason']) == bool(read), failure
    assert [row['file'] for row in read_csv(out/'align.csv')] == [str(good)] and Image.open(out/'zz_good.png').size == (120, 100) and not left_over(out)


def own_images(folder, n, side=32):
    for label in ('crack', 'intact'):
        for k in range(n): photo(folder/label/f'good{k}.png', side, side, seed=k)
    return folder


@pytest.mark.parametrize('fault', FAULTS)
def test_fault_among_images_to_learn_from(tmp_path, fault):
    if sys.platform == 'win32' and any(word in fault for word in POSIX): pytest.skip('no such name or link on Windows')
    from crackxai.train_surface import read_folder
    name, make, size = FAULTS[fault]
    if size and max(size) > 8*min(size): size = None                  # a strip
    if 'too long' in fault: size = 60, 40                             # nothing is named after it here
    bad = own_images(tmp_path, 10)/'crack'/name
    make(bad)
    data = read_folder(tmp_path)
    assert len(data) == 20 + bool(size) and data.cut == 32
    if size: assert not data.failures and f'crack/{name}' in data.name
    else: assert [f['file'] for f in data.failures] == [str(bad)] and ' '.join(name.split()) in data.failures[0]['reason'] and '\n' not in data.failures[0]['reason']


def test_training_leaves_out_what_it_cannot_read_and_names_it(run, tmp_path, monkeypatch):
    "All faults at once: exit code 3, weights are written, each file has its line."
    from crackxai import train_surface as owner
    monkeypatch.setitem(owner.PROFILES, 'quick', dict(classifier=dict(width=1/16, epochs=1), student=dict(epochs=1, later=1, width=1/16), size=32))
    monkeypatch.setattr(owner, 'RECIPE', owner.RECIPE | dict(strength='flips'))
    own_images(tmp_path/'in', 40)
    wrong = [(make, tmp_path/'in'/'intact'/f'bad{k}{name[name.rfind("."):]}') for k, (name, make, size) in enumerate(FAULTS.values()) if size is None and len(name) < 99]
    for make, path in wrong: make(path)
    r = run('train', 'surface', '--images', tmp_path/'in', '--out', tmp_path/'own.safetensors', '--profile', 'quick')
    assert r.code == 3 and (tmp_path/'own.safetensors').is_file() and not left_over(tmp_path), r.output
    assert {row['file'] for row in read_csv(tmp_path/'own_failures.csv')} == {str(path) for _, path in wrong} and '... ' in r.output
