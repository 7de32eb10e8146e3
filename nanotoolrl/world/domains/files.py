"""Folders of text files."""

from dataclasses import dataclass, field
from random import Random

from nanotoolrl.world.api import API, check_known
from nanotoolrl.world.goals import Goal, register
from nanotoolrl.world.words import NOUNS, a_title

FOLDERS = "docs photos work home music notes drafts archive reports plans".split()
ENDINGS = ["txt", "md", "csv", "log"]


@dataclass
class Files(API):
    """Folders of text files."""

    pool = "train"
    folders: dict[str, dict[str, str]] = field(default_factory=dict)

    def _folder(self, folder: str) -> dict[str, str]:
        check_known("folder", folder, self.folders)
        return self.folders[folder]

    def list_files(self, folder: str) -> list[str]:
        """List the files in a folder."""
        return sorted(self._folder(folder))

    def read_file(self, folder: str, name: str) -> dict:
        """Read the text of a file."""
        check_known("file", name, self._folder(folder), f" in '{folder}'")
        return {"text": self.folders[folder][name]}

    def write_file(self, folder: str, name: str, text: str) -> str:
        """Write a text file, replacing an old one."""
        self._folder(folder)[name] = text
        return "written"

    def move_file(self, name: str, source: str, target: str) -> str:
        """Move a file to another folder."""
        check_known("file", name, self._folder(source), f" in '{source}'")
        self._folder(target)
        self.folders[target][name] = self.folders[source].pop(name)
        return "moved"

    def delete_file(self, folder: str, name: str) -> str:
        """Delete a file."""
        check_known("file", name, self._folder(folder), f" in '{folder}'")
        del self.folders[folder][name]
        return "deleted"


def _file(rng: Random) -> str:
    return f"{rng.choice(NOUNS)}.{rng.choice(ENDINGS)}"


def world(rng: Random, size: int) -> dict:
    folders = rng.sample(FOLDERS, 3)
    return {
        "folders": {
            f: {_file(rng): a_title(rng) for _ in range(rng.randint(2, min(size, 30)))} for f in folders
        }
    }


def draw(rng: Random, api: Files) -> dict:
    folder = rng.choice([f for f, files in api.folders.items() if files])
    target = rng.choice([f for f in api.folders if f != folder])
    return {
        "folder": folder,
        "name": rng.choice(list(api.folders[folder])),
        "target": target,
        "new_name": _file(rng),
    }


GOALS = [
    Goal(
        "Show me what is in {folder}.|List the files in {folder}.|What files are in {folder}?",
        "list_files folder",
    ),
    Goal(
        "Read {name} in {folder}.|What does {name} in {folder} say?|Open {name} from {folder} and read it.",
        "read_file folder name",
        "It says: {text}.",
        vague="Read {name} to me.|What does {name} say?",
        question="Which folder is it in?",
        answer="It is in {folder}.|Look in {folder}.",
    ),
    Goal(
        "Save '{words}' as {new_name} in {folder}.|Write '{words}' to a file {new_name} in {folder}.",
        "write_file folder name=new_name text=words",
        "Saved.",
        vague="Save '{words}' in {folder}.|Write '{words}' to a file in {folder}.",
        question="What should the file be called?",
        answer="Call it {new_name}.|The name is {new_name}.",
    ),
    Goal(
        "Move {name} from {folder} to {target}.|Put {name} out of {folder} into {target}.",
        "move_file name source=folder target",
        "Moved.",
        vague="Move {name} out of {folder}.|{name} should leave {folder}.",
        question="Where should it go?",
        answer="To {target}.|Put it into {target}.",
    ),
    Goal("Delete {name} from {folder}.|Remove {name} in {folder}.", "delete_file folder name", "Deleted."),
    Goal(
        "Copy {name} from {folder} to {target}.|I want {name} from {folder} in {target} too.",
        "read_file folder name; write_file folder=target name text",
        "Copied.",
        vague="Make a copy of {name} from {folder}.|Copy {name} from {folder}.",
        question="Where should the copy go?",
        answer="To {target}.|Put it into {target}.",
    ),
    Goal(
        "List {folder}, then rename {name} there to {new_name}.|"
        "Look into {folder} and call {name} {new_name} from now on.",
        "list_files folder; read_file folder name; write_file folder name=new_name text; "
        "delete_file folder name",
        "Renamed.",
    ),
]

register(Files, world, draw, GOALS)
