"""Parts of pages that follow from the code: tables of commands and of options, and the order of pages.

A page marks such a part by two comments, `<!-- from the code: NAME -->` and `<!-- end of NAME -->`. Sphinx replaces
what stands between them when it reads the page. The files hold the same text, for readers of the sources:
`python docs/_ext/from_code.py` writes it anew, and a test compares both.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from docutils import nodes

from narvl_plugin.cli.app import app as narvl

DOCS = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- from the code: (.+?) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
CODE = re.compile(r"(?<![\w`-])--[a-z][\w-]*|</?\w+>|\bnarvl (?:calibrate|data|distill|export|predictions|serve)\b")
"""What help texts write without the marks of code: flags, tokens, commands."""
LINK = re.compile(r"^(?:- |\| |\d\. )?\**\[[^]]+\]\(([\w/-]+)\.md\)", re.MULTILINE)
"""A link at the start of a line, a list item or a table's row."""


# --- Text ------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return a help text as Markdown, in which no character has a meaning that is not wanted."""
    parts = re.split(r"(`[^`]*`)", CODE.sub(lambda found: f"`{found[0]}`", " ".join(text.split())))
    escaped = (part if place % 2 else re.sub(r"([*<\[\]])", r"\\\1", part) for place, part in enumerate(parts))
    return "".join(escaped).replace("|", r"\|")


def sentence(text: str) -> str:
    """Return a text with a capital letter and a full stop."""
    text = text if re.match(r"\w+(_\w+|\.\w)", text) else text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def code(value: object) -> str:
    """Return a value as code in a table's cell."""
    return f"`{str(value).replace('|', chr(92) + '|')}`"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell or ' ' for cell in line)} |\n" for line in lines)


# --- Commands --------------------------------------------------------------------------------------------------------


def commands(command: Any = None, name: str = "narvl") -> Iterator[tuple[str, Any]]:
    """Yield the name and the object of each command that is no group of others."""
    command = typer.main.get_command(narvl) if command is None else command
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
    for word, one in (below or {}).items():
        yield from commands(one, f"{name} {word}")


def list_of_commands() -> str:
    """Return the table of all commands, each with the first line of its help."""
    rows = [[f"[`{name}`](#{name.replace(' ', '-')})", plain(one.help.splitlines()[0])] for name, one in commands()]
    return table(["command", "what it does"], rows)


def all_commands() -> str:
    """Return a section for each command."""
    return "\n".join(section(name, command) for name, command in commands())


def section(name: str, command: Any) -> str:
    """Return the section of a command: what it does, how it is called, its arguments and options."""
    context = command.make_context(name, [], resilient_parsing=True)
    paragraphs = [" ".join(paragraph.split()) for paragraph in command.help.split("\n\n")]
    examples = [one.removeprefix("Example: ") for one in paragraphs if one.startswith("Example: ")]
    text = "\n\n".join(plain(one) for one in paragraphs if not one.startswith("Example: "))
    parameters = [one for one in command.get_params(context) if one.name != "help"]
    rows = [described(*parameter.get_help_record(context)) for parameter in parameters]
    pieces = command.collect_usage_pieces(context) if rows else []
    usage = " ".join([name, *pieces]).replace("{", "").replace("}", "")
    lines = [usage, *(line for example in examples for line in ("", "# example", example))]
    options = table(["argument or option", "default", "meaning"], rows) + "\n" if rows else ""
    return f"## {name}\n\n{text}\n\n```text\n{chr(10).join(lines)}\n```\n\n{options}".rstrip("\n") + "\n"


def described(flags: str, text: str) -> list[str]:
    """Return the row of an argument or option from the two columns of its --help."""
    found = re.fullmatch(r"(.*?)(?:\s+\[([^]]*)\])?", text, re.DOTALL)
    assert found is not None
    default, meaning = "", [sentence(plain(found[1]))]
    for part in (found[2] or "").split("; "):
        if part.startswith("default: "):
            default = code(part.removeprefix("default: "))
        elif part == "required":
            default = "required"
        elif part:
            meaning.append(limit(part))
    names, _, kind = flags.partition(" <")
    kind = re.sub(r"list\[(\w+)\]| range", lambda one: (one[1] or "").lower(), kind.rstrip(">"))
    if kind == "" and names.startswith("--"):
        default = "off"
    return [" ".join([*map(code, names.split(" / ")), *([kind] if kind else [])]), default, " ".join(meaning)]


def limit(text: str) -> str:
    """Return a range such as `0<=x<=1` in words."""
    numbers = re.fullmatch(r"(?:(\S+?)<=)?x(?:([<>])=(\S+))?", text)
    assert numbers is not None, text
    least = numbers[1] or (numbers[3] if numbers[2] == ">" else None)
    most = numbers[3] if numbers[2] == "<" else None
    return f"At least {least}." if most is None else f"From {least} to {most}."


# --- Options of dataclasses ------------------------------------------------------------------------------------------


def kind_of(option: Field[Any]) -> str:
    """Return the type of an option; of an enumeration its values."""
    kind: Any = option.type
    if get_origin(kind) is not None:  # Optional
        kind = next(one for one in get_args(kind) if one is not type(None))
    return ", ".join(map(code, (one.value for one in kind))) if issubclass(kind, Enum) else kind.__name__


def default_of(option: Field[Any]) -> str:
    """Return the default of an option."""
    value = option.default
    if value is MISSING or value == "???":
        return "required"
    if value is None:
        return ""
    if isinstance(value, str) and value.startswith("${"):
        return f"that of {code(value[2:-1])}"
    if value == "":
        return "empty"
    return code(str(value).lower() if isinstance(value, bool) else value.value if isinstance(value, Enum) else value)


