"""Answers that a program can use, from a model on this machine: python examples/structured_local.py

SmolLM2 has 135 million parameters and little to say, but what it says is held to a form, token by token: a dataclass,
one of three words, a pattern, a call of a function. Another model is named on the command line.
"""

import asyncio
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Len

import asyncmodels
from asyncmodels import Choice, Regex


@dataclass
class Letter:
    subject: Annotated[str, Len(1, 60)]
    kind: Literal["question", "order", "complaint"]
    urgent: bool


def refund(order: Annotated[str, Len(1, 12)], reason: Literal["late", "broken", "wrong"]) -> str:
    """Pays the price of an order back.

    Args:
        order: the number of the order
        reason: what is wrong with it
    """
    return f"Order {order} is paid back, because it was {reason}."


LETTER = "The lamp of my order A-17 arrived in pieces. I want my money back, today!"


async def main(scheme: str) -> None:
    async with asyncmodels.load(scheme, temperature=0.0, max_tokens=160) as model:
        # All four run in one batch, each held to its own form.
        letter, mood, number, call = await asyncio.gather(
            model.generate(f"Sort this letter: {LETTER}", response_format=Letter),
            model.generate(f"How does the writer feel? {LETTER}", grammar=Choice(("happy", "neutral", "angry"))),
            model.generate(f"What is the number of the order? {LETTER}", grammar=Regex("[A-Z]-[0-9]{1,3}")),
            model.generate(f"Act on this letter: {LETTER}", tools=[refund], tool_choice="required"),
        )
    print(letter.parsed)
    print("mood:", mood)
    print("order:", number)
    for asked in call.tool_calls:
        print(f"{asked.name}({asked.arguments}) -> {refund(**asked.parse_arguments())}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "smollm"))
