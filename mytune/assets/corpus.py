"""The embedded model's text and instructions, and the demo's task: all written from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

Row = dict[str, str]

MONTHS = (
    "January February March April May June July August September October November December"
).split()
NAMES = "Anna Ben Clara David Eva Frank Grace Hugo Iris Jack Kate Leo Mia Noah Olga Paul".split()
PLACES = {
    "Lisbon": "Portugal", "Paris": "France", "Rome": "Italy", "Madrid": "Spain",
    "Vienna": "Austria", "Athens": "Greece", "Cairo": "Egypt", "Tokyo": "Japan",
    "Lima": "Peru", "Oslo": "Norway",
}  # fmt: skip
THINGS = "apples pears lemons books candles flowers stamps shells eggs cups spoons hats".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()
WEATHER = "sunny cloudy windy rainy cold warm foggy quiet".split()
ANIMALS = "dog cat bird horse fox owl rabbit duck mouse goat".split()
COLOURS = "red blue green yellow white black brown grey".split()
WORDS = [*THINGS, *ANIMALS, *COLOURS, *WEATHER, *NUMBERS]


def date_parts(rng: Random) -> tuple[int, str, int]:
    """Draw day, month's name and year."""
    return rng.randint(1, 28), rng.choice(MONTHS), rng.randint(1900, 2029)


def ordinal(day: int) -> str:
    """Return 1st, 2nd, 3rd, 4th, ..."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(day % 10 if day not in (11, 12, 13) else 0, "th")
    return f"{day}{ending}"


def written_date(rng: Random, day: int, month: str, year: int) -> str:
    """Write a date in one of three ways."""
    return rng.choice(
        (f"{day} {month} {year}", f"{month} {day}, {year}", f"the {ordinal(day)} of {month} {year}")
    )


def story(rng: Random) -> str:
    """Write a few sentences about a person, a place and a day."""
    name, other = rng.sample(NAMES, 2)
    place, country = rng.choice(list(PLACES.items()))
    animal, colour = rng.choice(ANIMALS), rng.choice(COLOURS)
    count, things = rng.choice(NUMBERS), rng.choice(THINGS)
    date = written_date(rng, *date_parts(rng))
    opening = rng.choice(
        (
            f"Hello, my name is {name} and I live in {place}, the capital of {country}.",
            f"On {date} {name} went to the market in {place}.",
            f"Once upon a time there was a {colour} {animal} that lived near {place}.",
            f"{name} was born in {country} on {date}.",
        )
    )
    middle = [
        f"The day was {rng.choice(WEATHER)} and {rng.choice(WEATHER)}.",
        f"{name} bought {count} {things} and gave them to {other}.",
        f"A {colour} {animal} sat by the door and looked at the {things}.",
        f'"How many {things} do you have?" asked {other}. "I have {count}," said {name}.',
        f"They wrote a letter on {date} and sent it to {place}.",
    ]
    ending = rng.choice(
        (
            f"In the evening {name} and {other} walked home.",
            f"{other} was happy, and so was the {animal}.",
            f"That is how {name} remembers {place}.",
        )
    )
    return " ".join([opening, *rng.sample(middle, rng.randint(1, 3)), ending])


def _about_a_date(rng: Random) -> Row:
    day, month, year = date_parts(rng)
    part, answer = rng.choice((("day", str(day)), ("month", month), ("year", str(year))))
    return _row(f"Which {part} is it: {written_date(rng, day, month, year)}?", answer)


def _number_of_month(rng: Random) -> Row:
    number = rng.randint(1, 12)
    return _row(f"Which number has the month {MONTHS[number - 1]}?", f"{number:02d}")


def _few(rng: Random) -> list[str]:
    """Draw words or numbers; only who can copy can repeat them."""
    numbers = [str(rng.randrange(10 ** rng.randint(1, 4))) for _ in range(3)]
    return rng.choice((rng.sample(WORDS, 3), numbers, [str(rng.randint(1900, 2029))]))


def _repeat(rng: Random) -> Row:
    text = rng.choice((" ".join(_few(rng)), written_date(rng, *date_parts(rng))))
    return _row(f"Repeat: {text}", text)


def _spell(rng: Random) -> Row:
    word = rng.choice([*WORDS, *MONTHS])
    return _row(f"Spell the word {word}.", "-".join(word))


def _two_digits(rng: Random) -> Row:
    number = rng.randint(1, 31)
    return _row(f"Write {number} with two digits.", f"{number:02d}")


def _capital(rng: Random) -> Row:
    place, country = rng.choice(list(PLACES.items()))
    return _row(f"What is the capital of {country}?", f"The capital of {country} is {place}.")


def _join(rng: Random) -> Row:
    parts = _few(rng)
    return _row(f"Join with dashes: {' '.join(parts)}", "-".join(parts))


def _row(prompt: str, answer: str) -> Row:
    return {"input": prompt, "output": answer}


SKILLS: tuple[Callable[[Random], Row], ...] = (
    _about_a_date, _number_of_month, _repeat, _spell, _two_digits, _capital, _join,
)  # fmt: skip


def instructions(rng: Random, count: int) -> Iterator[Row]:
    """Yield instructions that the embedded model is to follow."""
    for _ in range(count):
        yield rng.choice(SKILLS)(rng)


def iso_dates(rng: Random, count: int) -> list[Row]:
    """Return the demo's task, no row twice: write a date as ISO 8601 has it."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        day, month, year = date_parts(rng)
        prompt = f"Write as an ISO date: {written_date(rng, day, month, year)}"
        rows[prompt] = _row(prompt, f"{year}-{MONTHS.index(month) + 1:02d}-{day:02d}")
    return list(rows.values())
