"""The report: it needs nothing beside itself, says what findings say at every tolerance, and works in a browser."""
from __future__ import annotations

import csv
import io
import json
import re
import shutil
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_plots import keep_metrics, make_record

from pruning import visualize_results
from pruning.records import page, thumbnails
from pruning.records.comparability import beside
from pruning.records.findings import (
    TIMES,
    all_points,
    failures,
    holds,
    interval,
    last_good,
    losses,
    time_ratio,
)
from pruning.records.record import read_record, record_path, write_record
from pruning.records.report import write_report
from pruning.records.store import image_file
from pruning.records.tables import results_csv

MARKUP = "</script><img src=x onerror=\"document.title='run'\"> & <b>bold</b> {{ 7 * 7 }}"
RATES = (0.1, 0.2, 0.3, 0.4)
LAYERS = [f"blocks.{i}.to_{name}.weight" for i in range(6) for name in "qkv"]


def with_layers(record):
    """Return the record with what each layer lost, more in later layers and at higher rates."""
    for point in record.points:
        point.layer_rates = {name: min(1.0, point.rate * (0.5 + k / len(LAYERS))) for k, name in enumerate(LAYERS)}
        point.layer_errors = {name: 10 ** (-5 + 5 * rate) for name, rate in point.layer_rates.items()}
    record.dense.layer_parameters = {name: 1 / len(LAYERS) for name in LAYERS}
    record.dense.layer_macs = dict(record.dense.layer_parameters)
    return record


def save(folder, record, images=0):
    """Write a record, and of the first samples an image at each rate; return its path."""
    path = record_path(folder, record.model, record.dataset, record.variant)
    write_record(record, path)
    for point in all_points(record):
        for k in range(images):
            file = image_file(path.parent / "images", record.variant, point.rate, k)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 48), (round(250 * point.rate), 7 * k, 90)).save(file)
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Two variants: one with layers and images, a broken one among them, and one without. One caption is markup."""
    folder = tmp_path_factory.mktemp("results")
    paths = []
    for record, images in ((with_layers(make_record("structured", rates=RATES)), 12), (make_record(rates=RATES), 0)):
        record.samples[0]["caption"] = MARKUP
        paths.append(save(folder, record, images))
    (paths[0].parent / "images/structured/0.2/0003.png").write_bytes(b"\x89PNG\r\n")
    layer = {"change": [0.001, 0.2], "parameters": 0.5, "macs": 0.5}
    layers = {"first.weight": layer, "last.weight": layer}
    (paths[0].parent / "structured_sensitivity.json").write_text(json.dumps({"rates": [0.3, 0.7], "layers": layers}))
    return {path: read_record(path) for path in paths}


@pytest.fixture(scope="module")
def report(found, tmp_path_factory):
    path, _ = write_report(found, tmp_path_factory.mktemp("report"))
    return path


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def variants_of(data):
    return {variant["name"]: variant for variant in data["variants"]}


# ---- the file

class Tags(HTMLParser):
    """What is in a page: tags, addresses they name, and the text of scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]


def test_the_page_names_no_other_file_and_captions_make_no_tags(report):
    html = report.read_text(encoding="utf-8")
    found = Tags(html)
    assert found.addresses == ["data:,"]
    assert not re.search(r"url\((?!#)|@import|fetch\(|import\(", html)
    assert found.tags.count("script") == 2
    assert "img" not in found.tags
    assert "default-src 'none'" in html
    assert variants_of(data_of(html))["structured"]["captions"]["0"] == MARKUP


def test_a_model_named_with_markup_is_text_too(found):
    records = {path: read_record(path) for path in found}
    for record in records.values():
        record.model = MARKUP
    tags = Tags(page.page(records, warning=MARKUP, left_out=[MARKUP])).tags
    assert tags.count("img") == tags.count("b") == 0
    assert tags.count("script") == 2


