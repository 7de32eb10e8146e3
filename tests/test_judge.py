"""The judge: what is asked, what is accepted, what is given up, and that nothing of a server's gets out."""

import json
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers.reviews import FAILED, make_task, play, target
from helpers.runs import hears_signals

from nanotoolrl import judge as judging
from nanotoolrl.calls import Call, parse_calls
from nanotoolrl.judge import Judge, JudgeError
from nanotoolrl.supervise import MISTAKES, reflections
from nanotoolrl.world.tasks import load_tasks

ROOT = Path(__file__).resolve().parent.parent
TASK = make_task()


def judged(**changes):
    """A good answer for `FAILED` as a dict, with keys changed."""
    turns = [
        {
            "intent": f"wish {i}",
            "mistake": "wrong argument" if i == 0 else "",
            "evidence": "it closed 34",
            "calls": [{"name": call.name, "arguments": call.arguments} for call in turn.calls],
        }
        for i, turn in enumerate(TASK.turns)
    ]
    return {"turns": turns, "cause": "it guessed", "fix": "look first"} | changes


def with_turn(i, **changes):
    answer = judged()
    answer["turns"][i] |= changes
    return answer


GOOD = json.dumps(judged())


def completion(content):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


class Stub:
    """A chat completions server that answers with the scripted (status, content), then the last."""

    def __init__(self, script):
        self.script, self.requests = list(script), []
        self.asked, self.released = threading.Semaphore(0), threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append((self.path, dict(self.headers), body))
                stub.asked.release()
                stub.answer(self)

            def do_GET(self):
                stub.requests.append((self.path, dict(self.headers), None))
                self.send_error(404)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args):
                pass  # whoever asked has left

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        serve = {"target": self.server.serve_forever, "kwargs": {"poll_interval": 0.01}}
        threading.Thread(**serve, daemon=True).start()

    def answer(self, handler):
        status, content = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if status == "hang":
            self.released.wait(60)
        elif status == "drop":
            handler.connection.close()
        elif status == "bytes":
            handler.wfile.write(content)
        elif status == "drip":  # for a few seconds, so that a test ends where it should fail
            head, pad, tail = content
            handler.wfile.write(head)
            for _ in range(300):
                if not self.released.wait(0.02):
                    handler.wfile.write(pad)
            handler.wfile.write(tail)
        else:
            raw = content if status in ("raw", "short") else completion(content)
            handler.send_response(status if isinstance(status, int) else 200)
            if status == 302:
                handler.send_header("Location", "/elsewhere")
            handler.send_header("Content-Length", str(len(raw)))
            handler.end_headers()
            handler.wfile.write(raw[:-9] if status == "short" else raw)

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def a_run_begins(monkeypatch):
    monkeypatch.setattr(judging, "BACK_OFF", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judging._said.clear()


@pytest.fixture
def serve():
    stubs = []

    def start(*script):
        stubs.append(Stub(script))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.close()


@pytest.fixture(scope="module")
def ask(policy):
    train = load_tasks("train")

    def reflect(judge):
        row = play(policy.chat, TASK, FAILED)
        return reflections(TASK, row, policy.chat, train, 4096, judge)

    return reflect


def verdict(url, **settings):
    return Judge(url, **settings)(TASK, "hermes", 0, "log")


# ------------------------------------------------------------------------------------------------ the request
def test_a_good_answer_is_used(ask, policy, serve):
    stub = serve((200, GOOD))
    pairs, fallback = ask(Judge(stub.url + "/", model="wise"))
    assert not fallback and len(stub.requests) == 1
    path, headers, body = stub.requests[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert (body["model"], body["temperature"]) == ("wise", 0)
    system, user = (message["content"] for message in body["messages"])
    assert all(mistake in system for mistake in MISTAKES) and "about turn 1." in system
    assert 'turn 1 tool: "closed"' in user and "turn 3: open_ticket with" in user
    assert target(policy.chat, pairs[0]).startswith(
        "turn 1\nintent: wish 0\nmistake: wrong argument\nevidence: it closed 34"
    )
    error_text = target(policy.chat, pairs[1])
    assert "cause: it guessed\nevidence: it closed 34\nfix: look first\n" in error_text
    own, _ = ask(None)
    assert error_text.endswith(target(policy.chat, own[1]).partition("similar 1")[2])


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("", "/chat/completions"),
        ("/", "/chat/completions"),
        ("?api-version=1", "/chat/completions?api-version=1"),
        ("/v1", "/v1/chat/completions"),
        ("/v1//", "/v1/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1?api-version=1", "/v1/chat/completions?api-version=1"),
        ("/v1/?api-version=1", "/v1/chat/completions?api-version=1"),
        ("/a/chat/completions?api-version=1&b=%20", "/a/chat/completions?api-version=1&b=%20"),
    ],
)
def test_every_form_of_the_address(serve, given, asked):
    stub = serve((200, GOOD))
    assert verdict(stub.url.removesuffix("/v1") + given)
    assert [path for path, _, _ in stub.requests] == [asked]


