"""Ask a model on Amazon Bedrock, and let it call a function of yours.

pip install "asyncmodels[bedrock]"
export AWS_REGION=us-east-1
export AWS_BEARER_TOKEN_BEDROCK=...        # a Bedrock API key; or AWS credentials as every AWS program finds them
python examples/bedrock.py us.amazon.nova-pro-v1:0 "What should I wear in Oslo today?"
"""

import asyncio
import sys

from asyncmodels import BedrockModel, Message


def weather(city: str) -> str:
    """Tells the weather of today.

    Args:
        city: The name of a city.
    """
    return f"Rain in {city}, 8 degrees."


async def main(model_id: str, question: str) -> None:
    async with BedrockModel(model_id, inferenceConfig={"maxTokens": 500}) as model:
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
            print(f"\n\n{answer.usage.total_tokens} tokens")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
