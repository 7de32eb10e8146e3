"""A week of events."""

from dataclasses import dataclass, field
from random import Random

from nanotoolrl.world.api import API, ToolError, new_id, record
from nanotoolrl.world.goals import Goal, register
from nanotoolrl.world.words import DAYS, Day, a_title, ids, titles


@dataclass
class Calendar(API):
    """One week of events."""

    pool = "train"
    events: list[dict] = field(default_factory=list)

    def list_events(self, day: Day) -> list[dict]:
        """List the events of a day."""
        return [{"title": e["title"], "id": e["id"]} for e in self.events if e["day"] == day]

    def event_time(self, event_id: int) -> dict:
        """Read when an event starts."""
        return {"hour": record(self.events, "event", event_id)["hour"]}

    def add_event(self, day: Day, hour: int, title: str) -> dict:
        """Add an event to a day.
        hour: full hour, 0 to 23
        """
        if not 0 <= hour <= 23:
            raise ToolError(f"the hour must be 0 to 23, not {hour}")
        number = new_id(self.events)
        self.events.append({"id": number, "day": day, "hour": hour, "title": title})
        return {"id": number}

    def move_event(self, event_id: int, day: Day) -> str:
        """Move an event to another day."""
        record(self.events, "event", event_id)["day"] = day
        return "moved"

    def cancel_event(self, event_id: int) -> str:
        """Cancel an event."""
        self.events.remove(record(self.events, "event", event_id))
        return "cancelled"


def world(rng: Random, size: int) -> dict:
    days = rng.sample(DAYS, 2)
    rows = zip(ids(rng, size), titles(rng, size), strict=True)
    return {
        "events": [
            {"id": i, "day": rng.choice(days), "hour": rng.randint(7, 21), "title": t} for i, t in rows
        ],
    }


def draw(rng: Random, api: Calendar) -> dict:
    event = rng.choice(api.events)
    new_day = rng.choice([day for day in DAYS if day != event["day"]])
    drawn = {"day": event["day"], "event": event["title"], "new_day": new_day, "new_event": a_title(rng)}
    return drawn | {"hour": rng.randint(7, 21)}


GOALS = [
    Goal("What is on {day}?|Show me the events of {day}.", "list_events day"),
    Goal(
        "Put '{new_event}' on {new_day} at {hour}.|Plan '{new_event}' for {new_day}, hour {hour}.",
        "add_event day=new_day hour title=new_event",
        "Planned.",
        vague="Put '{new_event}' on {new_day}.|Plan '{new_event}' for {new_day}.",
        question="At what hour?",
        answer="At {hour}.|Hour {hour}.",
    ),
    Goal(
        "Move '{event}' from {day} to {new_day}.|'{event}' on {day} must go to {new_day}.",
        "list_events day; move_event event_id=id day=new_day",
        "Moved.",
        vague="Move '{event}' from {day} to another day.|'{event}' cannot stay on {day}.",
        question="To which day?",
        answer="To {new_day}.|{new_day}.",
    ),
    Goal(
        "Cancel '{event}' on {day}.|'{event}' on {day} is off.",
        "list_events day; cancel_event event_id=id",
        "Cancelled.",
    ),
    Goal(
        "When does '{event}' start on {day}?|At what hour is '{event}' on {day}?",
        "list_events day; event_time event_id=id",
        "At {hour}.",
    ),
]

register(Calendar, world, draw, GOALS, named=["event"], groups=["day"])
