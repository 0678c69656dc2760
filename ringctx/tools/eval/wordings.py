"""Wordings: what needles say and how they are asked for. Tune with some and report with others: settings fit to words, too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """A needle with {number}, a question and the beginning of its answer, each with {of}: ` of Lisbon`, or nothing where there is one."""

    needle: str
    question: str
    beginning: str


WORDINGS = {
    "plain": Wording(
        "The special magic number{of} is: {number}.",
        "What is the special magic number{of} mentioned in the text above?",
        "The special magic number{of} mentioned in the text is",
    ),
    "diary": Wording(
        "Dear diary, today I set the code of the safe{of} to {number}.",
        "To which number did the writer of the diary set the code of the safe{of}?",
        "The writer of the diary set the code of the safe{of} to",
    ),
    "passkey": Wording(  # Mohtashami & Jaggi 2023 (arXiv 2305.16300)
        "The pass key{of} is {number}. Remember it. {number} is the pass key{of}.",
        "Which number is the pass key{of} in the text above?",
        "The pass key{of} in the text above is the number",
    ),
    "letter": Wording(
        "P.S. The new telephone number of the office{of} is {number}, so please call there.",
        "Which telephone number of the office{of} does the letter give?",
        "The telephone number of the office{of} is",
    ),
    "ledger": Wording(
        "The invoice{of} was entered in the ledger under {number} and is paid.",
        "Under which number was the invoice{of} entered in the ledger?",
        "The invoice{of} was entered in the ledger under",
    ),
    "notice": Wording(
        "Notice to all travellers: the train{of} that leaves at noon has the number {number}.",
        "What is the number of the train{of} that leaves at noon?",
        "The train{of} that leaves at noon has the number",
    ),
    "parcel": Wording(
        "The parcel{of} lies in the locker with the number {number}.",
        "In which locker does the parcel{of} lie?",
        "The parcel{of} lies in the locker with the number",
    ),
    "plate": Wording(
        "The licence plate on the doctor's car{of} reads {number}.",
        "What does the licence plate on the doctor's car{of} read?",
        "The licence plate on the doctor's car{of} reads",
    ),
    "lottery": Wording(
        "The ticket that won the lottery{of} had the number {number}.",
        "Which number had the ticket that won the lottery{of}?",
        "The ticket that won the lottery{of} had the number",
    ),
    "bell": Wording(
        "The great bell of the town hall{of} weighs {number} pounds.",
        "How many pounds does the great bell of the town hall{of} weigh?",
        "The great bell of the town hall{of} weighs",
    ),
    "library": Wording(
        "The shelves of the new library{of} hold {number} books.",
        "How many books do the shelves of the new library{of} hold?",
        "The shelves of the new library{of} hold",
    ),
}
"""By name, the default first."""
HELD_OUT = ("parcel", "plate", "lottery", "bell", "library")
"""Wordings to report with: nothing in this project, no list of heads either, was chosen by them."""
TO_TUNE = tuple(name for name in WORDINGS if name not in HELD_OUT)
"""The others."""

NAMES = (
    "Lisbon", "Vienna", "Oslo", "Madrid", "Dublin", "Warsaw", "Bergen", "Helsinki", "Prague", "Berlin", "Budapest", "Paris",
    "Munich", "Cairo", "Lima", "Tokyo", "Toronto", "Boston", "Denver", "Chicago", "Moscow", "Delhi", "Sydney", "Nairobi",
    "Havana", "Quito", "Seoul", "Manila", "Geneva", "Milan", "Zurich", "London",
)  # fmt: skip
"""What tells several needles of one text apart; none of them is in the King James Bible."""
