import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from analysis.frames import curves_frame, runs_frame
from analysis.report.figures import drawn_report, report_sections
from analysis.report.page import render_report
from analysis.report.panels import ReportFigure, ReportSection
from analysis.summary import Verdict, summary_frame, verdict

VOID = {"meta", "img", "br"}
MEASURED_BY_PROBES = {"conflict_matrix", "conflict_rate", "affinity", "clusters", "channels", "specialisation"}


def figures_in(sections):
    return [figure for section in sections for figure in section.figures]


def rendered(runs, said=None):
    curves, table = curves_frame(runs), runs_frame(runs)
    summary = summary_frame(table, curves)
    found, sections = drawn_report(runs, summary, curves)
    said = said or found
    return render_report(runs, summary, said, table, sections, title="A vs. <B>"), figures_in(sections)


@pytest.fixture(scope="module")
def page(runs):
    return rendered(runs)


class Balance(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_needs_nothing_from_outside(page):
    html, figures = page
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    sources = re.findall(r"""src=["']?([^"'\s>]{0,30})""", html)
    assert len(sources) == len(figures)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    without_images = re.sub(r"base64,[^\"]*", "", html)
    assert not re.search(r"https?:|url\(|@import|<script|<link", without_images)
    assert len(html) < 5e6
    places = re.findall(r'id="([^"]*)"', html)
    assert len(places) == len(set(places))
    assert [link.removeprefix("#") for link in re.findall(r'href="([^"]*)"', html)] == places


def test_page_says_what_was_found(page):
    html, figures = page
    assert "A vs. &lt;B&gt;" in html
    assert "DTR ends lower than Baseline" in html
    assert "9 runs on synthetic: Baseline (seeds 0, 1, 2)" in html
    assert "Before you believe it" not in html
    for figure in figures:
        assert figure.title in html
    assert "noise gives 0.5" in html
    assert "baseline-2" in html


def test_page_says_what_its_numbers_are_not(page):
    """Which spread the conflict rate's error is, that corrected cosines are estimates, and how steps are found."""
    html, figures = page
    captions = {figure.name: figure.caption for figure in figures}
    assert "standard error over the probes within these runs" in captions["conflict_rate"]
    assert "not a spread over seeds" in " ".join(html.split())
    assert "may exceed 1" in captions["conflict_matrix"]
    assert "interpolated between validations" in " ".join(html.split())


def test_warnings_and_one_method(runs):
    html, figures = rendered(runs[:1], Verdict(["nothing to say"], ["only <one> run"]))
    assert "only &lt;one&gt; run" in html
    assert "Before you believe it" in html
    assert "affinity" not in {figure.name for figure in figures}, "no routed run, hence no mask overlap"


def test_runs_measured_without_halves_have_no_figures_that_need_them(runs):
    whole = [run.isel(half=[0], other_half=[0]) for run in runs]
    figures = figures_in(report_sections(whole, curves_frame(whole)))
    names = {figure.name for figure in figures}
    assert {"conflict_matrix", "conflict_rate", "conflict_by_block"} <= names
    assert names.isdisjoint({"raw_vs_corrected", "update_shares", "noise_scale"})
    by_block = next(figure for figure in figures if figure.name == "conflict_by_block")
    assert len(by_block.figure.axes) == 1  # no map of corrected cosines


def test_one_probe_is_drawn_as_undefined_not_as_zero(runs):
    short = [run.isel(gradient_step=[0]) for run in runs]
    figures = figures_in(report_sections(short, curves_frame(short)))
    raw = next(figure for figure in figures if figure.name == "raw_vs_corrected").figure.axes[0]
    assert [text.get_text() for text in raw.texts] == ["undefined: 28 of 28"]


def test_figures_drawn_side_by_side_are_those_drawn_one_by_one(runs):
    few = runs[:4]
    curves = curves_frame(few)
    summary = summary_frame(runs_frame(few), curves)
    (said, drawn), made = drawn_report(few, summary, curves, pdf=True), report_sections(few, curves)
    assert said == verdict(few, summary, curves)
    assert [section.title for section in drawn] == [section.title for section in made]
    expected = {figure.name: figure for figure in figures_in(made)}
    assert [figure.name for figure in figures_in(drawn)] == list(expected)
    for figure in figures_in(drawn):
        own = expected[figure.name]
        assert (figure.title, figure.caption, figure.narrow) == (own.title, own.caption, own.narrow)
        assert figure.png == own.png
        assert figure.pdf.startswith(b"%PDF")


def test_runs_without_probes_have_fewer_figures(runs):
    names = ["gramian", "group_count", "group_loss", "activation_mean_square"]
    _, figures = rendered([run.drop_vars(names) for run in runs])
    names = {figure.name for figure in figures}
    assert {"validation_loss", "interval_loss"} <= names
    assert names.isdisjoint(MEASURED_BY_PROBES)


def test_a_diverged_loss_is_called_so_and_a_rate_without_probes_not(runs):
    table = runs_frame(runs[:1]).assign(val_loss=float("nan"), conflict_rate=float("nan"))
    summary = summary_frame(runs_frame(runs[:1]), curves_frame(runs[:1]))
    html = render_report(runs[:1], summary, Verdict([], []), table, [], title="A")
    row = html[html.index('id="runs"') : html.index('id="settings"')]
    assert row.count("<td>diverged</td>") == 1
    assert row.count("<td>not measured</td>") == 1


def test_a_picture_far_wider_than_the_page_is_scrolled_not_shrunk(runs):
    pictures = {}
    for name, width in (("usual", 11.0), ("broad", 26.0)):
        figure = Figure(figsize=(width, 1))
        pictures[name] = ReportFigure(name, name, "", figure).drawn()
    curves, table = curves_frame(runs), runs_frame(runs)
    sections = [ReportSection("Figures", list(pictures.values()))]
    page = render_report(runs, summary_frame(table, curves), Verdict([], []), table, sections, title="")
    usual, broad = re.findall(r"<img([^>]*?)src=", page)
    assert "style" not in usual
    assert "max-width: none; width: 2600px" in broad
