"""Ask a deployment on Azure OpenAI: python examples/azure_openai.py DEPLOYMENT "a question"

Set AZURE_OPENAI_ENDPOINT (https://RESOURCE.openai.azure.com) and OPENAI_API_VERSION ("v1", or a date), and
AZURE_OPENAI_API_KEY; without a key, azure-identity (pip install azure-identity) finds out who you are.
"""

import asyncio
import os
import sys

from asyncmodels import AzureOpenAIModel


async def main(deployment: str, question: str) -> None:
    credential = None
    if "AZURE_OPENAI_API_KEY" not in os.environ:
        from azure.identity import DefaultAzureCredential

        credential = DefaultAzureCredential()
    async with AzureOpenAIModel(deployment, azure_ad_token_provider=credential) as model:
        async with model.stream(question, max_tokens=200) as stream:
            async for delta in stream:
                print(delta.content, end="", flush=True)
        response = await stream.response()
        print(f"\n\n{response.usage.total_tokens if response.usage else 'an unknown number of'} tokens")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
