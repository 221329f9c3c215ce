"""What a person asks for: options, and the settings of --config and --set that stand for options too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sage_cli.jobs import settings_file
from sage_contracts.config import overlay
from sage_contracts.errors import InvalidRequestError

OPTION_OF = {
    "task": "--task",
    "model_name": "--model",
    "data_path": "--data",
    "output_dir": "--name",
    "preset": "--preset",
}
"""Settings of TrainingConfig that have an option of their own."""
_OUTPUT_FOLDER = "finetune_output"
"""Of a home: a job's `output_dir` is a folder in it, of the tuned model's name."""


@dataclass(frozen=True)
class JobWish:
    """What the command line said; None (of `model`: auto) where it said nothing."""

    task: str | None = None
    model: str = "auto"
    data: Path | None = None
    name: str | None = None
    preset: str | None = None
    config: Path | None = None
    settings: list[str] = field(default_factory=list)

    def with_settings(self, *, is_trained: bool = True) -> tuple[JobWish, dict[str, Any]]:
        """(the options, those included that --config or --set name as settings; the other settings, sparse).

        An option wins over the file, so that a run's own training_config.json can be used again with other
        data or another name. What is not trained needs no name. Raises: InvalidRequestError naming the field,
        also where --set contradicts an option.
        """
        said = _without_nulls(settings_file.assigned(self.settings))
        in_file = _without_nulls(settings_file.read_file(self.config)) if self.config else {}
        fields = overlay(in_file, said)
        settings_file.check(fields)
        options = {name: self._option(name, said, in_file) for name in OPTION_OF}
        data = options["data_path"]
        wish = replace(
            self,
            task=options["task"],
            model=options["model_name"] or "auto",
            data=Path(data) if data else None,
            name=self._name(said, in_file) if is_trained else self.name,
            preset=options["preset"],
        )
        return wish, {name: value for name, value in fields.items() if name not in OPTION_OF}

    def _option(self, name: str, said: Mapping[str, Any], in_file: Mapping[str, Any]) -> str | None:
        option, given = OPTION_OF[name], self._given()[name]
        if given is not None and name in said and str(said[name]) != given:
            raise InvalidRequestError(
                f"{option} {given} and --set {name}={said[name]} say different things: give {option} alone.",
                param=name,
            )
        value = said.get(name, in_file.get(name)) if given is None else given
        return None if value is None else str(value)

    def _name(self, said: Mapping[str, Any], in_file: Mapping[str, Any]) -> str | None:
        """The tuned model's: --name, else of the folder that the file's own job wrote to."""
        folder = Path(in_file.get("output_dir", ""))
        if "output_dir" not in said:
            if self.name is not None or "output_dir" not in in_file:
                return self.name
            if folder.parent.name == _OUTPUT_FOLDER:
                return folder.name
        source = "--set" if "output_dir" in said else f"--config {self.config}"
        raise InvalidRequestError(
            f"{source}: output_dir cannot be used, because the folder of a tuned model follows from its name:"
            " give --name NAME.",
            param="output_dir",
        )

    def _given(self) -> dict[str, str | None]:
        return {
            "task": self.task,
            "model_name": None if self.model == "auto" else self.model,
            "data_path": None if self.data is None else str(self.data),
            "output_dir": self.name,
            "preset": self.preset,
        }


def _without_nulls(settings: dict[str, Any]) -> dict[str, Any]:
    # A run's file says null for what its job was told elsewhere.
    return {name: value for name, value in settings.items() if value is not None or name not in OPTION_OF}
