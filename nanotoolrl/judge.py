"""A language model as the judge that writes reflections (Hao et al. 2026, §4, PRS).

It stands behind an OpenAI-compatible server. What it answers is data: a review in one JSON object, taken only
if its shape is right and its corrected calls earn reward 1 in the environment.
"""

import http.client
import json
import os
import re
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import parse_qsl, urlsplit

from tqdm import tqdm

from nanotoolrl.calls import Call, escaped_json, parse_calls, render_calls
from nanotoolrl.env import Task, replay
from nanotoolrl.supervise import MAX_TEXT, MISTAKES, Review, TurnReview, play_again

T = TypeVar("T")
MODEL, TIMEOUT = "judge", 30.0  # the model's name; seconds
AT_ONCE = 8  # requests in flight
BACK_OFF = (1.0, 2.0, 4.0)  # seconds between requests about the same rollout
PASSING = (408, 409, 425, 429)  # statuses below 500 after which another request may help
MAX_BODY = 1_000_000  # bytes of an answer
MAX_STARTS = 100  # beginnings of JSON objects that are tried in an answer
ADDRESS = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?([/?][!-~]*)?")
SECRET = re.compile(r"key|token|secret|pass|pwd|auth|cred|jwt|bearer|session|sig(nature)?$|^code$", re.I)
FAILURES = (
    OSError,
    http.client.HTTPException,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,  # nested too deeply, no more threads
)
JUDGE_PROMPT = """You review a failed rollout of an assistant that calls tools. Answer with one JSON object:
{"turns": [{"intent": "...", "mistake": "...", "evidence": "...",
            "calls": [{"name": "...", "arguments": {}}]}], "cause": "...", "fix": "..."}
"turns" has one entry per turn, in order. "mistake" is one of: %s; or "" if the turn is right. "calls" are the
right calls of the turn, [] where the user must be asked. "cause" and "fix" are about turn %d. At most %d
characters in a text."""

_said: dict[type, Exception] = {}  # by kind, the failure that had its line in this run


class JudgeError(ValueError):
    """A judge that cannot be used. The text holds no key, no query, and nothing that a server wrote.

    again: whether another request may help.
    """

    def __init__(self, text: str, again: bool = False) -> None:
        super().__init__(text)
        self.again = again


class UnusableAnswer(JudgeError):
    """The model answered, but not with a review that can be used."""


