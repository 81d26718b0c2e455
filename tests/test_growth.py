"What `crackxai align` and `crackxai growth` promise: trends, change points, aligned photos, exit codes."
import math
from pathlib import Path

import numpy as np, pytest
from PIL import Image

from conftest import error_line, left_over
from crackxai.core import find_data, read_csv
from crackxai.data.surface import masonry, read_image
from crackxai.data.walls import wall

SEVERITY = ['file', 'crack_probability', 'cracks', 'area_px', 'area_mm2', 'max_width_px', 'max_width_mm', 'length_px', 'length_mm']
COLUMNS = ['metric', 'unit', 'n', 'slope', 'low', 'high', 'r', 'p', 'change_points', 'note']


def table(path, areas, widths=None, mm=None, header=SEVERITY, times=None):
    "A severity.csv as `crackxai segment` writes it, with a column day if there are times."
    lines = [','.join([*header, *(['day'] if times is not None else [])])]
    for k, area in enumerate(areas):
        width = '' if widths is None else widths[k]
        cells = [f'photos/{k}.png', '0.9', '1', str(area), '' if mm is None else str(area*mm**2), str(width), '', str(100 + k), '']
        lines.append(','.join(cells + ([str(times[k])] if times is not None else [])))
    path.write_text('\n'.join(lines) + '\n')
    return path


def text(path, *lines):
    path.write_text('\n'.join(lines) + '\n')
    return path


def rows(out): return {r['metric']: r for r in read_csv(out/'growth.csv')}


def test_slope_interval_unit_and_picture_of_each_measure(run, tmp_path):
    areas = [100, 111, 119, 131, 140, 149]
    r = run('growth', table(tmp_path/'severity.csv', areas, [2.]*6, .5, times=range(6)), '--time', 'day', '--out', tmp_path/'new'/'out')
    out = tmp_path/'new'/'out'
    assert r.code == 0 and (out/'growth.csv').read_text().splitlines()[0] == ','.join(COLUMNS)
    got = rows(out)
    assert list(got) == ['cracks', 'area_px', 'area_mm2', 'max_width_px', 'length_px']       # columns without a value are left out
    slope, offset = np.polyfit(range(6), areas, 1)
    assert float(got['area_px']['slope']) == pytest.approx(slope, rel=1e-5) and got['area_px']['n'] == '6' and got['area_px']['unit'] == 'px²/time'
    assert float(got['area_px']['low']) < slope < float(got['area_px']['high']) and float(got['area_px']['r']) > .99 and float(got['area_px']['p']) < 1e-5
    assert float(got['area_mm2']['slope']) == pytest.approx(slope/4, rel=1e-5) and float(got['max_width_px']['slope']) == 0
    for m in got:
        with Image.open(out/f'{m}.png') as picture: assert picture.size[0] > 300
    assert not left_over(out) and not (out/'failures.csv').exists()


def test_dates_in_a_table_of_times_give_a_slope_per_day(run, tmp_path):
    severity = table(tmp_path/'severity.csv', [100, 130, 160, 190])
    times = text(tmp_path/'times.csv', 'file,time', '3.png,2024-03-31', '0.png,2024-03-01', 'photos/1.png,2024-03-11', '2,2024-03-21T00:00')
    assert run('growth', severity, '--time', times, '--out', tmp_path/'out').code == 0
    row = rows(tmp_path/'out')['area_px']
    assert float(row['slope']) == pytest.approx(3) and row['unit'] == 'px²/day'


def test_a_change_point_is_named_with_its_date_and_rates(run, tmp_path):
    days = np.arange(20)
    areas = np.round(100 + 2*days + 6*np.maximum(days - 10, 0) + np.random.default_rng(0).normal(0, 1, 20), 2)
    severity = table(tmp_path/'severity.csv', areas, times=[f'2024-05-{d + 1:02}' for d in days])
    r = run('growth', severity, '--time', 'day', '--out', tmp_path/'out')
    told = rows(tmp_path/'out')['area_px']['change_points']
    assert r.code == 0 and told.startswith(('2024-05-10', '2024-05-11', '2024-05-12')) and ';' not in told and told.split(':')[0] in r.output
    before, after = (float(v) for v in told.rpartition(': ')[2].split(' (')[0].split(' to '))
    assert abs(before - 2) < .5 and abs(after - 8) < .8
    assert rows(tmp_path/'out')['length_px']['change_points'] == ''


