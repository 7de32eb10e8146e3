"""Doctors and visits."""

from dataclasses import dataclass, field
from random import Random

from nanotoolrl.world.api import API, check_known, new_id, record
from nanotoolrl.world.goals import Goal, register
from nanotoolrl.world.words import DAYS, PEOPLE, Day, ids

BRANCHES = "heart skin eyes teeth bones ears lungs nerves".split()


@dataclass
class Clinic(API):
    """Doctors and visits."""

    pool = "ood"
    doctors: list[dict] = field(default_factory=list)
    visits: list[dict] = field(default_factory=list)

    def find_doctors(self, branch: str) -> list[dict]:
        """List the doctors of a branch of medicine."""
        check_known("branch", branch, sorted({doctor["branch"] for doctor in self.doctors}))
        return [
            {"name": doctor["name"], "id": doctor["id"]}
            for doctor in self.doctors
            if doctor["branch"] == branch
        ]

    def book_visit(self, doctor_id: int, patient: str, day: Day) -> dict:
        """Book a visit for a patient."""
        record(self.doctors, "doctor", doctor_id)
        number = new_id(self.visits)
        self.visits.append({"id": number, "doctor_id": doctor_id, "patient": patient, "day": day})
        return {"visit_id": number}

    def find_visit(self, patient: str) -> dict:
        """Find the visit of a patient."""
        visit = record(self.visits, "visit of", patient, by="patient")
        return {"visit_id": visit["id"], "day": visit["day"]}

    def move_visit(self, visit_id: int, day: Day) -> str:
        """Move a visit to another day."""
        record(self.visits, "visit", visit_id)["day"] = day
        return "moved"

    def cancel_visit(self, visit_id: int) -> str:
        """Cancel a visit."""
        self.visits.remove(record(self.visits, "visit", visit_id))
        return "cancelled"


def world(rng: Random, size: int) -> dict:
    branches = rng.sample(BRANCHES, 2)
    rows = zip(ids(rng, size), rng.sample(PEOPLE, min(size, 30)), strict=False)
    doctors = [{"id": i, "name": name, "branch": rng.choice(branches)} for i, name in rows]
    visits = [
        {"id": i, "doctor_id": rng.choice(doctors)["id"], "patient": patient, "day": rng.choice(DAYS)}
        for i, patient in zip(ids(rng, 3), rng.sample(PEOPLE, 3), strict=True)
    ]
    return {"doctors": doctors, "visits": visits}


def draw(rng: Random, api: Clinic) -> dict:
    doctor, visit = rng.choice(api.doctors), rng.choice(api.visits)
    patient = rng.choice([p for p in PEOPLE if p not in [v["patient"] for v in api.visits]])
    new_day = rng.choice([day for day in DAYS if day != visit["day"]])
    drawn = {
        "doctor": doctor["name"],
        "branch": doctor["branch"],
        "patient": patient,
        "visit_day": rng.choice(DAYS),
    }
    return drawn | {"known": visit["patient"], "later": new_day}


GOALS = [
    Goal("Which doctors treat {branch}?|List the doctors for {branch}.", "find_doctors branch"),
    Goal(
        "Book {patient} a visit at {doctor} for {branch} on {visit_day}.|"
        "{patient} sees {doctor}, {branch}, on {visit_day}.",
        "find_doctors branch; book_visit doctor_id=id patient day=visit_day",
        "Booked as {visit_id}.",
        vague="Book {patient} a visit at {doctor} for {branch}.|{patient} sees {doctor}, {branch}.",
        question="On which day?",
        answer="On {visit_day}.|{visit_day}.",
    ),
    Goal(
        "When is the visit of {known}?|Look up the visit of {known}.", "find_visit patient=known", "On {day}."
    ),
    Goal(
        "Move the visit of {known} to {later}.|{known} comes on {later} instead.",
        "find_visit patient=known; move_visit visit_id day=later",
        "Moved.",
        vague="Move the visit of {known}.|{known} must come on another day.",
        question="To which day?",
        answer="To {later}.|{later}.",
    ),
    Goal(
        "Cancel the visit of {known}.|{known} does not come.",
        "find_visit patient=known; cancel_visit visit_id",
        "Cancelled.",
    ),
]

register(Clinic, world, draw, GOALS, named=["doctor"], keys=["patient"], groups=["branch", "day"])
