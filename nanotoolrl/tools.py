"""The API classes a model may call, and the place to add one.

A class is plain typed Python. Its public methods are the tools: the signature gives name, types, required
parameters, choices (`Literal`) and defaults (signatures.py lists the types); the docstring's first line is
the description, and every following line `parameter: text` describes one parameter. Its dataclass fields are
its state: JSON-like values, comparable with `==`, copied with `copy.deepcopy`. A method answers with a
JSON-like value, or raises `ToolError` with a sentence that helps the model to correct itself. What is not so
is refused with a TypeError when the class is defined. Nothing else in the repository needs to know a new
class (README, "Add a tool").

Classes live in three disjoint pools: `train` (reinforcement learning sees them), `foreign` (supervised data
from another domain) and `ood` (held out).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from nanotoolrl.world.signatures import tool_schema

API_CLASSES: dict[str, type["API"]] = {}
POOLS = ("train", "foreign", "ood")
Day = Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


class ToolError(Exception):
    """A call failed for a reason the model should read; the text is the observation."""


class API:
    """Base of the tool classes: subclasses register themselves under their name, in one of `POOLS`."""

    pool = ""

    def __init_subclass__(cls) -> None:
        if cls.pool not in POOLS:
            raise TypeError(f"{cls.__name__}.pool is {cls.pool!r}; it must be one of {', '.join(POOLS)}")
        _check_members(cls)
        _check_names(cls)
        for name, method in _tools(cls).items():
            tool_schema(cls.__name__, name, method)
        API_CLASSES[cls.__name__] = cls
        owner_of.cache_clear()
        schema.cache_clear()


def _check_members(cls: type[API]) -> None:
    """Raise TypeError for a public member that looks like a tool and is none."""
    for base in cls.__mro__:
        fields = inspect.get_annotations(base)
        for name, value in vars(base).items() if base not in (API, object) else ():
            place = f"{cls.__name__}.{name}"
            if name.startswith("_"):
                continue
            if inspect.isfunction(value):
                if base is not cls:
                    raise TypeError(f"{place} is inherited from {base.__name__}; a class has its own tools")
                if name in fields or not name.isascii():
                    raise TypeError(f"{place}: the name of a tool must be ASCII, and no field's")
            elif name not in fields and (callable(value) or hasattr(value, "__get__")):
                kind = type(value).__name__
                raise TypeError(f"{place} is a {kind}; a tool is a plain method, other names begin with _")


def _check_names(cls: type[API]) -> None:
    """Raise TypeError if another class has the name of this one or of one of its tools."""
    ours = _tools(cls)
    for name, other in API_CLASSES.items():
        theirs = _tools(other)
        if name == cls.__name__:
            if theirs != ours:  # `@dataclass(slots=True)` makes the class anew, with the same tools
                raise TypeError(f"there is a class {name} already (del API_CLASSES[{name!r}] forgets it)")
        elif shared := ours.keys() & theirs.keys():
            raise TypeError(f"{cls.__name__}.{min(shared)}: {name} has a tool of this name already")


def _tools(cls: type[API]) -> dict[str, Callable]:
    return {
        name: value
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }


def method_names(cls: type[API]) -> list[str]:
    """Names of the tools a class offers, in the order of its source."""
    return list(_tools(cls))


@cache
def owner_of(tool: str) -> str | None:
    """Name of the class that has the tool, or None. Tool names are unique over all classes."""
    return next((name for name, cls in API_CLASSES.items() if tool in method_names(cls)), None)


@cache
def schema(tool: str) -> dict:
    """JSON schema of one tool, in the layout of OpenAI and Qwen tool lists. It is everybody's: copy it before
    you change it.

    Example: `schema("delete_file")` has name "delete_file", a description, and parameters of type "object"
    with properties folder and name, both required. Raises KeyError for an unknown tool.
    """
    owner = owner_of(tool)
    if owner is None:
        raise KeyError(f"no class has a tool {tool!r}")
    return tool_schema(owner, tool, _tools(API_CLASSES[owner])[tool])


def _known(kind: str, key: object, names: list | dict, place: str = "") -> None:
    """Raise ToolError unless `key` is among `names`, saying what there is."""
    if key not in names:
        shown = ", ".join(str(name) for name in list(names)[:6]) + (", ..." if len(names) > 6 else "")
        raise ToolError(f"no {kind} '{key}'{place}; there is {shown or 'none'}")


def _record(records: list[dict], kind: str, key: object, by: str = "id") -> dict:
    """The record whose field `by` equals `key`; raises ToolError with the known keys."""
    _known(kind, key, [record[by] for record in records])
    return next(record for record in records if record[by] == key)


def _new_id(records: list[dict]) -> int:
    return max((record["id"] for record in records), default=10) + 1


# ------------------------------------------------------------------------------------------------ pool: train


@dataclass
class Files(API):
    """Folders of text files."""

    pool = "train"
    folders: dict[str, dict[str, str]] = field(default_factory=dict)

    def _folder(self, folder: str) -> dict[str, str]:
        _known("folder", folder, self.folders)
        return self.folders[folder]

    def list_files(self, folder: str) -> list[str]:
        """List the files in a folder."""
        return sorted(self._folder(folder))

    def read_file(self, folder: str, name: str) -> dict:
        """Read the text of a file."""
        _known("file", name, self._folder(folder), f" in '{folder}'")
        return {"text": self.folders[folder][name]}

    def write_file(self, folder: str, name: str, text: str) -> str:
        """Write a text file, replacing an old one."""
        self._folder(folder)[name] = text
        return "written"

    def move_file(self, name: str, source: str, target: str) -> str:
        """Move a file to another folder."""
        _known("file", name, self._folder(source), f" in '{source}'")
        self._folder(target)
        self.folders[target][name] = self.folders[source].pop(name)
        return "moved"

    def delete_file(self, folder: str, name: str) -> str:
        """Delete a file."""
        _known("file", name, self._folder(folder), f" in '{folder}'")
        del self.folders[folder][name]
        return "deleted"


@dataclass
class Contacts(API):
    """An address book and its messages."""

    pool = "train"
    people: dict[str, str] = field(default_factory=dict)
    inbox: list[dict] = field(default_factory=list)
    sent: list[dict] = field(default_factory=list)

    def find_phone(self, person: str) -> dict:
        """Find a person's phone number."""
        _known("contact", person, self.people)
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
        ticket = _record(self.tickets, "ticket", ticket_id)
        return {"owner": ticket["owner"], "priority": ticket["priority"]}

    def open_ticket(self, title: str, priority: Literal["low", "normal", "high"] = "normal") -> dict:
        """Open a new ticket."""
        number = _new_id(self.tickets)
        self.tickets.append(
            {"id": number, "title": title, "priority": priority, "status": "open", "owner": "nobody"}
        )
        return {"id": number}

    def close_ticket(self, ticket_id: int) -> str:
        """Close a ticket."""
        ticket = _record(self.tickets, "ticket", ticket_id)
        if ticket["status"] == "closed":
            raise ToolError(f"ticket {ticket_id} is closed already")
        ticket["status"] = "closed"
        return "closed"

    def assign_ticket(self, ticket_id: int, person: str) -> str:
        """Give a ticket to a person."""
        _record(self.tickets, "ticket", ticket_id)["owner"] = person
        return "assigned"


