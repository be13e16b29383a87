"""The page: its files as they are served, and what people do with it in a real Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_browser import Browser, chromium
from helpers_serve import Running, Says, serving, write_chat_model

from tinyllm.server import page
from tinyllm.server.guard import Access

FOLDER = Path(page.__file__).parent
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir() if path.is_file()}
SCRIPTS = {name: text for name, text in SOURCES.items() if name.endswith(".js")}

# ---- its files


@pytest.fixture(scope="module")
def says() -> Says:
    return Says()


@pytest.fixture(scope="module")
def running(says: Says, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    chat = write_chat_model(tmp_path_factory.mktemp("models") / "chat.gguf")
    with serving({"chatty": chat, "stories": "stories"}, says) as running:
        yield running


def test_every_file_is_served_and_nothing_else(running: Running) -> None:
    assert {name for name, _ in page.FILES.values()} == set(SOURCES) - {"__init__.py"}
    with httpx.Client(base_url=running.url) as client:
        check_files(client)


def check_files(client: httpx.Client) -> None:
    for path, (name, media_type) in page.FILES.items():
        response = client.get(path)
        assert response.status_code == 200
        assert response.text == SOURCES[name]
        assert response.headers["content-type"].split(";")[0] == media_type
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert client.head(path).headers["etag"] == response.headers["etag"]
    for path in (
        "/page/",
        "/page/__init__.py",
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page//etc/passwd",
    ):
        assert client.get(path).status_code == 404


def test_what_the_browser_has_is_not_sent_again(running: Running) -> None:
    first = httpx.get(f"{running.url}/page/app.js")
    tag = first.headers["etag"]
    for known in (tag, f'"old", W/{tag}'):
        again = httpx.get(f"{running.url}/page/app.js", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert httpx.get(f"{running.url}/page/app.js", headers={"If-None-Match": '"old"'}).status_code == 200


def test_nothing_is_from_elsewhere_and_no_text_becomes_markup() -> None:
    html = SOURCES["index.html"]
    for name, text in SOURCES.items():
        if name != "__init__.py":
            assert not re.search(r"(https?:)?//(?!www\.w3\.org/2000/svg)[\w-]+\.\w", text), name
    assert re.findall(r"<script\b[^>]*>(.*?)</script>", html, re.DOTALL) == [""]
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", html)
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc"
    for name, text in SCRIPTS.items():
        code = re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)
        assert not re.search(markup, code), name
        assert text.startswith("//"), f"{name}: its first lines say what it owns"


def words() -> dict[str, dict[str, str]]:
    """{language: {name: words}}, a list as it is written."""
    tables = re.findall(r"^  (\w\w): \{\n(.*?)^  \},$", SCRIPTS["words.js"], re.MULTILINE | re.DOTALL)
    return {
        language: dict(re.findall(r"^    (\w+): (.+),$", table, re.MULTILINE)) for language, table in tables
    }


def test_both_languages_say_the_same() -> None:
    """Every name that is used is in both, with the same values in it; and none is left over."""
    en, fr = words()["en"], words()["fr"]
    assert list(en) == list(fr)
    for name in en:
        assert sorted(re.findall(r"\{\w+\}", en[name])) == sorted(re.findall(r"\{\w+\}", fr[name])), name
    code = "".join(SCRIPTS.values())
    used = set(re.findall(r"""["'](\w+)["']""", code.replace(SCRIPTS["words.js"], "")))
    used |= set(re.findall(r'data-t(?:-label)?="(\w+)"', SOURCES["index.html"]))
    used |= set(re.findall(r"^  (\w+): \[", SCRIPTS["settings.js"], re.MULTILINE))  # the fields
    made = [re.compile(p.replace("\0", r"\w+")) for p in made_names(code)]
    unused = [name for name in en if name not in used and not any(p.fullmatch(name) for p in made)]
    assert unused == []
    asked = set(re.findall(r'\bt\("(\w+)"', code)) | set(
        re.findall(r'data-t(?:-label)?="(\w+)"', SOURCES["index.html"])
    )
    assert asked <= set(en)


def made_names(code: str) -> list[str]:
    """Names that are put together: `welcome_${name}` is welcome_ and anything."""
    return [
        re.sub(r"\$\{\w+(?:\.\w+)?\}", "\0", name) for name in re.findall(r"`((?:\w|\$\{[\w.]+\})+)`", code)
    ]


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile"), tmp_path_factory.mktemp("downloads")) as browser:
        yield browser


@pytest.fixture
def at(browser: Browser, running: Running, says: Says) -> Iterator[Browser]:
    """The page, as somebody sees it who comes for the first time. Nothing is said in the console."""
    says.text = None
    browser.cdp("Storage.clearDataForOrigin", origin=running.url, storageTypes="local_storage")
    browser.driver.get(f"{running.url}/")
    ready(browser)
    browser.errors()
    yield browser
    assert browser.errors() == []
    running.wait_until_idle()


def ready(browser: Browser) -> None:
    browser.until(lambda: browser.all("#model-facts") and "Q8_0" in browser.one("#model-facts").text)


def choose_stories(at: Browser) -> None:
    at.js(
        "const m = document.getElementById('model'); m.value = 'stories';m.dispatchEvent(new Event('change'))"
    )
    at.until(lambda: "base" in at.one("#model-facts").text)


def say(at: Browser, text: str) -> None:
    at.one("#input").send_keys(text, "\n")


def done(at: Browser) -> None:
    at.until(lambda: not at.all("body.running") and at.all(".under .tool"))


def answers(at: Browser) -> list[str]:
    return [one.text for one in at.all("article.assistant .body")]


STORY = "Once there was a dog, and it ran to the red ball. " * 20


def test_a_question_is_answered_while_one_looks(at: Browser, says: Says) -> None:
    says.text, says.pause_s = STORY, 0.01
    at.js("window.seen = new Set(); new MutationObserver(() => window.seen.add("
          "document.querySelector('.assistant .body')?.textContent.length))"
          ".observe(document.getElementById('talk'), {subtree: true, childList: true})")  # fmt: skip
    set_number(at, "max_tokens", "60")
    say(at, "Tell me of a dog.")
    done(at)
    assert at.one(".bubble").text == "Tell me of a dog."
    (answer,) = answers(at)
    says.pause_s = 0.0
    assert len(answer) > 40
    assert len(at.js("return [...window.seen]")) > 4, "it comes in pieces"
    stats = at.one(".stats").text
    assert re.search(
        r"[\d.,]+ tokens/s · first token after [\d.]+ s · 60 tokens · seed \d+ · ended at", stats
    )
    at.driver.refresh()
    ready(at)
    assert answers(at) == [answer], "it is kept"
    assert at.one("#list .open .title").text == "Tell me of a dog."


def set_number(at: Browser, name: str, value: str) -> None:
    field = at.one(f"#set-{name}")
    at.js("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", field, value)


def test_what_a_model_writes_is_text(at: Browser, says: Says) -> None:
    says.text = (
        "<img src=x onerror=alert(1)> **bold** and *soft* `a<b`\n\n1. one\n   - in it\n2. two\n\n"
        "```html\n<script>alert(2)</script>\n```\n> said\n\n| a | b |\n|---|---|\n| 1 | <i>2</i> |\n\n# Title"
    )
    say(at, "<b>hello</b>")
    done(at)
    assert at.one(".bubble").text == "<b>hello</b>"
    body = at.one(".assistant .body")
    assert body.text.startswith("<img src=x onerror=alert(1)> bold and soft a<b")
    assert at.one(".body pre").text == "<script>alert(2)</script>"
    kinds = at.js("return [...document.querySelectorAll('.body *')].map(e => e.tagName)")
    assert {"STRONG", "EM", "CODE", "OL", "UL", "LI", "PRE", "BLOCKQUOTE", "TABLE", "H3"} <= set(kinds)
    assert not {"IMG", "SCRIPT", "I", "B", "A"} & set(kinds)
    assert [one.text for one in at.all(".body td")] == ["1", "<i>2</i>"]


def test_markdown_ends_whatever_is_written(at: Browser) -> None:
    """And it drops no letter of it."""
    texts = [
        *(
            mark * 20_000
            for mark in ("*", "_", "`", "**a ", "*a ", "_a ", "`a ", "> ", "- ", "1. ", "|", "#", "~")
        ),
        *("- " * 5000 + "x", "\n".join("> " * i + "x" for i in range(200))),
        *("\n".join(" " * i + "- x" for i in range(300)), "x|\n" + "-" * 20_000, "x|\n" + "-|" * 20_000),
        *("```\nx", "~~~~\nx\n~~~", "- \n\n  x\n\n\n- y", "|\n|-|\n|", "**", "1) x\n2) y", "\\", "a\\*b"),
    ]
    script = """
      const [texts, done] = arguments;
      import("/page/markdown.js").then(({ markdown }) => done(texts.map((text) => {
        const node = document.createElement("div");
        node.append(markdown(text));
        return [...node.textContent].filter((c) => /[a-z]/.test(c)).length;
      })));
    """
    seen = at.driver.execute_async_script(script, texts)
    assert seen == [sum(c.isalpha() for c in text) for text in texts]


def test_reasoning_is_folded_away(at: Browser, says: Says) -> None:
    says.text = "<think>\nThey ask of a dog.\n</think>\n\nIt barks."
    say(at, "What does a dog do?")
    done(at)
    assert answers(at) == ["It barks."]
    details = at.one("details.reasoning")
    assert details.text == "Reasoning"
    details.find_element("css selector", "summary").click()
    assert details.text == "Reasoning\nThey ask of a dog."


def test_escape_stops_and_it_can_be_written_again(at: Browser, running: Running, says: Says) -> None:
    says.text, says.pause_s = STORY * 10, 0.02
    say(at, "Tell me a long story.")
    at.until(lambda: answers(at) and len(answers(at)[0]) > 30)
    assert at.one("#send").get_attribute("aria-label") == "Stop"
    at.press("\ue00c")
    done(at)
    running.wait_until_idle()
    assert len(answers(at)[0]) < len(says.text)
    assert at.one(".stats").text.endswith("stopped")
    says.text, says.pause_s = "A cat.", 0.0
    at.click(".assistant .tool[aria-label='Write it again']")
    at.until(lambda: answers(at) == ["A cat."])
    done(at)


def test_a_message_is_edited_and_what_followed_is_gone(at: Browser) -> None:
    set_number(at, "max_tokens", "8")
    for text in ("One cat.", "Two cats."):
        say(at, text)
        done(at)
    at.js("document.querySelector(\".user .tool[aria-label='Edit']\").click()")
    assert at.driver.switch_to.active_element.get_attribute("value") == "One cat."
    at.press("\ue00c")
    assert len(at.all(".user")) == 2, "Escape leaves it as it was"
    at.js("document.querySelector(\".user .tool[aria-label='Edit']\").click()")
    at.press(" Black.", "\n")
    at.until(lambda: [b.text for b in at.all(".bubble")] == ["One cat. Black."])
    done(at)
    assert len(answers(at)) == 1


def test_a_base_model_continues_a_text(at: Browser) -> None:
    choose_stories(at)
    assert at.one("h1").text == "Begin a text"
    set_number(at, "seed", "1")
    set_number(at, "max_tokens", "20")
    say(at, "Once upon a time")
    done(at)
    text = at.one(".whole .text").text
    assert text.startswith("Once upon a time, ")
    assert at.one(".whole .user").text == "Once upon a time"
    say(at, "")
    done(at)
    longer = at.one(".whole .text").text
    assert longer.startswith(text)
    assert len(longer) > len(text)
    say(at, "The end")
    done(at)
    assert " The end" in at.one(".whole .text").text[len(longer) :]
    at.click(".whole .tool[aria-label='Edit']")
    area = at.driver.switch_to.active_element
    area.clear()
    area.send_keys("Tom had a ball", "\n")
    at.until(lambda: at.all(".whole .text") and at.one(".whole .text").text.startswith("Tom had a ball"))
    done(at)
    assert len(at.all("#list li")) == 1


def test_the_tokens_of_an_answer(at: Browser, running: Running, says: Says) -> None:
    says.text = STORY
    set_number(at, "max_tokens", "10")
    say(at, "Tell me of a dog.")
    done(at)
    at.click(".assistant .tool[aria-label='See its tokens']")
    at.until(lambda: len(at.all("#tokens-found > .cells .token")) == 10)
    llm = running.server.models.served["chatty"].llm
    assert llm is not None
    assert llm.tokenizer is not None
    shown = [one.text.split("\n") for one in at.all("#tokens-found > .cells .token")]
    assert [llm.tokenizer.token_text(int(i)).replace(" ", "·") for _, i in shown] == [
        text for text, _ in shown
    ]
    at.js("document.querySelector('#tokens-found .token').focus()")
    at.press("\ue014")  # to the right
    assert re.fullmatch(
        r"“.+” · id \d+ · probability [\d.<]+ ?[\d.]*% · token 2 of 10", at.one(".detail").text
    )
    colours = {
        one.value_of_css_property("background-color") for one in at.all("#tokens-found > .cells .token")
    }
    assert len(colours) > 3
    at.click("#tokens-found summary")
    assert any("special token" in (one.get_attribute("aria-label") or "") for one in at.all("details .token"))
    area = at.one("#tokens-text")
    area.clear()
    area.send_keys("A cat.", "\n")
    at.until(lambda: at.one("#tokens-found .facts").text.startswith("3 tokens for 6 characters"))


def test_what_may_come_next_is_chosen(at: Browser) -> None:
    choose_stories(at)
    set_number(at, "max_tokens", "3")
    say(at, "Once upon a")
    done(at)
    at.click("#tab-next")
    at.click("#view-next .quiet")
    area = at.one("#next-text")
    area.clear()
    area.send_keys("Once upon a", "\n")
    at.until(lambda: at.all(".next .pick") and at.all(".next .pick")[0].text == "·time")
    assert len(at.all(".next tbody tr")) == 16
    rows = [
        [cell.text for cell in row.find_elements("css selector", "td")] for row in at.all(".next tbody tr")
    ]
    assert all(abs(sum(percents(column)) - 100) < 1.5 for column in zip(*rows, strict=True))
    assert at.all(".next tr.dropped"), "the filters leave few after this text"
    at.all(".next .pick")[0].click()
    at.until(lambda: at.one("#next-text").get_attribute("value") == "Once upon a time")
    at.until(lambda: at.all(".next .pick")[0].text == ",")
    first = at.all(".next input")[0]
    at.js("arguments[0].value = 0; arguments[0].dispatchEvent(new Event('change'))", first)
    at.until(lambda: at.all(".next tbody tr")[0].text.split("\n")[1] == "100.0%")


def percents(column: tuple[str, ...]) -> list[float]:
    return [0.05 if text.startswith("<") else float(text.rstrip("%")) for text in column]


def test_the_page_speaks_french(at: Browser) -> None:
    at.click("#language")
    assert at.js("return document.documentElement.lang") == "fr"
    assert at.one("h1").text == "Que voulez-vous savoir ?"
    assert "Température" in at.one("#view-settings").text
    at.driver.refresh()
    ready(at)
    assert at.one("#new").text == "Nouvelle conversation"
    set_number(at, "max_tokens", "4")
    say(at, "Bonjour")
    done(at)
    assert re.search(r"premier token après [\d,]+ s", at.one(".stats").text)
    seen = at.one("body").text
    assert not re.search(r"undefined|NaN|\{\w+\}|\[object", seen)


def test_the_browser_says_the_language(at: Browser, running: Running) -> None:
    at.cdp("Emulation.setUserAgentOverride", userAgent="x", acceptLanguage="fr-CA,en;q=0.5")
    try:
        at.driver.refresh()
        ready(at)
        assert at.one("h1").text == "Que voulez-vous savoir ?"
    finally:
        at.cdp("Emulation.setUserAgentOverride", userAgent="")


def test_dark_and_light_can_be_read(at: Browser) -> None:
    """Text against what lies behind it has a contrast of 4.5 at least (WCAG AA)."""
    set_number(at, "max_tokens", "8")
    say(at, "Hello")
    done(at)
    at.click(".assistant .tool[aria-label='See its tokens']")
    at.until(lambda: at.all("#tokens-found .token"))
    places = (".bubble", ".body", ".stats", "#model-facts", ".intro", "#new", ".token .text", "#list .title")
    grounds = []
    try:
        for scheme in ("light", "dark"):
            at.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            grounds.append(at.js("return getComputedStyle(document.body).backgroundColor"))
            for place in places:
                ratio = at.js(CONTRAST, at.all(place)[0])
                assert ratio >= 4.5, (scheme, place, ratio)
    finally:
        at.cdp("Emulation.setEmulatedMedia", features=[])
    assert grounds[0] != grounds[1]


FOCUSED = """
const e = document.activeElement;
return [e.id || e.getAttribute("aria-label") || e.className, getComputedStyle(e).outlineStyle];
"""
# Colours are drawn on a canvas, which knows every way to write them.
CONTRAST = """
const pixel = (colours) => {
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
  for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (rgb) => rgb.map((c) => c / 255)
  .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = [];
for (let node = arguments[0]; node; node = node.parentElement) {
  behind.unshift(getComputedStyle(node).backgroundColor);
}
const a = light(pixel(behind)), b = light(pixel([...behind, getComputedStyle(arguments[0]).color]));
return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
"""


def test_a_phone(at: Browser) -> None:
    """Nothing is wider than the screen, and everything is within reach."""
    at.cdp("Emulation.setDeviceMetricsOverride", width=390, height=780, deviceScaleFactor=1, mobile=True)
    try:
        at.driver.refresh()
        ready(at)
        width = "return document.documentElement.scrollWidth"
        assert at.js(width) == 390
        assert not at.all("#panel")
        at.click("#panel-button")
        set_number(at, "max_tokens", "30")
        assert at.one("#panel").rect["width"] == 390
        at.click("#panel-close")
        say(at, "Tell me of a dog.")
        done(at)
        assert at.js(width) == 390
        at.click("#menu")
        at.until(lambda: at.one("#side").rect["x"] == 0)
        assert at.js("return document.activeElement.id") == "new"
        at.press("\ue00c")
        at.until(lambda: not at.all("#side"))
        at.click(".assistant .tool[aria-label='See its tokens']")
        at.until(lambda: at.all("#tokens-found .token"))
        assert at.js(width) == 390
        at.press("\ue00c")
        assert not at.all("#panel")
        for button in at.all("button"):
            assert min(button.size["width"], button.size["height"]) >= 24, button.get_attribute("outerHTML")
    finally:
        at.cdp("Emulation.clearDeviceMetricsOverride")


def test_keys_alone_are_enough(at: Browser) -> None:
    set_number(at, "max_tokens", "6")
    assert at.js("return document.activeElement.id") == "input"
    at.press("One")
    at.chord("\ue008", "\n")
    at.press("two", "\n")
    done(at)
    assert at.one(".bubble").text == "One\ntwo"
    seen = set()
    for _ in range(40):
        at.press("\ue004")
        name, outline = at.js(FOCUSED)
        seen.add(name)
        assert outline != "none" or name in ("input", ""), f"{name} has the focus, and it cannot be seen"
    assert {
        "new",
        "language",
        "panel-button",
        "send",
        "tab-settings",
        "set-temperature",
        "Write it again",
    } <= seen
    at.js("document.getElementById('tab-settings').focus()")
    at.press("\ue014")
    assert at.one("[role=tab][aria-selected=true]").get_attribute("id") == "tab-tokens"


def test_conversations_are_kept_exported_and_deleted(at: Browser) -> None:
    set_number(at, "max_tokens", "4")
    for text in ("First", "Second"):
        at.click("#new")
        say(at, text)
        done(at)
    titles = [one.text for one in at.all("#list .title")]
    assert titles == ["Second", "First"]
    at.js("document.querySelector(\"[aria-label='Export this conversation']\").click()")
    value = downloaded(at, "Second.json")
    assert [m["role"] for m in value["messages"]] == ["user", "assistant"]
    at.click("#export-all")
    assert [one["title"] for one in downloaded(at, "tinyllm-conversations.json")] == titles
    at.all("#list .title")[1].click()
    at.until(lambda: at.one(".bubble").text == "First")
    at.js("document.querySelectorAll(\"[aria-label='Delete this conversation']\")[1].click()")
    at.press("\ue00c")
    assert len(at.all("#list li")) == 2, "Escape keeps it"
    at.js("document.querySelectorAll(\"[aria-label='Delete this conversation']\")[1].click()")
    at.click("#dialog button[type=submit]")
    at.until(lambda: [one.text for one in at.all("#list .title")] == ["Second"])
    assert at.one("h1").text == "What would you like to know?"
    at.click("#delete-all")
    at.click("#dialog button[type=submit]")
    at.until(lambda: not at.all("#list li"))
    assert at.js("return Object.keys(localStorage).filter((k) => k.includes('conversation'))") == []


def downloaded(at: Browser, name: str) -> Any:
    path = at.downloads / name
    at.until(path.exists, name)
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_damaged_store_is_survived(at: Browser) -> None:
    damaged = {
        "conversation.a": "{",
        "conversation.b": '{"id": "b", "kind": "chat", "messages": [1]}',
        "settings": "[3]",
        "temperatures": '"x"',
        "model": '"gone"',
    }
    for name, text in damaged.items():
        at.js("localStorage.setItem(`tinyllm.${arguments[0]}`, arguments[1])", name, text)
    at.driver.refresh()
    ready(at)
    assert not at.all("#list li")
    assert at.one("h1").text == "What would you like to know?"


def test_errors_are_told_in_words(at: Browser, running: Running) -> None:
    at.click("#language")
    set_number(at, "top_p", "0.5")
    at.js("const set = JSON.parse(localStorage.getItem('tinyllm.settings')); set.top_p = 7;"
          "localStorage.setItem('tinyllm.settings', JSON.stringify(set))")  # fmt: skip
    at.driver.refresh()
    ready(at)
    say(at, "Hello")
    error = at.one(".error")
    assert error.text.startswith("Le serveur ne peut pas faire cela.\n")
    assert "top_p is 7" in error.text
    at.js("localStorage.removeItem('tinyllm.settings')")
    at.driver.refresh()
    ready(at)
    turns = running.server.turns
    turns.queue, was, turns.running = 0, turns.queue, turns.parallel
    try:
        at.js("document.querySelector('#new').click()")
        say(at, "Hello")
        assert at.one(".error").text.startswith("La file d’attente est pleine : trop de demandes à la fois.")
    finally:
        turns.queue, turns.running = was, 0
    set_number(at, "max_tokens", "4")
    at.click(".error button")
    done(at)
    assert not at.all(".error")
    try:
        at.cdp("Network.enable")
        conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        at.cdp("Network.emulateNetworkConditions", offline=True, **conditions)
        say(at, "Are you there?")
        assert at.one(".error").text.startswith("Le serveur ne répond pas.")
        assert len(at.all(".bubble")) == 2, "what was written is still there"
    finally:
        at.cdp("Network.emulateNetworkConditions", offline=False, **conditions)
    (line,) = at.errors()
    assert "ERR_INTERNET_DISCONNECTED" in line
    at.click(".error button")
    done(at)


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser) -> None:
    with serving({"stories": "stories"}, access=Access(key="open sesame")) as running:
        browser.driver.get(running.url)
        browser.until(lambda: "asks for an API key" in browser.one("#dialog").text)
        browser.press("wrong", "\n")
        browser.until(lambda: "does not accept" in browser.one("#dialog").text)
        browser.press("open sesame", "\n")
        ready(browser)
        set_number(browser, "max_tokens", "4")
        say(browser, "Once")
        done(browser)
        assert browser.js("return JSON.stringify(localStorage).includes('sesame')") is False
        browser.driver.refresh()
        ready(browser)
        assert browser.one(".whole .text").text.startswith("Once")
        browser.js("sessionStorage.clear()")
        browser.driver.refresh()
        browser.one("#dialog")
        browser.press("\ue00c")
        browser.until(lambda: "The server asks for an API key." in browser.one(".error").text)
        assert browser.errors() == []
