"""A house with heating, lights and doors."""

from dataclasses import dataclass, field
from random import Random
from typing import Literal

from nanotoolrl.world.api import API, ToolError, check_known
from nanotoolrl.world.goals import Goal, register

ROOMS = "kitchen bedroom bathroom office hall cellar attic nursery library garage".split()
DOORS = "front back side cellar garden garage roof balcony".split()


@dataclass
class Home(API):
    """A house with heating, lights and doors."""

    pool = "foreign"
    rooms: dict[str, dict] = field(default_factory=dict)
    doors: dict[str, str] = field(default_factory=dict)

    def _room(self, room: str) -> dict:
        check_known("room", room, self.rooms)
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
        check_known("door", door, self.doors)
        self.doors[door] = state
        return state


def world(rng: Random, size: int) -> dict:
    rooms = rng.sample(ROOMS, min(size, 9))
    doors = rng.sample(DOORS, 3)
    return {
        "rooms": {room: {"degrees": rng.randint(12, 26), "light": rng.random() < 0.5} for room in rooms},
        "doors": {door: rng.choice(["locked", "open"]) for door in doors},
    }


def draw(rng: Random, api: Home) -> dict:
    room, other = rng.sample(list(api.rooms), 2)
    door = rng.choice(list(api.doors))
    on = not api.rooms[room]["light"]
    drawn = {"room": room, "other": other, "degrees": rng.randint(6, 29), "door": door}
    locked = api.doors[door] == "locked"
    drawn |= {"on": on, "switch": "on" if on else "off"}
    return drawn | {"state": "open" if locked else "locked", "act": "Open" if locked else "Lock"}


GOALS = [
    Goal(
        "How warm is the {room}?|What is the temperature of the {room}?", "get_temperature room", "{degrees}."
    ),
    Goal(
        "Heat the {room} to {degrees}.|Set the {room} to {degrees} degrees.",
        "set_heating room degrees",
        "Set.",
        vague="Heat the {room}.|Change the heating of the {room}.",
        question="To how many degrees?",
        answer="{degrees}.|To {degrees} degrees.",
    ),
    Goal("Turn {switch} the light of the {room}.|Light {switch} in the {room}.", "set_light room on"),
    Goal("{act} the {door} door.|{act} the door {door}, please.", "set_door door state"),
    Goal(
        "Heat the {room} like the {other}.|The {room} should be as warm as the {other}.",
        "get_temperature room=other; set_heating room degrees",
        "Set to {degrees}.",
    ),
]

register(Home, world, draw, GOALS)