@dataclass
class Bank(API):
    """Accounts and bills of one customer; money in whole coins."""

    pool = "train"
    accounts: dict[str, int] = field(default_factory=dict)
    bills: dict[str, int] = field(default_factory=dict)

    def _take(self, account: str, amount: int) -> None:
        _known("account", account, self.accounts)
        if amount <= 0:
            raise ToolError(f"the amount must be positive, not {amount}")
        if self.accounts[account] < amount:
            raise ToolError(f"'{account}' holds only {self.accounts[account]}")
        self.accounts[account] -= amount

    def get_balance(self, account: str) -> dict:
        """Read the balance of an account."""
        _known("account", account, self.accounts)
        return {"balance": self.accounts[account]}

    def transfer(self, source: str, target: str, amount: int) -> str:
        """Move money between accounts."""
        _known("account", target, self.accounts)
        if source == target:
            raise ToolError(f"source and target are both '{source}'")
        self._take(source, amount)
        self.accounts[target] += amount
        return "transferred"

    def find_bill(self, payee: str) -> dict:
        """Find what is owed to a payee."""
        _known("bill from", payee, self.bills)
        return {"amount": self.bills[payee]}

    def pay_bill(self, account: str, payee: str, amount: int) -> str:
        """Pay a bill in full from an account."""
        _known("bill from", payee, self.bills)
        if amount != self.bills[payee]:
            raise ToolError(f"the bill from '{payee}' is not {amount}; look it up with find_bill")
        self._take(account, amount)
        del self.bills[payee]
        return "paid"


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
        return {"hour": _record(self.events, "event", event_id)["hour"]}

    def add_event(self, day: Day, hour: int, title: str) -> dict:
        """Add an event to a day.
        hour: full hour, 0 to 23
        """
        if not 0 <= hour <= 23:
            raise ToolError(f"the hour must be 0 to 23, not {hour}")
        number = _new_id(self.events)
        self.events.append({"id": number, "day": day, "hour": hour, "title": title})
        return {"id": number}

    def move_event(self, event_id: int, day: Day) -> str:
        """Move an event to another day."""
        _record(self.events, "event", event_id)["day"] = day
        return "moved"

    def cancel_event(self, event_id: int) -> str:
        """Cancel an event."""
        self.events.remove(_record(self.events, "event", event_id))
        return "cancelled"


