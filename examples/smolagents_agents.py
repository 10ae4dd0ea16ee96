"""Agents of smolagents on one model of ours, at the same time: python examples/smolagents_agents.py

It asks gpt-5-mini with the key in OPENAI_API_KEY; OPENAI_BASE_URL and MODEL choose another server and model, and
``MODEL=smollm`` the small one on this machine.
"""

import os
from concurrent.futures import ThreadPoolExecutor

from smolagents import CodeAgent

from asyncmodels.integrations.smolagents import SmolagentsModel

TASKS = ["What is 12 times 12?", "What is the 20th Fibonacci number?", "How many days has a leap year?"]


def main() -> None:
    with SmolagentsModel(os.environ.get("MODEL", "openai:gpt-5-mini")) as model:
        agents = [CodeAgent(tools=[], model=model, verbosity_level=0) for _ in TASKS]
        with ThreadPoolExecutor(len(agents)) as threads:
            answers = threads.map(lambda agent, task: agent.run(task), agents, TASKS)
            for task, answer in zip(TASKS, answers, strict=True):
                print(f"{task} {answer}")


if __name__ == "__main__":
    main()