@pytest.mark.parametrize("tolerance", [0.05, 0.033])
def test_every_position_of_the_slider_says_what_findings_say(found, tolerance):
    data = data_of(page.page(found, tolerance))
    assert data["tolerances"][data["chosen"]] == tolerance
    assert data["tolerances"] == sorted({*page.TOLERANCES, tolerance})
    for record in found.values():
        variant = variants_of(data)[record.variant]
        for k, limit in enumerate(data["tolerances"]):
            good, safe = last_good(record, limit), variant["answers"][k]["safe"]
            assert (good and good.rate) == (None if safe is None else variant["points"][safe]["rate"])
            assert [point["failing"][k] for point in variant["points"]] == [
                failures(point, record.dense, limit)[0] for point in all_points(record)]
    safe = [variants_of(data)["structured"]["answers"][k]["safe"] for k in range(len(data["tolerances"]))]
    assert safe == sorted(safe, key=lambda each: each or 0)
    assert len(set(safe)) > 2


def test_images_fit_into_their_budget_smaller_first_and_then_fewer(tmp_path):
    record = make_record(rates=(0.1,), images=4)
    path = save(tmp_path, record, 4)
    noise = np.random.RandomState(0)
    for file in path.parent.rglob("*.png"):
        Image.fromarray(noise.randint(0, 256, (256, 256, 3), np.uint8)).save(file)

    def edges(made):
        return {Image.open(io.BytesIO(b64decode(each))).width for each in made.files}
    for budget, edge, shown in ((10 ** 7, range(256, 257), {4}), (150_000, range(97, 256), {4}),
                                (20_000, range(96, 97), {1, 2, 3})):
        made = thumbnails.thumbnails({path: record}, budget)
        assert sum(len(b64decode(each)) for each in made.files) <= budget
        assert edges(made) <= set(edge)
        assert len(made.places["magnitude"]) in shown


def test_a_page_of_32_images_and_nine_rates_stays_below_5_mb():
    numbers = len(page.page({Path("none/magnitude.json"): with_layers(make_record())}).encode())
    assert numbers + thumbnails.BUDGET * 4 / 3 < 5e6


def test_equal_images_are_held_once_and_a_broken_one_is_named(found):
    made = thumbnails.thumbnails(found)
    assert len(made.files) == 12 * 5 - 1
    assert [file.name for file in made.unreadable] == ["0003.png"]
    assert made.places["structured"][3][2] is None
    assert made.places["magnitude"] == {}
    twice = {path.with_name(name): read_record(path) for path in list(found)[:1] for name in ("a.json", "b.json")}
    assert len(thumbnails.thumbnails(twice).files) == len(made.files)
    html = page.page(found)
    assert "1 image cannot be read and" in html
    assert ": 0003.png" in html


def test_the_images_that_lose_most_are_among_those_shown(tmp_path):
    record = make_record(rates=(0.1,), images=48)
    record.points[0].per_image["clip_score"][44] = 0.0
    shown = thumbnails.thumbnails({save(tmp_path, record, 48): record}).places["magnitude"]
    assert len(shown) == thumbnails.SHOWN
    assert {0, 1, 2, 44} <= set(shown)


