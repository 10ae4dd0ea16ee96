"""Calls that type checkers must refuse: each marked line, for the reason in brackets, and no other line."""

from asyncmodels import Message, Model, Request


async def calls(model: Model) -> None:
    await model.generate()  # error: [call-arg]
    await model.generate(5)  # error: [arg-type]
    await model.generate("Hi.", temprature=1)  # error: [call-arg]
    await model.generate("Hi.", max_tokens="5")  # error: [arg-type]
    await model.generate("Hi.", stop_sequences=[1])  # error: [list-item]
    await model.generate("Hi.", grammar="a|b")  # error: [arg-type]
    await model.generate("Hi.", timeout="5s")  # error: [arg-type]
    await model.generate(messages="Hi.")  # error: [call-arg]
    model.sync.generate("Hi.", stop=["END"])  # error: [call-arg]
    (await model.generate("Hi.")).content = "mine"  # error: [misc]
    Message("king", "Hi.")  # error: [arg-type]
    Request(messages=[Message("user", "Hi.")])  # error: [arg-type]
    Request(max_tokens=5)  # error: [call-arg]


async def forgotten(model: Model) -> None:
    len(model.generate("Hi.").content)  # error: [attr-defined]
    for _ in model.stream("Hi."):  # error: [attr-defined]
        pass
    with model.stream("Hi."):  # error: [attr-defined]
        pass
    async for _ in model.sync.stream("Hi."):  # error: [attr-defined]
        pass
    len((await model.generate("Hi.")).content)  # error: [arg-type]
