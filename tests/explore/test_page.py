"""The explorer's page in a real browser."""

import base64
import csv
import time

import cv2
import numpy as np
import pytest
import torch
from browser import chromium

from mmsoft.visualization.style import COLOURS

PIXEL = (20, 30)
PICTURE = "document.getElementById('picture')"


@pytest.fixture(scope="module")
def address(started, config_path, workplace, images):
    chromium()  # before a server is started for it
    with started(config_path, workplace / "model.pth", images=images) as address:
        yield address


@pytest.mark.parametrize(
    ("variables", "outcome"),
    [
        ({}, pytest.skip.Exception),
        (dict(CI="true"), pytest.skip.Exception),  # of another system, which runs `.ci/run`
        (dict(MMSOFT_BROWSER="required"), pytest.skip.Exception),
        (dict(CI="true", MMSOFT_BROWSER="required"), pytest.fail.Exception),
    ],
)
def test_a_browser_that_must_be_there_is_missed(request, monkeypatch, variables, outcome):
    monkeypatch.setenv("PATH", "")
    for name in ("CI", "MMSOFT_BROWSER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(outcome, match="no Chromium"):
        request.getfixturevalue("browser")


COMPLETE = "document.body?.dataset.complete === location.search && location.search"


def test_load_click_keys_and_a_link(browser, address, explorer, tmp_path):
    from mmsoft.explore.looking import View

    browser.open(f"{address}?stage=1")
    browser.until(COMPLETE)
    before = browser.evaluate("location.search")
    browser.click(*pixel(browser, *PIXEL))
    browser.until(f"location.search !== {before!r} && {COMPLETE}")
    address_bar = browser.evaluate("location.search")
    assert f"x={PIXEL[0]}&y={PIXEL[1]}" in address_bar

    view = View("000000000001.jpg", explorer.own, 1, 0, -1, *PIXEL)
    found = explorer.attention(view)
    numbers = "m => [m.dataset.kind, Number(m.dataset.low), Number(m.dataset.high)]"
    maps = browser.evaluate(f"[...document.querySelectorAll('.map')].map({numbers})")
    expected = [
        [kind, float(row.float().min()), float(row.float().max())]
        for kind, rows in (("attention", found["rows"]), ("softmax", found["softmax"]))
        for row in rows
    ]
    assert maps == expected
    ranks = (
        "[...document.querySelectorAll('#numbers tr[data-rank]')].map(r => Number(r.dataset.rank))"
    )
    assert browser.evaluate(ranks) == explorer.usage(view)["rank"]
    browser.until("document.getElementById('spectrum').naturalWidth > 100")

    browser.press("h")
    browser.until(f"location.search.includes('head=0') && {COMPLETE}")
    browser.press("ArrowRight")
    browser.until(f"location.search.includes('x={PIXEL[0] + 1}&') && {COMPLETE}")
    browser.press("v")
    browser.until(f"location.search.includes('solver=direct') && {COMPLETE}")
    assert "differs by" in browser.evaluate("document.getElementById('changed').textContent")

    link = browser.evaluate("location.href")
    browser.open("about:blank")
    browser.open(link)
    browser.until(COMPLETE)
    assert browser.evaluate("document.getElementById('head').value") == "0"
    assert browser.evaluate("document.getElementById('solver').value") == "direct"
    for over in ("softmax", "landmarks", "predictions"):
        browser.press("o")
        browser.until(f"location.search.includes('over={over}') && {COMPLETE}")
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert browser.evaluate("document.getElementById('status').textContent").endswith(" ms")


def pixel(browser, x, y):
    """The point of the window that shows a pixel of an image of 64 x 64."""
    box = "document.getElementById('picture').getBoundingClientRect()"
    left, top, width, height = (
        browser.evaluate(f"{box}.{side}") for side in ("left", "top", "width", "height")
    )
    return left + (x + 0.5) / 64 * width, top + (y + 0.5) / 64 * height


def canvas_of(browser, canvas):
    """What a canvas shows, RGB ``[height, width, 3]``."""
    url = browser.evaluate(f"{canvas}.toDataURL()")
    content = np.frombuffer(base64.b64decode(url.partition(",")[2]), np.uint8)
    return cv2.imdecode(content, cv2.IMREAD_COLOR)[..., ::-1].astype(float)


def levels(colours, alpha):
    """Which of viridis' 256 colours lies over a grey picture, in which R, G and B are alike."""
    from matplotlib import colormaps

    def differences(rgb):
        return np.stack((rgb[..., 0] - rgb[..., 1], rgb[..., 1] - rgb[..., 2]), -1)

    bar = differences((colormaps["viridis"](np.linspace(0, 1, 256))[:, :3] * 255).round())
    return np.linalg.norm(differences(colours)[:, None] / alpha - bar, axis=-1).argmin(1)


def well_inside(captured, grid, ringed, away):
    """Pixels of the file that are all of one token, outside the ring, and their tokens."""
    pixels, tokens = [], []
    for y in range(1, 63):
        for x in range(1, 63):
            corners = {
                captured.image.token_at(x + dx, y + dy, grid)
                for dx in (-0.4, 0.4)
                for dy in (-0.4, 0.4)
            }
            if len(corners) == 1 and np.hypot(x - ringed[0], y - ringed[1]) > away:
                pixels.append((x, y))
                tokens += corners
    return np.array(pixels), np.array(tokens)


def off(shown, alpha, row, pixels, tokens):
    """How far the colours of a canvas are from a row of numbers, of 255, on average."""
    at = ((pixels + 0.5) * shown.shape[1] / 64).astype(int)
    seen = levels(shown[at[:, 1], at[:, 0]], alpha)
    expected = np.clip(row / row.max(), 0, 1) * 255
    return np.abs(seen - expected[tokens]).mean(), tokens[seen.argmax()]


def test_the_painted_maps_are_the_numbers(browser, address, explorer):
    """After a click, token by token: the large map, and the small one of each head."""
    from mmsoft.explore.looking import View

    browser.open(f"{address}?stage=1&x=50&y=50")
    after(browser, "x=50")
    browser.click(*pixel(browser, *PIXEL))
    after(browser, f"x={PIXEL[0]}&y={PIXEL[1]}")
    view = View("000000000001.jpg", explorer.own, 1, 0, -1, *PIXEL)
    captured, found = explorer.captured(view.image, explorer.own), explorer.attention(view)
    inside = well_inside(captured, found["grid"], PIXEL, 5)
    assert len(set(inside[1])) > 50
    ours, softmax = found["rows"].numpy(), found["softmax"].numpy()
    cases = []
    for kind, rows in (("attention", ours), ("softmax", softmax)):
        for head, row in enumerate(rows):
            small = f"document.querySelectorAll('[data-kind={kind}] canvas')[{head}]"
            cases.append((canvas_of(browser, small), 0.75, row))
    cases.append((canvas_of(browser, PICTURE), 0.65, ours.mean(0)))
    browser.press("o")
    after(browser, "over=softmax")
    large = canvas_of(browser, PICTURE)
    cases.append((large, 0.65, softmax.mean(0)))
    for shown, alpha, row in cases:
        difference, brightest = off(shown, alpha, row, *inside)
        assert difference < 3
        assert row[brightest] > row[inside[1]].max() - 0.03 * row.max()
    half = len(cases) // 2 - 1
    for (shown, alpha, _), (_, _, other) in zip(cases[:half], cases[half : 2 * half]):
        assert off(shown, alpha, other, *inside)[0] > 10  # softmax is another picture


def test_dots_are_where_the_landmarks_are(browser, address, explorer):
    """White, at the middle of the patches, to a tenth of a pixel of the file."""
    from mmsoft.explore.looking import View

    browser.open(f"{address}?stage=1&x=0&y=0&over=landmarks")
    after(browser, "over=landmarks")
    shown = canvas_of(browser, PICTURE)
    view = View("000000000001.jpg", explorer.own, 1, 0, -1, 0, 0)
    captured, found = explorer.captured(view.image, explorer.own), explorer.landmarks(view)
    white = (shown > 250).all(-1).astype(np.uint8)
    _, _, sizes, middles = cv2.connectedComponentsWithStats(white)
    dots = (middles[1:][sizes[1:, cv2.CC_STAT_AREA] > 30] + 0.5) / shown.shape[1] * 64 - 0.5
    # The middle of a patch lies between two tokens, and the image says of a pixel which holds it.
    grid, fine = found["grid"], np.arange(0, 63, 0.05)
    across = np.array([captured.image.token_at(at, 0, grid) % grid[1] for at in fine])
    down = np.array([captured.image.token_at(0, at, grid) // grid[1] for at in fine])

    def middle(tokens, at):
        return fine[np.isin(tokens, (at - 0.5, at + 0.5))].mean()

    expected = np.array([(middle(across, x), middle(down, y)) for y, x in found["centres"]])
    distances = np.linalg.norm(dots[:, None] - expected, axis=-1)
    away, kept = np.hypot(*dots.T) > 4, np.hypot(*expected.T) > 4  # the ring is white too
    assert away.sum() == kept.sum() > 20
    assert (distances[away].min(1) < 0.1).all()


def rgb(label):
    """The colour of a class."""
    return np.array([int(COLOURS[label][i : i + 2], 16) for i in (1, 3, 5)])


@pytest.fixture
def stubbed(explorer, open_server):
    """The address of the explorer of this process, in which a test can say what is predicted."""
    from mmsoft.explore.server import addresses

    return addresses(open_server("127.0.0.1"), "127.0.0.1")[0]


def test_a_box_is_drawn_where_it_is(browser, stubbed, predicting):
    """Its lines, and its name above it; one of a low score is not."""
    from mmengine.structures import InstanceData

    left, top, right, bottom = box = 12, 22, 44, 54
    boxes, scores = torch.tensor([box, (2, 2, 9, 9)]).float(), torch.tensor([0.87, 0.2])
    labels = torch.tensor([1, 1])
    predicting(pred_instances=InstanceData(bboxes=boxes, scores=scores, labels=labels))
    browser.open(f"{stubbed}?x=60&y=60&over=predictions")
    after(browser, "over=predictions")
    legend = browser.evaluate("document.getElementById('legend').textContent")
    assert legend == "1 objects with a score of at least 0.3"
    shown = canvas_of(browser, PICTURE)
    scale, unit = shown.shape[1] / 64, 64 / 500  # of the canvas, and of the drawing
    there = np.abs(shown - rgb(1)).max(-1) < 8
    rows, columns = np.nonzero(there)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    name = 13 * unit  # the height of what it stands on
    expected = [left - unit, top - name, right + unit, bottom + unit]
    assert np.abs(np.array(found) / scale - expected).max() < 0.1
    x0, y0, x1, y1 = (int(side * scale) for side in box)
    for line in (there[y0:y1, x0], there[y0:y1, x1], there[y0, x0:x1], there[y1, x0:x1]):
        assert line.mean() > 0.98
    inside = int(2 * unit * scale)
    assert there[y0 + inside : y1 - inside, x0 + inside : x1 - inside].mean() < 0.01
    above = (shown[int((top - name) * scale) : y0, x0:x1] > 240).all(-1)
    assert 20 < above.sum() < 0.5 * above.size  # white letters


def test_classes_are_painted_where_they_are(browser, explorer, stubbed, predicting):
    """Two halves of the picture, under which it is seen."""
    from mmengine.structures import PixelData

    halves = torch.zeros(1, 64, 64, dtype=torch.int64)
    halves[..., 32:] = 3
    predicting(pred_sem_seg=PixelData(data=halves))
    canvases = {}
    for over in ("nothing", "predictions"):
        browser.open(f"{stubbed}?x=60&y=60&over={over}")
        after(browser, f"over={over}")
        canvases[over] = canvas_of(browser, PICTURE)
    shown, half = canvases["predictions"], canvases["nothing"].shape[1] // 2
    y, x = (np.indices(shown.shape[:2]) + 0.5) * 64 / shown.shape[1]
    away = np.hypot(x - 60.5, y - 60.5) > 2  # the ring lies over both
    for label, part in ((0, np.s_[:, :half]), (3, np.s_[:, half:])):
        expected = 0.45 * canvases["nothing"][part] + 0.55 * rgb(label)
        assert np.abs(shown[part] - expected)[away[part]].max() <= 3
    classes = "[...document.querySelectorAll('.class')]"
    found = browser.evaluate(
        f"{classes}.map(c => [c.textContent, c.style.getPropertyValue('--colour')])"
    )
    assert found == [[explorer.names[label], COLOURS[label]] for label in (0, 3)]


def after(browser, part):
    """Wait for the view whose address has some part, complete."""
    browser.until(f"location.search.includes('{part}') && {COMPLETE}")


def test_keys_slider_files_and_saving(browser, address, explorer, images, tmp_path):
    from mmsoft.explore.looking import View

    browser.open(f"{address}?stage=0&x=20&y=30")
    after(browser, "stage=0")
    browser.press("s")
    after(browser, "stage=1")
    browser.press("b")  # the only block
    after(browser, "block=0")
    browser.press("ArrowDown", shift=True)
    after(browser, "y=40")

    # The slider, by its own keys; then ours, while it has the focus.
    slider = "document.getElementById('budget')"
    browser.evaluate(f"{slider}.focus()")
    browser.press("ArrowRight")
    after(browser, "budget=4")
    assert "y=40" in browser.evaluate("location.search")
    browser.press("+")
    after(browser, "budget=9")
    browser.press("h")
    after(browser, "head=0")
    browser.evaluate("document.getElementById('stage').focus()")
    browser.press("-")
    after(browser, "budget=4")
    browser.click(*pixel(browser, 21, 40))
    after(browser, "x=21")
    browser.press("ArrowRight")
    after(browser, "x=22")

    # While it is dragged, the slider says to what, and nothing is asked.
    name, address_bar = "document.getElementById('budget-value').textContent", "location.search"
    before, shown = browser.evaluate(address_bar), []
    for at in (3, 9, 0):
        browser.evaluate(f"{slider}.value = {at}; {slider}.dispatchEvent(new Event('input'))")
        shown.append(browser.evaluate(name))
    assert shown == ["16", "all", "all (the model's)"]
    assert browser.evaluate(address_bar) == before
    browser.evaluate(f"{slider}.value = 3; {slider}.dispatchEvent(new Event('change'))")
    after(browser, "budget=16")

    # A budget that is not on the slider.
    browser.open(f"{address}?stage=1&budget=12&x=20&y=30")
    after(browser, "budget=12")
    assert browser.evaluate(f"[{slider}.value, {slider}.max]") == ["3", "10"]
    browser.press("+")
    after(browser, "budget=16")
    assert browser.evaluate(f"[{slider}.value, {slider}.max]") == ["3", "9"]

    # What is saved is what is seen.
    folder = tmp_path / "saved"
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.evaluate("[...document.querySelectorAll('#save a')].at(-1).click()")
    end = time.monotonic() + 60
    while not (saved := list(folder.glob("*.csv"))):
        assert time.monotonic() < end
        time.sleep(0.05)
    settings = type(explorer.own)(16, explorer.own.solver)
    view = View("000000000001.jpg", settings, 1, 0, -1, 20, 30)
    header, *rows = csv.reader(saved[0].open())
    usage = explorer.usage(view)
    assert header == ["head", *usage]
    assert [list(map(float, row[1:])) for row in rows] == [*map(list, zip(*usage.values()))]
    assert [row[0] for row in rows] == ["0", "1"]

    # A file that is chosen, one that is dropped, and one that is too large.
    chosen = images / "000000000002.jpg"
    node = browser.call("Runtime.evaluate", expression="document.getElementById('file')")
    node = node["result"]["objectId"]
    browser.call("DOM.setFileInputFiles", files=[str(chosen)], objectId=node)
    after(browser, "image=upload-")
    first = browser.evaluate("view.image")
    content = base64.b64encode(chosen.read_bytes()).decode()
    browser.evaluate(DROP % f"Uint8Array.from(atob('{content}'), (c) => c.charCodeAt(0))")
    browser.until(f"view.image !== '{first}' && {COMPLETE}")
    assert browser.evaluate("about.images.slice(0, 3)")[1:] == [first, "000000000001.jpg"]
    assert browser.evaluate("document.querySelector('#images button').textContent") == "your image"
    browser.evaluate(DROP % "new Uint8Array(20000001)")
    status = "document.getElementById('status').textContent"
    browser.until(f"{status} === 'a picture may have 20 MB'")


DROP = """{
  const data = new DataTransfer();
  data.items.add(new File([%s], "dropped.jpg"));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
}"""


@pytest.mark.long  # test_server.py has the answers
def test_a_file_that_is_replaced_is_shown_anew(browser, started, config_path, workplace, tmp_path):
    """Under a page that is open: picture, maps and numbers."""
    folder = tmp_path / "images"
    folder.mkdir()

    def write(width, height, seed):
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
        cv2.imwrite(str(folder / "one.png"), pixels)

    write(64, 48, 0)
    with started(config_path, workplace / "model.pth", images=folder) as address:
        browser.open(f"{address}?stage=1&x=20&y=30")
        after(browser, "x=20")
        before = browser.evaluate("document.getElementById('numbers').textContent")
        write(48, 96, 1)
        browser.press("ArrowRight")
        after(browser, "x=21")
        assert browser.evaluate("[picture.width, picture.height]") == [48, 96]
        assert browser.evaluate("document.getElementById('numbers').textContent") != before
        write(16, 24, 2)  # which has no such pixel
        browser.press("ArrowRight")
        browser.until("document.getElementById('status').textContent.includes('outside')")
        browser.press("ArrowLeft")
        browser.until("picture.width === 16")


def test_an_invalid_link_says_so(browser, address):
    browser.open(f"{address}?image=none.jpg")
    said = "none.jpg cannot be shown: there is no image 'none.jpg'"
    browser.until(f'document.getElementById("status")?.textContent === "{said}"')


def test_landmarks_by_content_have_no_spectrum(browser, started, root, workplace):
    """And a segmentor's classes have names and colours."""
    config = root / "configs/demo/upernet_softpp-mini_shapes.py"
    with started(config, images=workplace / "data/shapes/ade/images/validation") as address:
        browser.open(f"{address}?over=predictions&solver=direct")
        browser.until(COMPLETE)
        assert "solver=newton" in browser.evaluate("location.search")
        hidden = "['spectrum', 'no-inverse'].map(id => document.getElementById(id).hidden)"
        assert browser.evaluate(hidden) == [True, False]
        assert browser.evaluate("document.getElementById('solver').disabled")
        links = browser.evaluate("document.getElementById('save').textContent")
        assert links == "attention: PNGSVGlandmarks: PNGSVGpredictions: PNGSVGnumbers: CSV"
        names = browser.evaluate("[...document.querySelectorAll('.class')].map(c => c.textContent)")
        assert set(names) <= {"background", "disc", "bar", "triangle", "crescent", "cross"}
        assert names
