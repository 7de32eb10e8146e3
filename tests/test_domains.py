"""The domains: their state, what an error tells the model, and that one file is all that a new one takes."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random

import pytest

from nanotoolrl.world.api import API, API_CLASSES, ToolError, method_names, owner_of
from nanotoolrl.world.domains import ORDER
from nanotoolrl.world.generate import SMALL, generate
from nanotoolrl.world.goals import DOMAINS, Goal, all_goals, register

ROOT = Path(__file__).resolve().parent.parent
GARDEN = ROOT / "tests" / "data" / "garden.py"
# The tables below are about the domains whose tasks are committed; one that somebody adds needs no row.
COMMITTED = [name for name, cls in API_CLASSES.items() if cls.__module__.rpartition(".")[2] in ORDER]
TOOLS = [tool for name in COMMITTED for tool in method_names(API_CLASSES[name])]


def filled(name: str) -> API:
    """An instance of a class with a few records, as the task generator makes them."""
    return API_CLASSES[name](**DOMAINS[name].world(Random(0), SMALL))


# ----------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("name", DOMAINS)
def test_state_is_json_comparable_and_copyable(name):
    """The reward compares worlds with ==, tasks store them as JSON, and episodes get deep copies."""
    api = filled(name)
    state = vars(api)
    assert set(state) == {one.name for one in fields(api)} != set()
    assert json.loads(json.dumps(state)) == state
    assert api == API_CLASSES[name](**json.loads(json.dumps(state)))
    for field_name in [name for name, value in state.items() if value]:
        twin = copy.deepcopy(api)
        assert twin == api
        getattr(twin, field_name).clear()
        assert twin != api
    assert api == filled(name)


@pytest.mark.parametrize("name", DOMAINS)
def test_instances_share_no_state(name):
    """A mutable default that is shared would leak one rollout into the next."""
    first, second = API_CLASSES[name](), API_CLASSES[name]()
    for value in vars(first).values():
        if isinstance(value, dict):
            value["new"] = 1
        else:
            value.append(1)
    assert second == API_CLASSES[name]() != first


# ----------------------------------------------------------------------------------- what the tools do


def test_files():
    api = API_CLASSES["Files"](folders={"docs": {"b.txt": "two", "a.txt": "one"}, "work": {}})
    assert api.list_files("docs") == ["a.txt", "b.txt"]
    assert api.read_file("docs", "a.txt") == {"text": "one"}
    assert api.write_file("work", "c.txt", "three") == "written"
    assert api.write_file("docs", "a.txt", "new") == "written"
    assert api.move_file("b.txt", "docs", "work") == "moved"
    assert api.delete_file("work", "c.txt") == "deleted"
    assert api.folders == {"docs": {"a.txt": "new"}, "work": {"b.txt": "two"}}


def test_bank():
    api = API_CLASSES["Bank"](accounts={"savings": 10, "family": 5}, bills={"water": 4, "tax": 99})
    assert api.transfer("savings", "family", 3) == "transferred"
    assert api.find_bill("water") == {"amount": 4}
    assert api.pay_bill("family", "water", 4) == "paid"
    assert api.get_balance("family") == {"balance": 4}
    assert (api.accounts, api.bills) == ({"savings": 7, "family": 4}, {"tax": 99})


def test_shop():
    api = API_CLASSES["Shop"](items=[{"id": 12, "name": "kettle", "price": 30}])
    assert api.find_item("kettle") == {"item_id": 12, "price": 30}
    assert api.add_to_cart(12) == "in cart"
    assert api.checkout("river street 1") == {"order_id": 11}
    assert api.cart == []
    assert api.order_status(11) == {"status": "packed"}
    assert api.cancel_order(11) == "cancelled"
    assert api.orders[0]["items"] == [{"item_id": 12, "quantity": 1}]
    assert api.orders[0]["status"] == "cancelled"


def test_a_new_record_gets_the_next_id():
    api = API_CLASSES["Tickets"](
        tickets=[{"id": 40, "title": "a", "priority": "low", "status": "open", "owner": "Mara"}]
    )
    assert api.open_ticket("b") == {"id": 41}
    assert api.get_ticket(41) == {"owner": "nobody", "priority": "normal"}
    assert [t["id"] for t in api.find_tickets()] == [40, 41]


@pytest.mark.parametrize("name", COMMITTED)
def test_answers_do_not_alias_the_state(name):
    """What a reading tool hands out must be a copy: whoever changes an answer must not change the world."""
    api = filled(name)
    before = copy.deepcopy(api)
    answers = [
        getattr(api, tool)(**arguments) for tool, calls in readings(api).items() for arguments in calls
    ]
    assert len(answers) > 2
    assert api == before
    for answer in answers:
        for item in [*answer, answer]:
            if isinstance(item, dict | list):
                item.clear()
    assert api == before


def readings(api: API) -> dict[str, list[dict]]:
    """Calls that only read, per tool, with arguments that exist in the filled instance."""
    kinds = {
        "Files": lambda: {
            "list_files": [{"folder": folder} for folder in api.folders],
            "read_file": [{"folder": f, "name": n} for f, names in api.folders.items() for n in names],
        },
        "Contacts": lambda: {
            "find_phone": [{"person": person} for person in api.people],
            "read_inbox": [{"person": message["person"]} for message in api.inbox],
        },
        "Tickets": lambda: {
            "find_tickets": [{}, {"status": "closed"}],
            "get_ticket": [{"ticket_id": ticket["id"]} for ticket in api.tickets],
        },
        "Bank": lambda: {
            "get_balance": [{"account": account} for account in api.accounts],
            "find_bill": [{"payee": payee} for payee in api.bills],
        },
        "Calendar": lambda: {
            "list_events": [{"day": event["day"]} for event in api.events],
            "event_time": [{"event_id": event["id"]} for event in api.events],
        },
        "Shop": lambda: {
            "find_item": [{"name": item["name"]} for item in api.items],
            "order_status": [{"order_id": order["id"]} for order in api.orders],
        },
        "Travel": lambda: {
            "find_flight": [{key: f[key] for key in ("origin", "destination")} for f in api.flights],
            "find_booking": [{"passenger": booking["passenger"]} for booking in api.bookings],
        },
        "Home": lambda: {"get_temperature": [{"room": room} for room in api.rooms]},
        "Library": lambda: {
            "find_books": [{"author": book["author"]} for book in api.books],
            "book_holder": [{"book_id": book["id"]} for book in api.books],
        },
        "Garage": lambda: {"get_fuel": [{"car": car} for car in api.cars]},
        "Music": lambda: {"find_songs": [{"artist": song["artist"]} for song in api.songs]},
        "Clinic": lambda: {
            "find_doctors": [{"branch": doctor["branch"]} for doctor in api.doctors],
            "find_visit": [{"patient": visit["patient"]} for visit in api.visits],
        },
    }
    return kinds[type(api).__name__]()


# ---------------------------------------------------------------------------------------------- errors


@dataclass
class Refused:
    """A call that must fail, and what its text must name so that the model can correct itself."""

    api: API
    tool: str
    arguments: dict
    named: list[str]

    def __str__(self) -> str:
        return f"{self.tool}-{'-'.join(self.named)}"


def refused_calls() -> list[Refused]:
    files = {"folders": {"docs": {"a.txt": "one"}, "work": {}}}
    contacts = {"people": {"Mara": "1-2"}, "inbox": [{"person": "Mara", "text": "hi"}]}
    ticket = {"id": 40, "title": "a", "priority": "low", "status": "closed", "owner": "Mara"}
    bank = {"accounts": {"savings": 10, "family": 5}, "bills": {"water": 4, "tax": 99}}
    event = {"id": 20, "day": "Monday", "hour": 9, "title": "a"}
    item = {"id": 12, "name": "kettle", "price": 30}
    order = {"id": 31, "address": "x", "items": [], "status": "cancelled"}
    flight = {"id": 14, "origin": "Oslo", "destination": "Rome", "price": 50}
    booking = {"id": 15, "flight_id": 14, "passenger": "Mara"}
    home = {"rooms": {"hall": {"degrees": 20, "light": True}}, "doors": {"front": "open"}}
    free = {"id": 16, "title": "a", "author": "Otto", "member": "nobody"}
    lent = {"id": 17, "title": "b", "author": "Otto", "member": "Ida"}
    car = {"van": {"litres": 5, "route": "none", "driver": "nobody"}}
    music = {"songs": [{"id": 18, "title": "a", "artist": "Rosa"}], "playlists": {"mix": [18]}}
    doctor = {"id": 19, "name": "Emil", "branch": "heart"}
    visit = {"id": 21, "doctor_id": 19, "patient": "Nina", "day": "Monday"}
    states = {
        "Files": files,
        "Contacts": contacts,
        "Tickets": {"tickets": [ticket]},
        "Bank": bank,
        "Calendar": {"events": [event]},
        "Shop": {"items": [item], "orders": [order]},
        "Travel": {"flights": [flight], "bookings": [booking]},
        "Home": home,
        "Library": {"books": [free, lent]},
        "Garage": {"cars": car},
        "Music": music,
        "Clinic": {"doctors": [doctor], "visits": [visit]},
    }
    table = [
        ("list_files", {"folder": "zzz"}, ["zzz", "docs", "work"]),
        ("read_file", {"folder": "zzz", "name": "a.txt"}, ["zzz", "docs", "work"]),
        ("read_file", {"folder": "docs", "name": "zzz"}, ["zzz", "docs", "a.txt"]),
        ("read_file", {"folder": "work", "name": "a.txt"}, ["a.txt", "work", "none"]),
        ("write_file", {"folder": "zzz", "name": "b", "text": "c"}, ["zzz", "docs", "work"]),
        ("move_file", {"name": "zzz", "source": "docs", "target": "work"}, ["zzz", "a.txt"]),
        ("move_file", {"name": "a.txt", "source": "zzz", "target": "work"}, ["zzz", "docs", "work"]),
        ("move_file", {"name": "a.txt", "source": "docs", "target": "zzz"}, ["zzz", "docs", "work"]),
        ("delete_file", {"folder": "docs", "name": "zzz"}, ["zzz", "a.txt"]),
        ("find_phone", {"person": "zzz"}, ["zzz", "Mara"]),
        ("add_contact", {"person": "Mara", "phone": "3-4"}, ["Mara", "exists"]),
        ("send_message", {"phone": "9-9", "text": "a"}, ["9-9", "find_phone"]),
        ("read_inbox", {"person": "zzz"}, ["zzz"]),
        ("get_ticket", {"ticket_id": 7}, ["7", "40"]),
        ("close_ticket", {"ticket_id": 7}, ["7", "40"]),
        ("close_ticket", {"ticket_id": 40}, ["40", "closed"]),
        ("assign_ticket", {"ticket_id": 7, "person": "Mara"}, ["7", "40"]),
        ("get_balance", {"account": "zzz"}, ["zzz", "savings", "family"]),
        ("transfer", {"source": "zzz", "target": "family", "amount": 1}, ["zzz", "savings"]),
        ("transfer", {"source": "savings", "target": "zzz", "amount": 1}, ["zzz", "family"]),
        ("transfer", {"source": "savings", "target": "savings", "amount": 1}, ["savings"]),
        ("transfer", {"source": "savings", "target": "family", "amount": 0}, ["positive", "0"]),
        ("transfer", {"source": "savings", "target": "family", "amount": -5}, ["positive", "-5"]),
        ("transfer", {"source": "savings", "target": "family", "amount": 11}, ["savings", "10"]),
        ("find_bill", {"payee": "zzz"}, ["zzz", "water", "tax"]),
        ("pay_bill", {"account": "savings", "payee": "zzz", "amount": 4}, ["zzz", "water"]),
        ("pay_bill", {"account": "savings", "payee": "water", "amount": 5}, ["water", "5", "find_bill"]),
        ("pay_bill", {"account": "savings", "payee": "tax", "amount": 99}, ["savings", "10"]),
        ("pay_bill", {"account": "zzz", "payee": "water", "amount": 4}, ["zzz", "savings"]),
        ("event_time", {"event_id": 7}, ["7", "20"]),
        ("add_event", {"day": "Monday", "hour": 24, "title": "b"}, ["24", "0 to 23"]),
        ("add_event", {"day": "Monday", "hour": -1, "title": "b"}, ["-1", "0 to 23"]),
        ("move_event", {"event_id": 7, "day": "Monday"}, ["7", "20"]),
        ("cancel_event", {"event_id": 7}, ["7", "20"]),
        ("find_item", {"name": "zzz"}, ["zzz", "kettle"]),
        ("add_to_cart", {"item_id": 7}, ["7", "12"]),
        ("add_to_cart", {"item_id": 12, "quantity": 0}, ["0", "at least 1"]),
        ("checkout", {"address": "x"}, ["empty", "add_to_cart"]),
        ("order_status", {"order_id": 7}, ["7", "31"]),
        ("cancel_order", {"order_id": 7}, ["7", "31"]),
        ("cancel_order", {"order_id": 31}, ["31", "cancelled"]),
        ("find_flight", {"origin": "Rome", "destination": "Oslo"}, ["Rome", "Oslo to Rome"]),
        ("book_flight", {"flight_id": 7, "passenger": "Ida"}, ["7", "14"]),
        ("find_booking", {"passenger": "zzz"}, ["zzz", "Mara"]),
        ("cancel_booking", {"booking_id": 7}, ["7", "15"]),
        ("get_temperature", {"room": "zzz"}, ["zzz", "hall"]),
        ("set_heating", {"room": "zzz", "degrees": 20}, ["zzz", "hall"]),
        ("set_heating", {"room": "hall", "degrees": 31}, ["31", "5 to 30"]),
        ("set_light", {"room": "zzz", "on": True}, ["zzz", "hall"]),
        ("set_door", {"door": "zzz", "state": "open"}, ["zzz", "front"]),
        ("find_books", {"author": "zzz"}, ["zzz", "Otto"]),
        ("book_holder", {"book_id": 7}, ["7", "16", "17"]),
        ("lend_book", {"book_id": 7, "member": "Max"}, ["7", "16"]),
        ("lend_book", {"book_id": 17, "member": "Max"}, ["17", "Ida"]),
        ("return_book", {"book_id": 7}, ["7", "16"]),
        ("return_book", {"book_id": 16}, ["16", "not lent"]),
        ("get_fuel", {"car": "zzz"}, ["zzz", "van"]),
        ("add_fuel", {"car": "zzz", "litres": 5}, ["zzz", "van"]),
        ("add_fuel", {"car": "van", "litres": 81}, ["81", "1 to 80"]),
        ("set_route", {"car": "zzz", "city": "Oslo"}, ["zzz", "van"]),
        ("lend_car", {"car": "zzz", "driver": "Max"}, ["zzz", "van"]),
        ("find_songs", {"artist": "zzz"}, ["zzz", "Rosa"]),
        ("make_playlist", {"playlist": "mix"}, ["mix", "exists"]),
        ("add_song", {"playlist": "zzz", "song_id": 18}, ["zzz", "mix"]),
        ("add_song", {"playlist": "mix", "song_id": 7}, ["7", "18"]),
        ("clear_playlist", {"playlist": "zzz"}, ["zzz", "mix"]),
        ("find_doctors", {"branch": "zzz"}, ["zzz", "heart"]),
        ("book_visit", {"doctor_id": 7, "patient": "Max", "day": "Monday"}, ["7", "19"]),
        ("find_visit", {"patient": "zzz"}, ["zzz", "Nina"]),
        ("move_visit", {"visit_id": 7, "day": "Monday"}, ["7", "21"]),
        ("cancel_visit", {"visit_id": 7}, ["7", "21"]),
    ]
    return [
        Refused(API_CLASSES[owner_of(tool)](**copy.deepcopy(states[owner_of(tool)])), tool, arguments, named)
        for tool, arguments, named in table
    ]


@pytest.mark.parametrize("case", refused_calls(), ids=str)
def test_a_refusal_names_what_is_wrong_and_what_there_is(case):
    with pytest.raises(ToolError) as refused:
        getattr(case.api, case.tool)(**case.arguments)
    text = str(refused.value)
    assert [word for word in case.named if word not in text] == []


@pytest.mark.parametrize("case", refused_calls(), ids=str)
def test_a_refused_call_changes_nothing(case):
    """Half a call done would leave a state that no correct continuation can repair."""
    before = copy.deepcopy(case.api)
    with pytest.raises(ToolError):
        getattr(case.api, case.tool)(**case.arguments)
    assert case.api == before


def test_the_refusals_cover_every_tool_that_can_refuse():
    never = {"find_tickets", "open_ticket", "list_events"}  # any argument of the right type will do
    assert set(TOOLS) - {case.tool for case in refused_calls()} == never


def test_an_empty_world_says_none():
    with pytest.raises(ToolError, match="there is none"):
        API_CLASSES["Files"]().list_files("docs")
    with pytest.raises(ToolError, match="there is none"):
        API_CLASSES["Travel"]().find_flight("Oslo", "Rome")
    with pytest.raises(ToolError, match="there is none"):
        API_CLASSES["Library"]().book_holder(1)


def test_a_long_list_is_cut():
    """A long_context world must not answer every slip with a page."""
    api = API_CLASSES["Files"](folders={f"f{i}": {} for i in range(50)})
    with pytest.raises(ToolError) as refused:
        api.list_files("zzz")
    assert str(refused.value).endswith("f0, f1, f2, f3, f4, f5, ...")


# ----------------------------------------------------------------------------------------------- goals


def test_every_tool_is_used_by_a_goal():
    used = {tool for goal in all_goals() for tool in goal.tools()}
    tools = {tool for name in DOMAINS for tool in vars(API_CLASSES[name]) if owner_of(tool)}
    assert used == tools


# ----------------------------------------------------------------------------------------- a new domain


CHECK = """
import json
from pathlib import Path