def test_the_table_of_results_has_a_row_for_every_point(found, report):
    rows = list(csv.DictReader(report.with_name("results.csv").open(encoding="utf-8")))
    assert [(row["variant"], float(row["rate"])) for row in rows] == [
        (record.variant, point.rate) for record in reversed(list(found.values())) for point in all_points(record)]
    record = next(iter(found.values()))
    for row, point in zip(rows[len(rows) // 2:], all_points(record)):
        assert int(row["macs"]) == point.macs
        assert float(row["clip_score"]) == point.metrics["clip_score"]
        assert (float(row["clip_score_low"]), float(row["clip_score_high"])) == interval(
            "clip_score", point, record.dense)
        assert row["fid_low"] == ""


def test_what_was_not_measured_is_an_empty_cell():
    record = make_record(rates=(0.1,), clip=(83, None))
    other = keep_metrics(make_record("structured", rates=(0.1,)), "clip_score")
    rows = list(csv.DictReader(io.StringIO(results_csv([record, other]))))
    assert [row["clip_score"] for row in rows] == ["83", "", "83.0", "76.0"]
    assert [row["fid"] != "" for row in rows] == [True, True, False, False]


# ---- which records it shows

def test_a_report_holds_what_was_measured_alike_in_its_folder_and_names_the_rest(tmp_path):
    own, alike, longer = (make_record(name, rates=(0.1, 0.2)) for name in ("magnitude", "structured", "iterative"))
    longer.settings["steps"] = 30
    path, _, _ = (save(tmp_path, record) for record in (own, alike, longer))
    (path.parent / "broken.json").write_text('{"schema_version": 3')
    (path.parent / "other.json").write_text("{}")
    found, reasons = beside(path, own)
    assert [record.variant for record in found.values()] == ["magnitude", "structured"]
    assert [reason.split(" ")[0].split("/")[-1] for reason in reasons] == ["broken.json", "iterative.json"]
    html = page.page(found, left_out=reasons)
    assert "iterative.json was measured differently: steps: 20 and 30" in html
    assert "broken.json is not JSON" in html


def test_drawing_and_comparing_write_the_report(tmp_path, monkeypatch):
    for name in ("magnitude", "structured"):
        save(tmp_path, keep_metrics(make_record(name, rates=(0.1, 0.2)), "clip_score"))
    monkeypatch.setattr(visualize_results.report, "RECORD_FILES", {})  # figures take long
    monkeypatch.setattr(visualize_results.report, "write_comparison", lambda *_: [])
    folder = tmp_path / "shapes-unet/shapes"
    for flags in (["--methods", "magnitude"], ["--results_file", str(folder / "structured.json")], [], ["--compare"]):
        visualize_results.main(["--results_dir", str(tmp_path), *flags])
        html = (folder / "report.html").read_text(encoding="utf-8")
        assert sorted(variants_of(data_of(html))) == ["magnitude", "structured"]  # drawing one drops no other
        assert (folder / "results.csv").read_text().count("structured") == 3
        (folder / "report.html").unlink()
    visualize_results.main(["--results_file", str(folder / "magnitude.json"), "--output_dir", str(tmp_path / "own")])
    html = (tmp_path / "own/report.html").read_text(encoding="utf-8")
    assert list(variants_of(data_of(html))) == ["magnitude"]


def test_zeros_are_left_out_over_time_and_the_page_says_so():
    removed, zeroed, steps = (make_record(name, rates=RATES) for name in ("structured", "magnitude", "steps"))
    for record in (zeroed, steps):
        for point in record.points:  # as if all had been faster than dense, beyond doubt
            point.denoiser_seconds, point.image_seconds = 0.016, 0.08
            point.ratio_intervals = {name: [0.79, 0.81] for name in TIMES}
    said = "Not drawn over time: magnitude, as zeros take as long as other numbers."
    html = page.page({Path(f"none/{record.variant}.json"): record for record in (removed, zeroed, steps)})
    assert said in html
    data = data_of(html)
    assert set(TIMES) < set(data["savings"])
    for record in (removed, zeroed, steps):
        for shown, point in zip(variants_of(data)[record.variant]["points"], all_points(record)):
            assert shown["savings"]["parameters"] is not None
            saved = [1 - time_ratio(name, point, record.dense)[0] for name in TIMES]
            assert [shown["savings"][name] for name in TIMES] == (
                [None, None] if record is zeroed else pytest.approx(saved, abs=1e-4))
            assert set(shown["reach"]) == (set() if record is zeroed or not point.rate else set(TIMES))

    html = page.page({Path("none/magnitude.json"): zeroed})
    assert not set(TIMES) & set(data_of(html)["savings"])  # no time to choose
    assert "Not drawn over time" not in html
    assert "Not drawn over time" not in page.page({Path("none/structured.json"): removed})


# ---- in a browser

@pytest.fixture(scope="module")
def chromium():
    """The system's Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium is installed, so the report is not opened (Debian: apt-get install chromium)")
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """A function that opens a file, and fails the test for anything that the page complains of or asks for."""
    complaints, pages = [], []

    def open_page(path, **settings):
        tab = chromium.new_page(**settings)
        pages.append(tab)
        tab.set_default_timeout(5000)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: complaints.append(request.url)
               if not request.url.startswith(("file://", "data:", "blob:")) else None)
        tab.goto(path.as_uri())
        return tab
    yield open_page
    for tab in pages:
        tab.close()
    assert complaints == []


def safe_rates(tab):
    """The table of safe rates as {variant: {cell: text}}."""
    return tab.locator("#safe tbody").evaluate("""body => Object.fromEntries([...body.rows].map(row =>
        [row.cells[0].innerText.trim(), Object.fromEntries([...row.cells].map(cell =>
            [cell.dataset.cell || "", cell.innerText]))]))""")


def test_the_slider_shows_the_numbers_of_findings_at_every_tolerance(found, report, opened):
    tab = opened(report)
    slider = tab.get_by_label("Loss of clip_score that you accept")
    slider.press("Home")
    for limit in sorted({*page.TOLERANCES, 0.05}):
        assert tab.locator("#tolerance-value").inner_text() == f"{100 * limit:g} %"
        shown = safe_rates(tab)
        for record in found.values():
            good = last_good(record, limit)
            kept = good and 100 * good.metrics["clip_score"] / record.dense.metrics["clip_score"]
            cells = shown[record.variant]
            none = "none" if holds(record.points[0], record.dense, limit) is False else "undecided"
            assert cells["rate"] == (f"{good.rate:g}" if good else none)
            assert cells["keeps"].split("\n")[0] == (f"{kept:.1f} %" if good else "–")
            count, most = failures(good, record.dense, limit) if good else (0, 0)
            worst = f"\nworst −{100 * most:.0f} %" if count else ""
            assert cells["failing"] == (f"{count} of 32{worst}" if good else "–")
            assert cells["parameters"].rpartition(" ")[0] == (
                f"{100 * (1 - good.nonzero_parameters / record.dense.nonzero_parameters):.0f} %" if good else "")
        assert f"{100 * limit:g} % of the dense clip_score" in tab.locator("#lead").inner_text()
        slider.press("ArrowRight")


def test_captions_with_markup_are_shown_as_text(report, opened):
    tab = opened(report)
    tab.get_by_label("Variant", exact=True).select_option("structured")
    assert tab.locator("figcaption").first.inner_text().endswith(MARKUP)
    assert tab.locator("main b:not(figcaption > b)").count() == 0
    assert tab.title() == "How far can shapes-unet be pruned?"


def test_images_follow_the_rate_the_filter_the_order_and_the_swipe(found, report, opened):
    tab, record = opened(report), next(iter(found.values()))
    tab.get_by_label("Variant", exact=True).select_option("structured")
    pruned, captions = tab.locator(".pair img:nth-child(2)"), tab.locator("figcaption")
    assert tab.locator("#count").inner_text() == "12 of 32 images"
    rate = tab.get_by_label("Rate", exact=True)
    rate.focus()
    rate.press("End")
    last = pruned.nth(1).get_attribute("src")
    assert pruned.nth(1).get_attribute("alt") == f"0.4: {record.samples[1]['caption']}"
    rate.press("Home")
    assert pruned.nth(1).get_attribute("src") != last
    rate.press("End")
    tab.get_by_label("Order").select_option("worst loss first")
    lost = losses(record.points[-1], record.dense)[:12]
    for place, k in enumerate(np.argsort(-lost)[:3]):
        words = f"{'loses' if lost[k] > 0 else 'gains'} {100 * abs(lost[k]):.1f}".replace(".0", "")
        assert captions.nth(place).inner_text().startswith(words)
        assert captions.nth(place).inner_text().endswith(record.samples[k]["caption"])
    tab.get_by_label("Caption has").fill("BEIGE 11")
    assert captions.count() == 1
    swipe = tab.get_by_label("Swipe between dense")
    swipe.focus()
    swipe.press("End")
    assert pruned.first.evaluate("image => getComputedStyle(image).clipPath") == "inset(0px 0px 0px 100%)"


def test_a_variant_without_images_or_layers_says_so(report, opened):
    tab = opened(report)
    tab.get_by_label("Variant", exact=True).select_option("magnitude")
    assert tab.get_by_text("No image of this variant lies in images/").is_visible()
    assert tab.get_by_text("This record does not say what each layer lost.").is_visible()
    assert not tab.get_by_label("Caption has").is_visible()


def test_the_frontier_is_read_by_keyboard_and_shows_every_metric(found, report, opened):
    tab, record = opened(report), list(found.values())[0]
    tab.get_by_label("only what keeps 60").uncheck()
    for metric in ("fid", "kid", "lpips_dense", "clip_score"):
        tab.get_by_label("Up", exact=True).select_option(metric)
        for name in ("rate", *page.SAVINGS):
            tab.get_by_label("Across").select_option(name)
            assert tab.locator("#frontier .mark").count() == (5 if name in TIMES else 10)  # zeros save no time
    marks, tip = tab.locator("#frontier .mark[aria-label^=structured]"), tab.locator("#tip")
    tab.locator("#frontier .mark[tabindex='0']").focus()
    for _ in range(4):
        tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowUp")
    assert marks.last.evaluate("mark => mark === document.activeElement")
    assert f"clip_score {record.points[-1].metrics['clip_score']:g} (" in tip.inner_text()
    assert tip.locator("img").count() == 4
    tab.keyboard.press("Escape")
    assert not tip.is_visible()
    tab.get_by_role("button", name="magnitude").click()
    assert tab.locator("#frontier .mark").count() == 5


def test_the_map_of_layers_names_the_layer_under_the_arrow_keys(report, opened):
    tab = opened(report)
    tab.get_by_label("Variant", exact=True).select_option("structured")
    tab.get_by_label("share lost, by rate and layer").focus()
    for key in ("ArrowRight", "ArrowUp"):
        tab.keyboard.press(key)
    lost = 0.2 * (0.5 + 1 / len(LAYERS))
    assert tab.locator("#tip").inner_text().startswith(f"{LAYERS[1]}\nrate 0.2: share lost {lost:.4g}\n")
    tab.get_by_label("change of the guided output if this layer alone is pruned").focus()
    tab.keyboard.press("ArrowUp")
    assert tab.locator("#tip").inner_text().startswith("first.weight\nrate 0.7: change of the guided output")


def downloaded(tab, name):
    with tab.expect_download() as started:
        tab.get_by_role("button", name=f"Download {name}").click()
    return Path(started.value.path()).read_text(encoding="utf-8")


def test_what_is_downloaded_is_the_table_of_results_and_the_numbers(report, opened):
    tab = opened(report)
    assert downloaded(tab, "CSV") == report.with_name("results.csv").read_text(encoding="utf-8")
    assert list(variants_of(json.loads(downloaded(tab, "JSON")))) == ["magnitude", "structured"]


@pytest.mark.parametrize(("width", "scheme"), [(830, "light"), (1600, "dark")])
def test_nothing_is_cut_off_and_every_control_has_a_name(report, opened, width, scheme):
    tab = opened(report, viewport={"width": width, "height": 900}, color_scheme=scheme)
    for details in tab.locator("summary").all():
        details.click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("#safe").evaluate("table => table.scrollWidth <= table.parentNode.clientWidth")
    unnamed = "all => all.filter(each => !each.labels.length && !each.textContent.trim()).map(each => each.id)"
    assert tab.locator("input, select, button").evaluate_all(unnamed) == []
    assert tab.locator("img:not([alt])").count() == 0
    channels = tab.locator("body").evaluate("body => getComputedStyle(body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(channels) < 80) == (scheme == "dark")


@pytest.mark.parametrize("record", [
    make_record(rates=(0.3,), images=1), keep_metrics(make_record(rates=()), "clip_score"),
    make_record(clip=(83, 80, None, 20, None), rates=RATES), keep_metrics(make_record(rates=RATES), "fid"),
    keep_metrics(make_record(rates=RATES), "generation_time"),
], ids=["one image", "dense alone", "gaps", "only sets", "only time"])
def test_whatever_a_record_holds_opens(record, tmp_path, opened):
    path, _ = write_report({save(tmp_path, record): record}, tmp_path)
    tab = opened(path)
    assert "clip_score" in record.dense.metrics or "clip_score was not measured" in tab.locator("#lead").inner_text()
