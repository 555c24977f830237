"""One flat file that holds the whole model for transformers' remote code, made from the sources in ``model/``.

The sources are joined in the order of their imports; comments and docstrings stay. A name that two of them use for
different things, or that is reached through its module (``init.ones``), gets the module's name before it.
"""

from __future__ import annotations

import ast
import builtins
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FILE = "modeling_pedigree"
"""The module's name, as ``auto_map`` has it."""
ROOT = Path(__file__).resolve().parents[1]
ENTRY = "model.lm"
AUTO_MAP = {
    "AutoConfig": f"{FILE}.HybridConfig",
    "AutoModelForCausalLM": f"{FILE}.HybridForCausalLM",
}
_HEADER = '''"""The model of this checkpoint for transformers' remote code; generated, so change its sources instead.

Load with ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)``; needs torch, transformers and
pydantic.
"""

from __future__ import annotations

'''
Edit = tuple[int, int, bytes]
"""First byte, byte after the last, and what comes in their place."""


class _Module:
    """One source file: its text, what it imports from the model, and the names that it defines."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.content = _path(name).read_bytes()
        self.tree = ast.parse(self.content)
        self.imports = list(_imports(self.tree.body))
        self.defines = {name for node in self.tree.body for name in _defined(node)}
        lines = self.content.splitlines(keepends=True)
        self._starts = [sum(map(len, lines[:number])) for number in range(len(lines) + 1)]

    def span(self, node: ast.expr | ast.stmt | ast.alias) -> tuple[int, int]:
        """First byte of ``node`` and the byte after its last."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self._starts[node.lineno - 1] + node.col_offset,
            self._starts[node.end_lineno - 1] + node.end_col_offset,
        )


def remote_code() -> str:
    """The file's content.

    Raises:
        ValueError: for a source that cannot be joined: an import of another form, or a name that a function uses for
            something else as well.
    """
    modules = _in_order(ENTRY)
    new_names = _new_names(modules)
    outside: dict[str, None] = {}
    bodies = []
    for module in modules.values():
        bodies.append(_body(module, modules, new_names).strip())
        outside.update(dict.fromkeys(_outside_imports(module)))
    imports = "\n".join(sorted(outside))
    sections = "\n\n\n".join(bodies)
    return f"{_HEADER}{imports}\n\n{sections}\n"


