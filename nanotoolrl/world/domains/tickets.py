"""A help desk."""

from dataclasses import dataclass, field
from random import Random
from typing import Literal

from nanotoolrl.world.api import API, ToolError, new_id, record
from nanotoolrl.world.goals import Goal, register
from nanotoolrl.world.words import PEOPLE, a_title, ids, titles


@dataclass
class Tickets(API):
    """A help desk."""

    pool = "train"
    tickets: list[dict] = field(default_factory=list)

    def find_tickets(self, status: Literal["open", "closed"] = "open") -> list[dict]:
        """List the tickets with a status."""
        return [{"title": t["title"], "id": t["id"]} for t in self.tickets if t["status"] == status]

    def get_ticket(self, ticket_id: int) -> dict:
        """Read owner and priority of a ticket."""
        ticket = record(self.tickets, "ticket", ticket_id)
        return {"owner": ticket["owner"], "priority": ticket["priority"]}

    def open_ticket(self, title: str, priority: Literal["low", "normal", "high"] = "normal") -> dict:
        """Open a new ticket."""
        number = new_id(self.tickets)
        self.tickets.append(
            {"id": number, "title": title, "priority": priority, "status": "open", "owner": "nobody"}
        )
        return {"id": number}

    def close_ticket(self, ticket_id: int) -> str:
        """Close a ticket."""
        ticket = record(self.tickets, "ticket", ticket_id)
        if ticket["status"] == "closed":
            raise ToolError(f"ticket {ticket_id} is closed already")
        ticket["status"] = "closed"
        return "closed"

    def assign_ticket(self, ticket_id: int, person: str) -> str:
        """Give a ticket to a person."""
        record(self.tickets, "ticket", ticket_id)["owner"] = person
        return "assigned"


def world(rng: Random, size: int) -> dict:
    rows = zip(ids(rng, size), titles(rng, size), strict=True)
    tickets = [
        {
            "id": i,
            "title": title,
            "priority": rng.choice(["low", "normal", "high"]),
            "status": "open",
            "owner": "nobody",
        }
        for i, title in rows
    ]
    for ticket in tickets[:: max(3, size // 3)]:
        ticket["status"], ticket["owner"] = "closed", rng.choice(PEOPLE)
    for ticket in tickets[1::2]:
        ticket["owner"] = rng.choice(PEOPLE)
    return {"tickets": tickets}


def draw(rng: Random, api: Tickets) -> dict:
    title = rng.choice([t["title"] for t in api.tickets if t["status"] == "open"])
    priority = rng.choice(["low", "high"])
    drawn = {"open_title": title, "new_title": a_title(rng), "priority": priority, "closed": "closed"}
    return drawn | {"worker": rng.choice(PEOPLE)}


GOALS = [
    Goal(
        "Close the ticket '{open_title}'.|The ticket '{open_title}' is solved.",
        "find_tickets; close_ticket ticket_id=id",
    ),
    Goal(
        "Give the ticket '{open_title}' to {worker}.|{worker} takes the ticket '{open_title}'.",
        "find_tickets; assign_ticket ticket_id=id person=worker",
        "Assigned.",
        vague="Give the ticket '{open_title}' to somebody.|Somebody should take the ticket '{open_title}'.",
        question="Who should take it?",
        answer="{worker}.|Give it to {worker}.",
    ),
    Goal(
        "Open a {priority} ticket '{new_title}'.|I need a new {priority} ticket '{new_title}'.",
        "open_ticket title=new_title priority",
        "Opened as {id}.",
        vague="Open a {priority} ticket.|I need a new {priority} ticket.",
        question="What is the title?",
        answer="Call it '{new_title}'.|'{new_title}'.",
    ),
    Goal(
        "Open a {priority} ticket '{new_title}' for {worker}.|"
        "New {priority} ticket '{new_title}', {worker} takes it.",
        "open_ticket title=new_title priority; assign_ticket ticket_id=id person=worker",
    ),
    Goal(
        "Who owns the ticket '{open_title}'?|Look up the owner of the ticket '{open_title}'.",
        "find_tickets; get_ticket ticket_id=id",
        "{owner}.",
    ),
    Goal("Which tickets are closed?|List the closed tickets.", "find_tickets status=closed"),
]

register(Tickets, world, draw, GOALS, named=["open_title"])
