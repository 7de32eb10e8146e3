"""An address book with messages; some goals take files, too."""

from dataclasses import dataclass, field
from random import Random

from nanotoolrl.world.api import API, ToolError, check_known
from nanotoolrl.world.goals import Goal, register
from nanotoolrl.world.words import PEOPLE, a_title


@dataclass
class Contacts(API):
    """An address book and its messages."""

    pool = "train"
    people: dict[str, str] = field(default_factory=dict)
    inbox: list[dict] = field(default_factory=list)
    sent: list[dict] = field(default_factory=list)

    def find_phone(self, person: str) -> dict:
        """Find a person's phone number."""
        check_known("contact", person, self.people)
        return {"phone": self.people[person]}

    def add_contact(self, person: str, phone: str) -> str:
        """Add a person to the contacts."""
        if person in self.people:
            raise ToolError(f"contact '{person}' exists already")
        self.people[person] = phone
        return "added"

    def send_message(self, phone: str, text: str) -> str:
        """Send a text message to a phone number."""
        if phone not in self.people.values():
            raise ToolError(f"no contact has the phone '{phone}'; look it up with find_phone")
        self.sent.append({"phone": phone, "text": text})
        return "sent"

    def read_inbox(self, person: str) -> dict:
        """Read the last message from a person."""
        texts = [message["text"] for message in self.inbox if message["person"] == person]
        if not texts:
            raise ToolError(f"no message from '{person}'")
        return {"text": texts[-1]}


def _phone(rng: Random) -> str:
    return f"{rng.randint(100, 999)}-{rng.randint(100, 999)}"


def world(rng: Random, size: int) -> dict:
    people = rng.sample(PEOPLE, min(size, 30))
    inbox = [{"person": person, "text": a_title(rng)} for person in people[: len(people) // 2]]
    return {"people": {person: _phone(rng) for person in people}, "inbox": inbox, "sent": []}


def draw(rng: Random, api: Contacts) -> dict:
    sender = rng.choice(api.inbox)["person"]
    person = rng.choice([p for p in api.people if p != sender])
    stranger = rng.choice([p for p in PEOPLE if p not in api.people])
    return {"person": person, "sender": sender, "stranger": stranger, "new_phone": _phone(rng)}


GOALS = [
    Goal(
        "Text {person} '{words}'.|Send {person} the message '{words}'.|Tell {person} '{words}' by message.",
        "find_phone person; send_message phone text=words",
        "Sent.",
        vague="Send {person} a message.|Text {person} for me.",
        question="What should it say?",
        answer="It should say '{words}'.|Write '{words}'.",
    ),
    Goal(
        "What is the number of {person}?|Look up the phone of {person}.",
        "find_phone person",
        "It is {phone}.",
    ),
    Goal(
        "Add {stranger} with the number {new_phone}.|Save {new_phone} as the phone of {stranger}.",
        "add_contact person=stranger phone=new_phone",
        "Added.",
        vague="Add {stranger} to my contacts.|Save the contact {stranger}.",
        question="What is the number?",
        answer="It is {new_phone}.|The number is {new_phone}.",
    ),
    Goal(
        "What did {sender} write?|Read me the last message from {sender}.",
        "read_inbox person=sender",
        "{text}.",
    ),
    Goal(
        "Forward the last message from {sender} to {person}.|Send {person} what {sender} wrote last.",
        "read_inbox person=sender; find_phone person; send_message phone text",
        "Forwarded.",
        vague="Forward the last message from {sender}.|Pass on what {sender} wrote last.",
        question="To whom?",
        answer="To {person}.|Send it to {person}.",
    ),
    Goal(
        "Send {person} the text of {name} in {folder}.|Text {person} what {name} in {folder} says.",
        "read_file folder name; find_phone person; send_message phone text",
        "Sent.",
    ),
    Goal(
        "Save the last message from {sender} as {new_name} in {folder}.|"
        "Store what {sender} wrote in {folder} as {new_name}.",
        "read_inbox person=sender; write_file folder name=new_name text",
        "Saved.",
    ),
]

register(Contacts, world, draw, GOALS, keys=["person"])
