"""report.html: hostile text stays text, differences are marked, nothing is loaded."""

import base64
import hashlib
import re
from html.parser import HTMLParser

from compare_fakes import make_folder, result

from mrss_provider.compare.report import marked, report_page
from mrss_provider.compare.scorers import CHECKS, checks
from mrss_provider.compare.summary import summarise

HOSTILE = (
    "</div></script><script>alert(1)</script><img src=x onerror=alert(2)>"
    "<!-- $title ${script} --> &lt; \"' \ud83d"
)


class Page(HTMLParser):
    """Collects tags and their attributes, and the text of answers."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data


def page_of(tmp_path, texts, **fields):
    tmp_path.mkdir(exist_ok=True)
    name = "<b>model</b>"
    folder = make_folder(tmp_path, ("plain", name), num_prompts=2, **fields)
    results = [result("p0", "plain", text=texts[0]), result("p0", name, text=texts[1])]
    failed = {"type": HOSTILE, "message": HOSTILE, "status": None}
    results.append(result("p1", "plain", text="", error=failed, model_id=HOSTILE))
    return report_page(folder, results, summarise(folder, results, {CHECKS: checks}))


def test_hostile_text_never_becomes_html(tmp_path):
    message = [{"role": "user", "content": HOSTILE}]
    benign = page_of(tmp_path / "1", ("fine", "good"))
    hostile = page_of(tmp_path / "2", (HOSTILE, HOSTILE + "!"), messages=message, group=HOSTILE)
    tame, wild = Page(benign), Page(hostile)
    assert set(wild.tags) <= set(tame.tags) | {"mark", "small"}
    assert wild.tags.count("script") == 1
    assert "img" not in wild.tags
    assert not [name for name in wild.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in wild.text
    assert hostile.encode()


def test_only_the_pages_own_script_may_run_and_nothing_is_loaded(tmp_path):
    page = page_of(tmp_path, ("a", "b"))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert {"src", "href", "srcset", "action"} & set(Page(page).attributes) == set()
    assert "http" not in page.replace("http-equiv", "")


def test_words_that_differ_are_marked_and_all_text_is_there():
    found = marked("The door is blue, aye", "The door is red")
    assert found == "The door is <mark>blue, aye</mark>"
    assert marked("same <b>", "same <b>") == "same &lt;b&gt;"
    assert re.sub("</?mark>", "", marked("x y z", "")) == "x y z"


def test_white_space_is_kept_and_never_marked():
    assert marked("a\n\n b  c ", "a b x") == "a\n\n b  <mark>c</mark> "
    assert re.sub("</?mark>", "", marked(" x\n y ", "z")) == " x\n y "


def test_texts_that_would_take_long_to_compare_are_shown_without_marks():
    assert "<mark>" in marked("a " * 200 + "b", "a " * 200)
    assert marked("a " * 2000 + "b", "a " * 2000) == "a " * 2000 + "b"


def test_tables_plots_and_answers_are_there(tmp_path):
    page = Page(page_of(tmp_path, ("one two", "one three")))
    assert page.tags.count("svg") >= 4
    for text in ("plain", "<b>model</b>", "no difference found", "seed 0", "Question 0?"):
        assert text in page.text