@dataclass(frozen=True)
class Judge:
    """A language model behind an OpenAI-compatible server that writes reviews.

    url: of the API, with or without "/chat/completions"; a query such as "?api-version=1" stays at its end.
    Raises JudgeError, a ValueError, if it will not do. timeout: seconds for a request and its whole answer.

    The key is read from OPENAI_API_KEY, goes into the request's header, and is neither kept nor printed;
    redirects are not followed. A url with a key in it (user:key@host, ?api_key=...) is refused: so a url can
    be stored in a run's config.json and printed as it is.
    """

    url: str
    model: str = MODEL
    timeout: float = TIMEOUT
    _closed: Future = field(default_factory=Future, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _endpoint(self.url)

    def check(self) -> None:
        """Begin a run with one request; raises JudgeError, with status and URL, if nothing comes of it."""
        self._ask([{"role": "user", "content": "Answer with one word."}], str)
        _said.clear()

    def __call__(self, task: Task, format: str, error_turn: int, request: str) -> Review | None:
        """The judge's review of a failed rollout, or None after 1 + len(BACK_OFF) failures of any kind, or
        after one that would come again. Never raises. A run's first failure has a line on stderr.

        request: log and ground truth (`supervise.request_text`).
        """
        system = JUDGE_PROMPT % (", ".join(MISTAKES), error_turn + 1, MAX_TEXT)
        user = f"{request}\nWrite the JSON object."
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            return self._ask(messages, lambda content: _accepted(content, task, format, error_turn))
        except JudgeError as error:
            self._say(error)
            return None

    def close(self) -> None:
        """Give up, from any thread: requests and pauses end at once, and no request follows."""
        if not self._closed.done():
            self._closed.set_result(None)

    def _ask(self, messages: list[dict], read: Callable[[str], T]) -> T:
        """What `read` makes of the first answer that it can read; raises the last JudgeError."""
        for pause in (*BACK_OFF, None):
            try:
                return read(self._answer(messages))
            except JudgeError as error:
                failure = error
            except FAILURES as error:
                failure = UnusableAnswer(f"an answer cannot be used: {error!r:.200}", again=True)
            if pause is None or not failure.again:
                break
            self._say(failure)
            wait([self._closed], pause)
        raise failure

    def _answer(self, messages: list[dict]) -> str:
        """The text of the model's answer; raises JudgeError."""
        body = {"model": self.model, "temperature": 0, "messages": messages}
        headers = {"Content-Type": "application/json"}
        url = _endpoint(self.url)
        if key := os.environ.get("OPENAI_API_KEY"):
            if not re.fullmatch("[!-~]+", key):
                raise JudgeError("OPENAI_API_KEY holds a blank, a line break, or what is not ASCII")
            headers["Authorization"] = f"Bearer {key}"
        if self._closed.done():
            raise JudgeError("the judge is closed")
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        where = url.partition("?")[0]
        try:
            raw = _Exchange().fetch(request, self.timeout, self._closed)
            return _text(json.loads(raw)["choices"][0]["message"]["content"], MAX_BODY)
        except HTTPError as error:
            error.close()
            status = f"{error.code} {http.client.responses.get(error.code, '')}".rstrip()
            again = error.code >= 500 or error.code in PASSING
            raise JudgeError(f"{where} answered {status}", again) from None
        except FAILURES as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, TimeoutError):  # ours, or the socket's if that one is first
                reason = f"not complete after {self.timeout:g} s"
            else:
                reason = getattr(reason, "strerror", None) or type(reason).__name__
            raise JudgeError(f"no chat completion from {where}: {reason}", again=True) from None

    def _say(self, failure: JudgeError) -> None:
        """A line about the run's first failure of each kind; the others are only counted."""
        if not self._closed.done() and _said.setdefault(type(failure), failure) is failure:  # atomic
            tqdm.write(f"judge: {failure} (said once; judge_fallbacks counts)", file=sys.stderr)


