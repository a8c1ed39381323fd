"""Static checks of the web page; `tests/page` tests its behaviour in a browser."""

from __future__ import annotations

import re
from pathlib import Path

from server import playground
from server.requests import uploads
from server.requests.schemas import GenerateRequest

FOLDER = Path(playground.__file__).parent
PAGE = (FOLDER / "index.html").read_text(encoding="utf-8")
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js")}
SCRIPT = "\n".join(SCRIPTS.values())


def constant(name: str) -> int:
    """The number, or product of numbers, that a script calls `name`."""
    (found,) = re.findall(rf"\b{name} = ([\d_ *]+)", SCRIPT)
    product = 1
    for factor in found.split("*"):
        product *= int(factor)
    return product


def test_it_rejects_the_images_that_the_server_would_reject() -> None:
    assert constant("MAX_FILE") == uploads.MAX_FILE
    assert constant("MAX_PIXELS") == uploads.MAX_PIXELS


def test_every_element_that_it_uses_exists_once() -> None:
    ids = re.findall(r'\bid="([\w-]+)"', PAGE)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT)) <= set(ids)
    assert set(re.findall(r'\b(?:for|aria-describedby)="([\w-]+)"', PAGE)) <= set(ids)


def test_it_sends_only_known_fields() -> None:
    bodies = re.findall(r"\nexport function (?:body|imageFields)\(\) \{.*?return \{(.*?)\n  \};", SCRIPT, re.DOTALL)
    assert len(bodies) == 2
    sent = set(re.findall(r"\b(\w+):", "".join(bodies))) | set(re.findall(r"(?<=, )(width|height)\b", "".join(bodies)))
    assert {"prompt", "scheduler", "image", "mask", "strength"} <= sent <= GenerateRequest.model_fields.keys()


LATER = set(re.findall(r'\bimport\("\./([\w.-]+)"\)', SCRIPT))  # loaded when they are used first


def test_it_loads_every_module_at_once() -> None:
    """What the entry imports would be found only when it has arrived, and what that imports later still."""
    loaded = re.findall(r'(?:modulepreload" href|module" src)="playground/([\w.-]+)"', PAGE)
    assert sorted(loaded) == sorted(SCRIPTS.keys() - LATER)


def test_every_import_exists() -> None:
    for importer, script in SCRIPTS.items():
        for names, source in re.findall(r'import \{([^}]*)\} from "\./([\w.-]+)";', script):
            exported = re.findall(r"export (?:async )?(?:const|let|class|function\*?) ([\w$]+)", SCRIPTS[source])
            missing = {name.strip() for name in names.split(",") if name.strip()} - set(exported)
            assert not missing, f"{importer} imports {missing} from {source}"


def test_it_is_small() -> None:
    """What it loads at its start."""
    files = [path for path in FOLDER.iterdir() if path.suffix in {".html", ".css", ".js"} and path.name not in LATER]
    assert sum(path.stat().st_size for path in files) < 87_000


def test_data_reaches_it_as_text_only() -> None:
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", SCRIPT)
