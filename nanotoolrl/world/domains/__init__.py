"""One file a subject: its class, its random world, what users wish of it. A new file is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

# The generator draws classes and goals by their place. These files keep theirs, so that the committed tasks
# come out the same. New files follow, by name. A new domain changes what is generated for its own pool, and
# for no other; `python data/make_tasks.py` then writes that pool's tasks anew.
ORDER = (
    "files",
    "contacts",
    "tickets",
    "bank",
    "calendar",
    "shop",
    "travel",
    "home",
    "library",
    "garage",
    "music",
    "clinic",
)

found = sorted(module.name for module in iter_modules(__path__))
for name in sorted(found, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
    import_module(f"{__name__}.{name}")
