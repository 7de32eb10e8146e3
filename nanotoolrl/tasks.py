"""Tasks: `load_tasks`, and the seeded generator that wrote the committed ones.

A `Goal` is one thing a user may want: paraphrases, the calls that do it, and what is said if a parameter is
missing. A scenario is one to three turns of goals played on a random world; its twins are the four categories
of Hao et al. 2026 (after BFCL-v3 multi-turn): `base`; `miss_func`, a needed tool is hidden until a later
message offers it; `miss_param`, the request lacks a value and the user must be asked; `long_context`, the
world is many times larger.

`python -m nanotoolrl.tasks --export FILE` writes tasks for other trainers.
"""

import argparse
import copy
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanotoolrl.bfcl import NAME as BFCL
from nanotoolrl.bfcl import load_bfcl
from nanotoolrl.calls import FORMATS
from nanotoolrl.cli import command
from nanotoolrl.env import Call, Task, Turn, call_tool, export, mutations, replay
from nanotoolrl.tools import API_CLASSES, method_names, owner_of
from nanotoolrl.world.taskfile import read_lines, write_lines

TASK_DIR = Path(__file__).resolve().parent.parent / "data" / "tasks"
SPLITS = ("train", "test", "foreign", "ood")
TASK_NAMES = f"{', '.join(SPLITS)}, {BFCL}[:CATEGORY][:train|:test] or a JSONL file"
SMALL, LARGE = 4, 45  # records per kind in an ordinary and in a long_context world
MAX_TURN_CALLS = 5
LISTING = ("list_files", "find_tickets", "list_events", "find_books", "find_songs", "find_doctors")

PEOPLE = (
    "Mara Jonas Lena Piet Olga Hugo Nina Emil Rosa Karl Ida Felix Vera Otto Lisa Bruno Anna Paul Greta "
    "Max Clara Leon Tilda Oskar Frida Anton Hanna Theo Elsa Simon Ruth David Ella Jakob Maria Noah "
    "Sofia Adam Carla Tom"
).split()
NOUNS = (
    "apple river stone cloud garden paper silver orange window candle forest mirror bottle pencil "
    "button carpet basket ladder hammer guitar saddle pepper copper cherry velvet marble anchor ribbon "
    "tunnel harbor lantern compass blanket kettle pillow rocket turtle falcon meadow castle"
).split()
ADJECTIVES = (
    "red blue green old new small big cold warm dark bright quiet fast slow round flat soft dry wild lost"
).split()
FOLDERS = "docs photos work home music notes drafts archive reports plans".split()
ENDINGS = ["txt", "md", "csv", "log"]
ACCOUNTS = "savings checking travel family business school garden rent".split()
PAYEES = "water power phone gas internet insurance tax school doctor club".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
CITIES = ("Oslo Rome Paris Bern Riga Lyon Porto Ghent Turin Malmo Bonn Cork Graz Split Leeds Kiel").split()
ROOMS = "kitchen bedroom bathroom office hall cellar attic nursery library garage".split()
DOORS = "front back side cellar garden garage roof balcony".split()
BRANCHES = "heart skin eyes teeth bones ears lungs nerves".split()
CARS = "van jeep truck coupe wagon minibus roadster pickup".split()


@dataclass(frozen=True)
class Goal:
    """One wish. `calls` reads "tool argument argument=binding; tool ...": an argument takes the binding of
    its own name unless another is named; bindings are drawn from the world and extended by every result.

    `says` are paraphrases divided by `|`; `vague`, `question`, `answer` serve miss_param and are empty where
    every parameter can be looked up.
    """

    says: str
    calls: str
    reply: str = "Done."
    vague: str = ""
    question: str = ""
    answer: str = ""

    def steps(self) -> list[tuple[str, dict[str, str]]]:
        """[(tool, {argument: binding})]"""
        parsed = []
        for step in self.calls.split(";"):
            tool, *arguments = step.split()
            parsed.append((tool, dict((a.split("=") if "=" in a else (a, a)) for a in arguments)))
        return parsed

    def apis(self) -> set[str]:
        """Names of the classes the goal touches."""
        return {owner_of(tool) for tool, _ in self.steps()}

    def pool(self) -> str:
        """The pool of its classes (one for all of them: a test holds it)."""
        return API_CLASSES[owner_of(self.steps()[0][0])].pool


# ----------------------------------------------------------------------- worlds: state and bindings per class
Random = random.Random


