"""A language model as the judge that writes reflections (Hao et al. 2026, §4, PRS).

It stands behind an OpenAI-compatible server. What it answers is data: a review in one JSON object, taken only
if its shape is right and its corrected calls earn reward 1 in the environment.
"""

import http.client
import json
import os
import time
import urllib.request
from dataclasses import dataclass

from nanotoolrl.chat import Call, escaped_json, parse_calls, render_calls
from nanotoolrl.env import Task, replay
from nanotoolrl.supervise import MAX_TEXT, MISTAKES, Review, TurnReview, play_again

AT_ONCE = 8  # requests in flight
BACK_OFF = (1.0, 2.0, 4.0)  # seconds between requests about the same rollout
MAX_BODY = 1_000_000  # bytes of an answer
FAILURES = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError)
FAILURES += (RecursionError, OverflowError)
JUDGE_PROMPT = """You review a failed rollout of an assistant that calls tools. Answer with one JSON object:
{"turns": [{"intent": "...", "mistake": "...", "evidence": "...",
            "calls": [{"name": "...", "arguments": {}}]}], "cause": "...", "fix": "..."}
"turns" has one entry per turn, in order. "mistake" is one of: %s; or "" if the turn is right. "calls" are the
right calls of the turn, [] where the user must be asked. "cause" and "fix" are about turn %d. At most %d
characters in a text."""


@dataclass(frozen=True)
class Judge:
    """A language model behind an OpenAI-compatible server that writes reviews.

    url: of the API, up to and without "/chat/completions"; ValueError if it is not http(s). timeout: seconds
    without an answer before a request fails. The key is read from OPENAI_API_KEY, goes into the request's
    header, and is neither kept nor printed; redirects are not followed.
    """

    url: str
    model: str = "default"
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"a judge needs an http(s) address, not {self.url!r}")

    def __call__(self, task: Task, format: str, error_turn: int, request: str) -> Review | None:
        """The judge's review of a failed rollout, or None after 1 + len(BACK_OFF) failures of any kind.

        request: log and ground truth (`supervise.request_text`).
        """
        system = JUDGE_PROMPT % (", ".join(MISTAKES), error_turn + 1, MAX_TEXT)
        user = f"{request}\nWrite the JSON object."
        for pause in (*BACK_OFF, None):
            try:
                return _accepted(self._ask(system, user), task, format, error_turn)
            except FAILURES:
                if pause is not None:
                    time.sleep(pause)
        return None

    def _ask(self, system: str, user: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.model, "temperature": 0, "messages": messages}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as answer:
            return _text(json.loads(answer.read(MAX_BODY))["choices"][0]["message"]["content"], MAX_BODY)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


def _accepted(content: str, task: Task, format: str, error_turn: int) -> Review:
    """Read a judge's answer (text around the object is ignored); raises one of FAILURES unless it has the
    right shape and its calls earn reward 1, none of them refused and none where the user must be asked."""
    raw = json.loads(content[content.find("{") : content.rfind("}") + 1])
    turns = [
        TurnReview(*(_text(turn[key]) for key in ("intent", "mistake", "evidence")), _calls(turn["calls"]))
        for turn in raw["turns"]
    ]
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


def _calls(raw: object) -> list[Call]:
    """Calls from JSON values; raises TypeError or ValueError."""
    if not isinstance(raw, list):
        raise TypeError("calls are a list")
    calls = parse_calls("".join(f"<tool_call>{escaped_json(call)}</tool_call>" for call in raw), "hermes")
    if not all(isinstance(call, Call) for call in calls):
        raise ValueError("a call that cannot be read")
    return calls


def _text(value: object, limit: int = MAX_TEXT) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise TypeError(f"not a text of at most {limit} characters")
    return value
