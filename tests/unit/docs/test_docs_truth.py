"""What README and docs say is held against the code: links, commands, variables, presets, paths, snippets."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from sage.tools.finetune.quickstart import quickstart_overrides
from sage_cli.jobs.probe import probe_messages
from sage_contracts.config import PresetConfigs, PresetName, Task, TrainingConfig
from sage_servicekit.settings import ServiceSettings

ROOT = Path(__file__).parents[3]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [*READMES, *sorted((ROOT / "docs").rglob("*.md"))]
CHINESE = {page: ROOT / "docs" / page.name for page in sorted((ROOT / "docs/zh-CN").glob("*.md"))}
TWINS = [*CHINESE.items(), (READMES[1], READMES[0])]
"""Each Chinese page, and the English one whose content it has."""
SETTINGS_PAGES = [ROOT / folder / "presets-and-config.md" for folder in ("docs", "docs/zh-CN")]
MAX_PAGE_LINES = 200

each_twin = pytest.mark.parametrize(
    ("chinese", "english"), TWINS, ids=lambda page: str(page.relative_to(ROOT))
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    language: str
    text: str


# Four backticks hold a block with a block of three in it.
_BLOCK = re.compile(r"^(`{3,})([\w-]*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


def blocks_of(page: Path, *languages: str) -> list[Block]:
    found = [Block(*parts) for _, *parts in _BLOCK.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if not languages or block.language in languages]


def prose_of(page: Path) -> str:
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings_of(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)


# --- pages and links


@each_page
def test_a_page_is_short_enough_to_read(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= MAX_PAGE_LINES


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in {slug(heading) for heading in headings_of(linked)}, f"{target}: no such heading"


@each_page
def test_pages_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"(?<![\w/.*<-])((?:\.\./)?[\w./-]+\.md)\b", prose_of(page)):
        assert any((base / name).exists() for base in (page.parent, ROOT, ROOT / "docs")), name


# --- Chinese pages


@each_twin
def test_a_chinese_page_says_as_much_as_the_english_one(chinese: Path, english: Path) -> None:
    def measures(page: Path) -> dict[str, int]:
        starts = {"table rows": r"\| ", "list items": r"(?:[-*]|\d+\.) "}
        found = {name: len(re.findall(f"^{start}", prose_of(page), re.M)) for name, start in starts.items()}
        return found | {"headings": len(headings_of(page)), "blocks": len(blocks_of(page))}

    assert measures(chinese) == measures(english)


OTHER_WORDS = {"模型仓库": "模型中心", "基座模型": "基础模型", "token": "词元"}


@each_twin
def test_a_chinese_page_has_one_word_for_one_thing(chinese: Path, english: Path) -> None:
    text = re.sub(r"`[^`]+`", "", prose_of(chinese))
    assert [word for word in OTHER_WORDS if re.search(word, text, re.IGNORECASE)] == []


def names_on(page: Path) -> set[str]:
    """What is set as code and is the same in every language: settings, variables, options, values, paths."""
    names: set[str] = set()
    for span in re.findall(r"`([^`]+)`", prose_of(page)):
        words = span.split()
        names.update(words if len(words) == 1 else (w for w in words if re.search(r"^--\w|\w[-_/.=:@]\w", w)))
    # A placeholder, as NAME in `openai/NAME`, may be a Chinese word.
    return {name for name in names if not any(re.fullmatch("[A-Z]+", w) for w in re.split("[/=:@]", name))}


@each_twin
def test_a_chinese_page_names_all_that_the_english_one_names(chinese: Path, english: Path) -> None:
    text = chinese.read_text(encoding="utf-8")

    def is_named(name: str) -> bool:
        return bool(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.ASCII))

    assert [name for name in sorted(names_on(english)) if not is_named(name)] == []


@each_twin
def test_a_chinese_page_has_the_numbers_of_the_english_one(chinese: Path, english: Path) -> None:
    def numbers_on(page: Path) -> list[str]:
        text = re.sub(r"`[^`]+`|^\d+\. |(?<=\d),(?=\d{3})", "", prose_of(page), flags=re.MULTILINE)
        return sorted(re.findall(r"(?<![\w.])\d+(?:\.\d+)*", text, re.ASCII))

    assert numbers_on(chinese) == numbers_on(english)


@each_twin
def test_code_on_a_chinese_page_differs_only_in_what_it_says_to_people(chinese: Path, english: Path) -> None:
    strings = re.compile(r'"""(.*?)"""|"(.*?)"|\'(.*?)\'', re.DOTALL)
    for ours, theirs in zip(blocks_of(chinese), blocks_of(english), strict=True):
        assert ours.language == theirs.language
        if ours.language == "text":
            continue  # a drawing, with words in it
        here, there = (re.sub(r"(^|\s)#.*", "", block.text) for block in (ours, theirs))
        assert "".join(strings.sub("…", here).split()) == "".join(strings.sub("…", there).split())
        pairs = zip(strings.finditer(here), strings.finditer(there), strict=True)
        assert [ours[0] for ours, theirs in pairs if ours[0] != theirs[0] and ours[0].isascii()] == []


@each_twin
def test_a_chinese_page_leads_where_the_english_one_does_in_chinese_where_it_can(
    chinese: Path, english: Path
) -> None:
    def pages_linked_on(page: Path) -> set[Path]:
        targets = re.findall(r"\]\(([^)\s#]+)", prose_of(page))
        paths = {(page.parent / target).resolve() for target in targets if not re.match(r"[a-z]+:", target)}
        return paths - set(READMES)  # each leads to the other

    in_chinese = {english: chinese for chinese, english in CHINESE.items()}
    assert pages_linked_on(chinese) == {in_chinese.get(page, page) for page in pages_linked_on(english)}


def test_both_readmes_name_the_same_paths() -> None:
    english, chinese = READMES

    assert set(paths_named_on(english)) == set(paths_named_on(chinese))


# --- commands


def sage_command_lines(page: Path) -> Iterator[list[str]]:
    """The `sage …` commands of the shell blocks, as argument lists."""
    for block in blocks_of(page, "bash", "sh", "console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()")
            lexer.whitespace_split = True
            words = list(lexer)
            for position, word in enumerate(words):
                is_first = position == 0 or not re.match(r"[\w./-]", words[position - 1][-1:])
                if word == "sage" and (is_first or "=" in words[position - 1]):
                    rest = words[position + 1 :]
                    end = next((i for i, item in enumerate(rest) if re.fullmatch(r"[|&;()]+", item)), None)
                    yield rest[:end]


def sage_commands_in_prose(page: Path) -> Iterator[list[str]]:
    for code in re.findall(r"`sage ([^`]+)`", prose_of(page)):
        yield shlex.split(code.partition("…")[0])


def is_placeholder(word: str) -> bool:
    return bool(re.fullmatch(r"[A-Z_]+|<.*>", word)) or not word.isascii()


@functools.cache
def root_command() -> Any:
    from sage_cli.main import app

    return typer.main.get_command(app)


def check_command(words: list[str], *, is_sketch: bool) -> None:
    """Parse as the real command does, without running it. A sketch may leave out arguments."""
    command = root_command()
    rest = [word for word in words if word not in ("--help", "-h", "--version")]
    # `sage finetune sweep` is a group that also works by itself.
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        if is_sketch and is_placeholder(rest[0]):
            return
        assert rest[0] in command.commands, f"there is no command sage {' '.join(words)}"
        command, rest = command.commands[rest[0]], rest[1:]
    is_bare_group = hasattr(command, "commands") and not rest
    if is_bare_group or (is_sketch and any(is_placeholder(word) for word in rest)):
        return
    try:
        command.make_context("sage", rest)
    except typer.TyperException as error:
        is_only_incomplete = is_sketch and "Missing" in type(error).__name__
        assert is_only_incomplete, f"sage {' '.join(words)}: {error}"


@each_page
def test_commands_in_code_blocks_are_accepted(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SAGE_CHAT_BACKEND", "SAGE_CHAT_FINETUNE_MODEL"):
        monkeypatch.delenv(variable, raising=False)
    for words in sage_command_lines(page):
        check_command(words, is_sketch=False)


@each_page
def test_commands_in_prose_exist(page: Path) -> None:
    for words in sage_commands_in_prose(page):
        check_command(words, is_sketch=True)


@pytest.mark.parametrize("folder", ["docs", "docs/zh-CN"])
def test_every_command_and_option_is_documented(folder: str) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / folder).glob("cli*.md")))
    pending: list[tuple[str, Any]] = [("sage", root_command())]
    while pending:
        name, command = pending.pop()
        assert name in text
        pending += [(f"{name} {word}", sub) for word, sub in getattr(command, "commands", {}).items()]
        options = [o for p in command.params if not p.hidden for o in p.opts if o.startswith("--")]
        assert [option for option in options if option not in text] == [], name


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for block in blocks_of(page, "bash", "sh"):
            for target in re.findall(r"^make ([a-z-]+)", block.text, re.MULTILINE):
                assert re.search(rf"^[a-z -]*\b{target}\b[a-z -]*:", makefile, re.MULTILINE), target


def test_make_test_runs_every_level() -> None:
    levels = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}
    recipe = re.search(r"^test:.*\n\t(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None and levels <= set(recipe[1].split())


# --- environment variables


def settings_classes() -> Iterator[type[ServiceSettings]]:
    for package in sorted((ROOT / "services").glob("*/src/*")):
        if (package / "settings.py").exists():
            importlib.import_module(f"{package.name}.settings")
    pending = [ServiceSettings]
    while pending:
        cls = pending.pop()
        yield cls
        pending += cls.__subclasses__()


def variables_that_are_read() -> set[str]:
    """Fields of settings, names in code, and what compose, make and scripts substitute."""
    found = {f"SAGE_{name.upper()}" for cls in settings_classes() for name in cls.model_fields}
    code = [p for top in ("libs", "services", "cli") for p in (ROOT / top).rglob("*.py")]
    for path in code:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update((re.fullmatch(r"SAGE_[A-Z0-9_]+", node.value) and [node.value]) or [])
    scripts = [ROOT / "Makefile", ROOT / "compose.yaml", *(ROOT / "deploy").rglob("*.y*ml")]
    for path in [*scripts, *(ROOT / "deploy").rglob("*.sh"), *(ROOT / "tests").rglob("*.py")]:
        if path != Path(__file__):
            found.update(re.findall(r"\$\{?(SAGE_[A-Z0-9_]+)", path.read_text(encoding="utf-8")))
    return found


def test_every_variable_that_is_mentioned_is_read() -> None:
    known = variables_that_are_read()
    unread = {
        f"{page.relative_to(ROOT)}: {name}"
        for page in PAGES
        for name in re.findall(r"\bSAGE_[A-Z0-9_]*[A-Z0-9]\b", page.read_text(encoding="utf-8"))
        if name not in known
    }
    assert unread == set()


SET_BY_THE_PROGRAM = {"SAGE_ENGINE_PARENT", "SAGE_STACK_ID", "SAGE_STACK_PART"}
UNDER_ANOTHER_NAME = {"SAGE_HOME_DIR": "SAGE_HOME", "SAGE_OPENAI_API_KEY": "OPENAI_API_KEY"}


@pytest.mark.parametrize("folder", ["docs", "docs/zh-CN"])
def test_every_variable_that_is_read_is_documented(folder: str) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / folder).glob("*.md"))
    named = set(re.findall(r"\b[A-Z][A-Z0-9_]*[A-Z0-9]\b", text))
    wanted = {UNDER_ANOTHER_NAME.get(name, name) for name in variables_that_are_read() - SET_BY_THE_PROGRAM}
    assert wanted - named == set()


# --- presets and defaults


def preset_row(name: PresetName) -> list[str]:
    config = PresetConfigs.named(name)
    quantisation = "8-bit" if config.load_in_8bit else "4-bit" if config.load_in_4bit else "none"
    return [
        quantisation,
        config.precision,
        f"{config.per_device_train_batch_size} × {config.gradient_accumulation_steps}",
        str(config.max_length),
        config.optim,
        f"{config.lora.r} / {config.lora.lora_alpha}",
        "yes" if config.gradient_checkpointing else "no",
        f"{config.num_train_epochs:g}",
        f"{config.learning_rate:g}",
    ]


@pytest.mark.parametrize("page", [*READMES, *SETTINGS_PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_presets_table_is_what_the_presets_are(page: Path) -> None:
    english = {"无": "none", "是": "yes", "否": "no"}
    stated = {}
    for line in prose_of(page).splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 11 and cells[0].startswith("`"):
            stated[cells[0].strip("`")] = [english.get(cell, cell) for cell in cells[2:]]

    assert stated == {name.value: preset_row(name) for name in PresetName if name is not PresetName.AUTO}


@pytest.mark.parametrize("page", SETTINGS_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_settings_table_names_every_field_and_no_other(page: Path) -> None:
    text = prose_of(page)
    first_cells = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`([\w.]+)`", cell)}
    fields = {name for name in TrainingConfig.model_fields if name != "lora"}
    fields |= {f"lora.{name}" for name in type(TrainingConfig().lora).model_fields}

    assert named - {name.value for name in PresetName} == fields


# --- promises


@pytest.mark.parametrize("page", ["docs/promises.md", "docs/zh-CN/promises.md"])
def test_every_promise_has_a_command_and_a_test(page: str) -> None:
    rows = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    promises = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]
    promises = [cells for cells in promises if "`" in cells[-1]]
    assert len(promises) > 25
    for _, command, proof in promises:
        program, *words = shlex.split(command.strip("`"))
        assert program in ("sage", "ls", "watch", "tensorboard"), command
        if program == "sage":
            check_command(words, is_sketch=False)
        path, _, test = proof.strip("`").partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        assert test in {node.name for node in tree.body if isinstance(node, functions)}, proof


def test_both_languages_promise_the_same() -> None:
    def proofs(page: str) -> list[tuple[str, ...]]:
        text = (ROOT / page).read_text(encoding="utf-8")
        return re.findall(r"^\| .* \| (`[^`]+`) \| (`tests/[^`]+`) \|$", text, re.MULTILINE)

    assert proofs("docs/promises.md") == proofs("docs/zh-CN/promises.md") != []


# --- paths and snippets


def paths_named_on(page: Path) -> list[str]:
    pattern = r"`((?:services|libs|cli|deploy|tests|docs)/[\w./-]+|compose\.yaml|Makefile)`"
    return re.findall(pattern, prose_of(page))


@each_page
def test_paths_of_the_repository_exist(page: Path) -> None:
    assert [path for path in paths_named_on(page) if not (ROOT / path).exists()] == []


@each_page
def test_python_snippets_are_python_and_import_what_exists(page: Path) -> None:
    for block in blocks_of(page, "python"):
        for node in ast.walk(ast.parse(block.text.replace("…", "..."))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sage"):
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if alias.name not in dir(module)] == []


@pytest.mark.parametrize("folder", ["docs", "docs/zh-CN"])
def test_the_code_model_is_asked_on_the_page_as_quickstart_asks_it(folder: str) -> None:
    question = probe_messages(Task.CODE, None)[0]["content"]
    assert Block("text", f"{question}\n") in blocks_of(ROOT / folder / "quickstart.md")


@pytest.mark.parametrize("folder", ["docs", "docs/zh-CN"])
def test_the_quickstart_page_tells_what_a_quickstart_changes(folder: str) -> None:
    told = set(re.findall(r"\d+(?:\.\d+)?", prose_of(ROOT / folder / "quickstart.md")))
    for has_gpu, preset in ((False, PresetName.CPU), (True, PresetName.RTX_4090)):
        changed = quickstart_overrides(Task.CODE, preset, has_gpu=has_gpu)
        changed.pop("gradient_accumulation_steps", None)  # with the rows of a step
        assert {f"{value:g}" for value in changed.values()} <= told


@each_page
def test_json_snippets_are_json(page: Path) -> None:
    for block in blocks_of(page, "json"):
        json.loads(block.text)