@pytest.mark.parametrize(
    "url",
    [
        *"ftp://x file:///etc /v1 x:80 http: http:// http:///x http://:80/v1 https://?a=b HTTP://".split(),
        *"http://host:99999 http://host:0 http://host:x http://[::1 http://[::1]x/ http://a..b".split(),
        *(
            "",
            "http://a b/",
            "http://a/b c",
            "http://a/\n",
            "\thttp://a",
            "http://a/\x00",
            "http://a\r\nX: y",
        ),
        *("http://h\xe4/v1", "http://a/\u20ac", "http://a%0d%0ab/", "http://a\\b", "http://a/v1#KEY"),
        *("http://" + "a" * 64, "http://a/v1?KEY", "http://user:KEY@[::1", "user:KEY@host/v1"),
    ],
)
def test_a_bad_address_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="a judge needs an address such as http") as refused:
        Judge(url)
    assert "KEY" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        *"http://KEY@host/v1 http://user:KEY@host/v1 https://user:KEY@host:99999".split(),
        *(
            f"http://host/v1?api-version=1&{name}=KEY"
            for name in "key api_key apikey Api-Key api%5Fkey".split()
        ),
        *(
            f"http://host/v1?{name}=KEY"
            for name in "token access_token sig secret password auth code".split()
        ),
    ],
)
def test_a_key_in_the_address_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as refused:
        Judge(url)
    assert "KEY" not in str(refused.value).replace("OPENAI_API_KEY", "")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_bad_timeout_is_a_fallback(serve, timeout):
    assert verdict(serve(("hang", "")).url, timeout=timeout) is None


def test_a_proxy_is_used(serve, monkeypatch):
    stub = serve((200, GOOD))
    monkeypatch.setenv("http_proxy", stub.url)
    assert verdict("http://judge.invalid/v1")
    assert stub.requests[0][0] == "http://judge.invalid/v1/chat/completions"


def test_the_key_is_sent_and_shown_nowhere(ask, policy, serve, monkeypatch, capfd, caplog):
    caplog.set_level("DEBUG")
    echo = b"HTTP/1.1 500 sk-hidden\r\nContent-Length: 9\r\n\r\nsk-hidden"
    answers = (
        (500, ""),
        ("bytes", echo),
        ("bytes", b"sk-hidden\r\n"),
        ("raw", b"sk-hidden"),
        (200, "sk-hidden"),
    )
    cases = [("sk-hidden", answer, 4) for answer in answers]
    cases += [
        ("sk-hidden\nX: y", (500, ""), 0),
        ("sk-hidden\u20ac", (500, ""), 0),
        ("sk-hidden ", (500, ""), 0),
    ]
    for key, answer, sent in cases:
        judging._said.clear()
        monkeypatch.setenv("OPENAI_API_KEY", key)
        stub = serve(answer)
        judge = Judge(stub.url)
        pairs, fallback = ask(judge)
        assert fallback and len(stub.requests) == sent
        assert all(headers["Authorization"] == f"Bearer {key}" for _, headers, _ in stub.requests)
        assert "sk-hidden" not in repr(judge) + repr(vars(judge)) + repr([r[2] for r in stub.requests])
        assert all("sk-hidden" not in policy.chat.decode(pair.tokens) for pair in pairs)
        said = "".join(capfd.readouterr())
        assert said.count("judge: ") == 1 and "sk-hidden" not in said + caplog.text
        assert sent or "OPENAI_API_KEY" in said


