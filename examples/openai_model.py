"""Ask an OpenAI model that reasons, let it call a function of yours, and see what it thought.

pip install "asyncmodels[openai]"
export OPENAI_API_KEY=...
python examples/openai_model.py gpt-5-mini "What should I wear in Oslo today?"

It uses the Responses API: each answer is put into the conversation as it came, and what the model had thought goes back
to it with the result of the call. Nothing is stored at OpenAI.
"""

import asyncio
import sys

from asyncmodels import Message, OpenAIModel


def weather(city: str) -> str:
    """Tells the weather of today.

    Args:
        city: The name of a city.
    """
    return f"Rain in {city}, 8 degrees."


async def main(model_id: str, question: str) -> None:
    extra = {
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "low", "summary": "auto"},
    }
    async with OpenAIModel(model_id, api="responses", extra=extra) as model:
        conversation: list[object] = [Message("user", question)]
        while True:
            async with model.stream(conversation, tools=[weather]) as stream:
                async for delta in stream:
                    print(delta.content, end="", flush=True)
            answer = await stream.response()
            if not answer.tool_calls:
                break
            conversation.append(answer)
            for call in answer.tool_calls:
                result = weather(**call.parse_arguments())
                conversation.append(Message("tool", result, tool_call_id=call.id))
        if answer.usage is not None:
            print(f"\n\n{answer.usage.total_tokens} tokens, {answer.usage.reasoning_tokens or 0} of them for thinking")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
