"""Books that are lent."""

from dataclasses import dataclass, field
from random import Random

from nanotoolrl.world.api import API, ToolError, check_known, record
from nanotoolrl.world.goals import Goal, register
from nanotoolrl.world.words import PEOPLE, ids, titles


@dataclass
class Library(API):
    """Books and their borrowers."""

    pool = "foreign"
    books: list[dict] = field(default_factory=list)

    def find_books(self, author: str) -> list[dict]:
        """List the books of an author."""
        check_known("author", author, sorted({book["author"] for book in self.books}))
        return [{"title": b["title"], "id": b["id"]} for b in self.books if b["author"] == author]

    def book_holder(self, book_id: int) -> dict:
        """Read who has a book."""
        return {"member": record(self.books, "book", book_id)["member"]}

    def lend_book(self, book_id: int, member: str) -> str:
        """Lend a book to a member."""
        book = record(self.books, "book", book_id)
        if book["member"] != "nobody":
            raise ToolError(f"book {book_id} is lent to {book['member']}")
        book["member"] = member
        return "lent"

    def return_book(self, book_id: int) -> str:
        """Take back a book."""
        book = record(self.books, "book", book_id)
        if book["member"] == "nobody":
            raise ToolError(f"book {book_id} is not lent")
        book["member"] = "nobody"
        return "returned"


def world(rng: Random, size: int) -> dict:
    authors = rng.sample(PEOPLE, 2)
    rows = zip(ids(rng, size), titles(rng, size), strict=True)
    books = [{"id": i, "title": t, "author": rng.choice(authors), "member": "nobody"} for i, t in rows]
    for book in books[::2]:
        book["member"] = rng.choice(PEOPLE)
    return {"books": books}


def draw(rng: Random, api: Library) -> dict:
    free = rng.choice([book for book in api.books if book["member"] == "nobody"])
    lent = rng.choice([book for book in api.books if book["member"] != "nobody"])
    drawn = {"author": free["author"], "book": free["title"], "lent_author": lent["author"]}
    return drawn | {"lent_book": lent["title"], "member": rng.choice(PEOPLE)}


GOALS = [
    Goal("What did {author} write?|List the books by {author}.", "find_books author"),
    Goal(
        "Lend '{book}' by {author} to {member}.|{member} takes '{book}' by {author}.",
        "find_books author; lend_book book_id=id member",
        "Lent.",
        vague="Lend out '{book}' by {author}.|Somebody takes '{book}' by {author}.",
        question="To whom?",
        answer="To {member}.|{member}.",
    ),
    Goal(
        "'{lent_book}' by {lent_author} is back.|Take back '{lent_book}' by {lent_author}.",
        "find_books author=lent_author; return_book book_id=id",
        "Returned.",
    ),
    Goal(
        "Who has '{lent_book}' by {lent_author}?|Find the holder of '{lent_book}' by {lent_author}.",
        "find_books author=lent_author; book_holder book_id=id",
        "{member}.",
    ),
]

register(Library, world, draw, GOALS, named=["book", "lent_book"], groups=["author"])