import nanotoolrl
from nanotoolrl.calls import FORMATS, render_calls
from nanotoolrl.env import Episode, Task, oracle, replay
from nanotoolrl.world.api import API_CLASSES, method_names, schema
from nanotoolrl.world.generate import generate, make_split
from nanotoolrl.world.mutations import mutations
from nanotoolrl.world.tasks import load_tasks

assert Path(nanotoolrl.__file__).is_relative_to(Path.cwd())
assert list(API_CLASSES)[-1] == "Garden"
tools = method_names(API_CLASSES["Garden"])
assert [schema(tool)["description"] for tool in tools] == [
    "List the plants of a bed.", "Water a plant.", "Move a plant to another bed."
]
families = [generate("foreign", f"new-{i}") for i in range(40)]
families = [family for family in families if "Garden" in family["base"].state]
called, asked = set(), set()
for task in (task for family in families for task in family.values()):
    truth = [turn.calls for turn in task.turns]
    assert Task.from_json(task.to_json()) == task
    assert all(replay(task, truth, format) == 1 for format in FORMATS)
    assert not any(replay(task, calls) for calls in mutations(task))
    episode = Episode(task)
    for message in oracle(task):
        if message["role"] == "assistant":
            episode.step(message["content"])
    assert episode.done and episode.reward == 1
    called |= {call.name for calls in truth for call in calls}
    asked |= {turn.reply for turn in task.turns if not turn.calls and task.category == "miss_param"}