def test_a_redirect_is_not_followed(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden")
    stub = serve((302, GOOD))
    assert verdict(stub.url) is None
    assert [path for path, _, _ in stub.requests] == ["/v1/chat/completions"]


# ------------------------------------------------------------------------------------- failures of the server
@pytest.mark.parametrize("status", [301, 302, 307, 400, 401, 403, 404, 405, 410, 422, 451, 499])
def test_what_would_come_again_is_not_asked_again(serve, status, capsys):
    stub = serve((status, GOOD))
    assert verdict(stub.url) is None and len(stub.requests) == 1
    assert f"{stub.url}/chat/completions answered {status}" in capsys.readouterr().err


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 501, 503, 599, "drop"])
def test_what_may_pass_is_asked_again(serve, status):
    stub = serve((status, ""), (status, ""), (status, ""), (200, GOOD))
    assert verdict(stub.url).cause == "it guessed" and len(stub.requests) == 4
    stub = serve((status, ""))
    assert verdict(stub.url) is None and len(stub.requests) == 4


def test_a_failing_server_gets_another_chance(ask, policy, serve):
    stub = serve((500, ""), (503, ""), (200, "not now"), (200, GOOD))
    pairs, fallback = ask(Judge(stub.url))
    assert not fallback and len(stub.requests) == 4
    assert "intent: wish 0" in target(policy.chat, pairs[0])


def test_a_failure_that_lasts_is_a_fallback_even_after_one_that_passes(serve):
    stub = serve((500, ""), (404, ""), (200, GOOD))
    assert verdict(stub.url) is None and len(stub.requests) == 2


def test_pauses_between_requests(serve, monkeypatch):
    pauses = []

    def noted(futures, timeout, *until):
        if len(futures) == 2:
            return waiting(futures, timeout, *until)
        return pauses.append(timeout)

    waiting = judging.wait
    monkeypatch.setattr(judging, "BACK_OFF", (1.0, 2.0, 4.0))
    monkeypatch.setattr(judging, "wait", noted)
    assert verdict(serve((500, "")).url) is None
    assert pauses == [1.0, 2.0, 4.0]


def test_nobody_listens(serve, ask):
    stub = serve((200, ""))
    stub.close()
    pairs, fallback = ask(Judge(stub.url))
    assert fallback and pairs == ask(None)[0]
    assert verdict("http://no-such-host.invalid/") is None
    assert verdict(serve((200, GOOD)).url.replace("http:", "https:")) is None


