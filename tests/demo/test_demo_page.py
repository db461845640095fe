"""The demo's page without a browser: what it says, which model it opens, how it is served, the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from demo.visitors import Reader
from pipelines import CANDIDATES, picture, tiny_processor
from search.collections_of_noise import fill, tiny_pipeline
from tiny import tiny_vqa_model

from trips import cli, cli_demo
from trips.demo import page
from trips.demo.examples import write_examples
from trips.demo.models import Shown, open_shown
from trips.demo.page import find
from trips.demo.server import served
from trips.demo.uploads import open_photo
from trips.errors import CheckpointError, ConfigError
from trips.pipeline import TripsPipeline

QUESTION = "is the cat on the sofa?"
SETTINGS = {"guides": ("text", "image", "random"), "layers": (2, 3), "keep_rate": 0.5}


@pytest.fixture(scope="module")
def answering() -> TripsPipeline:
    return TripsPipeline(tiny_vqa_model(), tiny_processor(), CANDIDATES)


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    picture(3).save(path)
    return str(path)


def look(*arguments) -> page.Said:
    """What the page says at last."""
    return list(page.look(*arguments))[-1]


def test_the_page_says_what_was_found(answering, photo: str) -> None:
    shown = Shown("tiny", answering)
    said = look(shown, photo, QUESTION, 0.5, ["3", "2"], ["text", "random"])
    read = Reader(said.found)
    assert (
        said.keep_photo
        and not said.trouble
        and [tags["data-guide"] for tag, tags in read.tags if tag == "section"] == ["text", "random", "none"]
    )
    said = answering.ask(photo, QUESTION, 3)
    assert all(answer.text in read.text for answer in said) and f"{100 * said[0].probability:.1f} %" in read.text
    pictures = [tags for tag, tags in read.tags if tag == "img"]
    assert len(pictures) == 2 + 2 + 1 and all(tags["src"].startswith("data:image/jpeg;base64,") for tags in pictures)
    assert pictures[0]["alt"] == "Text guide, layer 2: 8 of 16 patches kept"
    assert len({tags["src"] for tags in pictures}) == 5
    for missing in (look(shown, None, QUESTION, 0.5, [], []), look(shown, photo, " ", 0.5, [], [])):
        assert missing.found and missing.keep_photo and not missing.trouble
    assert "Nothing is selected" in look(shown, photo, QUESTION, 0.5, None, None).found  # requests of other programs


def test_what_people_write_stays_text(answering, photo: str) -> None:
    html = look(Shown("tiny", answering), photo, '<img src=x onerror="alert(1)"> & <b>', 0.5, ["2"], ["text"]).found
    read = Reader(html)
    assert '<img src=x onerror="alert(1)"> & <b>' in read.text
    assert not any("onerror" in tags or tag == "b" for tag, tags in read.tags)


@pytest.mark.parametrize(
    ("text", "rate", "layers", "guides", "words"),
    [
        (QUESTION, 0.5, ["9"], ["text"], "layer"),
        (QUESTION, 7.0, ["2"], ["text"], "keep_rate"),
        (QUESTION, 0.5, ["2"], ["luck"], "luck"),
        ("a" * 501, 0.5, ["2"], ["text"], "too long"),
        (["a"], 0.5, ["2"], ["text"], "blank"),
    ],
)
def test_bad_requests_are_alerts(answering, photo: str, text, rate, layers, guides, words: str) -> None:
    said = look(Shown("tiny", answering), photo, text, rate, layers, guides)
    assert said.keep_photo and not said.found
    assert 'role="alert"' in said.trouble and words in Reader(said.trouble).text


def test_a_fault_of_ours_tells_visitors_nothing(answering, photo: str, monkeypatch, caplog) -> None:
    monkeypatch.setattr(answering, "ask", lambda *_, **__: 1 / 0)
    html = look(Shown("tiny", answering), photo, QUESTION, 0.5, ["2"], ["text"]).trouble
    assert 'role="alert"' in html and "division" not in html and "division by zero" in caplog.text


def test_scenes_to_begin_with_are_pictures_with_words(tmp_path: Path) -> None:
    questions, captions = (write_examples(tmp_path, questions=asks) for asks in (True, False))
    assert len(questions) == 6 and all(open_photo(path).size == (64, 64) for path, _ in questions)
    assert all(text for _, text in questions) and questions[0][1] != captions[0][1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models: "asks" answers, "finds" matches and has an index of 5 photos."""
    folder = tmp_path_factory.mktemp("models")
    for name, pipeline in (
        ("asks", TripsPipeline(tiny_vqa_model(), tiny_processor())),
        ("finds", tiny_pipeline()),
    ):
        pipeline.model.save_pretrained(folder / name)
        pipeline.processor.save_pretrained(folder / name)
    fill(folder / "photos", 5)
    cli.main(["index", str(folder / "photos"), f"--model={folder / 'finds'}", "--json"])
    return folder


