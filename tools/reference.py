"""A page for every public object, as mkdocs builds the site; and the README as its first page.

`make docs` runs it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).parents[1]
MODULES = {
    "pgap_kernels": "Ops",
    "pgap_kernels.noise": "The noise contract",
    "pgap_kernels.optim": "Optimizers",
    "pgap_kernels.subspace": "Subspaces",
    "pgap_kernels.finetune": "Fine-tuning as a library",
    "pgap_kernels.integrations.transformers": "The Trainer of transformers, and TRL",
    "pgap_kernels.integrations.lightning": "Lightning",
}


def source_of(module: str) -> ast.Module:
    """The syntax tree of a module, which is not imported: some need libraries that building pages does not."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def public_names(module: str) -> list[str]:
    """What ``__all__`` lists; else its public functions and classes."""
    body = source_of(module).body
    for node in body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return [name for name in ast.literal_eval(node.value) if name not in ("noise", "__version__")]
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def main() -> None:
    lines = ["# Reference", "", "A page for every public object, from its docstring."]
    for module, title in MODULES.items():
        lines += [
            "",
            f"## {title}",
            "",
            f"`{module}`: {(ast.get_docstring(source_of(module)) or '').splitlines()[0]}",
            "",
        ]
        for name in public_names(module):
            page = f"{module}.{name}.md"
            with mkdocs_gen_files.open(f"reference/{page}", "w") as file:
                file.write(f"# {name}\n\n::: {module}.{name}\n")
            lines.append(f"- [{name}]({page})")
    with mkdocs_gen_files.open("reference/index.md", "w") as file:
        file.write("\n".join(lines) + "\n")
    with mkdocs_gen_files.open("index.md", "w") as file:
        file.write((ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "]("))


main()