assert len(families) > 5 and called >= set(tools) and "How many litres?" in asked
for family in families:
    plants = [family[category].state["Garden"]["plants"] for category in ("base", "long_context")]
    assert len(plants[1]) > 5 * len(plants[0])
    assert len({plant["bed"] for plant in plants[0]}) == len({plant["bed"] for plant in plants[1]})
for split in ("train", "test", "ood"):
    assert make_split(split) == load_tasks(split), split
assert make_split("foreign") != load_tasks("foreign")
"""


@pytest.mark.slow
def test_one_file_is_all_that_a_new_domain_takes(tmp_path):
    """Its own pool is generated with it, the others as before."""
    for part in ("nanotoolrl", "data/tasks"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(GARDEN, tmp_path / "nanotoolrl" / "world" / "domains")
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_domains_of_the_committed_tasks_keep_their_places():
    modules = [domain.api.__module__.rpartition(".")[2] for domain in DOMAINS.values()]
    assert modules[: len(ORDER)] == list(ORDER)
    assert modules[len(ORDER) :] == sorted(modules[len(ORDER) :])


@pytest.fixture
def garden(classes) -> dict:
    """What the file of the new domain defines."""
    names = {"__name__": "garden"}
    exec(compile(GARDEN.read_text(encoding="utf-8"), GARDEN, "exec"), names)
    return names


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "Garden is registered without world, draw, goals"),
        ("world", "Garden is registered without draw, goals"),
        ("world draw", "Garden is registered without goals"),
        ("world GOALS", "Garden is registered without draw"),
        ("draw GOALS", "Garden is registered without world"),
    ],
)
def test_what_is_missing_is_named(given, said, garden):
    parts = {"goals" if name == "GOALS" else name: garden[name] for name in given.split()}
    with pytest.raises(TypeError, match=f"^{said}$"):
        register(garden["Garden"], **parts)


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (Goal("Dig.|Dig it.", "dig"), "no class that is registered by now has the tool 'dig'"),
        (Goal("Read.", "read_file folder name"), "'read_file' is of another pool, 'train'"),
        (Goal("Water.", "water_plant plant_id=id"), "'water_plant' takes plant_id, litres"),
        (Goal("Move.", "move_plant plant_id=id place=other"), "'move_plant' takes plant_id, bed"),
        (Goal("List.", "find_plants bed", vague="List."), "vague, question and answer must be given"),
    ],
)
def test_a_goal_that_cannot_be_played_is_refused(goal, said, garden):
    first = goal.says.partition("|")[0]
    with pytest.raises(TypeError, match=f"^Garden, goal '{first}': {said}"):
        register(garden["Garden"], garden["world"], garden["draw"], [*garden["GOALS"], goal])


def test_a_binding_that_nothing_gives_is_named(garden):
    register(garden["Garden"], garden["world"], lambda rng, api: {"bed": "north"}, garden["GOALS"][2:])
    with pytest.raises(TypeError, match="nothing gives"):
        for i in range(100):
            generate("foreign", f"new-{i}")


def test_a_class_that_is_not_registered_is_for_task_files_only(garden, splits):
    """The generator passes it over."""
    del DOMAINS["Garden"]
    assert owner_of("find_plants") == "Garden"
    for i in (0, 1, 2):
        family = generate("foreign", f"foreign-{i:03d}")
        assert [family[category] for category in ("base", "miss_func", "miss_param")] == splits["foreign"][
            3 * i : 3 * i + 3
        ]
