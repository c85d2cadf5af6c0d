"""A language model small enough to read: the demo's answers, tokens and embeddings.

All of it is a pure function of the input, so the same question gets the same words. An answer quotes the
question, then says what the model knows that lies closest to it (by the cosine of the embeddings). Nothing
here is clever; it only has to feel alive.
"""

import hashlib
import math
import re
from random import Random

KNOWLEDGE = """
A gateway stands between the people who ask and the machines that answer.
The graphics card, or GPU, multiplies large matrices, and every product brings the next word closer.
Each token leaves the model as soon as it is known, and travels through the gateway without waiting.
A good proxy forwards bytes first and counts them afterwards.
The meter reads the usage, the tokens in and out, from the answer itself.
One receipt is written for every call, and never changed, so a bill can be followed down to one call.
Batching lets one graphics card serve many people at once and keeps its memory busy.
The prompt cache remembers the beginning of a conversation and saves the work of reading it again.
When a client leaves early, the gateway stops the machine, and nobody pays for silence.
Latency is what you feel; throughput, or speed for everybody, is what you pay for.
A small model answers quickly and a large model slowly, but both begin with one token.
Streaming makes a long answer feel short and fast, because the first word arrives at once.
A scheduler picks the machine with the shortest queue and the warmest cache.
Memory bandwidth decides how fast the next token can be found.
An honest benchmark names the machine, the command, and the thing it was compared with.
An API key says who is calling; the gateway keeps only its digest, so nobody can read it back.
Tools are how a model acts: it names one, the MCP server runs it, and the result comes back as text.
An embedding turns a text into a point, and texts of like meaning lie near each other.
My name is demo-chat; I am the small model who lives behind this gateway.
""".strip().split("\n")
STOP_WORDS = re.compile(
    r"\b(an?|and|are|as|at|be|but|by|can|could|do|does|for|from|have|how|i|if|in|is|it|me|my|of|on|or|please|so|"
    r"tell|that|the|then|there|this|to|was|we|what|when|where|which|why|will|with|would|about|say|something)\b",
    re.IGNORECASE,
)
OPENINGS = (
    "You asked “{question}”, so here is what I know.",
    "“{question}”: let me think aloud.",
    "About “{question}”, as far as a small model can tell:",
    "Let me start from “{question}”.",
)
GREETING = "Hello! I am the demo model behind this gateway, and I am glad you called."
OPERATORS = {"+": "plus", "-": "minus", "*": "times", "x": "times", "×": "times"}
DIMENSIONS = 64


def answer(prompt: str, seed: int = 0) -> str:
    """Return a few sentences that react to `prompt`; the same for the same prompt and seed."""
    digest = hashlib.blake2b(f"{seed}:{prompt}".encode(errors="replace"), digest_size=8).digest()
    random = Random(int.from_bytes(digest, "big"))  # noqa: S311 (a choice of words, no secret)
    closest = _closest(prompt)[: random.choice((2, 2, 3))]
    return " ".join([_arithmetic(prompt) or _opening(prompt, random), *closest])


def tokens(text: str) -> list[str]:
    """Cut text into pieces that join to it again; what the demo counts and streams."""
    return re.findall(r"\s*\w{1,9}|\s*[^\w\s]|\s+", text)


def embedding(text: str, dimensions: int = DIMENSIONS) -> list[float]:
    """Return a unit vector; texts that share words and word parts point the same way (feature hashing)."""
    vector = [0.0] * dimensions
    for word in re.findall(r"\w+", text.lower()) or [text]:
        for feature, weight in ((word, 1.0), *((part, 0.4) for part in _parts(word))):
            digest = hashlib.blake2b(feature.encode(errors="replace"), digest_size=8).digest()
            sign = 1 if digest[4] & 1 else -1
            vector[int.from_bytes(digest[:4], "big") % dimensions] += sign * weight
    length = math.hypot(*vector)
    if not length:  # the features cancelled each other out
        return [1.0, *vector[1:]]
    return [value / length for value in vector]


def _parts(word: str) -> list[str]:
    padded = f"<{word}>"
    return [padded[at : at + 3] for at in range(len(padded) - 2)]


def _closest(prompt: str) -> list[str]:
    """Return the sentences known, the closest to the prompt first."""
    wanted = _meaning(prompt)
    return sorted(KNOWLEDGE, key=lambda known: -sum(map(float.__mul__, wanted, _meaning(known))))


def _meaning(text: str) -> list[float]:
    return embedding(STOP_WORDS.sub("", text), 1_024)


def _opening(prompt: str, random: Random) -> str:
    if re.match(r"\s*(hello|hi|hey|good (morning|evening|day)|who are you)\b", prompt, re.IGNORECASE):
        return GREETING
    question = " ".join(prompt.split())
    question = question if len(question) <= 80 else f"{question[:79]}…"
    return random.choice(OPENINGS).format(question=question) if question else GREETING


def _arithmetic(prompt: str) -> str | None:
    found = re.search(r"(?<![\w.])(\d{1,9})\s*([-+*x×])\s*(\d{1,9})(?![\w.])", prompt)
    if not found:
        return None
    left, operator, right = int(found[1]), OPERATORS[found[2]], int(found[3])
    result = {"plus": left + right, "minus": left - right, "times": left * right}[operator]
    return f"{left} {operator} {right} is {result}."
