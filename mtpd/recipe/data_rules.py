"""Rules between the keys of a recipe's data: prompts, their columns, and their responses."""

from __future__ import annotations

from urllib.parse import urlsplit

from mtpd.recipe.sections import DataRecipe

ASKING = ("prompt", "messages", "conversations", "turns", "instruction", "input", "question", "query", "text", "chosen")
"""What a column can be taken for that says what is asked."""
FIELDS = (
    *ASKING,
    "completion",
    "output",
    "answer",
    "response",
    "system",
    "tools",
    "chat_template_kwargs",
    "id",
    "family",
)
"""What a column can be taken for."""
RESERVED = ("messages", "tools", "documents", "tokenize", "add_generation_prompt", "continue_final_message")
"""Arguments of the rendering that rows and mtpd decide."""
BUILT_IN = ("builtin", "stdlib")
"""Prompts whose rows have known columns."""


def data_problems(data: DataRecipe) -> list[str]:
    problems = []
    if data.temperature == 0 and data.top_p < 1:
        problems.append(
            f"data.top_p: {data.top_p} does nothing while data.temperature is 0; accepted: 1, or a temperature above 0"
        )
    if data.responses != "given" and data.max_new_tokens >= data.row_length:
        problems.append(
            f"data.max_new_tokens: {data.max_new_tokens} does not fit into a row; "
            f"accepted: less than data.row_length, which is {data.row_length}"
        )
    if data.responses == "given" and data.prompts == "builtin":
        problems.append(
            "data.responses: given is not accepted with data.prompts: builtin, which has prompts only; accepted: trunk"
        )
    if data.server is not None:
        address = urlsplit(data.server)
        if not address.hostname or "@" in address.netloc or address.query or address.fragment:
            # Not shown: it may hold a key.
            problems.append(
                "data.responses: this address is not accepted; accepted: http://HOST:PORT, with a key in the "
                "environment variable MTPD_API_KEY, which no file keeps"
            )
    problems += [
        f"data.columns.{name}: {column} is not accepted; accepted: {', '.join(FIELDS)}"
        for name, column in data.columns.items()
        if name not in FIELDS
    ]
    if data.template is not None and (asked := sorted(set(data.columns) & set(ASKING))):
        problems.append(
            f"data.columns.{asked[0]}: {data.columns[asked[0]]} is not accepted with data.template, which writes the "
            f"user's message; accepted: {', '.join(name for name in FIELDS if name not in ASKING)}"
        )
    problems += [
        f"data.chat_template_kwargs.{name}: is not accepted, it has a meaning of its own; accepted: other arguments of "
        "the chat template"
        for name in RESERVED
        if name in data.chat_template_kwargs
    ]
    if data.template is not None:
        # Imported only for recipes that use it.
        from jinja2 import Environment, TemplateSyntaxError

        try:
            Environment().parse(data.template)
        except TemplateSyntaxError as error:
            problems.append(f"data.template: {data.template} is not accepted ({error}); accepted: a Jinja template")
    if data.prompts in BUILT_IN and (data.columns or data.template is not None):
        key = "columns" if data.columns else "template"
        problems.append(
            f"data.{key}: does nothing with prompts: {data.prompts}; accepted: {'{}' if data.columns else 'null'}"
        )
    sources = [("data", data.prompts, data.subset)]
    sources += [(f"data.given.{number}", text.prompts, text.subset) for number, text in enumerate(data.given)]
    for key, prompts, subset in sources:
        if subset is not None and (prompts == "builtin" or prompts.endswith((".jsonl", ".json", ".csv", ".parquet"))):
            problems.append(f"{key}.subset: {subset} does nothing with prompts: {prompts}; accepted: null")
    problems += [
        f"data.given.{number}.prompts: builtin is not accepted, it has prompts only; accepted: a file or "
        "folder of rows, or a datasets id"
        for number, text in enumerate(data.given)
        if text.prompts == "builtin"
    ]
    return problems