def test_photos_without_a_crack_have_no_width_but_count_for_the_area(run, tmp_path):
    severity = table(tmp_path/'severity.csv', [0, 100, 120, 140], ['', 2, 3, 4], times=range(4))
    assert run('growth', severity, '--time', 'day', '--out', tmp_path/'out').code == 0
    got = rows(tmp_path/'out')
    assert (got['area_px']['n'], got['max_width_px']['n'], float(got['max_width_px']['slope'])) == ('4', '3', 1)


def test_a_measure_with_too_few_values_has_a_reason_and_no_number(run, tmp_path):
    severity = table(tmp_path/'severity.csv', [0, 0, 120, 140], ['', '', 3, 4], times=range(4))
    assert run('growth', severity, '--time', 'day', '--out', tmp_path/'out').code == 0
    row = rows(tmp_path/'out')['max_width_px']
    assert (row['slope'], row['low'], row['r'], row['p'], row['change_points']) == ('',)*5 and '2 usable rows' in row['note']


def test_rows_that_cannot_be_used_are_named_and_the_others_done(run, tmp_path):
    severity = table(tmp_path/'severity.csv', [100, 'nan', 120, 'much', 140, 150], times=[0, 1, 2, 3, '', 5])
    r = run('growth', severity, '--time', 'day', '--out', tmp_path/'out')
    reasons = [f['reason'] for f in read_csv(tmp_path/'out'/'failures.csv')]
    assert r.code == 3 and rows(tmp_path/'out')['area_px']['n'] == '3' and len(reasons) == 3
    assert any('nan' in x for x in reasons) and any('much' in x for x in reasons) and any('photos/4.png: has no time' in x for x in reasons)
    assert run('growth', table(tmp_path/'s.csv', [1, 2, 4], times=range(3)), '--time', 'day', '--out', tmp_path/'out').code == 0
    assert not (tmp_path/'out'/'failures.csv').exists()       # failures of an earlier call do not stay


def test_a_file_of_the_times_that_severity_does_not_know_is_named(run, tmp_path):
    times = text(tmp_path/'times.csv', 'file,time', *(f'{k}.png,{k}' for k in range(4)), 'wall_9.png,9')
    r = run('growth', table(tmp_path/'severity.csv', [1, 2, 3, 5]), '--time', times, '--out', tmp_path/'out')
    assert r.code == 3 and 'wall_9.png: is in times.csv but not in severity.csv' in r.output and rows(tmp_path/'out')['area_px']['n'] == '4'


BAD = {
    'no such file': (lambda d: d/'gone.csv', 'day', 'no such file'),
    'folder': (lambda d: d, 'day', 'is not a file'),
    'empty': (lambda d: text(d/'s.csv'), 'day', 'is empty'),
    'header only': (lambda d: text(d/'s.csv', ','.join(SEVERITY)), 'day', 'no row below'),
    'no CSV': (lambda d: (d/'s.csv').write_bytes(b'\x89PNG\r\n\x1a\n\x00\xff') and d/'s.csv', 'day', 'not a CSV'),
    'no column file': (lambda d: text(d/'s.csv', 'name,area_px,day', 'a,1,1'), 'day', "no column 'file'"),
    'no measure': (lambda d: text(d/'s.csv', 'file,day', 'a,1'), 'day', 'holds no measure'),
    'no column for the time': (lambda d: table(d/'s.csv', [1, 2, 3]), 'day', "'day' is neither a column"),
    'no table of times': (lambda d: table(d/'s.csv', [1, 2, 3]), 'nowhere.csv', 'no such file'),
    'ragged rows': (lambda d: text(d/'s.csv', 'file,area_px,day', 'a,1'), 'day', 'row 1 has 2 cells'),
    'two rows': (lambda d: table(d/'s.csv', [1, 2], times=[0, 1]), 'day', '2 usable rows, 3 are needed'),
    'three rows, one without number': (lambda d: table(d/'s.csv', [1, 'x', 3], times=[0, '', 2], header=SEVERITY), 'day', 'photos/1.png'),
    'the same time twice': (lambda d: table(d/'s.csv', [1, 2, 3], times=[0, 1, 1]), 'day', 'photos/1.png and photos/2.png have the same time 1'),
    'dates and numbers': (lambda d: table(d/'s.csv', [1, 2, 3], times=['2024-01-01', 5, '2024-02-01']), 'day', 'numbers and dates'),
    'no dates at all': (lambda d: table(d/'s.csv', [1, 2, 3], times=['soon', 'later', 'never']), 'day', "'soon' is neither a number nor an ISO date"),
}


