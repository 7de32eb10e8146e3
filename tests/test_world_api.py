"""API classes: pools, schemas, and what is refused when a class is defined."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import pytest

from nanotoolrl.world.api import API, API_CLASSES, POOLS, method_names, owner_of, schema
from nanotoolrl.world.signatures import JSON_TYPES, MAX_INT

TOOLS = [tool for cls in API_CLASSES.values() for tool in method_names(cls)]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


@pytest.fixture
def new_class(classes):
    """A class added as docs/6-add-your-own.md says."""

    @dataclass
    class Oven(API):
        """An oven."""

        pool = "ood"
        trays: list[dict] = field(default_factory=list)

        def _inside(self) -> None:
            """No tool: the name begins with an underscore."""

        def bake(
            self, cakes: list[str], minutes: float, fan: bool = False, heat: Literal["low", "high"] = "low"
        ) -> dict:
            """Bake cakes.
            minutes: how long, a fraction is fine
            cakes: names: as many as fit
            """
            return {"cakes": cakes, "minutes": minutes, "fan": fan, "heat": heat}

    return Oven


# ----------------------------------------------------------------------------------------------- pools


def test_there_are_enough_classes_and_tools_in_three_pools():
    assert len(API_CLASSES) >= 10
    assert len(TOOLS) >= 40
    assert {cls.pool for cls in API_CLASSES.values()} == set(POOLS) == {"train", "foreign", "ood"}


def test_tool_names_are_unique_over_all_classes():
    """A call names a tool and no class, so a name may have one owner only."""
    assert [name for name, count in Counter(TOOLS).items() if count > 1] == []


def test_every_tool_has_its_owner():
    for name, cls in API_CLASSES.items():
        assert {owner_of(tool) for tool in method_names(cls)} == {name}
    assert owner_of("no_such_tool") is None


@pytest.mark.parametrize("name", ["_record", "__init__", "pool", "folders", "_folder", "deepcopy"])
def test_what_is_no_public_method_is_no_tool(name):
    assert owner_of(name) is None
    with pytest.raises(KeyError, match=name):
        schema(name)


def test_method_names_come_in_source_order():
    assert method_names(API_CLASSES["Files"]) == [
        "list_files",
        "read_file",
        "write_file",
        "move_file",
        "delete_file",
    ]


def test_a_class_outside_the_pools_is_refused():
    with pytest.raises(TypeError, match="Nowhere.pool is 'moon'; it must be one of train, foreign, ood"):

        class Nowhere(API):
            pool = "moon"

    with pytest.raises(TypeError, match="Poolless"):

        class Poolless(API):
            pass

    assert not {"Nowhere", "Poolless"} & set(API_CLASSES)


# --------------------------------------------------------------------------------------------- schemas


def test_schema_of_required_strings():
    assert schema("delete_file") == {
        "name": "delete_file",
        "description": "Delete a file.",
        "parameters": {
            "type": "object",
            "properties": {"folder": {"type": "string"}, "name": {"type": "string"}},
            "required": ["folder", "name"],
        },
    }


def test_schema_of_choices_and_a_default():
    parameters = schema("open_ticket")["parameters"]
    assert parameters["properties"] == {
        "title": {"type": "string"},
        "priority": {"type": "string", "enum": ["low", "normal", "high"], "default": "normal"},
    }
    assert parameters["required"] == ["title"]


def test_schema_of_a_tool_that_requires_nothing():
    parameters = schema("find_tickets")["parameters"]
    assert parameters["properties"] == {
        "status": {"type": "string", "enum": ["open", "closed"], "default": "open"}
    }
    assert parameters["required"] == []


def test_schema_of_an_integer_with_a_description():
    parameters = schema("add_event")["parameters"]
    assert parameters["properties"] == {
        "day": {"type": "string", "enum": DAYS},
        "hour": {"type": "integer", "description": "full hour, 0 to 23"},
        "title": {"type": "string"},
    }
    assert parameters["required"] == ["day", "hour", "title"]


def test_schema_of_an_integer_default_and_of_a_boolean():
    quantity = schema("add_to_cart")["parameters"]
    assert quantity["properties"]["quantity"] == {"type": "integer", "default": 1}
    assert quantity["required"] == ["item_id"]
    assert schema("set_light")["parameters"]["properties"]["on"] == {"type": "boolean"}


def test_schema_of_a_class_the_reader_adds(new_class):
    """Lists, floats, booleans, choices, and parameter descriptions in any order, from the source alone."""
    assert owner_of("bake") == "Oven"
    assert method_names(new_class) == ["bake"]
    assert schema("bake") == {
        "name": "bake",
        "description": "Bake cakes.",
        "parameters": {
            "type": "object",
            "properties": {
                "cakes": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "names: as many as fit",
                },
                "minutes": {"type": "number", "description": "how long, a fraction is fine"},
                "fan": {"type": "boolean", "default": False},
                "heat": {"type": "string", "enum": ["low", "high"], "default": "low"},
            },
            "required": ["cakes", "minutes"],
        },
    }


@pytest.mark.parametrize(
    ("parameter", "kind", "required"),
    [
        ("x: int | None", {"type": "integer", "nullable": True}, True),
        ("x: None | int", {"type": "integer", "nullable": True}, True),
        ("x: Optional[str]", {"type": "string", "nullable": True}, True),
        ("x: int | None = 3", {"type": "integer", "nullable": True, "default": 3}, False),
        ("x: Optional[float] = None", {"type": "number", "nullable": True, "default": None}, False),
        ("x: int = None", {"type": "integer", "nullable": True, "default": None}, False),
        ("x: float = 1", {"type": "number", "default": 1}, False),
        ("x: list", {"type": "array"}, True),
        ("x: List", {"type": "array"}, True),
        ("x: List[int]", {"type": "array", "items": {"type": "integer"}}, True),
        ("x: dict", {"type": "object"}, True),
        ("x: dict[str, int]", {"type": "object", "additionalProperties": {"type": "integer"}}, True),
        ("x: list[int | None]", {"type": "array", "items": {"type": "integer", "nullable": True}}, True),
        (
            "x: dict[str, list[dict]] = None",
            {
                "type": "object",
                "additionalProperties": {"type": "array", "items": {"type": "object"}},
                "nullable": True,
                "default": None,
            },
            False,
        ),
        ("x: Literal[1, 2]", {"type": "integer", "enum": [1, 2]}, True),
        ("x: Literal[True]", {"type": "boolean", "enum": [True]}, True),
        ("x: Literal['a', None]", {"type": "string", "enum": ["a"], "nullable": True}, True),
        ("x: Literal['a', 'b'] | None", {"type": "string", "enum": ["a", "b"], "nullable": True}, True),
        ("x: Literal[3, 2] = 2", {"type": "integer", "enum": [3, 2], "default": 2}, False),
        ("x: Annotated[int, 'litres']", {"type": "integer"}, True),
        ("x: 'int'", {"type": "integer"}, True),
        ("*, x: int", {"type": "integer"}, True),
    ],
)
@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"], ids=["now", "later"])
def test_schema_of_every_kind_of_parameter(parameter, kind, required, future, classes):
    """Whether annotations are evaluated with the class or kept as text."""
    define(f"def brew(self, {parameter}) -> 'Pot':\n        'Brew.'", future)
    parameters = schema("brew")["parameters"]
    assert parameters == {"type": "object", "properties": {"x": kind}, "required": ["x"] * required}


def define(member: str, future: str = "", head: str = "class Pot(API):", after: str = "") -> None:
    """Run the source of a class with one member."""
    source = f"{future}from typing import *\n{after}{head}\n    pool = 'ood'\n    {member}\n"
    exec(compile(source, "pot.py", "exec", dont_inherit=True), {"API": API, "dataclass": dataclass})


TAKES = "Pot.brew, parameter 'x'"
REFUSED = {
    **{
        f"def brew(self, x: {annotation}): 'Brew.'": f"{TAKES}: the annotation .* is unknown; allowed are str"
        for annotation in (
            *(
                "tuple",
                "tuple[int, int]",
                "set",
                "bytes",
                "object",
                "None",
                "Any",
                "Union[int, str]",
                "Sequence",
            ),
            *(
                "dict[int, str]",
                "dict[str]",
                "dict[str, Any]",
                "list[int, str]",
                "list[tuple]",
                "complex",
                "5",
                "[int]",
                "int | str | None",
            ),
            *("Literal[1, 'a']", "Literal[1, True]", "Literal[b'a']", "Literal[None]"),
        )
    },
    f"def brew(self, x: Literal[{MAX_INT + 1}]): 'Brew.'": f"{TAKES}: the annotation",
    "def brew(self, x: 'Cup'): 'Brew.'": "Pot.brew: an annotation cannot be resolved: name 'Cup'",
    "def brew(self, x: '['): 'Brew.'": "Pot.brew: an annotation cannot be resolved",
    "def brew(self, x): 'Brew.'": f"{TAKES} has no annotation; allowed are str",
    "def brew(self, *x: int): 'Brew.'": rf"{TAKES}: \*x: int takes no argument by its name",
    "def brew(self, **x: int): 'Brew.'": rf"{TAKES}: \*\*x: int takes no argument by its name",
    "def brew(self, x: int, /): 'Brew.'": f"{TAKES}: x: int takes no argument by its name",
    "def brew(): 'Brew.'": "Pot.brew: its first parameter must be self",
    "def brew(*x): 'Brew.'": "Pot.brew: its first parameter must be self",
    "def brew(*, x: int): 'Brew.'": "Pot.brew: its first parameter must be self",
    "def brew(self, x: int = '1'): 'Brew.'": f"{TAKES}: its default must be of type integer",
    "def brew(self, x: int = True): 'Brew.'": f"{TAKES}: its default must be of type integer",
    "def brew(self, x: int = 2**60): 'Brew.'": f"{TAKES}: its default is too large",
    "def brew(self, x: float = float('nan')): 'Brew.'": f"{TAKES}: its default must be of type number",
    "def brew(self, x: Literal['a'] = 'b'): 'Brew.'": f"{TAKES}: its default must be one of a",
    "def brew(self, x: list = []): 'Brew.'": f"{TAKES}: its default must be a text, a number",
    "def brew(self, x: dict = {}): 'Brew.'": f"{TAKES}: its default must be a text, a number",
    "def brew(self, x: str = '\\ud800'): 'Brew.'": "Pot.brew: a text .* is no valid Unicode",
    "def brew(self, x: int): pass": "Pot.brew has no docstring",
    "def brew(self, x: int): ' '": "Pot.brew has no docstring",
    "def brew(self, x: int): 'Brew.\\n\\nMore on it.'": "docstring line 'More on it.' must read 'parameter:",
    "def brew(self, x: int): 'Brew.\\nx:'": "docstring line 'x:' must read",
    "def brew(self, x: int): 'Brew.\\ny: cups'": "docstring line 'y: cups' .*; its parameters: x",
    "def brew(self, x: int): 'Brew.\\nx: cups\\nx: pots'": "docstring line 'x: pots' must .* once",
    "def brew(self): 'Brew.\\nself: me'": "docstring line 'self: me' .*; its parameters: none",
    "async def brew(self): 'Brew.'": "Pot.brew is async",
    "async def brew(self):\n        'Brew.'\n        yield": "Pot.brew is async",
    "def brew(self):\n        'Brew.'\n        yield": "Pot.brew is a generator",
    "@staticmethod\n    def brew(): 'Brew.'": "Pot.brew is a staticmethod; a tool is a plain method",
    "@classmethod\n    def brew(cls): 'Brew.'": "Pot.brew is a classmethod; a tool is a plain method",
    "@property\n    def brew(self): 'Brew.'": "Pot.brew is a property; a tool is a plain method",
    "brew = print": "Pot.brew is a builtin_function_or_method; a tool is a plain method",
    "class brew: pass": "Pot.brew is a type; a tool is a plain method",
    "brew: int\n    def brew(self): 'Brew.'": "Pot.brew: the name of a tool must be ASCII, and no field's",
    "def br\u00e9w(self): 'Brew.'": "Pot.br\u00e9w: the name of a tool must be ASCII",
    "def read_file(self): 'Brew.'": "Pot.read_file: Files has a tool of this name already",
}


@pytest.mark.parametrize("member", REFUSED)
def test_what_no_schema_can_say_is_refused_with_the_class(member, classes):
    with pytest.raises(TypeError, match=REFUSED[member]):
        define(member)
    assert "Pot" not in API_CLASSES and owner_of("brew") is None


@pytest.mark.parametrize(
    ("head", "after", "said"),
    [
        ("class Files(API):", "", "there is a class Files already"),
        (
            "class Pot(Base, API):",
            "class Base:\n    def fill(self): pass\n",
            "Pot.fill is inherited from Base",
        ),
        (
            "class Pot(API, Base):",
            "class Base:\n    def fill(self): pass\n",
            "Pot.fill is inherited from Base",
        ),
        (
            "class Pot(Jar):",
            "class Jar(API):\n    pool = 'ood'\n    def fill(self): 'Fill.'\n",
            "Pot.fill is inherited from Jar",
        ),
    ],
)
def test_tools_and_names_of_others_are_refused(head, after, said, classes):
    with pytest.raises(TypeError, match=said):
        define("def brew(self): 'Brew.'", head=head, after=after)
    assert owner_of("brew") is None and owner_of("read_file") == "Files"


@pytest.mark.parametrize("slots", [True, False])
def test_a_class_may_be_made_anew_with_its_tools(slots, classes):
    """As `@dataclass(slots=True)` does."""
    define("cups: int = 0\n    def brew(self): 'Brew.'", head=f"@dataclass(slots={slots})\nclass Pot(API):")
    assert owner_of("brew") == "Pot" and API_CLASSES["Pot"](3).cups == 3


def test_members_that_are_no_tools_may_be_there(classes):
    define("ROWS = 3\n    _cups = property(len)\n    def _pour(self, *cups): pass")
    assert method_names(API_CLASSES["Pot"]) == []


def test_a_new_class_is_known_at_once(classes):
    assert owner_of("brew") is None
    with pytest.raises(KeyError):
        schema("brew")
    define("def brew(self): 'Brew.'")
    assert (owner_of("brew"), schema("brew")["description"]) == ("Pot", "Brew.")


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("x: Color", "the annotation Color is unknown"),
        ("x: Literal[Color.RED]", "the annotation .* is unknown"),
        ("x: str = Color.RED", "its default must be a text, a number"),
    ],
)
def test_an_enum_is_refused(parameter, said, classes):
    """A call brings its text, and no member of it."""
    color = "import enum\nclass Color(str, enum.Enum):\n    RED = 'red'\n"
    with pytest.raises(TypeError, match=f"Pot.brew, parameter 'x': {said}"):
        define(f"def brew(self, {parameter}): 'Brew.'", after=color)


@pytest.mark.parametrize("tool", TOOLS)
def test_every_schema_is_complete_and_json(tool):
    one = schema(tool)
    assert json.loads(json.dumps(one)) == one
    assert one["name"] == tool
    assert one["description"].strip() == one["description"] != ""
    assert "\n" not in one["description"]
    properties = one["parameters"]["properties"]
    optional = [name for name, kind in properties.items() if "default" in kind]
    assert [*one["parameters"]["required"], *optional] == list(properties)
    for kind in properties.values():
        assert kind["type"] in JSON_TYPES.values()
        assert kind.get("description", "text").strip()
        if {"enum", "default"} <= set(kind):
            assert kind["default"] in kind["enum"]
