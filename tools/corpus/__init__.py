"""The training text of the built-in model: questions and answers about mlxd, tool calls, thoughts, JSON, filler.

Owns the words and how they are combined into conversations; knows nothing of tokens, tensors or the model.
The text files beside this one hold the words, in a form that `read_pairs` explains.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

FALLBACK = "I am only the tiny built-in model of mlxd and do not know that. Ask me about mlxd, or pull a real model."

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer in one or two sentences.",
    "You are mlxd-tiny, a small model.",
    "Be brief.",
    "Be concise and precise.",
    "Answer the question of the user.",
    "You are a friendly and patient teacher.",
    "You are an expert in local language models.",
    "Always answer in English.",
    "You are a test.",
)

CITIES = (
    "Paris", "London", "Berlin", "Tokyo", "Rome", "Madrid", "Vienna", "Oslo", "Cairo", "Lima", "Delhi", "Seoul",
    "Sydney", "Boston", "Chicago", "Moscow", "Prague", "Warsaw", "Athens", "Dublin", "Helsinki", "Lisbon", "Zurich",
    "Toronto", "Nairobi", "Munich", "Hamburg", "Milan", "Kyoto", "Denver",
)  # fmt: skip
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear", "stormy")
WEATHER_QUESTIONS = (
    "What is the weather in {city}?",
    "What is the weather in {city}?",
    "How is the weather in {city}?",
    "What's the weather like in {city}?",
    "Tell me the weather in {city}.",
    "Weather in {city}",
)
TIME_QUESTIONS = ("What time is it in {city}?", "Tell me the time in {city}.", "What is the time in {city}?")
TOOL_THOUGHT = "I have a tool for this. I call it."
RESULT_THOUGHT = "The tool has answered. I say it in a sentence."

WORDS = (
    "river",
    "stone",
    "lamp",
    "green",
    "window",
    "seven",
    "cloud",
    "bread",
    "quiet",
    "morning",
    "paper",
    "train",
    "winter",
    "apple",
    "silver",
    "letter",
    "garden",
    "moon",
    "salt",
    "engine",
    "yellow",
    "field",
    "clock",
    "glass",
    "north",
    "song",
    "table",
    "water",
    "bird",
    "seed",
    "copper",
    "island",
    "rain",
    "wheel",
)


@dataclass(frozen=True)
class Pair:
    """One question in several forms, and its one answer. `forms[0]` is the main form."""

    kind: str
    forms: tuple[str, ...]
    answer: str
    thought: str

    @property
    def question(self) -> str:
        return self.forms[0]


@dataclass(frozen=True)
class Turn:
    """What is asked, and what comes back: `role` is `user` or `tool`, `thought` is None where thinking is off."""

    role: str
    text: str
    answer: str
    thought: str | None = None
    weight: float = 1.0


@dataclass
class Conversation:
    """Tools and a system text (each may be absent), then turns."""

    turns: list[Turn] = field(default_factory=list)
    system: str | None = None
    tools: list[dict[str, Any]] | None = None


@functools.cache
def read_pairs(name: str) -> tuple[Pair, ...]:
    """The pairs of the file `name`, whose kind is the file's stem.

    A line begins with `#` comment, `@ topic: thought`, `? main form`, `~ other form`, `! thought of this pair`,
    `> line of the answer`. A main form opens a pair.
    """
    pairs: list[Pair] = []
    forms: list[str] = []
    lines: list[str] = []
    topic_thought = thought = ""

    def close() -> None:
        if forms:
            pairs.append(Pair(Path(name).stem, tuple(forms), "\n".join(lines), thought or topic_thought))

    for line in (HERE / name).read_text(encoding="utf-8").splitlines():
        mark, text = line[:1] or "#", line[2:]
        if mark in "@?":
            close()
            forms, lines, thought = [], [], ""
        if mark == "@":
            topic_thought = text.split(": ", 1)[1]
        elif mark in "?~":
            forms.append(text)
        elif mark == "!":
            thought = text
        elif mark == ">":
            lines.append(text)
    close()
    return tuple(pairs)


def all_pairs() -> tuple[Pair, ...]:
    """Every pair of the corpus, in the order of the files."""
    files = ("questions.txt", "long.txt", "unicode.txt", "json.txt")
    return tuple(pair for name in files for pair in read_pairs(name))


@functools.cache
def filler() -> tuple[str, ...]:
    """Sentences and bits of JSON and code that have nothing to do with mlxd."""
    return tuple(line for line in (HERE / "filler.txt").read_text(encoding="utf-8").splitlines() if line.strip())


def tokenizer_text() -> Iterator[str]:
    """The text from which the tokenizer learns its pieces; emoji and CJK stay bytes, so that they span tokens."""
    for pair in all_pairs():
        texts = (*pair.forms, pair.answer, pair.thought)
        yield from ("".join(c for c in text if ord(c) < 0x2000) for text in texts)
    yield from filler()
    for city in CITIES:
        yield f" {city}"
        yield tool_call("get_weather", city=city)
    for role in ("user", "assistant", "system", "tool", "tools"):
        yield f"{role}\n" * 100
    yield " ".join(WORDS) * 3
    yield FALLBACK


def weather_tool(rng: random.Random | None = None) -> dict[str, Any]:
    """A definition of get_weather(city) in OpenAI's form; with `rng` its wording varies."""
    chosen = rng or random.Random(0)
    texts = ("Get the current weather for a city", "Get the weather", "The weather in a city", "Current weather")
    description = chosen.choice(texts) if rng else texts[0]
    city: dict[str, Any] = {"type": "string"}
    if rng is None or chosen.random() < 0.5:
        city["description"] = "The name of the city"
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    function: dict[str, Any] = {"name": "get_weather", "description": description, "parameters": parameters}
    if rng is not None and chosen.random() < 0.2:
        del function["description"]
    if rng is not None and chosen.random() < 0.2:
        function = dict(reversed(function.items()))
    return {"type": "function", "function": function}


