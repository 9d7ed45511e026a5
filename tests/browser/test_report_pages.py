import pytest

from tests.report.samples import D_SAE, HOSTILE, SAE, TOKENS

pytestmark = pytest.mark.browser
PAGES = [
    *("index", "model", "prompts", "activations", "saes", "features", "lenses", "probes", "heads", "attention"),
    *("patching", "attribution", "circuit", "steering"),
]
INTERACTIVE = {"features": "is-ready", "attention": "is-ready"}


def settle(browser, page):
    browser.until("document.readyState === 'complete'")
    if page in INTERACTIVE:
        browser.until(f"document.body.classList.contains('{INTERACTIVE[page]}')")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_page_is_quiet_asks_nothing_outside_and_fits(browser, page, width, dark):
    browser.open(f"{page}.html", width, dark)
    settle(browser, page)
    assert browser.console() == []
    requests = browser.requests()
    assert requests
    assert [url for url in requests if not url.startswith((browser.root.as_uri(), "data:"))] == []
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("return document.title").endswith(HOSTILE)
    assert browser.run("return [...document.querySelectorAll('[onerror], img[src=x]')].length") == 0


@pytest.mark.parametrize("page", PAGES)
def test_every_image_loads_and_says_what_it_shows(browser, page):
    browser.open(f"{page}.html")
    settle(browser, page)
    browser.run("document.querySelectorAll('img').forEach((image) => image.setAttribute('loading', 'eager'))")
    browser.until("[...document.images].every((image) => image.complete)")
    assert browser.run("return [...document.images].every((image) => image.naturalWidth > 0 && image.alt.length > 10)")
    unnamed = """return [...document.querySelectorAll('button, select, input, [role=button], canvas[tabindex]')].filter(
        (e) => !(e.textContent.trim() || e.getAttribute('aria-label') || (e.labels && e.labels.length))).length"""
    assert browser.run(unnamed) == 0


def test_the_policy_stops_what_escaping_would_let_through(browser):
    browser.open("index.html")
    browser.run("document.body.insertAdjacentHTML('beforeend', arguments[0])", HOSTILE)
    browser.run("document.body.append(Object.assign(new Image(), {src: 'https://example.invalid/x.png'}))")
    browser.until("document.images.length > 0")
    assert browser.run("return document.title") != "broken out"
    assert any("Content Security Policy" in line for line in browser.console())
    browser.run("document.querySelectorAll('img[src^=http]').forEach((image) => image.remove())")


def test_the_navigation_reaches_every_page_by_keyboard(browser):
    browser.open("index.html")
    links = browser.run("return [...document.querySelectorAll('nav a')].map((a) => a.getAttribute('href'))")
    assert links == [f"{page}.html" for page in PAGES]
    assert browser.run("return document.querySelector('nav [aria-current]').textContent") == "Overview"
    assert browser.run("return document.querySelector('a').className") == "skip"


def test_claims_show_what_was_measured_and_whether_it_holds(browser):
    browser.open("index.html")
    rows = browser.run("return [...document.querySelectorAll('.claims tbody tr')].map((row) => row.innerText)")
    assert [row.split()[0] for row in rows] == ["holds", "fails", "not"]
    assert HOSTILE in rows[0]
    assert "0.9" in rows[0]
    assert "no figure" in rows[2]


