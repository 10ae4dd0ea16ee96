"""Reports of runs in a real browser: what people see, and that nothing they were given ever runs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.batch.record import Record
from asyncmodels.batch.report import write_report
from asyncmodels.batch.sqlite_file import SQLiteFile
from asyncmodels.errors import ServerError
from asyncmodels.model import Model
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import ImagePart, Message, Request, Response, TextPart, ToolCall, Usage
from tests.batch.browser import CHROMIUM, Page, browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

START = 1.75e9
HOSTILE = [
    "<script>window.owned = 1</script>",
    "</script><script>window.owned = 1</script>",
    "<!-- <script> <!--",
    "]]></style></title></textarea></dialog><img src=x onerror='window.owned = 1'>",
    '"><svg onload="window.owned = 1">',
    "javascript:window.owned=1",
    "<a href='javascript:window.owned=1' autofocus onfocus='window.owned=1'>",
    "line\u2028and\u2029paragraph \u202e backwards \x00\x1b[31m",
    "${window.owned = 1} {{constructor.constructor('window.owned=1')()}}",
    "\\u003cscript\\u003ewindow.owned=1\\u003c/script\\u003e",
    "half of a character: \ud83d",
    "<iframe src='https://example.com/'></iframe><link rel=stylesheet href=//example.com/x.css>",
]


@pytest.fixture
async def page(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Page]:
    async with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


async def shown(page: Page, path: Path) -> None:
    """Opens a report, and returns when its table is there."""
    await page.open(path.as_uri())
    await page.until("document.querySelector('#found').textContent.endsWith('items')")


async def found(page: Page, **values: str) -> str:
    """Fills in the fields of the search; what is said to be found once all was looked through."""
    for name, value in values.items():
        await page.run(
            f"{{ const field = document.querySelector('#{name}'); field.value = {json.dumps(value)};"
            " field.dispatchEvent(new Event(field.matches('input') ? 'input' : 'change')); }"
        )
    await page.until("!document.querySelector('#found').textContent.includes('…')")
    await page.run("new Promise(requestAnimationFrame)")
    return str(await page.run("document.querySelector('#found').textContent"))


async def cells(page: Page, number: int) -> list[str]:
    """What the rows that can be seen say in a column, from top to bottom."""
    await page.until("![...document.querySelectorAll('.row')].some(row => row.children[1].textContent === '…')")
    rows: list[str] = await page.run(
        "[...document.querySelectorAll('.row')].sort((a, b) => a.ariaRowIndex - b.ariaRowIndex)"
        f".map(row => row.children[{number}].textContent)"
    )
    return rows


def rows_of(path: Path, count: int) -> Path:
    """A journal of so many items: every tenth has failed, number 7 of each hundred says "needle"."""
    file = SQLiteFile(path)
    file.settle({"who": {"model": "m"}, "created": START})
    plain: dict[str, Any] = dict.fromkeys(Record._fields)
    plain.update(attempts=1, cached=False, key="k", finish_reason="stop", input_tokens=3)
    for start in range(0, count, 5000):
        records = []
        for number in range(start, min(start + 5000, count)):
            failed = number % 10 == 9
            kind = "RateLimitError" if number % 20 == 9 else "ServerError"
            words = f"Needle {number} in the hay" if number % 100 == 7 else f"straw {number}"
            given = {
                "id": f"id-{number}",
                "place": number,
                "question": json.dumps({"messages": [{"role": "user", "content": words}]}),
                "answer": None if failed else json.dumps({"content": f"answer to {number}"}),
                "error": kind if failed else None,
                "error_text": f"it failed {number}" if failed else None,
                "finish_reason": None if failed else "stop",
                "began": START + number / 1000,
                "seconds": 1 + number * 7919 % count / count,
                "output_tokens": None if failed else number % 50,
            }
            records.append(Record(**{**plain, **given}))
        file.write(records, [])
    file.close()
    return path


# -- nothing runs -----------------------------------------------------------------------------------------------------


class OddError(ServerError):
    """An error with a name that no class has."""


OddError.__name__ = "<img src=x onerror=window.owned=1>"


async def test_what_prompts_and_answers_say_never_runs(page: Page, tmp_path: Path) -> None:
    """It is shown as what it is, wherever it stands: ids, prompts, answers, calls, errors and their kinds, names."""

    def answer(request: Request) -> Response:
        text = request.messages[-1].text
        if request.messages[0].text == "fail":
            raise OddError(text)
        calls = (ToolCall("1", text, json.dumps({"x": text})),)
        return Response(content=text, reasoning=text, tool_calls=calls, finish_reason="stop", model=text)

    inputs = [
        {"id": f"{kind} {text}", "messages": [Message("system", kind), Message("user", text)], "agent": text}
        for text in HOSTILE
        for kind in ("ask", "fail")
    ]
    path = tmp_path / "<img src=x onerror=window.owned=1>.sqlite"
    model = Model(ScriptedBackend(answer, repeat=True), model_id="</title><script>window.owned=1</script>")
    await model.map(inputs, journal=path).results()
    await shown(page, write_report(path, tmp_path / "page.html").path)
    assert await cells(page, 0) == [str(number) for number in range(len(inputs))]
    for number in range(len(inputs)):
        await page.run(f"document.querySelector('#row-{number}').click()")
        await page.until(f"document.querySelector('dialog h2')?.textContent === {await title(page, number)}")
        said = await page.run("[...document.querySelectorAll('dialog pre')].map(each => each.textContent)")
        asked = HOSTILE[number // 2].replace("\ud83d", "\ufffd")
        assert asked in [text.replace("\ud83d", "\ufffd") for text in said]
        assert len(said) == (3 if number % 2 else 5)
        await page.run("document.querySelector('dialog').close()")
    assert await page.run("document.querySelectorAll('img, iframe, link, a:not(.skip), [onerror]').length") == 0
    assert await found(page, query="<SCRIPT>") == "6 of 24 items"
    assert await page.run("typeof window.owned") == "undefined"
    assert await page.run("document.scripts.length") == 4
    assert (page.problems(), page.requests()) == ([], [])


async def title(page: Page, number: int) -> str:
    return json.dumps((await cells(page, 1))[number])


async def test_the_policy_holds(page: Page, tmp_path: Path) -> None:
    """Even a script that got into the page would not run, nor load anything, nor make elements of a text."""
    await shown(page, write_report(rows_of(tmp_path / "run.sqlite", 3)).path)
    await page.run(
        "{ const script = document.createElement('script'); try { script.textContent = 'window.owned = 1' } catch {}"
        " document.body.append(script); const image = new Image(); image.src = 'https://example.com/x.png';"
        " document.body.append(image); image.setAttribute('style', 'color: red') }"
    )
    with pytest.raises(AssertionError, match="TrustedHTML"):
        await page.run("document.body.innerHTML = '<p>'")
    with pytest.raises(AssertionError, match="Failed to fetch"):
        await page.run("fetch('https://example.com/')")
    assert await page.run("typeof window.owned") == "undefined"
    assert len([problem for problem in page.problems() if "Content Security Policy" in problem]) >= 3


# -- the table --------------------------------------------------------------------------------------------------------


async def test_a_hundred_thousand_rows(page: Page, tmp_path: Path) -> None:
    """However far it is scrolled there are few rows in the document, and they are the right ones."""
    path = write_report(rows_of(tmp_path / "run.sqlite", 100_000)).path
    await shown(page, path)
    assert await page.run("document.querySelector('#found').textContent") == "100,000 items"
    most = await page.run(
        "new Promise(done => { const grid = document.querySelector('#grid'); let most = 0, turn = 0;"
        " const step = () => { most = Math.max(most, document.querySelectorAll('.row').length);"
        " grid.scrollTop = turn * 7919 % 34e5; ++turn < 60 ? requestAnimationFrame(step) : done(most) }; step() })"
    )
    assert 10 < most <= 60
    await page.run("document.querySelector('#grid').scrollTop = 1e9; new Promise(requestAnimationFrame)")
    await page.until("document.querySelector('#row-99999')?.children[1].textContent === 'id-99999'")
    assert (await cells(page, 0))[-1] == "99,999"
    # Frames are drawn while all of it is searched, and what was found is shown before the end.
    frames = await page.run(
        "new Promise(done => { let frames = 0; const field = document.querySelector('#query'); field.value = 'needle';"
        " field.dispatchEvent(new Event('input')); const look = () => { frames++;"
        " document.querySelector('#found').textContent.includes('searching') ? requestAnimationFrame(look)"
        " : done(frames) }; requestAnimationFrame(look) })"
    )
    assert frames > 3
    assert await page.run("document.querySelector('#found').textContent") == "1,000 of 100,000 items"
    assert (page.problems(), page.requests()) == ([], [])


async def test_search_filters_and_order(page: Page, tmp_path: Path) -> None:
    """They go together; what is typed while it is searched counts, and what is cleared is all there again."""
    await shown(page, write_report(rows_of(tmp_path / "run.sqlite", 3000)).path)
    assert await found(page, query="needle") == "30 of 3,000 items"
    assert (await cells(page, 3))[0] == "Needle 7 in the hay"
    assert await page.run("document.querySelector('.row mark').textContent") == "Needle"
    assert await found(page, where="answer") == "0 of 3,000 items"
    assert await page.run("document.querySelector('#empty').checkVisibility()")
    assert await found(page, query="to 12", where="answer") == "100 of 3,000 items"
    assert await found(page, query="id-12", where="id") == "111 of 3,000 items"
    assert await found(page, query="", where="", outcome="bad") == "300 of 3,000 items"
    options = await page.run("[...document.querySelector('#outcome').options].map(each => each.text)")
    assert options[1:] == ["answered (2,700)", "failed (300)", "RateLimitError (150)", "ServerError (150)"]
    assert await found(page, outcome="1", query="FAILED 29") == "6 of 3,000 items"
    assert await cells(page, 1) == ["id-29", "id-2909", "id-2929", "id-2949", "id-2969", "id-2989"]
    assert await found(page, outcome="ok", query="") == "2,700 of 3,000 items"
    assert await found(page, finish="1", outcome="") == "2,700 of 3,000 items"
    await found(page, finish="")
    await page.run("document.querySelector('[data-sort=output]').click()")
    assert (await cells(page, 7))[:2] == ["48", "48"]  # those of 49 tokens have failed
    await page.run("document.querySelector('[data-sort=output]').click()")
    assert (await cells(page, 0))[:3] == ["0", "50", "100"]
    assert await page.run("document.querySelector('[aria-sort=ascending]').textContent") == "out"
    await page.run("document.querySelector('#grid').scrollTop = 1e9; new Promise(requestAnimationFrame)")
    assert (await cells(page, 7))[-1] == ""  # what nobody said comes last
    await page.run(
        "['n', 'ne', 'needle 2', 'needle 20'].forEach(text => { const field = document.querySelector('#query');"
        " field.value = text; field.dispatchEvent(new Event('input')) })"
    )
    assert await found(page) == "2 of 3,000 items"


async def test_errors_lead_to_their_items(page: Page, tmp_path: Path) -> None:
    """The kind of an error shows its items, and an example is opened."""
    await shown(page, write_report(rows_of(tmp_path / "run.sqlite", 1000)).path)
    await page.run("document.querySelector('[data-error=ServerError]').click()")
    assert await found(page) == "50 of 1,000 items"
    await page.run("document.querySelector('button[data-place=\"9\"]').click()")
    await page.until("document.querySelector('dialog').open")
    assert await page.run("document.querySelector('dialog h2').textContent") == "id-9"
    assert await page.run("document.querySelector('dialog .said.bad').textContent") == "RateLimitErrorit failed 9"


async def test_with_the_keyboard_alone(page: Page, tmp_path: Path) -> None:
    """A key leads to the search, the arrows go through the rows, Enter opens one, Escape leads back."""
    await shown(page, write_report(rows_of(tmp_path / "run.sqlite", 1000)).path)
    await page.press("/")
    await page.write("needle")
    assert await found(page) == "10 of 1,000 items"
    await page.run("document.querySelector('#grid').focus()")
    for key in ("End", "Home", "ArrowDown", "ArrowDown"):
        await page.press(key)
    await page.until("document.querySelector('#grid').getAttribute('aria-activedescendant') === 'row-2'")
    assert await page.run("document.querySelector('.row.active').children[1].textContent") == "id-207"
    await page.press("Enter")
    await page.until("document.querySelector('dialog').open")
    await page.press("ArrowRight")
    await page.until("document.querySelector('dialog h2').textContent === 'id-307'")
    await page.press("Escape")
    await page.until("!document.querySelector('dialog').open")
    assert await page.run("document.activeElement.id") == "grid"
    assert await page.run("document.querySelector('.row.active').children[1].textContent") == "id-307"


async def test_everything_that_an_item_has(page: Page, tmp_path: Path) -> None:
    """Images as what they are, calls, reasoning, parameters, usage; a very long answer with what was cut."""
    picture = b"\x89PNG\r\n\x1a\n" + bytes(64)
    answers = [
        Response(
            content="A cat.",
            reasoning="It has ears.",
            tool_calls=(ToolCall("c1", "look", '{"at": "cat"}'),),
            finish_reason="tool_calls",
            usage=Usage(1200, 34, 1000, 12),
            attempts=3,
        ),
        Response(content="word " * 200_000, finish_reason="length"),
    ]
    parts = (TextPart("What is this?"), ImagePart(data=picture, media_type="image/png"))
    shown_earlier = ImagePart(url="https://example.com/cat.png")
    inputs = [
        {"messages": [Message("user", (shown_earlier,)), Message("assistant", "Yes."), Message("user", parts)]},
        {"prompt": "long", "temperature": 0.5},
    ]
    path = tmp_path / "run.jsonl"
    await Model(ScriptedBackend(*answers), model_id="m").map(inputs, journal=path, concurrency=1).results()
    await shown(page, write_report(path).path)
    await page.run("document.querySelector('#row-0').click()")
    await page.until("document.querySelector('dialog').open")
    said = await page.run("document.querySelector('dialog').innerText")
    for part in (
        "[image, https://example.com/cat.png]",
        "What is this?",
        "[image/png, sha256 ",
        "It has ears.",
        "A cat.",
    ):
        assert part in said
    assert 'look({"at": "cat"})' in said
    told = await page.run(
        "[...document.querySelectorAll('.told div')].map(each => each.innerText.replace('\\n', ': '))"
    )
    for part in ("Tokens in: 1,200", "of them cached: 1000", "of them reasoning: 12", "Attempts: 3"):
        assert part in told
    await page.press("ArrowRight")
    await page.until("document.querySelector('dialog h2').textContent === '1'")
    said = await page.run("document.querySelector('dialog').textContent")
    assert '"temperature": 0.5' in said
    assert said.endswith("more characters in the journal)")
    assert len(said) < 60_000
    assert (page.problems(), page.requests()) == ([], [])


async def test_light_dark_and_print(page: Page, tmp_path: Path) -> None:
    """It follows the colours that people have chosen, fits into a narrow window, and goes to paper."""
    await shown(page, write_report(rows_of(tmp_path / "run.sqlite", 500)).path)
    colours = []
    for dark in (False, True):
        await page.look(dark=dark)
        colours.append(await page.run("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(244, 245, 247)", "rgb(14, 17, 22)"]
    await page.size(390, 800)
    assert await page.run("document.documentElement.scrollWidth") <= 390
    await page.look(media="print")
    assert (await page.pdf()).startswith(b"%PDF")
    assert not await page.run("document.querySelector('.tools').checkVisibility()")
    assert page.problems() == []


async def test_charts_tell_what_they_show(page: Page, tmp_path: Path) -> None:
    """Each has a sentence for those who do not see it, and says what lies under the pointer."""
    await shown(page, write_report(rows_of(tmp_path / "run.sqlite", 500)).path)
    said = await page.run("[...document.querySelectorAll('svg')].map(each => each.getAttribute('aria-label'))")
    assert [text.partition(".")[0] for text in said] == ["Latency", "Throughput", "In flight and limit", "Tokens"]
    place = await page.run(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        "(document.querySelectorAll('svg')[1].querySelectorAll('.hit')[5].getBoundingClientRect())"
    )
    await page.send("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    await page.until("getComputedStyle(document.querySelector('#tip')).display === 'block'")
    assert "per second" in await page.run("document.querySelector('#tip').textContent")
