"""Beds of plants: the new domain of tests/test_domains.py."""

from dataclasses import dataclass, field
from random import Random

from nanotoolrl.world.api import API, ToolError, check_known, record
from nanotoolrl.world.goals import Goal, register
from nanotoolrl.world.words import ids, titles

BEDS = "north south east west".split()


@dataclass
class Garden(API):
    """Beds of plants."""

    pool = "foreign"
    plants: list[dict] = field(default_factory=list)
    diary: list[str] = field(default_factory=list)

    def find_plants(self, bed: str) -> list[dict]:
        """List the plants of a bed."""
        check_known("bed", bed, sorted({plant["bed"] for plant in self.plants}))
        return [{"name": p["name"], "id": p["id"]} for p in self.plants if p["bed"] == bed]

    def water_plant(self, plant_id: int, litres: int) -> str:
        """Water a plant.
        litres: 1 to 20
        """
        if not 1 <= litres <= 20:
            raise ToolError(f"a plant takes 1 to 20 litres, not {litres}")
        self.diary.append(f"{record(self.plants, 'plant', plant_id)['name']}: {litres}")
        return "watered"

    def move_plant(self, plant_id: int, bed: str) -> str:
        """Move a plant to another bed."""
        record(self.plants, "plant", plant_id)["bed"] = bed
        return "moved"


def world(rng: Random, size: int) -> dict:
    beds = rng.sample(BEDS, 2)
    rows = zip(ids(rng, size), titles(rng, size), strict=True)
    return {"plants": [{"id": i, "name": name, "bed": rng.choice(beds)} for i, name in rows], "diary": []}


def draw(rng: Random, api: Garden) -> dict:
    plant = rng.choice(api.plants)
    other = rng.choice([bed for bed in BEDS if bed != plant["bed"]])
    return {"plant": plant["name"], "bed": plant["bed"], "other": other, "litres": rng.randint(1, 19)}


GOALS = [
    Goal("What grows in the {bed} bed?|List the plants of the {bed} bed.", "find_plants bed"),
    Goal(
        "Water the {plant} in the {bed} bed with {litres} litres.|"
        "The {plant} in the {bed} bed gets {litres} litres.",
        "find_plants bed; water_plant plant_id=id litres",
        "Watered.",
        vague="Water the {plant} in the {bed} bed.|The {plant} in the {bed} bed is dry.",
        question="How many litres?",
        answer="{litres}.|It takes {litres} litres.",
    ),
    Goal(
        "Move the {plant} from the {bed} bed to the {other} bed.",
        "find_plants bed; move_plant plant_id=id bed=other",
        "Moved.",
    ),
]

register(Garden, world, draw, GOALS, named=["plant"], groups=["bed"])
