"""Three agents share one small budget, and each has a share of his own that he cannot exceed.

python examples/budget.py gpt-5-mini 0.02

What a call could cost at most is set aside before it is sent, so that nothing is ever overspent; what it really cost
takes that place afterwards. The price is found in the installed list (pip install "asyncmodels[prices]"); for a server
that is not in it, say what a million tokens cost: python examples/budget.py my-model 0.02 0.25 2.00
"""

import asyncio
import sys
from functools import partial

from asyncmodels import Budget, BudgetExceededError, ConfigurationError, OpenAIModel, Price, Spending, SpendingLimit

QUESTIONS = {
    "poet": "Write a haiku about the sea.",
    "cook": "How do I make bread without yeast?",
    "novelist": "Write the first chapter of a novel.",
}
LENGTH = {"novelist": 100_000}


async def ask(model: OpenAIModel, agent: str, question: str) -> None:
    try:
        response = await model.generate(question, agent=agent, max_tokens=LENGTH.get(agent, 300))
    except BudgetExceededError as error:
        print(f"{agent}: refused, nothing was sent. {error}")
    else:
        print(f"{agent}: {response}")


async def main(name: str, dollars: float, price: Price | None) -> None:
    spending = Spending(money=dollars, per_agent=SpendingLimit(money=dollars / 2))
    budget = partial(Budget, spending=spending, prices=price)
    async with OpenAIModel(name, budget=budget) as model:
        await asyncio.gather(*(ask(model, agent, question) for agent, question in QUESTIONS.items()))
    now = spending.statistics()
    print(f"\nspent {now.spent:.6f} of {dollars} {now.currency} for {now.tokens} tokens; {now.left:.6f} left")
    for agent, part in sorted(now.by_agent.items()):
        print(f"{agent:>10}: {part.spent:.6f} in {part.calls} calls")


if __name__ == "__main__":
    try:
        name, dollars, *prices = sys.argv[1:]
        money = float(dollars)
        price = Price(input=float(prices[0]), output=float(prices[1])) if prices else None
    except (ValueError, IndexError):
        print("Give a model and how many dollars may be spent, as in: budget.py gpt-5-mini 0.02", file=sys.stderr)
        sys.exit(2)
    try:
        asyncio.run(main(name, money, price))
    except ConfigurationError as error:  # such as a key that is missing, or a model without a price
        print(error, file=sys.stderr)
        sys.exit(2)
