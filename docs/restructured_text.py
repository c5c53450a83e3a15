"""The reStructuredText of the docstrings, which `help()` shows, as the Markdown that mkdocstrings takes."""

import re
import textwrap
from typing import Any

from griffe import Docstring, Extension, Object

SUPERSCRIPT = str.maketrans("0123456789pTrd", "⁰¹²³⁴⁵⁶⁷⁸⁹ᵖᵀʳᵈ")
SUBSCRIPT = str.maketrans("0123456789p", "₀₁₂₃₄₅₆₇₈₉ₚ")

# The formula on the line itself, or indented below it.
MATH = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)$", re.M)
INLINE_MATH = re.compile(r":math:`([^`]*)`")
TABLE = re.compile(r"^( *)=+(?:  +=+)+\n(?:.*\n)*?\1=+(?:  +=+)+\n(?:.*\n)*?\1=+(?:  +=+)+$", re.M)
# Under its heading or without one, to the last line that is indented as far.
EXAMPLE = re.compile(r"^( *)(Example:\n\n\1 +)?>>> .*(?:\n\1.*\S.*|\n(?=\1 +>>>))*", re.M)
ROLE = re.compile(r":(func|class|mod|data|meth):`([\w.]+)`")


def math(match: re.Match[str]) -> str:
    indent, formula = match.groups()
    return textwrap.indent(f"$$\n{textwrap.dedent(formula).strip()}\n$$", indent)


def table(match: re.Match[str]) -> str:
    """A simple table, whose columns begin where the rulers' do."""
    lines = [line[len(match[1]) :] for line in match[0].splitlines()]
    starts = [m.start() for m in re.finditer(r"=+", lines[0])]
    ends = [*starts[1:], None]
    rows = [
        [line[i:j].strip() for i, j in zip(starts, ends, strict=True)] for line in lines if not line.startswith("=")
    ]
    rows.insert(1, ["---"] * len(starts))
    return textwrap.indent("\n".join(f"| {' | '.join(row)} |" for row in rows), match[1])


def example(match: re.Match[str]) -> str:
    indent, heading = match[1], match[2]
    code = textwrap.dedent(match[0].split("\n", 2)[2] if heading else match[0])
    return textwrap.indent(("**Example**\n\n" if heading else "") + f"```pycon\n{code}\n```", indent)


def role(match: re.Match[str]) -> str:
    kind, name = match.groups()
    if name.startswith("torch.") or kind in ("mod", "data"):
        return f"`{name}`"
    name = name.removeprefix("torch_divergence.")
    return f"[`{name}`][torch_divergence.{name}]"


def prose(text: str) -> str:
    text = TABLE.sub(table, text)
    text = ROLE.sub(role, text)
    text = re.sub(r"\\ :sup:`(\w+)`(?:\\ )?", lambda m: m[1].translate(SUPERSCRIPT), text)
    text = re.sub(r"\\ :sub:`(\w+)`(?:\\ ?)?", lambda m: m[1].translate(SUBSCRIPT), text)
    text = re.sub(r"<(?=\w)", "&lt;", text)  # <a, f> is no tag
    return text.replace(r"\|", "|").replace("(*", r"(\*")


def markdown(text: str) -> str:
    """Formulas and examples are taken out of the prose, whose markup they do not share."""
    kept: list[str] = []

    def keep(convert: Any) -> Any:
        def replace(match: re.Match[str]) -> str:
            kept.append(convert(match))
            return f"\0{len(kept) - 1}\0"

        return replace

    text = EXAMPLE.sub(keep(example), MATH.sub(keep(math), text))
    text = INLINE_MATH.sub(keep(lambda m: f"${m[1]}$"), text)
    return re.sub(r"\0(\d+)\0", lambda m: kept[int(m[1])], prose(text))


# What a module's methods take is said by their signatures and by the function behind them; without a docstring they
# would not be shown.
METHODS = {
    "forward": "The loss of a batch.",
    "discriminator": "The discriminator's loss.",
    "critic": "The critic's loss.",
    "generator": "The generator's loss.",
}


class RestructuredText(Extension):
    """Griffe calls this for every object that it has read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
        elif obj.is_function and obj.parent is not None and obj.parent.is_class and obj.name in METHODS:
            obj.docstring = Docstring(METHODS[obj.name], parent=obj)