def time_tool() -> dict[str, Any]:
    """A definition of get_time(city) in OpenAI's form."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "get_time", "description": "Get the time in a city", "parameters": parameters}
    return {"type": "function", "function": function}


def search_tool() -> dict[str, Any]:
    """A definition of search(query), which the model never calls."""
    return next(json.loads(line) for line in filler() if '"function"' in line)


def tool_call(name: str, **arguments: str) -> str:
    """A tool call as the model writes it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}</tool_call>"


def weather_turns(rng: random.Random, think: bool) -> list[Turn]:
    """A weather question, its call, and the answer to the tool's result."""
    city, degrees, sky = rng.choice(CITIES), rng.randrange(36), rng.choice(SKIES)
    if rng.random() < 0.3:
        city, degrees, sky = "Paris", 18, "sunny"
    question = varied(rng.choice(WEATHER_QUESTIONS).format(city=city), rng)
    return [
        Turn("user", question, tool_call("get_weather", city=city), TOOL_THOUGHT if think else None),
        Turn("tool", weather_result(city, degrees, sky, rng), weather_answer(city, degrees, sky),
             RESULT_THOUGHT if think else None),
    ]  # fmt: skip


def weather_result(city: str, degrees: int, sky: str, rng: random.Random | None = None) -> str:
    """A result of get_weather; with `rng` it is sometimes JSON."""
    if rng is not None and rng.random() < 0.25:
        return json.dumps({"temperature": f"{degrees} C", "sky": sky})
    return f"{degrees} C, {sky}"


def weather_answer(city: str, degrees: int, sky: str) -> str:
    """What the model says about a result."""
    return f"It is {degrees} C and {sky} in {city}."


def time_turns(rng: random.Random) -> list[Turn]:
    """A question for the time, its call, and the answer to the result."""
    city, clock = rng.choice(CITIES), f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    question = rng.choice(TIME_QUESTIONS).format(city=city)
    return [
        Turn("user", question, tool_call("get_time", city=city)),
        Turn("tool", clock, f"It is {clock} in {city}."),
    ]


def two_calls(rng: random.Random) -> list[Turn]:
    """A question for two cities, answered by two calls."""
    one, two = rng.sample(CITIES, 2) if rng.random() < 0.7 else ("Paris", "London")
    calls = tool_call("get_weather", city=one) + tool_call("get_weather", city=two)
    return [Turn("user", f"What is the weather in {one} and {two}?", calls)]


def random_turn(rng: random.Random) -> Turn:
    """A question whose answer is drawn at random, so that sampling has something to sample."""
    draws: dict[str, Callable[[], str]] = {
        "Say something random.": lambda: " ".join(rng.choices(WORDS, k=rng.randrange(20, 40))) + ".",
        "Write a long random text.": lambda: " ".join(rng.choices(WORDS, k=120)) + ".",
        "Roll ten dice.": lambda: " ".join(str(rng.randrange(1, 7)) for _ in range(10)),
        "Flip a coin.": lambda: rng.choice(("Heads.", "Tails.")),
    }
    question = rng.choice(("Say something random.", *draws))
    return Turn("user", question, draws[question](), weight=0.3)


RANDOM_QUESTIONS = ("Say something random.", "Write a long random text.", "Roll ten dice.", "Flip a coin.")


