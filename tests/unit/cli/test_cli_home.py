"""The folder that a stack is to live in, before anything is started there."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_cli.stack.updown import require_home
from sage_contracts.errors import InvalidRequestError
from sage_contracts.home import Home


def test_a_home_is_made_even_where_short_lived_files_lie_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_RUN_DIR", str(tmp_path / "run"))
    require_home(Home(tmp_path / "new" / "home"))
    assert (tmp_path / "new" / "home").is_dir() and (tmp_path / "run").is_dir()


def test_the_variable_of_the_folder_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(InvalidRequestError, match=r"file/home cannot be used.*Set SAGE_HOME to"):
        require_home(Home(in_the_way / "home"))
    monkeypatch.setenv("SAGE_RUN_DIR", str(in_the_way / "run"))
    with pytest.raises(InvalidRequestError, match=r"file/run cannot be used.*Set SAGE_RUN_DIR to"):
        require_home(Home(tmp_path / "home"))
