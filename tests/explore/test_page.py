"""The explorer's page in a real browser."""

import pytest

PIXEL = (20, 30)


@pytest.fixture(scope="module")
def address(started, config_path, workplace, images):
    with started(config_path, workplace / "model.pth", images=images) as address:
        yield address


COMPLETE = "document.body?.dataset.complete === location.search && location.search"


def test_load_click_keys_and_a_link(browser, address, explorer, tmp_path):
    from mmsoft.explore.looking import View

    browser.open(f"{address}?stage=1")
    browser.until(COMPLETE)
    box = "document.getElementById('picture').getBoundingClientRect()"
    left, top, width, height = (
        browser.evaluate(f"{box}.{side}") for side in ("left", "top", "width", "height")
    )
    before = browser.evaluate("location.search")
    browser.click(left + (PIXEL[0] + 0.5) / 64 * width, top + (PIXEL[1] + 0.5) / 64 * height)
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


def test_an_invalid_link_says_so(browser, address):
    browser.open(f"{address}?image=none.jpg")
    browser.until("document.getElementById('status')?.textContent.includes('cannot be shown')")


def test_landmarks_by_content_have_no_spectrum(browser, started, root, workplace):
    """And a segmentor's classes have names and colours."""
    config = root / "configs/demo/upernet_softpp-mini_shapes.py"
    with started(config, images=workplace / "data/shapes/ade/images/validation") as address:
        browser.open(f"{address}?over=predictions")
        browser.until(COMPLETE)
        hidden = "['spectrum', 'no-inverse'].map(id => document.getElementById(id).hidden)"
        assert browser.evaluate(hidden) == [True, False]
        assert browser.evaluate("document.getElementById('solver').disabled")
        links = browser.evaluate("document.getElementById('save').textContent")
        assert links == "attention: PNGSVGlandmarks: PNGSVGpredictions: PNGSVG"
        names = browser.evaluate("[...document.querySelectorAll('.class')].map(c => c.textContent)")
        assert set(names) <= {"background", "disc", "bar", "triangle", "crescent", "cross"}
        assert names