@dataclass
class Shop(API):
    """A shop with one cart."""

    pool = "train"
    items: list[dict] = field(default_factory=list)
    cart: list[dict] = field(default_factory=list)
    orders: list[dict] = field(default_factory=list)

    def find_item(self, name: str) -> dict:
        """Find number and price of an item."""
        item = _record(self.items, "item", name, by="name")
        return {"item_id": item["id"], "price": item["price"]}

    def add_to_cart(self, item_id: int, quantity: int = 1) -> str:
        """Put an item into the cart."""
        _record(self.items, "item", item_id)
        if quantity < 1:
            raise ToolError(f"the quantity must be at least 1, not {quantity}")
        self.cart.append({"item_id": item_id, "quantity": quantity})
        return "in cart"

    def checkout(self, address: str) -> dict:
        """Order what is in the cart to an address."""
        if not self.cart:
            raise ToolError("the cart is empty; fill it with add_to_cart")
        number = _new_id(self.orders)
        self.orders.append({"id": number, "address": address, "items": self.cart, "status": "packed"})
        self.cart = []
        return {"order_id": number}

    def order_status(self, order_id: int) -> dict:
        """Read the status of an order."""
        return {"status": _record(self.orders, "order", order_id)["status"]}

    def cancel_order(self, order_id: int) -> str:
        """Cancel an order."""
        order = _record(self.orders, "order", order_id)
        if order["status"] == "cancelled":
            raise ToolError(f"order {order_id} is cancelled already")
        order["status"] = "cancelled"
        return "cancelled"


# ---------------------------------------------------------------------------------------------- pool: foreign


@dataclass
class Travel(API):
    """Flights and their bookings."""

    pool = "foreign"
    flights: list[dict] = field(default_factory=list)
    bookings: list[dict] = field(default_factory=list)

    def find_flight(self, origin: str, destination: str) -> dict:
        """Find a flight between two cities."""
        for flight in self.flights:
            if (flight["origin"], flight["destination"]) == (origin, destination):
                return {"flight_id": flight["id"], "price": flight["price"]}
        ways = ", ".join(f"{f['origin']} to {f['destination']}" for f in self.flights[:4])
        raise ToolError(f"no flight from '{origin}' to '{destination}'; there is {ways or 'none'}")

    def book_flight(self, flight_id: int, passenger: str) -> dict:
        """Book a flight for a passenger."""
        _record(self.flights, "flight", flight_id)
        number = _new_id(self.bookings)
        self.bookings.append({"id": number, "flight_id": flight_id, "passenger": passenger})
        return {"booking_id": number}

    def find_booking(self, passenger: str) -> dict:
        """Find the booking of a passenger."""
        return {"booking_id": _record(self.bookings, "booking for", passenger, by="passenger")["id"]}

    def cancel_booking(self, booking_id: int) -> str:
        """Cancel a booking."""
        self.bookings.remove(_record(self.bookings, "booking", booking_id))
        return "cancelled"


@dataclass
class Home(API):
    """A house with heating, lights and doors."""

    pool = "foreign"
    rooms: dict[str, dict] = field(default_factory=dict)
    doors: dict[str, str] = field(default_factory=dict)

    def _room(self, room: str) -> dict:
        _known("room", room, self.rooms)
        return self.rooms[room]

    def get_temperature(self, room: str) -> dict:
        """Read the temperature of a room."""
        return {"degrees": self._room(room)["degrees"]}

    def set_heating(self, room: str, degrees: int) -> str:
        """Set the heating of a room.
        degrees: Celsius, 5 to 30
        """
        if not 5 <= degrees <= 30:
            raise ToolError(f"the heating goes from 5 to 30 degrees, not {degrees}")
        self._room(room)["degrees"] = degrees
        return "set"

    def set_light(self, room: str, on: bool) -> str:
        """Switch the light of a room."""
        self._room(room)["light"] = on
        return "switched"

    def set_door(self, door: str, state: Literal["locked", "open"]) -> str:
        """Lock or open a door."""
        _known("door", door, self.doors)
        self.doors[door] = state
        return state


