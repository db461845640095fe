"""The demo in a real browser: what a visitor does, what goes wrong, two visitors at once, and nothing from outside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import visit
from demo.visitors import png_header
from pipelines import CANDIDATES, picture, tiny_processor
from tiny import tiny_vqa_model

from trips.demo.models import Shown
from trips.demo.server import served
from trips.pipeline import TripsPipeline

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def shown() -> Shown:
    return Shown("a tiny model", TripsPipeline(tiny_vqa_model(), tiny_processor(), CANDIDATES))


@pytest.fixture(scope="module")
def address(shown: Shown) -> Iterator[str]:
    pytest.importorskip("gradio", reason="needs gradio (the extra demo)")
    with served(shown) as url:
        yield url


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(2):
        picture(seed).save(folder / f"{seed}.png")
    return sorted(folder.iterdir())


def upload(page: Page, path: Path) -> None:
    page.set_input_files("#photo input[type=file]", str(path))


def ask(page: Page, photo: Path, words: str) -> None:
    upload(page, photo)
    page.wait_for_selector("#found :text('The photo is there')")
    page.fill("#words textarea, #words input", words)
    page.click("#go")


def wait_for_caption(page: Page, guide: str, caption: str) -> None:
    page.wait_for_selector(f"[data-guide={guide}] figcaption:text-is('{caption}')")


def wait_until_measured(page: Page) -> None:
    page.wait_for_selector("[data-guide=none] dd:has-text(' ms')")


def overlays(page: Page, guide: str) -> list[str]:
    return page.eval_on_selector_all(f"[data-guide={guide}] img", "all => all.map(one => one.src)")


def test_a_visitor_asks_and_moves_the_slider(browser: Browser, address: str, shown: Shown, photos: list[Path]) -> None:
    with visit(browser, address) as visitor:
        page = visitor.page
        ask(page, photos[0], "what is it?")
        wait_for_caption(page, "text", "layer 2: 8 of 16")
        wait_until_measured(page)
        expected = [answer.text for answer in shown.pipeline.ask(photos[0], "what is it?", 3)]
        assert page.locator("[data-guide=text] .trips-answer").all_inner_texts() == expected
        before = {guide: overlays(page, guide) for guide in ("text", "image", "random", "none")}
        assert [len(pictures) for pictures in before.values()] == [2, 2, 2, 1]
        page.focus("#keep input[type=range]")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")  # 0.5 to 0.4: ceil(16 * 0.4)
        wait_for_caption(page, "text", "layer 2: 7 of 16")
        wait_until_measured(page)
        after = {guide: overlays(page, guide) for guide in before}
        assert all(before[guide][0] != after[guide][0] for guide in ("text", "image", "random"))
        assert before["none"] == after["none"]
        page.click("#layers label:has-text('3')")
        page.wait_for_function("document.querySelectorAll('[data-guide=text] img').length == 1")
        page.click("#guides label:has-text('Random')")
        page.wait_for_selector("[data-guide=random]", state="detached")
        assert visitor.outside(address, address.replace("http", "ws", 1)) == [] and visitor.errors == []


def test_a_scene_answers_at_once(browser: Browser, address: str) -> None:
    with visit(browser, address, width=400, height=800, scheme="dark") as visitor:
        page = visitor.page
        page.locator("#scenes img").nth(1).click()
        page.wait_for_selector("[data-guide=text] img")
        assert page.input_value("#words textarea, #words input") == page.inner_text(".trips-text")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert visitor.errors == []


def test_bad_uploads_are_said_and_forgotten(browser: Browser, address: str, photos: list[Path], tmp_path: Path) -> None:
    bad = {"text.png": b"no picture", "bomb.png": png_header(40_000, 40_000), "large.png": png_header(9_000, 9_000)}
    with visit(browser, address) as visitor:
        page = visitor.page
        for name, data in bad.items():
            (tmp_path / name).write_bytes(data)
            upload(page, tmp_path / name)
            page.wait_for_selector(f"#trouble [role=alert]:has-text('{name}')")
            page.wait_for_selector("#photo input[type=file]", state="attached")  # empty again
            assert page.locator("#photo img").count() == 0
        ask(page, photos[0], "what is it?")
        wait_for_caption(page, "text", "layer 2: 8 of 16")
        assert page.locator("#trouble [role=alert]").count() == 0


def test_two_visitors_at_once_see_their_own(browser: Browser, address: str, shown: Shown, photos: list[Path]) -> None:
    questions = ["what is it?", "is the cat on the sofa?"]
    with visit(browser, address) as first, visit(browser, address) as second:
        pages = [first.page, second.page]
        for page, photo in zip(pages, photos):
            upload(page, photo)
        for page, question in zip(pages, questions):
            page.wait_for_selector("#found :text('The photo is there')")
            page.fill("#words textarea, #words input", question)
        pages[1].evaluate("document.querySelector('#layers label:nth-of-type(3) input').click()")
        for page in pages:
            page.click("#go")
        for page, question, count in zip(pages, questions, (2, 1)):
            page.wait_for_selector(f".trips-text:text-is('{question}')")
            page.wait_for_function(f"document.querySelectorAll('[data-guide=text] img').length == {count}")
            wait_until_measured(page)
        config = shown.pipeline.model.config.selection
        for page, photo, question, layers in zip(pages, photos, questions, ((2, 3), (2,))):
            selection = config.replace(layers=layers)
            expected = [answer.text for answer in shown.pipeline.ask(photo, question, 3, selection=selection)]
            assert page.locator("[data-guide=text] .trips-answer").all_inner_texts() == expected
        assert overlays(pages[0], "none") != overlays(pages[1], "none")


def test_the_browser_refuses_what_is_not_the_pages_own(browser: Browser, address: str) -> None:
    script = """new Promise(done => {
        document.addEventListener("securitypolicyviolation", event => done(event.blockedURI));
        fetch("http://198.51.100.1/font.woff2").catch(() => setTimeout(() => done("not by the policy"), 1000));
    })"""
    with visit(browser, address) as visitor:
        assert visitor.page.evaluate(script) == "http://198.51.100.1/font.woff2"