def _path(name: str) -> Path:
    path = ROOT.parent / Path(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_own(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "model"


def _imports(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def _in_order(entry: str) -> dict[str, _Module]:
    """The modules that ``entry`` needs, each after those that it imports."""
    found: dict[str, _Module] = {}

    def visit(name: str) -> None:
        if name in found:
            return
        module = _Module(name)
        for imported in _own_imports(module):
            visit(imported)
        found[name] = module

    visit(entry)
    return found


def _own_imports(module: _Module) -> list[str]:
    names = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and _is_own(node.module):
            assert node.module is not None
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name for name in inner if _is_module(name)] or [node.module]
    # An import inside a function breaks a circle of files; joined in one there is none.
    return [name for name in names if _stands_at_top(module, name)]


def _is_module(name: str) -> bool:
    path = ROOT.parent / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _stands_at_top(module: _Module, name: str) -> bool:
    tops = [node for node in module.imports if isinstance(node, ast.ImportFrom)]
    return any(node.module == name or f"{node.module}.{alias.name}" == name for node in tops for alias in node.names)


def _defined(node: ast.stmt) -> list[str]:
    """Names that a statement at the top of a file defines, imports left out."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _new_names(modules: dict[str, _Module]) -> dict[str, dict[str, str]]:
    """For each module the names of its own that the joined file spells otherwise."""
    uses = Counter(name for module in modules.values() for name in module.defines)
    foreign = _outside_names(modules)
    reached = {name for module in modules.values() for name in _module_aliases(module).values()}
    renamed = {}
    for name, module in modules.items():
        prefix = name.rpartition(".")[2]
        clashes = {own for own in module.defines if uses[own] > 1 or own in foreign or name in reached}
        renamed[name] = {own: f"_{prefix}{own}" if own.startswith("_") else f"{prefix}_{own}" for own in clashes}
    return renamed


def _outside_names(modules: dict[str, _Module]) -> set[str]:
    """Names that other packages' things have in the joined file.

    Raises:
        ValueError: when two sources call different things by one name.
    """
    lines: dict[str, str] = {}
    for module in modules.values():
        for line in _outside_imports(module):
            name = line.rpartition(" ")[2]
            if lines.setdefault(name, line) != line:
                raise ValueError(f"{module.name} must not import another {name} than `{lines[name]}`; got `{line}`")
    return {*lines, *dir(builtins)}


def _module_aliases(module: _Module) -> dict[str, str]:
    """Names by which ``module`` reaches other modules as a whole: ``{"init": "model.init"}``."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in module.imports
        if isinstance(node, ast.ImportFrom) and _is_own(node.module)
        for alias in node.names
        if _is_module(f"{node.module}.{alias.name}")
    }


def _body(module: _Module, modules: dict[str, _Module], new_names: dict[str, dict[str, str]]) -> str:
    """The module's text without imports and module docstring, names changed."""
    edits = [(*module.span(node), b"") for node in _dropped(module)]
    words = dict(new_names[module.name])
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and _is_own(node.module):
            words |= _imported_words(node, new_names)
            if node not in module.imports:
                edits.append((*module.span(node), b"pass"))
    aliases = _module_aliases(module)
    _refuse_shadows(module, {*words, *aliases})
    edits += _renames(module, words, aliases, new_names)
    content = module.content
    for first, last, text in sorted(edits, reverse=True):
        content = content[:first] + text + content[last:]
    return content.decode()


def _dropped(module: _Module) -> list[ast.stmt]:
    body = module.tree.body
    docstring = body[:1] if ast.get_docstring(module.tree) is not None else []
    return [*docstring, *module.imports]


def _imported_words(node: ast.ImportFrom, new_names: dict[str, dict[str, str]]) -> dict[str, str]:
    assert node.module is not None
    renamed = new_names.get(node.module, {})
    for alias in node.names:
        if alias.asname is not None:
            raise ValueError(
                f"from {node.module} import {alias.name} must keep the name; got {alias.asname}; drop `as`"
            )
    return {alias.name: renamed[alias.name] for alias in node.names if alias.name in renamed}


def _renames(
    module: _Module, words: dict[str, str], aliases: dict[str, str], new_names: dict[str, dict[str, str]]
) -> Iterator[Edit]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and node.id in words:
            yield (*module.span(node), words[node.id].encode())
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield (*module.span(node), new_names[aliases[node.value.id]][node.attr].encode())
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in words and node in module.tree.body:
            yield _rename_definition(module, node, words[node.name])


def _rename_definition(module: _Module, node: ast.FunctionDef | ast.ClassDef, name: str) -> Edit:
    keyword = b"class " if isinstance(node, ast.ClassDef) else b"def "
    start = module.span(node)[0] + len(keyword)
    assert module.content[start : start + len(node.name)] == node.name.encode()
    return start, start + len(node.name), name.encode()


def _refuse_shadows(module: _Module, words: set[str]) -> None:
    """A changed name must mean one thing throughout its file, or a function's own variable would change with it."""
    bound = {node.arg for node in ast.walk(module.tree) if isinstance(node, ast.arg)}
    for function in ast.walk(module.tree):
        if isinstance(function, ast.FunctionDef | ast.Lambda):
            inner = (node for node in ast.walk(function) if isinstance(node, ast.Name))
            bound |= {node.id for node in inner if isinstance(node.ctx, ast.Store)}
    if bound & words:
        raise ValueError(
            f"{module.name} must not use {sorted(bound & words)} for a variable, since the flat file renames them; "
            "rename the variable"
        )


def _outside_imports(module: _Module) -> Iterator[str]:
    """Imports of other packages, one line a name."""
    for node in module.imports:
        if isinstance(node, ast.ImportFrom) and (_is_own(node.module) or node.module == "__future__"):
            continue
        for alias in node.names:
            name = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
            yield f"from {node.module} import {name}" if isinstance(node, ast.ImportFrom) else f"import {name}"
