"""Flights and bookings."""

from dataclasses import dataclass, field
from random import Random

from nanotoolrl.world.api import API, ToolError, new_id, record
from nanotoolrl.world.goals import Goal, register
from nanotoolrl.world.words import CITIES, PEOPLE, ids


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
        record(self.flights, "flight", flight_id)
        number = new_id(self.bookings)
        self.bookings.append({"id": number, "flight_id": flight_id, "passenger": passenger})
        return {"booking_id": number}

    def find_booking(self, passenger: str) -> dict:
        """Find the booking of a passenger."""
        return {"booking_id": record(self.bookings, "booking for", passenger, by="passenger")["id"]}

    def cancel_booking(self, booking_id: int) -> str:
        """Cancel a booking."""
        self.bookings.remove(record(self.bookings, "booking", booking_id))
        return "cancelled"


def world(rng: Random, size: int) -> dict:
    ways = rng.sample([(a, b) for a in CITIES for b in CITIES if a != b], size)
    rows = zip(ids(rng, size), ways, strict=True)
    flights = [{"id": i, "origin": a, "destination": b, "price": rng.randint(40, 400)} for i, (a, b) in rows]
    passengers = rng.sample(PEOPLE, 3)
    return {
        "flights": flights,
        "bookings": [
            {"id": i, "flight_id": rng.choice(flights)["id"], "passenger": p}
            for i, p in zip(ids(rng, 3), passengers, strict=True)
        ],
    }


def draw(rng: Random, api: Travel) -> dict:
    flight, booked = rng.choice(api.flights), [booking["passenger"] for booking in api.bookings]
    passenger = rng.choice([p for p in PEOPLE if p not in booked])
    drawn = {"origin": flight["origin"], "destination": flight["destination"], "passenger": passenger}
    return drawn | {"booked": rng.choice(booked)}


GOALS = [
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
        vague="Book a flight from {origin} to {destination}.|Somebody flies from {origin} to {destination}.",
        question="Who will fly?",
        answer="{passenger}.|It is for {passenger}.",
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
]

register(Travel, world, draw, GOALS, keys=["passenger"])
