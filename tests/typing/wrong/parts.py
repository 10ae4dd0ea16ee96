"""Models and backends that type checkers must refuse: each marked line, for the reason in brackets, and no other."""

from asyncmodels import Backend, CallableModel, Concurrency, Model, OpenAIModel, Request, Response, Retry
from asyncmodels.testing import ScriptedBackend

Model("gpt-5")  # error: [arg-type]
Model(ScriptedBackend)  # error: [arg-type]
Model(ScriptedBackend("a"), Retry(ScriptedBackend("b")))  # error: [arg-type]
Model(ScriptedBackend("a"), Concurrency)  # error: [arg-type]
Model(ScriptedBackend("a"), temperature=0.5)  # error: [call-arg]
OpenAIModel()  # error: [call-arg]
OpenAIModel("gpt-5", temprature=0.5)  # error: [call-arg]
CallableModel("a")  # error: [arg-type]
Retry(ScriptedBackend("a"), tries=3)  # error: [call-arg]
ScriptedBackend(5)  # error: [arg-type]


class Half(Backend):
    async def generate(self, request: Request, /) -> Response:
        return Response()


Half()  # error: [abstract]


class Wrong(Backend):
    async def generate(self, request: str, /) -> Response:  # error: [override]
        return Response()