def test_what_is_shown_is_what_was_named(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = saved / "photos"
    both = open_shown(saved / "asks", photos)  # the index is another model's
    assert both.pipeline.verbs == ("ask",) and len(both.index) == 5 and "index" in both.index.trained.verbs
    alone = open_shown(None, photos)
    assert alone.index.trained is alone.pipeline and alone.name == str(saved / "finds")
    with pytest.raises(CheckpointError, match="there is no model yet.*trips demo --train"):
        open_shown(quickstart=tmp_path / "quickstart")
    with pytest.raises(ConfigError, match="--train"):
        open_shown(saved / "asks", train=True)
    trained: list[tuple[Path, str]] = []

    def train(out: Path, *, scale: str) -> None:
        trained.append((out, scale))
        (out / "model").parent.mkdir(parents=True)
        (saved / "asks").rename(out / "model")

    monkeypatch.setattr("trips.quickstart.run_quickstart", train)
    for _ in range(2):  # the second time there is one
        assert open_shown(train=True, quickstart=tmp_path / "quickstart").pipeline.verbs == ("ask",)
    assert trained == [(tmp_path / "quickstart", "full")]
    (tmp_path / "quickstart" / "model").rename(saved / "asks")


def test_search_shows_the_hits_of_the_index(saved: Path) -> None:
    index = open_shown(None, saved / "photos").index
    read = Reader(find(index, "a red bus", 3).found)
    hits = index.search("a red bus", 3)
    assert str(index.source) not in read.text
    places = [read.text.index(Path(hit.path).name) for hit in hits]
    assert places == sorted(places) and f"{100 * hits[0].score:.1f} %" in read.text
    assert sum(tag == "img" for tag, _ in read.tags) == 6  # each as it is, and what the words keep
    for text, count, words in (("", 3, "blank"), ("a bus", 99, "photos to show"), ("a bus", 0, "photos to show")):
        assert words in Reader(find(index, text, count).trouble).text


def served_on(saved: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, use) -> tuple[int, str]:
    """`trips demo` with an interruption after `use` has had its address: exit code and address."""
    addresses: list[str] = []
    info = cli_demo.logger.info

    def note(message: str, *values: object) -> None:
        info(message, *values)
        addresses.append(str(values[0]))

    def wait() -> None:
        use(addresses[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_demo.logger, "info", note)
    monkeypatch.setattr(cli_demo, "wait", wait)
    return cli.main(["demo", *arguments]), addresses[0] if addresses else ""


def sent(url: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, str]:
    """Status and text of an answer to a request as a program may send it."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": kind})) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def assert_reads_uploads_alone(url: str, photo: str) -> None:
    """No file of the machine, and no address, is read because a request names it."""
    calls, kind = f"{url}gradio_api/call/look", {"meta": {"_type": "gradio.FileData"}}
    for upload in ({"path": photo}, {"path": photo, **kind}, {"path": __file__}):
        status, event = sent(calls, json.dumps({"data": [upload, QUESTION, 0.5, ["2"], ["text"]]}).encode())
        text = sent(f"{calls}/{json.loads(event)['event_id']}")[1]
        assert status == 200 and "<img" not in text and "readable" not in text and ".p" not in text
    for upload in ({"path": "http://198.51.100.1/a.png", **kind}, [{"a": {"path": "https://198.51.100.1/a"}}]):
        body = json.dumps({"data": [upload, QUESTION, 0.5, ["2"], ["text"]]}).encode()
        assert sent(calls, body)[0] == sent(calls, body, "multipart/form-data; boundary=x")[0] == 400
    assert sent(calls, json.dumps({"data": [None, "a" * 2**20, 0.5, ["2"], ["text"]]}).encode())[0] == 413
    assert sent(calls, b"[" * 10_000)[0] in (400, 422)


def test_trips_demo_serves_until_it_is_interrupted(
    saved: Path, photo: str, monkeypatch, capsys, tmp_path: Path
) -> None:
    client_library = pytest.importorskip("gradio_client")
    pytest.importorskip("gradio")
    (tmp_path / "text.png").write_bytes(b"no picture")

    def use(url: str) -> None:
        with urllib.request.urlopen(url) as answer:
            policy, page = answer.headers["content-security-policy"], answer.read().decode()
        assert "default-src 'self'" in policy and "http" not in policy
        assert sent(f"{url}monitoring")[0] == 403  # it would print to our output
        assert_reads_uploads_alone(url, photo)
        config = json.loads(urllib.request.urlopen(f"{url}config").read())
        assert config["analytics_enabled"] is False and not config["footer_links"]
        assert not re.search(r"<(script|link)[^>]*(src|href)=.https?:", page)
        client = client_library.Client(url, verbose=False, analytics_enabled=False)
        file = client_library.handle_file
        found: dict[str, str] = {}

        def ask(name: str, words: str) -> None:
            arguments = (file(photo), words, 0.5, ["2", "3"], ["text"])
            found[name] = client.predict(*arguments, api_name="/look")[2]

        threads = [threading.Thread(target=ask, args=one) for one in (("a", QUESTION), ("b", "what"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert QUESTION in Reader(found["a"]).text and QUESTION not in Reader(found["b"]).text
        bad = client.predict(file(str(tmp_path / "text.png")), "what", 0.5, ["2"], ["text"], api_name="/look")
        assert "text.png: not a readable image" in Reader(bad[1]).text
        with open(photo, "ab") as more:
            more.write(bytes(2**21))  # uploads may be larger than requests
        ask("c", QUESTION)  # and it still answers
        assert 'data-guide="text"' in found["c"]
        assert "trips-hit" in client.predict("a red bus", 2, api_name="/search")[1]

    arguments = [f"--model={saved / 'asks'}", f"--index={saved / 'photos'}", "--json"]
    code, url = served_on(saved, arguments, monkeypatch, use)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert json.loads(out) == {"url": url, "model": str(saved / "asks")}
    assert url.startswith("http://127.0.0.1:")
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=5)  # closed


def test_a_page_of_its_own_address_behind_a_proxy(answering, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        host, start = "::1", "http://[::1]:"
    except OSError:  # a machine without IPv6
        host, start = "127.0.0.2", "http://127.0.0.2:"
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with served(Shown("tiny", answering), host) as url:
        assert url.startswith(start) and sent(url)[0] == 200
        folder = Path(os.environ["GRADIO_TEMP_DIR"]).parent
        assert folder.stat().st_mode & 0o077 == 0  # other users of the machine stay outside
    assert not folder.exists() and "GRADIO_TEMP_DIR" not in os.environ and os.environ["no_proxy"] == "example.org"


def test_the_page_ends_when_the_process_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            signal.raise_signal(signal.SIGTERM)
            assert self.is_set()
            return True

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli_demo.threading, "Event", Told)
    cli_demo.wait()
    assert signal.getsignal(signal.SIGTERM) is before


def test_mistakes_of_the_command_line_are_one_line(saved: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    taken = socket.create_server(("127.0.0.1", 0))
    for arguments, words in (
        ([], "trips demo --train"),
        (
            [f"--model={saved / 'asks'}", f"--port={taken.getsockname()[1]}"],
            "cannot be listened on: Address already in",
        ),
        ([f"--model={tmp_path / 'none'}"], "none"),
        ([f"--model={saved / 'asks'}", "--port=99999"], "not a port"),
        (["--train", f"--model={saved / 'asks'}"], "--train: trains the quick-start's model"),
        ([f"--model={saved / 'asks'}", "--host=203.0.113.1", "--port=7999"], "203.0.113.1:7999: cannot be listened on"),
        ([f"--model={saved / 'asks'}", f"--index={tmp_path}"], "no image index"),
        ([f"--model={saved / 'asks'}", f"--host={'a' * 300}"], "cannot be listened on"),
    ):
        assert cli.main(["demo", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.splitlines()[-1].startswith("trips: ") and words in err
    taken.close()


def test_without_gradio_the_extra_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo", f"--model={saved / 'asks'}"]) == 2
    assert 'pip install "trips-vlm[demo]"' in capsys.readouterr().err
