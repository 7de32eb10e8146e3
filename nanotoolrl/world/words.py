"""Words, names and ids that random worlds are made of: what several domains use."""

from random import Random
from typing import Literal, get_args

Day = Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
DAYS = list(get_args(Day))
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
CITIES = ("Oslo Rome Paris Bern Riga Lyon Porto Ghent Turin Malmo Bonn Cork Graz Split Leeds Kiel").split()


def a_title(rng: Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def titles(rng: Random, count: int) -> list[str]:
    return [f"{a} {n}" for a, n in rng.sample([(a, n) for a in ADJECTIVES for n in NOUNS], count)]


def ids(rng: Random, count: int) -> list[int]:
    return sorted(rng.sample(range(11, 99), count))
