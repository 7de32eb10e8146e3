"""The cars of a family."""

from dataclasses import dataclass, field
from random import Random

from nanotoolrl.world.api import API, ToolError, check_known
from nanotoolrl.world.goals import Goal, register
from nanotoolrl.world.words import CITIES, PEOPLE

CARS = "van jeep truck coupe wagon minibus roadster pickup".split()


@dataclass
class Garage(API):
    """The cars of a family."""

    pool = "ood"
    cars: dict[str, dict] = field(default_factory=dict)

    def _car(self, car: str) -> dict:
        check_known("car", car, self.cars)
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


def world(rng: Random, size: int) -> dict:
    cars = rng.sample(CARS, min(size, 7))
    return {
        "cars": {car: {"litres": rng.randint(5, 40), "route": "none", "driver": "nobody"} for car in cars}
    }


def draw(rng: Random, api: Garage) -> dict:
    car, other = rng.sample(list(api.cars), 2)
    drawn = {"car": car, "other_car": other, "litres": rng.randint(5, 40), "city": rng.choice(CITIES)}
    return drawn | {"driver": rng.choice(PEOPLE)}


GOALS = [
    Goal("How much fuel has the {car}?|Read the fuel of the {car}.", "get_fuel car", "{litres} litres."),
    Goal(
        "Fill {litres} litres into the {car}.|The {car} gets {litres} litres.",
        "add_fuel car litres",
        "Filled.",
        vague="Fill up the {car}.|The {car} needs fuel.",
        question="How many litres?",
        answer="{litres}.|Fill {litres} litres.",
    ),
    Goal(
        "Lend the {car} to {driver} and set its route to {city}.|{driver} drives the {car} to {city}.",
        "lend_car car driver; set_route car city",
        "Lent.",
        vague="Lend the {car} to {driver} and set its route.|{driver} drives the {car} somewhere.",
        question="To which city?",
        answer="To {city}.|{city}.",
    ),
    Goal(
        "Fill as much into the {car} as the {other_car} has.|"
        "The {car} gets the litres that the {other_car} has.",
        "get_fuel car=other_car; add_fuel car litres",
        "Filled {litres}.",
    ),
]

register(Garage, world, draw, GOALS)