def options(kind: type, *beyond: type) -> str:
    """Return the table of the options of a dataclass, without those that are the same in other classes."""
    known = {(one.name, str(one.default), one.metadata.get("help")) for other in beyond for one in fields(other)}
    rows = [
        [code(one.name), kind_of(one), default_of(one), sentence(plain(one.metadata["help"]))]
        for one in fields(kind)
        if one.name != "_name" and one.metadata.get("help")
        if (one.name, str(one.default), one.metadata["help"]) not in known
    ]
    return table(["key", "type", "default", "meaning"], rows)


def table_of_sizes() -> str:
    """Return the options of each size."""
    from narvl_plugin.models.config import SIZES, OfaConfig

    varied = [one for one in fields(OfaConfig) if any(one.name in changes for changes in SIZES.values())]
    rows = [
        [code(one.name), *(code(changes.get(one.name, one.default)) for changes in SIZES.values())] for one in varied
    ]
    return table(["key", *SIZES], rows).replace("`True`", "`true`").replace("`False`", "`false`")


def parts() -> dict[str, Callable[[], str]]:
    """Return the function that writes each part, by its name. The modules take seconds to import."""
    import narvl_plugin.registered  # noqa: F401 - registers all that fairseq must know
    from criterions import adjust_label_smoothed_cross_entropy, qctc, qset, query_criterion
    from narvl_plugin.models.config import NarvlConfig, OfaConfig
    from narvl_plugin.scoring.registered import SCORERS
    from narvl_plugin.tasks import (
        answers,
        base,
        caption,
        common,
        refcoco,
        regions,
        scene_graph,
        scene_tree,
        snli_ve,
        vqa_gen,
    )
    from narvl_plugin.training.schedule import PolynomialDecayLRScheduleConfig, WarmupRatioConfig

    single = base.BaseTaskConfig
    short = answers.AnswerTaskConfig
    return {
        "the list of commands": list_of_commands,
        "all commands": all_commands,
        "options of all tasks": lambda: options(common.CommonConfig),
        "options of single tasks": lambda: options(single, common.CommonConfig),
        "options of caption": lambda: options(caption.CaptionConfig, single),
        "options of refcoco": lambda: options(refcoco.RefcocoConfig, single),
        "options of regions": lambda: options(regions.RegionsConfig, single),
        "options of scene_graph": lambda: options(scene_graph.SceneGraphConfig, single),
        "options of scene_tree": lambda: options(scene_tree.SceneTreeConfig, single),
        "options of short answers": lambda: options(short, single),
        "options of snli_ve": lambda: options(snli_ve.SnliVeConfig, short),
        "options of vqa_gen": lambda: options(vqa_gen.VqaGenConfig, short),
        "options of models": lambda: options(OfaConfig),
        "options of students": lambda: options(NarvlConfig, OfaConfig),
        "the sizes": table_of_sizes,
        "options of students' criterions": lambda: options(query_criterion.QueryCriterionConfig),
        "options of qctc": lambda: options(qctc.QueryCtcConfig, query_criterion.QueryCriterionConfig),
        "options of qset": lambda: options(qset.QuerySetConfig, query_criterion.QueryCriterionConfig),
        "options of the teacher's criterion": lambda: options(
            adjust_label_smoothed_cross_entropy.AdjustLabelSmoothedCrossEntropyConfig
        ),
        "options of the schedule": lambda: options(WarmupRatioConfig, PolynomialDecayLRScheduleConfig),
        "options of scorers": lambda: "\n".join(
            f"`--scoring {name}`:\n\n{options(config)}"
            for name, (_, config) in SCORERS.items()
            if any(one.metadata.get("help") for one in fields(config))
        ),
    }


# --- Pages -----------------------------------------------------------------------------------------------------------


def with_parts(text: str) -> str:
    """Return a page whose parts from the code are written anew."""
    if not MARKED.search(text):
        return text
    known = parts()
    return MARKED.sub(lambda found: f"{found[1]}\n{known[found[2]]()}\n{found[3]}", text)


def with_contents(name: str, text: str) -> str:
    """Return an index page with a table of contents for the navigation: the pages that its list links to.

    Args:
        name: the page, such as `how-to/index`.
        text: its text.
    """
    if not re.fullmatch(r"(\S+/)?index", name) or "{toctree}" in text:
        return text
    below = name == "index"
    pages = [page for page in LINK.findall(text) if page.endswith("/index") == below and ("/" in page) == below]
    return f"{text}\n```{{toctree}}\n:hidden:\n\n" + "".join(f"{page}\n" for page in dict.fromkeys(pages)) + "```\n"


def read(app: Any, name: str, content: list[str]) -> None:
    """Complete a page before Sphinx parses it."""
    if MARKED.search(content[0]):
        for module in [
            module for key, module in sys.modules.items() if key.startswith(("narvl_plugin.", "criterions"))
        ]:
            app.env.note_dependency(inspect.getfile(module), docname=name)
    content[0] = with_contents(name, with_parts(content[0]))


def skip_fields(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave the fields of a named tuple out of its members: its docstring describes them."""
    return True if type(member).__name__ == "_tuplegetter" else None


def draw_dashes(app: Any, document: nodes.document) -> None:
    """Write a dash between an argument and its description, where Sphinx leaves two hyphens."""
    for text in [text for text in document.findall(nodes.Text) if text == " -- "]:
        text.parent.replace(text, nodes.Text(" – "))


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("source-read", read)
    app.connect("doctree-read", draw_dashes)
    app.connect("autodoc-skip-member", skip_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def main() -> None:
    """Write the parts of all pages anew."""
    for page in sorted(DOCS.glob("*/*.md")):
        before = page.read_text(encoding="utf-8")
        after = with_parts(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(page)


if __name__ == "__main__":
    main()