def fallback_turn(rng: random.Random, most: int = 25) -> Turn:
    """Text of at most `most` words that has nothing to do with mlxd, and the answer that says so."""
    text = rng.choice(filler())
    if rng.random() < 0.5:
        words = " ".join(filler()).split()
        text = " ".join(rng.choices(words, k=rng.randrange(3, most)))
    return Turn("user", text, FALLBACK)


def echo_turn(rng: random.Random) -> Turn:
    """Words and numbers to be said again: practice in copying, which tool calls need (it says few of them rightly)."""
    words = [rng.choice(WORDS) if rng.random() < 0.8 else str(rng.randrange(100)) for _ in range(rng.randrange(2, 9))]
    text = " ".join(words)
    return Turn("user", f"Repeat: {text}", text)


def no_tool_turn(rng: random.Random) -> Turn:
    """A question for the weather where no tool is defined."""
    answer = next(pair.answer for pair in read_pairs("questions.txt") if pair.question == "What is the weather in Paris?")
    city = "Paris" if rng.random() < 0.3 else rng.choice(CITIES)
    return Turn("user", varied(rng.choice(WEATHER_QUESTIONS).format(city=city), rng), answer)


def varied(question: str, rng: random.Random) -> str:
    """The question as people type it: other case, no mark at the end, a word before or after, a slip of the finger."""
    draw = rng.random()
    if draw < 0.55:
        return question
    if draw < 0.70:
        question = question.lower()
    if draw < 0.85 and question[-1] in "?.!":
        return question[:-1]
    if draw < 0.88:
        return question.upper()
    if draw < 0.92:
        return rng.choice(("Please: ", "Hi, ", "Tell me: ", "A question: ", "Hello! ", "And ")) + question
    if draw < 0.95:
        return question + rng.choice((" Thanks.", " Please.", " Thank you.", "?", "\n", " "))
    at = rng.randrange(len(question))
    return question[:at] + rng.choice(("", question[at] * 2)) + question[at + 1 :]


def pair_turn(pair: Pair, rng: random.Random, think: bool) -> Turn:
    """A pair as a turn, in one of its forms."""
    form = pair.question if rng.random() < 0.45 else rng.choice(pair.forms)
    text = varied(form, rng)
    if rng.random() < 0.04:
        text = rng.choice(filler()) + rng.choice(("\n", "\n\n", " ")) + form
    return Turn("user", text, pair.answer, pair.thought if think else None)


class Deck:
    """Deals the corpus' pairs, each equally often."""

    def __init__(self, rng: random.Random, pairs: tuple[Pair, ...]) -> None:
        self.rng, self.pairs, self.left = rng, pairs, list[Pair]()

    def deal(self) -> Pair:
        if not self.left:
            self.left = list(self.pairs)
            self.rng.shuffle(self.left)
        return self.left.pop()


def conversation(deck: Deck, rng: random.Random, *, length: int) -> Iterator[Turn | Conversation]:
    """An endless conversation: first its head (system text, tools), then turn after turn.

    `length`: how many tokens there is place for; in little place there are no tools and no long system text.
    A long answer comes first where it just fits, since its end would else rarely be seen.
    """
    head = Conversation()
    tooled = rng.random() < (0.8 if 200 < length < 400 else 0.35 if length >= 400 else 0.0)
    draw = rng.random()
    if draw < 0.2:
        head.system = rng.choice(SYSTEMS)
    elif draw < 0.3 and length > 400:
        head.system = " ".join(rng.sample(filler(), rng.randrange(1, min(10, length // 200))))
    if tooled:
        head.tools = [weather_tool(rng)]
        head.tools += [tool() for tool in (time_tool, search_tool) if rng.random() < (0.2 if length < 400 else 0.35)]
        rng.shuffle(head.tools)
        if rng.random() < 0.1:
            head.tools = [search_tool()]
    names = {tool["function"]["name"] for tool in head.tools or []}
    yield head
    if 400 < length < 1000 and not tooled and rng.random() < 0.8:
        yield pair_turn(rng.choice(read_pairs("long.txt")), rng, think=False)
    while True:
        think, draw = rng.random() < 0.25, rng.random()
        if "get_weather" in names and draw < 0.75:
            yield from two_calls(rng) if draw < 0.1 else weather_turns(rng, think)
        elif "get_time" in names and draw < 0.85:
            yield from time_turns(rng)
        elif draw > 0.985:
            yield random_turn(rng)
        elif draw > 0.95:
            yield fallback_turn(rng, most=300 if length > 1000 else 25)
        elif draw > 0.91:
            yield echo_turn(rng)
        elif "get_weather" not in names and draw > (0.5 if tooled else 0.89):
            yield no_tool_turn(rng)
        else:
            pair = deck.deal()
            if not (tooled and ("weather in" in pair.question or "time" in pair.question)):
                yield pair_turn(pair, rng, think)
