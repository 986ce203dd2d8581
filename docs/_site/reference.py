"""What the reference needs beyond the docstrings: roles become links, formulas MathML, and private bases are read.

Docstrings name other objects by roles (``:class:`Engine` ``), which mkdocstrings does not know, and formulas by
``:math:``. A method that a public class has from a private base belongs to the public class for its readers.
"""

import re
from collections.abc import Iterator

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r":(class|func|meth|attr|data|mod|math):`([^`]+)`")

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)  # the plural is the section whose code is set as such
CODE = re.compile(r"::$", re.MULTILINE)


def paths(module: griffe.Module) -> Iterator[griffe.Class | griffe.Function | griffe.Attribute | griffe.Module]:
    """Yield everything that is defined in a module and below it, once."""
    yield module
    for member in module.members.values():
        if member.is_alias:
            continue
        if member.is_module or member.is_class:
            yield from paths(member)
        else:
            yield member


def path_of(thing: griffe.Object | griffe.Alias) -> str:
    """Return the path where something is defined, or that of another library, whose source is not read."""
    try:
        return thing.canonical_path
    except griffe.AliasResolutionError:
        return thing.target_path


def found(scope: griffe.Object, name: str) -> str:
    """Return the full path of a name as a docstring in ``scope`` means it."""
    first, *rest = name.split(".")
    around: griffe.Object | None = scope
    while around is not None:
        members = around.all_members if around.is_class else around.members
        if first in members:
            return ".".join([path_of(members[first]), *rest])
        around = around.parent
    return name


def link(path: str, text: str) -> str:
    """Return a link into the reference, or plain code where the reference has no such object."""
    return f'<autoref optional identifier="{path}"><code>{text}</code></autoref>'


class Reference(griffe.Extension):
    """Prepares the loaded package for mkdocstrings."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Change docstrings and members, once all modules are there."""
        public = {
            path_of(module.members[name])
            for module in paths(pkg)
            if module.is_module
            for name in map(str, module.exports or ())
            if name in module.members and not module.is_private
        }
        for thing in paths(pkg):
            if thing.docstring is not None:
                text = CODE.sub(":", EXAMPLE.sub("Examples:", thing.docstring.value))
                thing.docstring.value = ROLE.sub(lambda match, at=thing: self.replaced(at, *match.groups()), text)
            if thing.is_attribute and thing.docstring is None and thing.parent.is_module:
                self.name(thing, public)
        for path in sorted(public):
            thing = pkg.modules_collection[path]
            if thing.is_class:
                self.adopt(thing, public)

    def name(self, thing: griffe.Attribute, public: set[str]) -> None:
        """Say of a second name of something public which the first is."""
        first = found(thing.parent, str(thing.value))
        if first in public:
            thing.docstring = griffe.Docstring(f"The same as {link(first, str(thing.value))}.", parent=thing)

    def replaced(self, scope: griffe.Object, role: str, name: str) -> str:
        """Return what stands for a role in Markdown."""
        if role == "math":
            return f"<span>{convert(name)}</span>"  # which may begin a line, and a formula may not
        short = name.split(".")[-1] if name.startswith("~") else name
        return link(found(scope, name.removeprefix("~")), short)

    def adopt(self, thing: griffe.Class, public: set[str]) -> None:
        """Give a public class the public members, and the constructor, of bases that are private."""
        for base in thing.mro():
            if base.canonical_path in public:
                break  # this base's page has them
            for name, member in base.members.items():
                if name not in thing.members and (not name.startswith("_") or name == "__init__"):
                    thing.set_member(name, griffe.Alias(name, member, parent=thing))