@pytest.mark.parametrize('kind', BAD)
def test_tables_that_cannot_be_used_are_one_line_and_leave_nothing(run, tmp_path, kind):
    make, time, why = BAD[kind]
    r = run('growth', make(tmp_path), '--time', time, '--out', tmp_path/'out')
    assert r.code == 2 and why in error_line(r.output), r.output
    assert not (tmp_path/'out').exists()


def test_usage_errors_are_2(run, tmp_path):
    assert run('growth', 's.csv', '--out', tmp_path/'o').code == 2 and run('growth', 's.csv', '--time', 'day').code == 2
    assert run('align', 'a.png', '--out', tmp_path/'o').code == 2


def test_installed_command(run_process, tmp_path):
    table(tmp_path/'severity.csv', [10, 12, 15, 16], times=range(4))
    r = run_process('growth', 'severity.csv', '--time', 'day', '--out', 'out', cwd=tmp_path)
    assert r.code == 0 and 'measures done, 0 failed' in r.output and (tmp_path/'out'/'growth.csv').is_file()


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.clip(image, 0, 1)*255).round().astype(np.uint8).transpose(1, 2, 0)).save(path)
    return path


def seen_from(image, shift=(5, -3), scale=1.04, turn=2.):
    "The image from a slightly different place, darker."
    from skimage.transform import AffineTransform, warp
    h, w = image.shape[1:]
    centre = AffineTransform(translation=(-w/2, -h/2))
    view = centre + AffineTransform(scale=scale, rotation=math.radians(turn)) + AffineTransform(translation=(w/2 + shift[0], h/2 + shift[1]))
    return np.stack([warp(c.astype(float), view, order=3, mode='reflect') for c in image])*.9


def test_photos_from_other_places_are_aligned_and_another_wall_is_refused(run, tmp_path):
    image = wall(3, 300).image
    first = save(image, tmp_path/'in'/'first.png'); save(seen_from(image), tmp_path/'in'/'later.png'); save(wall(8, 300).image, tmp_path/'in'/'other.png')
    r = run('align', tmp_path/'in', '--reference', first, '--out', tmp_path/'out')
    assert r.code == 3 and 'other.png: cannot be registered' in r.output
    got = {Path(x['file']).name: x for x in read_csv(tmp_path/'out'/'align.csv')}
    assert set(got) == {'first.png', 'later.png'} and int(got['later.png']['pairs']) >= 20 and float(got['later.png']['residual_px']) < 2
    a, b = (read_image(tmp_path/'out'/f'{n}.png') for n in ('first', 'later'))
    assert a.shape == b.shape and min(a.shape[1:]) > 200
    assert np.abs(b/.9 - a).mean() < .4*np.abs(b[:, :, ::-1]/.9 - a).mean()      # far nearer than unrelated pieces of the wall
    assert not left_over(tmp_path/'out')


@pytest.mark.parametrize('image, why', [(np.full((3, 150, 150), .5), 'too few points'), (wall(5, 150).image[:, ::-1], 'cannot be registered')], ids=['grey', 'mirrored'])
def test_photos_that_cannot_be_registered_have_a_reason(run, tmp_path, image, why):
    first = save(wall(5, 150).image, tmp_path/'first.png')
    r = run('align', save(image, tmp_path/'x.png'), '--reference', first, '--out', tmp_path/'out')
    assert r.code == 3 and why in read_csv(tmp_path/'out'/'failures.csv')[0]['reason'] and not list((tmp_path/'out').glob('*.png'))


def test_a_reference_that_cannot_be_read_is_bad_usage(run, tmp_path):
    photo = save(wall(5, 100).image, tmp_path/'a.png')
    r = run('align', photo, '--reference', tmp_path/'gone.png', '--out', tmp_path/'out')
    assert r.code == 2 and 'gone.png' in error_line(r.output)


def test_real_walls_are_registered_and_told_apart(run, tmp_path):
    folder = find_data('masonry')
    if folder is None: pytest.skip('masonry is not here')
    photos = {i.group: i.image for i in masonry(folder)}
    chosen = [read_image(p) for p in list(photos.values())[3:24:7]]
    first = save(chosen[0], tmp_path/'in'/'first.png'); save(seen_from(chosen[0]), tmp_path/'in'/'later.png')
    for k, image in enumerate(chosen[1:]): save(image, tmp_path/'in'/f'other{k}.png')
    r = run('align', tmp_path/'in', '--reference', first, '--out', tmp_path/'out')
    assert r.code == 3 and {Path(x['file']).name for x in read_csv(tmp_path/'out'/'align.csv')} == {'first.png', 'later.png'}
