"""What an import tells of itself beside the weights: in the folder `hf` of its run, and shown by `lm describe`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from etils import epath

from lm.errors import UserError

RECORD = "import.json"
LISTED = 3  # names of parameters in an error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportRecord:
    """architecture: the class that the folder was of. untrained: paths of parameters that it did not have and that were
    made anew. ignored_fields: of its config.json, accepted by name. notes: what was told at the import."""

    architecture: str = ""
    untrained: tuple[str, ...] = ()
    ignored_fields: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        (folder / RECORD).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path | epath.Path) -> ImportRecord:
        """The record in the folder `hf` of a run; an empty one of a run that an older version imported."""
        if not (folder / RECORD).is_file():
            return cls()
        value = _read(folder / RECORD)
        names = lambda name: tuple(map(str, found)) if isinstance(found := value.get(name), list) else ()
        return cls(
            architecture=str(value.get("architecture", "")),
            untrained=names("untrained"),
            ignored_fields=names("ignored_fields"),
            notes=names("notes"),
        )

    def check_trained(self, what: str, run: object) -> None:
        """Raises UserError where a part of the model has learnt nothing yet: what it says would mean nothing."""
        if self.untrained:
            names = ", ".join(self.untrained[:LISTED]) + (", ..." if len(self.untrained) > LISTED else "")
            raise UserError(
                f"{what}: expected a model whose head was trained, got the import of a {self.architecture}, which has "
                f"none: {names} are new; train it first: lm train RECIPE --workdir NEW train.init_from={run}"
            )

    def lines(self) -> dict[str, str]:
        """What there is to say, by what it is about."""
        said = {"imported from": self.architecture, "ignored fields": ", ".join(self.ignored_fields)}
        said |= {"untrained": ", ".join(self.untrained), "notes": "; ".join(self.notes)}
        return {name: value for name, value in said.items() if value}


def _read(path: Path | epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path}: expected the record of an import, got something else ({e}); import again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected the record of an import, got a {type(value).__name__}; import again")
    return value