class _Exchange(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """One request, in a daemon thread that whoever waits for it can leave.

    A time limit on every read does not end an answer that comes byte by byte, and none ends the look-up of a
    name. The thread of a ThreadPoolExecutor would keep the process from ending.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answer: Future = Future()
        self.line: socket.socket | None = None
        self.left = False

    def fetch(self, request: urllib.request.Request, timeout: float, closed: Future) -> bytes:
        """Body of the answer, cut at MAX_BODY; raises TimeoutError, or what went wrong."""
        threading.Thread(target=self._run, args=(request, timeout), daemon=True).start()
        try:
            if self.answer in wait((self.answer, closed), timeout, FIRST_COMPLETED).done:
                return self.answer.result()
        finally:
            self.left = True
            if self.line:
                with suppress(OSError):  # it is closed already
                    socket.socket.shutdown(self.line, socket.SHUT_RDWR)
        raise TimeoutError

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        secure = request.type == "https"
        kind: Any = http.client.HTTPSConnection if secure else http.client.HTTPConnection

        class Connection(kind):
            def connect(connection) -> None:
                super().connect()
                self.line = connection.sock  # set before `left` is read; `fetch` does it the other way round
                if self.left:
                    raise TimeoutError

        return self.do_open(Connection, request)

    https_open = http_open  # type: ignore[assignment]

    def _run(self, request: urllib.request.Request, timeout: float) -> None:
        try:
            opener = urllib.request.OpenerDirector()  # one that follows no redirect: they would get the key
            proxies, default = urllib.request.ProxyHandler(), urllib.request.HTTPDefaultErrorHandler()
            for handler in (self, proxies, default, urllib.request.HTTPErrorProcessor()):
                opener.add_handler(handler)
            with opener.open(request, timeout=timeout) as answer:
                body = answer.read(MAX_BODY)
        except Exception as error:  # raised where it is waited for
            self.answer.set_exception(error)
        else:
            self.answer.set_result(body)


def wrong_url(url: str) -> str:
    """Why no judge can be asked at a URL, or ""."""
    try:
        _endpoint(url)
    except JudgeError as error:
        return f"cannot be used: {error}"
    return ""


def _endpoint(url: str) -> str:
    """The URL to ask. Raises JudgeError, which repeats nothing of `url`, if it is unsound or holds a key."""
    try:
        parts = urlsplit(url)
        names = [name for name, _ in parse_qsl(parts.query, True, strict_parsing=bool(parts.query))]
        private = "@" in parts.netloc or any(map(SECRET.search, names))
        sound = bool(ADDRESS.fullmatch(url)) and not parts.fragment and parts.port != 0
        sound = sound and bool((parts.hostname or "").encode("idna"))
    except ValueError:
        private = sound = False
    if private:
        raise JudgeError("a key in the address of a judge would be stored: give it in OPENAI_API_KEY")
    if not sound:
        raise JudgeError(
            "a judge needs an address such as http://localhost:8000/v1 or https://host/v1?api-version=1, in "
            "printable ASCII, without blanks and without #"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return parts._replace(path=path).geturl()


def _accepted(content: str, task: Task, format: str, error_turn: int) -> Review:
    """Read a judge's answer (text around the object is ignored); raises one of FAILURES unless it has the
    right shape and its calls earn reward 1, none of them refused and none where the user must be asked."""
    raw = _first_object(content)
    turns = []
    for turn in raw["turns"]:
        intent, mistake, evidence = (_text(turn[key]) for key in ("intent", "mistake", "evidence"))
        turns.append(TurnReview(intent, mistake, evidence, _calls(turn["calls"])))
    if [bool(turn.calls) for turn in turns] != [bool(turn.calls) for turn in task.turns]:
        raise ValueError("calls in other turns than the ground truth")
    if not turns[error_turn].mistake or any(turn.mistake not in ("", *MISTAKES) for turn in turns):
        raise ValueError("not a known mistake")
    calls = [turn.calls for turn in turns]
    texts = [[*(render_calls([call], format) for call in turn), "done"] for turn in calls]
    played = play_again(task, [(text, True) for turn in texts for text in turn], format)
    sound = all(attempt.call and not attempt.refused for now in played for attempt in now.attempts)
    if not sound or replay(task, calls, format) != 1:
        raise ValueError("the calls do not solve the task")
    return Review(turns, error_turn, _text(raw["cause"]), _text(raw["fix"]))


def _first_object(text: str) -> dict:
    """The first JSON object with "turns" in a text, which may have braces elsewhere; raises ValueError."""
    decoder = json.JSONDecoder()
    for start in islice(re.finditer(r'\{\s*"', text), MAX_STARTS):  # each may read to the end of the text
        with suppress(ValueError, RecursionError):
            found, _ = decoder.raw_decode(text, start.start())
            if "turns" in found:
                return found
    raise ValueError("no JSON object with turns")


def _calls(raw: object) -> list[Call]:
    """Calls from JSON values; raises TypeError or ValueError."""
    if not isinstance(raw, list):
        raise TypeError("calls are a list")
    read = parse_calls("".join(f"<tool_call>{escaped_json(call)}</tool_call>" for call in raw), "hermes")
    calls = [call for call in read if isinstance(call, Call)]
    if len(calls) != len(read):
        raise ValueError("a call that cannot be read")
    return calls


def _text(value: object, limit: int = MAX_TEXT) -> str:
    """The value, if it is a text, as UTF-8 can hold it; raises TypeError."""
    if not isinstance(value, str) or len(value) > limit:
        raise TypeError(f"not a text of at most {limit} characters")
    return value.encode("utf-8", "replace").decode()