SLOW = {
    "silent": ("hang", ""),
    "drips its status": ("drip", (b"HTTP/1.0 ", b"2", b" OK\r\n\r\n" + completion(GOOD))),
    "drips its headers": ("drip", (b"HTTP/1.0 200 OK\r\nX: ", b"x", b"\r\n\r\n" + completion(GOOD))),
    "drips its body": ("drip", (b"HTTP/1.0 200 OK\r\n\r\n", b" ", completion(GOOD))),
    "drips chunks": (
        "drip",
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"1\r\n \r\n",
            b"%x\r\n%s\r\n0\r\n\r\n" % (len(completion(GOOD)), completion(GOOD)),
        ),
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_the_whole_answer_must_come_in_time(serve, name, monkeypatch, capsys):
    sent, fetch = [], judging._Exchange.fetch
    monkeypatch.setattr(judging._Exchange, "fetch", lambda *what: (sent.append(what), fetch(*what))[1])
    assert verdict(serve(SLOW[name]).url, timeout=0.2) is None
    assert len(sent) == 4
    assert "not complete after 0.2 s" in capsys.readouterr().err


def test_the_socket_may_be_the_first_to_lose_patience(serve, monkeypatch, capsys):
    waiting = judging.wait
    monkeypatch.setattr(judging, "wait", lambda these, seconds, *when: waiting(these, 100 * seconds, *when))
    monkeypatch.setattr(judging, "BACK_OFF", ())
    assert verdict(serve(SLOW["silent"]).url, timeout=0.2) is None
    assert "not complete after 0.2 s" in capsys.readouterr().err


def test_a_name_server_that_does_not_answer(serve, monkeypatch):
    found, looked_up = threading.Event(), socket.getaddrinfo
    stub = serve((200, GOOD))

    def slow(*args, **settings):
        found.wait(60)
        return looked_up(*args, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", slow)
        assert verdict(stub.url, timeout=0.05) is None
        found.set()
    assert verdict(stub.url) and len(stub.requests) == 1, "a request that was left is not sent any more"


# -------------------------------------------------------------------------------------------- what it says
def test_a_run_has_one_line_about_each_kind_of_failure(serve, capsys):
    down, useless = serve((404, "")), serve((200, "{}"))
    with ThreadPoolExecutor(8) as threads:
        assert not any(threads.map(verdict, [down.url + "?api-version=7", useless.url] * 20))
    lines = sorted(capsys.readouterr().err.splitlines())
    assert len(lines) == 2
    assert lines[0].startswith("judge: an answer cannot be used: ValueError('no JSON object with turns')")
    assert lines[1].startswith(f"judge: {down.url}/chat/completions answered 404 Not Found (said once")
    Judge(serve((200, "yes")).url).check()
    assert verdict(down.url) is None
    assert len(capsys.readouterr().err.splitlines()) == 1, "another run"


def test_a_sound_judge_is_silent(serve, capfd):
    judge = Judge(serve((200, GOOD)).url)
    judge.check()
    assert judge(TASK, "hermes", 0, "log")
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(
    ("answer", "said", "requests"),
    [
        ((404, ""), "answered 404 Not Found", 1),
        ((401, ""), "answered 401 Unauthorized", 1),
        ((302, ""), "answered 302 Found", 1),
        ((429, ""), "answered 429 Too Many Requests", 4),
        ((503, ""), "answered 503 Service Unavailable", 4),
        (("raw", b"<html>Welcome</html>"), "JSONDecodeError", 4),
        (("raw", b'{"object": "list", "data": []}'), "KeyError", 4),
        ((200, None), "TypeError", 4),
        (("bytes", b"SSH-2.0-OpenSSH_9.6\r\n"), "BadStatusLine", 4),
        (("drop", ""), "RemoteDisconnected|reset", 4),
    ],
)
def test_a_judge_that_cannot_be_used_fails_the_check(serve, answer, said, requests):
    stub = serve(answer)
    with pytest.raises(JudgeError, match=said) as failed:
        Judge(stub.url + "?api-version=7").check()
    assert f"{stub.url}/chat/completions" in str(failed.value) and "api-version" not in str(failed.value)
    assert len(stub.requests) == requests


def test_the_check_is_one_small_request(serve):
    stub = serve((503, ""), (200, ""))
    Judge(stub.url, model="wise").check()
    assert len(stub.requests) == 2 and stub.requests[1][2]["model"] == "wise"
    assert len(json.dumps(stub.requests[1][2])) < 200
    stub.close()
    with pytest.raises(JudgeError, match=f"{stub.url}/chat/completions: Connection refused"):
        Judge(stub.url).check()


# ------------------------------------------------------------------------------------------ giving up at once
@pytest.mark.parametrize("answer", [(500, ""), ("hang", "")], ids=["in a pause", "in a request"])
def test_a_closed_judge_gives_up_and_asks_no_more(serve, monkeypatch, capsys, answer):
    stub, failed = serve(answer), threading.Semaphore(0)
    judge, waiting = Judge(stub.url, timeout=600), stub.asked if answer[0] == "hang" else failed
    monkeypatch.setattr(judging, "BACK_OFF", (600,) * 3)
    monkeypatch.setattr(Judge, "_say", lambda *_: failed.release())
    with ThreadPoolExecutor(1) as threads:
        review = threads.submit(judge, TASK, "hermes", 0, "log")
        assert waiting.acquire(timeout=60)
        judge.close()
        judge.close()
        assert review.result(60) is None
    monkeypatch.undo()
    assert judge(TASK, "hermes", 0, "log") is None and len(stub.requests) == 1
    assert capsys.readouterr().err == "", "who gave up needs no reason"


INTERRUPTED = """
import signal, sys
from types import SimpleNamespace
from nanotoolrl import judge, signals
judge.BACK_OFF = (600,) * 3
signals.ets = lambda *_: ([], {})
signals.collected_failures = lambda *_: range(40)
signals.reflections = lambda task, row, chat, others, context, judge: judge(task, "hermes", 0, "log")
config = SimpleNamespace(judge=sys.argv[1], judge_model="m", judge_timeout=600.0, group=1)
run = SimpleNamespace(
    config=config, policy=SimpleNamespace(chat=None), tasks=[], sampler=SimpleNamespace(context=9)
)
try:
    signals.prs(run, [None] * 40, [SimpleNamespace(reward=0)] * 40)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_a_judge(serve):
    """The server never answers half of the requests, and half of them wait for another chance."""
    stub = serve(*[("hang", ""), (500, "")] * 4, ("hang", ""))
    command = [sys.executable, "-c", INTERRUPTED, stub.url]
    pipes = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=hears_signals, **pipes) as process:
        try:
            for _ in range(judging.AT_ONCE):
                assert stub.asked.acquire(timeout=120)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said and len(stub.requests) == judging.AT_ONCE


# ----------------------------------------------------------------------------------------- the answer is data
CALLS = judged()["turns"][0]["calls"]
UNUSABLE = {
    "short body": ("short", completion(GOOD)),
    "body is no JSON": ("raw", b"\xff{"),
    "body is a list": ("raw", b"[]"),
    "body is endless": ("raw", b" " * 2_000_000 + completion(GOOD)),
    "body without choices": ("raw", b'{"choices": []}'),
    "body nested too deeply": ("raw", b"[" * 200_000),
    "body is a huge number": ("raw", b"9" * 10_000),
    "no content": (200, None),
    "content is a number": (200, 5),
    "content is too long": (200, " " * 1_000_000 + GOOD),
    "empty content": (200, ""),
    "content is no JSON": (200, "{the user wanted}"),
    "content nested too deeply": (200, '{"turns": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "braces and nothing else": (200, "{" * 900_000),
    "objects that never end": (200, '{"a":' * 180_000),
    "keys that never end": (200, '{"' * 450_000),
    "a list": (200, "[1, 2]"),
    "no turns": (200, json.dumps({"cause": "", "fix": ""})),
    "turns is a number": (200, json.dumps(judged(turns=3))),
    "turns is a text": (200, json.dumps(judged(turns="abc"))),
    "too few turns": (200, json.dumps(judged(turns=judged()["turns"][:2]))),
    "too many turns": (200, json.dumps(judged(turns=judged()["turns"] * 2))),
    "cause is a list": (200, json.dumps(judged(cause=["x"]))),
    "no fix": (200, json.dumps({"turns": judged()["turns"], "cause": "x"})),
    "long fix": (200, json.dumps(judged(fix="x" * 601))),
    "unknown mistake": (200, json.dumps(with_turn(0, mistake="laziness"))),
    "no mistake in the error turn": (200, json.dumps(with_turn(0, mistake=""))),
    "long intent": (200, json.dumps(with_turn(1, intent="x" * 601))),
    "calls is an object": (200, json.dumps(with_turn(1, calls={}))),
    "calls are texts": (200, json.dumps(with_turn(0, calls=["find_tickets"]))),
    "a call without a name": (200, json.dumps(with_turn(0, calls=[{"arguments": {}}]))),
    "arguments are a list": (
        200,
        json.dumps(with_turn(0, calls=[{"name": "find_tickets", "arguments": []}])),
    ),
    "not a number": (
        200,
        json.dumps(with_turn(0, calls=[CALLS[0], {"name": "x", "arguments": {"y": 1e999}}])),
    ),
    "calls that fail": (200, json.dumps(with_turn(0, calls=CALLS[:1]))),
    "a refused call": (200, json.dumps(with_turn(0, calls=[{"name": "shut"}, *CALLS]))),
    "a call where it should ask": (200, json.dumps(with_turn(1, calls=CALLS[:1]))),
    "endless calls": (200, json.dumps(with_turn(0, calls=[*CALLS[:1] * 50, *CALLS]))),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_judge_is_asked_four_times_and_then_replaced(ask, serve, name):
    stub = serve(UNUSABLE[name])
    pairs, fallback = ask(Judge(stub.url))
    assert fallback and len(stub.requests) == 4
    assert pairs == ask(None)[0]


@pytest.mark.parametrize(
    "content",
    [
        f"Here it is:\n```json\n{GOOD}\n```",
        f"The user wants {{something}}. {GOOD} I put {{x}} and }} there.",
        f'{{"draft": 1}} {{"name": "find_tickets", "arguments": {{}}}} then {GOOD} and {{"turns": 3}}',
        f'In {{" a name begins; {{"a": [1, 2 does not end; {{"b": "{GOOD}',
        f"<think>\\boxed{{4}} {{ {{ {{</think>{json.dumps(judged(), indent=3)}",
        f"{{\n {GOOD[1:]}",
        f"{GOOD}{GOOD}",
        f'{{"review": {GOOD}}}',
        "{" * 900_000 + GOOD,
        '{"a": ' * 50 + GOOD,
        " " * 900_000 + GOOD,
        json.dumps({"number": 1, "nothing": float("nan")}) + GOOD,
        '{"number": ' + "9" * 5_000 + "} " + GOOD,
        '{"deep": ' + "[" * 100_000 + "]" * 100_000 + "} " + GOOD,
    ],
)
def test_the_first_sound_object_with_turns_is_taken(serve, content):
    assert verdict(serve((200, content)).url).cause == "it guessed"


def test_other_calls_that_solve_the_task_are_accepted(ask, policy, serve):
    more = [{"name": "find_tickets", "arguments": {"status": "closed"}}, *CALLS]
    pairs, fallback = ask(Judge(serve((200, json.dumps(with_turn(0, calls=more)))).url))
    assert not fallback
    assert parse_calls(target(policy.chat, pairs[0]), "hermes")[0] == Call(
        "find_tickets", {"status": "closed"}
    )


def test_half_a_character_becomes_a_question_mark(ask, policy, serve):
    answer = with_turn(0, intent="a\ud800b", evidence="\udfff") | {"cause": "\ud83d", "fix": "\U0001f600"}
    pairs, fallback = ask(Judge(serve((200, json.dumps(answer))).url))
    assert not fallback
    assert "intent: a?b\nmistake: wrong argument\nevidence: ?\n" in target(policy.chat, pairs[0])
    assert "cause: ?\n" in target(policy.chat, pairs[1])


ODD = (
    None,
    True,
    -1,
    10**400,
    10**1000,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\ud800",
    "\x00",
    "x" * 10_000,
)
ODD += ([], [[]], {}, {"turns": []}, {"\ud800": [None]}, [{"name": {}}], [None] * 1000)


def places(value):
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


def test_no_value_anywhere_raises(monkeypatch):
    monkeypatch.setattr(judging, "BACK_OFF", ())
    answer, seen = judged(), []
    monkeypatch.setattr(Judge, "_answer", lambda *_: json.dumps(answer))
    for holder, key in places(answer):
        for odd in ODD:
            right, holder[key] = holder[key], odd
            seen.append(verdict("http://host/v1") is None)
            holder[key] = right
    assert verdict("http://host/v1") and 0 < sum(seen) < len(seen)