@dataclass
class Library(API):
    """Books and their borrowers."""

    pool = "foreign"
    books: list[dict] = field(default_factory=list)

    def find_books(self, author: str) -> list[dict]:
        """List the books of an author."""
        _known("author", author, sorted({book["author"] for book in self.books}))
        return [{"title": b["title"], "id": b["id"]} for b in self.books if b["author"] == author]

    def book_holder(self, book_id: int) -> dict:
        """Read who has a book."""
        return {"member": _record(self.books, "book", book_id)["member"]}

    def lend_book(self, book_id: int, member: str) -> str:
        """Lend a book to a member."""
        book = _record(self.books, "book", book_id)
        if book["member"] != "nobody":
            raise ToolError(f"book {book_id} is lent to {book['member']}")
        book["member"] = member
        return "lent"

    def return_book(self, book_id: int) -> str:
        """Take back a book."""
        book = _record(self.books, "book", book_id)
        if book["member"] == "nobody":
            raise ToolError(f"book {book_id} is not lent")
        book["member"] = "nobody"
        return "returned"


# -------------------------------------------------------------------------------------------------- pool: ood


@dataclass
class Garage(API):
    """The cars of a family."""

    pool = "ood"
    cars: dict[str, dict] = field(default_factory=dict)

    def _car(self, car: str) -> dict:
        _known("car", car, self.cars)
        return self.cars[car]

    def get_fuel(self, car: str) -> dict:
        """Read how much fuel a car has."""
        return {"litres": self._car(car)["litres"]}

    def add_fuel(self, car: str, litres: int) -> str:
        """Fill fuel into a car."""
        if not 1 <= litres <= 80:
            raise ToolError(f"a filling is 1 to 80 litres, not {litres}")
        self._car(car)["litres"] += litres
        return "filled"

    def set_route(self, car: str, city: str) -> str:
        """Set the route of a car to a city."""
        self._car(car)["route"] = city
        return "route set"

    def lend_car(self, car: str, driver: str) -> str:
        """Lend a car to a driver."""
        self._car(car)["driver"] = driver
        return "lent"


@dataclass
class Music(API):
    """Songs and playlists."""

    pool = "ood"
    songs: list[dict] = field(default_factory=list)
    playlists: dict[str, list[int]] = field(default_factory=dict)

    def find_songs(self, artist: str) -> list[dict]:
        """List the songs of an artist."""
        _known("artist", artist, sorted({song["artist"] for song in self.songs}))
        return [{"title": song["title"], "id": song["id"]} for song in self.songs if song["artist"] == artist]

    def make_playlist(self, playlist: str) -> str:
        """Make an empty playlist."""
        if playlist in self.playlists:
            raise ToolError(f"playlist '{playlist}' exists already")
        self.playlists[playlist] = []
        return "made"

    def add_song(self, playlist: str, song_id: int) -> str:
        """Add a song to a playlist."""
        _known("playlist", playlist, self.playlists)
        _record(self.songs, "song", song_id)
        self.playlists[playlist].append(song_id)
        return "added"

    def clear_playlist(self, playlist: str) -> str:
        """Remove all songs from a playlist."""
        _known("playlist", playlist, self.playlists)
        self.playlists[playlist] = []
        return "cleared"


@dataclass
class Clinic(API):
    """Doctors and visits."""

    pool = "ood"
    doctors: list[dict] = field(default_factory=list)
    visits: list[dict] = field(default_factory=list)

    def find_doctors(self, branch: str) -> list[dict]:
        """List the doctors of a branch of medicine."""
        _known("branch", branch, sorted({doctor["branch"] for doctor in self.doctors}))
        return [
            {"name": doctor["name"], "id": doctor["id"]}
            for doctor in self.doctors
            if doctor["branch"] == branch
        ]

    def book_visit(self, doctor_id: int, patient: str, day: Day) -> dict:
        """Book a visit for a patient."""
        _record(self.doctors, "doctor", doctor_id)
        number = _new_id(self.visits)
        self.visits.append({"id": number, "doctor_id": doctor_id, "patient": patient, "day": day})
        return {"visit_id": number}

    def find_visit(self, patient: str) -> dict:
        """Find the visit of a patient."""
        visit = _record(self.visits, "visit of", patient, by="patient")
        return {"visit_id": visit["id"], "day": visit["day"]}

    def move_visit(self, visit_id: int, day: Day) -> str:
        """Move a visit to another day."""
        _record(self.visits, "visit", visit_id)["day"] = day
        return "moved"

    def cancel_visit(self, visit_id: int) -> str:
        """Cancel a visit."""
        self.visits.remove(_record(self.visits, "visit", visit_id))
        return "cancelled"