def _title(rng: Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def _titles(rng: Random, count: int) -> list[str]:
    return [f"{a} {n}" for a, n in rng.sample([(a, n) for a in ADJECTIVES for n in NOUNS], count)]


def _ids(rng: Random, count: int) -> list[int]:
    return sorted(rng.sample(range(11, 99), count))


def _phone(rng: Random) -> str:
    return f"{rng.randint(100, 999)}-{rng.randint(100, 999)}"


def _file(rng: Random) -> str:
    return f"{rng.choice(NOUNS)}.{rng.choice(ENDINGS)}"


def _files(rng: Random, size: int) -> dict:
    folders = rng.sample(FOLDERS, 3)
    return {
        "folders": {
            f: {_file(rng): _title(rng) for _ in range(rng.randint(2, min(size, 30)))} for f in folders
        }
    }


def _draw_files(rng: Random, api) -> dict:
    folder = rng.choice([f for f, files in api.folders.items() if files])
    target = rng.choice([f for f in api.folders if f != folder])
    return {
        "folder": folder,
        "name": rng.choice(list(api.folders[folder])),
        "target": target,
        "new_name": _file(rng),
    }


def _contacts(rng: Random, size: int) -> dict:
    people = rng.sample(PEOPLE, min(size, 30))
    inbox = [{"person": person, "text": _title(rng)} for person in people[: len(people) // 2]]
    return {"people": {person: _phone(rng) for person in people}, "inbox": inbox, "sent": []}


def _draw_contacts(rng: Random, api) -> dict:
    sender = rng.choice(api.inbox)["person"]
    person = rng.choice([p for p in api.people if p != sender])
    stranger = rng.choice([p for p in PEOPLE if p not in api.people])
    return {"person": person, "sender": sender, "stranger": stranger, "new_phone": _phone(rng)}


def _tickets(rng: Random, size: int) -> dict:
    rows = zip(_ids(rng, size), _titles(rng, size), strict=True)
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


def _draw_tickets(rng: Random, api) -> dict:
    title = rng.choice([t["title"] for t in api.tickets if t["status"] == "open"])
    priority = rng.choice(["low", "high"])
    drawn = {"open_title": title, "new_title": _title(rng), "priority": priority, "closed": "closed"}
    return drawn | {"worker": rng.choice(PEOPLE)}


def _bank(rng: Random, size: int) -> dict:
    accounts = {account: rng.randint(300, 999) for account in rng.sample(ACCOUNTS, min(size, 6))}
    return {
        "accounts": accounts,
        "bills": {p: rng.randint(11, 199) for p in rng.sample(PAYEES, min(size, 8))},
    }


def _draw_bank(rng: Random, api) -> dict:
    account = rng.choice([a for a, money in api.accounts.items() if money >= 200])
    target = rng.choice([a for a in api.accounts if a != account])
    return {
        "account": account,
        "to": target,
        "coins": rng.randint(11, 99),
        "payee": rng.choice(list(api.bills)),
    }


def _calendar(rng: Random, size: int) -> dict:
    days = rng.sample(DAYS, 2)
    rows = zip(_ids(rng, size), _titles(rng, size), strict=True)
    return {
        "events": [
            {"id": i, "day": rng.choice(days), "hour": rng.randint(7, 21), "title": t} for i, t in rows
        ],
    }


def _draw_calendar(rng: Random, api) -> dict:
    event = rng.choice(api.events)
    new_day = rng.choice([day for day in DAYS if day != event["day"]])
    drawn = {"day": event["day"], "event": event["title"], "new_day": new_day, "new_event": _title(rng)}
    return drawn | {"hour": rng.randint(7, 21)}


def _shop(rng: Random, size: int) -> dict:
    rows = zip(_ids(rng, size), rng.sample(NOUNS, min(size, 30)), strict=False)
    items = [{"id": i, "name": name, "price": rng.randint(2, 99)} for i, name in rows]
    orders = [
        {
            "id": i,
            "address": f"{rng.choice(NOUNS)} street {rng.randint(1, 99)}",
            "items": [],
            "status": status,
        }
        for i, status in zip(_ids(rng, 3), rng.sample(["packed", "sent", "late", "paid"], 3), strict=True)
    ]
    return {"items": items, "cart": [], "orders": orders}


def _draw_shop(rng: Random, api) -> dict:
    order = rng.choice([order["id"] for order in api.orders if order["status"] != "cancelled"])
    address = f"{rng.choice(NOUNS)} street {rng.randint(1, 99)}"
    return {
        "item": rng.choice(api.items)["name"],
        "quantity": rng.randint(2, 9),
        "address": address,
        "order": order,
    }


def _travel(rng: Random, size: int) -> dict:
    ways = rng.sample([(a, b) for a in CITIES for b in CITIES if a != b], size)
    rows = zip(_ids(rng, size), ways, strict=True)
    flights = [{"id": i, "origin": a, "destination": b, "price": rng.randint(40, 400)} for i, (a, b) in rows]
    passengers = rng.sample(PEOPLE, 3)
    return {
        "flights": flights,
        "bookings": [
            {"id": i, "flight_id": rng.choice(flights)["id"], "passenger": p}
            for i, p in zip(_ids(rng, 3), passengers, strict=True)
        ],
    }


def _draw_travel(rng: Random, api) -> dict:
    flight, booked = rng.choice(api.flights), [booking["passenger"] for booking in api.bookings]
    passenger = rng.choice([p for p in PEOPLE if p not in booked])
    drawn = {"origin": flight["origin"], "destination": flight["destination"], "passenger": passenger}
    return drawn | {"booked": rng.choice(booked)}


def _home(rng: Random, size: int) -> dict:
    rooms = rng.sample(ROOMS, min(size, 9))
    doors = rng.sample(DOORS, 3)
    return {
        "rooms": {room: {"degrees": rng.randint(12, 26), "light": rng.random() < 0.5} for room in rooms},
        "doors": {door: rng.choice(["locked", "open"]) for door in doors},
    }


def _draw_home(rng: Random, api) -> dict:
    room, other = rng.sample(list(api.rooms), 2)
    door = rng.choice(list(api.doors))
    on = not api.rooms[room]["light"]
    drawn = {"room": room, "other": other, "degrees": rng.randint(6, 29), "door": door}
    locked = api.doors[door] == "locked"
    drawn |= {"on": on, "switch": "on" if on else "off"}
    return drawn | {"state": "open" if locked else "locked", "act": "Open" if locked else "Lock"}


def _library(rng: Random, size: int) -> dict:
    authors = rng.sample(PEOPLE, 2)
    rows = zip(_ids(rng, size), _titles(rng, size), strict=True)
    books = [{"id": i, "title": t, "author": rng.choice(authors), "member": "nobody"} for i, t in rows]
    for book in books[::2]:
        book["member"] = rng.choice(PEOPLE)
    return {"books": books}


def _draw_library(rng: Random, api) -> dict:
    free = rng.choice([book for book in api.books if book["member"] == "nobody"])
    lent = rng.choice([book for book in api.books if book["member"] != "nobody"])
    drawn = {"author": free["author"], "book": free["title"], "lent_author": lent["author"]}
    return drawn | {"lent_book": lent["title"], "member": rng.choice(PEOPLE)}


def _garage(rng: Random, size: int) -> dict:
    cars = rng.sample(CARS, min(size, 7))
    return {
        "cars": {car: {"litres": rng.randint(5, 40), "route": "none", "driver": "nobody"} for car in cars}
    }


def _draw_garage(rng: Random, api) -> dict:
    car, other = rng.sample(list(api.cars), 2)
    drawn = {"car": car, "other_car": other, "litres": rng.randint(5, 40), "city": rng.choice(CITIES)}
    return drawn | {"driver": rng.choice(PEOPLE)}


def _music(rng: Random, size: int) -> dict:
    artists = rng.sample(PEOPLE, 2)
    rows = zip(_ids(rng, size), _titles(rng, size), strict=True)
    songs = [{"id": i, "title": t, "artist": rng.choice(artists)} for i, t in rows]
    return {"songs": songs, "playlists": {n: [rng.choice(songs)["id"]] for n in rng.sample(NOUNS, 3)}}


def _draw_music(rng: Random, api) -> dict:
    song, full = rng.choice(api.songs), [name for name, songs in api.playlists.items() if songs]
    drawn = {"artist": song["artist"], "song": song["title"], "playlist": rng.choice(full)}
    return drawn | {"new_playlist": rng.choice([n for n in NOUNS if n not in api.playlists])}


def _clinic(rng: Random, size: int) -> dict:
    branches = rng.sample(BRANCHES, 2)
    rows = zip(_ids(rng, size), rng.sample(PEOPLE, min(size, 30)), strict=False)
    doctors = [{"id": i, "name": name, "branch": rng.choice(branches)} for i, name in rows]
    visits = [
        {"id": i, "doctor_id": rng.choice(doctors)["id"], "patient": patient, "day": rng.choice(DAYS)}
        for i, patient in zip(_ids(rng, 3), rng.sample(PEOPLE, 3), strict=True)
    ]
    return {"doctors": doctors, "visits": visits}


def _draw_clinic(rng: Random, api) -> dict:
    doctor, visit = rng.choice(api.doctors), rng.choice(api.visits)
    patient = rng.choice([p for p in PEOPLE if p not in [v["patient"] for v in api.visits]])
    new_day = rng.choice([day for day in DAYS if day != visit["day"]])
    drawn = {
        "doctor": doctor["name"],
        "branch": doctor["branch"],
        "patient": patient,
        "visit_day": rng.choice(DAYS),
    }
    return drawn | {"known": visit["patient"], "later": new_day}


WORLDS: dict[str, tuple[Callable[[Random, int], dict], Callable[[Random, object], dict]]] = {
    "Files": (_files, _draw_files),
    "Contacts": (_contacts, _draw_contacts),
    "Tickets": (_tickets, _draw_tickets),
    "Bank": (_bank, _draw_bank),
    "Calendar": (_calendar, _draw_calendar),
    "Shop": (_shop, _draw_shop),
    "Travel": (_travel, _draw_travel),
    "Home": (_home, _draw_home),
    "Library": (_library, _draw_library),
    "Garage": (_garage, _draw_garage),
    "Music": (_music, _draw_music),
    "Clinic": (_clinic, _draw_clinic),
}

GOALS = [
    # Files
    Goal(
        "Show me what is in {folder}.|List the files in {folder}.|What files are in {folder}?",
        "list_files folder",
    ),
    Goal(
        "Read {name} in {folder}.|What does {name} in {folder} say?|Open {name} from {folder} and read it.",
        "read_file folder name",
        "It says: {text}.",
        "Read {name} to me.|What does {name} say?",
        "Which folder is it in?",
        "It is in {folder}.|Look in {folder}.",
    ),
    Goal(
        "Save '{words}' as {new_name} in {folder}.|Write '{words}' to a file {new_name} in {folder}.",
        "write_file folder name=new_name text=words",
        "Saved.",
        "Save '{words}' in {folder}.|Write '{words}' to a file in {folder}.",
        "What should the file be called?",
        "Call it {new_name}.|The name is {new_name}.",
    ),
    Goal(
        "Move {name} from {folder} to {target}.|Put {name} out of {folder} into {target}.",
        "move_file name source=folder target",
        "Moved.",
        "Move {name} out of {folder}.|{name} should leave {folder}.",
        "Where should it go?",
        "To {target}.|Put it into {target}.",
    ),
    Goal("Delete {name} from {folder}.|Remove {name} in {folder}.", "delete_file folder name", "Deleted."),
    Goal(
        "Copy {name} from {folder} to {target}.|I want {name} from {folder} in {target} too.",
        "read_file folder name; write_file folder=target name text",
        "Copied.",
        "Make a copy of {name} from {folder}.|Copy {name} from {folder}.",
        "Where should the copy go?",
        "To {target}.|Put it into {target}.",
    ),
    Goal(
        "List {folder}, then rename {name} there to {new_name}.|"
        "Look into {folder} and call {name} {new_name} from now on.",
        "list_files folder; read_file folder name; write_file folder name=new_name text; "
        "delete_file folder name",
        "Renamed.",
    ),
    # Contacts, alone and with Files
    Goal(
        "Text {person} '{words}'.|Send {person} the message '{words}'.|Tell {person} '{words}' by message.",
        "find_phone person; send_message phone text=words",
        "Sent.",
        "Send {person} a message.|Text {person} for me.",
        "What should it say?",
        "It should say '{words}'.|Write '{words}'.",
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
        "Add {stranger} to my contacts.|Save the contact {stranger}.",
        "What is the number?",
        "It is {new_phone}.|The number is {new_phone}.",
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
        "Forward the last message from {sender}.|Pass on what {sender} wrote last.",
        "To whom?",
        "To {person}.|Send it to {person}.",
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
    # Tickets
    Goal(
        "Close the ticket '{open_title}'.|The ticket '{open_title}' is solved.",
        "find_tickets; close_ticket ticket_id=id",
    ),
    Goal(
        "Give the ticket '{open_title}' to {worker}.|{worker} takes the ticket '{open_title}'.",
        "find_tickets; assign_ticket ticket_id=id person=worker",
        "Assigned.",
        "Give the ticket '{open_title}' to somebody.|Somebody should take the ticket '{open_title}'.",
        "Who should take it?",
        "{worker}.|Give it to {worker}.",
    ),
    Goal(
        "Open a {priority} ticket '{new_title}'.|I need a new {priority} ticket '{new_title}'.",
        "open_ticket title=new_title priority",
        "Opened as {id}.",
        "Open a {priority} ticket.|I need a new {priority} ticket.",
        "What is the title?",
        "Call it '{new_title}'.|'{new_title}'.",
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
    # Bank
    Goal("How much is in {account}?|What is the balance of {account}?", "get_balance account", "{balance}."),
    Goal(
        "Move {coins} from {account} to {to}.|Transfer {coins} out of {account} into {to}.",
        "transfer source=account target=to amount=coins",
        "Moved.",
        "Move money from {account} to {to}.|Transfer something out of {account} into {to}.",
        "How much?",
        "{coins}.|Move {coins}.",
    ),
    Goal(
        "Pay the {payee} bill from {account}.|Use {account} to pay what I owe for {payee}.",
        "find_bill payee; pay_bill account payee amount",
        "Paid {amount}.",
        "Pay the {payee} bill.|Settle what I owe for {payee}.",
        "From which account?",
        "From {account}.|Use {account}.",
    ),
    Goal(
        "Move everything in {account} to {to}.|Empty {account} into {to}.",
        "get_balance account; transfer source=account target=to amount=balance",
        "Moved {balance}.",
    ),
    Goal("What do I owe for {payee}?|How high is the {payee} bill?", "find_bill payee", "{amount}."),
    # Calendar
    Goal("What is on {day}?|Show me the events of {day}.", "list_events day"),
    Goal(
        "Put '{new_event}' on {new_day} at {hour}.|Plan '{new_event}' for {new_day}, hour {hour}.",
        "add_event day=new_day hour title=new_event",
        "Planned.",
        "Put '{new_event}' on {new_day}.|Plan '{new_event}' for {new_day}.",
        "At what hour?",
        "At {hour}.|Hour {hour}.",
    ),
    Goal(
        "Move '{event}' from {day} to {new_day}.|'{event}' on {day} must go to {new_day}.",
        "list_events day; move_event event_id=id day=new_day",
        "Moved.",
        "Move '{event}' from {day} to another day.|'{event}' cannot stay on {day}.",
        "To which day?",
        "To {new_day}.|{new_day}.",
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
    # Shop
    Goal("What does the {item} cost?|Look up the price of the {item}.", "find_item name=item", "{price}."),
    Goal(
        "Put {quantity} of the {item} into the cart.|Add the {item} to my cart, {quantity} of it.",
        "find_item name=item; add_to_cart item_id quantity",
        "In the cart.",
        "Put some of the {item} into the cart.|Add the {item} to my cart, more than one.",
        "How many?",
        "{quantity}.|Take {quantity}.",
    ),
    Goal(
        "Order {quantity} of the {item} to {address}.|"
        "Buy the {item}, {quantity} of it, and send it to {address}.",
        "find_item name=item; add_to_cart item_id quantity; checkout address",
        "Ordered as {order_id}.",
        "Order {quantity} of the {item}.|Buy the {item}, {quantity} of it.",
        "To which address?",
        "To {address}.|Send it to {address}.",
    ),
    Goal(
        "Where is order {order}?|Is order {order} on its way?",
        "order_status order_id=order",
        "It is {status}.",
    ),
    Goal(
        "Cancel order {order}.|I do not want order {order} any more.",
        "cancel_order order_id=order",
        "Cancelled.",
    ),
    # Travel
    Goal(
        "What is a flight from {origin} to {destination}?|Find a flight to {destination} from {origin}.",
        "find_flight origin destination",
        "It costs {price}.",
    ),
    Goal(
        "Book {passenger} a flight from {origin} to {destination}.|"
        "{passenger} flies from {origin} to {destination}.",
        "find_flight origin destination; book_flight flight_id passenger",
        "Booked as {booking_id}.",
        "Book a flight from {origin} to {destination}.|Somebody flies from {origin} to {destination}.",
        "Who will fly?",
        "{passenger}.|It is for {passenger}.",
    ),
    Goal(
        "Cancel the booking of {booked}.|{booked} does not fly.",
        "find_booking passenger=booked; cancel_booking booking_id",
        "Cancelled.",
    ),
    Goal(
        "Cancel the booking of {booked} and book {booked} from {origin} to {destination}.",
        "find_booking passenger=booked; cancel_booking booking_id; find_flight origin destination; "
        "book_flight flight_id passenger=booked",
        "Changed.",
    ),
    # Home
    Goal(
        "How warm is the {room}?|What is the temperature of the {room}?", "get_temperature room", "{degrees}."
    ),
    Goal(
        "Heat the {room} to {degrees}.|Set the {room} to {degrees} degrees.",
        "set_heating room degrees",
        "Set.",
        "Heat the {room}.|Change the heating of the {room}.",
        "To how many degrees?",
        "{degrees}.|To {degrees} degrees.",
    ),
    Goal("Turn {switch} the light of the {room}.|Light {switch} in the {room}.", "set_light room on"),
    Goal("{act} the {door} door.|{act} the door {door}, please.", "set_door door state"),
    Goal(
        "Heat the {room} like the {other}.|The {room} should be as warm as the {other}.",
        "get_temperature room=other; set_heating room degrees",
        "Set to {degrees}.",
    ),
    # Library
    Goal("What did {author} write?|List the books by {author}.", "find_books author"),
    Goal(
        "Lend '{book}' by {author} to {member}.|{member} takes '{book}' by {author}.",
        "find_books author; lend_book book_id=id member",
        "Lent.",
        "Lend out '{book}' by {author}.|Somebody takes '{book}' by {author}.",
        "To whom?",
        "To {member}.|{member}.",
    ),
    Goal(
        "'{lent_book}' by {lent_author} is back.|Take back '{lent_book}' by {lent_author}.",
        "find_books author=lent_author; return_book book_id=id",
        "Returned.",
    ),
    Goal(
        "Who has '{lent_book}' by {lent_author}?|Find the holder of '{lent_book}' by {lent_author}.",
        "find_books author=lent_author; book_holder book_id=id",
        "{member}.",
    ),
    # Garage
    Goal("How much fuel has the {car}?|Read the fuel of the {car}.", "get_fuel car", "{litres} litres."),
    Goal(
        "Fill {litres} litres into the {car}.|The {car} gets {litres} litres.",
        "add_fuel car litres",
        "Filled.",
        "Fill up the {car}.|The {car} needs fuel.",
        "How many litres?",
        "{litres}.|Fill {litres} litres.",
    ),
    Goal(
        "Lend the {car} to {driver} and set its route to {city}.|{driver} drives the {car} to {city}.",
        "lend_car car driver; set_route car city",
        "Lent.",
        "Lend the {car} to {driver} and set its route.|{driver} drives the {car} somewhere.",
        "To which city?",
        "To {city}.|{city}.",
    ),
    Goal(
        "Fill as much into the {car} as the {other_car} has.|"
        "The {car} gets the litres that the {other_car} has.",
        "get_fuel car=other_car; add_fuel car litres",
        "Filled {litres}.",
    ),
    # Music
    Goal("What songs are by {artist}?|List the songs of {artist}.", "find_songs artist"),
    Goal(
        "Add '{song}' by {artist} to {playlist}.|Put '{song}' by {artist} on the playlist {playlist}.",
        "find_songs artist; add_song playlist song_id=id",
        "Added.",
        "Add '{song}' by {artist} to a playlist.|Put '{song}' by {artist} on one of my playlists.",
        "Which playlist?",
        "{playlist}.|The one called {playlist}.",
    ),
    Goal(
        "Make a playlist {new_playlist} with '{song}' by {artist}.|"
        "Start the playlist {new_playlist} with '{song}' by {artist}.",
        "make_playlist playlist=new_playlist; find_songs artist; add_song playlist=new_playlist song_id=id",
        "Made.",
    ),
    Goal(
        "Clear the playlist {playlist}.|Empty the playlist {playlist}.", "clear_playlist playlist", "Cleared."
    ),
    # Clinic
    Goal("Which doctors treat {branch}?|List the doctors for {branch}.", "find_doctors branch"),
    Goal(
        "Book {patient} a visit at {doctor} for {branch} on {visit_day}.|"
        "{patient} sees {doctor}, {branch}, on {visit_day}.",
        "find_doctors branch; book_visit doctor_id=id patient day=visit_day",
        "Booked as {visit_id}.",
        "Book {patient} a visit at {doctor} for {branch}.|{patient} sees {doctor}, {branch}.",
        "On which day?",
        "On {visit_day}.|{visit_day}.",
    ),
    Goal(
        "When is the visit of {known}?|Look up the visit of {known}.", "find_visit patient=known", "On {day}."
    ),
    Goal(
        "Move the visit of {known} to {later}.|{known} comes on {later} instead.",
        "find_visit patient=known; move_visit visit_id day=later",
        "Moved.",
        "Move the visit of {known}.|{known} must come on another day.",
        "To which day?",
        "To {later}.|{later}.",
    ),
    Goal(
        "Cancel the visit of {known}.|{known} does not come.",
        "find_visit patient=known; cancel_visit visit_id",
        "Cancelled.",
    ),
]

OPENINGS = ("", "", "", "Please help: ", "Hello! ", "One thing: ")
JOINTS = (" Then: ", " Also: ", " And: ")
NO_TOOL = ("I have no tool for that.", "A tool for that is missing.")
OFFERS = ("You can use this tool now:", "Here is a tool for it:")


# -------------------------------------------------------------------------------------------------- generator
@dataclass
class Scenario:
    """What all twins of one index share: the goals per turn with their bindings, the turn that twins tamper
    with, the tools shown, and the seed of every choice of words."""

    goals: list[list[tuple[Goal, dict]]]
    missing: int
    tools: list[str]
    seed: str


class Rejected(Exception):
    """The dice gave no valid scenario; draw again."""


def generate(pool: str, name: str) -> dict[str, Task]:
    """The four twins of one index, {category: Task}: a pure function of (pool, name).

    Every twin is honest: its ground truth earns reward 1, and 0 with any one call dropped or altered.
    """
    for attempt in range(1000):
        seed = f"{pool}/{name}/{attempt}"
        rng = random.Random(seed)
        apis = [api for api, cls in API_CLASSES.items() if cls.pool == pool]
        chosen = rng.sample(apis, min(len(apis), rng.choice([1, 2, 2, 3])))
        state = {api: WORLDS[api][0](rng, SMALL) for api in chosen}
        large = {api: WORLDS[api][0](rng, LARGE) for api in chosen}
        try:
            scenario = _scenario(rng, state, seed)
            tasks = {
                category: _twin(scenario, state, category, name)
                for category in ("base", "miss_func", "miss_param")
            }
            wide = {api: _enlarge(state[api], large[api]) for api in state}
            tasks["long_context"] = _twin(scenario, wide, "long_context", name)
        except (Rejected, IndexError):  # IndexError: nothing to choose from, e.g. every bill is paid
            continue
        if all(_honest(task) for task in tasks.values()):
            return tasks
    raise RuntimeError(f"no valid scenario for {pool}/{name}")


def _scenario(rng: Random, state: dict, seed: str) -> Scenario:
    world = Task("", "base", state, [], []).new_world()
    fitting = [goal for goal in GOALS if goal.apis() <= set(world)]
    turns = []
    for _ in range(rng.choices([1, 2, 3], [5, 2, 1])[0]):
        goals = []
        for goal in rng.sample(fitting, min(len(fitting), rng.choices([1, 2], [4, 1])[0])):
            if sum(len(g.steps()) for g, _ in goals) + len(goal.steps()) <= MAX_TURN_CALLS:
                goals.append((goal, _draw(rng, goal, world)))
                _play(goal, goals[-1][1], world)
        turns.append(goals)
    tools = [[tool for goal, _ in goals for tool, _ in goal.steps()] for goals in turns]
    used = list(dict.fromkeys(sum(tools, [])))
    able = [
        i
        for i, goals in enumerate(turns)
        if any(goal.vague for goal, _ in goals) and tools[i][-1] not in sum(tools[:i], [])
    ]
    if not able or len(used) > 8 or not set(LISTING) & set(used):
        raise Rejected
    others = [tool for api in world for tool in method_names(API_CLASSES[api]) if tool not in used]
    wanted = max(0, rng.randint(4, 7) - len(used))
    shown = used + rng.sample(others, min(wanted, len(others)))
    rng.shuffle(shown)
    return Scenario(turns, rng.choice(able), shown, seed)


def _draw(rng: Random, goal: Goal, world: dict) -> dict:
    bindings = {"words": _title(rng)}
    for api in sorted(goal.apis()):
        bindings |= WORLDS[api][1](rng, world[api])
    return bindings


def _play(goal: Goal, bindings: dict, world: dict) -> tuple[list[Call], dict]:
    """Execute a goal's calls; every result extends the bindings (a list: by the record they name)."""
    bindings, calls = dict(bindings), []
    for tool, arguments in goal.steps():
        call = Call(tool, {name: bindings[binding] for name, binding in arguments.items()})
        result = call_tool(world, call)
        if isinstance(result, dict) and "error" in result:
            raise Rejected
        if isinstance(result, list) and result and isinstance(result[0], dict):
            wanted = [bindings[key] for key in NAMED if "{" + key + "}" in goal.says]
            named = [row for row in result if row.get("title", row.get("name")) in wanted]
            if len(named) != len(wanted):
                raise Rejected
            result = named[0] if named else {}
        bindings |= result if isinstance(result, dict) else {}
        calls.append(call)
    return calls, bindings


NAMED = (
    "open_title",
    "event",
    "book",
    "lent_book",
    "song",
    "doctor",
)  # bindings that name a record in a list


def _enlarge(small: dict, large: dict) -> dict:
    """`small` with the records of `large` that collide with none of its keys, ids, titles, names and people.

    New records join the days, authors, artists and branches of `small`, and the new files its folders, so
    that the listings of the ordinary world grow.
    """
    merged = {}
    for name, value in small.items():
        if isinstance(value, dict):
            merged[name] = {**large[name], **value}
            for (key, inner), more in zip(value.items(), large[name].values(), strict=False):
                if isinstance(inner, dict):
                    merged[name][key] = {**more, **inner}
        else:
            unique = [{(key, row[key]) for key in UNIQUE if key in row} for row in value]
            extra = [
                row for row in large[name] if not set().union(*unique) & {(k, row.get(k)) for k in UNIQUE}
            ]
            for i, row in enumerate(extra):
                row |= {key: value[i % len(value)][key] for key in GROUPS if key in row}
            merged[name] = value + extra
    return merged


UNIQUE = ("id", "title", "name", "person", "passenger", "patient")
GROUPS = ("day", "author", "artist", "branch")


def _twin(scenario: Scenario, state: dict, category: str, name: str) -> Task:
    """One category of a scenario: its words and calls on the given world."""
    rng = random.Random(scenario.seed + "/words")
    task = Task(f"{name}-{category}", category, copy.deepcopy(state), list(scenario.tools), [])
    world = task.new_world()
    for i, goals in enumerate(scenario.goals):
        said, calls, replies = [], [], []
        tampered = i == scenario.missing and category in ("miss_func", "miss_param")
        vague = next((goal for goal, _ in goals if goal.vague), None) if tampered else None
        question = answer = ""
        for goal, bindings in goals:
            before = bindings
            words = rng.choice(goal.says.split("|")).format(**before)
            if goal is vague and category == "miss_param":
                words = rng.choice(goal.vague.split("|")).format(**before)
                question, answer = goal.question, rng.choice(goal.answer.split("|")).format(**before)
            said.append(words)
            played, bindings = _play(goal, before, world)
            calls += played
            replies.append(goal.reply.format(**bindings))
        text = rng.choice(OPENINGS) + rng.choice(JOINTS).join(said)
        offers: list[str] = []
        if tampered:
            if category == "miss_func":
                hidden = calls[-1].name
                task.tools.remove(hidden)
                question, answer, offers = rng.choice(NO_TOOL), rng.choice(OFFERS), [hidden]
            task.turns.append(Turn(text, [], question))
            text = answer
        task.turns.append(Turn(text, calls, " ".join(dict.fromkeys(replies)), offers))
    return task


def _honest(task: Task) -> bool:
    return replay(task, [turn.calls for turn in task.turns]) == 1 and not any(
        replay(task, calls) for calls in mutations(task)
    )


# ---------------------------------------------------------------------------------------------------- similar
def similar(
    task: Task, calls: list[Call], others: Sequence[Task], seed: str, count: int = 3
) -> tuple[list[Task], Task | None]:
    """Scenarios to compare a turn with (Hao et al. 2026, §4, PRS): (similar ones, one that looks alike).

    `calls` are the ground truth of a turn of `task`. The similar ones are one-turn tasks whose solution takes
    the same tools in the same order, in other worlds and with other values; the one that looks alike touches
    the same classes and takes other tools. They are made from the train pool's goals; where none of these
    fits, they are turns of `others` (tasks the run trains on), and there may be fewer of them. All of them
    replay to reward 1. A pure function of its arguments.
    """
    rng = random.Random(seed)
    goals = [goal for goal in GOALS if goal.pool() == "train"]
    ours = {task.owner(call.name) for call in calls} <= API_CLASSES.keys()
    fitting = [goal for goal in goals if ours and _occurs(_tools(goal), [call.name for call in calls])]
    if not fitting:
        return _borrowed(task, calls, others, rng, count)
    goal = max(fitting, key=lambda goal: len(_tools(goal)))
    fresh = [_fresh(goal, f"similar-{k}", f"similar/{seed}/{k}") for k in range(count)]
    rivals = [other for other in goals if other.apis() & goal.apis() and _tools(other) != _tools(goal)]
    rivals = rng.sample(rivals, len(rivals))
    rival = max(rivals, key=lambda other: _closeness(owner_of, _tools(other), _tools(goal)), default=None)
    return [task for task in fresh if task], rival and _fresh(rival, "alike", f"alike/{seed}")


def _tools(goal: Goal) -> list[str]:
    return [tool for tool, _ in goal.steps()]


def _occurs(part: list[str], whole: list[str]) -> bool:
    """Whether `part` stands in `whole` without a gap."""
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def _closeness(
    owner: Callable[[str], str | None], tools: list[str], wanted: list[str]
) -> tuple[int, bool, int]:
    """Sorts tool sequences by shared tools, then same classes, then similar length."""
    same_classes = set(map(owner, tools)) == set(map(owner, wanted))
    return len(set(tools) & set(wanted)), same_classes, -abs(len(tools) - len(wanted))


def _fresh(goal: Goal, name: str, seed: str) -> Task | None:
    """An honest one-turn task for the goal, in a world of its classes; None if the dice never give one."""
    for attempt in range(100):
        rng = random.Random(f"{seed}/{attempt}")
        state = {api: WORLDS[api][0](rng, SMALL) for api in sorted(goal.apis())}
        tools = [tool for api in state for tool in method_names(API_CLASSES[api])]
        try:
            drawn = _draw(rng, goal, Task("", "base", state, [], []).new_world())
            task = _twin(Scenario([[(goal, drawn)]], -1, tools, f"{seed}/{attempt}"), state, "base", name)
        except (Rejected, IndexError):
            continue
        if _honest(task):
            return task
    return None


def _borrowed(
    task: Task, calls: list[Call], others: Sequence[Task], rng: Random, count: int
) -> tuple[list[Task], Task | None]:
    """`similar` from the turns of other tasks: the same tools, best in the same order; then the closest."""
    wanted, seen, owner = [call.name for call in calls], {str(calls)}, task.owner
    classes = set(map(owner, wanted))
    same, rivals = [], []
    for other in rng.sample(others, len(others)):
        for i, turn in enumerate(other.turns):
            tools = [call.name for call in turn.calls]
            if str(turn.calls) in seen or not set(map(other.owner, tools)) & classes:
                continue
            seen.add(str(turn.calls))  # twins share their turns
            if set(tools) == set(wanted):
                same.append((tools != wanted, other, i))
            else:
                rivals.append((_closeness(owner, tools, wanted), other, i))
    same.sort(key=lambda row: row[0])
    rival = max(rivals, key=lambda row: row[0], default=None)
    return [_alone(task, i) for _, task, i in same[:count]], rival and _alone(*rival[1:])


def wish(task: Task, i: int) -> str:
    """What the user has asked for by turn i and not got: the user messages since the last turn with calls."""
    first = max((k + 1 for k in range(i) if task.turns[k].calls), default=0)
    return " ".join(turn.user for turn in task.turns[first : i + 1])


def _alone(task: Task, i: int) -> Task:
    """Turn i of a task, with its whole wish, as a task of its own; the task itself if the world before the
    turn cannot be made anew or the turn does not replay in it."""
    try:
        alone = task.turn_alone(i, wish(task, i))
        return alone if replay(alone, [turn.calls for turn in alone.turns]) == 1 else task
    except TypeError:
        return task


# ----------------------------------------------------------------------------------------------------- splits
def make_split(split: str) -> list[Task]:
    """The tasks of a committed split, in file order; train and test are 100 indices each of one pool."""
    pool = split if split in ("foreign", "ood") else "train"
    wanted = ("base", "miss_func", "miss_param", "long_context")
    wanted = wanted[:3] if split in ("train", "foreign") else wanted
    families = [generate(pool, f"{split}-{i:03d}") for i in range(100)]
    return [family[category] for family in families for category in wanted]


def is_bfcl(name: str) -> bool:
    """Whether a name of tasks is one of the benchmark's."""
    return name.partition(":")[0] == BFCL


def load_tasks(name_or_path: str, official: bool = False) -> list[Task]:
    """Tasks of a committed split (`train`, `test`, `foreign`, `ood`), of the BFCL benchmark
    (`bfcl[:category][:train|:test]`; official: under its own rules, see `BfclTask`) or of a JSONL file.

    Raises FileNotFoundError with the path and the known names, ValueError with file and line for a malformed
    line or a task whose ground truth does not earn reward 1.
    """
    if is_bfcl(name_or_path):
        return load_bfcl(name_or_path, official)
    if official:
        raise ValueError(f"--bfcl-official says nothing about {name_or_path}")
    path = TASK_DIR / f"{name_or_path}.jsonl" if name_or_path in SPLITS else Path(name_or_path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no task file {path}; give one of {TASK_NAMES}")
    tasks: dict[str, Task] = {}
    for number, line in read_lines(path):
        try:
            task = Task.from_json(line)
            if task.id in tasks:
                raise ValueError(f"two tasks share an id, {task.id!r}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        tasks[task.id] = task
    if not tasks:
        raise ValueError(f"{path} holds no task")
    return list(tasks.values())


def subset(tasks: list[Task], count: int) -> list[Task]:
    """A fixed random sample of `count` tasks in their order; all of them if there are no more."""
    chosen = random.Random(0).sample(range(len(tasks)), min(count, len(tasks)))
    return [tasks[i] for i in sorted(chosen)]


def in_epochs(tasks: Sequence[Task], seed: str, places: range) -> list[Task]:
    """The tasks at some places of an endless sequence: one seeded shuffle of all tasks after another."""
    chosen, order, shuffled = [], [], None
    for place in places:
        epoch, index = divmod(place, len(tasks))
        if epoch != shuffled:
            order, shuffled = list(range(len(tasks))), epoch
            random.Random(f"{seed}/{epoch}").shuffle(order)
        chosen.append(tasks[order[index]])
    return chosen


def save_tasks(tasks: list[Task], path: Path) -> None:
    """Write tasks as JSONL; `load_tasks(path)` gives them back. Raises OSError with the path."""
    write_lines(path, (task.to_json() for task in tasks))


@command
def main(argv: list[str] | None = None) -> int:
    """The command: 0, or 2 when refused."""
    about = "Write tasks as JSONL rows that other trainers read (verl, TRL)."
    parser = argparse.ArgumentParser(prog="python -m nanotoolrl.tasks", description=about)
    parser.add_argument("--export", metavar="FILE", required=True, help="where to")
    parser.add_argument("--tasks", default="train", help=f"{TASK_NAMES} (default: train)")
    parser.add_argument(
        "--format", default="hermes", choices=tuple(FORMATS), help="syntax of calls (default: hermes)"
    )
    args = parser.parse_args(argv)
    try:
        print(export(load_tasks(args.tasks), Path(args.export), args.format))
    except (OSError, ValueError) as error:
        print(f"tasks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
