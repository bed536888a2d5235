"""MLflow's own user interface on a comparison, in a real browser: what `dtr-lab ui` links to must show what it says."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser.conftest import CHROMEDRIVER, CHROMIUM

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="no chromium and chromedriver here: see .ci/run"),
]

PATIENCE_SECONDS = 40
CARD = '[data-testid="experiment-view-compare-runs-card"]'
SECTION = '[data-testid="experiment-view-compare-runs-section-header"]'
CHART_SEARCH = '[data-component-id*="runschartsfilterinput"]'
CLOSE_ASSISTANT = '[data-component-id="mlflow.assistant.chat_panel.close"]'
COMPARE = '[data-testid="runs-compare-button"]'
FULL_SCREEN = '[data-component-id="fullscreen_button_chartcard"]'
# Pixels, not addresses: an image that failed to load, shows the wrong step or lies off the screen must not pass.
PIXELS = """
return Array.from(document.querySelectorAll('[role="dialog"] img')).map(image => {
  if (!image.complete || !image.naturalWidth || image.getBoundingClientRect().bottom > innerHeight) return null;
  const canvas = Object.assign(document.createElement('canvas'), {width: 32, height: 32});
  canvas.getContext('2d').drawImage(image, 0, 0, 32, 32);
  return canvas.toDataURL();
});"""
# Whether a click anywhere from the upper to the lower edge of a link, in the middle of its first line, would hit it.
CLEAR = """
const box = arguments[0].getClientRects()[0];
return [0.1, 0.5, 0.9].every(share =>
  arguments[0].contains(document.elementFromPoint(box.x + box.width / 2, box.y + box.height * share)));"""
UNCUT = """
const right = element => element.getBoundingClientRect().right;
return right(arguments[0].querySelector('span')) <= right(arguments[0]);"""
HEADING = '[role="columnheader"][col-id]'


def wait_for(browser, condition: Callable, what: str):
    """Waits until the condition gives something true, and returns that; React replaces elements at any moment."""
    passing = (NoSuchElementException, StaleElementReferenceException)
    waiting = WebDriverWait(browser, PATIENCE_SECONDS, poll_frequency=0.1, ignored_exceptions=passing)
    return waiting.until(lambda _: condition(), message=f"waited for {what}")


def find_all(browser, selector: str) -> list:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def click(browser, find: Callable, what: str) -> None:
    """Clicks what can be found, as soon as nothing lies over it: while a page is built things move and cover others."""

    def clicked():
        try:
            find().click()
        except ElementClickInterceptedException:
            return False
        return True

    wait_for(browser, clicked, f"to click {what}")


def click_on(browser, selector: str, what: str) -> None:
    click(browser, lambda: browser.find_element(By.CSS_SELECTOR, selector), what)


def listed_runs(browser) -> set[str]:
    return {link.text for link in find_all(browser, '[role="row"] a[href*="/runs/"]')} - {""}


def open_card(browser, links, title: str):
    """The card of one chart, found from the link that `dtr-lab ui` prints."""
    browser.get(links["charts"])
    return find_card(browser, title)


def find_card(browser, title: str):
    """The card of one chart on a page of charts, found by MLflow's search box as a user would."""
    box = wait_for(browser, lambda: browser.find_element(By.CSS_SELECTOR, CHART_SEARCH), "the search box")
    box.send_keys(title)

    def card():
        return next((card for card in find_all(browser, CARD) if card.text.split("\n")[0] == title), None)

    return wait_for(browser, card, f"a chart named {title}")


def test_the_runs_of_the_comparison_are_listed_and_no_others(browser, links, demo_store):
    browser.get(links["runs"])
    expected = {*demo_store.training_runs, demo_store.comparison_run}
    wait_for(browser, lambda: listed_runs(browser) == expected, f"exactly the runs {sorted(expected)}")


def test_loss_curves_of_all_runs_are_drawn(browser, links, demo_store):
    card = open_card(browser, links, "loss/train")
    assert any(re.match(r"loss\s*\(", section.text) for section in find_all(browser, SECTION))
    browser.execute_script("arguments[0].scrollIntoView()", card)

    def curves():
        paths = card.find_elements(By.CSS_SELECTOR, ".scatterlayer .trace path.js-line")
        found = {path.get_attribute("d") or "" for path in paths}  # each is there twice: smoothed, and faintly as it is
        return found if len(found) == len(demo_store.training_runs) else None

    drawn = wait_for(browser, curves, "a curve per run")
    assert all(len(re.findall("[MLHVCQ]", curve)) > 1 for curve in drawn), "a curve of one point"


def test_conflict_heatmaps_follow_the_step_slider(browser, links, demo_store):
    with only_clicks(browser, links, demo_store.experiment):
        follow(browser, "charts")
        find_card(browser, "conflict_cosine")
        click_on(browser, FULL_SCREEN, "the full screen button")
        move_the_slider(browser, demo_store)