class TestFeatures:
    def open(self, browser, place=""):
        browser.open(f"features.html{place}")
        settle(browser, "features")

    def names(self, browser):
        return browser.run("return [...document.querySelectorAll('.feature-number')].map((e) => Number(e.textContent))")

    def type(self, browser, element, value):
        script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        browser.run(script + "e.dispatchEvent(new Event('input'))", element, value)

    def test_the_list_is_sorted_and_filtered(self, browser):
        self.open(browser)
        assert len(self.names(browser)) == 55
        self.type(browser, "show", "alive")
        assert self.names(browser) == [feature for feature in reversed(range(D_SAE)) if feature != 7]
        browser.run("document.getElementById('direction').click()")
        assert self.names(browser)[:3] == [0, 1, 2]
        self.type(browser, "show", "dead")
        assert self.names(browser) == [7]
        self.type(browser, "show", "all")
        self.type(browser, "low", "0.05")
        assert min(self.names(browser)) == 49
        self.type(browser, "low", "")
        self.type(browser, "query", "nothing has this")
        assert self.names(browser) == []
        assert browser.text("#count") == "0 of 60 features"
        self.type(browser, "query", "onerror")
        assert len(self.names(browser)) == 55

    def test_a_dashboard_is_loaded_when_asked_for_and_shows_hostile_tokens_as_text(self, browser):
        self.open(browser, "#feature=3")
        assert browser.text("#dashboard h2") == "Feature 3"
        loaded = [url for url in browser.requests() if "/data/" in url]
        assert len(loaded) == 2
        first = "#dashboard .examples li:first-child .token"
        tokens = browser.run(f"return [...document.querySelectorAll('{first}')].map((e) => e.textContent)")
        assert tokens[:3] == TOKENS[:3]
        assert tokens[3:5] == ["\\u2028\\u2029", "\\u202e\\u0000⏎"]
        peak = browser.run("return document.querySelector('#dashboard .is-peak').style.background")
        assert peak
        assert browser.text("#dashboard .effects .token") == TOKENS[0]
        assert browser.run("return document.querySelectorAll('#dashboard .bars rect').length") == 8
        assert browser.run("return document.querySelectorAll('#dashboard img').length") == 0

    def test_arrow_keys_walk_through_the_list_over_chunks(self, browser):
        self.open(browser, "#feature=59")
        self.type(browser, "show", "alive")
        press = "document.getElementById('features').dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0]}))"
        browser.run(press, "ArrowDown")
        browser.until("document.querySelector('#dashboard h2').textContent === 'Feature 58'")
        browser.run(press, "PageDown")
        browser.until("document.querySelector('#dashboard h2').textContent === 'Feature 48'")
        assert browser.run("return new URLSearchParams(location.hash.slice(1)).get('feature')") == "48"
        assert browser.run("return new URLSearchParams(location.hash.slice(1)).get('sae')") == SAE

    def test_a_crosscoders_features_say_where_they_write(self, browser):
        self.open(browser, "#feature=3")
        hooks = browser.run("return [...document.querySelectorAll('#dashboard .hook')].map((e) => e.textContent)")
        assert hooks == [HOSTILE, "other:blocks.1"]
        assert "share of the decoder at other:blocks.1" in browser.text("#dashboard .stats")
        assert browser.run("return document.getElementById('by-share').disabled") is False
        self.type(browser, "sort", "share")
        assert self.names(browser)[:2] == [59, 58]

    def test_a_dead_feature_says_so(self, browser):
        self.open(browser, "#feature=7")
        assert "never fired" in browser.text("#dashboard")
        assert 7 in self.names(browser)


class TestAttention:
    def test_prompt_and_head_are_chosen_and_read_from_the_address(self, browser):
        browser.open("attention.html#layer=1&head=2")
        settle(browser, "attention")
        assert browser.text("#which") == "Layer 1, head 2"
        assert browser.run("return document.querySelectorAll('#heads button').length") == 3
        spans = browser.run("return [...document.querySelectorAll('#text .token')].map((e) => e.textContent)")
        assert spans[:3] == TOKENS[:3]
        assert browser.text("#reading-title").startswith("“the” looks most at")

    def test_a_token_shows_what_it_attends_to(self, browser):
        browser.open("attention.html")
        settle(browser, "attention")
        browser.run("document.querySelectorAll('#text .token')[1].click()")
        titles = browser.run("return [...document.querySelectorAll('#text .token')].map((e) => e.title)")
        assert titles[:3] == ["0.5 of the attention, position 0", "0.5 of the attention, position 1", ""]

    def test_another_prompt_has_its_own_length(self, browser):
        browser.open("attention.html")
        settle(browser, "attention")
        browser.run("const e = document.getElementById('prompt'); e.value = '1'; e.dispatchEvent(new Event('change'))")
        browser.until("document.querySelectorAll('#text .token').length === 4")
        assert browser.console() == []


def test_heatmap_cells_are_reached_by_keyboard_and_told(browser):
    browser.open("patching.html")
    press = """const map = document.querySelector('.heatmap canvas');
        for (const key of ['ArrowRight', 'ArrowRight', 'ArrowDown'])
            map.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
        return document.getElementById('tip').textContent"""
    assert browser.run(press).startswith("layer 1, head 1\nfraction recovered ")


def test_patching_shows_fraction_or_metric(browser):
    browser.open("patching.html")
    figures = "[...document.querySelectorAll('.either:first-of-type .figure')]"
    shown = f"return {figures}.map((f) => f.checkVisibility({{visibilityProperty: true}}))"
    assert browser.run(shown) == [True, False]
    browser.run("document.querySelectorAll('.either .choices button')[1].click()")
    assert browser.run(shown) == [False, True]


def test_choosing_a_node_of_the_circuit_lists_its_edges(browser):
    browser.open("circuit.html")
    node = "document.querySelector('[data-node=\"a0.h1\"]')"
    enter = f"{node}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter'}}))"
    browser.run(enter)
    listed = browser.run("return document.querySelector('[data-edges]').innerText")
    assert "Into a0.h1" in listed
    assert "embed → a0.h1 (v)" in listed
    assert "a0.h1 → a1.kv0 (k)" in listed
    assert browser.run("return document.querySelectorAll('.edge.is-on').length") == 3
    browser.run(enter)
    assert browser.run("return document.querySelector('[data-edges]').hidden")


def test_tables_sort_by_number(browser):
    browser.open("index.html")
    sort = """const table = document.querySelector('table[data-sortable]');
        const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === 'Size');
        table.tHead.rows[0].cells[at].querySelector('button').click();
        return [...table.tBodies[0].rows].map((row) => Number(row.cells[at].dataset.value))"""
    sizes = browser.run(sort)
    assert sizes == sorted(sizes, reverse=True)
