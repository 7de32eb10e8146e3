"""A task of three turns, rollouts of it that are given, and what a review makes of them."""

from nanotoolrl.calls import Call, message_state, render_calls
from nanotoolrl.env import Episode, Task, Turn
from nanotoolrl.trajectory import Trajectory

find = Call("find_tickets", {})


def close(ticket_id):
    return Call("close_ticket", {"ticket_id": ticket_id})


def opened(title="warm ribbon", priority="high"):
    return Call("open_ticket", {"title": title, "priority": priority})


def make_task():
    tickets = [
        {"id": 34, "title": "dry harbor", "priority": "low", "status": "open", "owner": "nobody"},
        {"id": 50, "title": "blue button", "priority": "low", "status": "open", "owner": "nobody"},
    ]
    state = {"Tickets": {"tickets": tickets}, "Files": {"folders": {"docs": {"a.txt": "soft moon"}}}}
    tools = ["find_tickets", "close_ticket", "get_ticket", "open_ticket", "read_file", "write_file"]
    turns = [
        Turn("The ticket 'blue button' is solved.", [find, close(50)], "Done."),
        Turn("Open a high ticket.", [], "What is the title?"),
        Turn("It is 'warm ribbon'.", [opened()], "Opened."),
    ]
    return Task("t-1", "miss_param", state, tools, turns)


def play(chat, task, messages, format="hermes", max_messages=30, cut=""):
    """A rollout of which every assistant message is given, a call or a text; `cut`: an overlong last one."""
    episode = Episode(task, format, max_messages)
    prompt = chat.prompt_ids(*episode.prompt(), format)
    row = Trajectory(task.id, task.category, format, [], [], [], len(prompt), turns=len(task.turns))
    row.append(prompt, sampled=False)
    for message in [*messages, *([cut] if cut else [])]:
        text = message if isinstance(message, str) else render_calls([message], format)
        overlong = bool(cut) and message is cut
        ids = chat.assistant_ids(text, format)[: -1 if overlong else None]
        row.append(ids, sampled=True)
        row.states.append(message_state(text, format, overlong))
        answer = episode.step(text, overlong)
        if answer is None:
            break
        row.append(chat.extend_ids(answer, ids[-1]), sampled=False)
    row.reward, row.verdicts = episode.reward, list(episode.turn_verdicts)
    return row


def flat(task, calls):
    """The messages that make these calls, one list per turn."""
    return [message for turn in calls for message in [*turn, "Done."]]


def target(chat, pair):
    return chat.decode(pair.tokens[pair.prompt_length : -1])


TAIL = ["What is the title?", opened(), "Opened."]


FAILED = [find, close(34), "Done.", *TAIL]