def move_the_slider(browser, demo_store) -> None:
    """From the last step to the first: at each a picture of its own for every run."""

    def slider():
        return browser.find_element(By.CSS_SELECTOR, '[role="dialog"] [role="slider"]')

    def step() -> float:
        return float(slider().get_attribute("aria-valuenow"))

    def pictures():
        found = browser.execute_script(PIXELS)
        return found if len(found) == len(demo_store.training_runs) and all(found) else None

    assert len(demo_store.heatmap_steps) > 1
    shown = {}
    for expected in reversed(demo_store.heatmap_steps):  # the saved view begins with the last
        wait_for(browser, lambda expected=expected: step() == expected, f"the slider at step {expected}")
        seen = [picture for others in shown.values() for picture in others]

        def fresh(seen=seen):
            found = pictures()
            return found if found and not set(found) & set(seen) else None

        shown[expected] = wait_for(browser, fresh, f"a new picture per run at step {expected}")
        if expected != demo_store.heatmap_steps[0]:
            slider().send_keys(Keys.ARROW_LEFT)


def test_the_first_screen_is_a_table_of_methods_and_results(browser, links, demo_store):
    browser.get(links["runs"])
    wait_for(browser, lambda: listed_runs(browser) >= set(demo_store.training_runs), "the runs")
    wanted = ["dtr.method", "dtr.seed", "loss/val", "conflict/mean_rate"]

    def headings():  # from left to right
        found = [heading for heading in find_all(browser, HEADING) if heading.text in wanted]
        return sorted(found, key=lambda heading: heading.rect["x"])

    wait_for(browser, lambda: [heading.text for heading in headings()] == wanted, f"the columns {wanted}")
    for number, text in enumerate(wanted):

        def uncut(number=number):
            return browser.execute_script(UNCUT, headings()[number])

        wait_for(browser, uncut, f"the whole of the heading {text!r}")
    assert not find_all(browser, CLOSE_ASSISTANT), "MLflow's assistant covers a part of the window"


def link_named(browser, text: str):
    found = next((link for link in find_all(browser, "a") if link.text == text), None)
    if found is None:
        raise NoSuchElementException(f"no link {text!r}")
    return found


def click_link(browser, text: str) -> None:
    click(browser, lambda: link_named(browser, text), f"the link {text!r}")


def follow(browser, text: str) -> None:
    """Clicks a link of a description, which opens a window of its own, and goes there."""
    before = set(browser.window_handles)
    click_link(browser, text)
    (new,) = wait_for(browser, lambda: set(browser.window_handles) - before, "another window")
    browser.switch_to.window(new)


@contextmanager
def only_clicks(browser, links, experiment: str) -> Iterator[None]:
    """Starts at the list of experiments and clicks one; windows that open on the way are closed again."""
    browser.get(links["runs"].split("#")[0] + "#/experiments")
    first = browser.current_window_handle
    click_link(browser, experiment)
    try:
        yield
    finally:
        for handle in set(browser.window_handles) - {first}:
            browser.switch_to.window(handle)
            browser.close()
        browser.switch_to.window(first)


def test_from_the_experiments_to_the_report_as_a_user_goes(browser, links, demo_store):
    """Nothing but clicks: the experiment, its newest comparison, a run, the run beside it, the report."""
    with only_clicks(browser, links, demo_store.experiment):
        follow(browser, "table")
        wait_for(browser, lambda: listed_runs(browser) >= set(demo_store.training_runs), "the comparison's runs")
        click_link(browser, "dtr-seed0")
        read_about_the_run(browser)
        follow(browser, "baseline-seed0")
        wait_for(browser, lambda: "Plain denoiser" in browser.page_source, "the run that it is compared with")
        follow(browser, "report")
        wait_for(browser, lambda: browser.find_element(By.CSS_SELECTOR, "iframe"), "the report's frame")


def read_about_the_run(browser) -> None:
    wait_for(browser, lambda: "Denoising Task Routing" in browser.page_source, "what the run is")
    menu = wait_for(browser, lambda: browser.find_element(By.TAG_NAME, "aside").text, "the menu")
    assert "Evaluation runs" not in menu, "a click must not lead into MLflow's mode for language models"
    for text in ("report", "table", "charts", "baseline-seed0"):
        link = link_named(browser, text)
        wait_for(browser, lambda link=link: browser.execute_script(CLEAR, link), f"nothing over the link {text!r}")


def test_baseline_and_dtr_are_compared_side_by_side(browser, links):
    browser.get(links["runs"])

    def tick(name):
        row = next((row for row in find_all(browser, '[role="row"]') if name in row.text.split("\n")), None)
        if row is None:
            return False
        row.find_element(By.CSS_SELECTOR, 'input[type="checkbox"]').click()
        return True

    for name in ("baseline-seed0", "dtr-seed0"):
        wait_for(browser, lambda name=name: tick(name), f"a box for {name}")
    click_on(browser, COMPARE, "the button to compare")

    def missing():
        words = set(browser.find_element(By.TAG_NAME, "body").text.split())
        return {"baseline-seed0", "dtr-seed0", "BaselineModule", "DTRModule", "loss/val"} - words

    wait_for(browser, lambda: not missing(), "both runs beside each other")


def test_the_report_opens_in_the_artifact_viewer(browser, links, demo_store):
    browser.get(links["report"])
    frame = wait_for(browser, lambda: browser.find_element(By.CSS_SELECTOR, "iframe"), "the report's frame")
    browser.switch_to.frame(frame)
    wait_for(browser, lambda: demo_store.experiment in browser.find_element(By.TAG_NAME, "h1").text, "its title")
    widths = browser.execute_script("return Array.from(document.images).map(image => image.naturalWidth)")
    assert widths, "the report has no pictures"
    assert all(widths), "a picture of the report did not load"
