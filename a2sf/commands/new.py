"""`a2sf new policy|task|sweep NAME`: files of a new policy, task or sweep that run at once, with a test."""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from pathlib import Path
from string import Template

from a2sf.commands.arguments import Parser
from a2sf.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
KINDS = {
    "policy": {
        "{name}.py": "policy.py",
        "policy/{name}.yaml": "policy.yaml",
        "test_{name}.py": "test_policy.py",
    },
    "task": {
        "tasks/{name}.yaml": "task.yaml",
        "tasks/{name}.jsonl": "documents.jsonl",
        "test_{name}.py": "test_task.py",
    },
    "sweep": {
        "sweep/{name}.yaml": "sweep.yaml",
        "test_{name}.py": "test_sweep.py",
    },
}
"""Kind -> each file in the user's folder, and its template."""
NEXT = {
    "policy": (
        "a2sf check {name}:{cls} --config-dir {folder}",
        "a2sf run -m policy=full,h2o,{name} budget.ratio=0.2 tasks=[copa] data=bundle limit=20 --config-dir {folder}",
    ),
    "task": ("a2sf run -m policy=full,h2o budget.ratio=0.2 tasks=[{name}] include_path={folder}/tasks",),
    "sweep": ("a2sf run +sweep={name} --config-dir {folder}",),
}
"""Kind -> commands to try next."""


def main(arguments: Sequence[str]) -> None:
    """Write the files, and print what to run next.

    Raises:
        UserError: if the name cannot be used, or a file is already there.
    """
    parser = Parser(
        "a2sf new",
        description="Write the files of a new policy, task or sweep, with a test, into a folder for --config-dir.",
    )
    parser.add_argument("kind", choices=sorted(KINDS), help="what to make")
    parser.add_argument("name", help="its name: small letters, digits and underscores")
    parser.add_argument("--folder", type=Path, default=Path("mine"), help="your folder (default: mine)")
    args = parser.parse_args(arguments)
    written = make(args.kind, args.name, args.folder)
    print("\n".join(f"Written: {path}" for path in written))
    print("Next:")
    named = {"name": args.name, "cls": class_name(args.name), "folder": args.folder}
    print("\n".join(f"  {line.format(**named)}" for line in (*NEXT[args.kind], "pytest {folder}")))


def make(kind: str, name: str, folder: Path) -> list[Path]:
    """Write the files of a policy, task or sweep called `name`.

    Raises:
        UserError: as `main`; then nothing was written.
    """
    if not name.isidentifier() or not name.isascii() or name != name.lower() or keyword.iskeyword(name):
        raise UserError(f"{name} is not allowed as a name: use small letters, digits and underscores, a letter first.")
    _check_free(kind, name)
    files = {folder / path.format(name=name): template for path, template in KINDS[kind].items()}
    for path in files:
        if path.exists():
            raise UserError(f"{path} is already there; choose another name, or --folder.")
    fields = {
        "name": name,
        "cls": class_name(name),
        "label": name.replace("_", " ").capitalize(),
        "folder": str(folder),
        "tasks": str((folder / "tasks").absolute()),
    }
    for path, template in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")
        path.write_text(Template(text).substitute(fields), encoding="utf-8")
    return list(files)


def class_name(name: str) -> str:
    """`first_and_last` as `FirstAndLast`."""
    return "".join(part.capitalize() for part in name.split("_"))


def _check_free(kind: str, name: str) -> None:
    """Refuse the name of a policy, task or sweep of the package.

    Raises:
        UserError: if the name exists there.
    """
    from a2sf.shipped import shipped

    if (shipped("conf") / kind / f"{name}.yaml").exists():
        raise UserError(f"{name} is a {kind} that comes with a2sf; choose another name.")
